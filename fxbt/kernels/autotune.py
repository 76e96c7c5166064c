"""Autotuning: which kernel is fastest on this machine, measured once per shape and kept on disk if nothing disturbed
it.

`FXBT_TUNE=0` measures nothing and uses a fixed rule, so that every process chooses the same. Only one process of a
machine measures at a time; others wait for its result, but not longer than measuring would take (`cache` says where it
is).
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..progress import part
from . import cache
from .clock import CLEARLY, CLOCK, TAKEN_PER_CALL, TAKEN_PER_SECOND, Clock, is_steady

logger = logging.getLogger("fxbt")

FORMAT = 10  # of the files; others are ignored. A change of what is measured (such as native.c) makes a new one
BUDGET_SECONDS = 2.0  # for the shapes of one model
LEAST_TURNS, TURNS_SECONDS, DOUBTFUL_SECONDS = 2, 0.01, 0.06
SETTLED = 3  # sizes in a row with one clear winner; then the largest size, half of all the time, is not measured
EVEN, FAR = 1.25, 2  # times the shortest turn; times the fastest kernel: a quiet machine seldom exceeds either
ENOUGH, MANY = 5, 12  # turns that decide; those of a second attempt, after a disturbed one

Times = dict[str, list[float]]  # kernel -> microseconds for each size
Calls = list[Callable[[], Any]]  # the same kernel on different memory


@dataclass(frozen=True)
class Contest:
    """Kernels that compute the same, at several sizes.

    Attributes:
        key: everything that their times depend on besides the size, as text.
        names: the names of the kernels.
        sizes: the measured sizes.
        up_to: the size up to which each measurement counts; the last one counts for all larger sizes.
        calls: a size -> calls of each kernel; None if it is too large to measure, and the size before it counts.
        by_rule: the kernel to use where nothing is measured.
    """

    key: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    up_to: tuple[int, ...]
    calls: Callable[[int], list[Calls] | None]
    by_rule: str


class Tuner:
    """Chooses one model's kernels within a time budget; `answers` has each choice as text, by shape."""

    def __init__(self) -> None:
        self._left = BUDGET_SECONDS
        self._chosen: dict[str, tuple[str, ...]] = {}
        self.answers: dict[str, str] = {}

    def choose(self, contest: Contest) -> tuple[str, ...]:
        """The name of the fastest kernel for each of the contest's sizes; decided once."""
        if contest.key not in self._chosen:
            self._chosen[contest.key] = self._decide(contest)
        return self._chosen[contest.key]

    def _decide(self, contest: Contest) -> tuple[str, ...]:
        times, is_disturbed = _known(contest), False
        if times is None and is_enabled() and self._left > 0:
            start = CLOCK.now()
            try:
                with part("measure kernels", contest.key):
                    times = cache.once("measuring", lambda: _known(contest), lambda: _measured(contest), self._left)
            except _Disturbed:
                is_disturbed = True
            self._left -= CLOCK.now() - start
        answer = (contest.by_rule,) * len(contest.sizes) if times is None else _by_times(contest, times)
        self.answers[contest.key] = _describe(contest, answer, times, is_disturbed)
        return answer


def bucket_of(size: int, up_to: tuple[int, ...]) -> int:
    """The index of the measurement that counts for a size."""
    return bisect.bisect_left(up_to, size)


def is_enabled() -> bool:
    """Whether kernels may be measured here."""
    return os.environ.get("FXBT_TUNE", "1") != "0"


def _by_times(contest: Contest, times: Times) -> tuple[str, ...]:
    """The kernel that loses least over all sizes; at a size where another one is clearly faster, that one.

    A single kernel needs a weight in one form only, and an unclear difference is noise.
    """
    by_size = list(zip(*(times[name] for name in contest.names), strict=True))
    losses = [sum(math.log(kernels[i] / min(kernels)) for kernels in by_size) for i in range(len(contest.names))]
    best = losses.index(min(losses))
    places = [kernels.index(min(kernels)) if min(kernels) < CLEARLY * kernels[best] else best for kernels in by_size]
    return tuple(contest.names[place] for place in places)


def _describe(contest: Contest, answer: tuple[str, ...], times: Times | None, is_disturbed: bool) -> str:
    if times is None:
        why = "other programs disturbed the measurement" if is_disturbed else "not measured"
        return f"{contest.by_rule} (by rule, {why})"
    shown = []
    for i, (size, choice) in enumerate(zip(contest.sizes, answer, strict=True)):
        measured = ", ".join(f"{times[name][i]:.0f}" for name in contest.names)
        shown.append(f"{size}: {choice} ({measured} us)")
    return "  ".join(shown)


class _Disturbed(Exception):
    """Other programs kept the machine busy while kernels were measured."""


def _measured(contest: Contest) -> Times:
    times = _measure(contest)
    if times is None:
        raise _Disturbed
    _keep(contest.key, times)
    return times


def _measure(contest: Contest, clock: Clock = CLOCK) -> Times | None:
    """Each kernel's times; None if other programs kept the machine busy: such times decide nothing."""
    times: Times = {name: [] for name in contest.names}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for size in contest.sizes:
            is_left_out = size == contest.sizes[-1] and _is_settled(times)
            calls = None if is_left_out else contest.calls(size)
            if calls is None:
                times = {name: [*measured, measured[-1]] for name, measured in times.items()}
                continue
            if (turns := _undisturbed_turns(calls, clock)) is None:
                return None
            for measured, samples in zip(times.values(), turns, strict=True):
                measured.append(min(samples))
        return times if _measure_doubtful(contest, times, clock) else None


