"""One engine on one model in a process of its own: answers one line of JSON on stdout for each line on stdin."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import Any

import models
import numpy as np
import torch
from engines import ENGINES, Run, Skip
from measuring import forget_peak_memory, peak_memory

PEAK_SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (1024, 1536, 384)]  # rows, N, K


class Worker:
    """Holds one engine; its methods are the requests that the parent may make."""

    def __init__(self, model: str, engine: str, threads: int):
        self._model, self._engine, self._threads = models.MODELS[model], engine, threads
        self._columns = self._model.columns()
        self._run: Run | None = None

    def prepare(self) -> dict[str, Any]:
        """Loads and converts the model; seconds for the libraries, and from there to the end of the first fast call."""
        example = next(iter(self._columns.values()))[0]
        try:
            with torch.inference_mode(False), torch.no_grad():
                engine = ENGINES[self._engine]
                model = self._model.make(engine.attention)
                start = time.perf_counter()
                engine.load()
                loaded = time.perf_counter()
                self._run = engine.prepare(model, example, self._threads)
        except Skip as reason:
            return {"skipped": str(reason)}
        except Exception as error:  # a converter that fails on a model must not stop the others
            first_line = (str(error).strip() or " ").splitlines()[0]
            return {"skipped": f"{type(error).__name__}: {first_line[:200]}"}
        self._pass([example, example])  # the first may still capture or compile
        ready = time.perf_counter()
        answer = {"import_s": loaded - start, "ready_s": ready - loaded, "prepare_mib": peak_memory()}
        del model
        forget_peak_memory()
        return answer

    def outputs(self, column: str, path: str) -> None:
        """Saves the last hidden states at all tokens of a column."""
        assert self._run is not None
        batches = self._columns[column]
        self._pass(batches)  # the first call of a shape may compile, and fxbt returns the original's own output
        states = [models.valid_states(self._run(batch), batch).reshape(-1) for batch in batches]
        np.save(path, torch.cat(states).numpy())

    def time(self, column: str, seconds: float) -> list[float]:
        """Milliseconds of single passes over a column for about `seconds`, after a third of that time as warmup."""
        batches = self._columns[column]
        start = time.perf_counter()
        while time.perf_counter() < start + seconds / 3:
            self._pass(batches)
        samples: list[float] = []
        while time.perf_counter() < start + seconds or len(samples) < 2:
            begin = time.perf_counter()
            self._pass(batches)
            samples.append((time.perf_counter() - begin) * 1e3)
        return samples

    def _pass(self, batches: list[models.Batch]) -> None:
        assert self._run is not None
        for batch in batches:
            self._run(batch)

    def memory(self) -> float:
        """The largest resident set since the engine was ready, in MiB."""
        return peak_memory()

    def describe(self) -> dict[str, dict[str, float]]:
        """For each column the part of positions that are tokens, and the operations that those need."""
        with torch.inference_mode(False):
            model = self._model.make("eager")
        return {
            name: {"fill": models.fill(batches), "gflop": models.valid_flops(model, batches) / 1e9}
            for name, batches in self._columns.items()
        }

    def peak(self, seconds: float) -> float:
        """The best GFLOP/s of float32 matrix products here: plain, and on weights packed for oneDNN."""
        return max(_product_rate(*shape, seconds / len(PEAK_SHAPES)) for shape in PEAK_SHAPES)


def _product_rate(rows: int, n: int, k: int, seconds: float) -> float:
    x, weight = torch.randn(rows, k), torch.randn(n, k)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    calls = [
        lambda: torch.mm(x, weight.T),
        lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
    ]
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for call in calls:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return 2 * rows * n * k / best / 1e9


def main() -> None:
    model, engine, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    worker = Worker(model, engine, threads)
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(worker, request.pop("do"))(**request)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
