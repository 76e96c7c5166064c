"""What looking for uncounted writes to weights costs: a round of a patrol beside a call at 1x16, random weights.

python benchmarks/patrol.py
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import fxbt
from fxbt.lower.patrol import Patrol

SIZES = {"MiniLM": (384, 6, 12, 1536), "BERT-base": (768, 12, 12, 3072)}


def microseconds(call: Callable[[], Any], times: int) -> float:
    """The median of single calls."""
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)


def main() -> None:
    for name, (hidden, layers, heads, inner) in SIZES.items():
        config = transformers.BertConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner
        )
        fast: Any = fxbt.optimize(transformers.BertModel(config).eval())
        inputs = {"input_ids": torch.randint(5, 1000, (1, 16)), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
        run = functools.partial(fast, **inputs)
        with torch.inference_mode():
            for _ in range(3):
                run()
            call = microseconds(run, 100)
        graph = fast.report.latest
        start = time.perf_counter()
        patrol = Patrol(graph.weights._sources)
        whole = time.perf_counter() - start
        turn = microseconds(patrol.next_holds, patrol.rounds)
        share = 100 * turn / call
        print(f"{name:10} call {call:8.0f} us, a round {turn:5.1f} us ({share:.2f} %), all of it {1e3 * whole:.0f} ms")


if __name__ == "__main__":
    main()
