"""Writes a term as a formula: the "expected" part of a report."""

from __future__ import annotations

import math
from typing import Any

from .terms import (
    Call,
    ComputedFrom,
    Contract,
    Either,
    Maybe,
    NumberVariable,
    Part,
    Pointwise,
    Product,
    Size,
    Slice,
    Softmax,
    Steps,
    Sum,
    Term,
    Variable,
    WeightVariable,
)

WIDTH = 100  # characters of a formula; deeper parts of a longer one become "…"
DEPTHS = (*range(9, 2, -1), 2)


def formula(term: Any) -> str:
    """A term as a formula: the "expected" part of a report."""
    texts = (_text(term, depth) for depth in DEPTHS)
    return next((text for text in texts if len(text) <= WIDTH), _text(term, DEPTHS[-1]))


def _text(term: Any, depth: int) -> str:
    """The term down to some depth, with "…" for anything deeper."""
    match term:
        case Variable() | NumberVariable() | WeightVariable():
            return term.name
        case Term() if depth == 0:
            return "…"
        case Sum():
            parts = [_text(part, depth - 1) for part in term.terms]
            return " + ".join(parts + ([f"{term.constant:g}"] if term.constant else []))
        case Product():
            return _product_text(term, depth - 1)
        case Call():
            shown = [_text(arg, depth - 1) for arg in term.args]
            shown += [f"{key}={_text(value, depth - 1)}" for key, value in term.kwargs]
            return f"{term.op}({', '.join(shown)})"
        case Part():
            return f"{_text(term.source, depth - 1)}.chunk({term.of}, {term.dim})[{term.index}]"
        case Slice():
            ends = f"{term.start or ''}:{'' if term.stop is None else term.stop}:{term.step}"
            return f"{_text(term.source, depth - 1)}[dim {term.dim}, {ends}]"
        case Size():
            return f"{_text(term.source, depth - 1)}.shape[{term.dim}]"
        case Either():
            return " or ".join(dict.fromkeys(_text(option, depth) for option in term.options))
        case Maybe():
            return f"[{_text(term.term, depth)}]"
        case Pointwise():
            return f"{' or '.join(name for name, _ in term.functions)} of {_text(term.source, depth - 1)}"
        case Contract():
            return f"contract({term.equation}: {_text(term.lhs, depth - 1)}, {_text(term.rhs, depth - 1)})"
        case Softmax():
            return f"softmax({_text(term.source, depth - 1)} over {term.over})"
        case Steps():
            return f"{term.bound}({_text(term.source, depth - 1)})"
        case ComputedFrom():
            return f"from {_text(term.source, depth)}"
        case tuple():
            return f"({', '.join(_text(item, depth) for item in term)})"
        case float():
            return f"{term:g}"
    return str(term)


def _product_text(term: Product, depth: int) -> str:
    parts = [] if term.coefficient == 1 else [f"{term.coefficient:.6g}"]
    for factor, exponent in term.factors:
        text = _text(factor, depth)
        text = f"({text})" if isinstance(factor, Sum | Product | Either) else text
        parts.append(text if exponent == 1 else f"{text}^{exponent:g}")
    parts += [f"n^{exponent:g}" for _, exponent in term.counts]
    return " * ".join(parts) or f"{math.prod([term.coefficient]):g}"
