"""Graph against original in paired turns: decides which of them serves calls of a size, only on strong evidence.

Each pair times both on the same call, in alternating order, so that whatever slows the machine down slows both. The
original serves once it was clearly faster in nearly all of a dozen pairs. A pair that lost a processor to another
program does not count against the one that serves. In all other cases the graph serves, and a later look may decide
otherwise. A look ends early if the graph wins: after two pairs, or one in which it took less than half the time.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernels.clock import CLEARLY, CLOCK, TAKEN_PER_CALL, TAKEN_PER_SECOND, Clock, is_steady
from ..progress import part

logger = logging.getLogger("fxbt")

PAIRS = 12  # per look; if both are equally fast, the original wins all of them by chance once in 4,096 looks
PAIRS_AGAIN = 4  # per later look, after the original won
CONTRADICTING = 1  # this many pairs may contradict: one turn in a dozen is slow on a quiet machine, too
BY_FAR = 0.5  # of the original's time; a first run of a size, on untouched memory, is slowed down by less
CAPTURE_SECONDS, LOOK_SECONDS = 0.5, 0.1  # for pairs at a capture, and at a later call; the next call continues
LOOK_AGAIN = 128  # calls until the next look, then twice as many, and so on


@dataclass(frozen=True)
class Pair:
    """The seconds of a graph and of its original, one right after the other on the same call."""

    graph: float
    original: float

    @property
    def is_lost(self) -> bool:
        """Whether the original was clearly faster."""
        return self.original < CLEARLY * self.graph

    @property
    def is_won_by_far(self) -> bool:
        """Whether the graph took less than half of the original's time."""
        return self.graph < BY_FAR * self.original


@dataclass(frozen=True)
class Evidence:
    """The evidence for the original: lost pairs of all pairs, and the median seconds of both.

    Example:
        >>> str(Evidence(12, 12, graph=0.0031, original=0.0022))
        '12 of 12 pairs, 3.1 ms against 2.2 ms'
    """

    lost: int
    pairs: int
    graph: float
    original: float

    def __str__(self) -> str:
        times = f"{1e3 * self.graph:.2g} ms against {1e3 * self.original:.2g} ms"
        return f"{self.lost} of {self.pairs} pairs, {times}"


def evidence_of(pairs: list[Pair]) -> Evidence | None:
    """The evidence that the original is faster; None if the pairs do not show it, or contradict each other."""
    lost = sum(pair.is_lost for pair in pairs)
    graph, original = [pair.graph for pair in pairs], [pair.original for pair in pairs]
    if lost < len(pairs) - CONTRADICTING or min(original) >= CLEARLY * min(graph):
        return None
    if not (is_steady(graph) and is_steady(original)):
        return None
    return Evidence(lost, len(pairs), statistics.median(graph), statistics.median(original))


class Race:
    """Which of the two serves calls of one size: the graph, unless `evidence` says that the original is faster.

    A look takes pairs until they suffice, contradict each other, or too many were disturbed. If its time runs out, the
    next call continues it.

    Example:
        >>> race = Race()
        >>> race.look(lambda: graph(x), lambda: model(x), CAPTURE_SECONDS)
        >>> race.evidence  # None: the graph serves
    """

    def __init__(self, clock: Clock = CLOCK) -> None:
        self.evidence: Evidence | None = None
        self._clock = clock
        self._pairs: list[Pair] = []
        self._turns = 0  # of this look, including disturbed ones
        self._left = 0  # calls until the next look
        self._pause = LOOK_AGAIN
        self._looking = threading.Lock()

    def is_due(self) -> bool:
        """Counts a call; returns whether to look at it."""
        self._left -= 1
        return self._left < 0

    def look(self, graph: Callable[[], Any], original: Callable[[], Any], seconds: float = LOOK_SECONDS) -> None:
        """Takes pairs for so many seconds, at least one. A failure decides nothing and is invisible to the caller."""
        if not self._looking.acquire(blocking=False):  # another thread is looking already
            return
        try:
            with part("time against the original"):
                self._look(graph, original, seconds)
        except Exception as error:  # for example a call that the graph refuses; the caller's own run reports it
            logger.debug("graph and original could not be timed: %s: %s", type(error).__name__, error)
            self._finish(self.evidence)
        finally:
            self._looking.release()

    def _look(self, graph: Callable[[], Any], original: Callable[[], Any], seconds: float) -> None:
        end = self._clock.now() + seconds
        wanted = PAIRS_AGAIN if self.evidence else PAIRS
        while not self._is_decided(wanted):
            if self._turns and self._clock.now() >= end:  # the next call continues
                return
            self._turns += 1
            if (pair := self._pair(graph, original)) is not None:
                self._pairs.append(pair)

    def _is_decided(self, wanted: int) -> bool:
        """Whether the pairs suffice; then the look is over."""
        won = sum(not pair.is_lost for pair in self._pairs)
        if won > CONTRADICTING or any(pair.is_won_by_far for pair in self._pairs):
            self._finish(None)
        elif len(self._pairs) == wanted:
            self._finish(self.evidence or evidence_of(self._pairs))
        elif self._turns >= 2 * wanted:  # too many were disturbed
            self._finish(self.evidence)
        else:
            return False
        return True

    def _pair(self, graph: Callable[[], Any], original: Callable[[], Any]) -> Pair | None:
        """Both, timed; None if another program had the processors and the one that serves was slower."""
        taken, start = self._clock.taken(), self._clock.now()
        if self._turns % 2:
            its, mine = self._seconds(original), self._seconds(graph)
        else:
            mine, its = self._seconds(graph), self._seconds(original)
        allowed = 2 * TAKEN_PER_CALL + TAKEN_PER_SECOND * (self._clock.now() - start)
        pair, is_disturbed = Pair(mine, its), self._clock.taken() - taken > allowed
        return None if is_disturbed and pair.is_lost == (self.evidence is None) else pair

    def _seconds(self, call: Callable[[], Any]) -> float:
        begin = self._clock.now()
        call()
        self._clock.wait()
        return self._clock.now() - begin

    def _finish(self, evidence: Evidence | None) -> None:
        is_news = (evidence is None) != (self.evidence is None)
        self.evidence = evidence
        self._pairs, self._turns = [], 0
        self._left, self._pause = (LOOK_AGAIN, 2 * LOOK_AGAIN) if is_news else (self._pause, 2 * self._pause)


class Races:
    """The races of one graph, by the size of calls; sizes in one race differ by less than a factor of two."""

    def __init__(self, clock: Clock = CLOCK) -> None:
        self._clock = clock
        self._by_size: dict[int, Race] = {}

    def of(self, elements: int) -> Race:
        """The race for calls with so many elements."""
        size = elements.bit_length()
        return self._by_size.get(size) or self._by_size.setdefault(size, Race(self._clock))

    def lost(self) -> dict[str, str]:
        """The call sizes that the original serves, with the evidence.

        Example:
            >>> races.lost()
            {'64 to 127 elements': '12 of 12 pairs, 3.1 ms against 2.2 ms'}
        """
        races = sorted(self._by_size.items())
        return {_range(size): str(race.evidence) for size, race in races if race.evidence is not None}


def _range(size: int) -> str:
    return f"{1 << size >> 1} to {(1 << size) - 1} elements"
