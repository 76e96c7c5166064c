"""How long models take with fxbt and with its peers, on this machine: run it with `make bench`.

Each engine lives in a process of its own. Only one of them runs at a time: the others are stopped (SIGSTOP), so that no
thread pool spins beside the one that is timed; what they used nevertheless is measured and reported, and so is what
other programs took from the machine meanwhile. Every engine's outputs at the tokens are compared with those of Hugging
Face's eager model before anything is timed. Each round has new processes, as two of one engine can differ by half
(where its buffers stand on the heap decides whether they are given back at each call). A turn goes over the columns
and, within a column, over the engines, starting with another one each time, so that a drift of the machine meets all of
them alike.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import results

HERE = Path(__file__).resolve().parent
MODELS = ["MiniLM", "BERT-base", "DistilBERT", "ViT-base", "Whisper-tiny encoder", "T5-small encoder", "GPT-2 prefill"]
ENGINES = [
    *("fxbt", "fxbt bf16", "fxbt int8", "HF eager", "HF sdpa", "fast path", "Inductor", "Inductor freezing"),
    *("ONNX Runtime", "OpenVINO", "CTranslate2"),
]
PACKAGES = ["fxbt", "torch", "transformers", "onnxruntime", "openvino", "ctranslate2"]
REFERENCE, BASELINE, RULER = "HF eager", "HF sdpa", "peak"
BEFORE = results.BEFORE  # as `pip install --no-deps --target FOLDER` leaves it
TOLERANCE = 1e-5  # of the reference's largest absolute value, in float32
COARSE = 0.1  # of those that are asked for less: how far they are off is in the table
PATIENCE = 1800  # seconds for one answer: a compiler may take its time
TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    options = parse_options()
    engines = list(dict.fromkeys([REFERENCE, BASELINE, *options.engines, *([BEFORE] if options.before else [])]))
    found: dict[str, Any] = {"machine": describe_machine(options.threads), "models": {}}
    for model in options.models:
        found["models"][model] = measure_model(model, engines, options)
        results.write(found, options.out, options.plot)  # after each model: a long run that is cut short is not lost
    print(results.text(found))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=str(MODELS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, metavar="ENGINE", help=str(ENGINES))
    parser.add_argument("--columns", nargs="+", metavar="COLUMN", help="only these, as 1x128 (default: all)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each engine (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="processes of each engine (default 7)")
    parser.add_argument("--turns", type=int, default=3, help="of each engine in a round (default 3)")
    parser.add_argument("--seconds", type=float, default=0.6, help="about how long a turn lasts (default 0.6)")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help=f"another build of fxbt beside it, as {BEFORE!r}")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bench", help="results, without suffix")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "benchmark.png", help="the plot's file")
    return parser.parse_args()


class EngineProcess:
    """A process that holds one engine, and is stopped whenever it has no request to answer."""

    def __init__(self, model: str, engine: str, threads: int, before: Path | None = None):
        self.name = f"{engine} on {model}"
        self.idle_seconds = 0.0  # processor time taken while it was stopped
        self.running_seconds = 0.0  # of all processors, while it had its turns
        self.others_seconds = 0.0  # what other programs took of them
        self._cache = tempfile.TemporaryDirectory()  # so that nothing has been compiled or measured before
        environment = os.environ | {
            "FXBT_CACHE_DIR": self._cache.name,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        if engine == BEFORE:
            environment["PYTHONPATH"] = str(before)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), model, engine, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # a process group, to stop and continue as one
        )
        self._stopped_at: float | None = None

    def ask(self, do: str, **request: Any) -> Any:
        """The answer to one request; the process runs only meanwhile."""
        self._continue()
        machine, own, start = _busy_seconds(), self._seconds(), time.perf_counter()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        answer = self._process.stdout.readline() if ready else ""
        if not answer:
            self.end()
            raise SystemExit(f"the process of {self.name} {'died' if ready else f'took over {PATIENCE} s'} at {do}")
        self.running_seconds += (time.perf_counter() - start) * (os.cpu_count() or 1)
        self.others_seconds += max(0.0, _busy_seconds() - machine - (self._seconds() - own))
        self._stop()
        return json.loads(answer)

    def end(self) -> None:
        """Ends the process and all it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._cache.cleanup()

    def _stop(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)
        while Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        self._stopped_at = self._seconds()

    def _continue(self) -> None:
        if self._stopped_at is not None:
            self.idle_seconds += self._seconds() - self._stopped_at
            os.killpg(self._process.pid, signal.SIGCONT)

    def _seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICK  # user, system, and those of children that ended


