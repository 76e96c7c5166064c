"""What runs while a call is captured: originals that share nothing with it, which meet nothing that a trace patches."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings

import pytest
import torch
from torch import fx, nn

import fxbt
from fxbt.capture.isolated import _Here, here_only, isolated, leaving_no_hooks
from fxbt.capture.locks import LOCK, CaptureLock

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")
SECONDS = 20  # that a thread is waited for; none takes as long


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Held(nn.Module):
    """Its forward stops while it is traced, until it is let go."""

    def __init__(self, linear: nn.Linear | None = None) -> None:
        super().__init__()
        self.linear = linear or nn.Linear(4, 4)
        hold = self.hold = Hold()
        self.before = lambda: hold()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.before()
        return self.linear(x).relu()


class Hold:
    """Two events, of which a model's state knows nothing."""

    def __init__(self) -> None:
        events = threading.Event(), threading.Event()
        self.wait = lambda: events
        self.__class__ = Hold

    def __call__(self) -> None:
        entered, let_go = self.wait()
        if torch.compiler.is_compiling():
            entered.set()
            assert let_go.wait(SECONDS)


class Uncapturable(nn.Module):
    """Runs its original at every call; says what it finds of a trace."""

    def __init__(self, linear: nn.Linear | None = None) -> None:
        super().__init__()
        self.linear = linear or nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or fx._symbolic_trace.is_fx_tracing():
            raise RuntimeError("not in here")
        if int(x.sum()) > 10**6:
            return x
        return self.inner(self.linear(x))


class Worker(threading.Thread):
    """Runs a function without gradients; `result()` is what it returned or raises what it raised."""

    def __init__(self, run):
        super().__init__(daemon=True)
        self._run, self._result, self._error = run, None, None
        self.start()

    def run(self):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                self._result = self._run()
        except BaseException as error:
            self._error = error

    def result(self):
        self.join(SECONDS)
        assert not self.is_alive(), "deadlock"
        if self._error:
            raise self._error
        return self._result


def is_set_in_time(event: threading.Event) -> bool:
    """Without `event.wait`: one who waits is noted in the event, which the model reads."""
    end = time.monotonic() + SECONDS
    while not event.is_set() and time.monotonic() < end:
        time.sleep(0.01)
    return event.is_set()


@contextlib.contextmanager
def held_in_trace(model: Held):
    """Captures the model in another thread, which is inside its trace for the length of the block."""
    fast = fxbt.optimize(model.eval())
    x = torch.randn(2, 3, 4)
    worker = Worker(lambda: fast(x))
    entered, let_go = model.hold.wait()
    assert is_set_in_time(entered), fast.report.fallbacks
    try:
        yield
    finally:
        let_go.set()
        torch.testing.assert_close(worker.result(), model.linear(x).relu())
    assert len(fast.report.graphs) == 1, fast.report.fallbacks


def never_captured(linear: nn.Linear | None = None):
    """An optimised model that runs its original, and has said so."""
    model = Uncapturable(linear).eval()
    fast = fxbt.optimize(model)
    fast(torch.randn(2, 3, 4))
    assert not fast.report.graphs and fast.report.fallbacks
    return model, fast


def test_the_original_of_another_model_runs_while_one_is_traced():
    model, fast = never_captured()
    x = torch.randn(5, 4, 4)
    expected = model(x)
    with held_in_trace(Held()):
        assert LOCK._claim is not None and LOCK._claim.is_active
        for _ in range(3):
            # Not bit for bit: torch.export switches oneDNN off for the process, and other kernels round elsewhere.
            torch.testing.assert_close(Worker(lambda: fast(x)).result(), expected)
    assert torch.equal(fast(x), expected) and not fast.report.graphs


def test_graphs_of_other_models_run_while_one_is_traced():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    fast = fxbt.optimize(model)
    x = torch.randn(5, 4)
    fast(x)
    with held_in_trace(Held()):
        torch.testing.assert_close(Worker(lambda: fast(x)).result(), model(x))
    assert len(fast.report.graphs) == 1


