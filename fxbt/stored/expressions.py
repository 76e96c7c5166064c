"""Sizes as text: sympy expressions as nested lists, using only the functions named here.

`sympify` would execute what it reads. Numbers and exponents are bounded, because sympy computes with what it is given.
"""

from __future__ import annotations

import re
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean, BooleanFalse, BooleanTrue

from ..torch_compat import SIZE_FUNCTIONS
from .errors import Malformed, Unstorable, checked

_FUNCTIONS: dict[str, Any] = {
    **{kind.__name__: kind for kind in SIZE_FUNCTIONS},
    **{kind.__name__: kind for kind in (sympy.Add, sympy.Mul, sympy.Pow, sympy.And, sympy.Or, sympy.Not)},
    **{kind.__name__: kind for kind in (sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)},
}
_SYMBOL, _COUNT = re.compile(r"s[0-9]{1,6}"), re.compile(r"u[0-9]{1,6}")
_MOST = 2**63  # of a number's magnitude
_MOST_EXPONENT = 8
_MOST_ARGUMENTS = 64
_DEEPEST = 32


def written(expression: Any) -> Any:
    """An expression, or a plain number, as JSON data.

    Raises:
        Unstorable: it contains a function, symbol or number that has no text in files.

    Example:
        >>> written(sympy.Symbol("s0") * 2)
        ['Mul', 2, 's0']
    """
    if isinstance(expression, (bool, int)):
        return expression
    if isinstance(expression, (BooleanTrue, BooleanFalse)):
        return bool(expression)
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Symbol) and (is_symbol(expression.name) or is_count(expression.name)):
        return expression.name
    name = type(expression).__name__
    if _FUNCTIONS.get(name) is not type(expression):
        raise Unstorable(f"a size is computed as {expression}, with a {name} that files cannot hold")
    return [name, *map(written, expression.args)]


def read(text: Any, symbols: dict[str, sympy.Symbol], depth: int = 0) -> Any:
    """Reads what `written` wrote, with these symbols.

    Raises:
        Malformed: it is not one of fxbt's expressions.
    """
    if type(text) is bool:
        return sympy.true if text else sympy.false
    if type(text) is int:
        return sympy.Integer(_bounded(text))
    if type(text) is str:
        return _symbol(text, symbols)
    name, *arguments = checked(text, list) or [None]
    if type(name) is not str or name not in _FUNCTIONS or depth > _DEEPEST or len(arguments) > _MOST_ARGUMENTS:
        raise Malformed(f"the file has a size {str(text)[:80]} that fxbt never writes")
    values = [read(argument, symbols, depth + 1) for argument in arguments]
    if name == "Pow" and not (values[1:] and values[1].is_Integer and 0 <= values[1] <= _MOST_EXPONENT):
        raise Malformed(f"the file has a power with the exponent {values[-1]}")
    try:
        result = _FUNCTIONS[name](*values)
    except Exception as error:  # sympy's own errors, for arguments that no trace makes
        raise Malformed(f"{name} of {values}: {error}") from error
    if not isinstance(result, (sympy.Expr, Boolean)) or (result.is_Integer and abs(result) > _MOST):
        raise Malformed(f"{name} of {values}")
    return result


def is_symbol(name: Any) -> bool:
    """Whether a file may give a size this name."""
    return type(name) is str and _SYMBOL.fullmatch(name) is not None


def is_count(name: Any) -> bool:
    """Whether a file may call a size so that no input tells, such as the number of tokens."""
    return type(name) is str and _COUNT.fullmatch(name) is not None


def _bounded(number: int) -> int:
    if abs(number) > _MOST:
        raise Malformed(f"the file has a number of {number.bit_length()} bits")
    return number


def _symbol(name: str, symbols: dict[str, sympy.Symbol]) -> sympy.Symbol:
    if name not in symbols:
        raise Malformed(f"the file names a size {name[:80]} that no input has")
    return symbols[name]
