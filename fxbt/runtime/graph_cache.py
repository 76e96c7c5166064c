"""A model's graphs by the key of their calls: how recently each was used, how many are kept, when to capture
another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

CALLS_PER_CAPTURE = 16  # beyond the limit; a capture takes as long as hundreds of calls
PATIENCE = 64  # calls without a graph after which one is captured anyway; doubled each time


class Kept(Protocol):
    """A graph: whether it serves a call with these tensors, and when it was last used."""

    used: int

    def applies(self, tensors: Sequence[Any]) -> bool:
        """Whether the graph serves a call with these tensors now."""


Graph = TypeVar("Graph", bound=Kept)


class Graphs(Generic[Graph]):
    """Keeps up to `most` graphs; a new one replaces the least recently used one.

    The first `most` captures are free. After that a capture has to be earned, so that a model whose every call needs a
    new graph runs its original: by `CALLS_PER_CAPTURE` calls served by graphs since the last capture, or by `PATIENCE`
    calls without a graph, twice as many each time.

    Readers take no lock: lists are replaced, never changed.

    Example:
        >>> graphs = Graphs(most=8)
        >>> graphs.find(key, tensors) or graphs.may_capture()
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.captures = 0
        self._by_key: dict[Hashable, list[Graph]] = {}
        self._found = 0
        self._earned_from = 0  # the value of `_found` at the last capture
        self._missed = 0  # calls since then without a graph
        self._patience = PATIENCE

    def __iter__(self) -> Iterator[Graph]:
        return iter([graph for graphs in list(self._by_key.values()) for graph in graphs])

    def __len__(self) -> int:
        return sum(map(len, list(self._by_key.values())))

    def of(self, key: Hashable) -> list[Graph]:
        """All graphs for calls of a key."""
        return self._by_key.get(key, [])

    def find(self, key: Hashable, tensors: Sequence[Any]) -> Graph | None:
        """The graph that serves a call; None if there is none."""
        for graph in self._by_key.get(key, ()):
            if graph.applies(tensors):
                self._found += 1
                graph.used = self._found
                return graph
        return None

    def may_capture(self) -> bool:
        """Whether a call without a graph may capture one; counts those that may not."""
        if self.captures < self.most or self._is_earned():
            return True
        self._missed += 1
        return self._missed > self._patience

    def note_capture(self) -> None:
        """Counts a capture, whatever its result."""
        if self.captures >= self.most:
            self._patience = PATIENCE if self._is_earned() else 2 * self._patience
        self.captures += 1
        self._earned_from, self._missed = self._found, 0

    def _is_earned(self) -> bool:
        return self._found - self._earned_from >= CALLS_PER_CAPTURE

    def add(self, key: Hashable, graph: Graph) -> list[Graph]:
        """Keeps a graph; returns the graphs dropped in exchange."""
        dropped = sorted(self, key=lambda other: other.used)[: max(0, len(self) + 1 - self.most)]
        for other in dropped:
            self.drop(other)
        graph.used = self._found
        self._by_key[key] = [*self.of(key), graph]
        return dropped

    def drop(self, graph: Graph) -> None:
        """Forgets a graph."""
        for key, graphs in list(self._by_key.items()):
            if left := [other for other in graphs if other is not graph]:
                self._by_key[key] = left
            else:
                del self._by_key[key]
