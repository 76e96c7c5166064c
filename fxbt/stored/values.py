"""The kinds of a graph's values (tensors, sizes) as text, and the arguments of its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx

from ..capture.containers import Given
from ..torch_compat import FakeTensorMode, ShapeEnv, environment_of, fake_like
from . import expressions
from .errors import Malformed, Unstorable, checked

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_LAYOUTS = {str(layout): layout for layout in vars(torch).values() if isinstance(layout, torch.layout)}
_FORMATS = {str(form): form for form in vars(torch).values() if isinstance(form, torch.memory_format)}
_DEVICES = ("cpu", "cuda")
_DEEPEST = 16
_LONGEST = 1 << 14  # characters of a text in a graph
_MOST_DIMS = 32
_UNBOUNDED = 2**62


class Table:
    """Texts and lists that repeat, each stored once.

    Example:
        >>> table = Table()
        >>> table.place("a"), table.place("b"), table.place("a")
        (0, 1, 0)
    """

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, entry: Any) -> int:
        """The index of an entry."""
        place = self._places.setdefault(repr(entry), len(self.entries))
        if place == len(self.entries):
            self.entries.append(entry)
        return place


# Arguments


def written_argument(value: Any, places: dict[fx.Node, int]) -> Any:
    """An argument of an operation as JSON data; nodes become their indices in `places`.

    Raises:
        Unstorable: it has no text in files.
    """
    if isinstance(value, fx.Node):
        return ["node", places[value]]
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return ["float", value.hex()]
    if type(value) is Given:
        return ["given", None]
    if isinstance(value, (list, tuple)):
        word = "list" if isinstance(value, list) else "tuple"
        return [word, *[written_argument(item, places) for item in value]]
    if type(value) is slice:
        return ["slice", *[written_argument(part, places) for part in (value.start, value.stop, value.step)]]
    if isinstance(value, torch.device):
        return ["device", _device_text(value)]
    for word, known in (("dtype", DTYPES), ("layout", _LAYOUTS), ("format", _FORMATS)):
        if str(value) in known and known[str(value)] is value:
            return [word, str(value)]
    raise Unstorable(f"an operation takes a {type(value).__name__}, which a file cannot hold")


def read_argument(text: Any, nodes: Sequence[fx.Node], depth: int = 0) -> Any:
    """Reads what `written_argument` wrote, with the nodes so far.

    Raises:
        Malformed: it is not one of fxbt's arguments.
    """
    if text is None or type(text) is bool:
        return text
    if type(text) is int:
        return _int64(text)
    if type(text) is str:
        return _short(text)
    word, *parts = checked(text, list) or [None]
    if word in ("list", "tuple", "slice"):
        if depth > _DEEPEST or (word == "slice" and len(parts) != 3):
            raise Malformed("the file has an argument that is nested too deeply")
        values = [read_argument(part, nodes, depth + 1) for part in parts]
        return values if word == "list" else tuple(values) if word == "tuple" else slice(*values)
    if word == "node" and len(parts) == 1:
        return nodes[_below(parts[0], len(nodes))]
    if len(parts) != 1 or type(word) is not str or word not in _READERS:
        raise Malformed(f"the file has an argument of unknown kind {str(word)[:40]}")
    return _READERS[word](parts[0])


def _below(number: Any, limit: int) -> int:
    if not 0 <= checked(number, int) < limit:
        raise Malformed(f"the file has no node or entry {number}")
    return int(number)


def _int64(number: int) -> int:
    if not -(2**63) <= number < 2**63:
        raise Malformed(f"the file has a number of {number.bit_length()} bits")
    return number


def _short(text: str) -> str:
    if len(text) > _LONGEST:
        raise Malformed(f"the file has a text of {len(text)} characters")
    return text


def _float(text: Any) -> float:
    try:
        return float.fromhex(_short(checked(text, str)))
    except (ValueError, OverflowError) as error:
        raise Malformed(str(error)) from error


def _one_of(known: dict[str, Any]) -> Callable[[Any], Any]:
    def find(name: Any) -> Any:
        if checked(name, str) not in known:
            raise Malformed(f"torch has no {name[:80]}")
        return known[name]

    return find


def _device_text(device: torch.device) -> str:
    if device.type not in _DEVICES:
        raise Unstorable(f"the graph computes on {device}, which files cannot name")
    return str(device)


def _device(text: Any) -> torch.device:
    kind, _, number = checked(text, str).partition(":")
    if kind not in _DEVICES or not (text == kind or number.isascii() and number.isdigit() and len(number) < 4):
        raise Malformed(f"the file names a device {text[:80]} that fxbt never writes")
    return torch.device(text)


def _given(_: Any) -> Given:
    """An argument of the call that forward returns; the original's own result says which (`graphs.read_graph`)."""
    return Given(())


