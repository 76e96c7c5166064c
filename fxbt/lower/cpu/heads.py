"""Attention from a projection to a projection: our own kernel reads heads as they stand side by side, without views."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...analysis.axes import PERMUTES, RESHAPES, permutation, sizes_of
from ...graph.node import only_user
from ...kernels import native, packed
from .attention import Attend, Mask, PackedAtOnce, is_for_sdpa

aten = torch.ops.aten


class Heads(NamedTuple):
    """The heads in the last axis of a projection: those of queries, keys and values, and where each of these starts."""

    counts: tuple[int, int, int]
    starts: tuple[int, int, int]
    head_dim: int

    def of(self, projection: Tensor) -> list[Tensor]:
        """Queries, keys and values as (batch, heads, seq, head_dim)."""
        heads = projection.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return [heads.narrow(1, start, count) for start, count in zip(self.starts, self.counts, strict=True)]


def attend_projections(graph: fx.Graph) -> None:
    """An attention by our own kernel, on heads split as `split_heads_once` does and merged after it -> one call."""
    library = native.library()
    if library is None:
        return
    for node in list(graph.nodes):
        attend = node.target
        is_native = isinstance(attend, PackedAtOnce) or isinstance(attend, Attend) and attend.is_by(library.attention)
        if not is_native:
            continue
        merged, found = _merged(node), _projection_of(node)
        if merged is None or found is None:
            continue
        projection, heads = found
        kind: Any = PackedProjection if isinstance(attend, PackedAtOnce) else Projection
        with graph.inserting_before(merged):
            result = graph.call_function(kind(heads, library, attend), (projection, *node.args[3:]), node.kwargs)
        result.meta = dict(merged.meta)
        merged.replace_all_uses_with(result)
    graph.eliminate_dead_code()


def _projection_of(attention: fx.Node) -> tuple[fx.Node, Heads] | None:
    """The projection that queries, keys and values of an attention are parts of."""
    items: list[Any] = list(attention.args[:3])
    splits = {item.args[0] if item.target is operator.getitem else item for item in items}
    split: Any = splits.pop()
    if splits or split.target is not aten.split_with_sizes.default or split.args[2:] != (1,):
        return None
    turned = split.args[0]
    if turned.target is not aten.transpose.int or turned.args[1:] != (1, 2):
        return None
    whole = turned.args[0]
    if whole.target is not aten.unflatten.int or whole.args[1] != 2 or whole.args[0].meta["val"].dim() != 3:
        return None
    sizes, places = split.args[1], [item.args[1] for item in items]
    query, key, value = (sizes[place] for place in places)
    starts = tuple(sum(sizes[:place]) for place in places)
    return whole.args[0], Heads((query, key, value), starts, int(items[0].meta["val"].shape[3]))


def _merged(attention: fx.Node) -> fx.Node | None:
    """The view of an attention's result in which the heads stand side by side, if nothing else is read of it."""
    turned = only_user(attention, PERMUTES)
    if turned is None or permutation(turned) != [0, 2, 1, 3]:
        return None
    merged = only_user(turned, RESHAPES)
    is_merged = merged is not None and merged.meta["val"].dim() == 3 and sizes_of(merged)[:2] == sizes_of(turned)[:2]
    return merged if is_merged else None


class Projection:
    """`Attend` of the heads of a projection, where it is by our own kernel at all lengths."""

    def __init__(self, heads: Heads, library: native.Library, attend: Attend):
        self.heads, self._attend = heads, attend
        self._run = library.attention_of(*heads)
        self.__name__ = "attend_projection"  # fx names nodes by it

    def __call__(
        self,
        projection: Tensor,
        attn_mask: Mask | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if is_for_sdpa(attn_mask, dropout_p, projection):
            query, key, value = self.heads.of(projection)
            attended = self._attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
            return attended.transpose(1, 2).flatten(2)
        return self._run(projection, attn_mask.bias if attn_mask else None, is_causal, scale)


class PackedProjection:
    """`PackedAtOnce` of the heads of a projection."""

    def __init__(self, heads: Heads, library: native.Library, attend: PackedAtOnce):
        self.heads = heads
        self._run = library.attention_of(*heads)
        self.__name__ = "packed_projection"

    def __call__(
        self,
        projection: Tensor,
        tokens: packed.Tokens,
        bias: None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return self._run(projection, None, is_causal, scale, tokens.bounds, tokens.longest)
