"""Attention on scores that SDPA has no argument for: softmax(c * tanh(scale Q K^T + before ...) + after ...) V.

A softcap (c), biases whose order shows, or fills that are no mask for every score:
`fxbt.ops.attention_by_products` writes such scores out, some queries at a time, and has no gradient.

Source: softcap, Gemma team 2024, "Gemma 2", section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from fxbt import Miss
from fxbt.patterns.scores import (
    Add,
    Fill,
    Floor,
    Operand,
    ScaleBy,
    Step,
    Tanh,
    bias_of,
    has_finite_fill,
    kept_by,
    lowered,
    rounding_bias,
    scale_of,
    scores_dtype,
    shows,
)


@dataclass
class WrittenOut:
    """The steps before and after the tanh, and what the scores are computed in; without a softcap all are after."""

    before: list[Step]
    softcap: float | None
    after: list[Step]
    dtype: torch.dtype
    replaces: bool = False  # a fill stands in the place of scores, whatever they are

    @property
    def scale(self) -> float:
        """Of the product itself."""
        return scale_of(self.after if self.softcap is None else self.before)

    def biases(self, operand: Operand, is_masked: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What is added before the tanh, and after it: one by one where one rounds the others."""
        before = bias_of(self.before, operand, self.dtype)
        steps = self.after if self.replaces else lowered(self.after, self.dtype)
        parts = [[step] for step in steps] if rounding_bias(steps) else [steps]
        after = [bias_of(part, operand, self.dtype) for part in parts] if is_masked else []
        return [] if before is None else [before], [_as_addend(bias) for bias in after if bias is not None]

    def kept(self, operand: Operand, is_masked: bool) -> torch.Tensor | None:
        """Where the scores stay, if a fill stands in their place elsewhere."""
        return kept_by(self.after, operand) if self.replaces and is_masked else None


def written_out(steps: list[Step], softmax: fx.Node) -> WrittenOut | None:
    """How scores are to be written out that take these steps, innermost first; None where SDPA expresses them.

    Raises:
        Miss: they cannot be written out either, or not here.
    """
    places = [place for place, step in enumerate(steps) if isinstance(step, Tanh)]
    dtype = scores_dtype(softmax)
    reason, is_rounding = shows(steps, dtype), rounding_bias(steps) is not None
    if not places and not is_rounding and reason is None:
        return None
    what = "the scores are softcapped" if places else reason or "a mask rounds the biases it is added to"
    _check_can_be_here(softmax, what)
    # float16 has no number so low that it absorbs a score
    replaces = reason is not None or (dtype is torch.float16 and has_finite_fill(steps))
    if replaces and is_rounding:
        raise Miss(f"{what}, and a mask rounds the biases it is added to", node=softmax)
    if not places:
        if is_rounding:
            _check_order_is_kept(steps)
        return WrittenOut([], None, steps, dtype, replaces)
    before, after = steps[: places[0]], steps[places[0] + 1 :]
    _check_softcap(before, after, softmax)
    return WrittenOut(before, scale_of(after), after, dtype, replaces)


def _check_can_be_here(softmax: fx.Node, what: str) -> None:
    if torch.is_grad_enabled():
        raise Miss(f"{what}, which SDPA cannot express, and what can has no gradient", node=softmax)
    if torch.is_autocast_enabled(softmax.meta["val"].device.type):
        raise Miss(f"{what}, which SDPA cannot express, and what can does not see autocast", node=softmax)


def _check_softcap(before: list[Step], after: list[Step], softmax: fx.Node) -> None:
    if any(isinstance(step, Tanh) for step in after):
        raise Miss("the scores are softcapped twice", node=softmax)
    if any(isinstance(step, Fill | Floor) for step in before):
        raise Miss("masked scores are softcapped afterwards", node=softmax, expected="a mask after the softcap")
    if any(isinstance(step, ScaleBy) for step in after):
        raise Miss("softcapped scores are scaled by a tensor", node=softmax, expected="a number")


def _check_order_is_kept(steps: list[Step]) -> None:
    first = next(place for place, step in enumerate(steps) if isinstance(step, Add | Fill))
    for step in steps[first:]:
        if not isinstance(step, Add | Fill):
            raise Miss("a mask that rounds other biases is scaled with them", expected="a mask added last")


def _as_addend(bias: torch.Tensor) -> torch.Tensor:
    return torch.where(bias, 0.0, -math.inf) if bias.dtype is torch.bool else bias
