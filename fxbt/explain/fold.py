"""Finds repeated layers in a list of lines: equal segments in a row, each wired like the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

MIN_SAVED = 3  # lines; a fold that saves fewer is longer to read than what it folds


class Repeat(NamedTuple):
    """`times` segments of `length` lines each, from line `start` on."""

    start: int
    length: int
    times: int

    @property
    def saved(self) -> int:
        """The number of lines that folding saves."""
        return self.length * (self.times - 1)

    @property
    def end(self) -> int:
        """The line after the last segment."""
        return self.start + self.length * self.times


class Line(NamedTuple):
    """What makes two lines equal: what they do (`key`), and the numbers of the lines whose values they read."""

    key: str
    reads: tuple[int, ...]


def repeats(lines: Sequence[Line]) -> list[Repeat]:
    """The repeats that save the most lines, without overlap, in order.

    Segments are equal if the keys of their lines are, and if each reads, in the same places, its own values, values of
    the segment right before it, and values from before all of them. In place of a previous segment's value, the first
    segment may read anything.

    Example::

        >>> repeats([Line("a", ()), *(Line("b", (i,)) for i in range(12))])
        [Repeat(start=1, length=1, times=12)]
    """
    return list(_repeats(lines, 0, len(lines)))


def _repeats(lines: Sequence[Line], start: int, end: int) -> Iterator[Repeat]:
    best = max(_candidates(lines, start, end), key=lambda repeat: repeat.saved, default=None)
    if best is None or best.saved < MIN_SAVED:
        return
    yield from _repeats(lines, start, best.start)
    yield best
    yield from _repeats(lines, best.end, end)


def _candidates(lines: Sequence[Line], start: int, end: int) -> Iterator[Repeat]:
    for length in _periods(lines, start, end):
        for first, run in _runs(lines, length, start, end):
            while run >= length:
                found = Repeat(first, length, _count(lines, first, length, run // length + 1))
                yield found
                first, run = first + max(1, found.saved), run - max(1, found.saved)


def _periods(lines: Sequence[Line], start: int, end: int) -> set[int]:
    """The distances at which a key recurs: the distance of a line that occurs once per segment is the segment's
    length."""
    last: dict[str, int] = {}
    periods = set()
    for i in range(start, end):
        periods.add(i - last.get(lines[i].key, i))
        last[lines[i].key] = i
    return periods - {0}


def _runs(lines: Sequence[Line], length: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where, and for how many lines in a row, the key of each line recurs `length` lines later."""
    run = 0
    for i in range(start, end - length):
        if lines[i].key == lines[i + length].key:
            run += 1
            continue
        if run:
            yield i - run, run
        run = 0
    if run:
        yield end - length - run, run


def _count(lines: Sequence[Line], start: int, length: int, most: int) -> int:
    """How many of the segments with equal keys also have equal wiring."""
    second = _wiring(lines, start + length, length)
    if not _is_first_of(lines, start, length, second):
        return 1
    for k in range(2, most):
        if _wiring(lines, start + k * length, length) != second:
            return k
    return most


def _wiring(lines: Sequence[Line], start: int, length: int) -> list[tuple[str, int]]:
    return [_relation(read, start, length) for line in lines[start : start + length] for read in line.reads]


def _relation(read: int, start: int, length: int) -> tuple[str, int]:
    if read >= start:
        return "own", read - start
    return ("previous", read - start + length) if read >= start - length else ("shared", read)


def _is_first_of(lines: Sequence[Line], start: int, length: int, second: list[tuple[str, int]]) -> bool:
    """Whether the first segment is wired like the second, allowing any earlier value for a carried one."""
    reads = [read for line in lines[start : start + length] for read in line.reads]
    if len(reads) != len(second):
        return False
    carried: dict[int, int] = {}
    for read, (kind, place) in zip(reads, second, strict=True):
        own = read - start if read >= start else None
        if kind == "previous" and (own is not None or carried.setdefault(place, read) != read):
            return False
        if kind == "own" and own != place or kind == "shared" and read != place:
            return False
    return True
