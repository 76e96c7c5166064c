"""The terms of torch functions and methods: means as sums, nothing for casts and dropout, calls for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import RuleError
from .normal_form import power, product, times, total
from .terms import Call, Part, Product, Size, Slice, Term

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
# Blocks match whatever operands are not written. Those in fxbt.ops are nodes that rules made.
BLOCKS = {"attention", "activation", "normalize", "linear", "layer_norm", "rms_norm", "mlp", "rotary", "residual_norm"}


# Arguments that torch's Python functions take and ATen ops do not.
PYTHON_ONLY = {"inplace", "out"}


def functional(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The term of a function of torch or torch.nn.functional; its arguments may differ from the ATen op's."""
    if function is F.normalize:
        raise RuleError("a pattern calls F.normalize, which is not an ATen op; write out what it computes")
    if function is F.embedding:
        weight, ids = args[1] if len(args) > 1 else kwargs.pop("weight"), args[0]
        args, kwargs = (weight, ids), {}
    return apply(function.__name__, *args, **{key: kwargs[key] for key in kwargs.keys() - PYTHON_ONLY})


def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    """The term of calling the torch function or method `name` with `args`."""
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
        raise RuleError(f"a pattern calls {name!r}, which is not an ATen op; write it with ops of torch.ops.aten")
    return Call(name, args, frozen)


def _check_cast(name: str, args: tuple[Any, ...]) -> None:
    for dtype in args:
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise RuleError(
                f"a pattern casts to {dtype} with {name!r}; a pattern may only cast between floating dtypes"
            )


def _freeze(value: Any) -> Any:
    if callable(value) and not isinstance(value, Term):
        raise RuleError(
            f"a pattern passes {value!r}: call the method, or remove the attribute, which has no value in a pattern"
        )
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _mean(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Term:
    reduction = _sum(x, dim, keepdim)
    return Product(1.0, ((reduction, 1.0),), ((reduction, -1.0),))


def _sum(x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Term:
    dims = dim if isinstance(dim, list | tuple) or dim is None else (dim,)
    return Call("sum", (x, _freeze(dims), keepdim))


def _norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, p: Any = None) -> Term:
    if (ord if p is None else p) not in (2, 2.0):
        raise RuleError(f"a pattern supports only the norm of order 2, not {ord if p is None else p}")
    return power(_sum(power(x, 2), dim, keepdim), 0.5)


def _chunk(x: Any, chunks: int, dim: int = 0) -> tuple[Term, ...]:
    return tuple(Part(x, index, chunks, dim) for index in range(chunks))


def _add(a: Any, b: Any, alpha: float = 1) -> Term:
    return total(a, b if alpha == 1 else times(alpha, b))


def _var(x: Any, dim: Any = None, unbiased: bool | None = None, keepdim: bool = False, correction: Any = None) -> Term:
    correction = int(unbiased is not False) if correction is None else correction
    dims = dim if isinstance(dim, list | tuple) or dim is None else (dim,)
    return Call("var", (x, _freeze(dims)), (("correction", correction), ("keepdim", keepdim)))


def _einsum(equation: str, *operands: Any) -> Term:
    return Call("einsum", (plain_equation(equation), _freeze(operands if len(operands) > 1 else operands[0])))


def plain_equation(equation: str) -> str:
    """An einsum equation with letters from "a" on: "bqd,bkd->bqk" becomes "abc,adc->abd"."""
    letters = dict.fromkeys(letter for letter in equation if letter.isalpha())
    plain = {letter: chr(ord("a") + place) for place, letter in enumerate(letters)}
    return "".join(plain.get(letter, letter) for letter in equation if letter != " ")


def _no_split(*args: Any, **kwargs: Any) -> Any:
    raise RuleError("a pattern cannot split by sizes, because patterns never mention sizes; write x.chunk(parts, dim)")


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


def slice_term(source: Term, index: Any) -> Term:
    """The term of x[..., start:stop:step] (slices of the last dims) or of x[..., None]."""
    items = index if isinstance(index, tuple) else (index,)
    if items == (Ellipsis, None):
        return apply("unsqueeze", source, -1)
    if items[:1] != (Ellipsis,) or not all(isinstance(item, slice) for item in items[1:]):
        raise RuleError(
            f"a pattern can only slice the last dims, as in x[..., ::2]; found [{index!r}]; "
            "for one element write x.select(dim, index)"
        )
    for place, item in enumerate(items[1:]):
        if item != slice(None):
            source = Slice(source, place - len(items) + 1, item.start or 0, item.stop, item.step or 1)
    return source
