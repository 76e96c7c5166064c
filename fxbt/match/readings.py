"""The ways to read a value of a graph: as a product, a sum, a reduction or a slice.

A chain of additions is a sum of two terms or of three, a division a power of -1, a mean a sum with a coefficient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..analysis import axes
from ..graph.node import argument
from .naming import is_float_cast, op_of
from .normal_form import merge_powers, powers_multiply

aten = torch.ops.aten
LAYOUT = axes.RESHAPES | axes.UNIT_DIMS | axes.IDENTITIES | axes.PERMUTES | axes.EXPANDS
CLOSE = 1e-6  # relative; constants in model code have seven digits or more


def is_close(a: float, b: float) -> bool:
    """Whether two numbers are equal to seven digits."""
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-30)


@dataclass(frozen=True)
class Powers:
    """coefficient * values ** exponents; `through` are the nodes that this reading passes."""

    coefficient: float
    factors: tuple[tuple[Any, float], ...]
    through: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Addends:
    """constant + coefficients * values"""

    constant: float
    terms: tuple[tuple[float, Any], ...]
    through: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Reduced:
    """The sum (or if `averaged`, the mean) of `source` over dims, as `node` computes it."""

    node: fx.Node
    source: Any
    averaged: bool

    @property
    def count(self) -> int | None:
        """How many elements are summed; None if that is symbolic."""
        value = self.node.args[0].meta["val"]  # type: ignore[union-attr]
        sizes = [value.shape[dim] for dim in reduced_dims(self.node)]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def reduced_dims(node: fx.Node) -> list[int]:
    """The dims that a reduction reduces, as nonnegative ints in ascending order."""
    dims: Any = argument(node, "dim")
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims = range(rank) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    return sorted(dim % rank for dim in dims)


def product_cuts(value: Any, limit: int) -> Iterator[Powers]:
    """The readings of a value as a product of at most `limit` factors, starting with the value as the only factor."""
    if isinstance(value, Powers):
        yield from _all_cuts(value, limit)
        return
    if isinstance(value, int | float):
        yield Powers(float(value), ())
        return
    yield Powers(1.0, ((value, 1.0),))
    op = op_of(value)
    if op in ("mul", "div"):
        yield from _binary_cuts(value, -1.0 if op == "div" else 1.0, limit)
    elif op in EXPONENTS:
        yield from _power_cuts(value, value.args[0], EXPONENTS[op], limit)
    elif op == "pow" and isinstance(value.args[1], int | float):
        yield from _power_cuts(value, value.args[0], float(value.args[1]), limit)
    elif op == "neg" or is_float_cast(value):
        sign = -1.0 if op == "neg" else 1.0
        for cut in product_cuts(value.args[0], limit):
            yield Powers(sign * cut.coefficient, cut.factors, cut.through | {value})
    elif op == "mean" and argument(value, "dtype") is None:
        yield Powers(1.0, ((Reduced(value, value.args[0], True), 1.0),), frozenset({value}))
    elif op == "norm" and argument(value, "ord") == 2 and argument(value, "dtype") is None:
        squares = Powers(1.0, ((value.args[0], 2.0),))
        yield Powers(1.0, ((Reduced(value, squares, False), 0.5),), frozenset({value}))


def keeps_elements(value: Any) -> bool:
    """Whether a node only changes its input's layout, or applies dropout to it."""
    return isinstance(value, fx.Node) and (value.target in LAYOUT or value.target is aten.dropout.default)


EXPONENTS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}


def _binary_cuts(node: fx.Node, exponent: float, limit: int) -> Iterator[Powers]:
    if node.kwargs.get("rounding_mode") is not None:
        return
    for lhs in product_cuts(node.args[0], limit):
        for rhs in product_cuts(node.args[1], limit - len(lhs.factors)):
            if len(lhs.factors) + len(rhs.factors) > limit or rhs.coefficient == 0:
                continue
            inverse = tuple((value, exponent * power) for value, power in rhs.factors)
            coefficient = lhs.coefficient * rhs.coefficient**exponent
            yield _merged(Powers(coefficient, lhs.factors + inverse, lhs.through | rhs.through | {node}))


def _power_cuts(node: fx.Node, base: Any, exponent: float, limit: int) -> Iterator[Powers]:
    for cut in product_cuts(base, limit):
        raised = _raised(cut, exponent)
        if raised is not None:
            yield replace(raised, through=cut.through | {node})


def _raised(cut: Powers, exponent: float) -> Powers | None:
    """A reading raised to a power, if exponents multiply for all numbers; a single factor of power 1 always does."""
    if [power for _, power in cut.factors] != [1.0] or cut.coefficient != 1:
        if not all(powers_multiply(power, exponent, _is_nonnegative(value)) for value, power in cut.factors):
            return None
        if cut.coefficient <= 0 and exponent != int(exponent):
            return None
    factors = tuple((value, power * exponent) for value, power in cut.factors)
    return Powers(cut.coefficient**exponent, factors, cut.through)