def measure_model(model: str, engines: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured of one model: columns, skipped engines, preparation, differences, times and peaks."""
    rounds = []
    for number in range(options.rounds):
        rounds.append(measure_round(model, engines, number, options))
        engines = [engine for engine in engines if engine in rounds[-1]["prepared"]]
        print(f"{model}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    prepared, columns = (rounds[-1][key] for key in ("prepared", "columns"))

    def joined(times: list[list[float]]) -> list[float]:
        return list(itertools.chain.from_iterable(times))

    def over_rounds(summary: Callable[[list[Any]], Any], part: str, name: str) -> dict[str, Any]:
        return {key: summary([one[part][name][key] for one in rounds]) for key in rounds[-1][part][name]}

    return {
        "columns": columns,
        "skipped": {engine: reason for one in rounds for engine, reason in one["skipped"].items()},
        "prepared": {engine: over_rounds(statistics.median, "prepared", engine) for engine in prepared},
        "differences": {engine: over_rounds(max, "differences", engine) for engine in prepared},
        "times_ms": {column: over_rounds(joined, "times_ms", column) for column in columns},
        "peaks_gflops": [one["peak"] for one in rounds],
        "others": statistics.mean(one["others"] for one in rounds),
        "idle_seconds": sum(one["idle_seconds"] for one in rounds),
    }


def measure_round(model: str, engines: list[str], number: int, options: argparse.Namespace) -> dict[str, Any]:
    processes = {RULER: EngineProcess(model, RULER, options.threads)}
    found: dict[str, Any] = {"skipped": {}, "prepared": {}}
    try:
        columns = processes[RULER].ask("describe")
        found["columns"] = {name: columns[name] for name in columns if name in (options.columns or columns)}
        if not found["columns"]:
            raise SystemExit(f"{model} has none of the columns {options.columns}; it has {list(columns)}")
        for engine in engines:
            print(f"{model}: preparing {engine}", file=sys.stderr, flush=True)
            processes[engine] = EngineProcess(model, engine, options.threads, options.before)
            answer = processes[engine].ask("prepare")
            if "skipped" in answer:
                found["skipped"][engine] = answer["skipped"]
                processes.pop(engine).end()
            else:
                found["prepared"][engine] = answer
        found["differences"] = compare_outputs(processes, found)
        found["peak"] = processes[RULER].ask("peak", seconds=1.0)
        turns = range(number * options.turns, (number + 1) * options.turns)
        found["times_ms"] = take_turns(processes, found["columns"], [*found["prepared"]], turns, options.seconds)
        for engine in found["prepared"]:
            found["prepared"][engine]["running_mib"] = processes[engine].ask("memory")
        running = sum(process.running_seconds for process in processes.values())
        found["others"] = sum(process.others_seconds for process in processes.values()) / running
        found["idle_seconds"] = sum(process.idle_seconds for process in processes.values())
    finally:
        for process in processes.values():
            process.end()
    return found


def compare_outputs(processes: dict[str, EngineProcess], found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The largest difference of each engine from the eager model, as a part of the output's magnitude.

    An engine that differs by more than the tolerance is not timed: it moves to the skipped ones.
    """
    import numpy as np

    differences: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        outputs: dict[tuple[str, str], Any] = {}
        for engine in list(found["prepared"]):
            for column in found["columns"]:
                path = f"{folder}/states.npy"
                processes[engine].ask("outputs", column=column, path=path)
                outputs[engine, column] = np.load(path)
                reference = outputs[REFERENCE, column]
                gap = float(np.abs(outputs[engine, column] - reference).max() / np.abs(reference).max())
                differences.setdefault(engine, {})[column] = gap
            worst = max(differences[engine].values())
            if not worst <= (COARSE if engine in results.COARSE else TOLERANCE):
                found["skipped"][engine] = f"its outputs differ from {REFERENCE}'s by {worst:.1e}"
                processes.pop(engine).end()
                del found["prepared"][engine]
    return differences


def take_turns(
    processes: dict[str, EngineProcess], columns: Iterable[str], engines: list[str], turns: range, seconds: float
) -> dict[str, dict[str, list[float]]]:
    """For each column and engine the median milliseconds of a pass, turn by turn: each begins with another engine."""
    times: dict[str, dict[str, list[float]]] = {column: {engine: [] for engine in engines} for column in columns}
    for turn in turns:
        first = turn % len(engines)
        for column, engine in itertools.product(times, engines[first:] + engines[:first]):
            samples = processes[engine].ask("time", column=column, seconds=seconds)
            times[column][engine].append(statistics.median(samples))
    return times


def _busy_seconds() -> float:
    """Processor time the whole machine has spent on anything: user, nice, system, interrupts."""
    fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
    return (sum(fields[:3]) + sum(fields[5:8])) / TICK


def describe_machine(threads: int) -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return {
        "cpu": f"{name}, {os.cpu_count()} cores seen, {' '.join(known)}",
        "threads": str(threads),
        "versions": ", ".join(f"{package} {_version(package)}" for package in PACKAGES),
        "python": f"{platform.python_version()} on {platform.system()}",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/bench.py", *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return version(package) if importlib.util.find_spec(package) else "not installed"
    except PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    main()
