"""pytorch#103749, #40932, flashinfer#4267: rows that a finite fill blocks entirely are the average of all keys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import compare_gradients, gradients
from torch import Tensor, nn

import fxbt

HEADS, DIM, LENGTH = 4, 8, 9


class Filled(nn.Module):
    """Self-attention whose scores a function of (scores, keep) masks."""

    def __init__(self, mask: Any):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(4))
        self.mask = mask

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = self.mask(q @ k.mT * DIM**-0.5, keep)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def causal_with_left_padding() -> Tensor:
    """[3, 1, 9, 9]: causal with three tokens of left padding, causal with some of right padding, nothing open."""
    keep = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    keep[0, ..., :3] = False
    keep[1, ..., 5:] = False
    keep[2] = False
    return keep


def triangle(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


def errors(mask: Any, dtype: torch.dtype = torch.float32, rows: Any = ...) -> tuple[Any, list[tuple[float, float]]]:
    """The optimised model, and its errors beside the original's against float64, for scores up to thousands.

    `rows` picks what is compared.
    """
    torch.manual_seed(0)
    model = Filled(mask).eval().to(dtype)
    exact = copy.deepcopy(model).double()
    keep, x = causal_with_left_padding(), torch.randn(3, LENGTH, HEADS * DIM).to(dtype)
    fast: Any = fxbt.optimize(model)
    found = []
    with torch.no_grad():
        fast(x, keep)
        for size in (1, 3, 10, 30):
            want = exact(x.double() * size, keep)
            gaps = [(m(x * size, keep).double() - want)[rows].abs().max() / want.abs().max() for m in (fast, model)]
            found.append((float(gaps[0]), float(gaps[1])))
    assert fast.report.fallbacks == []
    return fast, found


def written(fast: Any) -> int:
    nodes = fast.report.latest.module.graph.nodes
    return sum(node.target is torch.ops.fxbt.attention_by_products.default for node in nodes)


def causal(fast: Any) -> bool:
    nodes = fast.report.latest.module.graph.nodes
    return any(fxbt.argument(node, "is_causal") for node in nodes if fxbt.op_of(node) == "attention")


LOWEST = torch.finfo(torch.float32).min
WAYS = {
    "fill": lambda fill: lambda s, keep: s.masked_fill(~keep, fill),
    "fill, scaled": lambda fill: lambda s, keep: s.masked_fill(~keep, fill) * 0.5,
    "two fills": lambda fill: lambda s, keep: s.masked_fill(~triangle(s), fill).masked_fill(~keep, fill),
    "two other fills": lambda fill: lambda s, keep: s.masked_fill(~triangle(s), fill).masked_fill(~keep, fill / 2),
    "fill and mask": lambda fill: lambda s, k: s.masked_fill(~triangle(s), fill) + torch.where(k, 0.0, fill),
    "capped, fill": lambda fill: lambda s, keep: (50 * (s / 50).tanh()).masked_fill(~keep, fill),
}


@pytest.mark.parametrize("fill", [LOWEST, -1e9, -1e8, -1e4, -50.0])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_fill_in_every_place_is_as_exact_as_the_original(way: str, fill: float) -> None:
    fast, found = errors(WAYS[way](fill))
    assert all(gap <= max(1e-5, 1.5 * own) for gap, own in found), found
    assert fast.report.hits["attention"] == 1


@pytest.mark.parametrize(("fill", "count"), [(LOWEST, 0), (-1e30, 0), (-1e9, 0), (-1e8, 0), (-1e4, 1), (-50.0, 1)])
def test_a_fill_that_is_a_mask_for_every_score_stays_a_mask(fill: float, count: int) -> None:
    """The others are written out, at any size of scores."""
    assert written(errors(WAYS["fill"](fill))[0]) == count


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        (torch.float16, -65504.0),
        (torch.float16, -1e4),
        (torch.bfloat16, torch.finfo(torch.bfloat16).min),
        (torch.bfloat16, -1e9),
        (torch.bfloat16, -1e4),
        (torch.float64, torch.finfo(torch.float64).min),
        (torch.float64, -1e9),
    ],
)
@pytest.mark.parametrize("way", ["fill", "two fills"])
def test_every_dtype_has_the_average_in_blocked_rows(way: str, dtype: torch.dtype, fill: float) -> None:
    is_blocked = ~causal_with_left_padding().any(-1)[:, 0]  # elsewhere large scores of few bits are a lottery
    fast, found = errors(WAYS[way](fill), dtype, is_blocked)
    assert all(gap <= (1e-13 if dtype is torch.float64 else 1e-2) for gap, _ in found), found
    fast, found = errors(WAYS[way](fill), dtype)
    assert all(gap <= (1e-13 if dtype is torch.float64 else 2e-2) for gap, _ in found[:2]), found
    assert fast.report.hits["attention"] == 1


def test_a_weak_fill_at_later_keys_alone_is_not_taken_for_a_causal_mask() -> None:
    fast, found = errors(lambda s, keep: s.masked_fill(~triangle(s), -1e4))
    assert all(gap <= 1e-5 for gap, _ in found), found
    assert not causal(fast)
    assert causal(errors(lambda s, keep: s.masked_fill(~triangle(s), -1e9))[0])


def test_a_weak_fill_stays_as_it_is_where_there_are_gradients() -> None:
    torch.manual_seed(0)
    model = Filled(WAYS["fill"](-1e4))
    fast: Any = fxbt.optimize(model)
    x, keep = torch.randn(3, LENGTH, HEADS * DIM), causal_with_left_padding()
    fast(x, keep).square().sum().backward()
    assert fast.report.hits.get("attention", 0) == 0
    assert "masked scores end at -10000, which does not mask every possible score" in fast.report.why("attention")


def test_with_gradients_blocked_rows_of_a_mask_have_none() -> None:
    torch.manual_seed(0)
    model = Filled(WAYS["fill"](-1e9)).train()
    fast: Any = fxbt.optimize(model)
    inputs = {"x": 8 * torch.randn(3, LENGTH, HEADS * DIM), "keep": causal_with_left_padding()}
    fast(**inputs)
    compare_gradients(*gradients(model, fast, inputs))
    assert fast.report.hits["attention"] == 1
