"""The registry of lowerings: the function that computes a block on a device, and the record of a found block.

A rule with `outline` finds a block and turns it into one fused call node. `fxbt.rewrite.outline.inline` restores its
operations, each with a `Part` in its meta, so that unpadding and masks are handled op by op. Where all parts are still
there, the block's lowering replaces them.
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

OPERANDS = "fxbt_operands"  # node.meta entry of a fused call node: the `Names` of its rule
PARTS = "fxbt_parts"  # node.meta entry of an operation: its `Part` in each block around it


class Names(NamedTuple):
    """The bindings of a block's rule: the names of the fused node's first inputs, and values that are not nodes."""

    inputs: tuple[str, ...]
    static: Mapping[str, Any]


@dataclass(frozen=True)
class Lowering:
    """A function that computes a block on one kind of device; `prepare` computes some of its arguments from weights."""

    function: Function
    device: str
    dtype: torch.dtype | None = None
    prepare: Mapping[str, Function] = field(default_factory=dict)
    compiler: Callable[..., Any] | None = None  # makes the function from a block's graph

    @property
    def takes(self) -> list[str]:
        """The names that must be bound: the function's parameters without a default."""
        parameters = inspect.signature(self.function).parameters.values()
        return [each.name for each in parameters if each.default is each.empty]


LOWERINGS: dict[str, list[Lowering]] = {}


@dataclass(eq=False)
class KnownBlock:
    """A block that a rule found: the `nodes` that compute it in the inlined graph, and the bindings of its names there.

    `lowering` is the lowering that passed its trial, once there is one.
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
    """The values from outside that the nodes read: tensors and sizes."""
    read: dict[fx.Node, None] = {}
    inside = set()
    for entry in nodes:
        inside.add(entry.node)
        fx.node.map_arg((entry.args, entry.kwargs), lambda source: read.setdefault(source))
    return [node for node in read if node not in inside]


def graph_of(nodes: Sequence[Entry], output: fx.Node, name: str) -> fx.GraphModule:
    """The nodes as a graph of their own; its placeholders are the values they read."""
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
    """Registers a function that computes a block on a kind of device instead of the block's own operations.

    The function takes the names that the pattern of the block's rule binds, as `Rule.replace` does: tensors, floats for
    numbers, None for optional parts that are absent. It must take everything that the block reads. It is only called
    without gradients, with tensors of any size that a call may have (also with tokens packed into one sequence), and
    must neither write to them nor return one of them. Each block found is tried on the captured example beside its
    operations; if the results differ, the block keeps its operations, and `report.misses` says so. Existing graphs do
    not change.

    Args:
        block: a name in `fxbt.ops`; `fxbt.block` adds one.
        device: "cpu" or "cuda".
        dtype: the dtype of the block's result; None for any.
        prepare: functions that compute further parameters from the bound names. Results that depend only on weights
            are computed once, and again when a weight changes.
        takes_graph: the function takes the block's operations instead, as an `fx.GraphModule` with "val" in each
            node's meta, and returns a function that computes them from the placeholders (inputs and weights). This
            hands built-in blocks, whose patterns name no weights, to another compiler.

    Raises:
        RuleError: there is no such block, or `prepare` names something that is not a parameter.

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
    """The lowering registered for a block on its device; one for its dtype takes precedence."""
    value = block.output.meta["val"]
    fitting = [each for each in LOWERINGS.get(block.name, []) if each.device == value.device.type]
    by_dtype = {each.dtype: each for each in fitting}
    return by_dtype.get(value.dtype) or by_dtype.get(None)
