"""One engine that says op by op whether an axis is kept apart place by place, and where it goes.

A domain marks atoms (the batch; or the batch and the tokens of each mask) and gives the axes of an op's operands. The
engine answers where the marked atoms are in the result, or that the op computes along them: a `Flow`. The domain
decides what follows from it. See `padding.sequences` and `padding.transfer`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.blocks import ATTENTIONS
from ..graph.miss import Miss
from ..graph.node import argument, is_pure
from ..graph.opsets import CASTS, NEW_FILLED, WHOLE_AXIS
from .axes import (
    EQUATIONS,
    EXPANDS,
    IDENTITIES,
    PERMUTES,
    RESHAPES,
    UNIT_DIMS,
    Atom,
    Axes,
    Label,
    contraction_of,
    divided,
    fresh,
    permutation,
    sizes_of,
)

aten = torch.ops.aten

Labels = dict[int, Label]  # the dims, counted from the right, that hold marked atoms
Given = Mapping[fx.Node, Axes]  # the operands that have marked atoms


@dataclass(frozen=True)
class Flow:
    """What an op does with marked axes.

    `operands` are those whose marked axes reach the result, each with the result's dims that hold them; `axes` are the
    result's. If `mixes` says that the op computes along marked axes, the dims are the operands' own, and there are no
    `axes`. With `is_beside`, operands broadcast dim by dim to the result.
    """

    operands: dict[fx.Node, Labels]
    axes: Axes = ()
    mixes: str = ""
    is_beside: bool = False


@dataclass(frozen=True)
class Product:
    """A contraction: the letters of each side's dims, and the labels of the marked letters."""

    sides: list[tuple[fx.Node, Axes]]
    axes: Axes  # the letters of the result
    known: dict[Label, Label]
    is_along: bool  # it sums over marked axes

    @property
    def labels(self) -> Labels:
        """The labels of the result."""
        return self.beside(self.axes, self.known)

    def beside(self, axes: Axes, letters: Iterable[Label]) -> Labels:
        """The labels of these letters in a tensor whose dims have the letters `axes`."""
        marked = self.known.keys() & set(letters)
        return {dim - len(axes): self.known[letter] for dim, letter in enumerate(axes) if letter in marked}


class AxisTransfer:
    """The engine for one domain: the atoms it marks, and `what` messages call the things to keep apart.

    Example::

        batch = Atom(size)
        AxisTransfer("sequences", [batch]).carry(node, {source: ((batch,), *fresh(source)[1:])})
    """

    def __init__(self, what: str, marks: Iterable[Atom]) -> None:
        self.what = what
        self.marks = frozenset(marks)

    def carry(self, node: fx.Node, given: Given) -> Flow:
        """Where the marked axes of an op's operands are in its result.

        Raises:
            Miss: the op is not known to keep places apart, or it combines different axes.
        """
        is_pointwise = is_pure(node) and torch.Tag.pointwise in getattr(node.target, "tags", ())
        rule = RULES.get(node.target, pointwise if is_pointwise else None)
        if rule is None:
            raise self.unknown(node)
        return rule(self, node, {source: axes for source, axes in given.items() if self.labels(axes)})

    def unknown(self, node: fx.Node) -> Miss:
        """The Miss of an op that is not known to keep places apart."""
        return Miss(f"an op is not known to keep {self.what} apart", node=node)

    def labels(self, axes: Axes) -> Labels:
        """The dims that hold marked atoms."""
        return {dim - len(axes): label for dim, label in enumerate(axes) if not self.marks.isdisjoint(label)}

    def is_same(self, one: Labels, other: Labels) -> bool:
        """Whether labels agree; of axes merged with marked ones, only the size counts."""
        return one.keys() == other.keys() and all(self._key(one[dim]) == self._key(other[dim]) for dim in one)

    def _key(self, label: Label) -> list[Any]:
        key: list[Any] = []
        for is_marked, atoms in itertools.groupby(label, self.marks.__contains__):
            run = list(atoms)
            key += run if is_marked else [math.prod(atom.size for atom in run)]
        return key

    def merged(self, node: fx.Node, found: Iterable[Labels]) -> Labels:
        """The labels of a value whose parts have these labels.

        Raises:
            Miss: they disagree about a dim.
        """
        labels: Labels = {}
        for dim, label in (entry for other in found for entry in other.items()):
            if self._key(labels.setdefault(dim, label)) != self._key(label):
                raise Miss("an op combines different axes in one dim", node=node)
        return labels

    def axes(self, node: fx.Node, labels: Labels) -> Axes:
        """The axes of a node with these labels, new ones elsewhere. For several results: only the labels.

        Raises:
            Miss: it has no such dims.
        """
        ranks = {value.dim() for value in tensors_of(node)}
        if len(ranks) != 1 or any(-dim > max(ranks) for dim in labels):
            raise Miss("an op changes the rank", node=node)
        (rank,) = ranks
        others: Axes = fresh(node) if isinstance(node.meta["val"], Tensor) else ((),) * rank
        return tuple(labels.get(dim - rank, other) for dim, other in enumerate(others))

    def flow(self, node: fx.Node, operands: dict[fx.Node, Labels], is_beside: bool = False) -> Flow:
        """The flow of an op that keeps its operands' marked axes apart."""
        return Flow(operands, self.axes(node, self.merged(node, operands.values())), is_beside=is_beside)

    def alone(self, node: fx.Node, given: Given, source: Any) -> Labels:
        """The labels of the only operand an op works on; nothing else that it reads may have labels.

        Raises:
            Miss: another operand has labels, or the same operand in another place.
        """
        read: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), read.append)
        if [each for each in read if each in given] != [source]:
            raise self.unknown(node)
        return self.labels(given[source])

    def product(self, node: fx.Node, given: Given) -> Product:
        """The letters and labels of a matmul, bmm or einsum.

        Raises:
            Miss: it cannot be read, or it combines different axes.
        """
        read = contraction_of(node, fresh(node))
        if read is None or read.addend is not None:
            raise Miss("a product cannot be read", node=node)
        sides = [(read.lhs, read.lhs_axes), (read.rhs, read.rhs_axes)]
        known: dict[Label, Label] = {}
        for operand, axes in sides:
            for dim, label in self.labels(given.get(operand, ())).items():
                if self._key(known.setdefault(axes[dim], label)) != self._key(label):
                    raise Miss("an op combines different axes in one dim", node=node)
        return Product(sides, read.axes, known, any((atom,) in known for atom in read.contracted))


