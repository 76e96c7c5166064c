"""The pattern language: formulas over variables, written with Python's operators and torch's functions.

A pattern function runs once on `Term`s. Every operator and every torch function called on a term gives a bigger one,
already in normal form: sums and products are flat, powers are exponents, sizes and casts are dropped. `matcher.py`
compares terms with graphs.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

import torch
import torch.nn.functional as F

from ..errors import RuleError
from ..graph.blocks import FUSED

Where = Callable[[Any], bool]
_T = TypeVar("_T")
_serial = itertools.count(1)


@dataclass_transform(frozen_default=True)
def _term(cls: type[_T]) -> type[_T]:
    """A frozen dataclass whose hash is computed once: patterns share their parts, and equal parts are one."""
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
    """A formula. Torch functions and methods apply to it as to a tensor."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _functional(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: apply(name, self, *args, **kwargs)

    def __add__(self, other: Any) -> Term:
        return total(self, other)

    def __sub__(self, other: Any) -> Term:
        return total(self, _times(-1.0, other))

    def __rsub__(self, other: Any) -> Term:
        return total(other, product(-1.0, self))

    def __mul__(self, other: Any) -> Term:
        return product(self, other)

    def __truediv__(self, other: Any) -> Term:
        return product(self, power(other, -1))

    def __rtruediv__(self, other: Any) -> Term:
        return product(other, power(self, -1))

    def __pow__(self, exponent: Any) -> Term:
        return power(self, exponent)

    def __matmul__(self, other: Any) -> Term:
        return apply("matmul", self, other)

    def __neg__(self) -> Term:
        return product(-1.0, self)

    def __gt__(self, other: Any) -> Term:
        return apply("gt", self, other)

    def __ge__(self, other: Any) -> Term:
        return apply("ge", self, other)

    def __lt__(self, other: Any) -> Term:
        return apply("lt", self, other)

    def __le__(self, other: Any) -> Term:
        return apply("le", self, other)

    def __bool__(self) -> bool:
        raise RuleError(f"a pattern cannot branch on {self}; write torch.where, or op.either(one, other)")

    def __float__(self) -> float:
        raise RuleError(f"a pattern has no number for {self}; write op.number('name') for one of the graph")

    __int__ = __index__ = __float__

    def __getitem__(self, index: Any) -> Term:
        return _slice(self, index)

    __radd__ = __add__
    __rmul__ = __mul__

    @property
    def shape(self) -> _Shape:
        return _Shape(self)

    @property
    def mT(self) -> Term:
        return apply("transpose", self, -1, -2)

    @property
    def T(self) -> Term:
        return apply("t", self)

    @property
    def dtype(self) -> None:
        """Casts are not part of a formula: `x.to(y.dtype)` is x."""
        return None

    device = dtype

    def __str__(self) -> str:
        return formula(self)


@_term
class Variable(Term):
    """Any value; the same name is the same value."""

    name: str


@_term
class NumberVariable(Term):
    """A Python number in the graph."""

    name: str
    where: Where | None = None


@_term
class WeightVariable(Term):
    """A parameter, a buffer or a constant, or what is computed from such alone."""

    name: str
    where: Where | None = None


@_term
class Call(Term):
    """A torch op. `open`: operands that are not written may be anything, so each such call is a value of its own."""

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
    """coefficient * factors ** exponents * (elements a reduction sums) ** exponents"""

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
    """Whatever computes one of `functions` of `source`, pointwise; `bound` is the name that its name is bound to."""

    functions: tuple[tuple[str, Callable[[torch.Tensor], torch.Tensor]], ...]
    source: Term
    bound: str = ""


@_term
class ComputedFrom(Term):
    """Any value that is computed from `source`; each is one of its own."""

    source: Term
    serial: int = 0


@_term
class Size(Term):
    """`x.shape[dim]`: only as the number a sum is divided by."""

    source: Term
    dim: int


@dataclass(frozen=True)
class _Shape:
    source: Term

    def __getitem__(self, dim: Any) -> Any:
        return Size(self.source, dim) if isinstance(dim, int) else ()

    def __iter__(self) -> Iterator[Any]:
        raise RuleError(f"a pattern cannot unpack the shape of {self.source}: sizes are never written in a pattern")


