"""Attention as it stands in a graph: its operands, the axes of each, and what happens to scores and weights.

Anchored at a softmax, found by meaning: backward through a chain of steps on the scores to a contraction in which
exactly one operand (the key) holds the softmax axis; forward to a contraction over that same axis (with the value).
A call of SDPA is read as if it were spelled out. The roles of all axes follow by set algebra over `axes`.

Example::

    (found,) = from_softmax(softmax)
    found.steps  # [Scale(0.125), Add(mask, ...)], innermost first
    layout_of(found).named("batch heads seq keys")
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..graph.miss import Miss
from . import axes, sinks
from .scores import (
    DIVIDE,
    MASKED_FILL,
    MULTIPLY,
    WHERE,
    Add,
    Fill,
    Floor,
    Scale,
    ScaleBy,
    Step,
    Unmasked,
    check_not_coarser,
    fill_operands,
    has_finite_fill,
    is_mask,
    may_mask,
    proves_unmasked,
    query_and_key,
    same_mask,
    scores_dtype,
    unexpanded,
    unwind,
    zeroing_mask,
)

aten = torch.ops.aten

SAFE_SOFTMAX = aten._safe_softmax.default  # 0, not NaN, where all scores are -inf: what SDPA gives there
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten.special_softmax.default, SAFE_SOFTMAX})


@dataclass
class Attention:
    """An attention as found: operands, their axes, and what happens to the scores (innermost step first)."""

    query: fx.Node
    query_axes: axes.Axes
    key: fx.Node
    key_axes: axes.Axes
    value: fx.Node
    value_axes: axes.Axes
    head_dim: tuple[axes.Atom, ...]
    score_axes: axes.Axes
    keys: tuple[axes.Atom, ...]
    steps: list[Step]
    output: fx.Node
    output_axes: axes.Axes
    product: fx.Node | None = None  # of query and key; None in a call of SDPA
    scale: float = 1.0  # beside what the steps scale by
    dropout: float = 0.0
    zeroed: Fill | None = None
    zeroes_nan: bool = False  # the weights of rows that -inf masks entirely
    after: list[ScaleBy | Scale] = field(default_factory=list)
    causal: bool = False
    sink: Add | None = None  # one more score for each query, of a key without a value
    dtype: torch.dtype = torch.float32  # of the scores in the softmax

    def operands(self, dropped: Sequence[Step] = ()) -> list[tuple[fx.Node, axes.Axes]]:
        """The tensors that it is computed from, with their axes; without those of the `dropped` steps."""
        three = [(self.query, self.query_axes), (self.key, self.key_axes), (self.value, self.value_axes)]
        steps = [step for step in self.steps if step not in dropped]
        tensors = [step for step in (*steps, *self.after, self.sink) if isinstance(step, ScaleBy | Add | Fill)]
        return three + [(step.node, step.axes) for step in tensors if isinstance(step.node, fx.Node)]


def from_softmax(softmax: fx.Node) -> list[Attention]:
    """One attention, or several of the same weights with other values.

    Raises:
        Miss: none stands around this softmax; the reason says at which op.
    """
    scores: Any = softmax.args[0]
    dim: Any = softmax.args[1]
    score_axes = axes.fresh(softmax)
    weights, sink = softmax, None
    if scores.target is aten.cat.default:
        weights = _only_user(softmax)
        scores, score_axes, sink = sinks.cut_off(softmax, weights, score_axes)
    keys = score_axes[dim]
    if not keys:
        raise Miss("the softmax runs over an axis of size one", node=softmax)
    steps: list[Step] = []
    product = unwind(scores, score_axes, keys, steps)
    check_not_coarser(softmax, softmax.meta["val"].dtype, product.lhs.meta["val"].dtype)
    steps.reverse()
    if product.addend is not None:
        steps.insert(0, Add(product.addend, axes.broadcast_axes(product.addend, product.axes), product.addend_factor))
    query, key = query_and_key(product, keys)
    found, *others = _values_of(weights, score_axes, keys)
    if sink is None and not others and sinks.normalizer_of(scores):
        found.output, found.output_axes, sink = sinks.multiplied_on(
            found.output, found.output_axes, softmax, score_axes
        )
    found.dtype = scores_dtype(softmax)
    if found.zeroed is not None:
        _mask_by_zeroing(steps, found.zeroed, found.dtype)
    found.product, found.head_dim, found.steps, found.sink = product.node, product.contracted, steps, sink
    found.query, found.query_axes, query_scale = _peel_scaled(*query)
    found.key, found.key_axes, key_scale = _peel_scaled(*key)
    found.scale = product.factor * query_scale * key_scale
    return [_with_value_of(found, other) for other in (found, *others)]


def _with_value_of(found: Attention, other: Attention) -> Attention:
    value, value_axes = axes.peel(other.value, other.value_axes)
    return dataclasses.replace(
        found,
        value=value,
        value_axes=value_axes,
        output=other.output,
        output_axes=other.output_axes,
        after=other.after,
    )


def _peel_scaled(node: fx.Node, labels: axes.Axes) -> tuple[fx.Node, axes.Axes, float]:
    """Back through layout ops and constant factors."""
    scale = 1.0
    while True:
        node, labels = axes.peel(node, labels)
        if node.op != "call_function" or node.target not in MULTIPLY | DIVIDE or node.kwargs:
            return node, labels, scale
        factor = node.args[1]
        if not isinstance(factor, int | float) or not isinstance(node.args[0], fx.Node):
            return node, labels, scale
        scale *= 1 / factor if node.target in DIVIDE else factor
        node = node.args[0]


def _values_of(weights: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...]) -> list[Attention]:
    """What the weights are multiplied with: a value, or several at once, as in two equal attentions."""
    products = [axes.contraction_with(user, weights, labels) for user in weights.users]
    if len(products) > 1 and all(products):
        return [_with_value(product, weights, keys, labels, []) for product in products if product]
    return [_follow(weights, labels, keys)]


def _follow(softmax: fx.Node, score_axes: axes.Axes, keys: tuple[axes.Atom, ...]) -> Attention:
    """Forward from the softmax, through what does not mix keys, to the contraction with the value."""
    node, labels = softmax, score_axes
    dtypes: list[torch.dtype] = []
    after: list[ScaleBy | Scale] = []
    dropout, zeroed, zeroes_nan = 0.0, None, False
    while True:
        user = _without_nan(node) or _only_user(node)
        product = axes.contraction_with(user, node, labels) or _multiplied_and_summed(user, node, labels)
        if product is not None:
            found = _with_value(product, node, keys, score_axes, after)
            found.dropout, found.zeroed, found.zeroes_nan = dropout, zeroed, zeroes_nan
            for dtype in dtypes:
                check_not_coarser(product.node, dtype, found.value.meta["val"].dtype)
            return found
        forward = axes.step_forward(node, labels, user)
        if forward is None and _zeroes_nan(user, node):
            zeroes_nan, forward = True, labels
        mask = _multiplied_mask(user, node, labels, keys) if forward is None and zeroed is None else None
        if mask is not None:
            zeroed, forward = mask, labels
        if forward is None and user.target in MULTIPLY | DIVIDE:
            after.append(_weight_factor(user, node, labels, keys))
            forward = labels
        if forward is None and user.target is aten.dropout.default:
            if dropout:
                raise Miss("the attention weights pass two dropouts", node=user)
            dropout, forward = float(user.args[1]), labels  # type: ignore[arg-type]
        if forward is None and user.target in WHERE | MASKED_FILL:
            if zeroed is not None:
                raise Miss("the attention weights are masked twice", node=user)
            zeroed, forward = _zeroing(user, node, labels), labels
        if forward is None and user.target in axes.CASTS:
            dtypes.append(user.meta["val"].dtype)
            forward = labels
        if forward is None:
            raise Miss(
                "the attention weights go into an op other than their product with the value",
                node=user,
                expected="dropout, cast, a factor per query, then a contraction over the keys",
            )
        node, labels = user, forward


def _multiplied_and_summed(user: fx.Node, weights: fx.Node, labels: axes.Axes) -> axes.Contraction | None:
    """(weights * value).sum(keys) as a contraction."""
    if user.target not in MULTIPLY or len(user.users) != 1:
        return None
    return axes.contraction_with(next(iter(user.users)), weights, labels)


def _without_nan(weights: fx.Node) -> fx.Node | None:
    """where(isnan(weights), 0, weights), if that and nothing else reads the weights."""
    users = list(weights.users)
    fills = [user for user in users if user.target in WHERE | MASKED_FILL]
    if len(users) != 2 or len(fills) != 1:
        return None
    (asked,) = (user for user in users if user is not fills[0])
    values, mask, fill, keep = fill_operands(fills[0])
    is_nan = asked.target is aten.isnan.default or (asked.target is aten.ne.Tensor and len(asked.all_input_nodes) == 1)
    is_zeroed = (values, mask, fill, keep) == (weights, asked, 0, False)
    return fills[0] if is_nan and is_zeroed and len(asked.users) == 1 else None


def _zeroes_nan(user: fx.Node, weights: fx.Node) -> bool:
    """Whether weights are made zero where they are NaN, in rows that -inf masks entirely: which is what SDPA gives."""
    if user.target is aten.nan_to_num.default:
        if axes.argument(user, "nan") not in (None, 0):
            raise Miss("NaN of the attention weights becomes another number", node=user, expected="nan_to_num(0.0)")
        return True
    return user is _without_nan(weights)


def _multiplied_mask(user: fx.Node, weights: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...]) -> Fill | None:
    """The mask that weights are multiplied with along the keys, if it is 0 or 1 for sure."""
    if user.target not in MULTIPLY or not all(isinstance(arg, fx.Node) for arg in user.args[:2]):
        return None
    factor: Any = user.args[1] if user.args[0] is weights else user.args[0]
    factor_axes = axes.broadcast_axes(factor, labels)
    return None if axes.is_constant_along(factor_axes, keys) else zeroing_mask(factor, factor_axes)


def _zeroing(user: fx.Node, weights: fx.Node, labels: axes.Axes) -> Fill:
    scores, mask, fill, keep = fill_operands(user)
    if scores is not weights or fill != 0 or not isinstance(mask, fx.Node):
        raise Miss("the attention weights are replaced by other values", node=user, expected="a fill of 0")
    return Fill(*unexpanded(mask, axes.broadcast_axes(mask, labels)), 0.0, keep)


def _mask_by_zeroing(steps: list[Step], zeroed: Fill, dtype: torch.dtype) -> None:
    """Weights zeroed where the scores were filled last: a fully masked row gives 0, which is what SDPA's -inf means."""
    fills = [step for step in steps if isinstance(step, Fill | Floor)]
    last: Any = fills[-1] if fills else None
    if not isinstance(last, Fill) or not same_mask(last, zeroed):
        raise Miss("attention weights are zeroed where the scores were not masked", node=zeroed.node)
    if not is_mask(last, steps, dtype):
        raise Miss(f"attention weights are zeroed where the scores became {last.fill:g}, no mask for every score")
    last.fill = -math.inf
    if has_finite_fill(steps) or any(isinstance(step, Add) and may_mask(step) for step in steps):
        raise Miss("attention weights are zeroed by one of several masks", node=zeroed.node)


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_function":
        extra = users[-1] if users else node
        raise Miss(
            "the attention weights are used elsewhere too",
            node=node,
            expected="one use: the value product",
            found=(node, "is also used by", extra),
        )
    return users[0]


