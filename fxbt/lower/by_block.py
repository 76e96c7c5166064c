"""Gives found blocks their registered lowerings: each is tried on the example, and used where the block is whole."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.model_state import versions
from ..graph.lowerings import PARTS, KnownBlock, Lowering, graph_of, inputs_of, lowering_of
from ..graph.miss import Miss
from ..graph.node import is_random
from ..graph.record import Entry, StageRecord
from ..rewrite.verify import Verifier, check_value
from ..torch_compat import is_any_autocast_enabled

STAGE = "lowering"

# --- which blocks -----------------------------------------------------------------------------------------------


def choose_lowerings(module: fx.GraphModule, example: Sequence[Tensor]) -> StageRecord | None:
    """Tries the registered lowerings of an inlined graph's blocks; a block keeps one that is right as its `lowering`.

    Returns the record of it; None if nothing is registered.
    """
    blocks = dict.fromkeys(part.block for node in module.graph.nodes for part in node.meta.get(PARTS, ()))
    registered = {block: made for block in blocks if (made := lowering_of(block))}
    if not registered:
        return None
    count = len(module.graph.nodes)
    record = StageRecord(STAGE, nodes_before=count, nodes_after=count)
    start = time.perf_counter()
    values = Verifier(module, example).env
    for block, made in registered.items():
        try:
            block.lowering = _tried(block, made, values)
        except Miss as miss:
            miss.rule, miss.where, miss.refused = STAGE, block.where, True
            record.misses.append(miss.without_frames())
            continue
        record.places.append(block.where)
    record.seconds = time.perf_counter() - start
    return record


def _tried(block: KnownBlock, made: Lowering, values: Mapping[fx.Node, Any]) -> Lowering:
    """Runs a lowering on the block's values; returns it if its result is right."""
    if any(entry.node.op != "call_function" for entry in block.nodes):
        raise Miss(f"{block.name} contains another graph", node=block.output)
    if is_any_autocast_enabled():
        raise Miss("autocast is on, and would not reach into a lowering")
    if any(is_random(entry.node) for entry in block.nodes):
        raise Miss(f"{block.name} draws random numbers, so its lowering cannot be compared with it", node=block.output)
    if made.compiler is None:
        _check_names(block, made)
    with torch.inference_mode(False):  # inference tensors have no version
        # copies, so that weights survive a lowering that writes to them
        given = {node: _copy(values[node]) for node in inputs_of(block.nodes)}
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    before = versions(tensors)
    try:
        with torch.inference_mode(False), torch.no_grad():
            made = _compiled(block, made, block.nodes, block.output)
            args, kwargs = _arguments(block, made, given, lambda prepare, given: prepare(**given))
            result = made.function(*args, **kwargs)
    except Exception as error:
        raise Miss(f"the lowering of {block.name} raises {type(error).__name__}: {error}") from error
    if versions(tensors) != before:
        raise Miss(f"the lowering of {block.name} writes to its arguments")
    _check_result(block, result, values[block.output], tensors)
    return made


def _compiled(block: KnownBlock, made: Lowering, nodes: Sequence[Entry], output: fx.Node) -> Lowering:
    """A lowering whose function is for these nodes (if it is compiled from a graph), and has a name, which fx needs."""
    run = made.function if made.compiler is None else made.compiler(graph_of(nodes, output, block.name))
    if hasattr(run, "__name__"):
        return replace(made, function=run)

    def named(*args: Any, **kwargs: Any) -> Tensor:
        return run(*args, **kwargs)

    functools.update_wrapper(named, run, assigned=(), updated=())  # it has the signature of `run`
    named.__name__ = block.name
    return replace(made, function=named)


def _check_names(block: KnownBlock, made: Lowering) -> None:
    """Checks that the function takes what the block reads, and nothing else."""
    functions = [made, *(Lowering(prepare, made.device) for prepare in made.prepare.values())]
    taken = {name for each in functions for name in each.takes} - made.prepare.keys()
    if unknown := sorted(taken - block.operands.keys()):
        raise Miss(f"the lowering of {block.name} takes {unknown[0]!r}, which the pattern does not bind")
    given = {block.operands[name] for name in taken if isinstance(block.operands[name], fx.Node)}
    read = inputs_of(block.nodes)
    # it need not take sizes
    left = [node for node in read if node not in given and isinstance(node.meta.get("val"), Tensor)]
    if left:
        raise Miss(f"the lowering of {block.name} does not take everything that the block reads", node=left[0])
    if given.difference(read):
        raise Miss(f"the lowering of {block.name} takes a value that the block does not read", node=block.output)