# --- normal form ------------------------------------------------------------------------------------------------


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
            constant += _literal(operand)
    if len(terms) == 1 and constant == 0:
        return terms[0]
    return Sum(constant, tuple(terms))


def product(*operands: Any) -> Term:
    """The flat product of terms and numbers, equal factors merged into powers."""
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
            coefficient *= _literal(operand)
    factors, sizes = _divided_sizes(merge_powers(factors, is_sum_of_squares))
    counts += sizes
    if coefficient == 1 and not counts and [exponent for _, exponent in factors] == [1.0]:
        return factors[0][0]
    return Product(coefficient, tuple(factors), tuple(counts))


def merge_powers(factors: Iterable[tuple[_T, float]], is_nonnegative: Callable[[_T], bool]) -> list[tuple[_T, float]]:
    """Equal factors as one power, where that holds for every real number: not x / x at 0, nor sqrt(x) * sqrt(x)."""
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


Factors = list[tuple[Term, float]]


def _divided_sizes(factors: Factors) -> tuple[Factors, Factors]:
    """The factors without sizes, and the counts: sum(x, dim) / x.shape[dim] counts what the sum reduces."""
    counts: Factors = []
    for size, exponent in factors:
        if not isinstance(size, Size):
            continue
        reduction = next((factor for factor, _ in factors if _reduces(factor, size)), None)
        if reduction is None:
            raise RuleError(
                f"a size of {size.source} stands in a pattern; only a sum over that one dim can be divided by it"
            )
        counts.append((reduction, exponent))
    return [factor for factor in factors if not isinstance(factor[0], Size)], counts


def _reduces(term: Term, size: Size) -> bool:
    """Whether a term is the sum over the dim alone that `size` is of."""
    return isinstance(term, Call) and term.op == "sum" and term.args[1] == (size.dim,) and size.source in walk(term)


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent; exponents multiply where that holds for every real number."""
    if not isinstance(exponent, int | float):
        raise RuleError(f"the exponent {exponent} of a power is no number; write it as a literal")
    if not isinstance(base, Term):
        return _literal(base) ** exponent
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
    """Whether (x ** inner) ** outer is x ** (inner * outer): not for the root of a square."""
    if base_is_nonnegative or outer == -1:
        return True
    return inner == int(inner) and outer == int(outer)


def is_sum_of_squares(term: Any) -> bool:
    if not isinstance(term, Call) or term.op != "sum" or not isinstance(term.args[0], Product):
        return False
    return all(exponent % 2 == 0 for _, exponent in term.args[0].factors) and term.args[0].coefficient >= 0


def _literal(value: Any) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    if callable(value):
        raise RuleError(
            f"a pattern computes with {value!r}, which is a method not called, or an attribute it cannot read"
        )
    if not isinstance(value, int | float):
        raise RuleError(f"a pattern cannot compute with {value!r}; expected a number or a term")
    return float(value)


TRANSPARENT = {
    *("to", "type_as", "float", "half", "bfloat16", "double", "type"),
    *("contiguous", "clone", "detach", "alias"),
}
ALIASES = {
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "special_erf": "erf",
    "special_expit": "sigmoid",
    "special_softmax": "softmax",
    "concat": "cat",
    "bmm": "matmul",
    "mm": "matmul",
    "linalg_vector_norm": "norm",
    "vector_norm": "norm",
    "scaled_dot_product_attention": "attention",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
}
# Blocks that match whatever operands are not written; those of fxbt.ops are nodes that rules made.
BLOCKS = {"attention", "activation", "normalize", "linear", "layer_norm", "rms_norm", "mlp", "rotary", "residual_norm"}


# What torch's Python functions take and ATen ops do not.
PYTHON_ONLY = {"inplace", "out"}


def _functional(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The term for a function of torch or torch.nn.functional, whose arguments may be other than the ATen op's."""
    if function is F.normalize:
        raise RuleError("a pattern calls F.normalize, which is no ATen op; write out what it computes")
    if function is F.embedding:
        weight, ids = args[1] if len(args) > 1 else kwargs.pop("weight"), args[0]
        args, kwargs = (weight, ids), {}
    return apply(function.__name__, *args, **{key: kwargs[key] for key in kwargs.keys() - PYTHON_ONLY})


