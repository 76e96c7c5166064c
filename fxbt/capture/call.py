"""Turns (args, kwargs) into a `Call`: its distinct tensors in order, and a hashable key for everything else."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NotCapturable
from ..torch_compat import is_any_autocast_enabled
from .containers import (
    Attribute,
    Unread,
    children,
    is_plain_object,
    is_registered,
    named_leaves,
    place_of,
    pytree_parts,
    rebuilt,
)
from .memory import sharing
from .number_inputs import Number, Numbers, as_tensor

TENSOR_TYPES = (Tensor, nn.Parameter)
STATIC_TYPES = frozenset(
    [
        type(None),
        bool,
        str,
        bytes,
        torch.dtype,
        torch.device,
        torch.Size,
        torch.layout,
        torch.memory_format,
    ]
)

_MARKS = "_dynamo"  # torch's own marks on tensors, for example on a static cache's
_LEAST_DIMS = 3  # of keys and values


@dataclass(slots=True)
class Call:
    """One call of a model. `tensors` are the distinct tensors in (args, kwargs), in order of appearance.

    Two calls with equal `key` differ only in the shapes and values of their tensors. These include the tensors for
    `numbers`, Python numbers (by place) that change from call to call; `constants` are the places of other numbers.
    `objects` counts objects of plain classes, such as a KV cache and its layers.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: tuple[Tensor, ...]
    key: Hashable
    unread: dict[int, Unread] = field(default_factory=dict)  # by id: attributes that no graph can know
    numbers: dict[str, Number] = field(default_factory=dict)
    constants: tuple[str, ...] = ()
    held: frozenset[int] = frozenset()  # tensors that are attributes of an object, such as a KV cache's
    past: frozenset[int] = frozenset()  # those of them that may be keys or values
    objects: int = 0
    growing: frozenset[tuple[str, int]] = frozenset()  # axes of these tensors, by name, that forward makes longer
    new_tokens: int | None = None  # index of the tensor whose first two axes are the tokens that forward adds to them
    shared: frozenset[int] = frozenset()  # tensors that are copies (`apart`) of some whose memory another one shares

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with `tensors` in place of `self.tensors`, in fresh containers."""
        leaves = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)} | self.unread
        numbers = {place: number.of(tensors) for place, number in self.numbers.items()}
        args = tuple([rebuilt(value, f"args[{i}]", leaves, numbers) for i, value in enumerate(self.args)])
        return args, {name: rebuilt(value, name, leaves, numbers) for name, value in self.kwargs.items()}

    def copied(self) -> Call:
        """The same call in its own containers, which do not change whatever forward does to the caller's."""
        args, kwargs = self.rebuild(self.tensors)
        return replace(self, args=args, kwargs=kwargs)

    def apart(self, others: Sequence[Tensor] = ()) -> Call:
        """The same call, its objects' tensors in memory of their own: what forward writes there shows nowhere else.

        `others` are further tensors whose memory counts for `shared`.
        """
        tensors = [t.detach().clone() if i in self.held else t for i, t in enumerate(self.tensors)]
        args, kwargs = self.rebuild(tensors)
        shared = self.shared | sharing([*self.tensors, *others])
        return replace(self, args=args, kwargs=kwargs, tensors=tuple(tensors), shared=shared)

    def with_lessons_of(self, other: Call) -> Call:
        """The same call, with what was learned of another reading of it."""
        return replace(self, growing=other.growing, new_tokens=other.new_tokens, shared=other.shared)

    @property
    def names(self) -> list[str]:
        """The place of each tensor in the call: `input_ids`, `args[0]`, `batch['pixels'][1]`."""
        named: dict[int, str] = {}
        for place, leaf in named_arguments(self.args, self.kwargs):
            named.setdefault(id(leaf), place)
        named.update({id(self.tensors[number.index]): place for place, number in self.numbers.items()})
        return [named[id(tensor)] for tensor in self.tensors]

    def __str__(self) -> str:
        shown = [
            f"{place}={self.numbers.get(place) or _show(leaf)}"
            for place, leaf in named_arguments(self.args, self.kwargs)
        ]
        return f"({', '.join(shown)}){_show_modes(self.tensors)}"


