"""`op.pointwise(f, x)`: whatever computes f of x, in a pattern of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxbt
from fxbt.testing import assert_rewrites, assert_untouched


class DoubleSilu(fxbt.Rule):
    """x * sigmoid(2 x) * gate  ->  silu(2 x) / 2 * gate"""

    name = "double_silu"

    def pattern(self, op: Any, x: Any, gate: Any) -> Any:
        return op.pointwise(lambda x: x * torch.sigmoid(2 * x), x) * gate

    def replace(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.silu(2 * x) * 0.5 * gate


class Kind(fxbt.Rule):
    """One of two curves; the second is in its best form."""

    name = "kind"
    proven = True

    def pattern(self, op: Any, x: Any) -> Any:
        return op.pointwise({"silu": F.silu, "x tanh x": lambda x: x * torch.tanh(x)}, x, "kind")

    def check(self, m: fxbt.Found) -> None:
        if m.kind == "x tanh x":
            m.keep()

    def replace(self, x: Tensor, kind: str) -> Tensor:
        assert kind == "silu"
        return F.silu(x)


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.linear, self.gate = function, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x), self.gate(x))


SPELLINGS = {
    "as it is": lambda x, g: x * torch.sigmoid(2 * x) * g,
    "gate first": lambda x, g: g * (x * torch.sigmoid(x + x)),
    "by tanh": lambda x, g: (x * 0.5 + x * 0.5 * torch.tanh(x)) * g,
    "by exp": lambda x, g: (x / (1 + torch.exp(-2 * x))) * g,
}
OTHERS = {
    "another slope": lambda x, g: x * torch.sigmoid(2.001 * x) * g,
    "another value": lambda x, g: x * torch.sigmoid(2 * g) * g,
    "no gate": lambda x, g: x * torch.sigmoid(2 * x) + g,
    "a step in it": lambda x, g: x * torch.sigmoid(2 * x.round()) * g,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_region_inside_a_larger_pattern(spelling: str) -> None:
    assert_rewrites(
        DoubleSilu(), Apply(SPELLINGS[spelling]).eval(), (torch.randn(3, 8),), (torch.randn(5, 8),), times=1
    )


@pytest.mark.parametrize("spelling", OTHERS)
def test_near_misses(spelling: str) -> None:
    assert_untouched(DoubleSilu(), Apply(OTHERS[spelling]).eval(), (torch.randn(3, 8),))


def test_a_value_of_the_region_that_is_read_elsewhere() -> None:
    def leaking(x: Tensor, g: Tensor) -> Tensor:
        curve = torch.sigmoid(2 * x)
        return x * curve * g + curve

    assert_untouched(DoubleSilu(), Apply(leaking).eval(), (torch.randn(3, 8),))


def test_which_of_several_it_is() -> None:
    model = Apply(lambda x, g: x * torch.sigmoid(x) - g * torch.tanh(g)).eval()
    fast = fxbt.optimize(model, rules=[Kind()], verify=True)
    x = torch.randn(3, 8)
    torch.testing.assert_close(fast(x), model(x))
    hits = fast.report.hits
    assert hits["kind"] == 2, "both are counted"
    assert not fast.report.fallbacks


def test_no_function_is_an_error() -> None:
    class Wrong(Kind):
        name = "wrong"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.pointwise(3.0, x)

    with pytest.raises(fxbt.RuleError, match="a function of one tensor"):
        fxbt.optimize(Apply(lambda x, g: x + g), rules=[Wrong()])
