"""A model's graphs by the key of their calls: which was used when, how many there may be, and when to make another."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

CALLS_PER_CAPTURE = 16  # past the limit: a capture takes as long as hundreds of calls
PATIENCE = 64  # calls without a graph until one is made though none served so many; twice as many each time


class Kept(Protocol):
    """A graph: whether it stands for a call with these tensors, and when it last did."""

    used: int

    def applies(self, tensors: Sequence[Any]) -> bool: ...


Graph = TypeVar("Graph", bound=Kept)


class Graphs(Generic[Graph]):
    """Up to `most` graphs; the one that was used least recently makes place for another.

    So many captures are free. Past that a capture has to be earned, so that a model whose every call needs a graph of
    its own runs its original: `CALLS_PER_CAPTURE` calls that graphs served since the last one, or else `PATIENCE` calls
    that none did, and twice as many the next time.

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
        self._earned_from = 0  # what `_found` was at the last capture
        self._missed = 0  # calls since then that had no graph and got none
        self._patience = PATIENCE

    def __iter__(self) -> Iterator[Graph]:
        return iter([graph for graphs in list(self._by_key.values()) for graph in graphs])

    def __len__(self) -> int:
        return sum(map(len, list(self._by_key.values())))

    def of(self, key: Hashable) -> list[Graph]:
        """All graphs for calls of a key."""
        return self._by_key.get(key, [])

    def find(self, key: Hashable, tensors: Sequence[Any]) -> Graph | None:
        """The graph that stands for a call, if there is one."""
        for graph in self._by_key.get(key, ()):
            if graph.applies(tensors):
                self._found += 1
                graph.used = self._found
                return graph
        return None

    def may_capture(self) -> bool:
        """Whether a call without a graph may have one captured; counts those that may not."""
        if self.captures < self.most or self._is_earned():
            return True
        self._missed += 1
        return self._missed > self._patience

    def note_capture(self) -> None:
        """One is being captured, whatever becomes of it."""
        if self.captures >= self.most:
            self._patience = PATIENCE if self._is_earned() else 2 * self._patience
        self.captures += 1
        self._earned_from, self._missed = self._found, 0

    def _is_earned(self) -> bool:
        return self._found - self._earned_from >= CALLS_PER_CAPTURE

    def add(self, key: Hashable, graph: Graph) -> list[Graph]:
        """Keeps a graph; returns those that are dropped for it."""
        dropped = sorted(self, key=lambda other: other.used)[: max(0, len(self) + 1 - self.most)]
        for other in dropped:
            self.drop(other)
        graph.used = self._found
        self._by_key[key] = [*self.of(key), graph]
        return dropped

    def drop(self, graph: Graph) -> None:
        """Forgets a graph, wherever it is."""
        for key, graphs in list(self._by_key.items()):
            if left := [other for other in graphs if other is not graph]:
                self._by_key[key] = left
            else:
                del self._by_key[key]
