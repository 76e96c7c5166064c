"""Numbers that a model computes from sizes with 0-d tensors, known during a trace: `ceil((length - kernel) / stride)`.

To a trace, a size is a symbol and the value of a tensor is unknown. A 0-d tensor computed from sizes and constants is
both: the graph computes the tensor as the model does, and where Python or a size asks for its value, the trace
continues with the symbols. Constants are numbers in forward and the model's own 0-d tensors; those that were read are
noted, because a graph holds only while they keep their values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.overrides import TorchFunctionMode

from ..torch_compat import FakeTensor, _disable_current_modes, pytree

_ROUNDINGS = 4  # at most, between a division and the integer made from its result


@dataclass(frozen=True)
class _Number:
    """The exact value of a tensor, numerator / denominator; for a comparison, a `bool` or `SymBool`.

    The tensor's own value is this, rounded; `rounded` has the numerators at which it was rounded, with their limits.
    """

    numerator: Any
    denominator: int = 1
    rounded: tuple[tuple[Any, int], ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.denominator == 1 and not isinstance(self.numerator, (bool, torch.SymBool))

    @property
    def is_settled(self) -> bool:
        """Whether no rounding can have moved the tensor's value past an integer; for sizes, this becomes a guard."""
        within = [-limit < numerator < limit for numerator, limit in map(_hinted, self.rounded)]
        if len(self.rounded) > _ROUNDINGS or not all(within):
            return False
        for numerator, limit in self.rounded:
            torch._check(numerator < limit)
            torch._check(numerator > -limit)
        return True


def _hinted(rounded: tuple[Any, int]) -> tuple[int, int]:
    numerator, limit = rounded
    return (numerator.node.hint if isinstance(numerator, SymInt) else numerator), limit


@dataclass
class Constant:
    """A 0-d tensor of the model whose value the trace read."""

    name: str
    tensor: Tensor
    value: int

    def holds(self) -> bool:
        """Whether the tensor still has the value that the trace read."""
        return self.tensor.item() == self.value


