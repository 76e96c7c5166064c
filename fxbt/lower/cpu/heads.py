"""Finds by axes which columns of a projection an attention reads, and where its heads are merged again.

It does not matter how the views, transposes and picks in between are written, only where they put each axis.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...analysis import axes
from ...graph.miss import Miss
from ...graph.node import argument, only_user

aten = torch.ops.aten

LAYOUT = axes.IDENTITIES | axes.PERMUTES | axes.RESHAPES | axes.UNIT_DIMS
PICKS = {aten.split_with_sizes.default, aten.unbind.int, aten.select.int}


class Heads(NamedTuple):
    """The heads in the last axis of a projection: those of queries, keys and values, and where each of these starts."""

    counts: tuple[int, int, int]
    starts: tuple[int, int, int]
    head_dim: int

    def of(self, projection: Tensor) -> list[Tensor]:
        """Queries, keys and values as (batch, heads, seq, head_dim)."""
        heads = projection.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return [heads.narrow(1, start, count) for start, count in zip(self.starts, self.counts, strict=True)]


class Pick(NamedTuple):
    """The `part` of the axis `whole`, starting at `first`, that an op picks."""

    whole: axes.Atom
    part: tuple[axes.Atom, ...]
    first: int


def projected(attention: fx.Node) -> tuple[fx.Node, Heads, fx.Node] | None:
    """The projection (batch, seq, columns) whose columns are an attention's operands, which ones, and its merged view.

    The merged view is (batch, seq, heads * head_dim) of the result; nothing else may be read of that.
    """
    operands: list[Any] = list(attention.args[:3])
    counts, (head_dim, *others) = zip(*(operand.meta["val"].shape[1::2] for operand in operands), strict=True)
    are_known = all(type(size) is int and size for size in (*counts, head_dim, *others))
    merged = _merged(attention) if are_known and set(others) == {head_dim} else None
    found = [columns for operand in operands if merged is not None and (columns := _columns(operand))]
    sources, starts = zip(*found, strict=True) if len(found) == 3 else ((), ())
    if merged is None or len(set(sources)) != 1 or any(start % head_dim for start in starts):
        return None
    query, key, value = (start // head_dim for start in starts)
    return sources[0], Heads(counts, (query, key, value), head_dim), merged


def _columns(operand: fx.Node) -> tuple[fx.Node, int] | None:
    """The earliest value of which an operand (batch, heads, seq, head_dim) is columns, and the first of these."""
    batch, heads, seq, features = labels = axes.fresh(operand)
    node, pick, found = operand, None, None
    while True:
        start = _first_column(labels, (batch, seq, heads + features), pick)
        found = found if start is None else (node, start)
        try:
            step = axes.step_back(node, labels)
        except Miss:  # a view across the axes
            return found
        if step is not None:
            node, labels = step
            continue
        before = _before_pick(node, labels) if pick is None else None
        if before is None:
            return found
        node, labels, pick = before


def _first_column(labels: axes.Axes, wanted: axes.Axes, pick: Pick | None) -> int | None:
    """Where the columns `wanted` begin in a value (batch, seq, columns); None if they are not there, or lie apart."""
    *outer, columns = axes.resolve(labels)
    *wanted_outer, wanted_columns = axes.resolve(wanted)
    start = 0
    if pick is not None and columns[:1] == (pick.whole,):
        start = pick.first * math.prod(atom.size for atom in columns[1:])
        columns = (*axes.leaves(pick.part), *columns[1:])
    return int(start) if (outer, columns) == (wanted_outer, wanted_columns) else None


def _before_pick(node: fx.Node, labels: axes.Axes) -> tuple[fx.Node, axes.Axes, Pick] | None:
    """Goes back through an item of a split, or one index of an axis, to what it was picked from."""
    call: Any = node.args[0] if node.target is operator.getitem else node
    if not isinstance(call, fx.Node) or call.target not in PICKS:
        return None
    source: Any = call.args[0]
    dim = argument(call, "dim") % source.meta["val"].dim()
    size = axes.sizes_of(source)[dim]
    place: Any = argument(node, "index") if node is call else node.args[1]
    keeps_dim = call.target is aten.split_with_sizes.default
    sizes: Any = argument(call, "split_sizes") if keeps_dim else [1] * int(size) if size.is_Integer else []
    if size == 1 or type(place) is not int or not 0 <= place < len(sizes) or {*map(type, sizes)} != {int}:
        return None
    pick = Pick(axes.Atom(size), labels[dim] if keeps_dim else (), sum(sizes[:place]))
    return source, (*labels[:dim], (pick.whole,), *labels[dim + keeps_dim :]), pick


def _merged(attention: fx.Node) -> fx.Node | None:
    """The view of an attention's result in which the heads are side by side, if nothing else is read of the result."""
    batch, heads, seq, features = labels = axes.fresh(attention)
    node = attention
    while axes.resolve(labels) != axes.resolve((batch, seq, heads + features)):
        user = only_user(node, LAYOUT)
        try:
            moved = None if user is None else axes.step_forward(node, labels, user)
        except Miss:  # a view across the axes
            return None
        if user is None or moved is None:
            return None
        node, labels = user, moved
    return node