def _is_settled(times: Times) -> bool:
    """Whether one kernel was clearly faster than all others at each of the last sizes."""
    last = list(zip(*times.values(), strict=True))[-SETTLED:]
    winners = {kernels.index(min(kernels)) for kernels in last}
    are_clear = all(sum(CLEARLY * us <= min(kernels) for us in kernels) == 1 for kernels in last)
    return len(last) == SETTLED and len(winners) == 1 and are_clear


def _measure_doubtful(contest: Contest, times: Times, clock: Clock) -> bool:
    """Measures again where the answer differs from that of most sizes, because a few turns may mislead; keeps the
    minimum.

    Returns whether nothing disturbed it.
    """
    answer = _by_times(contest, times)
    for place, size in enumerate(contest.sizes):
        calls = contest.calls(size) if answer[place] != statistics.mode(answer) else None
        if calls is None:
            continue
        if (turns := _undisturbed_turns(calls, clock, DOUBTFUL_SECONDS, ENOUGH)) is None:
            return False
        for measured, samples in zip(times.values(), turns, strict=True):
            measured[place] = min(measured[place], *samples)
    return True


def _undisturbed_turns(
    kernels: list[Calls], clock: Clock, seconds: float = TURNS_SECONDS, least: int = LEAST_TURNS
) -> list[list[float]] | None:
    """`in_turns`, repeated if something disturbed it; None if it stays disturbed.

    If a few turns give a result that is rare on a quiet machine, more turns are taken.
    """
    for fewest in (least, MANY):
        turns = _turns_of_a_quiet_machine(kernels, clock, seconds, fewest)
        if turns and len(turns[0]) < ENOUGH and _are_doubtful(turns):
            turns = _turns_of_a_quiet_machine(kernels, clock, seconds, ENOUGH)
        if turns:
            return turns
    return None


def _turns_of_a_quiet_machine(
    kernels: list[Calls], clock: Clock, seconds: float, least: int = LEAST_TURNS
) -> list[list[float]] | None:
    """`in_turns`; None if other programs had a processor in most calls, or a kernel's turns contradict each other."""
    taken, start = clock.taken(), clock.now()
    turns = in_turns(*kernels, seconds=seconds, least=least, clock=clock)
    allowed = TAKEN_PER_CALL * sum(map(len, turns)) + TAKEN_PER_SECOND * (clock.now() - start)
    return turns if clock.taken() - taken <= allowed and all(map(is_steady, turns)) else None


def _are_doubtful(turns: list[list[float]]) -> bool:
    """Whether a few turns differ more than on a quiet machine, or equal kernels differ by much."""
    shortest = [min(samples) for samples in turns]
    are_uneven = any(max(samples) > EVEN * min(samples) for samples in turns)
    return are_uneven or max(shortest) > FAR * min(shortest)


def in_turns(
    *kernels: Calls,
    seconds: float = TURNS_SECONDS,
    least: int = LEAST_TURNS,
    most: int = 16 * LEAST_TURNS,
    clock: Clock = CLOCK,
) -> list[list[float]]:
    """Each kernel's microseconds, turn by turn, each call on other memory than the one before.

    Every turn begins with another kernel, and the first turn does not count.
    """
    samples: list[list[float]] = [[] for _ in kernels]
    for turn in range(most):
        for step in range(len(kernels)):
            place = (turn + step) % len(kernels)
            calls = kernels[place]
            begin = clock.now()
            calls[turn % len(calls)]()
            samples[place].append((clock.now() - begin) * 1e6)
        if turn >= least and sum(map(sum, samples)) > seconds * 1e6:
            break
    return [measured[1:] for measured in samples]


# The cache on disk: one file per machine, torch version and number of threads


def _machine() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def file_name() -> str:
    """The file of this machine's measurements."""
    return f"kernels-{hashlib.sha256(json.dumps(_machine()).encode()).hexdigest()[:16]}.json"


def _read() -> dict[str, Any]:
    """The measurements on disk; {} if there are none, or the file is not ours."""
    if (found := cache.find(file_name())) is None:
        return {}
    try:
        data = json.loads(found.data)
        return dict(data["measured"]) if data["machine"] == _machine() else {}
    except (ValueError, KeyError, TypeError) as error:
        logger.debug("the kernel measurements on disk cannot be read: %s", error)
        return {}


def _is_valid(contest: Contest, times: Any) -> bool:
    if not isinstance(times, dict) or set(times) != set(contest.names):
        return False
    return all(
        isinstance(measured, list)
        and len(measured) == len(contest.sizes)
        and all(isinstance(us, float) and us > 0 for us in measured)
        for measured in times.values()
    )


def _known(contest: Contest) -> Times | None:
    times = _read().get(contest.key) if is_enabled() else None
    return times if _is_valid(contest, times) else None


def _keep(key: str, times: Times) -> None:
    """Writes one more measurement, and keeps those of other processes."""
    data = {"machine": _machine(), "measured": {**_read(), key: times}}
    try:
        cache.write(file_name(), json.dumps(data, indent=1).encode())
    except OSError as error:  # not writable: measured again next time
        logger.debug("the kernel measurements cannot be saved: %s", error)
