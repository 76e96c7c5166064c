"""Fused call nodes: `outline` turns a match into one node with its graph as a submodule, `inline` undoes it."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from ..graph.blocks import ATTENTIONS, FUSED, SDPA
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
    (the attention mask first), and the weights. Keys and values that a cache keeps are further results of it.

    Raises:
        Miss: another value inside is used outside; the graph is then unchanged.
    """
    graph, (output,) = module.graph, match.outputs
    region = _region(output, match.inputs)
    outputs = (output, *_kept_by_a_cache(region, output))
    has_several = len(outputs) > 1
    _check_closed(region, outputs)
    inputs = [*match.inputs, *_read_from_outside(region, match.inputs)]
    body, order = fx.Graph(), sorted(region)
    copies = {node: _parameter(body, node) for node in inputs}
    modules = {}
    for node in order:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = body.node_copy(source)
                modules[str(source.target)] = getattr(module, str(source.target))
        copies[node] = body.node_copy(node, copies.__getitem__)
    returned = tuple(copies[node] for node in outputs)
    body.output(returned if has_several else copies[output])
    name = _unused_name(module, rule.outline)
    module.add_submodule(name, LazyGraphModule(modules, body, "Body"))
    with graph.inserting_before(output):
        reference = graph.get_attr(name)
        call = graph.call_function(FUSED[rule.outline], (reference, *inputs))
    call.meta = {**provenance(output, output, rule), "nn_module_stack": _common_stack(order)}
    if isinstance(match.facts, Arguments) and not has_several:
        call.meta[OPERANDS] = Names(tuple(match.facts.tensors), match.facts.static)
    results = _results(call, outputs) if has_several else [call]
    for old, new in zip(outputs, results, strict=True):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in region)
    removed = tuple(map(Entry.of, order))
    for node in reversed(order):
        graph.erase_node(node)
    added = tuple(map(Entry.of, dict.fromkeys([call, *results])))
    return Rewrite(rule.name, module_path(call), removed, added, tuple(zip(outputs, results, strict=True)))


def _results(call: fx.Node, nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """The results of a call node that has several, which stand for these nodes; what reads those comes after them."""
    call.meta["val"] = tuple(node.meta["val"] for node in nodes)
    results = [call]
    for place, node in enumerate(nodes):
        with call.graph.inserting_after(results[-1]):
            results.append(call.graph.call_function(operator.getitem, (call, place)))
        results[-1].meta = dict(node.meta)
    _, *results = results
    last = results[-1]
    for reader in _readers(nodes[1:]):
        if reader < last:
            last.append(reader)
            last = reader
    return results


def _readers(nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """What is made of nodes for the graph's output alone, in the graph's order."""
    found: set[fx.Node] = set()
    waiting = [user for node in nodes for user in node.users]
    while waiting:
        reader = waiting.pop()
        if reader.op != "output" and reader not in found and _only_returned(reader):
            found.add(reader)
            waiting += reader.users
    return sorted(found)


def _kept_by_a_cache(region: set[fx.Node], output: fx.Node) -> list[fx.Node]:
    """The keys and values of attentions in a region that the graph returns too, as they are or a part of them."""
    attentions = [node for node in sorted(region) if node.target in ATTENTIONS]
    operands = [argument(node, name) for node in attentions for name in ("key", "value")]
    found = dict.fromkeys(node for operand in operands for node in _viewed(operand, region))
    readers = {node: [user for user in node.users if user not in region] for node in found}
    return [node for node, users in readers.items() if users and all(map(_only_returned, users))]


def _viewed(node: fx.Node, region: set[fx.Node]) -> list[fx.Node]:
    """A node, what it is a view of, what that is a view of, and so on, as far as that is in a region."""
    found = []
    while node in region:
        found.append(node)
        if not getattr(node.target, "is_view", False):
            break
        node = node.all_input_nodes[0]
    return found


def _only_returned(reader: fx.Node) -> bool:
    """Whether a reader is the graph's output, or a view for that alone: the last keys, of a sliding window."""
    is_view = bool(getattr(reader.target, "is_view", False) and reader.users)
    return reader.op == "output" or (is_view and all(map(_only_returned, reader.users)))


def _region(output: fx.Node, inputs: tuple[fx.Node, ...]) -> set[fx.Node]:
    """The nodes computed from `inputs` on the way to `output`, and nodes that only serve these: sizes, merged
    weights."""
    reached, waiting = {output}, [output]
    while waiting:
        sources = [s for s in waiting.pop().all_input_nodes if s not in reached and s not in inputs]
        calls = [source for source in sources if source.op == "call_function"]
        reached.update(calls)
        waiting.extend(calls)
    ordered = sorted(reached)
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


def _check_closed(region: set[fx.Node], results: tuple[fx.Node, ...]) -> None:
    for node in sorted(region.difference(results)):
        reader = next((user for user in node.users if user not in region), None)
        if reader is not None:
            raise Miss(
                "a value inside the block is used outside it",
                node=node,
                found=(node, "is also used by", reader),
                expected="one output",
            )


def _read_from_outside(region: set[fx.Node], inputs: tuple[fx.Node, ...]) -> list[fx.Node]:
    """What the region reads besides its inputs: masks, other tensors and sizes, and last weights."""
    nodes = sorted(region)
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


def _result_of_several(node: fx.Node, copies: dict[fx.Node, Any]) -> Any:
    """What one result of a fused node is where its body stands in its place; None for other nodes."""
    results = copies.get(node.args[0]) if node.target is operator.getitem else None  # type: ignore[arg-type]
    return results[node.args[1]] if isinstance(results, tuple) else None  # type: ignore[index]


def _emit(graph: fx.Graph, owner: Any, node: fx.Node, copies: dict[fx.Node, Any]) -> Any:
    """Copies one node into `graph`, a fused call as the nodes of its body; returns the copy."""
    is_graph = node.op == "get_attr" and isinstance(attribute(owner, node), fx.GraphModule)
    if is_graph and all(is_fused(user) for user in node.users):
        return None  # a body: its nodes are copied instead
    if (result := _result_of_several(node, copies)) is not None:
        return result
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
            returned: Any = part.args[0]
            return tuple(inner[node] for node in returned) if isinstance(returned, tuple) else inner[returned]
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
