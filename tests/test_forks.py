"""A forked child goes on where its parent was: after captures, during them, with threads that did not come along."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxbt
from fxbt.capture.locks import LOCK
from fxbt.kernels import forks, native
from fxbt.kernels.forks import FORKS

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Python 3.12 warns of forks beside threads
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks"),
]
SECONDS = 60


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def in_child(run):
    """What `run` returns in a forked child; fails if it does not come back."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work():
        with torch.no_grad():
            try:
                sender.send((run(), None))
            except BaseException as error:
                sender.send((None, f"{type(error).__name__}: {error}"))

    child = context.Process(target=work, daemon=True)
    child.start()
    try:
        assert receiver.poll(SECONDS), "the child hangs"
        result, error = receiver.recv()
    finally:
        child.kill()
        child.join()
    assert error is None, error
    return result


def captured(model: nn.Module, *inputs: torch.Tensor):
    fast = fxbt.optimize(model)
    fast(*inputs)
    assert len(fast.report.graphs) == 1, fast.report.fallbacks
    return fast


def test_a_child_runs_the_graphs_of_its_parent_on_one_thread_and_says_so_once():
    model, x = encoder(), torch.randn(4, 32, 64)
    fast = captured(model, x)
    expected = fast(x)

    def run():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [fast(x).numpy() for _ in range(2)]
        told = [str(w.message) for w in caught if "forked" in str(w.message)]
        return found, told, torch.get_num_threads(), len(fast.report.graphs), fast.report.fallbacks

    found, told, threads, graphs, fallbacks = in_child(run)
    for each in found:
        torch.testing.assert_close(torch.from_numpy(each), expected)
    assert graphs == 1 and not fallbacks
    assert threads == (1 if forks._has_gnu_openmp() else 2)
    assert len(told) == (threads == 1) and all("runs on one thread" in text for text in told)
    assert torch.get_num_threads() == 2 and not FORKS.is_unsaid


def test_a_child_captures_and_runs_originals():
    model, x = encoder(), torch.randn(4, 32, 64)
    fast = captured(model, x)
    expected = model(x[0])

    def run():
        first, second = fast(x[0]), fast(x[0])
        return first.numpy(), second.numpy(), len(fast.report.graphs), fast.report.fallbacks

    first, second, graphs, fallbacks = in_child(run)
    torch.testing.assert_close(torch.from_numpy(first), expected)
    torch.testing.assert_close(torch.from_numpy(second), expected)
    assert graphs == 2, fallbacks


def test_children_of_a_process_with_one_thread_have_nothing_to_say():
    torch.set_num_threads(1)
    x = torch.randn(4, 32, 64)
    fast = captured(encoder(), x)

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return fast(x).numpy()

    torch.testing.assert_close(torch.from_numpy(in_child(run)), fast(x))


class Encoded(Dataset):
    """Items that a model makes in the worker."""

    def __init__(self, fast: nn.Module, x: torch.Tensor) -> None:
        self.fast, self.x = fast, x

    def __len__(self) -> int:
        return len(self.x) // 2

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            return self.fast(self.x[2 * i : 2 * i + 2]), len(self.fast.report.graphs)


def test_workers_of_a_data_loader_use_the_model():
    model, x = encoder(), torch.randn(6, 32, 64)
    fast = captured(model, x)
    loader = DataLoader(Encoded(fast, x), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=SECONDS)
    batches = list(loader)
    torch.testing.assert_close(torch.cat([batch.flatten(0, 1) for batch, _ in batches]), model(x))
    assert all(count == 1 for _, counts in batches for count in counts)


class Slow(nn.Module):
    """Stops while it is traced, until it is let go."""

    entered, let_go = threading.Event(), threading.Event()

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            Slow.entered.set()
            assert Slow.let_go.wait(SECONDS)
        return self.linear(x).relu()


def test_a_fork_waits_for_the_capture_of_another_thread():
    """Else the child's modules held fake parameters, and torch's `nn.Module` what FX puts there."""
    model, x = Slow().eval(), torch.randn(2, 3, 4)
    other = encoder()
    fast = fxbt.optimize(model)

    def capture():
        with torch.no_grad():
            fast(x)

    capturing = threading.Thread(target=capture, daemon=True)
    capturing.start()
    assert Slow.entered.wait(SECONDS)
    results: list = []
    y = torch.randn(1, 3, 64)

    def run():
        return fast(x).numpy(), other(y).numpy(), len(fast.report.graphs), LOCK.captures_here()

    def fork():
        with torch.no_grad():
            results.append(in_child(run))

    forking = threading.Thread(target=fork, daemon=True)
    forking.start()
    forking.join(0.3)
    assert forking.is_alive() and not results
    Slow.let_go.set()
    for thread in (capturing, forking):
        thread.join(2 * SECONDS)
        assert not thread.is_alive(), "deadlock"
    (found, plain, graphs, captures), *_ = results
    torch.testing.assert_close(torch.from_numpy(found), model(x))
    torch.testing.assert_close(torch.from_numpy(plain), other(y))
    assert graphs == 1 and not captures


def test_threads_that_capture_and_run_while_others_fork():
    x = torch.randn(2, 3, 4)
    shared = captured(nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval(), x)
    expected = shared(x)
    stop = threading.Event()

    def work():
        with torch.no_grad():
            while not stop.is_set():
                own = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
                torch.testing.assert_close(fxbt.optimize(own)(x), own(x))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        for _ in range(4):
            torch.testing.assert_close(torch.from_numpy(in_child(lambda: shared(x).numpy())), expected)
    finally:
        stop.set()
        worker.join(SECONDS)
    assert not worker.is_alive()


def test_a_lock_that_another_thread_holds_is_free_in_the_child():
    lock, held, let_go = FORKS.lock(), threading.Event(), threading.Event()
    values = {"half": False}

    def hold():
        with lock:
            values["half"] = True
            held.set()
            let_go.wait(0.5)
            values["half"] = False

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(SECONDS)
    is_free, is_half = in_child(lambda: (lock.acquire(timeout=1), values["half"]))
    let_go.set()
    holder.join()
    assert is_free and not is_half and not lock.locked()


def test_a_thread_forks_inside_an_original_and_inside_its_own_capture():
    model = nn.Linear(4, 4).eval()
    with LOCK.running(model):
        assert in_child(LOCK.runs_here)
        assert LOCK.runs_here()
    with LOCK.capturing(model):
        assert in_child(LOCK.captures_here)
    assert in_child(lambda: not LOCK.captures_here() and not LOCK.runs_here())


def test_a_compiler_that_was_started_before_the_fork_is_asked_anew(monkeypatch):
    """Its thread did not come along, and its result would never come."""
    release = threading.Event()
    monkeypatch.setattr(native, "_found_or_compiled", lambda: release.wait(SECONDS))
    native.compile_ahead.cache_clear()
    try:
        native.compile_ahead()
        monkeypatch.setattr(native, "_found_or_compiled", lambda: "compiled")
        assert in_child(lambda: native.compile_ahead().result(timeout=10)) == "compiled"
    finally:
        release.set()
        native.compile_ahead.cache_clear()
