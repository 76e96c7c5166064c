"""What several benchmarks measure and print in the same way."""

from __future__ import annotations

import ctypes
import gc
import statistics
from pathlib import Path


def peak_memory() -> float:
    """MiB: the largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def forget_peak_memory() -> None:
    """From here on the peak is that of running: what converting took is given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def shown(times: list[float]) -> str:
    """Median and range: `12 (11 to 14)`."""
    return f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})"