class Binder:
    """Turns calls of one `forward` into `Call`s, so that positional and keyword calls share a key.

    Example:
        >>> call = Binder(model.forward).call((ids,), {"attention_mask": mask})
        >>> call.names
        ['input_ids', 'attention_mask']
    """

    def __init__(self, forward: Callable[..., Any], numbers: Numbers | None = None) -> None:
        self._numbers = numbers
        parameters = list(inspect.signature(forward).parameters.values())
        self._order = {p.name: i for i, p in enumerate(parameters)}
        by_keyword = [p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters]
        first_other = by_keyword.index(False) if False in by_keyword else len(parameters)
        self._positional = [p.name for p in parameters[:first_other]]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Reads a call; raises `NotCapturable` if an argument holds something that no graph can take."""
        args, kwargs = self._by_keyword(args, kwargs)
        reader = _Reader(self._numbers)
        parts: list[Hashable] = [reader.key(v, f"args[{i}]") for i, v in enumerate(args)]
        for name, value in kwargs.items():
            parts += (name, reader.key(value, name))
        tensors = reader.tensors
        key = (len(args), *parts, *_modes(tensors))
        return Call(
            args,
            kwargs,
            tuple(tensors),
            key,
            reader.unread,
            reader.numbers,
            tuple(reader.constants),
            frozenset(reader.held),
            frozenset(reader.past),
            reader.objects,
        )

    def expect_others(self, places: Iterable[str]) -> None:
        """From now on, the numbers at these places are inputs of graphs."""
        if self._numbers is not None:
            self._numbers.expect_others(places)

    def _by_keyword(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Flags given by position stay there: decorators around a forward may only look for them among the keywords.
        plain = all(value is None or type(value) in TENSOR_TYPES for value in args)
        names = self._positional[: len(args)]
        if not plain or len(names) < len(args) or not kwargs.keys().isdisjoint(names):
            return args, kwargs
        named = {**dict(zip(names, args, strict=True)), **kwargs}
        order, last = self._order, len(self._order)
        return (), {name: named[name] for name in sorted(named, key=lambda name: order.get(name, last))}


def make_call(model: nn.Module, *args: Any, **kwargs: Any) -> Call:
    """The `Call` of `model(*args, **kwargs)`."""
    return Binder(model.forward).call(args, kwargs)


class _Reader:
    """Reads the arguments of one call: the part of the key of each, and the tensors."""

    def __init__(self, known: Numbers | None) -> None:
        self.tensors: list[Tensor] = []
        self.unread: dict[int, Unread] = {}  # by id: attributes that no graph can know
        self.numbers: dict[str, Number] = {}
        self.constants: list[str] = []
        self.held: set[int] = set()
        self.past: set[int] = set()
        self.objects = 0
        self._seen: dict[int, int] = {}
        self._known = known
        self._outer: list[int] = []  # ids of the containers around the current value
        self._containers: dict[int, int] = {}  # by id: order of first appearance

    def key(self, value: Any, place: str) -> Hashable:
        kind = type(value)
        if kind in TENSOR_TYPES:
            return self._tensor_key(value, place)
        if kind is Unread:
            raise NotCapturable(f"argument {place} stands for a value that was not read")
        if kind is int or kind is float:
            return self._number_key(value, place)
        if kind in STATIC_TYPES or isinstance(value, (enum.Enum, type)):
            return (kind, value)
        if kind is complex:
            return (kind, repr(value))  # -0.0 == 0.0 and nan != nan
        items = children(value)
        if items is None:
            raise _not_capturable(value, place)
        return self._container_key(value, items, place)

    def _container_key(self, value: Any, items: dict[Any, Any], place: str) -> Hashable:
        if id(value) in self._outer:
            raise _Circular(
                f"argument {place} is a {type(value).__name__} that contains itself; pass arguments without cycles"
            )
        is_again = id(value) in self._containers and type(value) is not tuple
        first = self._containers.setdefault(id(value), len(self._containers))
        self._outer.append(id(value))
        parts = self._object_key(items, place) if _is_object(value) else self._parts_key(items, place)
        self._outer.pop()
        return (type(value), *_context(value, place), *items, *parts, *(("same", first) if is_again else ()))

    def _parts_key(self, items: dict[Any, Any], place: str) -> list[Hashable]:
        return [self._part_key(name, item, place) for name, item in items.items()]

    def _object_key(self, items: dict[Any, Any], place: str) -> list[Hashable]:
        """The keys of an object's attributes; numbers come last, because their key depends on the others."""
        self.objects += 1
        numbers = {name: item for name, item in items.items() if type(item) in (int, float)}
        others = {name: item for name, item in items.items() if name not in numbers}
        count = len(self.tensors)
        parts = self._parts_key(others, place)
        inside = set(range(count, len(self.tensors))) - {number.index for number in self.numbers.values()}
        self.held |= inside
        self.past.update(i for i in inside if self.tensors[i].ndim >= _LEAST_DIMS)
        among = hash((*others, *parts)) if numbers else None
        return [*parts, *(self._number_key(item, place_of(place, name), among) for name, item in numbers.items())]

    def _part_key(self, name: Any, item: Any, place: str) -> Hashable:
        """The key of a container's part. An attribute that no graph can take counts by its type only."""
        count = len(self.tensors)
        try:
            return self.key(item, place_of(place, name))
        except _Circular:
            raise
        except NotCapturable:
            if not isinstance(name, Attribute):
                raise
        for tensor in self.tensors[count:]:
            self._seen.pop(id(tensor), None)
        del self.tensors[count:]
        self.numbers = {place: number for place, number in self.numbers.items() if number.index < count}
        self.held = {index for index in self.held if index < count}
        self.past = {index for index in self.past if index < count}
        self.unread[id(item)] = Unread(name)
        return (type(item), "not read")

    def _tensor_key(self, tensor: Tensor, place: str) -> Hashable:
        first = self._seen.setdefault(id(tensor), len(self.tensors))
        if first < len(self.tensors):
            return ("same tensor", first)
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            raise NotCapturable(f"argument {place} is a {_layout(tensor)} tensor; a graph takes dense tensors only")
        if tensor.__dict__ and type(tensor) is Tensor and not all(name.startswith(_MARKS) for name in tensor.__dict__):
            raise NotCapturable(
                f"argument {place} has attributes of its own ({', '.join(tensor.__dict__)}), which forward may read"
            )
        if tensor.is_meta:
            raise NotCapturable(f"argument {place} is a meta tensor: there is nothing to compute")
        self.tensors.append(tensor)
        return (tensor.dtype, tensor.device, tensor.ndim, tensor.requires_grad)

    def _number_key(self, value: int | float, place: str, among: Hashable = None) -> Hashable:
        kind = type(value)
        if self._known is None or not self._known.varies(place, value, among):
            self.constants += [place] if among is None else []
            return (kind, repr(value))
        self.numbers[place] = Number(len(self.tensors), kind, kind is int and value < 0, among)
        self.tensors.append(as_tensor(value))
        return (kind, "any", self.numbers[place].is_negative)


