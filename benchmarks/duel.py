"""Few engines, finer than bench.py: their processes take turns of a fraction of a second, one runs while others stand.

`python benchmarks/duel.py MiniLM fxbt OpenVINO --columns 1x128 8x128`. The ratio is the first engine's time divided by
another one's in the same turn, the median over the turns: a host that slows down slows both.
"""

from __future__ import annotations

import argparse
import statistics
import sys

from bench import EngineProcess
from tabulate import tabulate


def turns(processes: dict[str, EngineProcess], column: str, count: int, seconds: float) -> dict[str, list[float]]:
    """Each engine's median milliseconds in each turn; every other turn begins with the last engine."""
    times: dict[str, list[float]] = {engine: [] for engine in processes}
    for turn in range(count):
        for engine in list(processes)[:: 1 if turn % 2 else -1]:
            passes = processes[engine].ask("time", column=column, seconds=seconds)
            times[engine].append(statistics.median(passes))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--columns", nargs="+", default=["1x16", "1x128", "8x32", "8x128"])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each turn")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    processes = {engine: EngineProcess(options.model, engine, options.threads) for engine in options.engines}
    rows = []
    try:
        for process in processes.values():
            process.ask("prepare")
        for column in options.columns:
            times = turns(processes, column, options.turns, options.seconds)
            first = times[options.engines[0]]
            for engine, own in times.items():
                ratio = statistics.median(a / b for a, b in zip(first, own, strict=True))
                rows.append([column, engine, min(own), statistics.median(own), ratio])
    finally:
        for process in processes.values():
            process.end()
    print(f"{options.model}: {' '.join(sys.argv)}")
    print(tabulate(rows, ["", "engine", "least ms", "median ms", f"{options.engines[0]} / it"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
