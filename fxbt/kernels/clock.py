"""The clock of measurements, and what tells a quiet machine from a disturbed one."""

from __future__ import annotations

import statistics
import time

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

CLEARLY = 0.97  # of another's time
STEADY = 1.5  # median / shortest turn: on a quiet machine at most 1.26, beside a busy process 2 to 800
# Where more programs run than there are processors, a thread loses its own some 125 to 250 times a second. On a quiet
# machine it is less than once in calls of 8 ms, and for longer ones some times a second.
TAKEN_PER_CALL, TAKEN_PER_SECOND = 1, 25


class Clock:
    """What a measurement asks of the machine."""

    def now(self) -> float:
        """Seconds from some time on."""
        return time.perf_counter()

    def taken(self) -> int:
        """How often the system took a processor away from this process; where it does not count that, 0."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0

    def wait(self) -> None:
        """Returns when an accelerator has done what was queued, as a call there returns before."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


CLOCK = Clock()


def is_steady(samples: list[float]) -> bool:
    """Whether most turns are about as short as the shortest."""
    return statistics.median(samples) <= STEADY * min(samples)
