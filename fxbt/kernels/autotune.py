"""Which kernel is the fastest on this machine: measured once for each shape, and kept on disk if nothing disturbed it.

What was measured here, or on a processor like this one (`shipped`), is known at once. Any other shape starts by a fixed
rule; it is measured in slices between calls, or at once in `fast.warmup(...)`, for so many seconds a model.
`FXBT_TUNE=0` leaves everything to the rule, so that every process chooses alike. One process of a machine measures at
a time: in a warmup others wait for what it finds, no longer than they would measure (`cache` says where it is).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..progress import part
from . import cache, machine, shipped
from .clock import CLOCK, Clock
from .traffic import is_alone
from .turns import Contest, Paced, Times, by_times, measure

logger = logging.getLogger("fxbt")

FORMAT = 10  # of the files; another one is ignored. A change of what is measured (native.c, say) makes a new one
TUNE_SECONDS = 2.0  # for the shapes of one model
TRIES = 2  # of a contest, where other programs were in the way
MEASURED, SHIPPED = "measured", "shipped"
DISTURBED, SPENT = "other programs disturbed the measurement", "the time for measuring is spent"
LATER, ASKED = "to be measured between calls, or in fast.warmup(...)", "fast.warmup(...) measures it"

_ONE_AT_A_TIME = threading.Lock()  # of this process


def is_enabled() -> bool:
    """Whether kernels may be measured here."""
    return os.environ.get("FXBT_TUNE", "1") != "0"


@dataclass(frozen=True)
class Known:
    """The times of a contest's kernels, and where they are from: `MEASURED` or `SHIPPED`."""

    times: Times
    source: str


