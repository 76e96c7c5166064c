"""Formulas as data: variables, calls, sums, products and choices, and functions on them."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

import torch

Where = Callable[[Any], bool]
_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def _term(cls: type[_T]) -> type[_T]:
    """A frozen dataclass that computes its hash once: patterns share parts, and equal parts are the same term."""
    made: Any = dataclass(frozen=True)(cls)
    structural = made.__hash__

    def __hash__(self: Any) -> int:
        known = self.__dict__.get("_hash")
        if known is None:
            known = self.__dict__["_hash"] = structural(self)
        return known

    made.__hash__ = __hash__
    return made


class Term:
    """A formula as data, compared by its parts."""


@dataclass(frozen=True)
class Equation:
    """The axis names of two operands and of their product; "..." stands for any number of further axes."""

    lhs: tuple[str, ...]
    rhs: tuple[str, ...]
    result: tuple[str, ...]

    @property
    def summed(self) -> set[str]:
        """The axes that the result lacks."""
        return {*self.lhs, *self.rhs} - {*self.result}

    def __str__(self) -> str:
        return f"{' '.join(self.lhs)}, {' '.join(self.rhs)} -> {' '.join(self.result)}"


@_term
class Variable(Term):
    """Any value; equal names are the same value."""

    name: str


@_term
class NumberVariable(Term):
    """A Python number in the graph."""

    name: str
    where: Where | None = None


@_term
class WeightVariable(Term):
    """A parameter, a buffer or a constant, or a value computed from these only."""

    name: str
    where: Where | None = None


@_term
class Call(Term):
    """A torch op. `open`: unwritten operands may be anything, so each such call is a value of its own."""

    op: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()
    open: int = 0


@_term
class Sum(Term):
    """constant + terms"""

    constant: float
    terms: tuple[Term, ...]


@_term
class Product(Term):
    """coefficient * factors ** exponents * (numbers of elements that reductions sum) ** exponents"""

    coefficient: float
    factors: tuple[tuple[Term, float], ...]
    counts: tuple[tuple[Term, float], ...] = ()


@_term
class Part(Term):
    """One of the `of` equal parts of a dim: `x.chunk(of, dim)[index]`"""

    source: Term
    index: int
    of: int
    dim: int


@_term
class Slice(Term):
    """source[..., start:stop:step] along one dim"""

    source: Term
    dim: int
    start: int
    stop: int | None
    step: int


@_term
class Either(Term):
    """The first of the options that matches."""

    options: tuple[Term, ...]


@_term
class Maybe(Term):
    """A term, or nothing in its place."""

    term: Term


@_term
class Pointwise(Term):
    """Anything that computes one of `functions` of `source` pointwise; `bound` gets the function's name."""

    functions: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...]
    source: Term
    bound: str = ""


@_term
class Contract(Term):
    """The sum of `lhs` * `rhs` over the axes that the result lacks, in any layout."""

    equation: Equation
    lhs: Term
    rhs: Term


@_term
class Softmax(Term):
    """The softmax of `source` over the axis `over`; `sink` is one more score per row, cut off afterwards."""

    source: Term
    over: str
    sink: Term | None = None


@_term
class Steps(Term):
    """`source`, then steps in any number and order; `bound` gets the list of steps."""

    source: Term
    bound: str


@_term
class ComputedFrom(Term):
    """Any value computed from `source`; each use is a value of its own."""

    source: Term
    serial: int = 0


@_term
class Size(Term):
    """`x.shape[dim]`: allowed only as a number that divides a sum."""

    source: Term
    dim: int


def children(term: Any) -> tuple[Any, ...]:
    """The direct parts of a term."""
    match term:
        case Call():
            return tuple(_terms_in((term.args, tuple(value for _, value in term.kwargs))))
        case Sum():
            return term.terms
        case Product():
            return tuple(factor for factor, _ in term.factors)
        case Either():
            return term.options
        case Maybe():
            return (term.term,)
        case Contract():
            return term.lhs, term.rhs
        case Softmax():
            return (term.source,) if term.sink is None else (term.source, term.sink)
        case Part() | Slice() | ComputedFrom() | Size() | Pointwise() | Steps():
            return (term.source,)
    return ()


def _terms_in(values: Any) -> Iterator[Term]:
    if isinstance(values, Term):
        yield values
    if isinstance(values, tuple):
        for value in values:
            yield from _terms_in(value)


def walk(term: Any) -> list[Term]:
    """A term and all its parts, each once."""
    found, waiting = {term: None}, [term]
    while waiting:
        parts = [part for part in children(waiting.pop()) if part not in found]
        found.update(dict.fromkeys(parts))
        waiting += parts
    return list(found)


def shared(term: Any) -> set[Term]:
    """The parts of a term, other than variables, that occur in it more than once."""
    counts = collections.Counter(part for whole in walk(term) for part in children(whole))
    leaves = (Variable, NumberVariable, WeightVariable)
    return {part for part, count in counts.items() if count > 1 and not isinstance(part, leaves)}


def inner_outputs(outputs: tuple[Term, ...]) -> set[Term]:
    """The outputs that are parts of other outputs."""
    parts = [set(walk(output)) - {output} for output in outputs]
    return {output for output in outputs if any(output in inner for inner in parts)}


@functools.cache
def names(term: Term) -> frozenset[str]:
    """The names of all variables, numbers and weights of a term."""
    leaves = (Variable, NumberVariable, WeightVariable)
    bound = {found.bound for found in walk(term) if isinstance(found, Pointwise | Steps)} - {""}
    return frozenset(found.name for found in walk(term) if isinstance(found, leaves)) | bound


@functools.cache
def _ops(term: Any) -> frozenset[Term]:
    """The different ops that a match of the term has; the longest alternative counts."""
    match term:
        case Either():
            return max((_ops(option) for option in term.options), key=len)
        case Variable() | NumberVariable() | WeightVariable():
            return frozenset()
    inner = frozenset().union(*(_ops(child) for child in children(term)))
    return inner if isinstance(term, Maybe | ComputedFrom) else inner | {term}


@dataclass
class Formula:
    """A pattern function run once: its outputs as terms, and the names they bind."""

    outputs: tuple[Term, ...]
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names = set().union(*(names(term) for term in self.outputs))
        self.size = len(frozenset().union(*map(_ops, self.outputs)))
        self.has_axes = any(isinstance(t, Contract | Softmax | Steps) for term in self.outputs for t in walk(term))
        self.ops = {t.op for term in self.outputs for t in walk(term) if isinstance(t, Call)}
