"""A selective scan as one operation, which replaces a loop over the tokens in a graph.

h_t = a_t * h_(t-1) + b_t and y_t = h_t c_t, from h = 0 (Gu and Dao, Mamba, https://arxiv.org/abs/2312.00752).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _states(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.zeros_like(a[:, :, 0], dtype=c.dtype)
    outputs = []
    for t in range(a.shape[2]):
        state = a[:, :, t] * state + b[:, :, t]
        outputs.append((state.to(c.dtype) @ c[:, t, :, None])[:, :, 0])
    return torch.stack(outputs, -1), state


@torch.library.custom_op("fxbt::selective_scan", mutates_args=())
def selective_scan(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [batch, channels, tokens] in c's dtype and the last state [batch, channels, states].

    Decays `a` and inputs `b` are [batch, channels, tokens, states], `c` is [batch, tokens, states].

    Example:
        >>> outputs, state = selective_scan(torch.rand(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 5, 4))
    """
    return _states(a, b, c)


@selective_scan.register_fake
def _(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), c.dtype)
    return c.new_empty(a.shape[:3]), a.new_empty((*a.shape[:2], a.shape[3]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
    with torch.enable_grad():
        outputs = _states(*inputs)
    return torch.autograd.grad(outputs, inputs, gradients)


selective_scan.register_autograd(_backward, setup_context=_keep)
