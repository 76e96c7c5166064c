"""Attention in graphs with gradients: torch's fused kernels have only a first derivative, eager attention has all.

The fused kernel and its backward run as usual. If a backward is itself recorded (`create_graph=True`), the derivative
is that of the kernel's formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def attention_with_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """SDPA of (batch, heads, seq, head_dim) for training, differentiable as often as its formula.

    torch 2.13's CPU flash kernel has wrong gradients in rows that a mask blocks entirely, so it is not used with a
    mask. A fused kernel on another device with dropout (`dropout_p`) keeps its single derivative: only the kernel knows
    which weights it dropped.

    Example:
        >>> attention_with_gradient(*(torch.randn(2, 4, 7, 8, requires_grad=True) for _ in range(3)))
    """
    if query.device.type == "cpu" and attn_mask is not None:
        return _formula(query, key, value, attn_mask, dropout_p, is_causal, **options)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if dropout_p or not output.requires_grad:
        return output
    return _Twice.apply(output, query, key, value, attn_mask, is_causal, options)


def _formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **options: Any) -> Tensor:
    # the operation takes what SDPA makes of a boolean mask; it would add ones
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    return aten._scaled_dot_product_attention_math(query, key, value, mask, *args, **options)[0]


class _Twice(torch.autograd.Function):
    """The output of a fused kernel, unchanged; a recorded backward bypasses the kernel and uses the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, attn_mask)  # the kernel keeps them, too, so this takes no extra memory
        ctx.is_causal, ctx.options = is_causal, options
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return gradient, *[None] * 6
        # Views are tensors of their own, because one tensor may be passed twice (as key and value).
        operands: list[Any] = [None if saved is None else saved.view_as(saved) for saved in ctx.saved_tensors]
        output = _formula(*operands[:3], operands[3], 0.0, ctx.is_causal, **ctx.options)
        wanted = [i for i in range(4) if ctx.needs_input_grad[i + 1]]
        inputs = [operands[i] for i in wanted]
        found = torch.autograd.grad(output.to(gradient.dtype), inputs, gradient, create_graph=True, allow_unused=True)
        gradients = dict(zip(wanted, found, strict=True))
        return None, *[gradients.get(i) for i in range(4)], None, None
