"""What computes a block on a device, by the block's name, and the record of a block as it stands in a graph.

A rule with `outline` finds a block, and the fused call node reads as one. `fxbt.rewrite.outline.inline` puts its
operations back, each with a `Part` in its meta, so that padding is dropped and masks are taken op by op; where all
parts are still there, the block's lowering takes their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..errors import RuleError
from .blocks import FUSED
from .record import Entry

Function = Callable[..., Tensor]

OPERANDS = "fxbt_operands"  # node.meta entry of a fused call node: its rule's `Names`
PARTS = "fxbt_parts"  # node.meta entry of an operation: the `Part`s that it is, of blocks within each other


class Names(NamedTuple):
    """What the pattern of a block's rule binds: names of the first inputs of the fused node, and what is no node."""

    inputs: tuple[str, ...]
    static: Mapping[str, Any]


@dataclass(frozen=True)
class Lowering:
    """A function that computes a block on one kind of device; `prepare` makes some of what it takes from weights."""

    function: Function
    device: str
    dtype: torch.dtype | None = None
    prepare: Mapping[str, Function] = field(default_factory=dict)
    compiler: Callable[..., Any] | None = None  # makes the function of a block's graph

    @property
    def takes(self) -> list[str]:
        """The names that must be bound: of the function's parameters, those without a default."""
        parameters = inspect.signature(self.function).parameters.values()
        return [each.name for each in parameters if each.default is each.empty]


LOWERINGS: dict[str, list[Lowering]] = {}


@dataclass(eq=False)
class KnownBlock:
    """A block that a rule found: the `nodes` that compute it in the inlined graph, and what its names stand for there.

    `lowering` is the one that was tried and is right, once that is known.
    """

    name: str
    where: str
    operands: Mapping[str, Any]
    nodes: tuple[Entry, ...]
    output: fx.Node
    lowering: Lowering | None = None


class Part(NamedTuple):
    """Which of a block's nodes a node is, or is a copy of."""

    block: KnownBlock
    place: int


def inputs_of(nodes: Iterable[Entry]) -> list[fx.Node]:
    """The values from outside that the nodes read: tensors, and sizes."""
    read: dict[fx.Node, None] = {}
    inside = set()
    for entry in nodes:
        inside.add(entry.node)
        fx.node.map_arg((entry.args, entry.kwargs), lambda source: read.setdefault(source))
    return [node for node in read if node not in inside]


def graph_of(nodes: Sequence[Entry], output: fx.Node, name: str) -> fx.GraphModule:
    """The nodes as a graph of its own, whose placeholders are what they read."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs_of(nodes):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {"val": node.meta.get("val")}
    for entry in nodes:
        args, kwargs = fx.node.map_arg((entry.args, entry.kwargs), copies.__getitem__)
        copies[entry.node] = graph.call_function(entry.target, args, kwargs)
        copies[entry.node].meta = {key: value for key, value in entry.node.meta.items() if key != PARTS}
    graph.output(copies[output])
    return fx.GraphModule({}, graph, name)


def lowering(
    block: str,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    prepare: Mapping[str, Function] | None = None,
    takes_graph: bool = False,
) -> Callable[[Function], Function]:
    """Registers a function that computes a block on a kind of device, in place of the block's own operations.

    The function takes the names that the pattern of the block's rule binds, as `Rule.replace` does: tensors, floats
    for numbers, None for what was optional and absent; it must take all that the block reads. It is called without
    gradients only, with tensors of all sizes that a call may have (tokens packed into one sequence, too), and must
    neither write to them nor return one. Each block found is tried on the captured example beside its operations, and
    keeps those where the result differs; `report.misses` says so. Graphs that exist already stay as they are.

    Args:
        block: a name in `fxbt.ops`; `fxbt.block` adds one.
        device: "cpu" or "cuda".
        dtype: of the block's result; None for any.
        prepare: for further parameters, functions of the names that compute them. What depends on weights alone is
            computed once, and again when a weight changes.
        takes_graph: the function takes the block's operations instead, as an `fx.GraphModule` with "val" in each node's
            meta, and returns what computes them: a function of the placeholders, inputs and weights alike. So built-in
            blocks, whose patterns name no weights, go to another compiler.

    Raises:
        RuleError: there is no such block, or `prepare` names no parameter.

    Example::

        @fxbt.lowering("swiglu", device="cpu", prepare={"both": lambda gate, up: torch.cat([gate, up])})
        def swiglu(x, both):
            gate, up = F.linear(x, both).chunk(2, -1)
            return F.silu(gate) * up

        @fxbt.lowering("mlp", device="cuda", takes_graph=True)
        def by_inductor(graph):
            return torch.compile(graph, dynamic=True)
    """
    if block not in FUSED:
        raise RuleError(f"lowering of {block!r}: expected one of fxbt.ops: {', '.join(FUSED)}")

    def register(function: Function) -> Function:
        made = Lowering(function, device, dtype, dict(prepare or {}), function if takes_graph else None)
        if unknown := made.prepare.keys() - inspect.signature(function).parameters.keys():
            raise RuleError(f"lowering of {block!r}: prepare has {min(unknown)!r}, which the function does not take")
        others = [each for each in LOWERINGS.get(block, []) if (each.device, each.dtype) != (device, dtype)]
        LOWERINGS[block] = [made, *others]
        return function

    return register


def lowering_of(block: KnownBlock) -> Lowering | None:
    """What was registered for a block on its device, the one for its dtype first."""
    value = block.output.meta["val"]
    fitting = [each for each in LOWERINGS.get(block.name, []) if each.device == value.device.type]
    by_dtype = {each.dtype: each for each in fitting}
    return by_dtype.get(value.dtype) or by_dtype.get(None)
