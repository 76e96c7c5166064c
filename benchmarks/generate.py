"""Tokens a second of `generate`: transformers as it is and optimised by fxbt, each engine in a process of its own.

`python benchmarks/generate.py [--tokens 128] [--prompt 32] [--threads 2]` prints a row for each model and batch: GPT-2
124M, and a Llama of about 100M with 4 key heads for 12 query heads; random weights, greedy. Each number is the median
of several generations after one that warms up; while one engine runs, no other does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from tabulate import tabulate

ENGINES = ("transformers", "fxbt")
MODELS = ("gpt2", "llama")
BATCHES = (1, 8)
ROUNDS = 5


def model_of(name: str) -> Any:
    """A decoder with random weights that never ends by itself."""
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    else:
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=1024,
        )
        model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    return model.eval()


def engine_of(name: str, model: Any) -> Any:
    if name == "transformers":
        return model
    import fxbt

    return fxbt.optimize(model)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One engine, model and batch: tokens a second, seconds of the first generation, and what came out."""
    torch.set_num_threads(options.threads)
    engine = engine_of(options.engine, model_of(options.model))
    ids = torch.randint(5, 30_000, (options.batch, options.prompt), generator=torch.Generator().manual_seed(0))
    seconds, tokens = [], None
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        tokens = engine.generate(ids, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)
        seconds.append(time.perf_counter() - start)
    assert tokens is not None
    count = options.batch * options.tokens
    return {
        "rate": count / statistics.median(seconds[1:]),
        "first": seconds[0],
        "sum": int(tokens.sum()),
        "fallbacks": engine.report.fallbacks if options.engine == "fxbt" else [],
    }


def in_a_process(options: argparse.Namespace, engine: str, model: str, batch: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--engine", engine, "--model", model, "--batch", str(batch)]
    for name in ("tokens", "prompt", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, default="gpt2", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options)))
        return
    rows = []
    for model in MODELS:
        for batch in BATCHES:
            found = {engine: in_a_process(options, engine, model, batch) for engine in ENGINES}
            rates = [found[engine]["rate"] for engine in ENGINES]
            is_same = len({each["sum"] for each in found.values()}) == 1
            rows.append((model, batch, *rates, rates[1] / rates[0], found["fxbt"]["first"], is_same))
            for reason in found["fxbt"]["fallbacks"]:
                print(f"{model}, batch {batch}: {reason}", file=sys.stderr)
    print(tabulate(rows, ("model", "batch", *(f"{e}, tokens/s" for e in ENGINES), "ratio", "first, s", "same tokens")))


if __name__ == "__main__":
    main()
