"""Which kernel is the fastest for a linear layer on this machine: measured once for each shape and kept on disk.

`FXBT_TUNE=0` measures nothing and takes a fixed rule instead, so that every process chooses alike. `FXBT_CACHE_DIR`
(else `$XDG_CACHE_HOME/fxbt`, else `~/.cache/fxbt`) is where the measurements are kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger("fxbt")
mkldnn = torch.ops.mkldnn

FORMAT = 1  # of the files; another one is ignored
ROWS = (1, 4, 16, 64, 256)  # rows of x that are measured
UP_TO = (2, 8, 32, 128)  # rows that each of them stands for, the last for all that are more
PACKED_FOR_ROWS = 128  # the layout is the same for 16 to 1024 rows, and no slower for one
BUDGET_SECONDS = 2.0  # for the shapes of one model
MOST_OPERATIONS = 1e9  # of one call that is measured
COLD_BYTES = 32 * 2**20  # of copies of a weight: a model's weights come from memory, not from a cache
LEAST_TURNS, TURNS_SECONDS = 6, 0.02
CLEARLY = 0.97  # of F.linear's time: below that, a packed copy of the weight pays
# Without measurements: with AVX-512, packed weights were 1.2 to 1.9 times as fast from 16 rows on; calling the packed
# kernel takes some 15 us, F.linear 3, which smaller weights than this do not win back.
PACKED_FROM_ELEMENTS = 256 * 256

Times = dict[str, list[float]]  # kernel -> microseconds for each of ROWS


class Tuner:
    """Answers for one model's linears, within a time budget; `answers` keeps what was said, as text for each shape."""

    def __init__(self) -> None:
        self._left = BUDGET_SECONDS
        self.answers: dict[str, str] = {}

    def packed_pays(self, n: int, k: int, dtype: torch.dtype) -> tuple[bool, ...]:
        """Whether x[rows, k] @ w[n, k].T is clearly faster on a packed weight, for the rows of each of ROWS."""
        key = f"{n}x{k} {str(dtype).removeprefix('torch.')}"
        times = _known(key)
        if times is None and is_enabled() and self._left > 0:
            start = time.perf_counter()
            times = _measure(n, k, dtype)
            _keep(key, times)
            self._left -= time.perf_counter() - start
        answer = _by_rule(n, k) if times is None else _by_times(times)
        self.answers[key] = _describe(answer, times)
        return answer


def bucket_of(rows: int) -> int:
    """The place in ROWS of the measurement that stands for so many rows."""
    return sum(rows > limit for limit in UP_TO)


def is_enabled() -> bool:
    """Whether kernels may be measured here."""
    return os.environ.get("FXBT_TUNE", "1") != "0"


def _by_rule(n: int, k: int) -> tuple[bool, ...]:
    return (torch.cpu._is_avx512_supported() and n * k >= PACKED_FROM_ELEMENTS,) * len(ROWS)


def _by_times(times: Times) -> tuple[bool, ...]:
    pairs = zip(times["linear"], times["packed"], strict=True)
    return tuple(packed < CLEARLY * linear for linear, packed in pairs)


def _describe(answer: tuple[bool, ...], times: Times | None) -> str:
    names = {True: "packed", False: "F.linear"}
    if times is None:
        return f"{names[answer[0]]} (by rule, not measured)"
    shown = [
        f"{rows}: {names[packed]} ({times['linear'][i]:.0f}, {times['packed'][i]:.0f} us)"
        for i, (rows, packed) in enumerate(zip(ROWS, answer, strict=True))
    ]
    return "  ".join(shown)


def _measure(n: int, k: int, dtype: torch.dtype) -> Times:
    times: Times = {"linear": [], "packed": []}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        kernel = mkldnn._linear_pointwise.default
        bias = torch.zeros(n, dtype=dtype)
        copies = max(2, min(256, COLD_BYTES // (n * k * dtype.itemsize)))
        weights = [torch.full((n, k), 0.5, dtype=dtype) for _ in range(copies)]
        packed = [mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) for weight in weights]
        for rows in ROWS:
            if times["linear"] and 2 * rows * n * k > MOST_OPERATIONS:
                times = {name: [*measured, measured[-1]] for name, measured in times.items()}
                continue
            x = torch.full((rows, k), 0.5, dtype=dtype)
            linear_us, packed_us = _typical(
                [functools.partial(F.linear, x, weight, bias) for weight in weights],
                [functools.partial(kernel, x, weight, bias, "none", [], "") for weight in packed],
            )
            times["linear"].append(linear_us)
            times["packed"].append(packed_us)
    return times


def _typical(*kernels: list[Callable[[], Any]]) -> list[float]:
    """The lower quartile of each kernel's microseconds, in turns, each call on another copy of the weight."""
    samples: list[list[float]] = [[] for _ in kernels]
    for turn in range(16 * LEAST_TURNS):
        for calls, measured in zip(kernels, samples, strict=True):
            begin = time.perf_counter()
            calls[turn % len(calls)]()
            measured.append((time.perf_counter() - begin) * 1e6)
        if turn >= LEAST_TURNS and sum(map(sum, samples)) > TURNS_SECONDS * 1e6:
            break
    return [statistics.quantiles(measured[1:], n=4)[0] for measured in samples]


# The cache on disk: one file for each machine, torch and number of threads


def _machine() -> dict[str, Any]:
    return {
        "format": FORMAT,
        "cpu": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": list(ROWS),
    }


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_file() -> Path:
    """The file of this machine's measurements."""
    root = os.environ.get("FXBT_CACHE_DIR")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxbt"
    name = hashlib.sha256(json.dumps(_machine()).encode()).hexdigest()[:16]
    return (Path(root) if root else base) / f"linears-{name}.json"


def _read() -> dict[str, Times]:
    """The measurements on disk; {} where there are none, or the file is not one of ours."""
    try:
        data = json.loads(cache_file().read_text())
        if data["machine"] != _machine():
            return {}
        return {key: times for key, times in data["linears"].items() if _is_valid(times)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if not isinstance(error, FileNotFoundError):
            logger.debug("the kernel measurements on disk are not read: %s", error)
        return {}


def _is_valid(times: Any) -> bool:
    return all(
        len(times[kernel]) == len(ROWS) and all(isinstance(us, float) and us > 0 for us in times[kernel])
        for kernel in ("linear", "packed")
    )


def _known(key: str) -> Times | None:
    return _read().get(key) if is_enabled() else None


def _keep(key: str, times: Times) -> None:
    """Writes one more measurement; what another process wrote meanwhile is kept, a reader never sees half a file."""
    path = cache_file()
    data = {"machine": _machine(), "linears": {**_read(), key: times}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(data, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:  # a home that cannot be written: measured anew next time
        logger.debug("the kernel measurements are not kept: %s", error)
