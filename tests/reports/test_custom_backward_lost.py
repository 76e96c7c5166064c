"""pytorch/pytorch#193279, pytorch/pytorch#106388, Lightning-AI/lightning-thunder#666.

A torch.autograd.Function inside a traced forward keeps its values and loses its own backward.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Net(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.function.apply(self.layers[0](x) * 3))


@pytest.mark.filterwarnings("ignore::fxbt.FxbtWarning")
@pytest.mark.parametrize("function", [Reverse, Round])
def test_the_functions_backward_is_used(function: type[torch.autograd.Function]) -> None:
    torch.manual_seed(0)
    model = Net(function).train()
    original = copy.deepcopy(model)
    fast = fxbt.optimize(model)
    for _ in range(2):
        x = torch.randn(2, 7, 16)
        model.zero_grad()
        original.zero_grad()
        fast(x).pow(3).sum().backward()
        original(x).pow(3).sum().backward()
        for p, q in zip(model.parameters(), original.parameters(), strict=True):
            assert p.grad is not None and torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert function.__name__ in fast.report.fallbacks[0]
