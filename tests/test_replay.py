"""CUDA graphs: recordings on a tape of the CPU's, which repeats kernels at fixed addresses as a CUDA graph does."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import pytest
import torch
from models import VOCAB, huggingface
from test_cuda import MASK, SETTINGS, graph_on_cpu, graph_on_cuda, needs_gpu
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxbt
from fxbt.lower.cuda.graphs import MOST_RECORDINGS, Recorder, Replay
from fxbt.lower.derived_weights import Weights
from fxbt.lower.program import Program


class Tape(TorchDispatchMode):
    """Runs a program and keeps its kernels; `replay` runs them again on the same memory, without the Python around."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might ...")
        result = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.kernels:
            places = set(map(_place, pytree.tree_leaves((args, kwargs))))
            for old, new in zip(*map(pytree.tree_leaves, (result, func(*args, **kwargs))), strict=True):
                if isinstance(old, Tensor) and _place(old) not in places:
                    old.copy_(new)


def _place(value: Any) -> int | None:
    is_strided = isinstance(value, Tensor) and value.layout is torch.strided
    return value.untyped_storage().data_ptr() if is_strided else None


class TapeRecorder(Recorder):
    most = 1e9

    def record(self, run: Any, arguments: Any) -> Any:
        with Tape() as tape:
            outputs = run(*arguments)
        return tape.replay, outputs

    def most_bytes(self, tensor: Tensor) -> float:
        return self.most


def replayed(run: Any, count: int = 1, is_static: bool = False) -> Replay:
    return Replay(run, count, TapeRecorder(is_static))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, ...]:
    y = torch.relu(x @ weight.t() + bias)
    return y, x.shape[0], y.sum(-1)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def weights() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(5)


def check(replay: Replay, x: Tensor, *weights: Tensor) -> tuple[Any, ...]:
    found = replay(x, *weights)
    torch.testing.assert_close(found, linear(x, *weights))
    return found


def test_the_second_call_of_a_shape_is_recorded_and_the_third_replayed(weights):
    replay = replayed(linear)
    for _ in range(4):
        check(replay, torch.randn(3, 4), *weights)
    check(replay, torch.randn(2, 4), *weights)
    assert replay.calls == {"of a new shape": 2, "recorded": 1, "replayed": 2}


def test_outputs_are_the_callers_own(weights):
    replay = replayed(linear)
    calls = [torch.randn(3, 4) for _ in range(4)]
    results = [check(replay, x, *weights) for x in calls]
    results[-1][0].zero_()
    for x, result in zip(calls[:-1], results[:-1], strict=True):
        torch.testing.assert_close(result, linear(x, *weights))
    check(replay, calls[0], *weights)


def test_inputs_are_not_kept_and_not_written(weights):
    replay = replayed(linear)
    for _ in range(3):
        x = torch.randn(3, 4)
        before = x.clone()
        check(replay, x, *weights)
        assert torch.equal(x, before)
    dead = weakref.ref(x)
    del x
    assert dead() is None


def test_weights_are_read_where_they_stand(weights):
    replay = replayed(linear)
    x = torch.randn(3, 4)
    for _ in range(3):
        check(replay, x, *weights)
    weights[0].mul_(2)
    check(replay, x, *weights)
    assert replay.calls["replayed"] == 2
    weights[1].data = torch.randn(5)  # the same tensor elsewhere, which no version tells
    check(replay, x, *weights)
    assert replay.calls == {"of a new shape": 2, "recorded": 1, "replayed": 2}


def test_other_strides_are_another_recording(weights):
    replay = replayed(linear)
    for x in (torch.randn(3, 4), torch.randn(4, 3).t(), torch.randn(1, 4).expand(3, 4)):
        for _ in range(3):
            check(replay, x, *weights)
    assert replay.calls["recorded"] == 3


def test_the_least_recently_used_recording_makes_room(weights):
    replay = replayed(linear)
    for rows in range(1, MOST_RECORDINGS + 1):
        for _ in range(2):
            check(replay, torch.randn(rows, 4), *weights)
    check(replay, torch.randn(1, 4), *weights)  # used last
    for _ in range(2):
        check(replay, torch.randn(MOST_RECORDINGS + 1, 4), *weights)
    assert replay.calls == {"of a new shape": MOST_RECORDINGS + 1, "recorded": MOST_RECORDINGS + 1, "replayed": 1}
    check(replay, torch.randn(1, 4), *weights)
    assert replay.calls["replayed"] == 2
    check(replay, torch.randn(2, 4), *weights)
    assert replay.calls["of a new shape"] == MOST_RECORDINGS + 2


