"""Tokens a second of `generate` with fxbt and its peers, and how near to the machine's read bandwidth they come.

`python benchmarks/generate.py [--quick] [--rounds 1] [--tokens 128] [--threads 2]` prints a row for each model, prompt
and batch: GPT-2 124M, and a Llama of about 100M with 4 key heads for 12 query heads; random weights, float32, greedy.
Engines: transformers with a dynamic and a static cache, torch.compile with a static cache, fxbt, and CTranslate2 for
GPT-2 where it is installed. Each has a process of its own, and only one runs at a time.

A rate is that of the decode steps: generating one token, which is the prefill, is measured apart and taken off. The
share in brackets is the floor's (reading all weights and the cache once a step, at the bandwidth that summing a large
tensor has here) of the measured time. `--quick` takes a minute or two: prompts of 32, 32 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

ENGINES = ("HF dynamic", "HF static", "compile static", "fxbt", "CTranslate2")
MODELS = ("gpt2", "llama")
BATCHES = (1, 8)
WARM_UP = 6  # tokens: graphs are captured, kernels compiled
READ = 1 << 28  # floats that are summed to measure the bandwidth

Generate = Callable[[Tensor, int], list[list[int]]]  # (prompts, count) -> the new tokens


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


# Engines: a model -> its `Generate`


def hugging_face(model: Any, **options: Any) -> Generate:
    def generate(ids: Tensor, count: int) -> list[list[int]]:
        found = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
        return found[:, ids.shape[1] :].tolist()

    return generate


def compiled(model: Any) -> Generate:
    model.forward = torch.compile(model.forward, dynamic=False)
    return hugging_face(model, cache_implementation="static")


def fxbt(model: Any) -> Generate:
    import fxbt

    return hugging_face(fxbt.optimize(model))


def ctranslate2(model: Any) -> Generate:
    import ctranslate2
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(model.config.vocab_size - 1)} | {"<|endoftext|>": model.config.vocab_size - 1}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/hf")
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(f"{folder}/hf")
        ctranslate2.converters.TransformersConverter(f"{folder}/hf").convert(f"{folder}/ct2")
        threads = torch.get_num_threads()
        engine = ctranslate2.Generator(f"{folder}/ct2", compute_type="float32", intra_threads=threads)

    def generate(ids: Tensor, count: int) -> list[list[int]]:
        prompts = [[f"w{i}" for i in row] for row in ids.tolist()]
        how = {"max_length": count, "min_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
        return [result.sequences_ids[0] for result in engine.generate_batch(prompts, **how)]

    return generate


MAKERS: dict[str, Callable[[Any], Generate]] = {
    "HF dynamic": hugging_face,
    "HF static": lambda model: hugging_face(model, cache_implementation="static"),
    "compile static": compiled,
    "fxbt": fxbt,
    "CTranslate2": ctranslate2,
}


# One process


def measure(engine: str, name: str, prompts: list[int], tokens: int, threads: int) -> list[dict[str, Any]]:
    """One engine and model: for each prompt and batch the seconds of prefill and steps, and what came out."""
    torch.set_num_threads(threads)
    generate = MAKERS[engine](model_of(name))
    cells = [(prompt, batch) for prompt in prompts for batch in BATCHES]
    return [{"prompt": p, "batch": b, **_measured(generate, p, b, tokens)} for p, b in cells]


def _measured(generate: Generate, prompt: int, batch: int, tokens: int) -> dict[str, Any]:
    ids = torch.randint(5, 30_000, (batch, prompt), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    generate(ids, WARM_UP)
    first = time.perf_counter()
    generate(ids, 1)
    second = time.perf_counter()
    found = generate(ids, tokens)
    end = time.perf_counter()
    steps = (end - second) - (second - first)
    return {"first": first - start, "prefill": second - first, "steps": steps, "tokens": found}


def bandwidth(threads: int) -> float:
    """Bytes a second that can be read here."""
    torch.set_num_threads(threads)
    data = torch.zeros(READ)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def bytes_a_step(name: str, prompt: int, batch: int, tokens: int) -> float:
    """The weights that a step multiplies by, and the cache at its mean length."""
    model = model_of(name)
    config = model.config
    weights = sum(parameter.nbytes for parameter in model.get_decoder().parameters())
    looked_up = model.get_input_embeddings().weight  # rows of it alone, but where it is the head's too
    head = model.get_output_embeddings().weight
    weights += head.nbytes - looked_up.nbytes
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = heads * config.hidden_size // config.num_attention_heads
    return weights + 2 * 4 * config.num_hidden_layers * width * batch * (prompt + tokens / 2)


# All of them


def in_a_process(options: argparse.Namespace, prompts: list[int], engine: str, model: str) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--engine", engine, "--model", model, "--prompts", *map(str, prompts)]
    for name in ("tokens", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{engine} on {model}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return []
    return json.loads(done.stdout.splitlines()[-1])


def table(options: argparse.Namespace, prompts: list[int]) -> str:
    engines = [name for name in options.engines if name != "CTranslate2" or importlib.util.find_spec("ctranslate2")]
    speed = bandwidth(options.threads)
    rows = []
    for model in MODELS:
        ran = [name for name in engines if name != "CTranslate2" or model == "gpt2"]
        found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in ran}
        for _ in range(options.rounds):
            for name in ran:
                found[name].append(in_a_process(options, prompts, name, model))
        cells = [(prompt, batch) for prompt in prompts for batch in BATCHES]
        for place, (prompt, batch) in enumerate(cells):
            floor = bytes_a_step(model, prompt, batch, options.tokens) * (options.tokens - 1) / speed
            by_engine = {name: [cells[place] for cells in found[name] if cells] for name in ran}
            rows.append([model, prompt, batch, *_texts(by_engine, engines, floor, batch * (options.tokens - 1))])
    title = f"decode tokens/s (share of the floor at {speed / 1e9:.1f} GB/s), prefill ms; {options.tokens} new tokens"
    return f"{title}\n{tabulate(rows, ('model', 'prompt', 'batch', *engines, 'same tokens as HF dynamic'))}"


def _texts(found: dict[str, list[dict[str, Any]]], engines: list[str], floor: float, count: int) -> list[str]:
    texts = []
    for name in engines:
        cells = found.get(name) or []
        if not cells:
            texts.append("")
            continue
        steps, prefill = (statistics.median(cell[what] for cell in cells) for what in ("steps", "prefill"))
        texts.append(f"{count / steps:.1f} ({floor / steps:.0%}), {prefill * 1e3:.0f}")
    tokens = {name: cells[0]["tokens"] for name, cells in found.items() if cells}
    same = [name for name in tokens if name != engines[0] and tokens[name] == tokens.get(engines[0])]
    return [*texts, ", ".join(same)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="prompts of 32 and 32 new tokens only")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each engine; medians are printed")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, default="gpt2", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print(json.dumps(measure(options.engine, options.model, options.prompts, options.tokens, options.threads)))
        return
    if options.quick:
        options.tokens = 32
    print(table(options, [32] if options.quick else options.prompts))


if __name__ == "__main__":
    main()
