"""A call (args, kwargs) -> `Call`: its distinct tensors in order, and a hashable key for everything else."""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import NotCapturable
from .numbers import Number, Numbers, as_tensor

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


@dataclass(slots=True)
class Call:
    """One call of a model. `tensors` are the distinct tensor objects of (args, kwargs) in order of appearance.

    Two calls with equal `key` differ only in the shapes and values of their tensors. Those include what stands for
    `numbers`, Python numbers (by their place) that change from call to call; `constants` are the places of the others.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: tuple[Tensor, ...]
    key: Hashable
    numbers: dict[str, Number] = field(default_factory=dict)
    constants: tuple[str, ...] = ()

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with `tensors` in the places of `self.tensors`, in fresh containers."""
        by_id = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        numbers = {place: number.of(tensors) for place, number in self.numbers.items()}
        args = tuple([_rebuild(value, by_id, f"args[{i}]", numbers) for i, value in enumerate(self.args)])
        return args, {name: _rebuild(value, by_id, name, numbers) for name, value in self.kwargs.items()}

    @property
    def names(self) -> list[str]:
        """Where each tensor stands in the call: `input_ids`, `args[0]`, `batch['pixels'][1]`."""
        named: dict[int, str] = {}
        for place, leaf in (*named_leaves(self.args, "args"), *_walk_kwargs(self.kwargs)):
            named.setdefault(id(leaf), place)
        named.update({id(self.tensors[number.index]): place for place, number in self.numbers.items()})
        return [named[id(tensor)] for tensor in self.tensors]

    def __str__(self) -> str:
        shown = [
            f"{place}={self.numbers.get(place) or _show(leaf)}"
            for place, leaf in (*named_leaves(self.args, "args"), *_walk_kwargs(self.kwargs))
        ]
        return f"({', '.join(shown)}){_show_modes(self.tensors)}"


class Binder:
    """Turns the calls of one `forward` into `Call`s, so that positional and keyword calls share a key.

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
        """Raises `NotCapturable` when an argument holds what no graph can take."""
        args, kwargs = self._by_keyword(args, kwargs)
        reader = _Reader(self._numbers)
        parts: list[Hashable] = [reader.key(v, f"args[{i}]") for i, v in enumerate(args)]
        for name, value in kwargs.items():
            parts += (name, reader.key(value, name))
        tensors = reader.tensors
        key = (len(args), *parts, *_modes(tensors))
        return Call(args, kwargs, tuple(tensors), key, reader.numbers, tuple(reader.constants))

    def _by_keyword(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Flags given by position stay there: decorators around a forward may look for them among the keywords only.
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


def is_record(value: Any) -> bool:
    """Whether value is a dataclass that is a dict too and known to pytree, like transformers' ModelOutput."""
    kind = type(value)
    return isinstance(value, OrderedDict) and dataclasses.is_dataclass(kind) and kind in pytree.SUPPORTED_NODES


def children(value: Any) -> dict[Any, Any] | None:
    """The items of a container that a call may hold, by index or name; None for leaves and unknown types."""
    kind = type(value)
    if kind in (dict, OrderedDict) or is_record(value):
        return dict(value.items())
    if kind in (tuple, list) or pytree.is_namedtuple_instance(value):
        return dict(enumerate(value))
    return None


class _Reader:
    """Reads the arguments of one call: each one's part of the key, and the tensors."""

    def __init__(self, known: Numbers | None) -> None:
        self.tensors: list[Tensor] = []
        self.numbers: dict[str, Number] = {}
        self.constants: list[str] = []
        self._seen: dict[int, int] = {}
        self._known = known

    def key(self, value: Any, place: str) -> Hashable:
        kind = type(value)
        if kind in TENSOR_TYPES:
            return self._tensor_key(value, place)
        if kind is int or kind is float:
            return self._number_key(value, place)
        if kind in STATIC_TYPES or isinstance(value, enum.Enum):
            return (kind, value)
        if kind is complex:
            return (kind, repr(value))  # -0.0 == 0.0 and nan != nan
        items = children(value)
        if items is None:
            raise _not_capturable(value, place)
        return (kind, *items, *[self.key(item, f"{place}[{name!r}]") for name, item in items.items()])

    def _tensor_key(self, tensor: Tensor, place: str) -> Hashable:
        first = self._seen.setdefault(id(tensor), len(self.tensors))
        if first < len(self.tensors):
            return ("same tensor", first)
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            raise NotCapturable(f"argument {place} is a {_layout(tensor)} tensor; graphs take dense tensors")
        self.tensors.append(tensor)
        return (tensor.dtype, tensor.device, tensor.ndim, tensor.requires_grad)

    def _number_key(self, value: int | float, place: str) -> Hashable:
        kind = type(value)
        if self._known is None or not self._known.varies(place, value):
            self.constants.append(place)
            return (kind, repr(value))
        self.numbers[place] = Number(len(self.tensors), kind, kind is int and value < 0)
        self.tensors.append(as_tensor(value))
        return (kind, "any", self.numbers[place].is_negative)


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
    if not torch._C._is_any_autocast_enabled():
        return modes
    kinds = sorted({"cpu", *(tensor.device.type for tensor in tensors)})
    return (*modes, *[(k, torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)])


def _rebuild(value: Any, tensors: dict[int, Any], place: str, numbers: dict[str, Any]) -> Any:
    if place in numbers:
        return numbers[place]
    if id(value) in tensors:
        return tensors[id(value)]
    items = children(value)
    if items is None:
        return value
    built = {name: _rebuild(item, tensors, f"{place}[{name!r}]", numbers) for name, item in items.items()}
    if is_record(value):
        return type(value)(**built)
    if isinstance(value, dict):
        return type(value)(built)
    return type(value)(*built.values()) if hasattr(value, "_fields") else type(value)(built.values())


def named_leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, leaf) for all leaves of nested containers, in order."""
    items = children(value)
    if items is None:
        yield place, value
        return
    for name, item in items.items():
        yield from named_leaves(item, f"{place}[{name!r}]")


def _walk_kwargs(kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in kwargs.items():
        yield from named_leaves(value, name)


def leaves(value: Any) -> list[Any]:
    """All leaves of nested containers, in order."""
    return [leaf for _, leaf in named_leaves(value, "")]


def _layout(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested"
    return "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")


def _show(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
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
