"""Inlines `with torch.no_grad():` and `with torch.autocast(enabled=False):` blocks of a forward.

Export keeps such a block as one opaque call of a submodule. Rules see what it computes (rotary tables, masks, whole
attentions) only if it is in the graph itself.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(module: fx.GraphModule, may_write: bool = False) -> None:
    """Inlines the body of each block that changes nothing but gradients.

    Blocks without gradients detach their results or, where they may write in place, their inputs: the writes then go to
    the same memory, also without gradients. Kept as calls are blocks with gradients inside code without, and autocast
    that is on, or that switches off the caller's own.
    """
    waiting = list(module.graph.nodes)
    for node in waiting:
        body = _body(module, node)
        if body is not None:
            waiting.extend(_inline(module, node, body, may_write))


def _body(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The get_attr node of a block's submodule if the block can be inlined; else None."""
    if node.target is NO_GRAD:
        enabled, body = node.args[:2]
        return None if enabled else body  # type: ignore[return-value]
    if node.target is AUTOCAST:
        device_type, _, enabled, _, body = node.args[:5]
        return None if enabled or torch.is_autocast_enabled(device_type) else body  # type: ignore[return-value, arg-type]
    return None


def _inline(module: fx.GraphModule, call: fx.Node, body: fx.Node, may_write: bool) -> list[fx.Node]:
    """Inlines a block; returns the nodes that replace `call`."""
    region: Any = getattr(module, str(body.target))
    given: Any = call.args[2 if call.target is NO_GRAD else 5 :]
    copies: dict[fx.Node, Any] = {}
    graph = module.graph
    with graph.inserting_before(call):
        if call.target is NO_GRAD and may_write:
            given = [_detached(graph, value) if isinstance(value, fx.Node) else value for value in given]
        given = iter(given)
        for node in region.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copies[node].target = name = f"{body.target}_{node.target}".replace(".", "_")
                setattr(module, name, operator.attrgetter(str(node.target))(region))
        results = [copies[node] for node in region.graph.output_node().args[0]]
        if call.target is NO_GRAD and not may_write:
            results = [_detached(graph, result) for result in results]
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(call)
    if not body.users:
        graph.erase_node(body)
    return [copy for copy in copies.values() if isinstance(copy, fx.Node)]


def _detached(graph: fx.Graph, result: fx.Node) -> fx.Node:
    if not isinstance(result.meta.get("val"), torch.Tensor):
        return result
    detached = graph.call_function(aten.detach.default, (result,))
    detached.meta = {**result.meta, "val": result.meta["val"].detach()}
    return detached
