"""The clock of measurements, and how it tells a quiet machine from a disturbed one."""

from __future__ import annotations

import statistics
import time

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CLEARLY = 0.97  # share of another kernel's time
STEADY = 1.5  # median / shortest turn: at most 1.26 on a quiet machine, 2 to 800 beside a busy process
# If more programs run than there are processors, the system preempts a thread 125 to 250 times a second. On a quiet
# machine that happens less than once in calls of 8 ms, and a few times a second in longer ones.
TAKEN_PER_CALL, TAKEN_PER_SECOND = 1, 25


class Clock:
    """What a measurement asks of the machine."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter()

    def taken(self) -> int:
        """How often the system took a processor away from this process; 0 where it does not count that."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0

    def wait(self) -> None:
        """Waits until an accelerator has done what was queued; a call there returns earlier."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


CLOCK = Clock()


def is_steady(samples: list[float]) -> bool:
    """Whether most turns are about as short as the shortest one."""
    return statistics.median(samples) <= STEADY * min(samples)
