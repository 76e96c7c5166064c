"""A cache's new rows: `cat` behind an input, returned to the caller, becomes an append in memory with room."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..kernels.growing import append

aten = torch.ops.aten


def append_in_place(graph: fx.Graph) -> None:
    """`cat([input, new], dim)` that the graph returns -> `append(input, new, dim)`.

    The result is then a part of a longer buffer: dense in all axes except the growing one.

    Example:
        >>> append_in_place(graph)
        >>> [node for node in graph.nodes if node.target is append]
    """
    for result in graph.output_node().all_input_nodes:
        node = in_any_layout(result)
        arguments: Any = node.args
        if node.target is not aten.cat.default or node.kwargs or len(arguments[0]) != 2:
            continue
        past, new = arguments[0]
        if past.op != "placeholder" or past.meta["val"].dim() != node.meta["val"].dim():
            continue
        node.target, node.args = append, (past, new, arguments[1] if len(arguments) > 1 else 0)
        if result is not node:
            result.replace_all_uses_with(node)
            graph.erase_node(result)


def in_any_layout(node: fx.Node) -> fx.Node:
    """The source of a returned dense copy, if nothing else reads that copy; else the node itself."""
    is_copy = node.target is aten.contiguous.default and len(node.args) == 1 and len(node.users) == 1
    source = node.args[0] if is_copy else node
    assert isinstance(source, fx.Node)
    return source
