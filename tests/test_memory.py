"""The most memory that values hold at once: by hand, and as the report has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor, fx

import fxbt
from fxbt.lower.memory import peak_bytes


def chain(x: Tensor) -> Tensor:
    return x.exp().sin().cos()


def kept(x: Tensor) -> Tensor:
    first = x.exp()
    return first.sin().cos() + first


def views(x: Tensor) -> Tensor:
    half = x.exp()[:128]
    return half.sin().view(2, 64)


def unused(x: Tensor) -> Tensor:
    return x.view(16, 16).t()


@pytest.mark.parametrize(
    ("function", "held"),
    [
        pytest.param(chain, 2 * 1024, id="what is read and what is made of it"),
        pytest.param(kept, 3 * 1024, id="and what is read later"),
        pytest.param(views, 1024 + 512, id="a view holds all it looks at"),
        pytest.param(unused, 0, id="inputs are the caller's"),
    ],
)
def test_what_is_held_at_once(function: Any, held: int) -> None:
    assert peak_bytes(fx.symbolic_trace(function).graph, [torch.ones(256)]) == held


def test_the_report_has_it() -> None:
    case = next(case for case in CASES if case.name == "bert")
    model = case.build("sdpa")
    peaks = []
    for length in (8, 32):
        with torch.no_grad():
            fast: Any = fxbt.optimize(model, case.inputs(4, length, "right"), padding="keep")
        peaks.append(fast.report.latest.peak_bytes)
        assert f"{peaks[-1] / 2**20:.1f}" in str(fast.report)
    assert 2 * peaks[0] < peaks[1] < 8 * peaks[0]  # in tokens, but for the scores of 32 x 32


def test_with_gradients_it_is_not_known() -> None:
    case = next(case for case in CASES if case.name == "bert")
    fast: Any = fxbt.optimize(case.build("sdpa"), case.inputs(2, 8, "right"))
    assert fast.report.latest.peak_bytes is None
