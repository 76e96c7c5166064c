"""The containers that arguments of a call may be: their parts, how to make them anew, and what a forward did to them.

Lists, tuples and dicts are their items; a `Mapping` of another kind (`UserDict`, a tokenizer's `BatchEncoding`) and a
dataclass are their attributes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..torch_compat import pytree


class Attribute(str):
    """The name of a part that is an attribute, where others are items."""


class Unread:
    """Stands, while a model is traced, for an attribute that no graph can know: reading it ends the capture."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattribute__(self, attribute: str) -> Any:
        _end_capture(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _end_capture(self)

    def __repr__(self) -> str:
        return "..."


def _end_capture(unread: Unread, *_: Any) -> NoReturn:
    name = object.__getattribute__(unread, "_name")
    raise CaptureError(f"forward reads {name} of an argument, which is no tensor or plain value")


for _method in ("bool", "len", "iter", "next", "hash", "eq", "getitem", "contains", "add", "mul"):
    setattr(Unread, f"__{_method}__", _end_capture)  # Python looks these up past __getattribute__


def is_record(value: Any) -> bool:
    """Whether value is a dataclass that is a dict too and known to pytree, like transformers' ModelOutput."""
    kind = type(value)
    return isinstance(value, OrderedDict) and dataclasses.is_dataclass(kind) and kind in pytree.SUPPORTED_NODES


def children(value: Any) -> dict[Any, Any] | None:
    """The parts of a container that a call may hold, by index or name; None for leaves and unknown types."""
    kind = type(value)
    if kind is Unread:
        return None
    if kind in (dict, OrderedDict, MappingProxyType) or is_record(value) or _is_plain_dict(value):
        return dict(value.items())
    if kind in (tuple, list) or pytree.is_namedtuple_instance(value):
        return dict(enumerate(value))
    if isinstance(value, Mapping) or dataclasses.is_dataclass(kind):
        return _attributes(value)
    return None


def named_leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, leaf) for all leaves of nested containers, in order."""
    items = children(value)
    if items is None:
        yield place, value
        return
    for name, item in items.items():
        yield from named_leaves(item, place_of(place, name))


def place_of(place: str, name: Any) -> str:
    """Where a part of the container at `place` stands: `batch['ids']`, `features.data`."""
    return f"{place}.{name}" if isinstance(name, Attribute) else f"{place}[{name!r}]"


def rebuilt(value: Any, place: str, leaves: dict[int, Any], numbers: dict[str, Any]) -> Any:
    """`value`, which stands at `place`, in fresh containers.

    In a leaf's place stands what `numbers` has for its place, or `leaves` for its id; other leaves stay.
    """
    if place in numbers:
        return numbers[place]
    if id(value) in leaves:
        return leaves[id(value)]
    items = children(value)
    if items is None:
        return value
    parts = {name: rebuilt(item, place_of(place, name), leaves, numbers) for name, item in items.items()}
    kind = type(value)
    if kind in (dict, OrderedDict) or is_record(value):
        return kind(**parts) if is_record(value) else kind(parts)
    if kind in (tuple, list):
        return kind(parts.values())
    if hasattr(value, "_fields"):
        return kind(*parts.values())
    if kind is MappingProxyType:
        return MappingProxyType(parts)
    return _like(value, parts)


def _like(value: Any, parts: dict[Any, Any]) -> Any:
    if isinstance(value, dict):
        new = copy.copy(value)
        _fill(new, parts)
        return new
    new = object.__new__(type(value))
    for name, part in parts.items():
        object.__setattr__(new, name, part)
    return new


def _is_plain_dict(value: Any) -> bool:
    """Whether a dict of a subclass (`defaultdict`) has its items and nothing else."""
    return isinstance(value, dict) and not getattr(value, "__dict__", None) and not dataclasses.is_dataclass(value)


def _attributes(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, (type, dict, Tensor, nn.Module, torch.ScriptObject)):
        return None
    if hasattr(value, "__dict__"):
        return {Attribute(name): part for name, part in vars(value).items()}
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return {Attribute(field.name): getattr(value, field.name) for field in fields} or None


# What a forward did to the containers that it was given


@dataclass(frozen=True)
class Given:
    """In a result: the container of the call's arguments with this number, itself and no copy of it."""

    number: int


class Changed(NamedTuple):
    """A forward's result, and the containers among its arguments that it changed, as they are afterwards."""

    result: Any
    contents: dict[int, dict[Any, Any]]


class Arguments:
    """The containers of a call, in the order they are met, and their parts as they were at first."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._containers = containers(args, kwargs)
        self._before = [children(container) or {} for container in self._containers]

    def seen_in(self, result: Any) -> Any:
        """`result`, or, where the call's containers are in it or were changed, a `Changed` with their numbers."""
        numbers = {id(container): number for number, container in enumerate(self._containers)}
        contents = {}
        for number, (container, before) in enumerate(zip(self._containers, self._before, strict=True)):
            now = children(container) or {}
            if list(now) != list(before) or any(now[name] is not before[name] for name in now):
                contents[number] = _numbered(now, numbers)
        marked = _numbered(result, numbers)
        return Changed(marked, contents) if contents or _has_given(marked) else result


def containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The containers inside a call's arguments, in order, outer ones first."""
    found = []
    waiting = [*args, *kwargs.values()][::-1]
    while waiting:
        value = waiting.pop()
        if (items := children(value)) is not None:
            found.append(value)
            waiting.extend(reversed(items.values()))
    return found


def put_back(changed: Changed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Does to a call's containers what the forward did to those it was traced with; returns the call's result."""
    found = containers(args, kwargs)

    def given(leaf: Any) -> Any:
        return found[leaf.number] if type(leaf) is Given else leaf

    for number, content in changed.contents.items():
        _fill(found[number], pytree.tree_map(given, content))
    return pytree.tree_map(given, changed.result)


def _fill(container: Any, content: dict[Any, Any]) -> None:
    if isinstance(container, list):
        container[:] = content.values()
    elif isinstance(container, dict):
        _fill_dict(container, content)
    else:
        for name in children(container).keys() - content.keys():  # type: ignore[union-attr]
            object.__delattr__(container, name)
        for name, part in content.items():
            object.__setattr__(container, name, part)


def _fill_dict(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    if is_record(container):  # items are attributes too, and cannot be deleted
        container.update(content)
        return
    base = OrderedDict if isinstance(container, OrderedDict) else dict  # past what a subclass makes of writes
    base.clear(container)
    for name, part in content.items():
        base.__setitem__(container, name, part)


def _numbered(value: Any, numbers: dict[int, int]) -> Any:
    def mark(leaf: Any) -> Any:
        return Given(numbers[id(leaf)]) if id(leaf) in numbers else leaf

    return pytree.tree_map(mark, value, is_leaf=lambda part: id(part) in numbers)


def _has_given(value: Any) -> bool:
    return any(type(leaf) is Given for leaf in pytree.tree_leaves(value))
