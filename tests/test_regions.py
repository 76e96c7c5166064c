"""Blocks of a forward that switch gradients or autocast off: their content stands in the graph, their meaning stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import compare_gradients
from torch import Tensor, nn

import fxbt

NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


class Model(nn.Module):
    """y = linear(x * table), the table computed in a block."""

    def __init__(self, block: Callable[[], Any], of_input: bool = False):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.block, self.of_input = block, of_input
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        with self.block():
            table = (torch.arange(x.shape[1])[:, None] * self.scale).cos()
            if self.of_input:
                table = table * self.linear(x).mean()
            inverse = 1 / (1 + table.square())
        return self.linear(x * table + inverse)


def no_autocast() -> Any:
    return torch.autocast("cpu", enabled=False)


def no_cuda_autocast() -> Any:
    return torch.autocast("cuda", enabled=False)


def targets(report: Any) -> list[Any]:
    return [node.target for node in report.latest.module.graph.nodes]


def states(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("block", [torch.no_grad, no_autocast, no_cuda_autocast])
def test_the_block_is_gone_and_gradients_are_the_originals(block: Callable[[], Any], of_input: bool) -> None:
    model = Model(block, of_input)
    fast: Any = fxbt.optimize(model, example_inputs=(states(),))
    assert fast.report.fallbacks == []
    assert not {NO_GRAD, AUTOCAST} & set(targets(fast.report))
    grads = []
    for run in (fast, model):
        model.zero_grad()
        x = states(3, 7).requires_grad_()
        output = run(x)
        output.square().sum().backward()
        grads.append({"x": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    compare_gradients(*grads)
    torch.testing.assert_close(fast(states(3, 7)), model(states(3, 7)))


def test_blocks_within_blocks() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = x.sin()
                with torch.autocast("cpu", enabled=False):
                    y = y * y.cos()
            return x * y

    fast: Any = fxbt.optimize(Nested(), example_inputs=(states(),))
    assert not {NO_GRAD, AUTOCAST} & set(targets(fast.report))
    torch.testing.assert_close(fast(states(3, 7)), Nested()(states(3, 7)))


def test_a_block_that_switches_the_callers_autocast_off_is_kept() -> None:
    model = Model(no_autocast, of_input=True).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast: Any = fxbt.optimize(model, example_inputs=(states(),))
        assert AUTOCAST in targets(fast.report), fast.report
        torch.testing.assert_close(fast(states(3, 7)), model(states(3, 7)))


def test_a_block_that_switches_autocast_on_is_kept() -> None:
    def half() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    model = Model(half, of_input=True).eval()
    with torch.no_grad():
        fast: Any = fxbt.optimize(model, example_inputs=(states(),))
        assert fast.report.fallbacks == []
        assert AUTOCAST in targets(fast.report)
        torch.testing.assert_close(fast(states(3, 7)), model(states(3, 7)))
