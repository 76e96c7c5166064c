"""What a call costs besides its graph: MiniLM's dispatcher, with a graph that returns at once.

Finding the graph (signature, guards, the state of 100 modules and 105 tensors) and rebuilding the model's output. The
last line is the output object alone, which the original forward makes too.

    python benchmarks/dispatcher.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import models
import torch

import fxbt

CALLS = 3000


def microseconds(call: Callable[[], Any]) -> float:
    """The lower quartile of single calls."""
    samples = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.quantiles(samples, n=4)[0]


def main() -> None:
    model = models.MODELS["MiniLM"]
    fast: Any = fxbt.optimize(model.make("sdpa"))
    inputs = model.columns()["1x16"][0]
    with torch.inference_mode():
        for _ in range(2):
            fast(**inputs)
        dispatcher = type(fast)._fxbt_dispatcher
        (graph,) = dispatcher._graphs
        outputs = graph.run(*inputs.values())
        graph.run = lambda *tensors: outputs
        print(f"dispatcher      {microseconds(lambda: dispatcher((), inputs)):5.1f} us")
        print(f"with Module's   {microseconds(lambda: fast(**inputs)):5.1f} us")
        print(f"output alone    {microseconds(lambda: graph.rebuild(outputs, (), inputs)):5.1f} us")


if __name__ == "__main__":
    main()
