"""The containers that a call's arguments may be: their parts, how to rebuild them, and what forward did to them.

Lists, tuples and dicts have items. Other `Mapping`s (`UserDict`, a tokenizer's `BatchEncoding`), dataclasses and
objects of plain classes (a KV cache and its layers) have attributes. An object of any other class known to pytree has
the parts that pytree gives it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..torch_compat import FakeTensor, pytree

_OWN_WAY_OF_COPYING = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__new__", "__del__", "__slots__")


class Attribute(str):
    """The name of a part that is an attribute, not an item."""


class Unread:
    """Replaces an attribute that no graph can know during a trace: reading it ends the capture."""

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
    raise CaptureError(f"forward reads {name} of an argument, which is neither a tensor nor a plain value")


for _method in ("bool", "len", "iter", "next", "hash", "eq", "getitem", "contains", "add", "mul"):
    setattr(Unread, f"__{_method}__", _end_capture)  # Python looks these up without __getattribute__


def is_record(value: Any) -> bool:
    """Whether the value is a dataclass that is also a dict and known to pytree, like transformers' ModelOutput."""
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
    if is_plain_object(value):
        return _attributes(value) or None
    return dict(enumerate(pytree_parts(value)[0])) if is_registered(value) else None


@functools.lru_cache(maxsize=1024)
def _is_plain_class(kind: Hashable) -> bool:
    """Whether objects of a class are created by Python's `object` alone, and consist of their `__dict__`."""
    assert isinstance(kind, type)
    if issubclass(kind, (Tensor, nn.Module, type, torch.SymInt, torch.SymFloat, torch.SymBool, Unread)):
        return False
    bases = kind.__mro__[:-1]
    is_known = kind.__module__ != "builtins" and bool(bases) and bases[-1].__base__ is object
    own = any(vars(base).get(name) for base in bases for name in (*_OWN_WAY_OF_COPYING, "__call__"))
    return is_known and not own


def is_plain_object(value: Any) -> bool:
    """Whether an object consists of its class and its `__dict__`."""
    return _is_plain_class(type(value)) and hasattr(value, "__dict__")  # type: ignore[arg-type]


def is_registered(value: Any) -> bool:
    """Whether the value's class is not Python's or torch's but pytree can flatten and unflatten it."""
    kind = type(value)
    return kind in pytree.SUPPORTED_NODES and kind.__module__.partition(".")[0] not in ("builtins", "torch")


def pytree_parts(value: Any) -> tuple[list[Any], Any]:
    """The parts and the context that pytree gives an object of a registered class."""
    parts, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return list(parts), context


def named_leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(place, leaf) for all leaves of nested containers, in order."""
    items = children(value)
    if items is None:
        yield place, value
        return
    for name, item in items.items():
        yield from named_leaves(item, place_of(place, name))


def place_of(place: str, name: Any) -> str:
    """The place of a part of the container at `place`: `batch['ids']`, `features.data`."""
    return f"{place}.{name}" if isinstance(name, Attribute) else f"{place}[{name!r}]"


def rebuilt(value: Any, place: str, leaves: dict[int, Any], numbers: dict[str, Any]) -> Any:
    """`value`, which is at `place`, in fresh containers.

    A leaf is replaced by the entry of `numbers` for its place or of `leaves` for its id; other leaves stay.
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
    if any(type(name) is Attribute for name in parts) or isinstance(value, dict):
        return _like(value, parts)
    return pytree.SUPPORTED_NODES[kind].unflatten_fn(list(parts.values()), pytree_parts(value)[1])


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


# Changes of the containers given to forward

Place = tuple[Any, ...]  # of a container in a call: an argument's keyword or index, then names of parts

GONE = "fxbt: this attribute was deleted"


@dataclass(frozen=True)
class Given:
    """In a result: the container itself (not a copy) at this place of the call's arguments."""

    place: Place


class Changed(NamedTuple):
    """A forward's result, and the containers among its arguments that it changed, with their new content.

    For containers with attributes, that is the attributes that it set, and `GONE` for those that it deleted.
    """

    result: Any
    contents: dict[Place, dict[Any, Any]]


