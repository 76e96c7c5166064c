"""softmax(scale * Q K^T + bias) V, however it is written, as one scaled_dot_product_attention (SDPA).

`fxbt.attentions` reads the attention from the graph in any layout; this file builds its replacement. The rules for what
SDPA has no argument for build on this one: `sinks`, `written_out`. An existing SDPA call is improved where its mask
proves to be causal or to mask nothing, or where key/value heads were expanded unnecessarily.

Fully masked rows: a finite fill keeps its uniform average; an -inf fill gives 0 where the model gave NaN. SDPA adds
masks, so a fill becomes a number so large that adding it absorbs the score.

Source: Vaswani et al. 2017, "Attention is all you need", section 3.2.1; torch's SDPA documentation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxbt import Found, Miss, Operands, Rule, attentions, ops, scores
from fxbt.patterns.bias import bias_of, kept_by, times

QUERY, KEY, VALUE = "batch heads seq head_dim", "batch key_heads keys head_dim", "batch key_heads keys value_dim"
SCORES, PER_QUERY, RESULT = "batch heads seq keys", "batch heads seq 1", "batch heads seq value_dim"


@dataclass
class Plan:
    """What `replace` needs besides the tensors: an attention without the masks that were proven away, and its named
    axes."""

    found: attentions.Attention
    layout: attentions.Layout
    written: Any = None  # how to write out scores that SDPA cannot express
    is_causal: bool = False
    is_masked: bool = True


class AttentionRule(Rule):
    """What all attention rules share: operands laid out for SDPA, and factors on queries and on the result."""

    name = "attention"
    proven = True
    makes = frozenset({"attention"})
    targets = attentions.SOFTMAX

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        scores = op.steps(op.contract("... q d, ... k d -> ... q k", query, key), "scores")
        weights = op.steps(op.softmax(scores, over="k", sink=op.maybe(op.any("sink"))), "weights")
        return op.contract("... q k, ... k v -> ... q v", weights, value)

    def written(self, found: attentions.Attention, m: Found) -> Any:
        """How to write out scores that SDPA cannot express; None if SDPA can.

        Raises:
            Miss: another rule handles this attention.
        """
        raise NotImplementedError

    def check(self, m: Found) -> None:
        found = attentions.attentions_of(m)
        written = self.written(found[0], m)
        scores.check_gradient(found[0].steps)
        scale = written.scale if written else scores.scale_of(found[0].steps)
        plan(m, [replace(each, scale=each.scale * scale) for each in found], written)

    def kernel(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, operands: Operands) -> Tensor:
        """The attention itself: takes tensors as SDPA does, returns (batch, heads, seq, value_dim)."""
        raise NotImplementedError

    def replace(self, plans: list[Plan], operands: Operands) -> list[Tensor]:
        return [self._attend(plan, operands.by(plan.layout.named)) for plan in plans]

    def _attend(self, plan: Plan, operands: Operands) -> Tensor:
        found = plan.found
        query = operands(found.query, found.query_axes, QUERY)
        key = operands(found.key, found.key_axes, KEY)
        value = operands(found.value, found.value_axes, VALUE)
        for step in found.steps:
            if isinstance(step, scores.ScaleBy):
                query = times(query, operands(step.node, step.axes, PER_QUERY, expand=False), step.divide)
        result = self.kernel(plan, query, key, value, operands)
        for after in found.after:
            if isinstance(after, scores.Scale):
                result = result * after.number
            else:
                result = times(result, operands(after.node, after.axes, PER_QUERY, expand=False), after.divide)
        return operands.back(result.to(found.output.meta["val"].dtype), RESULT, found.output_axes)


class SoftmaxAttention(AttentionRule):
    """softmax(scale * Q K^T + bias) V  ->  scaled_dot_product_attention(Q, K, V, bias, scale)"""

    def written(self, found: attentions.Attention, m: Found) -> None:
        if found.sink or scores.beyond_sdpa(found.steps, found.dtype):
            raise another_rules(m)

    def kernel(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, operands: Operands) -> Tensor:
        query, bias = query_and_bias(plan, query, operands)
        return sdpa(plan, query, key, value, bias)


class CalledAttention(SoftmaxAttention):
    """SDPA with a mask that is causal or masks nothing, or with expanded heads  ->  SDPA without them"""

    targets = frozenset({ops.SDPA})

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        return op.attention(query, key, value)

    def check(self, m: Found) -> None:
        found = attentions.from_sdpa(m.outputs[0])
        if not found or not is_improved(found):
            m.keep()
        else:
            plan(m, found)


def is_improved(found: list[attentions.Attention]) -> bool:
    """Whether an SDPA call can do without its mask or without expanded heads."""
    layout = attentions.layout_of(found[0])
    return bool(layout.groups or attentions.proven_mask(found[0], layout, found[0].steps))


def another_rules(m: Found) -> Miss:
    """The Miss of a softmax that another attention rule handles."""
    return Miss("another attention rule handles this softmax", node=m.outputs[0], total=1)


def plan(m: Found, found: list[attentions.Attention], written: Any = None) -> None:
    """Binds the plans of attentions, without a mask that is proven to hide only later keys, or nothing.

    Raises:
        Miss: an operand has an axis that SDPA has no place for.
    """
    layouts = attentions.layouts_of(found)
    masking = written.after if written else found[0].steps
    unmasked = attentions.proven_mask(found[0], layouts[0], masking)
    dropped = [step for step in masking if isinstance(step, scores.Add | scores.Fill)] if unmasked else []
    m.lay_out({node: labels for each in found for node, labels in each.operands(dropped)})
    m.assume(*(unmasked.assumes if unmasked else ()))
    is_causal = found[0].causal or bool(unmasked and unmasked.causal)
    m.bind(plans=[Plan(*pair, written, is_causal, not unmasked) for pair in zip(found, layouts, strict=True)])


def query_and_bias(plan: Plan, query: Tensor, operands: Operands) -> tuple[Tensor, Tensor | None]:
    """The query, and the bias that SDPA adds to its scaled product: (batch | 1, heads | 1, seq | 1, keys | 1)."""
    if not plan.is_masked:
        return query, None
    found = plan.found
    on_scores = scores_operand(operands)
    bias = bias_of(scores.lowered(found.steps, found.dtype), on_scores, found.dtype)
    is_narrow = found.dtype is torch.float16
    if bias is None or not scores.has_finite_fill(found.steps) or not (torch.is_grad_enabled() or is_narrow):
        return query, bias
    # In rows that finite fills mask entirely, all scores are equal. No gradient may flow from such rows to the scores,
    # and float16 has no number that absorbs a score.
    is_open = kept_by(found.steps, on_scores).any(-1, keepdim=True)
    if is_narrow:
        bias = bias.logical_or(~is_open) if bias.dtype is torch.bool else torch.where(is_open, bias, 0.0)
    return query * is_open, bias


def scores_operand(operands: Operands) -> Any:
    """Returns a step's tensor in the shape of scores: (batch | 1, heads | 1, seq | 1, keys | 1)."""
    return lambda node, labels: operands(node, labels, SCORES, expand=False)