def _is_nonnegative(value: Any) -> bool:
    return isinstance(value, Reduced) and isinstance(value.source, Powers)


def _merged(cut: Powers) -> Powers:
    """Merges equal factors into powers."""
    return replace(cut, factors=tuple(merge_powers(cut.factors, _is_nonnegative)))


def _all_cuts(powers: Powers, limit: int) -> Iterator[Powers]:
    readings = [[_raised(cut, power) for cut in product_cuts(value, limit)] for value, power in powers.factors]
    for chosen in itertools.product(*readings):
        if any(cut is None for cut in chosen):
            continue
        cuts = [cut for cut in chosen if cut is not None]
        factors = tuple(factor for cut in cuts for factor in cut.factors)
        through = powers.through.union(*(cut.through for cut in cuts))
        if len(factors) <= limit:
            yield _merged(Powers(powers.coefficient * math.prod(c.coefficient for c in cuts), factors, through))


def sum_cuts(value: Any, limit: int, loose: bool = False) -> Iterator[Addends]:
    """The readings of a value as a sum of at most `limit` terms and a number; `loose` ignores layout ops."""
    if isinstance(value, int | float):
        yield Addends(float(value), ())
        return
    if limit < 1:
        return
    yield Addends(0.0, ((1.0, value),))
    op = op_of(value)
    if op in ("add", "sub", "rsub"):
        yield from _binary_sums(value, limit, loose)
    elif op == "neg" or is_float_cast(value) or (loose and keeps_elements(value)):
        for cut in sum_cuts(value.args[0], limit, loose):
            yield _scaled(cut, -1.0 if op == "neg" else 1.0, value)


def _scaled(cut: Addends, factor: float, node: fx.Node) -> Addends:
    terms = tuple((factor * coefficient, value) for coefficient, value in cut.terms)
    return Addends(factor * cut.constant, terms, cut.through | {node})


def _binary_sums(node: fx.Node, limit: int, loose: bool) -> Iterator[Addends]:
    alpha: Any = argument(node, "alpha", 1)
    if node.meta["val"].dtype is torch.bool or not isinstance(alpha, int | float):
        return  # a sum of booleans is their "or"
    first, second = (1.0, float(alpha)) if op_of(node) == "add" else (1.0, -float(alpha))
    if op_of(node) == "rsub":
        first, second = -float(alpha), 1.0
    left_for_lhs = limit if isinstance(node.args[1], int | float) else limit - 1
    for lhs in sum_cuts(node.args[0], left_for_lhs, loose):
        for rhs in sum_cuts(node.args[1], limit - len(lhs.terms), loose):
            left, right = _scaled(lhs, first, node), _scaled(rhs, second, node)
            yield Addends(left.constant + right.constant, left.terms + right.terms, left.through | right.through)


def plain(value: Any) -> Any:
    """The value itself, if a product consists of one value to the power of one."""
    is_single = isinstance(value, Powers) and value.coefficient == 1 and [e for _, e in value.factors] == [1.0]
    return value.factors[0][0] if is_single else value


def is_same(a: Any, b: Any) -> bool:
    """Whether two values are the same: one node, perhaps in another precision, or close numbers."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return _uncast(a) is _uncast(b)
    return isinstance(a, int | float) and isinstance(b, int | float) and is_close(a, b)


def _uncast(node: fx.Node) -> fx.Node:
    """The node behind casts that round nothing: to a dtype that holds every value of the dtype before."""
    while is_float_cast(node):
        source: Any = node.args[0]
        dtype = node.meta["val"].dtype
        if torch.promote_types(source.meta["val"].dtype, dtype) != dtype:
            break
        node = source
    return node


def slice_of(node: Any) -> tuple[fx.Node, int, int, int, int] | None:
    """(source, dim, start, stop, step) of a node that is a slice, however it is written; else None."""
    if not isinstance(node, fx.Node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    source: Any = node.args[0]
    if node.target is aten.slice.Tensor:
        dim, rank = argument(node, "dim"), source.meta["val"].dim()
        total = source.meta["val"].shape[dim % rank]
        start, stop, step = argument(node, "start") or 0, argument(node, "end"), argument(node, "step")
        if not all(isinstance(number, int) for number in (total, start, step, stop or 0)):
            return None
        return source, dim % rank, *slice(start, stop, step).indices(total)
    if op_of(node) != "getitem" or op_of(source) not in ("split", "split_with_sizes", "chunk"):
        return None
    whole: Any = source.args[0]
    dim = argument(source, "dim") % whole.meta["val"].dim()
    sizes = [part.shape[dim] for part in source.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    index: Any = node.args[1]
    start = sum(sizes[:index])
    return whole, dim, start, start + sizes[index], 1
