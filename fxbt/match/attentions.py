"""Attention as found in a graph: its operands, their axes, and the steps on scores and weights.

A rule's pattern finds it (`attentions_of`); an SDPA call is read as if it were spelled out (`from_sdpa`). Set algebra
over `fxbt.axes` then gives each axis its role.

Example::

    (found,) = attentions_of(m)  # in the check of a rule whose pattern is an attention
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

from ..analysis import axes
from ..analysis.scores import (
    Add,
    Fill,
    Floor,
    Scale,
    ScaleBy,
    Step,
    Unmasked,
    has_finite_fill,
    is_mask,
    may_mask,
    proves_unmasked,
    same_mask,
    scores_dtype,
)
from ..analysis.weights import SAFE_SOFTMAX, SOFTMAX, Dropout, ZeroNan
from ..graph.miss import Miss
from .found import Found, Reading

__all__ = [
    "SAFE_SOFTMAX",
    "SOFTMAX",
    "Attention",
    "Layout",
    "attentions_of",
    "from_sdpa",
    "layout_of",
    "layouts_of",
    "proven_mask",
]


@dataclass
class Attention:
    """An attention as found: operands, their axes, and the steps on the scores (innermost first)."""

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
    scale: float = 1.0  # in addition to the steps that scale
    dropout: float = 0.0
    zeroed: bool = False  # weights are zeroed where a fill masked the scores
    zeroes_nan: bool = False  # NaN weights become 0 in rows that -inf masks entirely
    after: list[ScaleBy | Scale] = field(default_factory=list)
    causal: bool = False
    sink: Add | None = None  # one more score per query, of a key without a value
    dtype: torch.dtype = torch.float32  # of the scores in the softmax

    def operands(self, dropped: Sequence[Step] = ()) -> list[tuple[fx.Node, axes.Axes]]:
        """The tensors it is computed from, with their axes, except those of the `dropped` steps."""
        three = [(self.query, self.query_axes), (self.key, self.key_axes), (self.value, self.value_axes)]
        steps = [step for step in self.steps if step not in dropped]
        tensors = [step for step in (*steps, *self.after, self.sink) if isinstance(step, ScaleBy | Add | Fill)]
        return three + [(step.node, step.axes) for step in tensors if isinstance(step.node, fx.Node)]


def attentions_of(m: Found) -> list[Attention]:
    """The attention of a match; several if the same weights multiply several values.

    The pattern binds query, key, value, `scores` and `weights` (steps) and possibly a sink, over the axes d and k.

    Raises:
        Miss: weights are zeroed where the scores were not masked.
    """
    return [_attention_of(reading) for reading in m.readings]


def _attention_of(reading: Reading) -> Attention:
    values, labels = reading.values, reading.labels
    steps, passed = list(values["scores"]), values["weights"]
    assert reading.softmax is not None, "the pattern has a softmax"
    dtype = scores_dtype(reading.softmax)
    zeroed = next((step for step in passed if isinstance(step, Fill)), None)
    sink = values.get("sink")
    return Attention(
        query=values["query"],
        query_axes=labels["query"],
        key=values["key"],
        key_axes=labels["key"],
        value=values["value"],
        value_axes=labels["value"],
        head_dim=reading.along["d"],
        score_axes=labels["scores"],
        keys=reading.along["k"],
        steps=_masked_by_zeroing(steps, zeroed, dtype) if zeroed else steps,
        output=reading.output,
        output_axes=reading.output_labels,
        scale=reading.factor,
        dropout=next((step.p for step in passed if isinstance(step, Dropout) and step.p), 0.0),
        zeroed=zeroed is not None,
        zeroes_nan=any(isinstance(step, ZeroNan) for step in passed),
        after=[step for step in passed if isinstance(step, Scale | ScaleBy)],
        sink=None if sink is None else Add(sink, labels["sink"], 1),
        dtype=dtype,
    )


def _masked_by_zeroing(steps: list[Step], zeroed: Fill, dtype: torch.dtype) -> list[Step]:
    """Weights zeroed where the scores were filled last: a fully masked row gives 0, as with SDPA's -inf."""
    fills = [step for step in steps if isinstance(step, Fill | Floor)]
    last = fills[-1] if fills else None
    if not isinstance(last, Fill) or not same_mask(last, zeroed):
        raise Miss("attention weights are zeroed where the scores were not masked", node=zeroed.node)
    if not is_mask(last, steps, dtype):
        raise Miss(
            f"attention weights are zeroed where the scores became {last.fill:g}, which does not mask every "
            "possible score"
        )
    masked = [dataclasses.replace(last, fill=-math.inf) if step is last else step for step in steps]
    if has_finite_fill(masked) or any(isinstance(step, Add) and may_mask(step) for step in masked):
        raise Miss("attention weights are zeroed by one of several masks", node=zeroed.node)
    return masked