def tensors_of(node: fx.Node) -> list[Tensor]:
    """The tensors that a node returns."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [value for value in values if isinstance(value, Tensor)]


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are tensors."""
    return [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]


def _rank(node: Any) -> int:
    rank: int = tensors_of(node)[0].dim()
    return rank


def dim_of(node: fx.Node, rank: int) -> int:
    """The dim argument of an op, counted from the right; the first dim if there is none."""
    return (argument(node, "dim") or 0) % rank - rank


# --- ops on several operands ------------------------------------------------------------------------------------


def _labelled(transfer: AxisTransfer, given: Given) -> dict[fx.Node, Labels]:
    return {source: transfer.labels(axes) for source, axes in given.items()}


def pointwise(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """Pointwise ops: operands broadcast to the result."""
    return transfer.flow(node, _labelled(transfer, given), is_beside=True)


def concatenation(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """torch.cat along an axis that is not marked."""
    operands = _labelled(transfer, given)
    dim = dim_of(node, _rank(node))
    if any(dim in labels for labels in operands.values()):
        return Flow(operands, mixes="an op mixes")
    return transfer.flow(node, operands, is_beside=True)


def stack(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """torch.stack: the result has one more dim."""
    new = dim_of(node, _rank(node))
    operands = {
        source: {dim if dim > new else dim - 1: label for dim, label in labels.items()}
        for source, labels in _labelled(transfer, given).items()
    }
    return transfer.flow(node, operands, is_beside=True)


def gather(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """torch.gather and scatter along other axes, if all their tensors have equal sizes in the marked ones."""
    operands = _labelled(transfer, given)
    dim, sizes = dim_of(node, _rank(node)), [sizes_of(source) for source in tensor_inputs(node)]
    marked = {at for labels in operands.values() for at in labels}
    if dim in marked or any(size[at] != sizes[0][at] for size in sizes for at in marked):
        return Flow(operands, mixes="positions given as data select")
    return transfer.flow(node, operands, is_beside=True)


def contraction(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """matmul, bmm, einsum over axes that are not marked."""
    product = transfer.product(node, given)
    if product.is_along:
        return Flow(_labelled(transfer, given), mixes="a product sums over")
    operands = {operand: product.beside(product.axes, axes) for operand, axes in product.sides if operand in given}
    return Flow(operands, transfer.axes(node, product.labels))


def attention(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """Attention of (batch, heads, seq, head_dim) with masks and biases that broadcast to the scores."""
    operands = _labelled(transfer, given)
    is_along = any(dim in labels for labels in operands.values() for dim in (-2, -1))
    if is_along or argument(node, "dropout_p", 0.0):
        return Flow(operands, mixes="attention mixes")
    return transfer.flow(node, operands, is_beside=True)


# --- ops on one operand -----------------------------------------------------------------------------------------


def cast(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """A cast, which may read another operand's dtype."""
    source: Any = node.args[0]  # another operand gives only its dtype
    return transfer.flow(node, {source: transfer.labels(given[source])}) if source in given else Flow({})


def layout(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """A layout op, which moves the axes of its first operand."""
    source: Any = node.args[0]
    if source not in given:  # another operand gives only its shape
        return Flow({})
    axes = _moved(transfer, node, given[source])
    return Flow({source: transfer.labels(axes)}, axes)


def _moved(transfer: AxisTransfer, node: fx.Node, axes: Axes) -> Axes:
    if node.target in IDENTITIES:
        return axes
    if node.target in PERMUTES:
        return tuple(axes[dim] for dim in permutation(node))
    if node.target in EXPANDS:
        return transfer.axes(node, transfer.labels(axes))
    moved, splits = divided((atom for label in axes for atom in label), sizes_of(node))
    if not transfer.marks.isdisjoint(splits):
        raise Miss(f"a view splits the axis of {transfer.what}", node=node)
    return moved


def new(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """x.new_zeros(shape): reads only the dtype of x."""
    return Flow({})


def selection(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """torch.index_select: the same indices everywhere, or rows of a table for each place."""
    if node.args[0] in given:
        return Along(dims_of)(transfer, node, given)
    positions: Any = argument(node, "index")
    (label,) = transfer.alone(node, given, positions).values()
    return transfer.flow(node, {positions: {dim_of(node, _rank(node)): label}})


def index(transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
    """x[..., features] at positions along one dim that is not marked."""
    source: Any = node.args[0]
    positions: Any = node.args[1]
    labels, rank = transfer.alone(node, given, source), len(given[source])
    dims = [dim - rank for dim, at in enumerate(positions) if at is not None]
    if len(dims) != 1 or dims[0] in labels or _rank(node) != rank:
        return Flow({source: labels}, mixes="positions given as data select")
    return transfer.flow(node, {source: labels})


@dataclass(frozen=True)
class Along:
    """The rule of ops that compute along some dims of one operand (counted from the right), and keep or remove
    these."""

    dims: Callable[[fx.Node, int], Iterable[int]]  # of a node whose operand has this rank
    place: int = 0  # position of the operand
    mixes: str = "an op mixes"
    added: int = 0  # dims added at the right of the result

    def __call__(self, transfer: AxisTransfer, node: fx.Node, given: Given) -> Flow:
        source: Any = node.args[self.place]
        labels, rank = transfer.alone(node, given, source), len(given[source])
        dims = {dim % rank - rank for dim in self.dims(node, rank)}
        if not dims.isdisjoint(labels):
            return Flow({source: labels}, mixes=self.mixes)
        left = _rank(node) - self.added
        if left < rank and left != rank - len(dims):
            raise Miss("an op changes the rank", node=node)
        removed = dims if left < rank else set()
        return transfer.flow(
            node,
            {source: {dim - self.added + sum(gone > dim for gone in removed): each for dim, each in labels.items()}},
        )


def last(count: int) -> Callable[[fx.Node, int], Iterable[int]]:
    """The last `count` dims of an operand."""
    return lambda node, rank: range(-count, 0)


def dims_of(node: fx.Node, rank: int) -> list[int]:
    """The dims of reductions, scans, norms and parts."""
    if node.target in NORMS:
        return list(range(-len(argument(node, "normalized_shape")), 0))
    dim = argument(node, "dim", argument(node, "dims"))
    if dim is None or dim == []:
        return list(range(-rank, 0))
    if _is_whole_slice(node):
        return []
    return list(dim) if isinstance(dim, list | tuple) else [dim]


def _is_whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor or argument(node, "step", 1) != 1:
        return False
    start, end = argument(node, "start"), argument(node, "end")
    return start in (None, 0) and (end is None or (isinstance(end, int) and end == WHOLE_AXIS))


def repeated(node: fx.Node, rank: int) -> list[int]:
    """The dims that torch.Tensor.repeat repeats."""
    repeats: Any = node.args[1]
    return [dim for dim in range(-rank, 0) if repeats[dim] != 1]


def padded(node: fx.Node, rank: int) -> range:
    """The dims of F.pad: the last ones, with two numbers each."""
    return range(-(len(argument(node, "pad")) // 2), 0)


def added_to(node: fx.Node, rank: int) -> range:
    """The last dim of an addmm, as of a linear, if the addend is equal for all rows."""
    if _rank(node.args[0]) != 1:
        raise Miss("the addend of an addmm differs from row to row", node=node)
    return range(-1, 0)


def convolved(node: fx.Node, rank: int) -> range:
    """The channels of a convolution's ([batch,] channels, ...), and all other dims unless kernels and strides are 1."""
    kernel = argument(node, "weight").meta["val"].shape[2:]
    padding = argument(node, "padding")  # "same" or "valid" in some overloads
    is_unpadded = not isinstance(padding, str) and all(size == 0 for size in padding)
    is_per_place = is_unpadded and all(size == 1 for size in (*kernel, *argument(node, "stride")))
    channels = -1 - len(kernel)
    return range(channels, channels + 1 if is_per_place else 0)


def normed(node: fx.Node, rank: int) -> range:
    """The channels of a batch norm, and all dims while it is training."""
    return range(-rank, 0) if argument(node, "training") else range(1 - rank, 2 - rank)


# --- the table --------------------------------------------------------------------------------------------------

SHAPES_OF = {aten.reshape_as.default, aten.view_as.default}
LAYOUTS = RESHAPES | SHAPES_OF | UNIT_DIMS | PERMUTES | EXPANDS | IDENTITIES
UNTAGGED = {  # pointwise, although torch does not tag them so
    *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Tensor),
    *(aten.__and__.Tensor, aten.__and__.Scalar, aten.__or__.Tensor, aten.__or__.Scalar, aten.rsub.Tensor),
    *(aten.multiply.Tensor, aten.subtract.Tensor, aten.divide.Tensor, aten.floor_divide.default),
    *(aten.negative.default, aten.absolute.default, aten.hardswish.default, aten.log_sigmoid.default),
}
FILLS = {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default}
SELECTIONS = {
    *(aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.chunk.default),
    *(aten.split_with_sizes.default, aten.split.Tensor),
}
REDUCTIONS = {
    *(aten.sum.dim_IntList, aten.mean.dim, aten.prod.dim_int, aten.amax.default, aten.amin.default),
    *(aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.any.dim, aten.all.dim),
    *(aten.mean.default, aten.sum.default, aten.max.default, aten.min.default, aten.var.dim, aten.std.dim),
    *(aten.var.correction, aten.std.correction, aten.logsumexp.default, aten.linalg_vector_norm.default),
}
SCANS = {
    *(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default),
    *(aten.topk.default, aten.sort.default, aten.argsort.default, aten.glu.default, aten.flip.default),
    aten.repeat_interleave.self_int,
}
CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding),
}
POOLS: dict[Any, int] = {  # number of dims they pool over
    **dict.fromkeys((aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default), 1),
    **dict.fromkeys((aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default), 2),
}

Rule = Callable[[AxisTransfer, fx.Node, Given], Flow]
RULES: dict[Any, Rule] = {
    **dict.fromkeys(UNTAGGED | FILLS | {aten.dropout.default}, pointwise),
    **dict.fromkeys(CASTS, cast),
    **dict.fromkeys(LAYOUTS, layout),
    **dict.fromkeys(NEW_FILLED.keys() | {aten.new_empty.default}, new),
    **dict.fromkeys(EQUATIONS, contraction),
    **dict.fromkeys(SELECTIONS | NORMS | REDUCTIONS | SCANS, Along(dims_of)),
    **dict.fromkeys(CONVOLUTIONS, Along(convolved, mixes="a convolution mixes")),
    **{op: Along(last(count)) for op, count in POOLS.items()},
    **dict.fromkeys(ATTENTIONS, attention),
    aten.linear.default: Along(last(1), mixes="a product sums over"),
    aten.addmm.default: Along(added_to, place=1, mixes="a product sums over"),
    aten.embedding.default: Along(last(0), place=1, added=1),
    aten.cat.default: concatenation,
    aten.stack.default: stack,
    aten.gather.default: gather,
    aten.scatter.src: gather,
    aten.scatter.value: gather,
    aten.index.Tensor: index,
    aten.index_select.default: selection,
    aten.repeat.default: Along(repeated),
    aten.triu.default: Along(last(2)),
    aten.tril.default: Along(last(2)),
    aten.pad.default: Along(padded),
    aten.constant_pad_nd.default: Along(padded),
    aten.batch_norm.default: Along(normed, mixes="statistics over the batch mix"),
    aten.group_norm.default: Along(lambda node, rank: range(1 - rank, 0)),
    operator.getitem: Along(last(0)),
}
