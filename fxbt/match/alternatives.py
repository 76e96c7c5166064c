"""A sum or a product with optional operands and alternatives, as each of the terms that it stands for."""

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
    """The names that every match binds: not those of optional terms or of one alternative alone."""
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
    """The term with each optional operand present, then absent, and each alternative in its place."""
    operands = list(children(term))
    place = next((i for i, operand in enumerate(operands) if isinstance(operand, Maybe | Either)), None)
    if place is None:
        yield term
        return
    choice: Any = operands[place]
    for option in (choice.term, None) if isinstance(choice, Maybe) else choice.options:
        yield from variants(_with_operand(term, place, option))


def single_factor(term: Product) -> Term | None:
    """The factor that is left alone where optional ones are absent."""
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
    """The exponent of each term, added up where one stands among the factors more than once."""
    summed: dict[Term, float] = {}
    for term, exponent in powers:
        summed[term] = summed.get(term, 0.0) + exponent
    return summed
