"""MLPs some rows at a time: the same numbers, and only where a row needs nothing but itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, compare
from torch import Tensor, nn

import fxbt
from fxbt import rows

SIZE, HIDDEN = 16, 48


class Block(nn.Module):
    """An MLP of the given form between what keeps it from being the model's input and output."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.before, self.after = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)
        self.up, self.gate = (nn.Linear(SIZE, HIDDEN, bias=form != "no bias") for _ in range(2))
        self.down = nn.Linear(HIDDEN, SIZE)
        self.by_place = nn.Parameter(torch.randn(7, HIDDEN))
        self.scale = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(self.mlp(x))

    def mlp(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.form == "gated":
            return self.down(F.silu(self.gate(x)) * up)
        if self.form == "residual":
            return x + self.down(F.gelu(up))
        if self.form == "other residual":
            return x.flip(1) + self.down(F.relu(up))
        if self.form == "tanh":
            return self.down(up.tanh().square())
        if self.form == "by place":
            return self.down(F.gelu(up) + self.by_place[: x.shape[1]])
        if self.form == "over rows":
            return self.down(up.softmax(1))
        if self.form == "shifted":
            return self.down(F.gelu(up).roll(1, 1))
        if self.form == "used twice":
            hidden = F.gelu(up)
            return self.down(hidden) + hidden.mean(-1, keepdim=True)
        if self.form == "two sources":
            return self.down(F.gelu(up) * self.gate(x.flip(1)))
        return self.down(F.gelu(up))


def parts_of(monkeypatch: Any) -> list[tuple[int, ...]]:
    """Makes anything large; the shapes that MLPs are computed on."""
    monkeypatch.setattr(rows, "LARGE", 0)
    monkeypatch.setattr(rows, "PART", 5 * HIDDEN * 4)
    seen: list[tuple[int, ...]] = []
    call = rows.ByRows.__call__

    def noted(self: rows.ByRows, x: Tensor, residual: Tensor | None, *weights: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return call(self, x, residual, *weights)

    monkeypatch.setattr(rows.ByRows, "__call__", noted)
    return seen


def optimized(form: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Block(form).eval()
    with torch.no_grad():
        return model, fxbt.optimize(model, (torch.randn(2, 7, SIZE),))


@pytest.mark.parametrize("form", ["plain", "no bias", "gated", "residual", "other residual", "tanh"])
def test_some_rows_at_a_time(form, monkeypatch):
    seen = parts_of(monkeypatch)
    model, fast = optimized(form)
    with torch.no_grad():
        for shape in ((2, 7), (3, 5), (1, 1), (4, 6)):
            seen.clear()
            x = torch.randn(*shape, SIZE)
            compare(fast(x), model(x))
            assert seen == [(*shape, SIZE)]
        assert fast(torch.randn(0, 4, SIZE)).shape == (0, 4, SIZE)
    assert fast.report.fallbacks == []


@pytest.mark.parametrize("form", ["by place", "over rows", "shifted", "used twice", "two sources"])
def test_a_row_that_needs_more_is_left_alone(form, monkeypatch):
    seen = parts_of(monkeypatch)
    model, fast = optimized(form)
    with torch.no_grad():
        x = torch.randn(3, 7, SIZE)
        compare(fast(x), model(x))
    assert not seen
    assert fast.report.fallbacks == []


@pytest.mark.parametrize("packed", ["0", "1"])
def test_packed_linears_go_by_rows_too(packed, monkeypatch):
    """With weights large enough for oneDNN's kernel, where there is one, and its residual fused in."""
    monkeypatch.setattr("fxbt.kernels.PACKED_FROM_ELEMENTS", 0 if packed == "1" else 2**62)
    seen = parts_of(monkeypatch)
    model, fast = optimized("residual")
    with torch.no_grad():
        x = torch.randn(3, 9, SIZE)
        compare(fast(x), model(x))
    assert seen


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_models_with_padding(name, monkeypatch):
    seen = parts_of(monkeypatch)
    case = next(case for case in CASES if case.name == name)
    model = case.build("sdpa")
    with torch.no_grad():
        fast: Any = fxbt.optimize(model, case.inputs(2, 7, "right"))
        inputs = case.inputs(3, 12, "right")
        actual, expected = fast(**inputs)[0], model(**inputs)[0]
    valid = inputs["attention_mask"].bool()
    compare(actual[valid], expected[valid])
    assert seen
    assert fast.report.fallbacks == []


def test_a_changed_weight_is_seen(monkeypatch):
    seen = parts_of(monkeypatch)
    model, fast = optimized("residual")
    with torch.no_grad():
        x = torch.randn(2, 7, SIZE)
        model.down.weight.mul_(2.0)
        compare(fast(x), model(x))
    assert seen
