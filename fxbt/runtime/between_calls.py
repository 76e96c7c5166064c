"""When kernels are measured: in short slices at the end of calls, which add little to the time of many calls.

A slice runs in the caller's thread, where nothing is shared with it: another thread's OpenMP pool would slow the calls
beside it, could be caught by a fork, and would time kernels under other conditions than those of calls.
"""

from __future__ import annotations

import logging

from ..kernels.autotune import Measurements
from ..kernels.clock import CLOCK, TAKEN_PER_CALL, TAKEN_PER_SECOND, Clock

logger = logging.getLogger("fxbt")

SHARE = 0.05  # of the time of calls, on average
SLICE_SECONDS = 0.02  # one call of a kernel at least, which is up to 20 ms

Begun = tuple[float, int]


class BetweenCalls:
    """Measures a model's kernels as its calls pay for it; the first slice comes when calls took 20 times as long.

    Where a call lost its processor to other programs, nothing is measured behind it.

    Example:
        >>> begun = between.begin()  # None: nothing waits
        >>> output = graph(x)
        >>> between.end(begun)
    """

    def __init__(self, measurements: Measurements, clock: Clock = CLOCK) -> None:
        self._measurements = measurements
        self._clock = clock
        self._owed = SLICE_SECONDS  # seconds of measuring that calls have yet to pay for

    def begin(self) -> Begun | None:
        """A call begins."""
        return (self._clock.now(), self._clock.taken()) if self._measurements.are_waiting else None

    def end(self, begun: Begun | None) -> None:
        """A call has ended, whose output may wait for a slice. Whatever fails in there, the caller does not see it."""
        if begun is None:
            return
        start, taken_before = begun
        now, taken = self._clock.now(), self._clock.taken() - taken_before
        self._owed -= SHARE * (now - start)
        if self._owed > 0 or taken > TAKEN_PER_CALL + TAKEN_PER_SECOND * (now - start):
            return
        try:
            self._measurements.work(SLICE_SECONDS)
        except Exception as error:
            logger.debug("kernels are not measured: %s: %s", type(error).__name__, error)
        self._owed = self._clock.now() - now
