"""The normal form of sums, products and powers: one flat term for all spellings that are equal for all real numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from ..errors import RuleError
from .formula_text import formula
from .terms import Call, Maybe, Product, Size, Sum, Term, walk

_T = TypeVar("_T")
Factors = list[tuple[Term, float]]


def total(*operands: Any) -> Term:
    """The flat sum of terms and numbers."""
    constant = 0.0
    terms: list[Term] = []
    for operand in operands:
        if isinstance(operand, Sum):
            constant += operand.constant
            terms += operand.terms
        elif isinstance(operand, Term):
            terms.append(operand)
        else:
            constant += literal(operand)
    if len(terms) == 1 and constant == 0:
        return terms[0]
    return Sum(constant, tuple(terms))


def product(*operands: Any) -> Term:
    """The flat product of terms and numbers, with equal factors merged into powers."""
    coefficient = 1.0
    factors: list[tuple[Term, float]] = []
    counts: list[tuple[Term, float]] = []
    for operand in operands:
        if isinstance(operand, Product):
            coefficient *= operand.coefficient
            counts += operand.counts
            factors += operand.factors
        elif isinstance(operand, Term):
            factors.append((operand, 1.0))
        else:
            coefficient *= literal(operand)
    factors, sizes = _divided_sizes(merge_powers(factors, is_sum_of_squares))
    counts += sizes
    if coefficient == 1 and not counts and [exponent for _, exponent in factors] == [1.0]:
        return factors[0][0]
    return Product(coefficient, tuple(factors), tuple(counts))


def merge_powers(factors: Iterable[tuple[_T, float]], is_nonnegative: Callable[[_T], bool]) -> list[tuple[_T, float]]:
    """Merges equal factors where that holds for all real numbers: not x / x at 0, nor sqrt(x) * sqrt(x)."""
    merged: list[tuple[_T, float]] = []
    for value, power in factors:
        for place, (known, inner) in enumerate(merged):
            whole = power == int(power) and inner == int(inner)
            same_domain = whole or is_nonnegative(value) or power + inner != int(power + inner)
            if known == value and power * inner > 0 and same_domain:
                merged[place] = (value, inner + power)
                break
        else:
            merged.append((value, power))
    return merged


def _divided_sizes(factors: Factors) -> tuple[Factors, Factors]:
    """The factors without sizes, and the counts: in sum(x, dim) / x.shape[dim], the size counts what the sum
    reduces."""
    counts: Factors = []
    for size, exponent in factors:
        if not isinstance(size, Size):
            continue
        reduction = next((factor for factor, _ in factors if _reduces(factor, size)), None)
        if reduction is None:
            raise RuleError(
                f"the pattern contains a size of {formula(size.source)}; "
                "a size may only divide a sum over that same dim"
            )
        counts.append((reduction, exponent))
    return [factor for factor in factors if not isinstance(factor[0], Size)], counts


def _reduces(term: Term, size: Size) -> bool:
    """Whether a term is the sum over exactly the dim of `size`."""
    return isinstance(term, Call) and term.op == "sum" and term.args[1] == (size.dim,) and size.source in walk(term)


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent; exponents multiply where that holds for all real numbers."""
    if not isinstance(exponent, int | float):
        raise RuleError(f"the exponent {formula(exponent)} of a power is not a number; write it as a literal")
    if not isinstance(base, Term):
        return literal(base) ** exponent
    if not isinstance(base, Product):
        return Product(1.0, ((base, float(exponent)),)) if exponent != 1 else base
    if not all(powers_multiply(inner, exponent, is_sum_of_squares(term)) for term, inner in base.factors):
        return Product(1.0, ((base, float(exponent)),))
    if base.coefficient < 0 and exponent != int(exponent):
        return Product(1.0, ((base, float(exponent)),))
    factors = tuple((term, inner * exponent) for term, inner in base.factors)
    counts = tuple((term, inner * exponent) for term, inner in base.counts)
    return product(Product(base.coefficient**exponent, factors, counts))


def powers_multiply(inner: float, outer: float, base_is_nonnegative: bool) -> bool:
    """Whether (x ** inner) ** outer equals x ** (inner * outer): not for the root of a square."""
    if base_is_nonnegative or outer == -1:
        return True
    return inner == int(inner) and outer == int(outer)


def is_sum_of_squares(term: Any) -> bool:
    """Whether a term is a sum of even powers, and so never negative."""
    if not isinstance(term, Call) or term.op != "sum" or not isinstance(term.args[0], Product):
        return False
    return all(exponent % 2 == 0 for _, exponent in term.args[0].factors) and term.args[0].coefficient >= 0


def literal(value: Any) -> float:
    """The number that a pattern writes.

    Raises:
        RuleError: it is not a number.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    if callable(value):
        raise RuleError(
            f"a pattern computes with {value!r}: call the method, or remove the attribute, which has no value in a "
            "pattern"
        )
    if not isinstance(value, int | float):
        raise RuleError(f"a pattern cannot compute with {value!r}; expected a number or a term")
    return float(value)


def times(factor: float, addend: Any) -> Term:
    """An addend times a factor; if the addend is optional and absent, the result is 0."""
    return Maybe(product(factor, addend.term)) if isinstance(addend, Maybe) else product(factor, addend)
