"""A weight-folding rule: LoRA merged into the big matrix, and merged anew when any of the three changes."""

import torch
import torch.nn.functional as F
from torch import nn

import fxbt


class MergeLoRA(fxbt.Rule):
    """x W^T + b + s (x A^T) B^T  ->  x (W + s B A)^T + b"""

    name = "merge_lora"

    def pattern(self, op, x):
        low_rank = op.linear(op.linear(x, op.weight("a")), op.weight("b"))
        return op.linear(x, op.weight("w"), op.maybe(op.weight("bias"))) + low_rank * op.number("scale")

    def replace(self, x, w, a, b, scale, bias):
        return F.linear(x, w + scale * (b @ a), bias)  # of weights alone: computed once, not once a call


class LoRALinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.5 * F.linear(F.linear(x, self.a), self.b)


model = LoRALinear(64, 64)
model.a, model.b = nn.Parameter(torch.randn(4, 64) / 8), nn.Parameter(torch.randn(64, 4))
print(fxbt.testing.assert_rewrites(MergeLoRA(), model, [torch.randn(2, 5, 64)], times=1).diff())
