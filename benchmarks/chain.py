"""Kernels of fxbt's own in one call (fxbt/lower/cpu/chain.py) against the same one by one, in turns in one process.

    python benchmarks/chain.py MiniLM BERT-base

Milliseconds of a pass over each of the benchmark's columns: the median, and in brackets the tenth that was fastest.
"""

from __future__ import annotations

import statistics
import sys
import time

import models
import torch
from tabulate import tabulate

import fxbt
from fxbt.kernels import native
from fxbt.lower.cpu import chain

SECONDS = 8.0  # for each column
TURN = 4  # passes of one way before the other has its turn
WAYS = {"one call": chain.LARGEST_BLOCK, "one by one": 0}


def measure(fast: torch.nn.Module, batches: list[models.Batch]) -> list[str]:
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for way, chain.LARGEST_BLOCK in WAYS.items():
            for _ in range(TURN):
                start = time.perf_counter()
                for batch in batches:
                    fast(**batch)
                times[way].append(1e3 * (time.perf_counter() - start))
    pairs = [(statistics.median(found), statistics.quantiles(found, n=10)[0]) for found in times.values()]
    ratios = [one / other for one, other in zip(*pairs, strict=True)]
    return [f"{median:.4g} ({fastest:.4g})" for median, fastest in pairs] + [f"{ratios[0]:.2f} ({ratios[1]:.2f})"]


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if reason := native.obstacle():
        raise SystemExit(f"without fxbt's own kernels: {reason}")
    for name in sys.argv[1:] or ["MiniLM"]:
        columns = models.MODELS[name].columns()
        with torch.inference_mode(False), torch.no_grad():
            fast = fxbt.optimize(models.MODELS[name].make("sdpa"))
            fast(**columns["1x16"][0])
        with torch.inference_mode():
            rows = [[column, *measure(fast, batches)] for column, batches in columns.items()]
        print("\n" + tabulate(rows, [name, *WAYS, "ratio"]), flush=True)


if __name__ == "__main__":
    main()
