"""The pattern language: formulas over variables, written with Python operators and torch functions.

A pattern function runs once on `Expression`s. Every operator and torch function applied to one returns a larger
expression, whose term is already in normal form: sums and products are flat, powers are exponents, sizes and casts are
dropped. `matcher.py` compares terms with graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import RuleError
from ..graph.blocks import FUSED
from .formula_text import formula
from .normal_form import power, product, times, total
from .terms import (
    Call,
    ComputedFrom,
    Contract,
    Either,
    Equation,
    Maybe,
    NumberVariable,
    Pointwise,
    Size,
    Softmax,
    Steps,
    Term,
    Variable,
    WeightVariable,
    Where,
)
from .torch_functions import apply, functional, slice_term

_serial = itertools.count(1)


def term_of(value: Any) -> Any:
    """The term of an expression; other values stay, and expressions inside lists, tuples and dicts become terms."""
    if isinstance(value, Expression):
        return value.term
    if isinstance(value, list | tuple):
        return tuple(map(term_of, value))
    return {key: term_of(item) for key, item in value.items()} if isinstance(value, dict) else value


def _expression(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_expression, value))
    return Expression(value) if isinstance(value, Term) else value


def _applied(name: str, *args: Any, **kwargs: Any) -> Any:
    return _expression(apply(name, *term_of(args), **term_of(kwargs)))


@dataclass(frozen=True)
class Expression:
    """A value inside a pattern: a term that supports torch functions and tensor methods."""

    term: Term

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _expression(functional(func, term_of(args), term_of(kwargs or {})))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _applied(name, self, *args, **kwargs)

    def __add__(self, other: Any) -> Expression:
        return Expression(total(self.term, term_of(other)))

    def __sub__(self, other: Any) -> Expression:
        return Expression(total(self.term, times(-1.0, term_of(other))))

    def __rsub__(self, other: Any) -> Expression:
        return Expression(total(term_of(other), product(-1.0, self.term)))

    def __mul__(self, other: Any) -> Expression:
        return Expression(product(self.term, term_of(other)))

    def __truediv__(self, other: Any) -> Expression:
        return Expression(product(self.term, power(term_of(other), -1)))

    def __rtruediv__(self, other: Any) -> Expression:
        return Expression(product(term_of(other), power(self.term, -1)))

    def __pow__(self, exponent: Any) -> Expression:
        return Expression(power(self.term, term_of(exponent)))

    def __matmul__(self, other: Any) -> Expression:
        return _applied("matmul", self, other)

    def __neg__(self) -> Expression:
        return Expression(product(-1.0, self.term))

    def __gt__(self, other: Any) -> Expression:
        return _applied("gt", self, other)

    def __ge__(self, other: Any) -> Expression:
        return _applied("ge", self, other)

    def __lt__(self, other: Any) -> Expression:
        return _applied("lt", self, other)

    def __le__(self, other: Any) -> Expression:
        return _applied("le", self, other)

    def __bool__(self) -> bool:
        raise RuleError(f"a pattern cannot branch on the value of {self}; write torch.where, or op.either(one, other)")

    def __float__(self) -> float:
        raise RuleError(f"{self} has no value in a pattern; write op.number('name') to match a number in the graph")

    __int__ = __index__ = __float__

    def __getitem__(self, index: Any) -> Expression:
        return Expression(slice_term(self.term, index))

    __radd__ = __add__
    __rmul__ = __mul__

    @property
    def shape(self) -> _Shape:
        """The shape, of which only single sizes may be used, to divide a sum."""
        return _Shape(self.term)

    @property
    def mT(self) -> Expression:
        """The transpose of the last two dims."""
        return _applied("transpose", self, -1, -2)

    @property
    def T(self) -> Expression:
        """The transpose of a matrix."""
        return _applied("t", self)

    @property
    def dtype(self) -> None:
        """Casts are not part of a formula: `x.to(y.dtype)` is x."""
        return None

    device = dtype

    def __str__(self) -> str:
        return formula(self.term)


def equation_of(text: str) -> Equation:
    """Parses an equation; raises RuleError if the text is not an equation of two operands."""
    given, arrow, result = text.partition("->")
    operands = [tuple(operand.split()) for operand in given.split(",")]
    names = tuple(result.split())
    if not arrow or len(operands) != 2:
        raise RuleError(f"op.contract takes an equation like '... q d, ... k d -> ... q k', not {text!r}")
    for axes in (*operands, names):
        if len(set(axes)) != len(axes):
            raise RuleError(f"op.contract: {' '.join(axes)!r} names an axis twice")
    made = Equation(operands[0], operands[1], names)
    alone = (set(made.lhs) ^ set(made.rhs)) - set(names)
    if alone or set(names) - {*made.lhs, *made.rhs} or "..." in made.summed:
        raise RuleError(
            f"op.contract: {text!r} sums an axis that only one operand has, or its result has an axis that neither has"
        )
    if len(made.summed) != 1:
        raise RuleError(
            f"op.contract: {text!r} sums over {len(made.summed)} axes, expected one (of any number of dims)"
        )
    return made


@dataclass(frozen=True)
class _Shape:
    source: Term

    def __getitem__(self, dim: Any) -> Any:
        return Expression(Size(self.source, dim)) if isinstance(dim, int) else ()

    def __iter__(self) -> Iterator[Any]:
        raise RuleError(
            f"a pattern cannot unpack the shape of {formula(self.source)}: patterns never mention sizes; check them "
            "with m.shape() in check"
        )


class Op:
    """The ops of a pattern: `op.tanh(x)`, `op.pow(x, 3)`, and what no torch function expresses: choices and blocks.

    Example::

        op.either(op.gelu(x), op.relu(x))         # one or the other
        op.linear(x, op.weight("w"), op.maybe(op.weight("b")))
        op.attention(op.computed_from(x), op.computed_from(x), op.computed_from(x))
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in FUSED:  # a user's block; the built-in blocks have methods
            return lambda *args: self._block(name, args, {})
        return lambda *args, **kwargs: _applied(name, *args, **kwargs)

    def either(self, *options: Expression) -> Expression:
        """The first of `options` that matches."""
        return Expression(Either(term_of(options)))

    def maybe(self, term: Expression) -> Expression:
        """`term` or nothing: a factor of 1, an addend of 0, an argument of None. Its variables are then None."""
        return Expression(Maybe(term_of(term)))

    def number(self, name: str, where: Where | None = None) -> Expression:
        """A Python number in the graph for which `where(number)` holds."""
        return Expression(NumberVariable(name, where))

    def weight(self, name: str, where: Where | None = None) -> Expression:
        """A parameter, buffer or constant, or a value computed from these only, whose fake tensor meets `where`."""
        return Expression(WeightVariable(name, where))

    def any(self, name: str) -> Expression:
        """Any value: like a parameter of `pattern`, but named here."""
        return Expression(Variable(name))

    def computed_from(self, source: Expression) -> Expression:
        """Any value that is computed, directly or indirectly, from `source`."""
        return Expression(ComputedFrom(term_of(source), next(_serial)))

    def pointwise(self, function: Any, x: Expression, name: str = "") -> Expression:
        """Anything that computes `function` of x elementwise, to seven digits, from sums, products, powers and smooth
        ops.

        With several functions in a dict, the one that matches: `name` is bound to its key, for `check` and `replace`.

        Example::

            op.pointwise(F.gelu, x)                                    # x/2 (1 + erf(x / sqrt(2))) in any spelling
            op.pointwise({"gelu": F.gelu, "silu": F.silu}, x, "kind")  # replace(self, x, kind)

        Raises:
            RuleError: a function is not callable.
        """
        functions = function if isinstance(function, dict) else {getattr(function, "__name__", "it"): function}
        if not all(callable(each) for each in functions.values()):
            raise RuleError(f"op.pointwise takes a function of one tensor, or several by name, not {function!r}")
        return Expression(Pointwise(tuple(functions.items()), term_of(x), name))

    def contract(self, equation: str, lhs: Expression, rhs: Expression) -> Expression:
        """lhs times rhs, summed over the axes that the result lacks, however it is written.

        It matches matmul, bmm, einsum, a linear without bias, and a product that is summed; transposes, reshapes and
        expansions do not matter. The equation names axes, separated by spaces; "..." stands for any number of further
        axes. `replace` gets each variable laid out as its equation says (one dim for each axis of "...", of size one
        where the variable lacks it), and returns its result as the last equation says.

        Raises:
            RuleError: the text is not an equation.

        Example::

            scores = op.contract("... q d, ... k d -> ... q k", query, key)
        """
        return Expression(Contract(equation_of(equation), term_of(lhs), term_of(rhs)))

    def softmax(self, x: Expression, dim: Any = None, *, over: str = "", sink: Expression | None = None) -> Expression:
        """softmax(x) over the axis named `over` (or over `dim`, in a formula without named axes).

        A `sink` is one more score per row, of a key that is cut off afterwards; `op.maybe(sink)` makes it optional.

        Example::

            op.softmax(op.contract("... q d, ... k d -> ... q k", query, key), over="k")
        """
        if not over:
            return _applied("softmax", x, dim)
        return Expression(Softmax(term_of(x), over, term_of(sink)))

    def steps(self, x: Expression, name: str) -> Expression:
        """x, then steps in any order and number; `name` is bound to the list of steps.

        Steps on a softmax's input: a scale, a factor per row, a bias, a masking fill, a cast, tanh
        (`fxbt.scores.Step`). Steps on its output: a scale, a factor per row, dropout, a mask of zeros
        (`fxbt.weights.Step`).

        Example::

            op.softmax(op.steps(op.contract("... q d, ... k d -> ... q k", query, key), "scores"), over="k")
        """
        return Expression(Steps(term_of(x), name))

    def attention(self, *args: Any, **kwargs: Any) -> Expression:
        """SDPA, also as the attention rule made it: attention(query, key, value), each (batch, heads, seq,
        head_dim)."""
        return self._block("attention", args, kwargs)

    def activation(self, x: Any) -> Expression:
        """Any pointwise op of one tensor: gelu, relu, silu ..."""
        return self._block("activation", (x,), {})

    def normalize(self, x: Any) -> Expression:
        """A layer norm or an RMS norm of x."""
        return self._block("normalize", (x,), {})

    def linear(self, *args: Any, **kwargs: Any) -> Expression:
        """linear(input, weight, bias)"""
        return self._block("linear", args, kwargs)

    def layer_norm(self, *args: Any, **kwargs: Any) -> Expression:
        """layer_norm(input, weight=, bias=, eps=)"""
        return self._block("layer_norm", args, kwargs)

    def rms_norm(self, *args: Any, **kwargs: Any) -> Expression:
        """rms_norm(input, weight=, eps=)"""
        return self._block("rms_norm", args, kwargs)

    def mlp(self, *args: Any) -> Expression:
        """mlp(x): linear, activation, linear, gated or not, as the mlp rule made it"""
        return self._block("mlp", args, {})

    def rotary(self, *args: Any) -> Expression:
        """rotary(x, cos, sin), as the rotary rule made it"""
        return self._block("rotary", args, {})

    def residual_norm(self, *args: Any) -> Expression:
        """residual_norm(x, branch) = norm(x + branch), as the residual_norm rule made it"""
        return self._block("residual_norm", args, {})

    def _block(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expression:
        return Expression(Call(name, term_of(args), tuple(term_of(kwargs).items()), open=next(_serial)))