def sdpa(plan: Plan, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Calls SDPA as the plan says: causal or not, with dropout, with grouped heads.

    Where several heads with one query each share their keys (one decoding step), they become the queries of one head.
    """
    if bias is not None:
        bias = _with_batch_and_keys(bias, query, key)
    query, key, value, bias = same_dtype(query, key, value, bias)
    is_row_each = _is_one(query.shape[2]) and not plan.is_causal
    folded = bool(plan.layout.groups) and is_row_each and (bias is None or _is_one(bias.shape[1]))
    result = F.scaled_dot_product_attention(
        query.reshape(query.shape[0], key.shape[1], -1, query.shape[3]) if folded else query,
        key,
        value,
        attn_mask=bias,
        dropout_p=plan.found.dropout,
        is_causal=plan.is_causal,
        scale=plan.found.scale,
        enable_gqa=bool(plan.layout.groups) and not folded,
    )
    return result.reshape(*query.shape[:3], value.shape[3]) if folded else result


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _with_batch_and_keys(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """`bias` with a full batch axis and a full key axis: SDPA guards on the ones that it broadcasts itself."""
    shape = [-1] * 4
    for dim, size in ((0, query.shape[0]), (3, key.shape[2])):
        if _is_one(bias.shape[dim]):
            shape[dim] = size
    return bias if shape == [-1] * 4 else bias.expand(shape)


def same_dtype(*tensors: Any) -> list[Any]:
    """Promotes float operands to their widest dtype, because SDPA takes one dtype."""
    floats = [tensor for tensor in tensors if tensor is not None and tensor.is_floating_point()]
    widest = floats[0].dtype
    for tensor in floats:
        widest = torch.promote_types(widest, tensor.dtype)
    return [tensor if tensor is None or not tensor.is_floating_point() else tensor.to(widest) for tensor in tensors]
