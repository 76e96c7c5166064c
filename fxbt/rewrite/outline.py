"""Fused call nodes: `outline` turns a match into one node with its graph as a submodule, `inline` undoes it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from ..graph.blocks import FUSED, SDPA
from ..graph.lowerings import OPERANDS, PARTS, KnownBlock, Names, Part
from ..graph.miss import Miss, module_path
from ..graph.node import argument, attribute, is_weight, with_graph
from ..graph.record import Entry, Rewrite
from ..match.rule import Arguments, Match, Rule
from ..torch_compat import LazyGraphModule
from .splice import provenance


def outline(module: fx.GraphModule, rule: Rule, match: Match) -> Rewrite:
    """Turns the nodes between `match.inputs` and its output into one call of `rule.outline`; returns the record.

    The node's arguments are a submodule with the nodes as its graph, the match's inputs, other values that they read
    (the attention mask first), and the weights.

    Raises:
        Miss: a value inside is used outside; the graph is then unchanged.
    """
    graph, (output,) = module.graph, match.outputs
    region = _region(output, match.inputs)
    _check_closed(region, output)
    inputs = [*match.inputs, *_read_from_outside(region, match.inputs)]
    body, order = fx.Graph(), [node for node in graph.nodes if node in region]
    copies = {node: _parameter(body, node) for node in inputs}
    modules = {}
    for node in order:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = body.node_copy(source)
                modules[str(source.target)] = getattr(module, str(source.target))
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(copies[output])
    name = _unused_name(module, rule.outline)
    module.add_submodule(name, LazyGraphModule(modules, body, "Body"))
    with graph.inserting_before(output):
        reference = graph.get_attr(name)
        call = graph.call_function(FUSED[rule.outline], (reference, *inputs))
    call.meta = {**provenance(output, output, rule), "nn_module_stack": _common_stack(order)}
    if isinstance(match.facts, Arguments):
        call.meta[OPERANDS] = Names(tuple(match.facts.tensors), match.facts.static)
    output.replace_all_uses_with(call)
    removed = tuple(map(Entry.of, order))
    for node in reversed(order):
        graph.erase_node(node)
    return Rewrite(rule.name, module_path(call), removed, (Entry.of(call),), ((output, call),))


def _region(output: fx.Node, inputs: tuple[fx.Node, ...]) -> set[fx.Node]:
    """The nodes computed from `inputs` on the way to `output`, and nodes that only serve these: sizes, merged
    weights."""
    reached, waiting = {output}, [output]
    while waiting:
        sources = [s for s in waiting.pop().all_input_nodes if s not in reached and s not in inputs]
        calls = [source for source in sources if source.op == "call_function"]
        reached.update(calls)
        waiting.extend(calls)
    ordered = [node for node in output.graph.nodes if node in reached]
    region: set[fx.Node] = set()
    for node in ordered:
        carries = isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
        if carries and any(source in region or source in inputs for source in node.all_input_nodes):
            region.add(node)
    for node in reversed(ordered):
        serves = node not in region and all(user in region for user in node.users)
        if serves and (not isinstance(node.meta.get("val"), torch.Tensor) or is_weight(node)):
            region.add(node)
    return region


def _check_closed(region: set[fx.Node], output: fx.Node) -> None:
    for node in output.graph.nodes:
        reader = next((user for user in node.users if user not in region), None)
        if node in region and node is not output and reader is not None:
            raise Miss(
                "a value inside the block is used outside it",
                node=node,
                found=(node, "is also used by", reader),
                expected="one output",
            )


def _read_from_outside(region: set[fx.Node], inputs: tuple[fx.Node, ...]) -> list[fx.Node]:
    """What the region reads besides its inputs: masks, other tensors and sizes, and last weights."""
    nodes = [node for node in next(iter(region)).graph.nodes if node in region]
    read = [source for node in nodes for source in node.all_input_nodes if source not in region]
    masks = {argument(node, "attn_mask") for node in nodes if node.target is SDPA}
    others = dict.fromkeys(node for node in read if node not in inputs and not _is_body(node))
    return sorted(others, key=lambda node: (node.op == "get_attr", node not in masks))


def _is_body(node: fx.Node) -> bool:
    """Whether a node is a graph that another node calls; it moves with that node."""
    return node.op == "get_attr" and isinstance(attribute(node.graph.owning_module, node), fx.GraphModule)


def _common_stack(nodes: list[fx.Node]) -> dict[str, Any]:
    """The innermost module that contains all nodes, with the modules around it."""
    stacks = [list((node.meta.get("nn_module_stack") or {}).items()) for node in nodes]
    levels = zip(*stacks, strict=False)
    return dict(level[0] for level in itertools.takewhile(lambda level: len(set(map(str, level))) == 1, levels))


def _parameter(body: fx.Graph, node: fx.Node) -> fx.Node:
    parameter = body.placeholder(node.name)
    parameter.meta = dict(node.meta)
    return parameter


def _unused_name(module: fx.GraphModule, prefix: str) -> str:
    return next(name for n in itertools.count() if not hasattr(module, name := f"{prefix}_body_{n}"))


def inline(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of `module` with the body in place of each call of `fxbt.ops`; the nodes record their block."""
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        copies[node] = _emit(graph, module, node, copies)
    return with_graph(module, graph)


def _emit(graph: fx.Graph, owner: Any, node: fx.Node, copies: dict[fx.Node, Any]) -> Any:
    """Copies one node into `graph`, a fused call as the nodes of its body; returns the copy."""
    is_graph = node.op == "get_attr" and isinstance(attribute(owner, node), fx.GraphModule)
    if is_graph and all(is_fused(user) for user in node.users):
        return None  # a body: its nodes are copied instead
    if not is_fused(node):
        return graph.node_copy(node, copies.__getitem__)
    before = next(iter(reversed(graph.nodes)), None)
    given = [copies[source] for source in node.args[1:]]  # type: ignore[index]
    output = _emit_body(graph, attribute(owner, node.args[0]), given)  # type: ignore[arg-type]
    if OPERANDS in node.meta:
        emitted = list(itertools.takewhile(lambda made: made is not before, reversed(graph.nodes)))
        _note_parts(node, given, tuple(reversed(emitted)), output)
    return output


def _emit_body(graph: fx.Graph, body: fx.GraphModule, given: list[Any]) -> Any:
    left, inner = iter(given), dict[fx.Node, Any]()
    for part in body.graph.nodes:
        if part.op == "output":
            return inner[part.args[0]]
        inner[part] = next(left) if part.op == "placeholder" else _emit(graph, body, part, inner)
    raise AssertionError("a body without an output")


def _note_parts(call: fx.Node, given: list[Any], nodes: tuple[fx.Node, ...], output: fx.Node) -> None:
    """Records on the nodes of an inlined block which parts of it they are."""
    names: Names = call.meta[OPERANDS]
    operands = {**names.static, **dict(zip(names.inputs, given, strict=False))}
    entries = tuple(map(Entry.of, nodes))
    block = KnownBlock(call.target.__name__, module_path(call), operands, entries, output)  # type: ignore[union-attr]
    for place, node in enumerate(nodes):
        node.meta[PARTS] = (*node.meta.get(PARTS, ()), Part(block, place))


def is_fused(node: fx.Node) -> bool:
    """Whether a node calls one of `fxbt.ops`."""
    return node.op == "call_function" and node.target in FUSED.values()
