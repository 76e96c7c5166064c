"""Kernels timed in turns: how long each takes, or that something else was in the way, and nothing is to be concluded.

What measures here is a generator (`Steps`) that stops after every call of a kernel, so that whoever drives it can go
on another time: `finished` drives it to its end, `Paced` for a while.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import statistics
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .clock import CLEARLY, CLOCK, TAKEN_PER_CALL, TAKEN_PER_SECOND, Clock, is_steady

LEAST_TURNS, TURNS_SECONDS, DOUBTFUL_SECONDS = 2, 0.01, 0.06
SETTLED = 3  # sizes in a row with one clear winner: the largest size, half of the time of all, is not measured then
EVEN, FAR = 1.25, 2  # times the shortest turn; times the fastest kernel: more than that is seldom on a quiet machine
ENOUGH, MANY = 5, 12  # turns that say so; those of a second attempt, where something was in the way of the first
_MANY_TAKEN = 10**6  # processors: more than any measurement may lose

T = TypeVar("T")
Steps = Generator[None, None, T]
Times = dict[str, list[float]]  # kernel -> microseconds for each of the sizes
Calls = list[Callable[[], Any]]  # the same kernel on different memory


@dataclass(frozen=True)
class Contest:
    """Kernels that compute the same, at several sizes.

    Attributes:
        key: all that their times depend on besides the size, as text.
        names: of the kernels.
        sizes: those that are measured.
        up_to: the size up to which each of them stands for others; the last one stands for all that are larger.
        calls: a size -> calls of each kernel; None if it is too large to measure, and the one before stands for it.
        by_rule: the kernel that is taken where nothing is measured.
        forget: frees what calls are made of; they may be asked for again.
    """

    key: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    up_to: tuple[int, ...]
    calls: Callable[[int], list[Calls] | None]
    by_rule: str
    forget: Callable[[], Any] = lambda: None


def bucket_of(size: int, up_to: tuple[int, ...]) -> int:
    """The place of the measurement that stands for a size."""
    return bisect.bisect_left(up_to, size)


def by_times(contest: Contest, times: Times) -> tuple[str, ...]:
    """The kernel that loses least over all sizes, but where another one is clearly faster, that one.

    One kernel needs a weight in one form only, and what is not clear is noise.
    """
    by_size = list(zip(*(times[name] for name in contest.names), strict=True))
    losses = [sum(math.log(kernels[i] / min(kernels)) for kernels in by_size) for i in range(len(contest.names))]
    best = losses.index(min(losses))
    places = [kernels.index(min(kernels)) if min(kernels) < CLEARLY * kernels[best] else best for kernels in by_size]
    return tuple(contest.names[place] for place in places)


def finished(steps: Steps[T]) -> T:
    """What a measurement finds, at once.

    Example:
        >>> finished(in_turns([first], [second], seconds=1.0))
        [[61.0, 60.2], [48.1, 48.0]]
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: T = end.value
            return found


class Paced:
    """A measurement that goes on a while at a time; its clock stands still meanwhile.

    Example:
        >>> paced = Paced(lambda clock: measure(contest, clock))
        >>> while not paced.go_on(0.01, is_alone):
        ...     ...  # something else
        >>> paced.times
    """

    def __init__(self, measure: Callable[[Clock], Steps[Times | None]], clock: Clock = CLOCK) -> None:
        self.times: Times | None = None
        self._clock = _Stopwatch(clock)
        self._steps = measure(self._clock)

    def go_on(self, seconds: float, is_alone: Callable[[], bool]) -> bool:
        """Measures for so long, one call of a kernel at least; whether that was all of it.

        Ends early where this process does something else beside it, and leaves out what was measured meanwhile.
        """
        with self._clock.running(), _plainly():
            end = self._clock.now() + seconds
            while True:
                try:
                    next(self._steps)
                except StopIteration as found:
                    self.times = found.value
                    return True
                if not is_alone():
                    self._clock.disturbed = True
                    return False
                if self._clock.now() >= end:
                    return False


class _Stopwatch(Clock):
    """A clock that runs in a block only, and counts what is taken in there."""

    def __init__(self, clock: Clock) -> None:
        self.disturbed = False  # until somebody asks
        self._clock = clock
        self._time, self._taken = 0.0, 0
        self._since: tuple[float, int] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._since = self._clock.now(), self._clock.taken()
        try:
            yield
        finally:
            self._time, self._taken = self.now(), self.taken()
            self._since = None

    def now(self) -> float:
        return self._time + (self._clock.now() - self._since[0] if self._since else 0.0)

    def taken(self) -> int:
        if self.disturbed:
            self.disturbed = False
            self._taken += _MANY_TAKEN
        return self._taken + (self._clock.taken() - self._since[1] if self._since else 0)


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Whatever a caller has set, kernels compute without gradients and autocast, on tensors that have versions."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def measure(contest: Contest, clock: Clock = CLOCK) -> Steps[Times | None]:
    """Each kernel's times; None where something else kept the machine busy meanwhile: what it says decides nothing."""
    try:
        return (yield from _times(contest, clock))
    finally:
        contest.forget()


