"""Places that Python reads and writes: a dict, names of a module, a class, a list, a closure's variable, ...

Each keeps its content, says whether it still has it, and restores it in place.
"""

from __future__ import annotations

import gc
import operator
import threading
import types
from typing import Any

import torch

from .model_state import versions

ABSENT = object()
HEAP = 1 << 9  # the flag of a class made by Python code
PLAIN = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device, type(...))
# elements of a tensor; small ones are also compared by value, because writes through `.data` count no version
_SMALL = 1024
# Attributes that classes have for Python's own sake, or that copying or pickling leaves there.
_NOT_READ = {
    *("__doc__", "__dict__", "__weakref__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl"),
    *("__slotnames__", "__parameters__", "__orig_bases__", "__qualname__", "__static_attributes__"),
}


class Place:
    """Something mutable of `owner`; `kept` is its content at the snapshot, `name` is for messages."""

    is_machinery = False  # torch's own; some of it is replaced during a trace

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.counted: dict[Any, Any] = {}  # for places that have one: the dict whose version shows changes
        self.kept: Any = self.read()

    def read(self) -> Any:
        """The current content."""
        raise NotImplementedError

    def holds(self) -> bool:
        """Whether the content is as it was."""
        return same(self.read(), self.kept)

    def changed(self) -> list[str]:
        """The names of what differs, for messages."""
        return [self.name]

    def restore(self) -> None:
        """Puts the old content back."""
        raise NotImplementedError

    def renew(self) -> None:
        """Accepts the current content."""
        self.kept = self.read()


class Dict(Place):
    """A dict, or an object's attributes."""

    def __init__(self, owner: dict[Any, Any], name: str, mark: str = "") -> None:
        super().__init__(owner, name)
        self.counted = owner
        self._mark = mark

    def read(self) -> dict[Any, Any]:
        return dict(dict.items(self.owner))  # the stored values; a class may return others (ACT2FN of transformers)

    def holds(self) -> bool:
        return not self._differing()

    def changed(self) -> list[str]:
        return [f"{self.name}{self._mark}{key}" if self._mark else f"{self.name}[{key!r}]" for key in self._differing()]

    def restore(self) -> None:
        self.owner.clear()
        self.owner.update(self.kept)

    def _differing(self) -> list[Any]:
        now = self.read()
        if len(now) == len(self.kept) and list(now) == list(self.kept):
            return [key for key, old in self.kept.items() if not same(now[key], old)]
        keys = {**self.kept, **now}
        return [key for key in keys if not same(now.get(key, ABSENT), self.kept.get(key, ABSENT))]


class Names(Dict):
    """Some names of a module."""

    def __init__(self, owner: dict[str, Any], name: str) -> None:
        self.kept: dict[str, Any] = {}
        super().__init__(owner, name, ".")

    def watch(self, name: str) -> Any:
        """Adds a name; returns its value, or `ABSENT`."""
        return self.kept.setdefault(name, self.owner.get(name, ABSENT))

    def read(self) -> dict[str, Any]:
        return {name: self.owner.get(name, ABSENT) for name in self.kept}

    def restore(self) -> None:
        for name in self._differing():
            if self.kept[name] is ABSENT:
                self.owner.pop(name, None)
            else:
                self.owner[name] = self.kept[name]


class Class(Dict):
    """The attributes of a class itself."""

    def __init__(self, owner: type, name: str) -> None:
        super().__init__(owner, name, ".")  # type: ignore[arg-type]
        self.counted = gc.get_referents(owner.__dict__)[0]  # the dict behind the mapping that Python shows

    def read(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.owner).items() if name not in _NOT_READ}

    def restore(self) -> None:
        for name in self._differing():
            if name in self.kept:
                type.__setattr__(self.owner, name, self.kept[name])
            else:
                type.__delattr__(self.owner, name)


class Items(Place):
    """A list, set, deque or bytearray."""

    def read(self) -> list[Any]:
        return list(self.owner)

    def holds(self) -> bool:
        if len(self.owner) != len(self.kept):
            return False
        return all(map(operator.is_, self.owner, self.kept)) or _same_items(self.read(), self.kept)

    def restore(self) -> None:
        self.owner.clear()
        self.owner.update(self.kept) if isinstance(self.owner, set) else self.owner.extend(self.kept)


