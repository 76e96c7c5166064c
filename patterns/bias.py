"""The `attn_mask` that SDPA adds to its scaled product, computed from a chain of steps on attention scores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import fx

from fxbt import axes, scores

Operand = Callable[[fx.Node, axes.Axes], torch.Tensor]


def kept_by(steps: list[scores.Step], operand: Operand) -> torch.Tensor:
    """Where no fill replaces a score; there must be at least one fill."""
    masks_ = [operand(step.node, step.axes).bool() == step.keep for step in steps if isinstance(step, scores.Fill)]
    return functools.reduce(torch.logical_and, masks_)


def bias_of(steps: list[scores.Step], operand: Operand, dtype: torch.dtype) -> torch.Tensor | None:
    """What the steps add to the scaled product: the chain, innermost first, applied to a score of zero of `dtype`.

    `operand` returns a step's tensor laid out as (batch, heads, seq, keys). A single -inf fill stays a boolean mask.
    """
    if len(steps) == 1 and isinstance(steps[0], scores.Fill) and steps[0].fill == -math.inf:
        mask = operand(steps[0].node, steps[0].axes)
        return mask if steps[0].keep else mask.logical_not()
    bias: torch.Tensor | None = None
    for step in steps:
        bias = _apply(step, bias, operand, dtype)
    return bias


def _apply(step: scores.Step, bias: torch.Tensor | None, operand: Operand, dtype: torch.dtype) -> torch.Tensor | None:
    if isinstance(step, scores.Scale):
        return None if bias is None else bias * step.number
    if isinstance(step, scores.Floor):
        return None if bias is None else bias.clamp(min=step.lowest)
    if isinstance(step, scores.ScaleBy):
        return None if bias is None else times(bias, operand(step.node, step.axes), step.divide)
    if isinstance(step, scores.Fill):
        mask = operand(step.node, step.axes).bool()
        keep = mask if step.keep else mask.logical_not()
        zero = torch.zeros((), dtype=dtype, device=keep.device)
        return torch.where(keep, zero if bias is None else bias, step.fill)
    assert isinstance(step, scores.Add), "scores under a tanh are not a sum with a bias"
    term = _addend(step, operand)
    return term if bias is None else bias + term


def _addend(step: scores.Add, operand: Operand) -> torch.Tensor:
    if not isinstance(step.node, fx.Node):
        return torch.full((1, 1, 1, 1), step.node * step.factor)
    tensor = operand(step.node, step.axes)
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    return tensor if step.factor == 1 else tensor * step.factor


def times(tensor: torch.Tensor, factor: torch.Tensor, divide: bool) -> torch.Tensor:
    """A product, or a quotient if `divide`."""
    return tensor / factor if divide else tensor * factor
