"""Large batches part after part against whole ones, in turns in one process.

    python benchmarks/parts.py

Besides milliseconds, the pages that the system gave anew in a call (minor faults).
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from tabulate import tabulate
from transformers import BertConfig, BertModel

import fxbt
from fxbt.runtime import parts

ROUNDS = 8
WAYS = {"parts": parts.LARGE, "whole": 2**62}


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure(fast: dict[str, Any], inputs: dict[str, torch.Tensor]) -> list[float]:
    best = {way: (float("inf"), 0) for way in WAYS}
    for _ in range(ROUNDS):
        for way, parts.LARGE in WAYS.items():  # asked for at the first call of a shape
            before, start = faults(), time.perf_counter()
            fast[way](**inputs)
            best[way] = min(best[way], (1e3 * (time.perf_counter() - start), faults() - before))
    (in_parts, some_faults), (whole, whole_faults) = best.values()
    return [in_parts, whole, in_parts / whole, some_faults, whole_faults]


def main() -> None:
    table = []
    for hidden in (384, 768):
        torch.manual_seed(0)
        config = BertConfig(hidden_size=hidden, num_hidden_layers=4, intermediate_size=4 * hidden)
        model = BertModel(config).eval()
        for batch, length in ((8, 128), (32, 128), (64, 128), (64, 200), (128, 128)):
            ids = torch.randint(5, 30000, (batch, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.inference_mode():
                fast: dict[str, Any] = {
                    way: fxbt.optimize(model, {key: value[:2] for key, value in inputs.items()}) for way in WAYS
                }
                table.append([hidden, batch, length, *measure(fast, inputs)])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, 4 layers, best of {ROUNDS} in turns")
    print(tabulate(table, ["hidden", "batch", "length", "parts ms", "whole ms", "ratio", "faults", "faults whole"]))


if __name__ == "__main__":
    main()
