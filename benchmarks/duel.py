"""Few engines, finer than bench.py: their processes take turns of a fraction of a second, one runs while others stand.

`python benchmarks/duel.py MiniLM fxbt OpenVINO --columns 1x128 8x128`. The ratio is the first engine's time divided by
another one's in the same turn, the median over the turns: a host that slows down slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import Any

from bench import ENGINES, MODELS, EngineProcess, take_turns
from results import ratio
from tabulate import tabulate


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """As bench.py's results: for each column and engine the median milliseconds of each turn."""
    processes = {engine: EngineProcess(options.model, engine, options.threads) for engine in options.engines}
    try:
        for engine, process in processes.items():
            if skipped := process.ask("prepare").get("skipped"):
                raise SystemExit(f"{engine}: {skipped}")
        turns = range(options.turns)
        return {"times_ms": take_turns(processes, options.columns, options.engines, turns, options.seconds)}
    finally:
        for process in processes.values():
            process.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("engines", nargs="+", choices=ENGINES)
    parser.add_argument("--columns", nargs="+", default=["1x16", "1x128", "8x32", "8x128"])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    data, first = measure(options), options.engines[0]
    rows = [
        [column, engine, min(times), statistics.median(times), ratio(data, column, first, engine)]
        for column, engines in data["times_ms"].items()
        for engine, times in engines.items()
    ]
    print(f"{options.model}: {' '.join(sys.argv)}")
    print(tabulate(rows, ["", "engine", "least ms", "median ms", f"{first} / it"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
