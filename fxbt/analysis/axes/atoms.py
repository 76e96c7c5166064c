"""Atoms (indivisible axes), the sizes of a value's dims, and views, which redistribute atoms over dims."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx

from ...graph.miss import Miss
from ...torch_compat import FloorDiv, Min


class Atom:
    """One axis of symbolic size; `parts` are set once a view has split it."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Any):
        self.size = sympy.sympify(size)
        self.parts: tuple[Atom, ...] = ()

    def __repr__(self) -> str:
        return f"Atom({self.size})"


Label = tuple[Atom, ...]  # the atoms of one dim
Axes = tuple[Label, ...]
Splits = dict[Atom, tuple[Atom, Atom]]  # the parts of atoms that a view splits


def leaves(label: Iterable[Atom]) -> Label:
    """The label with split atoms replaced by their parts."""
    flat: list[Atom] = []
    for atom in label:
        flat.extend(leaves(atom.parts) if atom.parts else (atom,))
    return tuple(flat)


def resolve(axes: Axes) -> Axes:
    """The axes with split atoms replaced by their parts."""
    return tuple(leaves(label) for label in axes)


def atoms_of(axes: Axes) -> Label:
    """All atoms of a value in row-major order."""
    return tuple(atom for label in axes for atom in leaves(label))


def is_constant_along(axes: Axes, axis: Iterable[Atom]) -> bool:
    """Whether a value with the labels `axes` is constant along `axis`, that is, has no part of it.

    Example::

        fxbt.axes.is_constant_along(factor_axes, keys)  # a factor for each query
    """
    return not set(atoms_of(axes)) & set(leaves(axis))


def size_of(value: torch.Tensor, dim: int) -> Any:
    """The size of a dim as a sympy expression, reduced by what the shape environment knows."""
    return reduced(value.shape[dim])


def reduced(size: int | torch.SymInt) -> Any:
    """A size or stride as a sympy expression, reduced by what the shape environment knows.

    An expression whose value range contains a single number (`1 - Max(0, 1 - s)`) becomes that number.
    """
    if not isinstance(size, torch.SymInt):
        return sympy.Integer(size)
    shape_env = size.node.shape_env
    expr = shape_env.replace(size.node.expr)
    known = _REDUCED.setdefault(shape_env, {}).get(expr)
    if known is None or not known.holds(shape_env):
        known = _REDUCED[shape_env][expr] = _Reduced.of(expr, shape_env)
    return known.size


class _Reduced(NamedTuple):
    """A reduced size, and what it rests on besides the expression. A graph has few sizes, each asked for often."""

    size: Any
    guards: int
    ranges: tuple[tuple[sympy.Symbol, Any], ...]

    @classmethod
    def of(cls, expr: Any, shape_env: Any) -> _Reduced:
        size = _reduced(expr, shape_env)
        symbols = expr.free_symbols | size.free_symbols
        return cls(
            size, len(shape_env.guards), tuple((symbol, shape_env.var_to_range.get(symbol)) for symbol in symbols)
        )

    def holds(self, shape_env: Any) -> bool:
        """Whether the environment knows no more than then; a range that it narrows becomes another object."""
        ranges = shape_env.var_to_range
        return self.guards == len(shape_env.guards) and all(
            ranges.get(symbol) is known for symbol, known in self.ranges
        )


_REDUCED: WeakKeyDictionary[Any, dict[Any, _Reduced]] = WeakKeyDictionary()


def _reduced(expr: Any, shape_env: Any) -> Any:
    expr = expr.replace(FloorDiv, _quotient)
    if expr.has(Min):
        expr = expr.xreplace(_proven_minima(shape_env, len(shape_env.guards)))
        expr = expr.replace(Min, functools.partial(_smallest, shape_env))
    bounds = shape_env.bound_sympy(expr)
    return sympy.Integer(int(bounds.lower)) if bounds.is_singleton() else expr


