"""Python numbers among a call's arguments: part of the key while they stay the same, then an input of the graph.

An int becomes the size of an empty tensor, which a trace treats as a symbol, with guards for comparisons in Python; a
float becomes a float64 tensor, whose value the graph reads as a Python float. Either way the model computes with Python
numbers, in 64 bits as before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**62  # for a size


@dataclass(frozen=True)
class Number:
    """How a call's tensors represent a number: at which index, and how to read it.

    `among` identifies what is beside it in an object of the caller's.
    """

    index: int
    kind: type
    is_negative: bool = False
    among: Hashable = None

    def of(self, tensors: Any) -> Any:
        """The number: Python's own, or a symbol if the tensors are traced."""
        tensor = tensors[self.index]
        if self.kind is float:
            return tensor.item()
        size = tensor.shape[0] - 1  # a trace assumes that no size is 0
        return -size if self.is_negative else size

    def __str__(self) -> str:
        return f"any {self.kind.__name__}{' below 0' if self.is_negative else ''}"


class Numbers:
    """Which number arguments of a model change from call to call; `place` is where one is (`t`, `args[1]`).

    An attribute of an object counts by its place and by what is beside it (`among`): the length of a cache is 0 while
    it has no tensors, and changes once it has some.

    Example:
        >>> numbers = Numbers()
        >>> [numbers.varies("t", value) for value in (3, 3, 4, 3)]
        [False, False, True, True]
    """

    def __init__(self) -> None:
        self._first: dict[tuple[str, type, Hashable], Any] = {}
        self._varying: set[tuple[str, type, Hashable]] = set()
        self._expected: set[str] = set()
        self.refused: dict[str, str] = {}  # places whose numbers cannot be inputs of a graph, and why

    def varies(self, place: str, value: int | float, among: Hashable = None) -> bool:
        """Records a value; returns whether this place has had different values and may have any."""
        where = place, type(value), among
        if where not in self._varying:
            is_other = repr(self._first.setdefault(where, value)) != repr(value)
            self._varying.update([where] if is_other or place in self._expected else [])
        is_small = isinstance(value, float) or abs(value) < LARGEST
        return where in self._varying and is_small and place not in self.refused

    def expect_others(self, places: Iterable[str]) -> None:
        """From now on, numbers at these places may have any value, although they have had only one so far."""
        self._expected.update(places)

    def first(self, place: str, number: Number) -> Any:
        """The first value at this place."""
        return self._first[place, number.kind, number.among]

    def refuse(self, place: str, reason: str) -> None:
        """From now on, every value at this place is a constant of a graph of its own."""
        self.refused[place] = reason


def as_tensor(value: int | float) -> Tensor:
    """The tensor that represents a number in a call."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return torch.empty((abs(value) + 1, 0))
