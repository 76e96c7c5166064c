"""Softcapped scores (Gemma 2), c * tanh(S / c): the plain chain of ops, fxbt's blocks and torch's flex_attention.

`python benchmarks/softcap.py [--compile]` prints milliseconds for each length, side by side in one process. SDPA cannot
express a softcap; fxbt writes the scores out in place, some queries at a time. `--compile` adds
flex_attention compiled by Inductor, which needs a C++ compiler and compiles anew for other shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from fxbt.kernels.attention_products import by_products

CAP, HEADS, DIM, ROUNDS = 50.0, 8, 64, 7


def chain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As transformers writes it."""
    scores = CAP * torch.tanh(q @ k.mT * DIM**-0.5 / CAP)
    return scores.softmax(-1) @ v


def by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As fxbt's op computes it."""
    return by_products(q, k, v, [], [], DIM**-0.5 / CAP, CAP)


def softcapped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """flex_attention as it is called without torch.compile."""
    return flex_attention(q, k, v, score_mod=softcapped)  # type: ignore[return-value]


def milliseconds(run: Callable[..., Tensor], *tensors: Tensor) -> float:
    start = time.perf_counter()
    run(*tensors)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also flex_attention under torch.compile")
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "chain": chain,
        "fxbt": by_blocks,
        "flex_attention": flex,
    }
    if parser.parse_args().compile:
        ways["flex_attention, compiled"] = torch.compile(flex)
    rows = []
    with torch.no_grad():
        for batch, length in ((1, 16), (1, 128), (1, 512), (1, 1024), (8, 128), (8, 512)):
            q, k, v = (torch.randn(batch, HEADS, length, DIM) for _ in range(3))
            for run in ways.values():
                torch.testing.assert_close(run(q, k, v), chain(q, k, v), atol=1e-5, rtol=1e-4)
            times = [[milliseconds(run, q, k, v) for run in ways.values()] for _ in range(ROUNDS)]
            rows.append([batch, length, *(min(column) for column in zip(*times, strict=True))])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, best of {ROUNDS} in turns, ms")
    print(tabulate(rows, ["batch", "length", *ways], floatfmt=".2f"))


if __name__ == "__main__":
    main()
