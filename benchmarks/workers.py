"""Workers of a server that start together with an empty cache: seconds each from the loaded model to the second call.

Each is a process of its own on MiniLM's shape (6 layers, 384 wide) with all threads that torch takes by default. With
`--against`, a directory that holds another fxbt, both run in turns, as a busy host says little by itself.

    python benchmarks/workers.py [--workers 4] [--rounds 3] [--against ../main]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = "here"


def work() -> None:
    """What each worker does: it says when it is loaded, starts with the others and prints its seconds."""
    import torch
    import transformers

    import fxbt

    config = transformers.BertConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536)
    model = transformers.BertModel(config).eval()
    ids = torch.ones(2, 16, dtype=torch.long)
    mask = ids.clone()
    mask[0, 12:] = 0
    print("loaded", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    with torch.inference_mode():
        fast = fxbt.optimize(model)
        fast.warmup(input_ids=ids, attention_mask=mask)  # measures kernels, which calls would do later
        fast(input_ids=ids, attention_mask=mask)
    ready = time.perf_counter() - start
    answers = fast.report.latest.kernels.values() if fast.report.latest else ()
    measured = sum("by rule" not in answer for answer in answers)
    print(f"{ready:.2f} {measured} {len(answers)}", flush=True)


def round_of(workers: int, source: str) -> list[tuple[float, int, int]]:
    """Seconds of each worker, and how many of its shapes were answered by measurements."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "FXBT_CACHE_DIR": cache, "FXBT_TUNE": "1"}
        if source != HERE:
            environment["PYTHONPATH"] = source
        command = [sys.executable, "-W", "ignore", __file__, "--work"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(workers)]
        for process in started:
            assert process.stdout and process.stdout.readline() == "loaded\n"
        for process in started:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate()[0].split() for process in started]
    return [(float(seconds), int(measured), int(count)) for seconds, measured, count in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    sources = [HERE] if options.against is None else [HERE, str(options.against.resolve())]
    slowest: dict[tuple[str, int], list[float]] = {}
    for round in range(options.rounds):
        for workers in (1, options.workers):
            for source in sources:
                found = round_of(workers, source)
                slowest.setdefault((source, workers), []).append(max(seconds for seconds, *_ in found))
                each = ", ".join(f"{seconds:.1f} s ({measured}/{count})" for seconds, measured, count in sorted(found))
                print(f"round {round}, {workers} of {source}: {each}", flush=True)
    print("seconds until the last one is ready (shapes answered by measurement / all, above); medians:")
    for (source, workers), seconds in slowest.items():
        print(f"  {workers} of {source}: {statistics.median(seconds):.1f}")


if __name__ == "__main__":
    main()
