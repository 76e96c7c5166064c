"""The gate "around the graph": what a graph does not carry is done by the original, with a reason; never wrong, never a
crash that the original does not have.
"""

import copy
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from around import CASES, SILENT, WIDTH, Case, Entry, Expected, Net, difference, played
from torch import Tensor, nn

import fxbt

pytestmark = pytest.mark.filterwarnings("ignore")

MODES = [(entry, training) for entry in CASES for training in (False, True)]
ASKED = [(entry, training) for entry, training in MODES if (entry.train if training else entry.infer) is not None]


@pytest.fixture(autouse=True)
def _autocast_is_given_back() -> Iterator[None]:
    """A crash inside autocast must not show in the tests after it."""
    yield
    left_on = torch.is_autocast_enabled("cpu")
    torch.set_autocast_enabled("cpu", False)
    torch.clear_autocast_cache()
    assert not left_on, "autocast was left on"


def name_of(value: object) -> str:
    return value.name if isinstance(value, Entry) else ("inference", "training")[bool(value)]


@pytest.mark.parametrize(("entry", "training"), ASKED, ids=name_of)
def test_nobody_can_tell(entry: Entry, training: bool) -> None:
    torch.manual_seed(0)
    case = entry.make()
    torch.manual_seed(0)
    eager = copy.deepcopy(case.model) if case.copies else entry.make().model
    with torch.no_grad():
        fast = fxbt.optimize(case.model, inplace=case.inplace)
    expected, _ = played(case, eager, training)
    found, fast = played(case, fast, training)
    problem = difference(found, expected, case.tolerance, "call")
    problem = problem or unsaid(fast, entry.train if training else entry.infer, case)
    if problem is not None:
        pytest.fail(f"{problem}; the report's reasons: {reasons(fast)}", pytrace=False)


def reasons(fast: Any) -> list[str]:
    report = getattr(fast, "report", None)
    return list(report.fallbacks) if isinstance(report, fxbt.explain.report.Report) else []


def unsaid(fast: Any, expected: Expected, case: Case) -> str | None:
    """What is missing: a graph that serves the calls, or the report's reason in one of the words that are expected."""
    if expected == SILENT:
        return None
    words = (expected,) if isinstance(expected, str) else expected
    found = reasons(fast)
    if found:
        is_said = any(word.lower() in reason.lower() for word in words for reason in found)
        return None if is_said else f"no reason has one of the words {words}"
    if not fast.report.graphs:
        return "neither a graph nor a reason"
    if len(fast.report.graphs) > case.graphs:
        return f"{len(fast.report.graphs)} graphs where {case.graphs} do"
    return None if fast.report.hits["attention"] or not case.attention else "no attention was found"


def test_names_are_told_apart() -> None:
    names = [entry.name for entry in CASES]
    assert len(set(names)) == len(names)
    assert len(names) >= 60


# What takes more than three calls of one model ------------------------------------------------------------------------


def optimised(model: nn.Module | None = None) -> tuple[Any, nn.Module, Tensor]:
    """(an optimised model, its eager copy, an input); the next call of that kind is a graph's."""
    model = (model or Net()).eval()
    eager, x = copy.deepcopy(model), torch.randn(2, 5, WIDTH)
    fast = fxbt.optimize(model)
    with torch.no_grad():
        fast(x)
    return fast, eager, x


