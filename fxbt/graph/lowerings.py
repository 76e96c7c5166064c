"""What computes a block on a device, by the block's name, and the record of a block as it stands in a graph.

A rule with `outline` finds a block, and the fused call node reads as one. `fxbt.outline.inline` puts its operations
back, each with a `Part` in its meta, so that padding is dropped and masks are taken op by op; where all parts are still
there, the block's lowering takes their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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

    @property
    def reads(self) -> list[fx.Node]:
        """The values from outside that its nodes read, sizes left out."""
        read: dict[fx.Node, None] = {}
        for entry in self.nodes:
            fx.node.map_arg((entry.args, entry.kwargs), lambda source: read.setdefault(source))
        inside = {entry.node for entry in self.nodes}
        return [node for node in read if node not in inside and isinstance(node.meta.get("val"), Tensor)]


class Part(NamedTuple):
    """Which of a block's nodes a node is, or is a copy of."""

    block: KnownBlock
    place: int


def lowering(
    block: str,
    *,
    device: str,
    dtype: torch.dtype | None = None,
    prepare: Mapping[str, Function] | None = None,
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

    Raises:
        RuleError: there is no such block, or `prepare` names no parameter.

    Example::

        @fxbt.lowering("swiglu", device="cpu", prepare={"both": lambda gate, up: torch.cat([gate, up])})
        def swiglu(x, both):
            gate, up = F.linear(x, both).chunk(2, -1)
            return F.silu(gate) * up
    """
    if block not in FUSED:
        raise RuleError(f"lowering of {block!r}: expected one of fxbt.ops: {', '.join(FUSED)}")

    def register(function: Function) -> Function:
        made = Lowering(function, device, dtype, dict(prepare or {}))
        unknown = made.prepare.keys() - inspect.signature(function).parameters.keys()
        if unknown:
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