def test_plain_modules_of_other_threads_meet_nothing_of_a_trace():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    plain = Uncapturable().eval()
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4)
    expected = model(x), plain(y)
    with held_in_trace(Held()):
        found = Worker(lambda: (model(x), plain(y))).result()
        assert isinstance(plain.inner[0].weight, nn.Parameter) and type(plain.inner[0].weight.data) is torch.Tensor
        assert "__call__" not in Worker(lambda: repr(nn.Module.__call__(plain, y))).result()
    torch.testing.assert_close(found, expected)


def share_module(held: Held):
    return never_captured(held.linear)[1]


def share_parameter(held: Held):
    linear = nn.Linear(4, 4)
    linear.weight = held.linear.weight
    return never_captured(linear)[1]


def in_training(held: Held):
    """Draws from the one random generator, which a capture puts back."""
    _, fast = never_captured()
    fast.inner.train()
    return fast


@pytest.mark.parametrize("others", [share_module, share_parameter, in_training], ids=lambda others: others.__name__)
def test_an_original_that_capturing_endangers_waits(others):
    held = Held()
    fast = others(held)
    x = torch.randn(5, 4, 4)
    expected = fxbt.restore(fast)(x)
    with held_in_trace(held):
        worker = Worker(lambda: fast(x))
        worker.join(0.2)
        assert worker.is_alive()
    assert torch.equal(worker.result(), expected)


def test_a_model_that_cannot_be_looked_through_waits():
    class Strange(Uncapturable):
        def modules(self):
            raise RuntimeError("no")

    lock, strange = CaptureLock(), Strange()
    with lock.capturing(Held()):
        worker = Worker(lambda: lock.running(strange).__enter__())
        worker.join(0.2)
        assert worker.is_alive()
    worker.result()


def test_a_capture_waits_for_originals_that_it_endangers_and_for_no_others():
    lock, one, other = CaptureLock(), Held().eval(), Held().eval()
    may_end, runs = threading.Event(), threading.Event()

    def run():
        with lock.running(one):
            runs.set()
            assert may_end.wait(SECONDS)

    def capture(model):
        with lock.capturing(model):
            return True

    runner = Worker(run)
    assert runs.wait(SECONDS)
    assert Worker(lambda: capture(other)).result()
    waiting = Worker(lambda: capture(one))
    waiting.join(0.2)
    assert waiting.is_alive()
    may_end.set()
    assert waiting.result() and runner.result() is None


def test_alone_means_that_all_others_wait():
    lock = CaptureLock()
    with lock.capturing(Held().eval(), is_alone=True):
        worker = Worker(lambda: lock.running(Held().eval()).__enter__())
        worker.join(0.2)
        assert worker.is_alive()
    worker.result()


def test_a_thread_does_not_wait_for_itself():
    lock, one, other = CaptureLock(), Held().eval(), Held().eval()
    with lock.running(one), lock.running(one), lock.running(other):
        assert lock.runs_here() and not lock.captures_here()
        assert not Worker(lambda: lock.runs_here() or lock.captures_here()).result()
    assert not lock.runs_here()
    with lock.capturing(one), lock.running(one):
        assert lock.captures_here()
        assert not Worker(lock.captures_here).result()
    assert not lock.captures_here()


def test_within_an_original_another_one_runs_though_a_capture_of_it_waits_for_the_first():
    """Else each would wait for the other."""
    lock, part = CaptureLock(), Held().eval()
    whole = nn.Sequential(part).eval()

    def capture():
        with lock.capturing(part):
            return True

    with lock.running(whole):
        waiting = Worker(capture)
        while lock._claim is None:
            waiting.join(0.01)
        with lock.running(part):
            assert waiting.is_alive()
    assert waiting.result()


def test_eight_threads_call_one_model_first_and_it_is_captured_once():
    held = Held().eval()
    fast = fxbt.optimize(held)
    entered, let_go = held.hold.wait()
    inputs = [torch.randn(i + 1, 3, 4) for i in range(8)]
    workers = [Worker(lambda x=x: fast(x)) for x in inputs]
    assert is_set_in_time(entered), fast.report.fallbacks
    let_go.set()
    for x, worker in zip(inputs, workers, strict=True):
        torch.testing.assert_close(worker.result(), held(x))
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


# What a trace patches


def test_a_stand_in_is_of_its_thread_alone():
    function = here_only(lambda: "stand-in", lambda: "original")
    assert function() == "stand-in" and Worker(function).result() == "original"


