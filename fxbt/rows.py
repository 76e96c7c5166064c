"""The hidden layer of an MLP some rows at a time, where all of it would be memory that the system gives anew each call.

Above 32 MiB glibc takes every block from the system and gives it back, and each page of it costs a fault: two linears
on 6400 rows of 768 features took 144 ms where parts of 700 rows take 126, and 1.3 times with 384 features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .kernels import LinearByRows
from .weights import compile_graph

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn

LARGE = 32 * 2**20  # bytes: glibc's DEFAULT_MMAP_THRESHOLD_MAX
PART = 8 * 2**20  # bytes of the hidden layer at a time
LINEARS = {aten.linear.default, mkldnn._linear_pointwise.default, mkldnn._linear_pointwise.binary}


class ByRows:
    """`compute(x, residual, *weights)`, a function of each row, on all rows or, where the hidden layer is large, some.

    x (..., features), residual (..., outputs) or None -> (..., outputs)
    """

    def __init__(self, compute: Callable[..., Tensor], bytes_of_a_row: int):
        self._compute = compute
        self._bytes = bytes_of_a_row
        self.__name__ = "by_rows"  # fx names nodes by it

    def __call__(self, x: Tensor, residual: Tensor | None, *weights: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        if rows * self._bytes <= LARGE:
            return self._compute(x, residual, *weights)
        some = max(1, PART // self._bytes)
        residuals = itertools.repeat(None) if residual is None else residual.flatten(0, -2).split(some)
        parts = zip(x.flatten(0, -2).split(some), residuals, strict=False)  # None is repeated for ever
        return torch.cat([self._compute(*part, *weights) for part in parts]).unflatten(0, x.shape[:-1])


def some_rows_at_a_time(graph: fx.Graph, constant: set[fx.Node], bind: Callable[[fx.Node], Any]) -> None:
    """Make one node of each linear with the pointwise ops and linears before it, up to the one value these read.

    `bind` gives the function to call for a node.
    """
    for node in list(graph.nodes):
        found = _hidden_layer(node, constant) if _is_linear(node) else None
        if found is not None:
            _outline(graph, node, *found, constant, bind)


def _is_linear(node: fx.Node) -> bool:
    return node.target in LINEARS or isinstance(node.target, LinearByRows)


def _hidden_layer(last: fx.Node, constant: set[fx.Node]) -> tuple[list[fx.Node], fx.Node] | None:
    """What is computed between a linear and the one source of its input, and that source; None if it is no MLP's."""
    by_row = [last.args[0], _residual(last)]
    # Each input must be either read row by row or a weight.
    if any((source in by_row) == (source in constant) for source in last.all_input_nodes):
        return None
    region: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    waiting: list[Any] = [last.args[0]]
    while waiting:
        node = waiting.pop()
        if len(node.users) > 1 or not _is_of_a_row(node, constant):
            return None
        region.add(node)
        inputs = [source for source in node.all_input_nodes if source not in constant]
        (sources.update if _is_linear(node) else waiting.extend)(inputs)
    if len(sources) != 1:
        return None
    return [node for node in last.graph.nodes if node in region], sources.pop()


def _residual(linear: fx.Node) -> fx.Node | None:
    return linear.args[1] if linear.target is mkldnn._linear_pointwise.binary else None  # type: ignore[return-value]


def _is_of_a_row(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a row of a value needs the same row of others alone: a linear without residual, or pointwise."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2 or not isinstance(value.shape[-1], int):
        return False
    if value.device.type != "cpu":
        return False
    if _is_linear(node):
        return node.target is not mkldnn._linear_pointwise.binary
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return is_pointwise and all(source not in constant for source in node.all_input_nodes)


def _outline(
    graph: fx.Graph,
    last: fx.Node,
    region: list[fx.Node],
    x: fx.Node,
    constant: set[fx.Node],
    bind: Callable[[fx.Node], Any],
) -> None:
    residual, body = _residual(last), fx.Graph()
    copies = {x: body.placeholder("x")}
    its_rows = body.placeholder("residual")
    if residual is not None:
        copies.setdefault(residual, its_rows)
    nodes = [*region, last]
    weights = [n for n in dict.fromkeys(s for node in nodes for s in node.all_input_nodes) if n in constant]
    copies.update({weight: body.placeholder(weight.name) for weight in weights})
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
        copies[node].target = bind(node)
    body.output(copies[last])
    with graph.inserting_before(last):
        by_rows = ByRows(compile_graph(body), sum(_bytes_of_a_row(node) for node in region))
        node = graph.call_function(by_rows, (x, residual, *weights))
    node.meta = dict(last.meta)
    last.replace_all_uses_with(node)
    for old in reversed(nodes):
        graph.erase_node(old)


def _bytes_of_a_row(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.shape[-1]) * value.element_size()