def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    """The term for a torch function or method `name` called with `args`."""
    name = name.strip("_")
    name = ALIASES.get(name, name)
    if name in TRANSPARENT:
        _check_cast(name, (*args, *kwargs.values()))
        return args[0]
    if name in ARITHMETIC:
        return ARITHMETIC[name](*args, **kwargs)
    args = tuple(_freeze(arg) for arg in args)
    frozen = tuple((key, _freeze(value)) for key, value in kwargs.items() if not key.startswith("_"))
    if name not in BLOCKS and not hasattr(torch.ops.aten, name):
        raise RuleError(f"a pattern calls {name!r}, which is no ATen op; write it with ops of torch.ops.aten")
    return Call(name, args, frozen)


def _check_cast(name: str, args: tuple[Any, ...]) -> None:
    for dtype in args:
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise RuleError(
                f"a pattern casts to {dtype} by {name!r}; only casts between floating dtypes may be written"
            )


def _freeze(value: Any) -> Any:
    if callable(value) and not isinstance(value, Term):
        raise RuleError(f"a pattern hands on {value!r}, which is a method not called, or an attribute it cannot read")
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _mean(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Term:
    reduction = _sum(x, dim, keepdim)
    return Product(1.0, ((reduction, 1.0),), ((reduction, -1.0),))


def _sum(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Term:
    dims = dim if isinstance(dim, list | tuple) or dim is None else (dim,)
    return Call("sum", (x, _freeze(dims), keepdim))


def _norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, p: Any = None) -> Term:
    if (ord if p is None else p) not in (2, 2.0):
        raise RuleError(f"a pattern knows the norm of order 2 only, not {ord if p is None else p}")
    return power(_sum(power(x, 2), dim, keepdim), 0.5)


def _chunk(x: Any, chunks: int, dim: int = 0) -> tuple[Term, ...]:
    return tuple(Part(x, index, chunks, dim) for index in range(chunks))


def _add(a: Any, b: Any, alpha: float = 1) -> Term:
    return total(a, b if alpha == 1 else _times(alpha, b))


def _times(factor: float, addend: Any) -> Term:
    """An addend with a factor: of an optional one, the absent stays 0."""
    return Maybe(product(factor, addend.term)) if isinstance(addend, Maybe) else product(factor, addend)


def _var(x: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, correction: Any = None) -> Term:
    correction = int(unbiased is not False) if correction is None else correction
    dims = dim if isinstance(dim, list | tuple) or dim is None else (dim,)
    return Call("var", (x, _freeze(dims)), (("correction", correction), ("keepdim", keepdim)))


def _einsum(equation: str, *operands: Any) -> Term:
    return Call("einsum", (plain_equation(equation), _freeze(operands if len(operands) > 1 else operands[0])))


def plain_equation(equation: str) -> str:
    """An einsum equation in the first letters of the alphabet: "bqd,bkd->bqk" is "abc,adc->abd"."""
    letters = dict.fromkeys(letter for letter in equation if letter.isalpha())
    plain = {letter: chr(ord("a") + place) for place, letter in enumerate(letters)}
    return "".join(plain.get(letter, letter) for letter in equation if letter != " ")


def _no_split(*args: Any, **kwargs: Any) -> Any:
    raise RuleError("a pattern cannot split by sizes, which are never written; write x.chunk(parts, dim)")


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": lambda a, b, alpha=1: _add(a, b, alpha=-alpha),
    "rsub": lambda a, b, alpha=1: _add(b, a, alpha=-alpha),
    "mul": product,
    "div": lambda a, b: product(a, power(b, -1)),
    "neg": lambda a: product(-1.0, a),
    "pow": power,
    "square": lambda a: power(a, 2),
    "sqrt": lambda a: power(a, 0.5),
    "rsqrt": lambda a: power(a, -0.5),
    "reciprocal": lambda a: power(a, -1),
    "mean": _mean,
    "sum": _sum,
    "norm": _norm,
    "var": _var,
    "einsum": _einsum,
    "chunk": _chunk,
    "split": _no_split,
    "size": lambda a, dim: Size(a, dim),
    "dropout": lambda a, *args, **kwargs: a,
}


