"""Regions of a graph under `torch.utils.checkpoint`: the backward recomputes their values instead of keeping them."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint
from torch import fx

from ..capture.checkpointing import Region, regions_of
from ..errors import CaptureError
from .codegen import compile_graph


def recomputing(graph: fx.Graph, depth: int = 0) -> fx.Graph:
    """The graph with each checkpointed region as one call, which runs it under such a checkpoint.

    `depth` is the number of regions around `graph` itself.

    Raises:
        CaptureError: two regions need each other's values, so neither can run first.
    """
    unit_of = _units(graph, depth)
    if not any(isinstance(unit, Region) for unit in unit_of.values()):
        return graph
    result = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for unit, nodes in _ordered(unit_of):
        if isinstance(unit, Region):
            _add_region(result, unit, nodes, copies, depth)
        else:
            copies[unit] = result.node_copy(unit, copies.__getitem__)
    return result


class Recomputed:
    """A function that runs under a checkpoint, with the options of the model's own checkpoint.

    Example:
        >>> Recomputed(torch.tanh, Region(0, True, "default", True))(x)
    """

    def __init__(self, function: Callable[..., Any], region: Region) -> None:
        self._function = function
        self._options: dict[str, Any] = {
            "preserve_rng_state": region.preserve_rng_state,
            "determinism_check": region.determinism_check,
            "early_stop": region.early_stop,
        }
        self.__name__ = "recomputed"

    def __call__(self, *inputs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(self._function, *inputs, use_reentrant=False, **self._options)


def _units(graph: fx.Graph, depth: int) -> dict[fx.Node, Region | fx.Node]:
    """The unit in which each node runs: its region, or the node alone."""
    unit_of: dict[fx.Node, Region | fx.Node] = {}
    for node in graph.nodes:
        marks = regions_of(node) if node.op == "call_function" else ()
        unit_of[node] = marks[depth] if len(marks) > depth else node
        if node.target is operator.getitem:  # parts stay with their whole
            unit_of[node] = unit_of[node.args[0]] if isinstance(unit_of[node.args[0]], Region) else node
    for region in dict.fromkeys(unit for unit in unit_of.values() if isinstance(unit, Region)):
        _close(graph, unit_of, region)
    return unit_of


def _close(graph: fx.Graph, unit_of: dict[fx.Node, Region | fx.Node], region: Region) -> None:
    """Adds nodes between two nodes of a region to it, for example new nodes of a rewrite, which carry no mark."""
    after: set[fx.Node] = set()
    for node in graph.nodes:
        if any(unit_of[source] == region or source in after for source in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(unit_of[user] == region or user in before for user in node.users):
            before.add(node)
    for node in after & before:
        if unit_of[node] is node:
            unit_of[node] = region


def _ordered(unit_of: dict[fx.Node, Region | fx.Node]) -> list[tuple[Region | fx.Node, list[fx.Node]]]:
    """The units with their nodes, each after those it reads, otherwise in graph order."""
    members: dict[Region | fx.Node, list[fx.Node]] = {}
    for node, unit in unit_of.items():
        members.setdefault(unit, []).append(node)
    place = {unit: i for i, unit in enumerate(members)}
    units = list(members)
    waits = {
        unit: {unit_of[source] for node in nodes for source in node.all_input_nodes} - {unit}
        for unit, nodes in members.items()
    }
    readers: dict[Region | fx.Node, list[Region | fx.Node]] = {}
    for unit, sources in waits.items():
        for source in sources:
            readers.setdefault(source, []).append(unit)
    ready = [place[unit] for unit, sources in waits.items() if not sources]
    heapq.heapify(ready)
    order = []
    while ready:
        unit = units[heapq.heappop(ready)]
        order.append((unit, members[unit]))
        for reader in readers.get(unit, ()):
            waits[reader].discard(unit)
            if not waits[reader]:
                heapq.heappush(ready, place[reader])
    if len(order) < len(members):
        raise CaptureError("after rewriting, two checkpoints of the model need each other's values")
    return order


def _add_region(graph: fx.Graph, region: Region, nodes: list[fx.Node], copies: dict[fx.Node, Any], depth: int) -> None:
    """Adds the call of a region to `graph`, and its results to `copies`."""
    inside = set(nodes)
    inputs = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside))
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    body = fx.Graph()
    own: dict[fx.Node, Any] = {source: body.placeholder(source.name) for source in inputs}
    for node in nodes:
        own[node] = body.node_copy(node, own.__getitem__)
    body.output(tuple(own[node] for node in outputs))
    function = compile_graph(recomputing(body, depth + 1))
    call = graph.call_function(Recomputed(function, region), tuple(copies[source] for source in inputs))
    for i, node in enumerate(outputs):
        copies[node] = graph.call_function(operator.getitem, (call, i))
        copies[node].meta = dict(node.meta)
