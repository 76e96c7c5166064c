"""Attention on scores that SDPA has no argument for: softmax(c * tanh(scale Q K^T + before ...) + after ...) V.

These are a softcap (c), biases whose order affects rounding, and fills that do not mask every possible score.
`fxbt.ops.attention_by_products` computes such scores a few queries at a time; it has no gradient.

Source: softcap, Gemma team 2024, "Gemma 2", section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxbt import Found, Miss, Operands, attentions, ops, scores
from fxbt.patterns.bias import Operand, bias_of, kept_by
from fxbt.patterns.sdpa import AttentionRule, Plan, another_rules, same_dtype, scores_operand


@dataclass
class WrittenOut:
    """The steps before and after the tanh, and the dtype of the scores; without a softcap, all steps are `after`."""

    before: list[scores.Step]
    softcap: float | None
    after: list[scores.Step]
    dtype: torch.dtype
    replaces: bool = False  # a fill replaces scores, whatever their value

    @property
    def scale(self) -> float:
        """The scale of the product itself."""
        return scores.scale_of(self.after if self.softcap is None else self.before)

    def biases(self, operand: Operand, is_masked: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The biases added before the tanh and after it; one by one if adding one rounds the others."""
        before = bias_of(self.before, operand, self.dtype)
        steps = self.after if self.replaces else scores.lowered(self.after, self.dtype)
        parts = [[step] for step in steps] if scores.rounding_bias(steps) else [steps]
        after = [bias_of(part, operand, self.dtype) for part in parts] if is_masked else []
        return [] if before is None else [before], [_as_addend(bias) for bias in after if bias is not None]

    def kept(self, operand: Operand, is_masked: bool) -> torch.Tensor | None:
        """Where scores stay; None if no fill replaces them elsewhere."""
        return kept_by(self.after, operand) if self.replaces and is_masked else None


class WrittenOutAttention(AttentionRule):
    """softmax(c * tanh(scale * Q K^T + before) + after) V  ->  fxbt.ops.attention_by_products"""

    def written(self, found: attentions.Attention, m: Found) -> WrittenOut:
        reason = scores.beyond_sdpa(found.steps, found.dtype)
        if reason is None:
            raise another_rules(m)
        softmax = m.softmax
        written = written_out(found.steps, softmax, reason)
        if found.dropout or found.sink or found.zeroed or found.zeroes_nan:
            raise Miss(
                "SDPA cannot express these scores, and they come with dropout, a sink or zeroed weights", node=softmax
            )
        if softmax.target is attentions.SAFE_SOFTMAX:
            raise Miss(
                "SDPA cannot express these scores, and this softmax gives 0 in rows without any key", node=softmax
            )
        return written

    def kernel(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, operands: Operands) -> Tensor:
        written: WrittenOut = plan.written
        on_scores, is_masked = scores_operand(operands), plan.is_masked
        before, after = written.biases(on_scores, is_masked)
        kept = written.kept(on_scores, is_masked)
        like = query.new_empty((), dtype=written.dtype)
        query, key, value, _, *biases = same_dtype(query, key, value, like, *before, *after)
        before, after = biases[: len(before)], biases[len(before) :]
        softcap = written.softcap
        return ops.attention_by_products(
            query, key, value, before, after, plan.found.scale, softcap, plan.is_causal, kept
        )


def written_out(steps: list[scores.Step], softmax: fx.Node, reason: str) -> WrittenOut:
    """How to write out scores with these steps (innermost first), which SDPA cannot express for `reason`.

    Raises:
        Miss: they cannot be written out, or not here.
    """
    places = [place for place, step in enumerate(steps) if isinstance(step, scores.Tanh)]
    dtype = scores.scores_dtype(softmax)
    is_rounding = scores.rounding_bias(steps) is not None
    _check_can_be_here(softmax, reason)
    # float16 has no number low enough to absorb a score
    replaces = scores.shows(steps, dtype) is not None or (dtype is torch.float16 and scores.has_finite_fill(steps))
    if replaces and is_rounding:
        raise Miss(f"{reason}, and adding the mask rounds the biases", node=softmax)
    if not places:
        if is_rounding:
            _check_order_is_kept(steps)
        return WrittenOut([], None, steps, dtype, replaces)
    before, after = steps[: places[0]], steps[places[0] + 1 :]
    _check_softcap(before, after, softmax)
    return WrittenOut(before, scores.scale_of(after), after, dtype, replaces)


def _check_can_be_here(softmax: fx.Node, what: str) -> None:
    if torch.is_grad_enabled():
        raise Miss(f"{what}; SDPA cannot express it, and the kernel that can has no gradient", node=softmax)
    if torch.is_autocast_enabled(softmax.meta["val"].device.type):
        raise Miss(f"{what}; SDPA cannot express it, and the kernel that can ignores autocast", node=softmax)


def _check_softcap(before: list[scores.Step], after: list[scores.Step], softmax: fx.Node) -> None:
    if any(isinstance(step, scores.Tanh) for step in after):
        raise Miss("the scores are softcapped twice", node=softmax)
    if any(isinstance(step, scores.Fill | scores.Floor) for step in before):
        raise Miss("the softcap is applied after the mask", node=softmax, expected="a mask after the softcap")
    if any(isinstance(step, scores.ScaleBy) for step in after):
        raise Miss("softcapped scores are scaled by a tensor", node=softmax, expected="a number")


def _check_order_is_kept(steps: list[scores.Step]) -> None:
    first = next(place for place, step in enumerate(steps) if isinstance(step, scores.Add | scores.Fill))
    for step in steps[first:]:
        if not isinstance(step, scores.Add | scores.Fill):
            raise Miss("a mask that rounds other biases is scaled together with them", expected="a mask added last")


def _as_addend(bias: torch.Tensor) -> torch.Tensor:
    return torch.where(bias, 0.0, -math.inf) if bias.dtype is torch.bool else bias
