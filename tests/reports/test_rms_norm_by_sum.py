"""Norms whose mean is a sum over x.shape[-1] are found, be the size a number or a symbol; their near misses are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt

WIDTH = 16


class Norm(nn.Module):
    """A function of (x, weight, bias) of the input itself, whose last size is then a symbol at first."""

    def __init__(self, norm: Any, has_weights: bool):
        super().__init__()
        torch.manual_seed(0)
        self.norm = norm
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5) if has_weights else None
        self.bias = nn.Parameter(torch.rand(WIDTH)) if has_weights else None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return torch.relu(normed if self.weight is None else normed * self.weight + self.bias)


def layer_norm(x: Tensor) -> Tensor:
    centered = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centered / torch.sqrt((centered**2).sum(-1, keepdim=True) / x.shape[-1] + 1e-5)


FOUND = {
    "sum": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6),
    "size": lambda x: x / torch.sqrt(x.pow(2).sum(-1).unsqueeze(-1) / x.size(-1) + 1e-6),
    "unsqueezed last": lambda x: x * torch.rsqrt((x * x).sum(-1) / x.shape[-1] + 1e-6)[..., None],
    "layer norm": layer_norm,
}
OTHERS = {
    "one less": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / (x.shape[-1] - 1) + 1e-6),
    "length": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[1] + 1e-6),
    "over tokens": lambda x: x * torch.rsqrt((x * x).sum(1, keepdim=True) / x.shape[1] + 1e-6),
    "no size": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),
    "unsqueezed elsewhere": lambda x: x * torch.rsqrt((x * x).sum(-1) / x.shape[-1] + 1e-6)[:, :, None].mT,
}


def hits(norm: Any, has_weights: bool, shapes: tuple[tuple[int, int], ...]) -> int:
    model = Norm(norm, has_weights).eval()
    with torch.no_grad():
        fast: Any = fxbt.optimize(model, (torch.randn(*shapes[0], WIDTH),))
        for shape in shapes:
            x = torch.randn(*shape, WIDTH)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert fast.report.fallbacks == []
    return fast.report.hits["norm"]


@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("name", FOUND, ids=str)
def test_a_sum_over_the_size_is_a_mean(name: str, has_weights: bool) -> None:
    assert hits(FOUND[name], has_weights, ((2, 5), (3, 16), (4, 7))) == 1


@pytest.mark.parametrize("name", OTHERS, ids=str)
def test_other_sums_are_none(name: str) -> None:
    assert hits(OTHERS[name], True, ((WIDTH, WIDTH), (WIDTH, WIDTH)) if "elsewhere" in name else ((2, 5), (3, 9))) == 0


def test_a_near_miss_matches_no_more_than_there_is() -> None:
    with torch.no_grad():
        fast: Any = fxbt.optimize(Norm(OTHERS["one less"], True).eval(), (torch.randn(2, 5, WIDTH),))
    assert all(miss.matched <= miss.total for miss in fast.report.misses if miss.total)
