"""Objects that share a model's `__dict__`: one state, two classes."""

from __future__ import annotations

from typing import Any

from torch import nn


def twin(model: nn.Module, namespace: dict[str, Any]) -> Any:
    """An object of a subclass of the model's class that shares the model's `__dict__`."""
    return share(model, subclass(type(model), namespace))


def subclass(base: Any, namespace: dict[str, Any]) -> Any:
    """A subclass of `base` that looks like it, with the attributes in `namespace`."""
    # Libraries keep registries by class name: transformers uses it to find which outputs a model can record.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base)(base.__name__, (base,), {**names, **namespace})


def share(model: nn.Module, kind: type) -> Any:
    """An object of class `kind` whose `__dict__` is the model's."""
    other: Any = object.__new__(kind)
    object.__setattr__(other, "__dict__", model.__dict__)
    return other
