"""Python values as texts that are equal in two processes if code would do the same with them there.

Code becomes its bytecode, classes and modules their names, tensors their values. A value without such a text is
refused.
"""

from __future__ import annotations

import collections
import contextvars
import datetime
import enum
import fractions
import functools
import hashlib
import logging
import numbers
import re
import sys
import types
import typing
import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.places import ABSENT, PLAIN, contents, slots_of
from ..torch_compat import OpOverload
from .errors import Unstorable
from .tensors import values_of

_DEEPEST = 6  # the code that runs is compared in full; this limits the values it may be given
_CACHED = type(functools.lru_cache(len))
_BY_NAME: tuple[Any, ...] = (
    *(types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType, types.GetSetDescriptorType),
    *(types.MemberDescriptorType, types.ClassMethodDescriptorType, types.MethodWrapperType),
)
_BY_REPR = (
    *(numbers.Number, datetime.date, datetime.time, datetime.timedelta, fractions.Fraction, OpOverload),
    *(types.GenericAlias, types.UnionType, typing.TypeVar, torch.Size, torch.layout, torch.memory_format, re.Pattern),
)
# The content of these is compared where code reads it; by themselves, only their existence matters.
_BY_KIND = (contextvars.ContextVar, weakref.ReferenceType, types.CodeType, nn.Module)
_OPAQUE = ("_thread", "_abc", "_io", "threading")


def digest(text: str | bytes) -> str:
    """16 hexadecimal digits that identify a text.

    Example:
        >>> digest("a") == digest("b")
        False
    """
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def name_of_kind(kind: type) -> str:
    """`transformers.models.bert.modeling_bert.BertModel`."""
    return f"{kind.__module__}.{kind.__qualname__}"


@functools.lru_cache(maxsize=1 << 14)
def code_digest(code: types.CodeType) -> str:
    """A digest of what a code object does, whatever file it is in.

    Equal code objects have equal digests: they cover exactly what makes code objects equal.
    """
    flags = code.co_flags, code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_exceptiontable
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_qualname
    return digest(repr((flags, names, code.co_code, [_constant(constant) for constant in code.co_consts])))


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return code_digest(value)
    if isinstance(value, frozenset):
        return f"frozenset {sorted(map(_constant, value))}"
    return f"tuple {list(map(_constant, value))}" if isinstance(value, tuple) else f"{type(value)} {value!r}"


