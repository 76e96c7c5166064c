"""What a matcher found out is not found out again: the states of a match, with the misses noted on the way to each.

Which miss is the nearest depends on the order in which misses are noted, so those of a known match are noted again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .found import State

Note = Callable[[], None]


class Notes:
    """What was noted so far, in order.

    Example:
        >>> notes = Notes()
        >>> notes.do(lambda: print("a miss"))
        a miss
    """

    def __init__(self) -> None:
        self.done: list[Note] = []

    def do(self, note: Note) -> None:
        """Notes something."""
        self.done.append(note)
        note()


class Remembered:
    """The states of one match, each computed when it is first asked for.

    `asked` is the state that the match was asked from, which must stay alive as long as it is known by its id.
    """

    def __init__(self, asked: State, states: Iterator[State]) -> None:
        self.asked = asked
        self._left = states
        self._known: list[tuple[State | None, list[Note]]] = []  # the last one is None

    def states(self, notes: Notes) -> Iterator[State]:
        """The states; notes on the way to each what was noted when it was found."""
        place = 0
        while True:
            state = self._again(place, notes) if place < len(self._known) else self._next(notes)
            if state is None:
                return
            yield state
            place += 1

    def _again(self, place: int, notes: Notes) -> State | None:
        state, noted = self._known[place]
        for note in noted:
            notes.do(note)
        return state

    def _next(self, notes: Notes) -> State | None:
        start = len(notes.done)
        state = next(self._left, None)
        self._known.append((state, notes.done[start:]))
        return state