def _times(contest: Contest, clock: Clock) -> Steps[Times | None]:
    times: Times = {name: [] for name in contest.names}
    for size in contest.sizes:
        is_left_out = size == contest.sizes[-1] and _is_settled(times)
        calls = None if is_left_out else contest.calls(size)
        if calls is None:
            times = {name: [*measured, measured[-1]] for name, measured in times.items()}
            continue
        yield  # making its tensors took time
        if (turns := (yield from undisturbed_turns(calls, clock))) is None:
            return None
        for measured, samples in zip(times.values(), turns, strict=True):
            measured.append(min(samples))
    return times if (yield from _measure_doubtful(contest, times, clock)) else None


def _is_settled(times: Times) -> bool:
    """Whether one kernel was clearly faster than all others at each of the last sizes."""
    last = list(zip(*times.values(), strict=True))[-SETTLED:]
    winners = {kernels.index(min(kernels)) for kernels in last}
    are_clear = all(sum(CLEARLY * us <= min(kernels) for us in kernels) == 1 for kernels in last)
    return len(last) == SETTLED and len(winners) == 1 and are_clear


def _measure_doubtful(contest: Contest, times: Times, clock: Clock) -> Steps[bool]:
    """Again, and the shorter times of both, where the answer is not the one of most sizes: a few turns may mislead.

    Whether nothing was in the way.
    """
    answer = by_times(contest, times)
    for place, size in enumerate(contest.sizes):
        calls = contest.calls(size) if answer[place] != statistics.mode(answer) else None
        if calls is None:
            continue
        if (turns := (yield from undisturbed_turns(calls, clock, DOUBTFUL_SECONDS, ENOUGH))) is None:
            return False
        for measured, samples in zip(times.values(), turns, strict=True):
            measured[place] = min(measured[place], *samples)
    return True


def undisturbed_turns(
    kernels: list[Calls], clock: Clock, seconds: float = TURNS_SECONDS, least: int = LEAST_TURNS
) -> Steps[list[list[float]] | None]:
    """As `in_turns`, again where something was in the way; None where it stays so.

    Where a few turns say what a quiet machine seldom does, more of them have to.
    """
    for fewest in (least, MANY):
        turns = yield from _turns_of_a_quiet_machine(kernels, clock, seconds, fewest)
        if turns and len(turns[0]) < ENOUGH and _are_doubtful(turns):
            turns = yield from _turns_of_a_quiet_machine(kernels, clock, seconds, ENOUGH)
        if turns:
            return turns
    return None


def _turns_of_a_quiet_machine(
    kernels: list[Calls], clock: Clock, seconds: float, least: int = LEAST_TURNS
) -> Steps[list[list[float]] | None]:
    """As `in_turns`; None where other programs had a processor in most calls, or a kernel's turns contradict."""
    taken, start = clock.taken(), clock.now()
    turns = yield from in_turns(*kernels, seconds=seconds, least=least, clock=clock)
    allowed = TAKEN_PER_CALL * sum(map(len, turns)) + TAKEN_PER_SECOND * (clock.now() - start)
    return turns if clock.taken() - taken <= allowed and all(map(is_steady, turns)) else None


def _are_doubtful(turns: list[list[float]]) -> bool:
    """Whether so few turns differ by more than those of a quiet machine, or kernels that compute the same by much."""
    shortest = [min(samples) for samples in turns]
    are_uneven = any(max(samples) > EVEN * min(samples) for samples in turns)
    return are_uneven or max(shortest) > FAR * min(shortest)


def in_turns(
    *kernels: Calls,
    seconds: float = TURNS_SECONDS,
    least: int = LEAST_TURNS,
    most: int = 16 * LEAST_TURNS,
    clock: Clock = CLOCK,
) -> Steps[list[list[float]]]:
    """Each kernel's microseconds turn by turn, each call on other memory than the one before; every turn begins with
    another kernel, and the first one does not count."""
    samples: list[list[float]] = [[] for _ in kernels]
    for turn in range(most):
        for step in range(len(kernels)):
            place = (turn + step) % len(kernels)
            calls = kernels[place]
            begin = clock.now()
            calls[turn % len(calls)]()
            samples[place].append((clock.now() - begin) * 1e6)
            yield
        if turn >= least and sum(map(sum, samples)) > seconds * 1e6:
            break
    return [measured[1:] for measured in samples]
