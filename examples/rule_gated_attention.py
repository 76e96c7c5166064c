"""An attention variant of your own: gates on the keys move into the values, and SDPA takes it from there."""

import torch
from torch import nn

import fxbt


class GatedKeys(fxbt.Rule):
    """(softmax(scores) * gate) V  ->  softmax(scores) (gate^T * V): the same sum, and now it is attention"""

    name = "gated_keys"

    def pattern(self, op, scores, gate, value):
        return op.matmul(op.softmax(scores, -1) * gate, value)

    def replace(self, scores, gate, value):
        return torch.softmax(scores, -1) @ (gate.mT * value)  # of another shape unless the gate is one per key


class GatedAttention(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seq, 64)
        q, k, v, gate = super().forward(x).split([64, 64, 64, 1], -1)
        return ((q @ k.mT / 8).softmax(-1) * gate.mT.sigmoid()) @ v


print(fxbt.testing.assert_rewrites(GatedKeys(), GatedAttention(64, 193), [torch.randn(2, 6, 64)]).diff())