def test_recordings_hold_no_more_memory_than_they_may(weights):
    replay = replayed(linear)
    for _ in range(2):
        check(replay, torch.randn(3, 4), *weights)
    one = replay.nbytes
    assert one == 4 * (3 * 4 + 3 * 5 + 3)  # x, y and its sums
    replay._recorder.most = 2 * one  # type: ignore[attr-defined]
    for features in range(3):
        for _ in range(2):
            check(replay, torch.randn(4, 3).t() if features else torch.randn(3, 4), *weights)
    for rows in (1, 2, 3):
        for _ in range(2):
            check(replay, torch.randn(rows, 4), *weights)
    assert replay.nbytes <= 2 * one


def test_static_outputs_are_the_recordings_own(weights):
    replay = replayed(linear, is_static=True)
    calls = [torch.randn(3, 4) for _ in range(4)]
    served = replay._recorder.serving(replay)
    results = [served(x, *weights) for x in calls]
    torch.testing.assert_close(results[3], linear(calls[3], *weights))
    assert results[2][0] is results[3][0]
    own = check(replay, calls[0], *weights)  # fxbt's: it compares them with others
    assert own[0] is not results[3][0]


def test_programs_with_one_recorder_take_turns(weights):
    """Their recordings share a pool of memory, so no two may be between their inputs and their outputs."""
    recorder = TapeRecorder()
    inside, most = [0], [0]
    record = recorder.record

    def watched(run: Any, arguments: Any) -> Any:
        repeat, outputs = record(run, arguments)

        def replay() -> None:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            repeat()
            inside[0] -= 1

        return replay, outputs

    recorder.record = watched  # type: ignore[method-assign]
    replays = [Replay(linear, 1, recorder) for _ in range(4)]

    def work(replay: Replay) -> None:
        with torch.no_grad():
            for _ in range(50):
                check(replay, torch.randn(3, 4), *weights)

    threads = [threading.Thread(target=work, args=(replay,)) for replay in replays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and all(replay.calls["replayed"] == 48 for replay in replays)


def test_what_is_handed_on_has_recordings_of_its_own(weights):
    replay = replayed(lambda x, *weights, rows: (x[:rows] + 1,))
    for rows in (1, 2) * 3:
        x = torch.randn(3, 4)
        torch.testing.assert_close(replay(x, *weights, rows=rows), (x[:rows] + 1,))
    assert replay.calls == {"of a new shape": 2, "recorded": 2, "replayed": 2}


def test_what_waits_for_the_device_runs_as_it_is(weights):
    def run(x: Tensor, *weights: Tensor) -> tuple[Any, ...]:
        return linear(x, *weights) if x.sum().item() < 1e9 else ()

    replay = replayed(run)
    for _ in range(4):
        check(replay, torch.randn(3, 4), *weights)
    (reason,) = replay.calls.keys() - {"of a new shape"}
    assert reason == "cannot be recorded (RuntimeError: operation not permitted when stream is capturing)"
    assert replay.calls[reason] == 3


def test_the_programs_own_error_is_the_one_to_see(weights):
    replay = replayed(linear)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            replay(torch.randn(3, 7), *weights)


def test_outputs_that_are_inputs_or_weights_stay_so(weights):
    aliasing = replayed(lambda x, weight, bias: (x[1:], x + 1))
    x = torch.randn(3, 4)
    for _ in range(3):
        assert aliasing(x, *weights)[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert aliasing.calls["cannot be recorded (ValueError: an output shares the memory of an input)"] == 2
    tied = replayed(lambda x, weight, bias: (weight, bias[1:], x + 1))
    for _ in range(3):
        found = tied(x, *weights)
        assert found[0] is weights[0] and found[1].data_ptr() == weights[1][1:].data_ptr()
    assert tied.calls["replayed"] == 1


def test_one_output_in_two_places_stays_one(weights):
    def run(x: Tensor, *weights: Tensor) -> tuple[Any, ...]:
        y = x + 1
        return y, y

    replay = replayed(run)
    for _ in range(3):
        first, second = replay(torch.randn(3), *weights)
        assert first is second


def test_threads_do_not_meet_in_one_recording(weights):
    replay = replayed(linear)
    problems = []

    def work() -> None:
        try:
            with torch.no_grad():
                for _ in range(50):
                    check(replay, torch.randn(3, 4), *weights)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and replay.calls["recorded"] == 1 and sum(replay.calls.values()) == 200


def program(module: Any) -> Program:
    return Program(module, {}, Weights(), recorder=TapeRecorder())


def test_a_whole_program_is_replayed(torchs_kernels):  # the tape has no others
    module = graph_on_cpu("BertModel", torch.float32)
    plain, recorded = Program(module, {}, Weights()), program(module)
    assert recorded.replay is not None
    recorded.replay.obstacle = None  # as if on CUDA
    for batch, length in ((3, 5), (2, 9), (3, 5), (2, 9), (3, 5), (2, 9), (1, 1)):
        ids, mask = torch.randint(3, VOCAB, (batch, length)), torch.ones(batch, length, dtype=torch.long)
        torch.testing.assert_close(recorded(ids, mask), plain(ids, mask))
    assert recorded.replay.calls == {"of a new shape": 3, "recorded": 2, "replayed": 2}


def test_a_program_that_is_bound_to_what_it_has_keeps_its_recordings(torchs_kernels):
    """A call that no graph takes has all graphs look for other weights."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    fast: Any = fxbt.optimize(model, example_inputs=(torch.randn(2, 4),), cuda_graphs=True)
    compiled = fast.report.latest.compiled
    replay = compiled.dense.replay
    replay.obstacle, replay._recorder = None, TapeRecorder()  # as if on CUDA
    for _ in range(3):
        fast(torch.randn(3, 4))
    weights = list(model.parameters())
    compiled.rebind({id(weight): weight for weight in weights})
    fast(torch.randn(3, 4))
    assert replay.calls["replayed"] == 2
    compiled.rebind({id(weight): weight.detach().clone() for weight in weights})
    fast(torch.randn(3, 4))
    assert replay.calls["replayed"] == 2 and replay.calls["of a new shape"] == 2


def test_only_graphs_on_one_cuda_device_are_recorded():
    elsewhere, there = (program(on("BertModel", torch.float32)).replay for on in (graph_on_cpu, graph_on_cuda))
    assert elsewhere is not None and elsewhere.obstacle == "not all of its tensors are on one CUDA device"
    assert there is not None and there.obstacle is None
    mixed = graph_on_cuda("BertModel", torch.float32)
    source = next(node for node in mixed.graph.nodes if node.op == "placeholder")
    source.meta["val"] = torch.empty(3, 5, dtype=torch.long)
    assert "one CUDA device" in str(program(mixed).replay.obstacle)  # type: ignore[union-attr]


def test_random_numbers_are_not_recorded():
    module = graph_on_cuda("BertModel", torch.float32)
    last = next(iter(reversed(module.graph.nodes)))
    with module.graph.inserting_before(last):
        module.graph.call_function(torch.ops.aten.bernoulli.p, (last.args[0][0], 0.5)).meta = dict(last.args[0][0].meta)
    assert program(module).replay.obstacle == "draws random numbers"  # type: ignore[union-attr]


def test_on_a_cpu_the_option_changes_nothing_and_the_report_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    fast: Any = fxbt.optimize(model, example_inputs=(torch.randn(2, 4),), cuda_graphs=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(fast(x), model(x))
    assert list(fast.report.latest.cuda_graphs) == ["not all of its tensors are on one CUDA device"]
    assert "CUDA graphs" in str(fast.report)
    assert "CUDA graphs" not in str(fxbt.optimize(model, example_inputs=(x,)).report)


def test_with_gradients_nothing_is_recorded():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    with torch.enable_grad():
        fast: Any = fxbt.optimize(model, example_inputs=(torch.randn(2, 4),), cuda_graphs=True)
        fast(torch.randn(3, 4)).sum().backward()
    assert fast.report.latest.cuda_graphs == {}


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_replays_agree_on_a_gpu(dtype):
    model = huggingface("BertModel", **SETTINGS)("eager").eval().to("cuda", dtype)
    fast: Any = fxbt.optimize(model, cuda_graphs=True)
    for batch, length in ((3, 5), (2, 9)) * 4:
        ids = torch.randint(3, VOCAB, (batch, length), device="cuda")
        mask = torch.ones_like(ids)
        found, expected = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (fast, model))
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 if dtype is torch.float16 else 1e-5)
    assert fast.report.latest.cuda_graphs["replayed"] > 0
    fast(input_ids=torch.randint(3, VOCAB, MASK.shape).cuda(), attention_mask=MASK.cuda())  # padded


@needs_gpu
def test_what_was_forgotten_is_recorded_again_on_a_gpu():
    recorder, x = Recorder(), torch.randn(8, 4, device="cuda")
    replay = Replay(lambda x, weight: (torch.relu(x @ weight),), 1, recorder)
    weight = torch.randn(4, 4, device="cuda")
    for _ in range(3):
        for _ in range(3):
            torch.testing.assert_close(replay(x, weight)[0], torch.relu(x @ weight))
        replay.forget()
    assert replay.calls == {"of a new shape": 3, "recorded": 3, "replayed": 3} and replay.obstacle is None