_READERS: dict[str, Callable[[Any], Any]] = {
    "float": _float,
    "given": _given,
    "dtype": _one_of(DTYPES),
    "layout": _one_of(_LAYOUTS),
    "format": _one_of(_FORMATS),
    "device": _device,
}


# Kinds


class KindsWriter:
    """Writes the kinds of values; equal kinds once."""

    def __init__(self) -> None:
        self.kinds = Table()

    def place(self, value: Any) -> int:
        """The index of a value's kind.

        Raises:
            Unstorable: it is not a tensor, a size, or a list of these.
        """
        return self.kinds.place(self._written(value))

    def _written(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, (SymInt, SymBool)):
            return ["size" if isinstance(value, SymInt) else "truth", expressions.written(value.node.expr)]
        if isinstance(value, SymFloat):
            raise Unstorable("the graph computes a non-integer from sizes, which files cannot hold")
        if isinstance(value, (list, tuple)):
            word = "list" if isinstance(value, list) else "tuple"
            return [word, *map(self._written, value)]
        return written_argument(value, {})

    def _of_tensor(self, value: Tensor) -> list[Any]:
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            raise Unstorable(f"the graph computes a tensor with layout {value.layout}, which files cannot hold")
        sizes, strides = ([_expression(size) for size in sizes] for sizes in (value.shape, value.stride()))
        return ["tensor", str(value.dtype), _device_text(value.device), value.requires_grad, sizes, strides]


def _expression(size: int | SymInt) -> Any:
    return expressions.written(size.node.expr if isinstance(size, SymInt) else size)


