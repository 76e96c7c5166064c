"""The batch: which axis of each value it is, proven op by op, so that a call's outputs are those of its parts, joined.

An op keeps sequences apart that handles their axis place by place. One that sums, sorts, counts or looks along it does
not, nor one that computes with the number of sequences.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ..analysis.axes import (
    EQUATIONS,
    EXPANDS,
    IDENTITIES,
    PERMUTES,
    RESHAPES,
    UNIT_DIMS,
    Atom,
    atoms_of,
    contraction_of,
    fresh,
    leaves,
    permutation,
    regroup,
    size_of,
    sizes_of,
)
from ..graph.blocks import ATTENTIONS
from ..graph.miss import Miss
from ..graph.node import argument, is_pure
from ..graph.opsets import CASTS
from .transfer import FILLS, NORMS, REDUCTIONS, SCANS, SELECTIONS, SHAPES_OF, UNTAGGED, dims_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """Where the batch stands in a value: in `dim`, alone or with other axes (`label`)."""

    dim: int
    label: tuple[Atom, ...]
    counts: bool = False  # the value is 0, 1, 2 ... along it, which may pick rows and nothing else


@dataclass(frozen=True)
class Batch:
    """A graph whose inputs and outputs have the batch as their first axis, where they have it at all."""

    inputs: list[bool]
    outputs: list[bool]
    values: Callable[..., list[tuple[int, int]]]  # sizes of the inputs -> (bytes, how many values are so large)
    returned: Callable[..., int]  # sizes of the inputs -> bytes of the outputs


def batch_of(graph: fx.Graph) -> Batch:
    """The batch of a graph without side effects.

    Raises:
        Miss: there is none, or something may let sequences meet.
    """
    follower = _Follower(graph)
    for node in graph.nodes:
        if node.op == "call_function":
            follower.places[node] = follower.follow(node)
    (returned,) = graph.find_nodes(op="output")[0].args
    outputs = [follower.is_joined(value) for value in returned]
    if not any(outputs):
        raise Miss("no output has the batch")
    inputs = [follower.places.get(node) is not None for node in graph.find_nodes(op="placeholder")]
    values, in_returned = follower.sizes(returned)
    return Batch(inputs, outputs, values, in_returned)


class _Follower:
    """Goes through a graph with the place of the batch in each value; None where a value does not have it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._inputs = [node for node in graph.find_nodes(op="placeholder") if isinstance(node.meta["val"], Tensor)]
        first = [sizes_of(node)[0] for node in self._inputs if node.meta["val"].dim()]
        symbols = [size for size in first if size.is_Symbol]
        if not symbols:
            raise Miss("no input has a first axis of any size")
        self._symbol = symbols[0]
        self._atom = Atom(self._symbol)
        self.places: dict[fx.Node, Place | None] = {}
        for node in self._inputs:
            self.places[node] = self._by_size(node) if self._has_batch(node) else None
            if self.places[node] not in (None, Place(0, (self._atom,))):
                raise Miss("the batch is not the first axis of an input", node=node)

    def follow(self, node: fx.Node) -> Place | None:
        placed = {source: place for source in node.all_input_nodes if (place := self.places.get(source)) is not None}
        if node.target is aten.sym_size.int or (not placed and not self._is_tensor(node)):
            return None
        if any(self._is_number_of_sequences(value) for value in self._numbers(node)):
            raise Miss("an op computes with the number of sequences", node=node)
        if not placed:
            return self._made(node) if self._has_batch(node) else None
        place = self._handler(node)(self, node, placed)
        if place.counts and node.target not in COUNTING:
            raise Miss("an op computes with the number of a sequence", node=node)
        self._check(node, place)
        return place

    def _handler(self, node: fx.Node) -> Handler:
        if node.target in HANDLERS:
            return HANDLERS[node.target]
        if is_pure(node) and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return pointwise
        raise Miss("an op that is not known to keep sequences apart", node=node)

    def _made(self, node: fx.Node) -> Place:
        """Of a value with the batch's size, made of ones without: the same for each sequence, or its number."""
        if node.target in SHAPES or node.target in EXPANDS | {aten.repeat.default}:
            place = self._by_size(node)
        elif node.target is aten.arange.default:
            place = replace(self._by_size(node), counts=True)
        else:
            raise Miss("a value for each sequence that follows from none", node=node)
        self._check(node, place)
        return place

    def _by_size(self, node: fx.Node) -> Place:
        """The dim of the batch's size, or of that many times another one: what stands there once for each sequence."""
        for dim, size in enumerate(sizes_of(node)):
            inner = sympy.cancel(size / self._symbol)
            if self._symbol not in inner.free_symbols and inner.is_polynomial():
                return Place(dim, (self._atom, *([] if inner == 1 else [Atom(inner)])))
        return _NOWHERE

    def _has_batch(self, node: fx.Node) -> bool:
        return any(self._symbol in size.free_symbols for value in _tensors(node) for size in _sizes(value))

    def _check(self, node: fx.Node, place: Place) -> None:
        """The batch's size must show in its own dim alone."""
        for value in _tensors(node):
            for dim, size in enumerate(_sizes(value)):
                if (self._symbol in size.free_symbols) != (dim == place.dim):
                    raise Miss("the batch meets another axis", node=node)

    @staticmethod
    def _is_tensor(node: fx.Node) -> bool:
        return bool(_tensors(node))

    def _numbers(self, node: fx.Node) -> list[Any]:
        """The sizes that an op takes for other things than its result's shape."""
        if node.target in RESHAPES | EXPANDS | {aten.arange.default, aten.repeat.default}:
            return []
        shape: Any = SHAPES.get(node.target)  # type: ignore[call-overload]
        args = [value for place, value in enumerate(node.args) if place != shape]
        numbers: list[Any] = []
        fx.node.map_arg([*args, *node.kwargs.values()], numbers.append)
        return [value for value in numbers if not self._is_tensor(value)]

    def _is_number_of_sequences(self, value: fx.Node) -> bool:
        number = value.meta.get("val")
        expr = number.node.expr if isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool) else None
        return expr is not None and self._symbol in expr.free_symbols

    def is_joined(self, value: Any) -> bool:
        """Whether an output has the batch as its first axis; one that does not is the same for all parts."""
        if not isinstance(value, fx.Node):
            return False
        place = self.places.get(value)
        if value.op == "placeholder":
            raise Miss("an output is an input", node=value)
        if place is None and self._is_number_of_sequences(value):
            raise Miss("an output tells the number of sequences", node=value)
        if place is not None and (place.counts or place.dim != 0 or place.label != (self._atom,)):
            raise Miss("the batch is not the first axis of an output", node=value)
        return place is not None

    def sizes(self, returned: Sequence[Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """What values take, those that are returned apart, as functions of the inputs' sizes."""
        out = {value for value in returned if isinstance(value, fx.Node) and self.places.get(value)}
        made = [node for node, place in self.places.items() if place and node.op == "call_function"]
        others = [node for node in made if node not in out and node.target not in VIEWS and len(_tensors(node)) == 1]
        count = Counter(_bytes(node) for node in others)
        expressions = [*count, sum(map(_bytes, out), sympy.Integer(0))]
        symbols = [[size if size.is_Symbol else sympy.Dummy() for size in sizes_of(node)] for node in self._inputs]
        given = {symbol for sizes in symbols for symbol in sizes}
        if unknown := set().union(*(expression.free_symbols for expression in expressions)) - given:
            raise Miss("sizes that the inputs' do not tell", found=str(unknown))
        flat = [symbol for sizes in symbols for symbol in sizes]
        *found, last = (_function(flat, expression) for expression in expressions)
        counts = list(count.values())
        return lambda *at: [(int(f(*at)), n) for f, n in zip(found, counts, strict=True)], last


_NOWHERE = Place(-1, ())
Handler = Callable[[_Follower, fx.Node, dict[fx.Node, Place]], Place]


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [value for value in values if isinstance(value, Tensor)]


def _sizes(value: Tensor) -> list[Any]:
    return [size_of(value, dim) for dim in range(value.dim())]


def _bytes(node: fx.Node) -> Any:
    (value,) = _tensors(node)
    return math.prod(_sizes(value), start=sympy.Integer(value.element_size()))


def _function(symbols: list[Any], expression: Any) -> Callable[..., Any]:
    """The expression as a function; a symbol that stands for two sizes is given twice."""
    names = {symbol: sympy.Symbol(f"size{i}") for i, symbol in enumerate(symbols)}  # the last of equal ones
    parameters = [sympy.Symbol(f"size{i}") for i in range(len(symbols))]
    modules: list[Any] = [{"FloorDiv": operator.floordiv, "Min": min, "Max": max}, "math"]
    return sympy.lambdify(parameters, expression.xreplace(names), modules)


# --- how ops carry the batch on ---------------------------------------------------------------------------------


def _one(node: fx.Node, placed: dict[fx.Node, Place], position: int = 0) -> tuple[Any, Place]:
    """The one operand that has the batch, and where."""
    source: Any = node.args[position]
    if list(placed) != [source]:
        raise Miss("the batch meets another axis", node=node)
    return source, placed[source]


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def _kind(place: Place) -> tuple[Any, ...]:
    return (place.counts, *[atom.size for atom in leaves(place.label)])


def _beside(node: fx.Node, placed: dict[fx.Node, Place], rank: int) -> Place:
    """Of operands that stand beside each other, dim by dim from the last."""
    places = {replace(place, dim=place.dim - _rank(source) + rank) for source, place in placed.items()}
    kinds = {(place.dim, *_kind(place)) for place in places}
    if len(kinds) != 1:
        raise Miss("the batch meets another axis", node=node)
    return places.pop()


def pointwise(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    return _beside(node, placed, _rank(node))


def cast(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    if node.args[0] not in placed:
        raise Miss("the batch meets another axis", node=node)
    return placed[node.args[0]]  # type: ignore[index]


def layout(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    source: Any = node.args[0]
    if source not in placed and node.target in EXPANDS:  # to the shape of another value
        return follower._by_size(node)
    if source not in placed:
        raise Miss("the batch meets another axis", node=node)
    place = placed[source]
    if node.target in EXPANDS:
        return replace(place, dim=place.dim - _rank(source) + _rank(node))
    axes = (*fresh(source)[: place.dim], place.label, *fresh(source)[place.dim + 1 :])
    if node.target in PERMUTES:
        moved = tuple(axes[dim] for dim in permutation(node))
    elif node.target in IDENTITIES:
        moved = axes
    else:
        moved = regroup(atoms_of(axes), sizes_of(node))
    (batch,) = (atom for atom in leaves(place.label) if atom.size == follower._symbol)
    if batch is not follower._atom or batch.parts:
        raise Miss("a view splits the batch", node=node)
    dim = next(dim for dim, label in enumerate(moved) if follower._atom in label)
    return replace(place, dim=dim, label=moved[dim])


def along(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """Reductions, norms, scans, parts: along dims of which none is the batch's."""
    source, place = _one(node, placed)
    rank = _rank(source)
    dims = {dim % rank for dim in dims_of(node, rank)}
    if place.dim in dims:
        raise Miss("an op along the batch", node=node)
    left = _tensors(node)[0].dim()
    if left == rank:
        return place
    if left != rank - len(dims):
        raise Miss("an op changes the rank", node=node)
    return replace(place, dim=place.dim - sum(gone < place.dim for gone in dims))


def repetition(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    source, place = _one(node, placed)
    repeats: Any = node.args[1]
    dim = place.dim + len(repeats) - _rank(source)
    if repeats[dim] != 1:
        raise Miss("an op along the batch", node=node)
    return replace(place, dim=dim)


def linear(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    source, place = _one(node, placed)
    if place.dim == _rank(source) - 1:
        raise Miss("an op along the batch", node=node)
    return place


def embedding(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    return _one(node, placed, 1)[1]


def selection(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """torch.index_select: of each sequence the same, or rows of a table for each."""
    if node.args[0] in placed:
        return along(follower, node, placed)
    _, place = _one(node, placed, 2)
    return replace(place, dim=argument(node, "dim") % _rank(node))


def padded(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """F.pad: the last dims, a pair of numbers for each."""
    source, place = _one(node, placed)
    pads: Any = node.args[1]
    if place.dim >= _rank(source) - len(pads) // 2:
        raise Miss("an op along the batch", node=node)
    return place


def pooling(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """Of (batch, channels, ...): each dim but those of the image by itself."""
    _, place = _one(node, placed)
    if place.dim != 0:
        raise Miss("an op along the batch", node=node)
    return place


def matrices(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """triu, tril: over the last two dims."""
    source, place = _one(node, placed)
    if place.dim >= _rank(source) - 2:
        raise Miss("an op along the batch", node=node)
    return place


def images(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """Convolutions and norms of (batch, channels, ...)."""
    source, place = _one(node, placed)
    weight = argument(node, "weight")
    is_unbatched = node.target in CONVOLUTIONS and _rank(source) != _rank(weight)
    if place.dim != 0 or is_unbatched or argument(node, "training", False):
        raise Miss("an op along the batch", node=node)
    return place


def contraction(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """matmul, bmm, einsum: the batch beside itself, or on one side alone, and not summed over."""
    product = contraction_of(node, fresh(node))
    if product is None or product.addend is not None:
        raise Miss("a product that cannot be read", node=node)
    sides = [(product.lhs, product.lhs_axes), (product.rhs, product.rhs_axes)]
    found = {(axes[placed[side].dim], _kind(placed[side])) for side, axes in sides if side in placed}
    if len(found) != 1 or (letter := next(iter(found))[0]) not in product.axes:
        raise Miss("a product along the batch", node=node)
    place = next(iter(placed.values()))
    return replace(place, dim=product.axes.index(letter))


def concatenation(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    rank = _rank(node)
    place = _beside(node, placed, rank)
    if place.dim == (argument(node, "dim") or 0) % rank:
        raise Miss("an op along the batch", node=node)
    return place


def stack(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    rank = _rank(node)
    place = _beside(node, placed, rank - 1)
    return replace(place, dim=place.dim + (place.dim >= (argument(node, "dim") or 0) % rank))


def gather(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """torch.gather and scatter by an index that has the batch where all else has it."""
    rank = _rank(node)
    place = _beside(node, placed, rank)
    is_alone = any(source not in placed for source in node.all_input_nodes if _tensors(source))
    if is_alone or place.dim == argument(node, "dim") % rank:
        raise Miss("an op reads sequences at positions given as data", node=node)
    return place


def index(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """x[rows, positions]: each sequence at its own positions, rows being 0, 1, 2 ...; or x[..., positions]."""
    source: Any = node.args[0]
    positions: Any = node.args[1]
    given = {dim: at for dim, at in enumerate(positions) if at is not None}
    place, rows = placed.get(source), [at for at in given.values() if at in placed and placed[at].counts]
    if place is None or len(place.label) != 1:
        raise Miss("an op reads sequences at positions given as data", node=node)
    if len(given) == 1 and list(placed) == [source] and place.dim not in given and _rank(node) == _rank(source):
        return place
    first, rank = min(given), max(map(_rank, given.values()))
    is_adjacent = list(given) == list(range(first, first + len(given)))
    if not is_adjacent or rows != [given.get(place.dim)]:
        raise Miss("an op reads sequences at positions given as data", node=node)
    beside = {at: replace(placed[at], counts=False) for at in given.values() if at in placed}
    where = _beside(node, beside, rank)
    return replace(where, dim=first + where.dim)


def attention(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    """Of (batch, heads, seq, head_dim) under masks and biases that stand beside the scores."""
    place = _beside(node, placed, _rank(node))
    if place.dim >= _rank(node) - 2 or argument(node, "dropout_p", 0.0):
        raise Miss("an op along the batch", node=node)
    return place


def item(follower: _Follower, node: fx.Node, placed: dict[fx.Node, Place]) -> Place:
    return next(iter(placed.values()))


# --- the table --------------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding),
}
POOLS = {
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool1d.default, aten.avg_pool2d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
}
SHAPES = {  # ops that make values of a shape, and which argument that is
    **dict.fromkeys((aten.full.default, aten.zeros.default, aten.ones.default), 0),
    **dict.fromkeys((aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), 1),
}
VIEWS = RESHAPES | UNIT_DIMS | PERMUTES | EXPANDS | SELECTIONS | {operator.getitem}
COUNTING = VIEWS - SELECTIONS | CASTS

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(UNTAGGED | FILLS.keys(), pointwise),
    **dict.fromkeys(CASTS, cast),
    **dict.fromkeys(RESHAPES | SHAPES_OF | UNIT_DIMS | PERMUTES | EXPANDS | IDENTITIES, layout),
    **dict.fromkeys(SELECTIONS | NORMS | REDUCTIONS | SCANS, along),
    **dict.fromkeys(EQUATIONS, contraction),
    aten.sum.dim_IntList: along,
    aten.repeat.default: repetition,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten.triu.default: matrices,
    aten.tril.default: matrices,
    aten.cat.default: concatenation,
    aten.stack.default: stack,
    aten.gather.default: gather,
    aten.scatter.src: gather,
    aten.scatter.value: gather,
    aten.index_select.default: selection,
    aten.pad.default: padded,
    aten.constant_pad_nd.default: padded,
    aten.index.Tensor: index,
    aten.batch_norm.default: images,
    aten.group_norm.default: images,
    aten._native_batch_norm_legit_no_training.default: images,
    **dict.fromkeys(POOLS, pooling),
    **dict.fromkeys(CONVOLUTIONS, images),
    operator.getitem: item,
    **dict.fromkeys(ATTENTIONS, attention),
}
