"""What a graph without gradients computes once instead of repeatedly: look-ups of constants, masks, split heads.

Each function changes a lowered graph in place without changing its values.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ..analysis.axes import PERMUTES, RESHAPES, permutation, sizes_of
from ..graph.node import argument, only_user

aten = torch.ops.aten

# Ops that read rows of their first argument, and the index of the argument that says which.
LOOK_UPS = {aten.embedding.default: 1, aten.gather.default: 2}


def look_up_once(graph: fx.Graph, constant: set[fx.Node]) -> None:
    """Rows of a weight at a slice of a constant index (positions, token types) -> a slice of the rows at the whole
    index.

    An expansion also moves after the look-up. Nodes that then depend only on weights join `constant`.
    """
    waiting = [node for node in graph.nodes if node.target in LOOK_UPS and node.args[0] in constant]
    while waiting:
        node = waiting.pop(0)
        place = LOOK_UPS[node.target]
        cut: Any = node.args[place]
        if not _can_be_cut_later(node, cut, constant):
            continue
        index, *layout = cut.args
        if cut.target is aten.expand.default:
            layout = [[*layout[0], -1]]
        target: Any = node.target
        with graph.inserting_before(node):
            whole = graph.call_function(target, (*node.args[:place], index, *node.args[place + 1 :]))
            again = graph.call_function(cut.target, (whole, *layout))
        whole.meta["val"] = target(*fx.node.map_arg(whole.args, lambda source: source.meta["val"]))
        again.meta = dict(node.meta)
        constant.update([whole] if index in constant else [])
        waiting.insert(0, whole)
        node.replace_all_uses_with(again)
        graph.erase_node(node)


def _can_be_cut_later(look_up: fx.Node, cut: Any, constant: set[fx.Node]) -> bool:
    """Whether the index is an expansion, or a slice of a constant along a dim that the result also has."""
    if not isinstance(cut, fx.Node) or cut.kwargs or look_up.kwargs or cut in constant:
        return False
    if cut.target is aten.expand.default:
        return look_up.target is aten.embedding.default
    if cut.target is not aten.slice.Tensor or cut.args[0] not in constant:
        return False
    dim = argument(cut, "dim")
    return dim >= 0 and (look_up.target is aten.embedding.default or dim == argument(look_up, "dim"))


def make_masks_once(graph: fx.Graph) -> None:
    """A boolean mask of several attentions -> the additive mask that SDPA would make from it in each of them."""
    attentions: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            mask = argument(node, "attn_mask")
            if isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool:
                attentions.setdefault(mask, []).append(node)
    for mask, users in attentions.items():
        dtypes = {user.meta["val"].dtype for user in users}
        if len(users) < 2 or len(dtypes) > 1:
            continue
        with graph.inserting_after(mask):
            bias = graph.call_function(additive, (mask, dtypes.pop()))
        for user in users:
            user.replace_input_with(mask, bias)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as an additive one."""
    columns = mask.shape[-1]
    # On CUDA, SDPA's memory-efficient kernel needs rows at multiples of 8 elements, and would copy others each time.
    room = -(-columns // 8) * 8 if mask.is_cuda else columns
    bias = torch.zeros((*mask.shape[:-1], room), dtype=dtype, device=mask.device).narrow(-1, 0, columns)
    return bias.masked_fill_(mask.logical_not(), -math.inf)


def split_heads_once(graph: fx.Graph) -> None:
    """split(x, sizes, -1), each part viewed as (b, s, heads, d) and transposed -> one view, transpose and split."""
    for split in [node for node in graph.nodes if node.target is aten.split_with_sizes.default]:
        parts = _parts_of_heads(split)
        if not parts:
            continue
        width = int(parts[0][1].meta["val"].shape[-1])
        sizes: Any = split.args[1]
        heads = [size // width for size in sizes]
        with graph.inserting_before(min(view for _, view, _ in parts)):
            whole = graph.call_function(aten.unflatten.int, (split.args[0], 2, [sum(heads), width]))
            turned = graph.call_function(aten.transpose.int, (whole, 1, 2))
            again = graph.call_function(aten.split_with_sizes.default, (turned, heads, 1))
            items = [graph.call_function(operator.getitem, (again, part[0].args[1])) for part in parts]
        for item, (old_item, view, transposed) in zip(items, parts, strict=True):
            item.meta = dict(transposed.meta)
            transposed.replace_all_uses_with(item)
            for old in (transposed, view, old_item):
                graph.erase_node(old)
        graph.erase_node(split)


def _parts_of_heads(split: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """(part, its view, its transpose) for all parts of a split of the last axis; [] if one is used otherwise."""
    source: Any = split.args[0]
    if source.meta["val"].dim() != 3 or argument(split, "dim") not in (-1, 2):
        return []
    parts, widths = [], set()
    for item in split.users:
        view = only_user(item, RESHAPES) if item.target is operator.getitem else None
        transposed = only_user(view, PERMUTES) if view is not None else None
        if view is None or transposed is None or view.meta["val"].dim() != 4 or permutation(transposed) != [0, 2, 1, 3]:
            return []
        if sizes_of(view)[:2] != sizes_of(source)[:2]:
            return []
        parts.append((item, view, transposed))
        widths.add(sizes_of(view)[3])
    sizes: Any = split.args[1]
    width = widths.pop() if len(widths) == 1 else None
    is_even = width is not None and width.is_Integer and all(type(size) is int and size % width == 0 for size in sizes)
    return parts if is_even else []