class KindsReader:
    """Reads the kinds written by `KindsWriter` into one shape environment; each call of `value` makes a new value."""

    def __init__(self, kinds: Any, sizes: Any, assumed: Any, counts: Any) -> None:
        self._kinds = checked(kinds, list)
        self.symbols = {name: _symbol(name, flags) for name, *_, flags in map(_size_entry, checked(sizes, list))}
        self.assumed = [expressions.read(text, self.symbols) for text in checked(assumed, list)]
        ranges: dict[sympy.Symbol, tuple[int | None, int, int | None]] = {}
        ranges |= {self.symbols[name]: (hint, low, most) for name, hint, low, most, _ in map(_size_entry, sizes)}
        self.symbols |= (of_counts := {name: _count(name) for name in checked(counts, list)})
        ranges |= dict.fromkeys(of_counts.values(), (None, 0, None))
        self.environment, made = environment_of(ranges, self.assumed)
        self._mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        self._sizes: dict[Any, SymInt] = dict(made)
        self._like: dict[str, Tensor] = {}  # meta tensors, by their kinds: such a one takes 500 us

    def value(self, number: Any) -> Any:
        """A value of the kind with this index.

        Raises:
            Malformed: there is none, or it is not one of fxbt's.
        """
        return self._read(self._kinds[_below(number, len(self._kinds))])

    def _read(self, text: Any, depth: int = 0) -> Any:
        word = text[0] if type(text) is list and text else None
        if word in ("list", "tuple"):
            if depth > _DEEPEST:
                raise Malformed("the file has a value that is nested too deeply")
            values = [self._read(part, depth + 1) for part in text[1:]]
            return values if word == "list" else tuple(values)
        if word == "tensor":
            return self._tensor(text)
        if word in ("size", "truth") and len(text) == 2:
            return self._number(expressions.read(text[1], self.symbols), word == "truth")
        return read_argument(text, ())

    def _tensor(self, text: list[Any]) -> Tensor:
        if len(text) != 6 or len(checked(text[4], list)) > _MOST_DIMS:
            raise Malformed("the file has something other than a kind of tensor where one belongs")
        device, key = _device(text[2]), repr(text)
        if key not in self._like:
            self._like[key] = self._made(text)
        made = fake_like(self._like[key], self._mode, device)
        return made.requires_grad_() if checked(text[3], bool) else made

    def _made(self, text: list[Any]) -> Tensor:
        shape, strides = ([self._dim(size) for size in checked(sizes, list)] for sizes in text[4:])
        try:
            return torch.empty_strided(shape, strides, dtype=_READERS["dtype"](text[1]), device="meta")
        except RuntimeError as error:
            raise Malformed(f"the file has a kind of tensor that torch refuses: {error}") from error

    def _dim(self, text: Any) -> int | SymInt:
        size = self._number(expressions.read(text, self.symbols), False)
        if type(size) is bool:
            raise Malformed("the file has a boolean where a size belongs")
        return size

    def _number(self, expression: Any, is_truth: bool) -> Any:
        if is_truth:
            return self._truth(expression)
        if expression.is_Integer:
            return int(expression)
        if not isinstance(expression, sympy.Expr):
            raise Malformed(f"{expression} is not a size")
        if expression not in self._sizes:
            made: Any = self.environment.create_symintnode(expression, hint=self._hint(expression))
            self._sizes[expression] = made
        return self._sizes[expression]

    def _truth(self, expression: Any) -> Any:
        if expression in (sympy.true, sympy.false):
            return bool(expression)
        return self.environment.create_symboolnode(expression)

    def _hint(self, expression: sympy.Expr) -> int | None:
        """The size in the example; None where no input tells it."""
        hints = {symbol: size.node.hint for symbol, size in self._sizes.items() if symbol.is_Symbol}
        values = {symbol: hint for symbol, hint in hints.items() if hint is not None}
        if not expression.free_symbols <= values.keys():
            return None
        value = expression.xreplace(values)
        if not value.is_Integer or abs(value) >= 2**63:
            raise Malformed(f"{expression} is not a size")
        return int(value)


def written_sizes(symbols: Sequence[sympy.Symbol], environment: ShapeEnv) -> list[Any]:
    """The name, example and limits of each symbol, and sympy's assumptions about it."""
    return [_written_size(symbol, environment) for symbol in symbols]


def _written_size(symbol: sympy.Symbol, environment: ShapeEnv) -> list[Any]:
    bounds = environment.var_to_range[symbol]
    most = None if bounds.upper >= _UNBOUNDED else int(bounds.upper)
    size: Any = environment.create_symintnode(symbol, hint=None)
    hint = size.node.hint
    if hint is None or bounds.lower < 0:
        raise Unstorable(f"the size {symbol} depends on the values of tensors")
    return [
        expressions.written(symbol),
        int(hint),
        int(bounds.lower),
        most,
        [symbol.is_positive, symbol.is_nonnegative],
    ]


def _size_entry(entry: Any) -> tuple[str, int, int, int | None, list[Any]]:
    parts: Any = entry if type(entry) is list and len(entry) == 5 else [None] * 5
    name, hint, lower, most, flags = parts
    numbers = [hint, lower, 0 if most is None else most]
    if not all(0 <= checked(number, int) < _UNBOUNDED for number in numbers) or not expressions.is_symbol(name):
        raise Malformed("the file has something other than an input size where one belongs")
    return name, hint, lower, most, checked(flags, list)


def _count(name: Any) -> sympy.Symbol:
    """A size that no input tells, of which no more is known than that it is none below 0."""
    if not expressions.is_count(name):
        raise Malformed("no size")
    return sympy.Symbol(name, integer=True)


def _symbol(name: str, flags: list[Any]) -> sympy.Symbol:
    if len(flags) != 2 or any(flag not in (True, None) for flag in flags):
        raise Malformed("the file has a size that is not an integer")
    known = {key: True for key, flag in zip(("positive", "nonnegative"), flags, strict=True) if flag}
    return sympy.Symbol(name, integer=True, **known)
