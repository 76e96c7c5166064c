"""Weights on a CUDA device: writes that torch counts are seen at once, others late; no call waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VOCAB, huggingface
from test_cuda import MASK, SETTINGS, graph_on_cpu, needs_gpu
from torch import Tensor

import fxbt
from fxbt.lower.assumptions import Assumptions
from fxbt.lower.cuda import late_look
from fxbt.lower.cuda.late_look import CALLS_APART, LateLook


class Event:
    """What a device tells of a copy that is under way: there once it is asked twice."""

    def __init__(self, device: Any) -> None:
        self.asked = 0

    def record(self) -> None:
        pass

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1


@pytest.fixture(autouse=True)
def slow_device(monkeypatch):
    monkeypatch.setattr(late_look.torch, "Event", Event)


def doubled(*weights: Tensor) -> list[Tensor]:
    return [2 * weight for weight in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool])
def test_a_write_past_data_is_seen_after_a_look(dtype):
    weight = torch.ones(3).to(dtype)
    look = LateLook(lambda weight: [weight.clone()], [weight], [weight.clone()])
    assert all(look.holds() for _ in range(3 * CALLS_APART))
    weight.data[1] = 0
    held = [look.holds() for _ in range(CALLS_APART + 2)]
    assert held.count(False) == 1 and not held[-1]


def test_nan_is_equal_to_itself():
    weight = torch.tensor([float("nan"), 1.0])
    look = LateLook(doubled, [weight], doubled(weight))
    assert look.holds_now() and all(look.holds() for _ in range(3 * CALLS_APART))


def test_this_moment_is_looked_at_where_one_waits():
    weight = torch.ones(3)
    look = LateLook(doubled, [weight], doubled(weight))
    weight.data[0] = 3.0
    assert look.holds() and not look.holds_now()


def as_if_on_cuda(monkeypatch):
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))


def test_an_assumption_on_a_device_is_checked_by_what_torch_counts_and_late(monkeypatch):
    as_if_on_cuda(monkeypatch)
    mask = torch.ones(2, 2)
    assumptions = Assumptions({"mask": mask})
    assumptions.check()
    mask.mul_(1.0)  # counted, and the same
    assumptions.check()
    mask.data[0, 1] = 0.0
    with pytest.raises(RuntimeError, match="mask: one of them changed after the graph was proven"):
        for _ in range(CALLS_APART + 2):
            assumptions.check()
    mask.data[0, 1] = 1.0
    assumptions.check()
    mask[0, 0] = 5.0
    with pytest.raises(RuntimeError, match="mask"):
        assumptions.check()


def test_assumptions_move_to_other_tensors(monkeypatch):
    mask, same, other = torch.ones(2), torch.ones(2), torch.zeros(2)
    assumptions = Assumptions({"mask": mask})
    assert assumptions.can_rebind({id(mask): same}) and not assumptions.can_rebind({id(mask): other})
    assumptions.rebind({id(mask): same})
    mask.zero_()
    assumptions.check()
    same.zero_()
    with pytest.raises(RuntimeError, match="mask changed after the graph was proven on its content"):
        assumptions.check()


@pytest.mark.parametrize("write", [lambda w: w.mul_(2.0), lambda w: w.data.mul_(2.0)], ids=["counted", "past data"])
def test_merged_weights_follow_writes_to_their_sources(monkeypatch, write, torchs_kernels):
    from fxbt.lower.derived_weights import Weights
    from fxbt.lower.program import Program

    module = graph_on_cpu("BertModel", torch.float32)
    as_if_on_cuda(monkeypatch)
    monkeypatch.setattr("fxbt.lower.derived_weights._sample", None)  # of a tensor elsewhere there is none
    with torch.no_grad():
        weights = Weights()
        program, inputs = Program(module, {}, weights), (torch.randint(3, VOCAB, MASK.shape), MASK)
        before = program(*inputs)[0]
        assert weights.nbytes() > 0
        query = dict(module.named_parameters())["encoder.layer.0.attention.self.query.weight"]
        write(query)
        outputs = [program(*inputs)[0] for _ in range(2 * CALLS_APART)]
        expected = Program(module, {}, Weights())(*inputs)[0]
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(outputs[-1], expected)


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_weights_that_are_trained_on_a_gpu_show(cuda_graphs):
    model = huggingface("BertModel", **SETTINGS)("eager").eval().to("cuda", torch.float32)
    fast: Any = fxbt.optimize(model, cuda_graphs=cuda_graphs)
    call = {"input_ids": torch.randint(3, VOCAB, MASK.shape).cuda(), "attention_mask": torch.ones_like(MASK).cuda()}
    query = model.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        for step in range(4):
            for _ in range(3):
                found, expected = (m(**call).last_hidden_state for m in (fast, model))
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            query.add_(0.1 * step)
        query.data.mul_(3.0)
        for _ in range(2 * CALLS_APART):
            found = fast(**call).last_hidden_state
        torch.testing.assert_close(found, model(**call).last_hidden_state, rtol=1e-3, atol=1e-4)
