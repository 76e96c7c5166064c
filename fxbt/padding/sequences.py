"""Proves op by op which axis of each value is the batch, so that a call can run in parts and join their outputs.

An op keeps sequences apart if it handles the batch axis index by index. Ops that sum, sort, count or look along it do
not, nor does an op that computes with the number of sequences.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..analysis.axes import EXPANDS, PERMUTES, RESHAPES, UNIT_DIMS, Atom, Axes, reduced, size_of, sizes_of
from ..analysis.axis_transfer import SELECTIONS, AxisTransfer, tensors_of
from ..graph.miss import Miss
from ..graph.opsets import CASTS

aten = torch.ops.aten

SHAPES = {  # ops that create values of a given shape, and the position of that argument
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default), 0),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), 1),
}
VIEWS = RESHAPES | UNIT_DIMS | PERMUTES | EXPANDS | SELECTIONS | {operator.getitem}
COUNTING = VIEWS - SELECTIONS | CASTS


@dataclass(frozen=True)
class Batch:
    """A graph whose inputs and outputs have the batch as their first axis, where they have it at all.

    Attributes:
        values_of_sizes: (bytes, how many values are so large), over the `symbols` of the inputs' sizes.
        returned_of_sizes: the bytes of the outputs.
        symbols: of the inputs' sizes, one after the other.
    """

    inputs: list[bool]
    outputs: list[bool]
    values_of_sizes: list[tuple[sympy.Expr, int]]
    returned_of_sizes: sympy.Expr
    symbols: list[sympy.Symbol]

    @staticmethod
    def symbols_of(inputs: Sequence[fx.Node]) -> list[sympy.Symbol]:
        """A symbol for each size of the inputs; one of its own for a number."""
        sizes = [size for node in inputs if isinstance(node.meta["val"], Tensor) for size in sizes_of(node)]
        return [size if size.is_Symbol else sympy.Dummy() for size in sizes]

    def values(self, *sizes: int) -> list[tuple[int, int]]:
        """(bytes, how many values are so large) for sizes of the inputs."""
        *found, _ = self._functions
        counts = [count for _, count in self.values_of_sizes]
        return [(int(nbytes(*sizes)), count) for nbytes, count in zip(found, counts, strict=True)]

    def returned(self, *sizes: int) -> int:
        """The bytes of the outputs for sizes of the inputs."""
        return int(self._functions[-1](*sizes))

    @functools.cached_property
    def _functions(self) -> list[Callable[..., Any]]:
        expressions = [*(nbytes for nbytes, _ in self.values_of_sizes), self.returned_of_sizes]
        return [_function(self.symbols, expression) for expression in expressions]


def batch_of(graph: fx.Graph) -> Batch:
    """The batch of a graph without side effects.

    Raises:
        Miss: there is no batch, or something may let sequences interact.
    """
    follower = _Follower(graph)
    for node in graph.nodes:
        if node.op == "call_function" and (axes := follower.follow(node)) is not None:
            follower.axes[node] = axes
    (returned,) = graph.find_nodes(op="output")[0].args
    outputs = [follower.is_joined(value) for value in returned]
    if not any(outputs):
        raise Miss("no output has a batch axis")
    inputs = [node in follower.axes for node in graph.find_nodes(op="placeholder")]
    return Batch(inputs, outputs, *follower.sizes(returned))


class _Follower:
    """Follows the axes of each value that has the batch through a graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._inputs = [node for node in graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], Tensor)]
        first = [sizes_of(node)[0] for node in self._inputs if node.meta["val"].dim()]
        symbols = [size for size in first if size.is_Symbol]
        if not symbols:
            raise Miss("no input has a first axis of symbolic size")
        self._symbol = symbols[0]
        self._atom = Atom(self._symbol)
        self._transfer = AxisTransfer("sequences", [self._atom])
        self._numbers: set[fx.Node] = set()  # values that count 0, 1, 2 ... along the batch; they may only select rows
        self.axes: dict[fx.Node, Axes] = {}
        for node in filter(self._has_batch, self._inputs):
            self.axes[node] = self._by_size(node)
            if self.axes[node][0] != (self._atom,):
                raise Miss("the batch is not the first axis of an input", node=node)
            self._check(node, self.axes[node])

    def follow(self, node: fx.Node) -> Axes | None:
        """The axes of an op's result; None if it does not have the batch."""
        given = {source: self.axes[source] for source in node.all_input_nodes if source in self.axes}
        if node.target is aten.sym_size.int or not (given or tensors_of(node)):
            return None
        if any(self._is_number_of_sequences(value) for value in self._sizes_read(node)):
            raise Miss("an op computes with the batch size", node=node)
        axes = self._carried(node, given) if given else ()
        if not axes and not self._has_batch(node):
            return None
        axes = axes or self._made(node)
        self._check(node, axes)
        return axes

    def _carried(self, node: fx.Node, given: dict[fx.Node, Axes]) -> Axes:
        """The axes that operands give the result; none if they give only a dtype or shape."""
        if node.target is aten.index.Tensor and not self._numbers.isdisjoint(given):
            return self._at_own_positions(node, given)
        flow = self._transfer.carry(node, given)
        if flow.mixes:
            raise Miss(f"{flow.mixes} sequences", node=node)
        if not self._numbers.isdisjoint(flow.operands):
            if node.target not in COUNTING:
                raise Miss("an op computes with the index of a sequence", node=node)
            self._numbers.add(node)
        return flow.axes

    def _at_own_positions(self, node: fx.Node, given: dict[fx.Node, Axes]) -> Axes:
        """x[rows, positions] with rows 0, 1, 2 ...: each sequence at positions of its own."""
        source: Any = node.args[0]
        positions: Any = node.args[1]
        at = {dim: value for dim, value in enumerate(positions) if value is not None}
        batch = [dim for dim, label in enumerate(given.get(source, ())) if label == (self._atom,)]
        rows = [dim for dim, value in at.items() if value in self._numbers]
        is_adjacent = list(at) == list(range(min(at), max(at) + 1))
        is_boolean = any(value.meta["val"].dtype is torch.bool for value in at.values())
        if source in self._numbers or not is_adjacent or not batch or rows != batch or is_boolean:
            raise Miss("positions given as data select sequences", node=node)
        behind = len(given[source]) - 1 - max(at)
        beside = [self._transfer.labels(given[value]) for value in at.values() if value in given]
        labels = self._transfer.merged(node, beside)
        return self._transfer.axes(node, {dim - behind: label for dim, label in labels.items()})

    def _made(self, node: fx.Node) -> Axes:
        """The axes of a value of batch size made from values without it: equal for all sequences, or their index."""
        if node.target is aten.arange.default:
            self._numbers.add(node)
        elif node.target not in SHAPES and node.target not in EXPANDS | {aten.repeat.default}:
            raise Miss("a value for each sequence does not come from the sequences", node=node)
        return self._by_size(node)

    def _by_size(self, node: fx.Node) -> Axes:
        """Takes as the batch the dim whose size is the batch size, or a multiple of it."""
        sizes = sizes_of(node)
        for dim, size in enumerate(sizes):
            inner = sympy.cancel(size / self._symbol)
            if self._symbol not in inner.free_symbols and inner.is_polynomial():
                label = (self._atom, *([] if inner == 1 else [Atom(inner)]))
                return self._transfer.axes(node, {dim - len(sizes): label})
        raise Miss("the batch is mixed with another axis", node=node)

    def _has_batch(self, node: fx.Node) -> bool:
        return any(
            self._symbol in size.free_symbols for value in tensors_of(node) for size in map(reduced, value.shape)
        )

    def _check(self, node: fx.Node, axes: Axes) -> None:
        """Checks that the batch size occurs only in the batch's own dim."""
        labels = self._transfer.labels(axes)
        for value in tensors_of(node):
            shown = {dim for dim in range(-value.dim(), 0) if self._symbol in size_of(value, dim).free_symbols}
            if len(labels) != 1 or shown != labels.keys():
                raise Miss("the batch is mixed with another axis", node=node)

    @staticmethod
    def _sizes_read(node: fx.Node) -> list[fx.Node]:
        """The sizes that an op reads for anything other than its result's shape."""
        if node.target in RESHAPES | EXPANDS | {aten.arange.default, aten.repeat.default}:
            return []
        shape: Any = SHAPES.get(node.target)  # type: ignore[call-overload]
        args = [value for place, value in enumerate(node.args) if place != shape]
        read: list[fx.Node] = []
        fx.node.map_arg([*args, *node.kwargs.values()], read.append)
        return [value for value in read if not tensors_of(value)]

    def _is_number_of_sequences(self, value: fx.Node) -> bool:
        number = value.meta.get("val")
        expr = number.node.expr if isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) else None
        return expr is not None and self._symbol in expr.free_symbols

    def is_joined(self, value: Any) -> bool:
        """Whether an output has the batch as its first axis; other outputs are equal for all parts."""
        if not isinstance(value, fx.Node):
            return False
        axes = self.axes.get(value)
        if value.op == "placeholder":
            raise Miss("an output is an input", node=value)
        if axes is None and self._is_number_of_sequences(value):
            raise Miss("an output contains the batch size", node=value)
        if axes is not None and (value in self._numbers or axes[0] != (self._atom,)):
            raise Miss("the batch is not the first axis of an output", node=value)
        return axes is not None

    def sizes(self, returned: Sequence[Any]) -> tuple[list[tuple[sympy.Expr, int]], sympy.Expr, list[sympy.Symbol]]:
        """What values take, those that are returned apart, over the symbols of the inputs' sizes."""
        out = {value for value in returned if isinstance(value, fx.Node) and value in self.axes}
        made = [node for node in self.axes if node.op == "call_function"]
        others = [node for node in made if node not in out and node.target not in VIEWS and len(tensors_of(node)) == 1]
        count = Counter(_bytes(node) for node in others)
        total, symbols = sum(map(_bytes, out), sympy.Integer(0)), Batch.symbols_of(self._inputs)
        if unknown := set().union(*(each.free_symbols for each in (*count, total))) - set(symbols):
            raise Miss("sizes that the inputs' do not tell", found=str(unknown))
        return list(count.items()), total, symbols


def _bytes(node: fx.Node) -> Any:
    (value,) = tensors_of(node)
    return math.prod(map(reduced, value.shape), start=sympy.Integer(value.element_size()))


def _function(symbols: list[Any], expression: Any) -> Callable[..., Any]:
    """The expression as a function; a symbol that is two sizes is passed twice."""
    # of equal symbols, the last one counts
    names = {symbol: sympy.Symbol(f"size{i}") for i, symbol in enumerate(symbols)}
    parameters = [sympy.Symbol(f"size{i}") for i in range(len(symbols))]
    modules: list[Any] = [{"FloorDiv": operator.floordiv, "Min": min, "Max": max}, "math"]
    return sympy.lambdify(parameters, expression.xreplace(names), modules)
