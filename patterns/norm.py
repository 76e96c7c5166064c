"""Norms, however they are decomposed, as one layer_norm or rms_norm; and norm(x + branch) as one node."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

import fxbt


def is_per_channel(m: fxbt.Found, *names: str) -> None:
    """Checks that each scale and shift of a norm is a vector of the last dim's size."""
    for name in names:
        value = m.values[name]
        if value is not None:
            m.need(isinstance(value, fx.Node), f"{name} is a number, not a tensor")
            m.need(m.x.shape[-1:] == getattr(m, name).shape, f"{name} is not a vector of the last dim's size")


class RMSNorm(fxbt.Rule):
    """x / sqrt(mean(x^2) + eps) * weight  ->  rms_norm(x, weight, eps)

    Source: Zhang and Sennrich 2019, "Root mean square layer normalization", equation 4.
    """

    name = "norm"
    makes = frozenset({"rms_norm"})
    proven = True

    def pattern(self, op: Any, x: Any) -> Any:
        mean_of_squares = op.mean(op.pow(x, 2), -1, keepdim=True)
        return x * op.rsqrt(mean_of_squares + op.number("eps")) * op.maybe(op.any("weight"))

    def check(self, m: fxbt.Found) -> None:
        is_per_channel(m, "weight")

    def replace(self, x: torch.Tensor, eps: float, weight: torch.Tensor | None) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)


class LayerNorm(fxbt.Rule):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias  ->  layer_norm(x, weight, bias, eps)

    Source: Ba et al. 2016, "Layer normalization", equation 4.
    """

    name = "norm"
    makes = frozenset({"layer_norm"})
    proven = True

    def pattern(self, op: Any, x: Any) -> Any:
        centered = x - op.mean(x, -1, keepdim=True)
        variance = op.either(
            op.mean(op.pow(centered, 2), -1, keepdim=True),
            op.var(x, -1, correction=0, keepdim=True),
        )
        normed = centered * op.rsqrt(variance + op.number("eps")) * op.maybe(op.any("weight"))
        return op.either(normed + op.any("bias"), normed)

    def check(self, m: fxbt.Found) -> None:
        is_per_channel(m, "weight", "bias")

    def replace(
        self, x: torch.Tensor, eps: float, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        scale, shift = (None if tensor is None else tensor.to(x.dtype) for tensor in (weight, bias))
        return F.layer_norm(x, x.shape[-1:], scale, shift, eps)


class ResidualNorm(fxbt.Rule):
    """norm(x + branch) as one node, if nothing else reads the sum"""

    name = "residual_norm"
    makes = frozenset({"residual_norm"})
    outline = "residual_norm"

    def pattern(self, op: Any, x: Any, branch: Any) -> Any:
        return op.normalize(x + branch)
