"""A model's attributes as lines: the kinds of weights, and digests of the values of everything else."""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.model_state import HOOKS, NOT_READ
from ..capture.places import HEAP
from .descriptions import Descriptions, digest, name_of_kind
from .errors import Unstorable
from .tensors import values_of

_OWN = ("_parameters", "_buffers", "_modules")


def lines_of_model(model: nn.Module, describe: Descriptions, read: Set[str]) -> dict[str, str]:
    """A line for each attribute of each module, and for each attribute of an object (a config) among these.

    Private attributes that no code names (`read`) are left out: transformers keeps a hash of its process in one.

    Raises:
        Unstorable: something has no text that another process could compare.

    Example:
        >>> lines_of_model(model, Descriptions(), read)["the model's config.hidden_act"]
        '2bb3a1e0c7a4f6d1'
    """
    return {f"the model's {name}": digest(text) for name, text in _Lines(model, describe, read).of(model)}


class _Lines:
    def __init__(self, model: nn.Module, describe: Descriptions, read: Set[str]) -> None:
        self._read = read
        self._describe = describe
        self._weights = {id(weight) for weight in (*model.parameters(), *model.buffers())}
        self._numbers: dict[int, int] = {}  # of tensors, in order of appearance
        self._memory: dict[int, int] = {}
        self._objects: dict[int, str] = {}  # with the first place of each

    def of(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        for path, module in model.named_modules():
            yield path or "class", name_of_kind(type(module))
            for key, value in vars(module).items():
                if key not in NOT_READ:
                    yield from self._of_attribute(f"{path}.{key}".removeprefix("."), key, value)

    def _of_attribute(self, place: str, key: str, value: Any) -> Iterator[tuple[str, str]]:
        if key in HOOKS:  # their keys are counted per process
            yield place, str([self._describe.of(hook) for hook in value.values()])
        elif key in _OWN:
            yield place, str([(name, self._value(part)) for name, part in value.items()])
        elif type(value).__flags__ & HEAP and isinstance(getattr(value, "__dict__", None), dict):
            yield from self._of_object(place, value)
        else:
            yield place, self._value(value)

    def _of_object(self, place: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, (type, nn.Module, Tensor)) or callable(value):
            yield place, self._value(value)
        elif id(value) in self._objects:
            yield place, f"the same as {self._objects[id(value)]}"
        else:
            self._objects[id(value)] = place
            yield place, self._describe.of(type(value))
            for name, part in vars(value).items():
                if not name.startswith("_") or name in self._read:
                    yield f"{place}.{name}", self._value(part)

    def _value(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            return f"{name_of_kind(type(value))} {list(map(self._value, value))}"
        if type(value) is dict:
            return str([(self._describe.of(key), self._value(part)) for key, part in value.items()])
        return self._describe.of(value)

    def _tensor(self, tensor: Tensor) -> str:
        if id(tensor) in self._numbers:
            return f"tensor {self._numbers[id(tensor)]}"
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
            raise Unstorable(f"the model has a tensor with layout {tensor.layout}, which cannot be written as text")
        number = self._numbers.setdefault(id(tensor), len(self._numbers))
        where = self._memory.setdefault(tensor.untyped_storage()._cdata, number), tensor.storage_offset()
        kind = name_of_kind(type(tensor)), tensor.dtype, tensor.device, list(tensor.shape), tensor.stride()
        values = "" if id(tensor) in self._weights else digest(values_of(tensor))
        return f"tensor {number} {where} {kind} {tensor.requires_grad} {values}"