def _weight_factor(user: fx.Node, node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...]) -> Scale | ScaleBy:
    divide = user.target in DIVIDE
    position = 0 if user.args[0] is node else 1
    factor: Any = user.args[1 - position]
    if divide and (position == 1 or user.kwargs):
        raise Miss("something is divided by the attention weights", node=user)
    if not isinstance(factor, fx.Node):
        return Scale(1 / factor if divide else factor)
    factor_axes = axes.broadcast_axes(factor, labels)
    if not axes.is_constant_along(factor_axes, keys):
        raise Miss("the attention weights are multiplied by a tensor that varies along the keys", node=user)
    return ScaleBy(factor, factor_axes, divide)


def _with_value(
    product: axes.Contraction,
    weights: fx.Node,
    keys: tuple[axes.Atom, ...],
    score_axes: axes.Axes,
    after: list[ScaleBy | Scale],
) -> Attention:
    value, value_axes = (product.rhs, product.rhs_axes)
    if product.rhs is weights:
        value, value_axes = product.lhs, product.lhs_axes
    if set(axes.leaves(product.contracted)) != set(axes.leaves(keys)):
        raise Miss("the product with the value does not sum over exactly the softmax axis", node=product.node)
    if product.addend is not None:
        raise Miss("the product with the value adds a third term", node=product.node)
    if product.factor != 1:
        after = [*after, Scale(product.factor)]
    unknown: Any = None
    return Attention(
        query=unknown,
        query_axes=(),
        key=unknown,
        key_axes=(),
        value=value,
        value_axes=value_axes,
        head_dim=(),
        score_axes=score_axes,
        keys=keys,
        steps=[],
        output=product.node,
        output_axes=product.axes,
        after=after,
    )


