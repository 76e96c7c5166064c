"""An op fusion in one rule: tanh-gelu written out becomes torch's kernel. Run: python examples/rule_tanh_gelu.py"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import fxbt


class TanhGelu(fxbt.Rule):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))  ->  gelu(x, approximate="tanh")"""

    name = "tanh_gelu"

    def pattern(self, op, x):
        inner = (x + op.pow(x, 3.0) * 0.044715) * math.sqrt(2 / math.pi)
        return x * 0.5 * (op.tanh(inner) + 1.0)

    def replace(self, x):
        return F.gelu(x, approximate="tanh")


class HandmadeGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # other order, other grouping: the same formula
        return (1 + torch.tanh(0.7978845608 * (0.044715 * x * x * x + x))) * x / 2


print(fxbt.testing.assert_rewrites(TanhGelu(), HandmadeGelu(), [torch.randn(2, 5, 8)], times=1).diff())
