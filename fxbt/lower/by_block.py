"""Blocks that rules found, computed by what was registered for them: tried on the example, put where they are whole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.lowerings import PARTS, KnownBlock, Lowering, lowering_of
from ..graph.miss import Miss
from ..graph.record import StageRecord
from ..rewrite.verify import Verifier, check_value, is_random
from ..torch_compat import is_any_autocast_enabled

STAGE = "lowering"

# --- which blocks -----------------------------------------------------------------------------------------------


def choose_lowerings(module: fx.GraphModule, example: Sequence[Tensor]) -> StageRecord | None:
    """Tries what is registered for the blocks of an inlined graph; those that are right get it as their `lowering`.

    Returns the record of it, where anything is registered.
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
            _check_names(block, made)
            _check_numbers(block, made, values)
        except Miss as miss:
            miss.rule, miss.where, miss.refused = STAGE, block.where, True
            miss.__cause__ = miss.__context__ = None
            record.misses.append(miss.with_traceback(None))  # else its frames, with the call's tensors, live on
            continue
        block.lowering = made
        record.places.append(block.where)
    record.seconds = time.perf_counter() - start
    return record


def _check_names(block: KnownBlock, made: Lowering) -> None:
    """Whether the function takes what the block reads, and that alone."""
    functions = [made, *(Lowering(prepare, made.device) for prepare in made.prepare.values())]
    taken = {name for each in functions for name in each.takes} - made.prepare.keys()
    if unknown := sorted(taken - block.operands.keys()):
        raise Miss(f"the lowering of {block.name} takes {unknown[0]!r}, which the pattern does not bind")
    given = {block.operands[name] for name in taken if isinstance(block.operands[name], fx.Node)}
    if left := next((node for node in block.reads if node not in given), None):
        raise Miss(f"the lowering of {block.name} does not take all that the block reads", node=left)
    if given.difference(block.reads):
        raise Miss(f"the lowering of {block.name} takes a value that the block does not read", node=block.output)
    if is_any_autocast_enabled():
        raise Miss("autocast would not reach into a lowering")


def _check_numbers(block: KnownBlock, made: Lowering, values: Mapping[fx.Node, Any]) -> None:
    if any(is_random(entry.node) for entry in block.nodes):
        raise Miss(f"{block.name} draws random numbers, so its lowering cannot be tried", node=block.output)
    operands = {name: values[v] if isinstance(v, fx.Node) else v for name, v in block.operands.items()}
    tensors = [value for value in operands.values() if isinstance(value, Tensor)]
    versions = [tensor._version for tensor in tensors if not tensor.is_inference()]
    expected = values[block.output]
    try:
        with torch.no_grad():
            result = made.function(**_arguments(made, operands, lambda prepare, given: prepare(**given)))
    except Exception as error:
        raise Miss(f"the lowering of {block.name} raises {type(error).__name__}: {error}") from error
    if versions != [tensor._version for tensor in tensors if not tensor.is_inference()]:
        raise Miss(f"the lowering of {block.name} writes to what it is given")
    if not isinstance(result, Tensor) or _form(result) != _form(expected):
        found = str(_form(result)) if isinstance(result, Tensor) else type(result).__name__
        raise Miss(
            f"the lowering of {block.name} has another shape, dtype, device or layout",
            expected=str(_form(expected)),
            found=found,
        )
    if any(_shares_memory(result, tensor) for tensor in tensors):
        raise Miss(f"the lowering of {block.name} returns memory that it was given")
    check_value(block.output, expected, result)


def _form(value: Tensor) -> tuple[Any, ...]:
    strides = [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
    return tuple(value.shape), value.dtype, str(value.device), strides if value.numel() else []


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    is_plain = one.layout is other.layout is torch.strided
    return is_plain and one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _arguments(made: Lowering, operands: Mapping[str, Any], call: Any) -> dict[str, Any]:
    """What the function is given by name, of operands and of what `call(prepare, its arguments)` makes."""
    prepared = {
        name: call(prepare, {taken: operands[taken] for taken in Lowering(prepare, made.device).takes})
        for name, prepare in made.prepare.items()
    }
    return {name: prepared[name] if name in prepared else operands[name] for name in made.takes}


# --- in a graph -------------------------------------------------------------------------------------------------


def lower_blocks(graph: fx.Graph) -> list[fx.Node]:
    """Puts lowerings in the place of blocks that are whole in this graph; returns the nodes that prepare operands."""
    found: dict[KnownBlock, list[list[fx.Node]]] = {}
    for node in graph.nodes:
        for block, place in node.meta.get(PARTS, ()):
            if block.lowering is not None:
                found.setdefault(block, [[] for _ in block.nodes])[place].append(node)
    prepared: list[fx.Node] = []
    erased: set[fx.Node] = set()
    for block in sorted(found, key=lambda block: -len(block.nodes)):  # a block around others before those
        copies = [nodes[0] for nodes in found[block] if len(nodes) == 1]
        if len(copies) < len(block.nodes) or not erased.isdisjoint(copies):
            continue
        outside = _outside(block, copies)
        if outside is not None:
            prepared += _put(graph, block, copies, outside)
            erased.update(copies)
    return prepared


def _outside(block: KnownBlock, copies: list[fx.Node]) -> dict[fx.Node, fx.Node] | None:
    """What each node that the block reads is in a graph where `copies` are its nodes.

    None where they are not that block any more: an op has other arguments, or a value inside is read elsewhere.
    """
    inside = {entry.node: copy for entry, copy in zip(block.nodes, copies, strict=True)}
    found: dict[fx.Node, fx.Node] = {}
    for entry, copy in zip(block.nodes, copies, strict=True):
        arguments, its_arguments = (entry.args, entry.kwargs), (copy.args, copy.kwargs)
        if entry.target is not copy.target or not _is_same(arguments, its_arguments, inside, found):
            return None
        if entry.node is not block.output and not set(copies).issuperset(copy.users):
            return None
    return found


def _is_same(one: Any, other: Any, inside: dict[fx.Node, fx.Node], found: dict[fx.Node, fx.Node]) -> bool:
    """Whether arguments are equal, where `inside` and `found` say which node is which; `found` learns new ones."""
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
    return type(one) is type(other) and one == other


def _put(
    graph: fx.Graph, block: KnownBlock, copies: list[fx.Node], outside: Mapping[fx.Node, fx.Node]
) -> list[fx.Node]:
    made, prepared = block.lowering, list[fx.Node]()
    assert made is not None
    operands = {name: outside.get(v) if isinstance(v, fx.Node) else v for name, v in block.operands.items()}

    def prepare(function: Any, given: dict[str, Any]) -> fx.Node:
        prepared.append(graph.call_function(function, (), given))
        return prepared[-1]

    output = next(copy for entry, copy in zip(block.nodes, copies, strict=True) if entry.node is block.output)
    with graph.inserting_before(output):
        result = graph.call_function(made.function, (), _arguments(made, operands, prepare))
    result.meta = {key: value for key, value in output.meta.items() if key != PARTS}
    output.replace_all_uses_with(result)
    for node in reversed(copies):
        graph.erase_node(node)
    return prepared
