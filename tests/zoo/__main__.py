"""`python -m zoo [TYPE ...]`: judges every model type in worker processes and writes docs/coverage.md.

One worker judges a chunk of types one after the other and writes a line of JSON for each; a type that takes too long
is noted as such and the worker started anew behind it. Results are kept in .zoo/, so that a sweep resumes where it
stopped; `--again STATUS` judges the types of that status anew, `--table` only writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".zoo"
CHUNK = 80  # types a worker judges before its memory is given back
MEMORY = 12 * 2**30  # bytes, for one worker
SECONDS = 180  # of the processor's time, for one type


def main() -> None:
    parser = argparse.ArgumentParser(prog="zoo", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--again", nargs="*", default=[], help="judge types of these statuses anew")
    parser.add_argument("--table", action="store_true", help="only write docs/coverage.md from the results")
    parser.add_argument("--no-cache", action="store_true", help="build the models with use_cache=False")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["FXBT_TUNE"] = "0"  # which kernels run must not depend on the machine's load
    if options.work:
        work(options.types, use_cache=not options.no_cache)
        return
    RESULTS.mkdir(exist_ok=True)
    if not options.table:
        sweep(options)
    from . import table

    table.write(results(), ROOT / "docs" / "coverage.md")


def results() -> list[dict[str, Any]]:
    """All results so far, by type."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def sweep(options: argparse.Namespace) -> None:
    """Judge what has no result yet."""
    from . import build

    known = {row["type"]: row["status"] for row in results()}
    waiting = [
        name
        for name in options.types or build.model_types()
        if options.types or known.get(name) is None or known[name] in options.again
    ]
    random.Random(1).shuffle(waiting)  # so that the first results are a sample of all
    while waiting:
        waiting = waiting[run_chunk(waiting[:CHUNK], options.no_cache) :]
        print(f"{len(waiting)} left", flush=True)


def run_chunk(names: list[str], no_cache: bool) -> int:
    """Judge these types in one worker; how many have a result now."""
    arguments = [sys.executable, "-m", "zoo", "--work", *(["--no-cache"] if no_cache else []), *names]
    worker = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests")
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
    done = 0
    while done < len(names):
        row, alive = _next(lines, worker, names[done])
        (RESULTS / f"{row['type']}.json").write_text(json.dumps(row, indent=1))
        print(f"{row['status']:10} {row['type']}: {row.get('reason', '')[:150]}", flush=True)
        done += 1
        if not alive:
            break
    worker.kill()
    worker.wait()
    return done


def _read(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


def _next(lines: queue.Queue[str | None], worker: subprocess.Popen[str], name: str) -> tuple[dict[str, Any], bool]:
    """The next result, and whether the worker lives on."""
    start = _seconds_used(worker)
    while True:
        try:
            line = lines.get(timeout=2)
        except queue.Empty:
            if _seconds_used(worker) - start < SECONDS:
                continue
            return {"type": name, "status": "timeout", "reason": f"not judged within {SECONDS} s"}, False
        if line is None:
            return {"type": name, "status": "crash", "reason": "the process died"}, False
        return json.loads(line), True


def _seconds_used(worker: subprocess.Popen[str]) -> float:
    """Processor time of the worker so far: on a busy machine the clock says little."""
    try:
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def work(names: list[str], use_cache: bool) -> None:
    """Judge these types, one line of JSON each."""
    import torch
    import transformers

    from . import judge

    # A type that wants more fails by itself, and not the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in names:
        try:
            row = judge.judge(name, use_cache)
        except Exception as error:  # the zoo's own fault must not stop the sweep
            row = {"type": name, "status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
