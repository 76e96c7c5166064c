"""An FX graph as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..graph.miss import module_path
from ..graph.record import RULE
from .show import op_name

if TYPE_CHECKING:
    import networkx


def as_networkx(graph: fx.Graph) -> networkx.DiGraph:
    """The nodes and edges of a graph; each node says what it computes: see `GraphReport.networkx`.

    Example:
        >>> sorted(as_networkx(graph).predecessors("linear"))
        ['bias', 'weight', 'x']
    """
    import networkx  # only here: it takes 0.1 s to load

    result = networkx.DiGraph()
    for node in graph.nodes:
        result.add_node(node.name, **_description(node))
    for node in graph.nodes:
        for source in node.all_input_nodes:
            result.add_edge(source.name, node.name, arguments=_places(node, source))
    return result


def _description(node: fx.Node) -> dict[str, Any]:
    value = node.meta.get("val")
    tensor = value if isinstance(value, torch.Tensor) else None
    return {
        "op": op_name(node.target) if node.op == "call_function" else node.op,
        "module": module_path(node),
        "rule": node.meta.get(RULE, ""),
        "shape": None if tensor is None else tuple(map(_size, tensor.shape)),
        "dtype": None if tensor is None else tensor.dtype,
    }


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


def _places(node: fx.Node, source: fx.Node) -> list[int | str]:
    """The arguments of `node`, by position or name, that are or contain `source`."""
    given: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    return [place for place, argument in given if source in _nodes_in(argument)]


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found
