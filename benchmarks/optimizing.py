"""What optimising costs beside the capture: 12-layer BERT with all default rules, in seconds of CPU and by stage.

CPU time, since it says the same on a busy machine; on an idle one the wall clock says no more. Kernels are chosen by
rule: measuring them is paid once a machine.

    python benchmarks/optimizing.py [--layers 12] [--hidden 768] [--attention eager] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ["FXBT_TUNE"] = "0"

import torch
import transformers

import fxbt
from fxbt import pipeline


def model(layers: int, hidden: int, attention: str) -> torch.nn.Module:
    config = transformers.BertConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden)
    config._attn_implementation = attention
    return transformers.BertModel(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--attention", default="eager", choices=["eager", "sdpa"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bert = model(options.layers, options.hidden, options.attention)
    ids = torch.ones(2, 16, dtype=torch.long)
    compile_graph = pipeline.compile
    seconds: list[float] = []

    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        compiled = compile_graph(*args, **options)
        seconds.append(time.process_time() - start)
        return compiled

    pipeline.compile = timed
    for round in range(options.rounds):
        start = time.process_time()
        with torch.no_grad():
            fast: Any = fxbt.optimize(bert, {"input_ids": ids, "attention_mask": ids})
        total = time.process_time() - start
        print(f"round {round}: {total:.2f} s of CPU, {seconds[-1]:.2f} s of it after the capture")
    stages = sorted(fast.report.latest.stages, key=lambda stage: -stage.seconds)
    print(
        "the last round's stages, by the clock:",
        ", ".join(f"{s.name} {s.seconds:.2f}" for s in stages if s.seconds > 0.01),
    )
    print(f"best after the capture: {min(seconds):.2f} s of CPU (first, with all that torch sets up: {seconds[0]:.2f})")


if __name__ == "__main__":
    main()
