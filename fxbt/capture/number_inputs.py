"""Python numbers among a call's arguments: part of the key while they stay the same, an input of the graph once not.

A whole number goes in as the size of an empty tensor, which a trace has as a symbol, with guards for what Python
compares it with; any other number as a float64 tensor, whose value the graph reads as a Python float. The model
computes with Python numbers either way, in 64 bits as ever.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**62  # of a size


@dataclass(frozen=True)
class Number:
    """How a number stands among the tensors of a call: as which one, and what a call makes of that.

    `among` is what stands beside it in an object of the caller's.
    """

    index: int
    kind: type
    is_negative: bool = False
    among: Hashable = None

    def of(self, tensors: Any) -> Any:
        """The number: Python's own, or, of traced tensors, a symbol."""
        tensor = tensors[self.index]
        if self.kind is float:
            return tensor.item()
        size = tensor.shape[0] - 1  # a trace takes for granted that no size is 0
        return -size if self.is_negative else size

    def __str__(self) -> str:
        return f"any {self.kind.__name__}{' below 0' if self.is_negative else ''}"


class Numbers:
    """Which number arguments of a model change from call to call; `place` says where one stands (`t`, `args[1]`).

    An attribute of an object counts by its place and by what is beside it (`among`): the length of a cache is 0 as long
    as it has no tensors, and changes once it has.

    Example:
        >>> numbers = Numbers()
        >>> [numbers.varies("t", value) for value in (3, 3, 4, 3)]
        [False, False, True, True]
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, type, Hashable], Any] = {}
        self._varying: set[tuple[str, type, Hashable]] = set()
        self.refused: dict[str, str] = {}  # places whose numbers a graph cannot have as inputs, and why

    def varies(self, place: str, value: int | float, among: Hashable = None) -> bool:
        """Notes a value; whether this place has had another one, and takes any."""
        where = place, type(value), among
        if where not in self._varying and repr(self._first.setdefault(where, value)) != repr(value):
            self._varying.add(where)
        is_small = isinstance(value, float) or abs(value) < LARGEST
        return where in self._varying and is_small and place not in self.refused

    def first(self, place: str, number: Number) -> Any:
        """The value that this place had first."""
        return self._first[place, number.kind, number.among]

    def refuse(self, place: str, reason: str) -> None:
        """From now on, every value of this place is a constant of its own graph."""
        self.refused[place] = reason


def as_tensor(value: int | float) -> Tensor:
    """What stands for a number among the tensors of a call."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.empty((abs(value) + 1, 0))