class Measurements:
    """What is known of one model's kernels, and what waits to be measured, in so many seconds altogether.

    Attributes:
        seconds: that measuring may take; 0 leaves everything to the rule, as `FXBT_TUNE=0` does.
        spent: what it took until now.
        rounds: how often all that waited was done.

    Example:
        >>> measurements = Measurements(seconds=1.0)
        >>> Tuner(measurements).choose(contest)  # by rule
        >>> while measurements.are_waiting:
        ...     measurements.work(0.02)
        >>> Tuner(measurements).choose(contest)  # by what was measured
    """

    def __init__(self, seconds: float = TUNE_SECONDS, clock: Clock = CLOCK) -> None:
        self.seconds = seconds
        self.spent = 0.0
        self.rounds = 0
        self._clock = clock
        self._measured: dict[str, Times] = {}
        self._waiting: dict[str, Contest] = {}
        self._given_up: dict[str, tuple[Contest, str]] = {}  # and why
        self._tries: Counter[str] = Counter()
        self._at_work: _AtWork | None = None
        self._at_once: set[int] = set()  # threads

    @property
    def are_waiting(self) -> bool:
        """Whether there is something to measure."""
        return bool(self._waiting)

    @property
    def is_on(self) -> bool:
        """Whether anything but the rule may decide."""
        return self.seconds > 0 and is_enabled()

    def known(self, contest: Contest) -> Known | None:
        """What was measured here, by this process or another one; else on a processor like this one."""
        if not self.is_on:
            return None
        for source, find in ((MEASURED, self._measured.get), (MEASURED, _on_disk), (SHIPPED, _shipped)):
            if (times := _valid(contest, find(contest.key))) is not None:
                return Known(times, source)
        return None

    def ask(self, contest: Contest, may_wait: bool) -> Known | None:
        """As `known`. What is not known is measured now, inside `at_once`; else it waits, if it may."""
        found = self.known(contest)
        if found is not None or not self.is_on or contest.key in self._given_up:
            return found
        if threading.get_ident() in self._at_once:
            self._waiting[contest.key] = contest
            self._measure_now(contest)
            return self.known(contest)
        if self.spent >= self.seconds:
            self._give_up(contest, SPENT)
        elif may_wait:
            self._waiting.setdefault(contest.key, contest)
        return None

    def why_not(self, contest: Contest) -> str:
        """Why a contest is not known."""
        if not self.is_on:
            return "not measured"
        if contest.key in self._given_up:
            return self._given_up[contest.key][1]
        if contest.key in self._waiting:
            return LATER
        return "measured since then" if self.known(contest) else ASKED

    @contextlib.contextmanager
    def at_once(self, seconds: float | None = None) -> Iterator[None]:
        """What this thread asks for in this block is measured then: in what is left of the time, or in `seconds`.

        What was given up before is tried again, too. With 0 seconds nothing is measured.
        """
        here = threading.get_ident()
        if seconds:
            self.seconds = self.spent + seconds
        if seconds != 0 and self.spent < self.seconds:
            again, self._given_up = self._given_up, {}
            self._tries.clear()
            self._waiting.update({key: contest for key, (contest, _) in again.items()})
            self._at_once.add(here)
        try:
            yield
        finally:
            self._at_once.discard(here)

    def finish(self) -> None:
        """Inside `at_once`, measures all that waits; elsewhere nothing."""
        for contest in list(self._waiting.values()) if threading.get_ident() in self._at_once else ():
            self._measure_now(contest)

    def work(self, seconds: float) -> None:
        """Measures for so long what waits first, unless another thread or process measures, or a call runs."""
        contest = next(iter(list(self._waiting.values())), None)
        if contest is not None and is_alone():
            self._slice(contest, seconds, wait=0.0)

    def _measure_now(self, contest: Contest) -> None:
        with part("measure kernels", contest.key):
            while contest.key in self._waiting:
                left = max(0.0, self.seconds - self.spent)
                self._slice(contest, left, wait=left)

    def _slice(self, contest: Contest, seconds: float, wait: float) -> None:
        """Goes on with a contest; waits so long for others who measure. The time of both counts."""
        start = self._clock.now()
        try:
            if _ONE_AT_A_TIME.acquire(timeout=wait):
                try:
                    cache.once("measuring", lambda: self._found(contest), lambda: self._go_on(contest, seconds), wait)
                finally:
                    _ONE_AT_A_TIME.release()
        finally:
            self.spent += self._clock.now() - start
        if self.spent >= self.seconds:
            for left in list(self._waiting.values()):
                self._give_up(left, SPENT)

    def _found(self, contest: Contest) -> Known | None:
        """What another thread or process has found of a contest, which then waits no longer."""
        found = self.known(contest)
        if found is not None:
            self._done(contest)
        return found

    def _go_on(self, contest: Contest, seconds: float) -> None:
        here = os.getpid(), torch.get_num_threads()
        at_work = self._at_work
        if at_work is None or at_work.contest is not contest or at_work.here != here:
            at_work = self._at_work = _AtWork(contest, here, Paced(lambda clock: measure(contest, clock), self._clock))
        try:
            is_done = at_work.paced.go_on(seconds, is_alone)
        except Exception as error:  # a kernel that fails is no reason for a call to fail
            self._give_up(contest, f"measuring failed: {type(error).__name__}: {error}")
            return
        if is_done and at_work.paced.times is None:
            self._disturbed(contest)
        elif is_done and at_work.paced.times is not None:
            self._measured[contest.key] = at_work.paced.times
            _keep(contest.key, at_work.paced.times)
            self._done(contest)

    def _disturbed(self, contest: Contest) -> None:
        """Last in the queue, or given up."""
        self._at_work = None
        self._tries[contest.key] += 1
        if self._tries[contest.key] >= TRIES:
            self._give_up(contest, DISTURBED)
        else:
            self._waiting[contest.key] = self._waiting.pop(contest.key, contest)

    def _give_up(self, contest: Contest, why: str) -> None:
        self._given_up[contest.key] = contest, why
        self._done(contest)

    def _done(self, contest: Contest) -> None:
        self._at_work = None
        self._waiting.pop(contest.key, None)
        if not self._waiting:
            self.rounds += 1


@dataclass(frozen=True)
class _AtWork:
    """A contest that is being measured, by this process with so many threads."""

    contest: Contest
    here: tuple[int, int]
    paced: Paced


@dataclass(frozen=True)
class _Answer:
    """The kernels that were chosen for a contest's sizes, and on what ground: None is the rule."""

    contest: Contest
    names: tuple[str, ...]
    known: Known | None