def check_closed(attentions: list[Attention], softmax: fx.Node) -> None:
    """The chain from product to outputs must die with the rewrite, else it would be computed twice.

    What the replacement itself reads lives on: a bias computed from the scores keeps them.

    Raises:
        Miss: something else reads the scores or the weights.
    """
    operands = {node for found in attentions for node, _ in found.operands()}
    dying = {found.output for found in attentions}
    waiting = [node for output in dying for node in output.all_input_nodes]
    while waiting:
        node = waiting.pop()
        is_kept = node.op != "call_function" or node in dying or node in operands
        if is_kept or not all(user in dying for user in node.users):
            continue
        dying.add(node)
        waiting.extend(node.all_input_nodes)
    for read in (attentions[0].product, softmax):
        if read not in dying:
            raise Miss("the scores are used elsewhere too", node=read, expected="one use: the softmax")


def from_sdpa(node: fx.Node) -> list[Attention]:
    """A call to SDPA, its axes named as if it were spelled out; nothing where there is nothing to improve."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value, mask = (given.get(name) for name in names[:4])
    rank = query.meta["val"].dim()
    if given.get("enable_gqa") or any(operand.meta["val"].dim() != rank for operand in (key, value)):
        return []
    output_axes = axes.fresh(node)
    query_axes = (*output_axes[:-1], axes.fresh(query)[-1])  # type: ignore[arg-type]
    keys = axes.fresh(key)[-2]  # type: ignore[arg-type]
    key_axes = axes.broadcast_axes(key, (*output_axes[:-2], keys, query_axes[-1]))  # type: ignore[arg-type]
    value_axes = axes.broadcast_axes(value, (*output_axes[:-2], keys, output_axes[-1]))  # type: ignore[arg-type]
    score_axes = (*output_axes[:-1], keys)
    steps: list[Step] = []
    if isinstance(mask, fx.Node):
        mask_axes = axes.broadcast_axes(mask, score_axes)
        is_boolean = mask.meta["val"].dtype is torch.bool
        steps.append(Fill(mask, mask_axes, -math.inf, True) if is_boolean else Add(mask, mask_axes, 1))
    scale = given.get("scale")
    head_size = query.meta["val"].shape[-1]
    if scale is None and not isinstance(head_size, int):
        return []
    key, key_axes = axes.peel(key, key_axes)  # type: ignore[arg-type]
    value, value_axes = axes.peel(value, value_axes)  # type: ignore[arg-type]
    found = Attention(
        query=query,  # type: ignore[arg-type]
        query_axes=query_axes,
        key=key,
        key_axes=key_axes,
        value=value,
        value_axes=value_axes,
        head_dim=query_axes[-1],
        score_axes=score_axes,
        keys=keys,
        steps=steps,
        output=node,
        output_axes=output_axes,
        scale=scale if scale is not None else 1 / math.sqrt(head_size),  # type: ignore[arg-type]
        dropout=float(given.get("dropout_p") or 0),  # type: ignore[arg-type]
        causal=bool(given.get("is_causal")),
    )
    return [found]


# --- roles ----------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """Which axes play which role: the query is (batch, heads, seq, head_dim), the key (batch, key_heads, keys, ...)."""

    batch: tuple[axes.Atom, ...]
    key_heads: tuple[axes.Atom, ...]
    groups: tuple[axes.Atom, ...]
    seq: tuple[axes.Atom, ...]
    keys: tuple[axes.Atom, ...]
    head_dim: tuple[axes.Atom, ...]
    value_dim: tuple[axes.Atom, ...]

    @property
    def heads(self) -> tuple[axes.Atom, ...]:
        return self.key_heads + self.groups

    def named(self, names: str) -> axes.Axes:
        """The axes of a tensor by their names: `layout.named("batch heads seq 1")`, where "1" is a dim of size one."""
        return tuple(() if name == "1" else getattr(self, name) for name in names.split())


def layouts_of(attentions: list[Attention]) -> list[Layout]:
    """The axes of each; all but the value's must be the same.

    Raises:
        Miss: they are not, or an operand has an axis that attention has no place for.
    """
    layouts = [layout_of(found) for found in attentions]
    for layout, found in zip(layouts, attentions, strict=True):
        if dataclasses.replace(layout, value_dim=()) != dataclasses.replace(layouts[0], value_dim=()):
            raise Miss("the attention weights meet values of different axes", node=found.value)
    return layouts


def layout_of(found: Attention) -> Layout:
    """Which axis is batch, head, sequence: by which operands hold it.

    Axes of key or value (or of neither operand) are batch; axes of the query alone are its sequence, and, between a
    batch axis and the sequence, the groups of heads that share a key head.
    """
    query, key, value = (set(axes.atoms_of(labels)) for labels in (found.query_axes, found.key_axes, found.value_axes))
    keys, head_dim = axes.leaves(found.keys), axes.leaves(found.head_dim)
    scores = [atom for atom in axes.atoms_of(found.score_axes) if atom not in keys]
    value_dim = tuple(atom for atom in axes.atoms_of(found.value_axes) if atom not in {*keys, *scores})
    if not set(keys) <= value or set(head_dim) & {*scores, *value_dim}:
        raise Miss("the value does not hold the softmax axis", node=found.value)
    unshared = [atom for atom in scores if atom in key and atom not in value]
    if unshared:
        raise Miss("the key varies along an axis that the value does not", node=found.key)
    if extra := query - {*scores, *head_dim}:
        raise Miss(f"the query has axes {extra} that are not in the scores", node=found.query)
    shared = [atom for atom in scores if atom in key or atom in value or atom not in query]
    own = [atom for atom in scores if atom not in shared]
    groups = _groups(scores, own)
    seq = tuple(atom for atom in own if atom not in groups)
    head = _head_axes(scores, shared, groups)
    batch = tuple(atom for atom in shared if atom not in head)
    return Layout(batch, head, groups, seq, keys, head_dim, value_dim)


def _groups(scores: list[axes.Atom], own: list[axes.Atom]) -> tuple[axes.Atom, ...]:
    """Query heads that share a key head: the query's own axes of known size that stand before its sequence."""
    groups = []
    for atom in own[:-1]:
        if atom.size.is_Integer and scores.index(atom) < scores.index(own[-1]):
            groups.append(atom)
    return tuple(groups)


def _head_axes(
    scores: list[axes.Atom], shared: list[axes.Atom], groups: tuple[axes.Atom, ...]
) -> tuple[axes.Atom, ...]:
    """The last shared axis: the heads; with groups, a neighbour of theirs of known size: inside or outside of it."""
    if groups:
        places = (scores.index(groups[0]) - 1, scores.index(groups[-1]) + 1)
        beside = [scores[place] for place in places if 0 <= place < len(scores)]
        heads = [atom for atom in beside if atom in shared and atom.size.is_Integer]
        return (heads[-1],) if heads and len(shared) > 1 else ()
    return (shared[-1],) if len(shared) > 1 else ()


def proven_mask(found: Attention, layout: Layout, masking: list[Step]) -> Unmasked | None:
    """Whether the steps in `masking` let a query see every key, or every earlier one; None where it is not proven."""
    return None if found.sink else proves_unmasked(masking, layout.seq, layout.keys, found.dtype)