def _check_result(block: KnownBlock, result: Any, expected: Tensor, given: Iterable[Tensor]) -> None:
    if not isinstance(result, Tensor) or _form(result) != _form(expected):
        raise Miss(
            f"the lowering of {block.name} returns another shape, dtype, device or layout",
            expected=str(_form(expected)),
            found=str(_form(result)) if isinstance(result, Tensor) else type(result).__name__,
        )
    if any(_shares_memory(result, tensor) for tensor in given):
        raise Miss(f"the lowering of {block.name} returns memory of its arguments")
    check_value(block.output, expected, result)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _form(value: Tensor) -> tuple[Any, ...]:
    strides = [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
    return tuple(value.shape), value.dtype, str(value.device), strides if value.numel() else []


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    is_plain = one.layout is other.layout is torch.strided
    return is_plain and one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _arguments(
    block: KnownBlock, made: Lowering, values: Mapping[fx.Node, Any], call: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The function's arguments: values of nodes, and what `call(prepare, its arguments)` makes from them."""
    if made.compiler is not None:
        return tuple(values[node] for node in inputs_of(block.nodes)), {}
    operands = {name: values.get(v) if isinstance(v, fx.Node) else v for name, v in block.operands.items()}
    prepared = {
        name: call(prepare, {taken: operands[taken] for taken in Lowering(prepare, made.device).takes})
        for name, prepare in made.prepare.items()
    }
    return (), {name: prepared[name] if name in prepared else operands[name] for name in made.takes}


# --- in a graph -------------------------------------------------------------------------------------------------


def lower_blocks(graph: fx.Graph) -> list[fx.Node]:
    """Replaces blocks that are whole in this graph by their lowerings; returns the nodes that prepare operands.

    Raises:
        Miss: a compiler fails on a block as it is in this graph.
    """
    found: dict[KnownBlock, dict[int, list[fx.Node]]] = {}
    for node in graph.nodes:
        for block, place in node.meta.get(PARTS, ()):
            if block.lowering is not None:
                found.setdefault(block, {}).setdefault(place, []).append(node)
    prepared: list[fx.Node] = []
    erased: set[fx.Node] = set()
    for block in sorted(found, key=lambda block: -len(block.nodes)):  # outer blocks before inner ones
        copies = {place: nodes[0] for place, nodes in found[block].items() if len(nodes) == 1}
        output = copies.get([entry.node for entry in block.nodes].index(block.output))
        is_alone = len(copies) == len(found[block]) and erased.isdisjoint(copies.values())
        if output is None or not is_alone or not _is_closed(copies.values(), output):
            continue
        with graph.inserting_before(output):
            result = _call(graph, block, copies, output, prepared)
        if result is not None:
            _replace(graph, copies.values(), output, result)
            erased.update(copies.values())
    return prepared


def _is_closed(nodes: Collection[fx.Node], output: fx.Node) -> bool:
    """Whether only the output is read outside."""
    inside = set(nodes)
    return all(node is output or inside.issuperset(node.users) for node in nodes)


def _call(
    graph: fx.Graph, block: KnownBlock, copies: Mapping[int, fx.Node], output: fx.Node, prepared: list[fx.Node]
) -> fx.Node | None:
    """The node that computes a block with these nodes; None if they are no longer that block.

    A lowering compiled from a graph is compiled again where the nodes changed, for example an attention that lost its
    mask.
    """
    made = block.lowering
    assert made is not None
    outside = _outside(block, copies)
    if outside is not None:

        def prepare(function: Any, given: dict[str, Any]) -> fx.Node:
            prepared.append(graph.call_function(function, (), given))
            return prepared[-1]

        return graph.call_function(made.function, *_arguments(block, made, outside, prepare))
    if made.compiler is None:
        return None
    entries = tuple(map(Entry.of, sorted(copies.values())))
    try:
        run = _compiled(block, made, entries, output).function
    except Exception as error:
        raise Miss(f"the lowering of {block.name} raises {type(error).__name__}: {error}", node=output) from error
    return graph.call_function(run, tuple(inputs_of(entries)))


def _outside(block: KnownBlock, copies: Mapping[int, fx.Node]) -> dict[fx.Node, fx.Node] | None:
    """For each node that the block reads, its copy in a graph where `copies` are the block's; None if an op differs."""
    if len(copies) < len(block.nodes):
        return None
    inside = {entry.node: copies[place] for place, entry in enumerate(block.nodes)}
    found: dict[fx.Node, fx.Node] = {}
    for entry in block.nodes:
        copy = inside[entry.node]
        arguments, its_arguments = (entry.args, entry.kwargs), (copy.args, copy.kwargs)
        if entry.target is not copy.target or not _is_same(arguments, its_arguments, inside, found):
            return None
    return found


def _is_same(one: Any, other: Any, inside: dict[fx.Node, fx.Node], found: dict[fx.Node, fx.Node]) -> bool:
    """Whether arguments are equal, with `inside` and `found` mapping nodes; adds new pairs to `found`."""
    if isinstance(one, fx.Node):
        if not isinstance(other, fx.Node):
            return False
        return (inside[one] if one in inside else found.setdefault(one, other)) is other
    if isinstance(one, dict):
        same_keys = isinstance(other, dict) and list(one) == list(other)
        return same_keys and all(_is_same(one[key], other[key], inside, found) for key in one)
    if isinstance(one, list | tuple):
        same_length = isinstance(other, list | tuple) and len(one) == len(other)
        return same_length and all(_is_same(a, b, inside, found) for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and bool(one == other)


def _replace(graph: fx.Graph, nodes: Collection[fx.Node], output: fx.Node, result: fx.Node) -> None:
    result.meta = {key: value for key, value in output.meta.items() if key != PARTS}
    output.replace_all_uses_with(result)
    for node in sorted(nodes, reverse=True):
        graph.erase_node(node)