class Tuner:
    """Answers for the kernels of one graph, each shape once; `answers` tells what was said, as text for each shape.

    Args:
        measurements: of the graph's model.
        may_wait: whether what is not known may be measured later, and the graph lowered again.
    """

    def __init__(self, measurements: Measurements | None = None, may_wait: bool = True) -> None:
        self.measurements = measurements or Measurements()
        self.notes: dict[str, str] = {}  # what else the report should say of kernels
        self._may_wait = may_wait
        self._given: dict[str, _Answer] = {}
        self._rounds = self.measurements.rounds

    def choose(self, contest: Contest) -> tuple[str, ...]:
        """The name of the fastest kernel for each of the contest's sizes, as far as is known; asked once, kept."""
        if contest.key not in self._given:
            known = self.measurements.ask(contest, self._may_wait)
            self._given[contest.key] = _Answer(contest, _names(contest, known), known)
        return self._given[contest.key].names

    @property
    def answers(self) -> dict[str, str]:
        """What was chosen for each shape, and why."""
        return {**{key: self._text(answer) for key, answer in self._given.items()}, **self.notes}

    @property
    def is_final(self) -> bool:
        """Whether all that was chosen rests on measurements."""
        return all(answer.known for answer in self._given.values())

    @property
    def is_behind(self) -> bool:
        """Whether something was measured since `has_news` was asked."""
        return self._rounds != self.measurements.rounds

    def has_news(self) -> bool:
        """Whether what is known by now makes another choice."""
        self._rounds = self.measurements.rounds
        return any(self._is_news(answer) for answer in self._given.values())

    def _is_news(self, answer: _Answer) -> bool:
        return _names(answer.contest, self.measurements.known(answer.contest)) != answer.names

    def __str__(self) -> str:
        sources = [answer.known.source if answer.known else "by rule" for answer in self._given.values()]
        counts = ", ".join(f"{count} {source}" for source, count in Counter(sources).items())
        measurements = self.measurements
        return f"{counts}; measuring took {measurements.spent:.2f} of {measurements.seconds:g} s"

    def _text(self, answer: _Answer) -> str:
        contest, known = answer.contest, answer.known
        if known is None:
            return f"{contest.by_rule} (by rule, {self.measurements.why_not(contest)})"
        shown = []
        for i, (size, choice) in enumerate(zip(contest.sizes, answer.names, strict=True)):
            times = ", ".join(f"{known.times[name][i]:.0f}" for name in contest.names)
            shown.append(f"{size}: {choice} ({times} us)")
        return "  ".join(shown) + (f" ({SHIPPED})" if known.source == SHIPPED else "")


def _names(contest: Contest, known: Known | None) -> tuple[str, ...]:
    return by_times(contest, known.times) if known else (contest.by_rule,) * len(contest.sizes)


# The measurements on disk: one file for each machine, torch and number of threads


def _machine() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "cpu": machine.cpu_name(),
        "capability": machine.capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def file_name() -> str:
    """Of this machine's measurements."""
    return f"kernels-{hashlib.sha256(json.dumps(_machine()).encode()).hexdigest()[:16]}.json"


def _read() -> dict[str, Any]:
    """The measurements on disk; {} where there are none, or the file is not one of ours."""
    if (found := cache.find(file_name())) is None:
        return {}
    try:
        data = json.loads(found.data)
        return dict(data["measured"]) if data["machine"] == _machine() else {}
    except (ValueError, KeyError, TypeError) as error:
        logger.debug("the kernel measurements on disk are not read: %s", error)
        return {}


def _on_disk(key: str) -> Any:
    return _read().get(key)


def _shipped(key: str) -> Any:
    return shipped.times_of(key, FORMAT)


def _valid(contest: Contest, times: Any) -> Times | None:
    """The times of a contest's kernels, if that is what they are; those of other kernels are left out."""
    if not isinstance(times, dict) or not set(contest.names) <= set(times):
        return None
    found = {name: times[name] for name in contest.names}
    are_times = all(
        isinstance(measured, list)
        and len(measured) == len(contest.sizes)
        and all(isinstance(us, int | float) and 0 < us < math.inf for us in measured)
        for measured in found.values()
    )
    return found if are_times else None


def _keep(key: str, times: Times) -> None:
    """Writes one more measurement; what another process wrote before is kept."""
    data = {"machine": _machine(), "measured": {**_read(), key: times}}
    try:
        cache.write(file_name(), json.dumps(data, indent=1).encode())
    except OSError as error:  # nowhere to write: measured anew next time
        logger.debug("the kernel measurements are not kept: %s", error)


def _renew_lock() -> None:
    global _ONE_AT_A_TIME
    _ONE_AT_A_TIME = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # who held it did not come along