class Scalars(TorchFunctionMode):
    """Answers with sizes where a traced forward asks for the value of a 0-d tensor computed from them.

    `traced` is the module being traced, whose buffers are fake; `originals` are its tensors by name.

    Example:
        >>> with Scalars(model, originals) as scalars:
        ...     model(x)
        >>> [constant.name for constant in scalars.read]
    """

    def __init__(self, traced: nn.Module, originals: dict[str, Tensor]) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, int, _Number]] = {}  # id -> tensor, its version, its value
        self._constants = {
            id(buffer): (name, originals[name], buffer._version)
            for name, buffer in traced.named_buffers()
            if name in originals
        }
        self.read: list[Constant] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ANSWERS and (answer := self._answer(name, args[0])) is not None:
            return answer
        if name in _TAKES_SIZES:
            args, kwargs = self._with_sizes(name, args, kwargs)
        result = func(*args, **kwargs)
        if name in _COMPUTES and type(result) is FakeTensor and result.dim() == 0:
            self._compute(name, args, kwargs, result)
        return result

    def _answer(self, name: str, tensor: Tensor) -> Any:
        number = self._number(tensor)
        if number is None or number.denominator != 1:
            return None
        if name == "__bool__":
            return bool(number.numerator)
        if not number.is_whole:
            return number.numerator if name == "item" else None
        if name == "item":
            return torch.sym_float(number.numerator) if tensor.is_floating_point() else number.numerator
        return int(number.numerator)

    def _compute(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        operands = args[: 1 if name in _OF_ONE else 2]
        numbers = [self._number(operand) for operand in operands]
        if any(number is None for number in numbers):
            return
        computed = _COMPUTES[name](*numbers, **{n: v for n, v in kwargs.items() if n == "rounding_mode"})
        if computed is not None and (kept := _in_dtype(computed, result.dtype)) is not None:
            self._known[id(result)] = (result, result._version, kept)

    def _number(self, value: Any) -> _Number | None:
        if isinstance(value, (int, SymInt)) and not isinstance(value, bool):
            return _Number(value)
        if not isinstance(value, Tensor) or value.dim() != 0:
            return None
        if id(value) in self._known:
            _, version, number = self._known[id(value)]
            return number if value._version == version else None
        return self._constant(value)

    def _constant(self, value: Tensor) -> _Number | None:
        if id(value) not in self._constants or value.dtype is not torch.int64:
            return None
        name, original, version = self._constants[id(value)]
        if value._version != version:
            return None
        with _disable_current_modes():
            constant = Constant(name, original, int(original.item()))
        if all(read.name != name for read in self.read):
            self.read.append(constant)
        self._known[id(value)] = (value, value._version, _Number(constant.value))
        return _Number(constant.value)

    def _with_sizes(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with sizes in place of tensors, except the tensor that the function acts on."""
        kept = () if name in _MAKES else args[:1]

        def size(value: Any) -> Any:
            if isinstance(value, slice):
                return slice(*map(_as_number, map(as_size, (value.start, value.stop, value.step))))
            return value if name in _INDEXES else as_size(value)

        def as_size(value: Any) -> Any:
            number = self._number(value) if isinstance(value, Tensor) and value.dtype is torch.int64 else None
            return value if number is None else number.numerator

        rest, kwargs = pytree.tree_map(size, (args[len(kept) :], kwargs))
        return (*kept, *rest), kwargs


def _as_number(bound: Any) -> Any:
    """A slice's bound; for a 0-d tensor its value, which torch itself takes from 2.13 on."""
    is_tensor = isinstance(bound, Tensor) and bound.dim() == 0 and bound.dtype is torch.int64
    return bound.item() if is_tensor else bound


def _in_dtype(number: _Number, dtype: torch.dtype) -> _Number | None:
    """The number as a tensor of that dtype holds it; None if that is unknown."""
    is_truth = isinstance(number.numerator, (bool, torch.SymBool))
    if is_truth or dtype is torch.bool:
        return number if is_truth and dtype is torch.bool else None
    if dtype is torch.int64:
        return _trunc(number)
    if dtype not in (torch.float32, torch.float64):
        return None
    # Each rounding errs by half a unit in the last place; below the limit, all of them by less than 1 / denominator.
    limit = int(2 / torch.finfo(dtype).eps) // _ROUNDINGS
    return _Number(number.numerator, number.denominator, (*number.rounded, (number.numerator, limit)))


# --- arithmetic: numbers -> number, or None where it is not known ------------------------------------------------


def _add(a: _Number, b: _Number) -> _Number:
    numerator = a.numerator * b.denominator + b.numerator * a.denominator
    return _Number(numerator, a.denominator * b.denominator, (*a.rounded, *b.rounded))


def _neg(a: _Number) -> _Number:
    return _Number(-a.numerator, a.denominator, a.rounded)


def _sub(a: _Number, b: _Number) -> _Number:
    return _add(a, _neg(b))


def _div(a: _Number, b: _Number, rounding_mode: str | None = None) -> _Number | None:
    is_known = a.is_whole and isinstance(b.numerator, int) and b.numerator > 0 and b.denominator == 1
    if not is_known or a.rounded or b.rounded:
        return None
    quotient = _Number(a.numerator, b.numerator)
    return {None: lambda n: n, "floor": _floor, "trunc": _trunc}[rounding_mode](quotient)


def _floor(a: _Number) -> _Number | None:
    if not a.is_settled:
        return None
    return _Number(a.numerator if a.denominator == 1 else a.numerator // a.denominator)


def _ceil(a: _Number) -> _Number | None:
    return _floor(_Number(a.numerator + a.denominator - 1, a.denominator, a.rounded))


def _trunc(a: _Number) -> _Number | None:
    if a.denominator == 1 and not a.rounded:
        return a
    if a.denominator == 1:
        return _floor(a)
    if _hinted((a.numerator, 0))[0] < 0:
        return None
    torch._check(a.numerator >= 0)
    return _floor(a)


def _same(a: _Number) -> _Number:
    return a


def _of_integers(compute: Callable[[Any, Any], Any]) -> Callable[[_Number, _Number], _Number | None]:
    def of_integers(a: _Number, b: _Number) -> _Number | None:
        is_known = a.is_whole and b.is_whole and not (a.rounded or b.rounded)
        return _Number(compute(a.numerator, b.numerator)) if is_known else None

    return of_integers


_OF_ONE: dict[str, Callable[..., _Number | None]] = {
    **dict.fromkeys(("tensor", "as_tensor", "scalar_tensor", "clone", "detach"), _same),
    **dict.fromkeys(("to", "long", "float", "double"), _same),
    **dict.fromkeys(("neg", "__neg__"), _neg),
    "floor": _floor,
    "ceil": _ceil,
    "trunc": _trunc,
}
_COMPUTES: dict[str, Callable[..., _Number | None]] = {
    **_OF_ONE,
    **dict.fromkeys(("add", "__add__", "__radd__"), _add),
    **dict.fromkeys(("sub", "__sub__"), _sub),
    **dict.fromkeys(("rsub", "__rsub__"), lambda a, b: _sub(b, a)),
    **dict.fromkeys(("div", "true_divide", "__truediv__"), _div),
    **dict.fromkeys(("floor_divide", "__floordiv__"), lambda a, b: _div(a, b, "floor")),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), _of_integers(operator.mul)),
    **dict.fromkeys(("maximum", "sym_max"), _of_integers(torch.sym_max)),
    **dict.fromkeys(("minimum", "sym_min"), _of_integers(torch.sym_min)),
    **dict.fromkeys(("lt", "__lt__"), _of_integers(operator.lt)),
    **dict.fromkeys(("le", "__le__"), _of_integers(operator.le)),
    **dict.fromkeys(("gt", "__gt__"), _of_integers(operator.gt)),
    **dict.fromkeys(("ge", "__ge__"), _of_integers(operator.ge)),
    **dict.fromkeys(("eq", "__eq__"), _of_integers(operator.eq)),
    **dict.fromkeys(("ne", "__ne__"), _of_integers(operator.ne)),
}
_ANSWERS = ("__bool__", "__int__", "__index__", "item")
_MAKES = ("zeros", "ones", "full", "empty", "arange", "eye")
_INDEXES = ("__getitem__", "__setitem__")
_TAKES_SIZES = {
    *(*_MAKES, *_INDEXES, "pad", "view", "reshape", "unflatten", "expand", "repeat", "narrow", "split", "chunk"),
    *("unfold", "as_strided", "new_zeros", "new_ones", "new_full", "new_empty", "select", "roll", "tril", "triu"),
}
