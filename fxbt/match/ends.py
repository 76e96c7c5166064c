"""The ops that a formula can end with, which are the places to look for a match."""

from __future__ import annotations

from typing import Any

from .pointwise import ENDS
from .same_op import PERMUTATIONS, SHAPES
from .terms import Call, Either, Maybe, Pointwise, Product, Sum, children

ANY_OP = "any op"
GENERIC = {"normalize": {"layer_norm", "rms_norm"}, "activation": {ANY_OP}}
SUM_OPS = {"add", "sub", "rsub", "neg"}
PRODUCT_OPS = {"mul", "div", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "square", "mean", "norm"}


def ends_of(term: Any) -> set[str]:
    """The ops that a match of the term can end with."""
    match term:
        case Pointwise():
            return set(ENDS)
        case Either():
            return set().union(*(ends_of(option) for option in term.options))
        case Sum() | Product():
            wanted = [child for child in children(term) if not isinstance(child, Maybe)]
            left_alone = ends_of(wanted[0]) if len(wanted) == 1 and len(children(term)) > 1 else set()
            return left_alone | (SUM_OPS if isinstance(term, Sum) else PRODUCT_OPS)
        case Call():
            if term.op in GENERIC:
                return GENERIC[term.op]
            family = next((names for names in (SHAPES, PERMUTATIONS) if term.op in names), {term.op})
            return set(family) | {"sum": {"mean", "norm"}, "matmul": {"linear"}}.get(term.op, set())
    return {"slice", "getitem"}
