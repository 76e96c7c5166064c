"""Decides when two matches get the same replacement, so that one trace serves both, as in equal layers.

A replacement depends on the match's facts and on the types of its inputs and outputs. Both become a key in which nodes
are only numbers: their positions among the inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import FunctionType
from typing import Any

import sympy
import torch
from torch import fx

from ..match.rule import Match

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def match_key(match: Match) -> Hashable | None:
    """A key that is equal for matches with the same replacement; None if the facts cannot be compared."""
    try:
        return _Keys(match).key
    except TypeError:
        return None


class _Keys:
    """One traversal of a match; objects are numbered when first met."""

    def __init__(self, match: Match):
        self.places = {node: i for i, node in reversed(list(enumerate((*match.inputs, *match.outputs, match.anchor))))}
        self.met: dict[int, int] = {}
        aliases = tuple(self.places[node] for node in (*match.inputs, *match.outputs))
        types = tuple(self.of_value(node.meta.get("val")) for node in (*match.inputs, *match.outputs))
        self.key = (aliases, types, self.of(match.facts))

    def of(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            return type(value), repr(value)  # 1, 1.0 and True differ, as do 0.0 and -0.0
        if isinstance(value, sympy.Basic | FunctionType):
            return value
        if isinstance(value, torch.SymInt):
            return "size", value.node.expr
        if isinstance(value, fx.Node):
            return self.of_node(value)
        if type(value) in (tuple, list):
            return type(value), *map(self.of, value)
        if type(value) is dict:
            return dict, *((self.of(key), self.of(item)) for key, item in value.items())
        return self.of_object(value)

    def of_node(self, node: fx.Node) -> Hashable:
        if node not in self.places:
            raise TypeError(f"{node} is neither an input nor an output of the match")
        return "node", self.places[node], node.target, self.of_value(node.meta.get("val"))

    def of_value(self, value: Any) -> Hashable:
        if not isinstance(value, torch.Tensor):
            return self.of(value)
        strides = self.of_sizes(value.stride()) if value.layout is torch.strided else None
        kind = value.dtype, value.device, value.layout, value.requires_grad
        return *kind, self.of_sizes(value.shape), strides

    def of_sizes(self, sizes: Sequence[Any]) -> Hashable:
        return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)

    def of_object(self, value: Any) -> Hashable:
        """The object's identity and its content, which is known for dataclasses and classes with slots."""
        if id(value) in self.met:
            return "met", self.met[id(value)]
        self.met[id(value)] = len(self.met)
        names = list(getattr(value, "__dict__", ()))
        for base in type(value).__mro__[:-1] or (object,):
            if "__slots__" not in vars(base) and "__dataclass_fields__" not in vars(base):
                raise TypeError(f"the content of a {base.__name__} is not known")
            names += vars(base).get("__slots__", ())
        return type(value), *((name, self.of(getattr(value, name))) for name in names)