class _Circular(NotCapturable):
    """An argument contains itself."""


def _is_object(value: Any) -> bool:
    """Whether a container is an object of a plain class, not a mapping or dataclass."""
    return is_plain_object(value) and not isinstance(value, Mapping) and not is_dataclass(value)


def _context(value: Any, place: str) -> tuple[Hashable, ...]:
    """The context, besides the parts, from which pytree rebuilds an object of a registered class; () for others."""
    if is_plain_object(value) or not is_registered(value) or isinstance(value, Mapping):
        return ()
    context = pytree_parts(value)[1]
    try:
        hash(context)
    except TypeError as error:
        raise NotCapturable(
            f"argument {place} holds a {type(value).__name__}, whose pytree context cannot be hashed: {error}"
        ) from error
    return (context,)


def _not_capturable(value: Any, place: str) -> NotCapturable:
    kind = type(value)
    if isinstance(value, torch.fx.Proxy) or (isinstance(value, Tensor) and kind.__module__.startswith("torch.")):
        return NotCapturable(f"argument {place} is a {kind.__name__}", silent=True)  # someone traces the model
    return NotCapturable(
        f"argument {place} holds a {kind.__name__}; a graph takes tensors, plain values and tuples, lists or dicts of "
        "them, so such calls run the original forward"
    )


def _modes(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    if not is_any_autocast_enabled():
        return modes
    kinds = sorted({"cpu", *(tensor.device.type for tensor in tensors)})
    return (*modes, *[(k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)])


def named_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(place, leaf) for all leaves of a call's arguments, in order: `args[0]`, `batch['ids']`."""
    yield from named_leaves(args, "args")
    for name, value in kwargs.items():
        yield from named_leaves(value, name)


def shown_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The tensors of a call for a reader: `(input_ids torch.int64[2, 7], mask torch.bool[2, 7])`."""
    named = [(name, leaf) for name, leaf in named_arguments(args, kwargs) if type(leaf) in TENSOR_TYPES]
    return f"({', '.join(f'{name} {tensor.dtype}{list(tensor.shape)}' for name, tensor in named)})"


def _layout(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    return "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")


def _show(leaf: Any) -> str:
    if type(leaf) not in TENSOR_TYPES:
        return repr(leaf)
    device = "" if leaf.device.type == "cpu" else f" {leaf.device}"
    grad = " requires_grad" if leaf.requires_grad else ""
    return f"{str(leaf.dtype).removeprefix('torch.')}[{', '.join('?' * leaf.ndim)}]{device}{grad}"


def _show_modes(tensors: Sequence[Tensor]) -> str:
    grad, inference, *casts = _modes(tensors)
    words = [
        "grad" if grad else "",
        "inference_mode" if inference else "",
        *[f"autocast {c[0]} {c[1]}" for c in casts],
    ]
    return "".join(f" {word}" for word in words if word)