def test_eight_threads_call_one_model_for_the_first_time() -> None:
    model = Net().eval()
    eager, fast = copy.deepcopy(model), fxbt.optimize(model)
    inputs = [torch.randn(2, 3 + i, WIDTH) for i in range(8)]
    results: dict[int, Any] = {}
    start = threading.Barrier(8)

    def call(i: int) -> None:
        start.wait()
        with torch.set_grad_enabled(i % 2 == 0):
            results[i] = fast(inputs[i]), fast(inputs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        for y in results[i]:
            torch.testing.assert_close(y, eager(x), rtol=1e-4, atol=1e-5, msg=lambda text, i=i: f"thread {i}: {text}")
            assert y.requires_grad is (i % 2 == 0)
    assert len(fast.report.graphs) == 2 and not fast.report.fallbacks


def test_two_models_are_called_for_the_first_time_by_two_threads() -> None:
    models = [Net().eval(), Net().double().eval()]
    eager = copy.deepcopy(models)
    fast = [fxbt.optimize(model) for model in models]
    inputs = [torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH).double()]
    results: dict[tuple[int, int], Tensor] = {}

    def call(i: int) -> None:
        with torch.no_grad():
            for turn in range(4):
                results[i, turn] = fast[i](inputs[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (i, _), y in results.items():
        torch.testing.assert_close(y, eager[i](inputs[i]).detach(), rtol=1e-4, atol=1e-5)
    assert len(results) == 8 and all(len(f.report.graphs) == 1 and not f.report.fallbacks for f in fast)


@pytest.mark.parametrize("when", ["first", "later"])
def test_an_interrupt_goes_to_the_caller(when: str) -> None:
    """KeyboardInterrupt is no failure of a graph; the next call is served as if nothing had been."""

    class Interrupted(Net):
        def forward(self, x):
            if interrupts.pop():
                raise KeyboardInterrupt
            return super().forward(x)

    interrupts = [False] * 20
    fast = fxbt.optimize(Interrupted().eval())
    eager = copy.deepcopy(fxbt.restore(fast))
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        if when == "later":
            fast(x)
        interrupts.append(True)
        try:
            fast(torch.randn(5, WIDTH)[None].double())  # a kind of call that no graph serves
        except KeyboardInterrupt:
            pass
        except RuntimeError:  # of float64 inputs, if the graph's capture used the interrupt up
            pytest.fail("the interrupt was swallowed")
        else:
            pytest.fail("the interrupt was swallowed")
        interrupts[:] = [False] * 20
        for _ in range(2):
            torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-5)


def test_replicas_of_data_parallel_run_their_own_weights() -> None:
    fast, eager, x = optimised()
    replica = fast._replicate_for_data_parallel()
    replica.last = copy.deepcopy(eager.last)
    eager.last.weight.data.mul_(2)
    replica.last.weight.data.mul_(2)
    torch.testing.assert_close(replica(x), eager(x), rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inside", [False, True], ids=["ddp of fast", "fast of ddp"])
def test_distributed_data_parallel(one_process_group: None, inside: bool) -> None:
    model = Net().train()
    eager = copy.deepcopy(model)
    if inside:
        net = fxbt.optimize(nn.parallel.DistributedDataParallel(model))
    else:
        net = nn.parallel.DistributedDataParallel(fxbt.optimize(model))
    reference = nn.parallel.DistributedDataParallel(eager)
    for step in range(3):
        x = torch.randn(2, 4 + step, WIDTH)
        for each in (net, reference):
            each.zero_grad()
            each(x).square().sum().backward()
        for (name, p), (_, q) in zip(net.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    report = (net if inside else net.module).report
    assert report.graphs or any("compiler.disable" in reason for reason in report.fallbacks), report


def test_dropout_goes_by_the_seed() -> None:
    class Dropped(Net):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    fast = fxbt.optimize(Dropped().train())
    x = torch.randn(8, 16, WIDTH)
    fast(x)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(fast(x))
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert 0.4 < outputs[0].eq(0).float().mean() < 0.6


def test_what_looks_on_stays() -> None:
    """A profiler of Python's, the garbage collector's thresholds, warning filters, torch's modes."""

    def profiler(frame, event, argument):
        return None

    def modes() -> tuple[Any, ...]:
        return (
            gc.get_threshold(),
            gc.isenabled(),
            list(warnings.filters),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
            torch.backends.mkldnn.matmul.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
            sys.getprofile(),
            sys.gettrace(),
            nn.Module.__call__,
            nn.Module.__getattr__,
            nn.Linear.forward,
            torch.softmax,
            F.linear,
            Tensor.softmax,
            torch.autograd.Function.apply,
        )

    sys.setprofile(profiler)
    try:
        before = modes()
        fast, eager, x = optimised()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-5)
        fast.train()(x).sum().backward()
        assert modes() == before
        assert len(fast.report.graphs) == 2 and not fast.report.fallbacks
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("kind", ["inference", "training", "refused", "in place"])
def test_a_model_that_nobody_holds_is_freed(kind: str) -> None:
    class Refused(Net):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    model = Refused() if kind == "refused" else Net()
    fast, x = fxbt.optimize(model.eval(), inplace=kind == "in place"), torch.randn(2, 5, WIDTH)
    with torch.set_grad_enabled(kind == "training"):
        for _ in range(2):
            fast(x)
    weight = weakref.ref(fast.last.weight)
    assert fast.report.fallbacks if kind == "refused" else fast.report.graphs
    del fast, model
    gc.collect()
    assert weight() is None, "an optimised model is kept by something after its user let it go"


def test_the_warning_points_at_the_users_line() -> None:
    fast = fxbt.optimize(Net().eval())
    fast.first.register_forward_hook(lambda module, args, output: output)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast(torch.randn(2, 5, WIDTH))
    (warning,) = [w for w in caught if issubclass(w.category, fxbt.errors.FxbtWarning)]
    assert warning.filename == __file__


def test_the_hook_of_a_backward_calls_the_model() -> None:
    fast, eager, x = optimised()
    seen = []
    y = fast(x)
    y.register_hook(lambda gradient: seen.append(fast(gradient)))
    y.sum().backward()
    torch.testing.assert_close(seen[0], eager(torch.ones_like(y)), rtol=1e-4, atol=1e-5)


def in_a_process_of_its_own(code: str) -> None:
    """Runs code that could end its process; `Net`, torch, fxbt, x, model and fast are there."""
    prelude = """
import copy, os, signal, sys, warnings
sys.path.insert(0, "tests")
warnings.simplefilter("ignore")
signal.alarm(120)
import torch, fxbt
from around import CASES, SILENT, WIDTH, Case, Entry, Expected, Net, difference, played
torch.set_num_threads(2)
torch.manual_seed(0)
model = Net().eval()
x = torch.randn(2, 5, WIDTH)
fast = fxbt.optimize(model)
"""
    run = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert run.returncode == 0, f"exit {run.returncode}: {run.stderr[-2000:]}"


def test_freed_storage() -> None:
    """FSDP frees the storage of parameters that are not gathered: nobody may look into it."""
    in_a_process_of_its_own("""
model.freed = torch.zeros(1 << 20)
model.freed.untyped_storage().resize_(0)
expected = model(x)
for grad in (False, True):
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert torch.allclose(fast(x), expected, atol=1e-5)
""")


@pytest.mark.parametrize("kernels", ["0", "1"], ids=["kernels by rule", "kernels by measurement"])
def test_fork_after_use(kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the eager model works in a fork, the optimised one does: with one thread, as in a DataLoader's workers."""
    monkeypatch.setenv("FXBT_TUNE", kernels)
    monkeypatch.setenv("FXBT_CACHE_DIR", str(tmp_path))
    in_a_process_of_its_own("""
with torch.no_grad():
    fast(x)
    expected = fast(x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        again = fast(x)
        new = copy.deepcopy(fast)
        new(x)
        right = torch.allclose(again, expected, atol=1e-5) and torch.allclose(new(x), expected, atol=1e-5)
        os._exit(0 if right else 3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child ended with {status}"
    assert torch.allclose(fast(x), expected, atol=1e-5)
""")
