"""The memory layout of outputs: a rewritten graph returns its values laid out as the model does.

Callers see strides: `output.view(...)` works only on a contiguous tensor. A rule's replacement computes the same values
in another layout (SDPA's kernels write heads inside positions, a merged projection returns slices). Only the values
that are returned are put back in order, at the very end.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..graph.blocks import FUSED
from ..graph.node import argument
from ..graph.opsets import CASTS
from ..graph.record import RULE, is_made

aten = torch.ops.aten

Order = tuple[int, ...]  # the dims of a dense tensor, from outermost to innermost in memory

# The results of these ops are contiguous, whatever the layout of their operands.
CONTIGUOUS = {aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default}
CONTIGUOUS |= {aten.layer_norm.default, aten.embedding.default, aten.softmax.int, aten.contiguous.default}
# The results of these ops have the layout of their operands, although torch does not tag them as pointwise.
FOLLOWS = {aten.dropout.default, aten.rms_norm.default, aten.where.ScalarOther, aten.where.ScalarSelf}
FOLLOWS |= {aten.masked_fill.Tensor} | CASTS
ORDER = "fxbt_order"  # node.meta entry: the dim order of the value that this one replaced


def returned_orders(graph: fx.Graph) -> list[Order | None]:
    """The memory order of each returned value; None if it is not a tensor, or not dense."""
    return [order_of(value) for value in _returned(graph)]


def keep_orders(module: fx.GraphModule, orders: list[Order | None]) -> None:
    """Restores the order of returned values that a rewrite may have changed."""
    graph = module.graph
    known: dict[fx.Node, bool] = {}
    ordered: dict[tuple[fx.Node, Order | None], fx.Node] = {}
    returned: list[Any] = list(_returned(graph))
    with graph.inserting_before(graph.output_node()):
        for place, (node, order) in enumerate(zip(returned, orders, strict=True)):
            if not _is_relaid(node, known):
                continue
            if (node, order) not in ordered:
                ordered[node, order] = _in_order(graph, node, order) if order else _viewed_again(graph, node)
            returned[place] = ordered[node, order]
    before = _returned(graph)
    graph.output_node().args = (tuple(returned),)
    for node in before:
        _erase_dead_views(graph, node)


def _erase_dead_views(graph: fx.Graph, node: Any) -> None:
    while isinstance(node, fx.Node) and _is_view(node) and not node.users:
        dead, node = node, node.all_input_nodes[0]
        graph.erase_node(dead)


def order_of(node: Any) -> Order | None:
    """The dims of a node's value, from outermost to innermost in memory; None if it is not a dense tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or not value.dim():
        return None
    sizes: list[Any] = [_hint(size) for size in value.shape]
    strides: list[Any] = [_hint(stride) for stride in value.stride()]
    if None in (*sizes, *strides) or 0 in sizes:
        return None
    straight = tuple(range(value.dim()))
    by_stride = tuple(sorted(straight, key=lambda dim: -strides[dim]))
    return next((order for order in (straight, by_stride) if _is_dense(order, sizes, strides)), None)


def _is_dense(order: Order, sizes: list[Any], strides: list[Any]) -> bool:
    """Whether the dims follow each other in memory without gaps; the stride of a dim of size one is ignored."""
    expected = 1
    for dim in reversed(order):
        if sizes[dim] != 1 and strides[dim] != expected:
            return False
        expected *= sizes[dim]
    return True


def _hint(size: Any) -> int | None:
    """A size in the captured call; None if it depends on values."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else None


def _returned(graph: fx.Graph) -> tuple[Any, ...]:
    (returned,) = graph.output_node().args
    return returned  # type: ignore[return-value]


def _is_relaid(node: Any, known: dict[fx.Node, bool]) -> bool:
    """Whether a rewrite may have changed a value's layout, by making it or a value whose layout it follows."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node not in known:
        known[node] = any(_is_relaid(source, known) for source in _laid_out_like(node)) or _is_made(node)
    return known[node]


def _is_made(node: fx.Node) -> bool:
    is_known = node.target in CONTIGUOUS or _is_pointwise(node) or node.target in FUSED.values()
    return is_made(node) and not is_known


def _laid_out_like(node: fx.Node) -> list[fx.Node]:
    """The operands whose layout may determine the result's."""
    if node.target in CONTIGUOUS:
        return []
    if node.target in FUSED.values():  # a body ends in a layer norm, a linear, or a sum with its first inputs
        return [source for source in node.args[1:3] if isinstance(source, fx.Node)]
    if node.target is aten.clone.default and argument(node, "memory_format") is torch.contiguous_format:
        return []
    return node.all_input_nodes[:1] if _is_view(node) else node.all_input_nodes


def _is_pointwise(node: fx.Node) -> bool:
    return node.target in FOLLOWS or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)


def _viewed_again(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """For a view with gaps of a replaced value: the same view of that value in its original order."""
    views = []
    base = node
    while _is_view(base) and ORDER not in base.meta:
        views.append(base)
        base = base.all_input_nodes[0]
    order = base.meta.get(ORDER)
    if order is None:
        return node
    source = _in_order(graph, base, order)
    for view in reversed(views):
        source = _on(graph, view, source)
    return source


def _on(graph: fx.Graph, view: fx.Node, source: fx.Node) -> fx.Node:
    """The same view of another value."""
    viewed = view.all_input_nodes[0]
    return graph.node_copy(view, lambda node: source if node is viewed else node)


def _in_order(graph: fx.Graph, node: fx.Node, order: Order) -> fx.Node:
    if order == tuple(range(len(order))):
        return _call(graph, node, aten.contiguous.default)
    inverse = [order.index(dim) for dim in range(len(order))]
    permuted = _call(graph, node, aten.permute.default, list(order))
    return _call(graph, _call(graph, permuted, aten.contiguous.default), aten.permute.default, inverse)


def _call(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> fx.Node:
    called = graph.call_function(target, (node, *args))
    kept: dict[str, Any] = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace", RULE) if k in node.meta}
    called.meta = {**kept, "val": target(node.meta["val"], *args)}
    return called
