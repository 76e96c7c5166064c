"""Decides whether two layers, or two calls of them, are alike for a trace: equal except for the values of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, nn

Name = tuple[str, str]  # the path of a module inside a layer, and an attribute of it

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_NAMED = ("_parameters", "_buffers", "_modules")  # compared separately, except for entries that are None


def differences(one: nn.Module, other: nn.Module) -> set[Name] | None:
    """The integers in which two layers differ, as (path, name); None if they differ in anything else but tensors.

    A layer with hooks is never like another one.

    Example:
        >>> differences(bert.encoder.layer[0], bert.encoder.layer[1])
        {('attention.self', 'layer_idx')}
    """
    found: set[Name] = set()
    left, right = modules_of(one), modules_of(other)
    if list(left) != list(right):
        return None
    for path, module in left.items():
        names = _attributes_that_differ(module, right[path])
        if names is None:
            return None
        found.update((path, name) for name in names)
    tensors = tensors_of(one), tensors_of(other)
    are_alike = len(tensors[0]) == len(tensors[1]) and all(map(same_value, *tensors))
    return found if are_alike and _repeats(tensors[0]) == _repeats(tensors[1]) else None


def _attributes_that_differ(one: nn.Module, other: nn.Module) -> set[str] | None:
    left, right = vars(one), vars(other)
    if type(one) is not type(other) or list(left) != list(right):
        return None
    found = set()
    for name, value in left.items():
        if name in _NAMED:
            if _names_in(value) != _names_in(right[name]):
                return None
        elif name.endswith(("_hooks", "_hooks_with_kwargs")):
            if value or right[name]:
                return None
        elif not _same_attribute(value, right[name]):
            if type(value) is not int or type(right[name]) is not int:
                return None
            found.add(name)
    return found


def _names_in(held: dict[str, Any]) -> list[tuple[str, bool]]:
    return [(name, value is None) for name, value in held.items()]


def _same_attribute(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same_attribute, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same_attribute, one.values(), other.values()))
    if isinstance(one, (set, frozenset)):
        return one == other and all(isinstance(value, _SIMPLE) for value in one)
    return isinstance(one, _SIMPLE) and one == other


def modules_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of a layer by relative path, including repetitions."""
    return dict(layer.named_modules(remove_duplicate=False))


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a layer, in the same order for all like layers."""
    held = [kind for module in modules_of(layer).values() for kind in (module._parameters, module._buffers)]
    return [tensor for tensors in held for tensor in tensors.values() if tensor is not None]


def values_of(layer: nn.Module) -> list[tuple[str, str, int]]:
    """The ids of a layer's content: equal before and after a call that changes nothing."""
    found: list[tuple[str, str, int]] = []
    for path, module in modules_of(layer).items():
        for name, value in vars(module).items():
            held = value.items() if isinstance(value, dict) else [("", value)]
            found += [(path, f"{name}.{key}", id(part)) for key, part in held]
    return found


def leaves_of(value: Any, leaves: list[Any]) -> Any:
    """How tuples are nested in a value; their content is appended to `leaves`."""
    if type(value) is tuple:
        return [leaves_of(part, leaves) for part in value]
    leaves.append(value)
    return None


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is known by its value, and a layer cannot change it except by writing to a tensor."""
    return isinstance(leaf, (*_SIMPLE, Tensor, SymInt))


def same_value(one: Any, other: Any) -> bool:
    """Whether two leaves are the same for a trace: like tensors, or equal values of one type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return _form(one) == _form(other)
    if isinstance(one, SymInt):
        return one.node.expr == other.node.expr
    return one is other or one == other


def _form(tensor: Tensor) -> tuple[Any, ...]:
    places = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    sizes = [size.node.expr if isinstance(size, SymInt) else size for size in places]
    return (sizes, tensor.ndim, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, tensor.is_conj())


def _repeats(tensors: list[Tensor]) -> list[int]:
    """For each tensor, the index of the first one that is the same object."""
    first: dict[int, int] = {}
    return [first.setdefault(id(tensor), place) for place, tensor in enumerate(tensors)]