def test_the_flag_of_a_trace_computes_as_the_bool_that_it_stands_for():
    """transformers: `is_tracing |= ...`."""
    flag = _Here()

    def results():
        return [flag | False, False | flag, flag & True, True & flag, flag ^ True, True ^ flag, flag == True, int(flag)]  # noqa: E712

    assert results() == [True, True, True, True, False, False, True, 1] and repr(flag) == "True"
    assert Worker(results).result() == [False, False, False, False, True, True, False, 0]
    assert hash(flag) == hash(True)


def test_traces_of_two_threads_take_their_patches_back_in_any_order():
    """As torch.compile in another thread, which knows nothing of our lock."""
    before = nn.Module.__call__, nn.Module.__getattr__
    outer, inner = fx._symbolic_trace._new_patcher, []
    tracing, may_end = threading.Event(), threading.Event()

    def other():
        with outer() as patcher:
            for name in ("__call__", "__getattr__"):
                original = getattr(nn.Module, name)
                patcher.patch_method(nn.Module, name, lambda *args, f=original: inner.append(1) or f(*args), False)
            tracing.set()
            assert may_end.wait(SECONDS)

    model = nn.Sequential(nn.Linear(4, 4))
    with isolated(), fx._symbolic_trace._new_patcher() as patcher:
        called = []
        original = nn.Module.__call__
        patcher.patch_method(nn.Module, "__call__", lambda *args: called.append(1) or original(*args), False)
        model(torch.ones(4))
        assert called == [1, 1]
        worker = Worker(other)
        assert tracing.wait(SECONDS)
    model(torch.ones(4))
    assert called == [1, 1] and inner  # theirs is still there
    may_end.set()
    worker.result()
    inner.clear()
    Worker(lambda: model(torch.ones(4))).result()
    model(torch.ones(4))
    assert called == [1, 1] and not inner
    nn.Module.__call__, nn.Module.__getattr__ = before  # a patch of ours that does nothing was put back
    fx._symbolic_trace.CURRENT_PATCHER = None  # and our patcher, which does nothing either


def test_a_trace_in_this_thread_may_take_the_patches_off_and_others_may_not():
    with isolated(), fx._symbolic_trace._new_patcher() as patcher:
        called = []
        original = nn.Module.__call__
        patcher.patch_method(nn.Module, "__call__", lambda *args: called.append(1) or original(*args), False)
        module = nn.Linear(4, 4)

        def others():
            with fx._symbolic_trace._maybe_revert_all_patches():
                return nn.Module.__call__ is original

        assert not Worker(others).result()
        with fx._symbolic_trace._maybe_revert_all_patches():
            module(torch.ones(4))
            assert not called
        module(torch.ones(4))
        assert called == [1]
    assert nn.Module.__call__ is original


def test_nothing_is_left_behind():
    names = ("__call__", "__getattr__", "_apply")
    before = [getattr(nn.Module, name) for name in names], torch.compiler._is_compiling_flag
    fast = fxbt.optimize(nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval())
    fast(torch.randn(2, 4))
    assert len(fast.report.graphs) == 1
    assert [getattr(nn.Module, name) for name in names] == before[0]
    assert torch.compiler._is_compiling_flag is before[1] is False and fx._symbolic_trace._is_fx_tracing_flag is False
    assert fx._symbolic_trace.CURRENT_PATCHER is None


def test_fx_walks_through_no_arguments_in_this_thread_alone():
    before = fx.graph.pytree
    with isolated():
        assert list(fx.graph.pytree.tree_iter((1, 2))) == []
        assert fx.graph.pytree.tree_leaves((1, 2)) == [1, 2]
        assert Worker(lambda: list(fx.graph.pytree.tree_iter((1, 2)))).result() == [1, 2]
    assert fx.graph.pytree is before


def test_a_trace_that_fails_leaves_no_hooks_on_buffers():
    def count():
        return len(torch.nn.modules.module._global_buffer_registration_hooks)

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x * float(x.sum())

    before, fast = count(), fxbt.optimize(Fails())
    for _ in range(3):
        fast(torch.ones(2, 3))
        assert count() == before
    assert fast.report.fallbacks and fast.calls == 3
    with leaving_no_hooks():
        torch.nn.modules.module.register_module_buffer_registration_hook(lambda *_: None)
        assert count() == before + 1
    assert count() == before
