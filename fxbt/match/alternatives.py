"""Expands a sum or product with optional operands and alternatives into the terms it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from .terms import (
    Either,
    Maybe,
    NumberVariable,
    Pointwise,
    Product,
    Steps,
    Sum,
    Term,
    Variable,
    WeightVariable,
    children,
)


def always_bound(terms: Iterable[Any]) -> set[str]:
    """The names that every match binds, so not those in optional terms or in only one alternative."""
    bound: set[str] = set()
    for term in terms:
        match term:
            case Variable() | NumberVariable() | WeightVariable():
                bound.add(term.name)
            case Pointwise() | Steps():
                bound |= always_bound(children(term)) | ({term.bound} - {""})
            case Maybe():
                continue
            case Either():
                bound |= set.intersection(*(always_bound([option]) for option in term.options))
            case _:
                bound |= always_bound(children(term))
    return bound


def variants(term: Sum | Product) -> Iterator[Any]:
    """The term with each optional operand present, then absent, and with each alternative."""
    operands = list(children(term))
    place = next((i for i, operand in enumerate(operands) if isinstance(operand, Maybe | Either)), None)
    if place is None:
        yield term
        return
    choice: Any = operands[place]
    for option in (choice.term, None) if isinstance(choice, Maybe) else choice.options:
        yield from variants(_with_operand(term, place, option))


def single_factor(term: Product) -> Term | None:
    """The factor that remains if all optional ones are absent; None if it is not a single plain factor."""
    is_single = term.coefficient == 1 and not term.counts and [exponent for _, exponent in term.factors] == [1.0]
    return term.factors[0][0] if is_single else None


def _with_operand(term: Sum | Product, place: int, option: Term | None) -> Any:
    if isinstance(term, Sum):
        inner = () if option is None else option.terms if isinstance(option, Sum) else (option,)
        constant = term.constant + (option.constant if isinstance(option, Sum) else 0.0)
        return Sum(constant, term.terms[:place] + inner + term.terms[place + 1 :])
    exponent = term.factors[place][1]
    before, after = term.factors[:place], term.factors[place + 1 :]
    if option is None:
        return replace(term, factors=before + after)
    if isinstance(option, Product) and exponent == 1:
        merged = before + option.factors + after
        return Product(term.coefficient * option.coefficient, merged, term.counts + option.counts)
    return replace(term, factors=(*before, (option, exponent), *after))


def summed_exponents(powers: Iterable[tuple[Term, float]]) -> dict[Term, float]:
    """The summed exponent of each term, where a term occurs several times among the factors."""
    summed: dict[Term, float] = {}
    for term, exponent in powers:
        summed[term] = summed.get(term, 0.0) + exponent
    return summed