def from_sdpa(node: fx.Node) -> list[Attention]:
    """An SDPA call, its axes named as if it were spelled out; an empty list if nothing can be improved."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (given[name] for name in names[:3])
    mask = given.get("attn_mask")
    rank = query.meta["val"].dim()
    if given.get("enable_gqa") or any(operand.meta["val"].dim() != rank for operand in (key, value)):
        return []
    output_axes = axes.fresh(node)
    query_axes = (*output_axes[:-1], axes.fresh(query)[-1])
    keys = axes.fresh(key)[-2]
    key_axes = axes.broadcast_axes(key, (*output_axes[:-2], keys, query_axes[-1]))
    value_axes = axes.broadcast_axes(value, (*output_axes[:-2], keys, output_axes[-1]))
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
    key, key_axes = axes.peel(key, key_axes)
    value, value_axes = axes.peel(value, value_axes)
    found = Attention(
        query=query,
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
        scale=scale if scale is not None else 1 / math.sqrt(head_size),
        dropout=float(given.get("dropout_p") or 0),
        causal=bool(given.get("is_causal")),
    )
    return [found]


# --- roles ----------------------------------------------------------------------------------------------------------


@dataclass
class Layout:
    """The role of each axis: the query is (batch, heads, seq, head_dim), the key (batch, key_heads, keys, head_dim)."""

    batch: tuple[axes.Atom, ...]
    key_heads: tuple[axes.Atom, ...]
    groups: tuple[axes.Atom, ...]
    seq: tuple[axes.Atom, ...]
    keys: tuple[axes.Atom, ...]
    head_dim: tuple[axes.Atom, ...]
    value_dim: tuple[axes.Atom, ...]

    @property
    def heads(self) -> tuple[axes.Atom, ...]:
        """The axes of the query's heads: those of the keys, then the groups."""
        return self.key_heads + self.groups

    def named(self, names: str) -> axes.Axes:
        """The axes of a tensor by role: `layout.named("batch heads seq 1")`, where "1" is a dim of size one."""
        return tuple(() if name == "1" else getattr(self, name) for name in names.split())


def layouts_of(attentions: list[Attention]) -> list[Layout]:
    """The layout of each attention; all axes but the value's must agree.

    Raises:
        Miss: they differ, or an operand has an axis that attention has no place for.
    """
    layouts = [layout_of(found) for found in attentions]
    for layout, found in zip(layouts, attentions, strict=True):
        if dataclasses.replace(layout, value_dim=()) != dataclasses.replace(layouts[0], value_dim=()):
            raise Miss("the same attention weights multiply values with different axes", node=found.value)
    return layouts


def layout_of(found: Attention) -> Layout:
    """Decides which axis is batch, head or sequence by the operands that have it.

    Axes of key or value (or of neither operand) are batch. Axes of the query alone are its sequence; those between a
    batch axis and the sequence are the groups of heads that share a key head.
    """
    query, key, value = (set(axes.atoms_of(labels)) for labels in (found.query_axes, found.key_axes, found.value_axes))
    keys, head_dim = axes.leaves(found.keys), axes.leaves(found.head_dim)
    scores = [atom for atom in axes.atoms_of(found.score_axes) if atom not in keys]
    value_dim = tuple(atom for atom in axes.atoms_of(found.value_axes) if atom not in {*keys, *scores})
    if not set(keys) <= value or set(head_dim) & {*scores, *value_dim}:
        raise Miss("the value does not have the softmax axis", node=found.value)
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
    """Query heads that share a key head: the query's own axes of known size before its sequence."""
    groups = []
    for atom in own[:-1]:
        if atom.size.is_Integer and scores.index(atom) < scores.index(own[-1]):
            groups.append(atom)
    return tuple(groups)


def _head_axes(
    scores: list[axes.Atom], shared: list[axes.Atom], groups: tuple[axes.Atom, ...]
) -> tuple[axes.Atom, ...]:
    """The heads: the last shared axis or, with groups, a shared axis of known size next to the groups."""
    if groups:
        places = (scores.index(groups[0]) - 1, scores.index(groups[-1]) + 1)
        beside = [scores[place] for place in places if 0 <= place < len(scores)]
        heads = [atom for atom in beside if atom in shared and atom.size.is_Integer]
        return (heads[-1],) if heads and len(shared) > 1 else ()
    return (shared[-1],) if len(shared) > 1 else ()


def proven_mask(found: Attention, layout: Layout, masking: list[Step]) -> Unmasked | None:
    """A proof that the steps in `masking` hide no key, or only later keys; None without a proof."""
    return None if found.sink else proves_unmasked(masking, layout.seq, layout.keys, found.dtype)