class Cell(Place):
    """A variable of a closure."""

    def read(self) -> Any:
        return contents(self.owner)

    def holds(self) -> bool:
        return contents(self.owner) is self.kept or super().holds()

    def restore(self) -> None:
        if self.kept is ABSENT:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = self.kept


class Function(Place):
    """A function's code and defaults."""

    def read(self) -> Any:
        return self.owner.__code__, self.owner.__defaults__, self.owner.__kwdefaults__

    def restore(self) -> None:
        self.owner.__code__, self.owner.__defaults__, self.owner.__kwdefaults__ = self.kept


class Slots(Place):
    """The attributes of an object without a dict."""

    def __init__(self, owner: Any, name: str, slots: list[str]) -> None:
        self._slots = slots
        super().__init__(owner, name)

    def read(self) -> tuple[Any, ...]:
        return tuple([getattr(self.owner, name, ABSENT) for name in self._slots])

    def restore(self) -> None:
        for name, value in zip(self._slots, self.kept, strict=True):
            if value is not ABSENT:
                object.__setattr__(self.owner, name, value)
            elif hasattr(self.owner, name):
                object.__delattr__(self.owner, name)


class Local(Place):
    """The value of a context variable or a thread-local object in this context."""

    def read(self) -> Any:
        return tuple(vars(self.owner).items()) if isinstance(self.owner, threading.local) else self.owner.get(ABSENT)

    def restore(self) -> None:
        if isinstance(self.owner, threading.local):
            vars(self.owner).clear()
            vars(self.owner).update(self.kept)
        elif self.kept is not ABSENT:
            self.owner.set(self.kept)


class Level(Place):
    """The level from which a logger lets messages through; its own cache of that does not matter."""

    def read(self) -> tuple[int, bool, int]:
        logger = self.owner
        return logger.getEffectiveLevel(), logger.disabled, logger.manager.disable

    def restore(self) -> None:
        self.renew()  # it may be another logger's level, and affects no value of a graph, which is refused anyway


class Values(Place):
    """A tensor's identity, its write counter, and its values if they are few."""

    def read(self) -> tuple[Any, ...]:
        tensor = self.owner
        is_small = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.numel() <= _SMALL
        address = tensor.data_ptr() if tensor.layout is torch.strided else 0
        few = tensor.detach().clone().tolist() if is_small else None
        return tuple(versions([tensor])), address, tensor.dtype, tuple(tensor.shape), tensor.requires_grad, repr(few)

    def restore(self) -> None:
        self.renew()  # restoring the values is itself a counted write


class Array(Place):
    """The values of a numpy array."""

    def read(self) -> tuple[Any, ...]:
        return self.owner.dtype.str, self.owner.shape, self.owner.tobytes()

    def restore(self) -> None:
        import numpy

        self.owner[...] = numpy.frombuffer(self.kept[2], self.owner.dtype).reshape(self.kept[1])


def same(new: Any, old: Any) -> bool:
    """Whether two values are identical, or plain values that no code can tell apart."""
    if new is old:
        return True
    if type(new) is not type(old):
        return False
    if isinstance(new, (tuple, list)):
        return _same_items(new, old)
    if isinstance(new, types.MethodType):
        return new.__self__ is old.__self__ and new.__func__ is old.__func__
    return type(new) in PLAIN and repr(new) == repr(old)  # 0.0 differs from -0.0, and NaN equals NaN


def _same_items(new: Any, old: Any) -> bool:
    return len(new) == len(old) and all(map(same, new, old))


def contents(cell: Any) -> Any:
    """The value in a closure's cell, or `ABSENT`."""
    try:
        return cell.cell_contents
    except ValueError:  # a variable without a value yet
        return ABSENT


def slots_of(kind: type) -> list[str]:
    """The names in `__slots__` of a class and its bases."""
    return [
        name
        for base in kind.__mro__
        for name, value in base.__dict__.items()
        if isinstance(value, types.MemberDescriptorType) and base.__flags__ & HEAP and name not in _NOT_READ
    ]