@functools.lru_cache(maxsize=4)
def _proven_minima(shape_env: Any, guards: int) -> dict[Any, Any]:
    """What guards say about minima: min(16, s) == s after a table of 16 rows, cut to s, met an axis of s.

    Also about expressions of them: min(15, s) + min(15, s + 1) - 1 == 2 * s.
    """
    equal = [guard.expr.replace(FloorDiv, _quotient) for guard in shape_env.guards if isinstance(guard.expr, sympy.Eq)]
    sides = [(fact.lhs, fact.rhs) for fact in equal if isinstance(fact, sympy.Eq)]
    sides += [(rhs, lhs) for lhs, rhs in sides]
    return {lhs: rhs for lhs, rhs in sides if lhs.has(Min) and not rhs.has(Min, FloorDiv)}


def _smallest(shape_env: Any, *sizes: Any) -> Any:
    """min(16, s) -> s if s is known to be at most 16."""
    for size in sizes:
        others = [other for other in sizes if other is not size]
        if all(shape_env.bound_sympy(size).upper <= shape_env.bound_sympy(other).lower for other in others):
            return size
    return Min(*sizes)


def _quotient(size: Any, divisor: Any) -> Any:
    """(s**2) // s -> s, which reshapes with -1 infer."""
    whole = _divides(divisor, size)
    return FloorDiv(size, divisor) if whole is None else whole


def sizes_of(node: fx.Node) -> list[Any]:
    """The sizes of a node's dims as sympy expressions."""
    value = node.meta["val"]
    return [size_of(value, dim) for dim in range(value.dim())]


def fresh(node: fx.Node) -> Axes:
    """New atoms for every dim of a node."""
    return tuple(label_of(size) for size in sizes_of(node))


def label_of(size: Any) -> Label:
    """A new atom for a dim of this size; none for size one."""
    return () if size == 1 else (Atom(size),)


def _divides(divisor: Any, size: Any) -> Any | None:
    """size / divisor if that is an integer for all sizes, else None."""
    if divisor == size:
        return sympy.Integer(1)
    if divisor.is_Integer and size.is_Integer:
        return size // divisor if size % divisor == 0 else None
    quotient = sympy.cancel(size / divisor)
    numerator, denominator = quotient.as_numer_denom()
    return numerator if denominator == 1 else None


def divided(atoms: Iterable[Atom], sizes: Sequence[Any]) -> tuple[Axes, Splits]:
    """Distributes atoms in row-major order over dims of the given sizes; returns the dims and the atoms they split.

    The atoms themselves do not change: only the second result says what a split atom became.

    Raises:
        Miss: the dims do not fall on boundaries of axes.

    Example::

        hidden = Atom(32)
        (heads, head_dim), splits = divided([hidden], [4, 8])  # splits: {hidden: heads + head_dim}
    """
    waiting = list(leaves(atoms))[::-1]
    axes: list[Label] = []
    splits: Splits = {}
    for size in map(sympy.sympify, sizes):
        label: list[Atom] = []
        missing = size
        while missing != 1:
            if not waiting:
                raise Miss("a view cuts across the axes", expected=f"atoms for a dim of size {size}")
            atom = waiting.pop()
            if (rest := _divides(atom.size, missing)) is not None:
                label.append(atom)
                missing = rest
            elif (inner := _divides(missing, atom.size)) is not None:
                splits[atom] = (Atom(missing), Atom(inner))
                label.append(splits[atom][0])
                waiting.append(splits[atom][1])
                missing = sympy.Integer(1)
            else:
                raise Miss(
                    "a view cuts across the axes",
                    expected=f"a dim of {missing}",
                    found=f"an axis of {atom.size}",
                )
        axes.append(tuple(label))
    if waiting:
        raise Miss("a view cuts across the axes", found=f"axes left over: {waiting}")
    return tuple(axes), splits


def regroup(atoms: Iterable[Atom], sizes: Sequence[Any]) -> Axes:
    """Like `divided`, and applies the splits to the atoms, so that all values with these atoms see them.

    Raises:
        Miss: the dims do not fall on boundaries of axes; then no atom is split.
    """
    axes, splits = divided(atoms, sizes)
    for atom, parts in splits.items():
        atom.parts = parts
    return axes