def _slice(source: Term, index: Any) -> Term:
    """x[..., start:stop:step]: slices of the last dims, counted from the right; x[..., None] is a dim more."""
    items = index if isinstance(index, tuple) else (index,)
    if items == (Ellipsis, None):
        return apply("unsqueeze", source, -1)
    if items[:1] != (Ellipsis,) or not all(isinstance(item, slice) for item in items[1:]):
        raise RuleError(
            f"a pattern slices from the right, as in x[..., ::2]; found [{index!r}]; "
            "one element is x.select(dim, index)"
        )
    for place, item in enumerate(items[1:]):
        if item != slice(None):
            source = Slice(source, place - len(items) + 1, item.start or 0, item.stop, item.step or 1)
    return source


# --- what `pattern` receives ------------------------------------------------------------------------------------


class Op:
    """The ops of a pattern: `op.tanh(x)`, `op.pow(x, 3)`, and what no torch function says: choices and blocks.

    Example::

        op.either(op.gelu(x), op.relu(x))         # one or the other
        op.linear(x, op.weight("w"), op.maybe(op.weight("b")))
        op.attention(op.computed_from(x), op.computed_from(x), op.computed_from(x))
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in FUSED:  # one of the user's own: the others have methods
            return lambda *args: self._block(name, args, {})
        return lambda *args, **kwargs: apply(name, *args, **kwargs)

    def either(self, *options: Term) -> Term:
        """The first of `options` that matches."""
        return Either(options)

    def maybe(self, term: Term) -> Term:
        """`term` or nothing: a factor of 1, an addend of 0, an argument of None. Its variables are then None."""
        return Maybe(term)

    def number(self, name: str, where: Where | None = None) -> Term:
        """A Python number in the graph that fulfils `where`."""
        return NumberVariable(name, where)

    def weight(self, name: str, where: Where | None = None) -> Term:
        """A parameter, buffer or constant (or what is computed from such alone) whose fake tensor fulfils `where`."""
        return WeightVariable(name, where)

    def any(self, name: str) -> Term:
        """Any value: a variable that is no parameter of `pattern`."""
        return Variable(name)

    def computed_from(self, source: Term) -> Term:
        """Any value on whose way from the weights and inputs `source` stands."""
        return ComputedFrom(source, next(_serial))

    def pointwise(self, function: Any, x: Term, name: str = "") -> Term:
        """Whatever computes `function` of x elementwise, to seven digits, by sums, products, powers and smooth curves.

        Of several functions, given by name, whichever it is: `name` is then bound to its name, for `check` and
        `replace`.

        Example::

            op.pointwise(F.gelu, x)                                    # x/2 (1 + erf(x / sqrt(2))) in any spelling
            op.pointwise({"gelu": F.gelu, "silu": F.silu}, x, "kind")  # replace(self, x, kind)

        Raises:
            RuleError: a function is no callable.
        """
        functions = function if isinstance(function, dict) else {getattr(function, "__name__", "it"): function}
        if not all(callable(each) for each in functions.values()):
            raise RuleError(f"op.pointwise takes a function of one tensor, or several by name, not {function!r}")
        return Pointwise(tuple(functions.items()), x, name)

    def attention(self, *args: Any, **kwargs: Any) -> Term:
        """SDPA, or what the attention rule turned into it: query, key, value (batch, heads, seq, head_dim), mask."""
        return self._block("attention", args, kwargs)

    def activation(self, x: Any) -> Term:
        """Any pointwise op of one tensor: gelu, relu, silu ..."""
        return self._block("activation", (x,), {})

    def normalize(self, x: Any) -> Term:
        """A layer norm or an RMS norm of x."""
        return self._block("normalize", (x,), {})

    def linear(self, *args: Any, **kwargs: Any) -> Term:
        """linear(input, weight, bias)"""
        return self._block("linear", args, kwargs)

    def layer_norm(self, *args: Any, **kwargs: Any) -> Term:
        """layer_norm(input, weight=, bias=, eps=)"""
        return self._block("layer_norm", args, kwargs)

    def rms_norm(self, *args: Any, **kwargs: Any) -> Term:
        """rms_norm(input, weight=, eps=)"""
        return self._block("rms_norm", args, kwargs)

    def mlp(self, *args: Any) -> Term:
        """mlp(x): linear, activation, linear, gated or not, as the mlp rule found it"""
        return self._block("mlp", args, {})

    def rotary(self, *args: Any) -> Term:
        """rotary(x, cos, sin), as the rotary rule found it"""
        return self._block("rotary", args, {})

    def residual_norm(self, *args: Any) -> Term:
        """residual_norm(x, branch) = norm(x + branch), as the residual_norm rule found it"""
        return self._block("residual_norm", args, {})

    def _block(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Term:
        return Call(name, args, tuple(kwargs.items()), open=next(_serial))


# --- reading terms ----------------------------------------------------------------------------------------------


def children(term: Any) -> tuple[Any, ...]:
    """The terms that a term is made of."""
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
        case Part() | Slice() | ComputedFrom() | Size() | Pointwise():
            return (term.source,)
    return ()


def _terms_in(values: Any) -> Iterator[Term]:
    if isinstance(values, Term):
        yield values
    if isinstance(values, tuple):
        for value in values:
            yield from _terms_in(value)


def walk(term: Any) -> list[Term]:
    """A term and all it is made of, each once."""
    found, waiting = {term: None}, [term]
    while waiting:
        parts = [part for part in children(waiting.pop()) if part not in found]
        found.update(dict.fromkeys(parts))
        waiting += parts
    return list(found)


def shared(term: Any) -> set[Term]:
    """The parts of a term, other than variables, that stand in it more than once."""
    counts = collections.Counter(part for whole in walk(term) for part in children(whole))
    leaves = (Variable, NumberVariable, WeightVariable)
    return {part for part, count in counts.items() if count > 1 and not isinstance(part, leaves)}


@functools.cache
def names(term: Term) -> frozenset[str]:
    """The names of all variables, numbers and weights of a term."""
    leaves = (Variable, NumberVariable, WeightVariable)
    bound = {found.bound for found in walk(term) if isinstance(found, Pointwise)} - {""}
    return frozenset(found.name for found in walk(term) if isinstance(found, leaves)) | bound


def size(term: Any) -> int:
    """How many different ops a match of the term has: of alternatives, the longest."""
    return len(_ops(term))


@functools.cache
def _ops(term: Any) -> frozenset[Term]:
    match term:
        case Either():
            return max((_ops(option) for option in term.options), key=len)
        case Variable() | NumberVariable() | WeightVariable():
            return frozenset()
    inner = frozenset().union(*(_ops(child) for child in children(term)))
    return inner if isinstance(term, Maybe | ComputedFrom) else inner | {term}


@dataclass
class Formula:
    """A pattern function run once: its outputs as terms and the names they bind."""

    outputs: tuple[Term, ...]
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names = set().union(*(names(term) for term in self.outputs))
        self.size = sum(size(term) for term in self.outputs)
        self.ops = {t.op for term in self.outputs for t in walk(term) if isinstance(t, Call)}


# --- text -------------------------------------------------------------------------------------------------------


WIDTH = 100  # characters of a formula; a longer one is cut where it nests deepest
DEPTHS = (*range(9, 2, -1), 2)


def formula(term: Any) -> str:
    """A term as a formula: what "expected" says in a report."""
    texts = (_text(term, depth) for depth in DEPTHS)
    return next((text for text in texts if len(text) <= WIDTH), _text(term, DEPTHS[-1]))


def _text(term: Any, depth: int) -> str:
    """The term to some depth, and "…" for what is deeper."""
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