class Arguments:
    """The containers of a call in order, and their original parts."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._containers = containers(args, kwargs)
        self._before = {place: children(container) or {} for place, container in self._containers.items()}

    def seen_in(self, result: Any) -> Any:
        """`result`; or a `Changed` with places, if it contains the call's containers or forward changed them."""
        places: dict[int, Place] = {}
        for place, container in self._containers.items():
            places.setdefault(id(container), place)
        contents = {}
        for place, container in self._containers.items():
            before, now = self._before[place], children(container) or {}
            if list(now) != list(before) or any(_differs(now[name], before[name]) for name in now):
                contents[place] = _marked(_written(container, before, now), places)
        marked = _marked(result, places)
        return Changed(marked, contents) if contents or _has_given(marked) else result

    def is_inside(self, value: Any) -> bool:
        """Whether a new object's attributes include one of the call's containers."""
        known = set(map(id, self._containers.values()))
        found = containers((value,), {}).values()
        return any(id(container) in known for container in found)


def _differs(now: Any, before: Any) -> bool:
    if now is before or (type(now) is type(before) is int and now == before):
        return False
    return not (isinstance(now, FakeTensor) and isinstance(before, FakeTensor) and _is_unconverted(now, before))


def _is_unconverted(now: FakeTensor, before: FakeTensor) -> bool:
    """Whether a traced tensor is another one after a conversion to what it is already: outside a trace, the same."""
    forms = [
        (fake.dtype, fake.untyped_storage()._cdata, *map(str, (*fake.shape, *fake.stride(), fake.storage_offset())))
        for fake in (now, before)
    ]
    return forms[0] == forms[1]


def _written(container: Any, before: dict[Any, Any], now: dict[Any, Any]) -> dict[Any, Any]:
    if not _is_attributes(container, now):
        return now
    changed = {name: part for name, part in now.items() if name not in before or _differs(part, before[name])}
    return changed | {name: GONE for name in before if name not in now}


def _is_attributes(container: Any, parts: dict[Any, Any]) -> bool:
    return not isinstance(container, dict) and all(type(name) is Attribute for name in parts)


def containers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Place, Any]:
    """The containers inside a call's arguments by place, outer ones first."""
    found = {}
    waiting: list[tuple[Place, Any]] = [((name,), value) for name, value in [*enumerate(args), *kwargs.items()]][::-1]
    while waiting:
        place, value = waiting.pop()
        if (items := children(value)) is not None:
            found[place] = value
            waiting.extend(((*place, name), part) for name, part in reversed(items.items()))
    return found


def put_back(changed: Changed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Changes a call's containers as forward changed those it was traced with; returns the call's result."""

    def given(leaf: Any) -> Any:
        return at(leaf.place, args, kwargs) if type(leaf) is Given else leaf

    result = pytree.tree_map(given, changed.result)
    fill_all({place: pytree.tree_map(given, content) for place, content in changed.contents.items()}, args, kwargs)
    return result


def fill_all(contents: dict[Place, dict[Any, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Gives the containers at these places of a call what they are to hold."""
    found = [at(place, args, kwargs) for place in contents]  # all, before one of them is changed
    for container, content in zip(found, contents.values(), strict=True):
        _fill(container, content)


def at(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The container at a place of a call."""
    first, *rest = place
    value = args[first] if isinstance(first, int) else kwargs[first]
    for name in rest:
        value = vars(value)[name] if type(name) is Attribute and hasattr(value, "__dict__") else _part(value, name)
    return value


def _part(value: Any, name: Any) -> Any:
    is_items = type(value) in (list, tuple, dict)
    return value[name] if is_items else (children(value) or {})[name]


def _fill(container: Any, content: dict[Any, Any]) -> None:
    if isinstance(container, list):
        container[:] = content.values()
    elif isinstance(container, dict):
        _fill_dict(container, content)
    else:
        for name, part in content.items():
            _set_attribute(container, name, part)


def _set_attribute(container: Any, name: str, part: Any) -> None:
    if isinstance(part, str) and part == GONE:
        object.__delattr__(container, name)
    else:
        object.__setattr__(container, name, part)


def _fill_dict(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    if is_record(container):  # items are attributes, too, and cannot be deleted
        container.update(content)
        return
    base = OrderedDict if isinstance(container, OrderedDict) else dict  # bypasses a subclass's own handling of writes
    base.clear(container)
    for name, part in content.items():
        base.__setitem__(container, name, part)


def _marked(value: Any, places: dict[int, Place]) -> Any:
    def mark(leaf: Any) -> Any:
        if id(leaf) in places:
            return Given(places[id(leaf)])
        return leaf

    return pytree.tree_map(mark, value, is_leaf=lambda part: id(part) in places)


def _has_given(value: Any) -> bool:
    return any(type(leaf) is Given for leaf in pytree.tree_leaves(value))