class Descriptions:
    """The texts of values; those of functions and objects are made once.

    Registries of a library have classes as keys and grow with every loaded model, so only entries for the `relevant`
    classes are included.

    Raises:
        Unstorable: from `of`, for a value without a text that is the same in another process.

    Example:
        >>> Descriptions().of({"a": [1, 2.0]})
        "{str 'a': list[int 1, float 2.0]}"
    """

    def __init__(self, relevant: Collection[type] = ()) -> None:
        self._relevant = {*relevant, *map(str, relevant)}
        self._known: dict[int, tuple[Any, str]] = {}  # functions and objects, with their texts

    def of(self, value: Any, depth: int = 0) -> str:
        """The text of a value."""
        kind = type(value)
        if kind in PLAIN:
            return f"{kind.__name__} {value!r}"
        if value is ABSENT:
            return "absent"
        if isinstance(value, enum.Enum):
            return f"{name_of_kind(kind)}.{value.name}"
        if isinstance(value, type):
            return f"class {name_of_kind(value)}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, Tensor):
            return _tensor(value)
        if depth > _DEEPEST:
            return f"a {name_of_kind(kind)}"
        return self._of_parts(value, kind, depth + 1)

    def _of_parts(self, value: Any, kind: type, depth: int) -> str:
        if isinstance(value, (dict, types.MappingProxyType)):
            items = [item for item in value.items() if self._counts(item[0])]
            inner = [f"{self.of(key, depth)}: {self.of(item, depth)}" for key, item in items]
            return f"{_kind_of_container(kind)}{{{', '.join(inner)}}}"
        if isinstance(value, (set, frozenset)):
            return f"{_kind_of_container(kind)}{{{', '.join(sorted(self._each(filter(self._counts, value), depth)))}}}"
        if isinstance(value, (list, tuple, collections.deque)) and not isinstance(value, torch.Size):
            return f"{_kind_of_container(kind)}[{', '.join(self._each(value, depth))}]"
        if isinstance(value, (staticmethod, classmethod, _CACHED)):
            return f"{kind.__name__} {self.of(value.__wrapped__, depth)}"
        if isinstance(value, property):
            return f"property {', '.join(self._each((value.fget, value.fset), depth))}"
        if isinstance(value, types.MethodType):
            return f"method {self.of(value.__func__, depth)} of {self.of(type(value.__self__), depth)}"
        if isinstance(value, functools.partial):
            return f"partial {', '.join(self._each((value.func, value.args, value.keywords), depth))}"
        return self._of_object(value, kind, depth)

    def _counts(self, key: Any) -> bool:
        is_class = isinstance(key, type) or (type(key) is str and key.startswith("<class '"))
        return not is_class or key in self._relevant

    def _each(self, values: Iterable[Any], depth: int) -> list[str]:
        return [self.of(value, depth) for value in values]

    def _of_object(self, value: Any, kind: type, depth: int) -> str:
        if isinstance(value, logging.Logger):
            return f"the logger {value.name}"
        if isinstance(value, _BY_NAME):
            return f"{kind.__name__} {getattr(value, '__qualname__', value.__name__)}"
        if isinstance(value, _BY_REPR):
            return f"{name_of_kind(kind)} {value!r}"
        if isinstance(value, _BY_KIND) or kind.__module__.partition(".")[0] in _OPAQUE:
            return f"a {name_of_kind(kind)}"
        if _is_array(value):
            return f"array {value.dtype} {value.shape} {digest(value.tobytes())}"
        names = slots_of(kind)
        if not names and not hasattr(value, "__dict__"):
            return _of_c(value, kind)
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        self._known[id(value)] = (value, f"a {name_of_kind(kind)}")  # inside itself
        inner = [f"{name}={self.of(getattr(value, name, ABSENT), depth)}" for name in names]
        inner += [f"{name}={self.of(item, depth)}" for name, item in getattr(value, "__dict__", {}).items()]
        text = f"{name_of_kind(kind)} {digest(', '.join(inner))}"
        self._known[id(value)] = (value, text)
        return text

    def _function(self, value: types.FunctionType, depth: int) -> str:
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        name = f"{value.__module__}.{value.__qualname__}"
        code = value.__code__
        if depth > _DEEPEST:
            return f"function {name} {code_digest(code)}"
        self._known[id(value)] = (value, f"function {name}")  # inside itself
        cells = [contents(cell) for cell in value.__closure__ or ()]
        given = self._each((value.__defaults__, value.__kwdefaults__, *cells), depth + 1)
        text = digest(f"{code_digest(code)} {given}")
        self._known[id(value)] = (value, f"function {name} {text}")
        return f"function {name} {text}"


def _kind_of_container(kind: type) -> str:
    return "" if kind is dict else kind.__name__ if kind.__module__ == "builtins" else name_of_kind(kind)


def _of_c(value: Any, kind: type) -> str:
    """The text of an object without attributes: its class, if it is torch's or Python's own."""
    if kind.__module__.partition(".")[0] in ("torch", *sys.stdlib_module_names):
        return f"a {name_of_kind(kind)}"
    raise Unstorable(f"forward reads a {name_of_kind(kind)}, which cannot be written as text")


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object


def _tensor(value: Tensor) -> str:
    if value.layout is not torch.strided or value.is_nested or value.is_meta or value.is_quantized:
        raise Unstorable(f"forward reads a tensor with layout {value.layout}, which cannot be written as text")
    return f"tensor {value.dtype} {value.device} {list(value.shape)} {value.requires_grad} {digest(values_of(value))}"
