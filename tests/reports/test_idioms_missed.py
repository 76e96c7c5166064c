"""openvino#37675, pytorch#103749, #41508, #40932, openvino#36153: spellings of attention that went by unseen.

Each is among `tests/spellings.py`, and its near misses in `tests/mutants.py`; here is what only they have to ask.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt

HEADS, DIM = 4, 8


class Attending(nn.Module):
    """A function of (q, k, v, keep) between projections."""

    def __init__(self, attend: Any):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(4))
        self.attend = attend

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v, keep).transpose(1, 2).flatten(2))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * DIM**-0.5


def blocked(length: int) -> Tensor:
    """[2, 1, q, k]: the first row of queries of one sequence sees nothing, the others some."""
    keep = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(length)) > 0.4
    keep[..., 0] = True
    keep[0, :, 0] = False
    return keep


def optimized(attend: Any) -> tuple[Any, nn.Module]:
    model = Attending(attend).eval()
    with torch.no_grad():
        return fxbt.optimize(model, (torch.randn(2, 6, HEADS * DIM), blocked(6)), padding="keep"), model


ZEROED = {
    "nan_to_num": lambda q, k, v, m: scores(q, k).masked_fill(~m, -math.inf).softmax(-1).nan_to_num() @ v,
    "nan_to_num after a bias": lambda q, k, v, m: (
        (scores(q, k) + torch.where(m, 0.0, -math.inf)).softmax(-1).nan_to_num() @ v
    ),
    "times the mask": lambda q, k, v, m: (scores(q, k).masked_fill(~m, -1e9).softmax(-1) * m) @ v,
    "times its numbers": lambda q, k, v, m: (scores(q, k).masked_fill(m == 0, -1e9).softmax(-1) * m.float()) @ v,
}


@pytest.mark.parametrize("name", ZEROED, ids=str)
def test_rows_without_keys_are_zero_as_in_the_original(name: str) -> None:
    fast, model = optimized(ZEROED[name])
    with torch.no_grad():
        for length in (6, 9):
            x = 10 * torch.randn(2, length, HEADS * DIM)
            torch.testing.assert_close(fast(x, blocked(length)), model(x, blocked(length)), rtol=1e-4, atol=1e-4)
    assert fast.report.hits["attention"] == 1
    assert fast.report.fallbacks == []


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (
            lambda q, k, v, m: (20 * scores(q, k).tanh()).masked_fill(~m, -math.inf).softmax(-1).nan_to_num() @ v,
            "or zeroed weights",
        ),
        (
            lambda q, k, v, m: scores(q, k).masked_fill(~m, -math.inf).softmax(-1).nan_to_num(0.5) @ v,
            "a number other than 0",
        ),
        (
            lambda q, k, v, m: (scores(q, k).masked_fill(~m, -1e4).softmax(-1) * m) @ v,
            "does not mask every possible score",
        ),
        (
            lambda q, k, v, m: (
                scores(q, k).masked_fill(~m, -1e9).masked_fill(~m.mT, -1e9).softmax(-1).masked_fill(~m.mT, 0) @ v
            ),
            "one of several masks",
        ),
    ],
)
def test_what_is_refused_says_why_and_stays_equal(attend: Any, reason: str) -> None:
    fast, model = optimized(attend)
    with torch.no_grad():
        x = 10 * torch.randn(2, 9, HEADS * DIM)
        torch.testing.assert_close(fast(x, blocked(9)), model(x, blocked(9)), rtol=1e-4, atol=1e-4)
    assert fast.report.hits.get("attention", 0) == 0
    assert reason in fast.report.why("attention")


def test_exponentials_that_overflow_are_what_float64_says() -> None:
    """Documented: exp(x) / sum(exp(x)) is a softmax, and so a number where the original has NaN."""

    def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        weights = scores(q, k).exp()
        return (weights @ v) / weights.sum(-1, keepdim=True)

    fast, model = optimized(attend)
    with torch.no_grad():
        x = 12 * torch.randn(2, 9, HEADS * DIM)
        fast(x, blocked(9))
        got, own, want = fast(x, blocked(9)), model(x, blocked(9)), model.double()(x.double(), blocked(9))
    assert own.isnan().any() and want.isfinite().all()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
