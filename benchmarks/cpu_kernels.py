"""Each kernel that fxbt chooses from, for the linears and attentions of MiniLM and BERT-base: microseconds a call.

`python benchmarks/cpu_kernels.py` runs the contests of fxbt/lower/cpu/linears.py and attention.py for longer than a
model's warmup does, in turns in one process, each call on weights that the caches have not just seen. "native / best"
is fxbt's own kernel (fxbt/kernels/native.c) against the fastest other one; below 1 it is faster.

A file kernels.py here would be imported by transformers, which takes it for the package of that name.
"""

from __future__ import annotations

import torch
from tabulate import tabulate

from fxbt.kernels import native
from fxbt.kernels.autotune import Contest, in_turns
from fxbt.lower.cpu.attention import attentions
from fxbt.lower.cpu.epilogue import Activation
from fxbt.lower.cpu.linears import linears

SECONDS, MOST_TURNS = 1.0, 10**6  # for each size

GELU = Activation("gelu", "none", torch._C._nn.gelu_)
CONTESTS = [
    *(linears(n, k) for n, k in ((384, 384), (1152, 384), (384, 1536), (768, 768), (2304, 768), (768, 3072))),
    *(linears(n, k, GELU) for n, k in ((1536, 384), (3072, 768))),
    *(attentions(12, head_dim, several) for head_dim in (32, 64) for several in (False, True)),
]


def table(contest: Contest) -> str:
    rows = []
    for size in contest.sizes:
        calls = contest.calls(size)
        if calls is None:
            continue
        times = [min(turns) for turns in in_turns(*calls, seconds=SECONDS, most=MOST_TURNS)]
        others = [us for name, us in zip(contest.names, times, strict=True) if name != "native"]
        ratio = [times[contest.names.index("native")] / min(others)] if "native" in contest.names else []
        rows.append([size, *times, *ratio])
    formats = ("d", *[".0f"] * len(contest.names), ".2f")
    return tabulate(rows, [contest.key, *contest.names, "native / best"], floatfmt=formats)


def main() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {torch.get_num_threads()} threads, microseconds")
    if reason := native.obstacle():
        print(f"without fxbt's own kernels: {reason}")
    with torch.no_grad():
        for contest in CONTESTS:
            print(f"\n{table(contest)}", flush=True)


if __name__ == "__main__":
    main()
