"""Each kernel that fxbt chooses from, for the linears and attentions of MiniLM and BERT-base: microseconds a call.

`python benchmarks/cpu_kernels.py` runs the contests of fxbt/lower/cpu/linears.py and attention.py for longer than a
model's warmup does, in turns in one process, each call on weights that the caches have not just seen. "native / best"
is fxbt's own kernel (fxbt/kernels/native.c) against the fastest other one; below 1 it is faster.

`--ship` puts this machine's times into fxbt/kernels/shipped.json, in place of earlier ones of such a processor: those
that fxbt kept in its cache folder, and what it measures now where nothing is in the way. `--ship --read FILE --cpu NAME
--capability AVX2 --threads 2` takes them from a table that was printed on another machine.

A file kernels.py here would be imported by transformers, which takes it for the package of that name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from fxbt.kernels import autotune, machine, native, shipped
from fxbt.kernels.turns import Contest, finished, in_turns
from fxbt.lower.cpu.attention import attentions
from fxbt.lower.cpu.epilogue import Activation
from fxbt.lower.cpu.linears import linears

SECONDS, MOST_TURNS = 1.0, 10**6  # for each size
SHIP_SECONDS = 120.0  # for what no earlier process has measured
TORCH = ["2.11", "2.15"]  # whose kernels are taken for as fast: from, and before

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
        times = [min(turns) for turns in finished(in_turns(*calls, seconds=SECONDS, most=MOST_TURNS))]
        others = [us for name, us in zip(contest.names, times, strict=True) if name != "native"]
        ratio = [times[contest.names.index("native")] / min(others)] if "native" in contest.names else []
        rows.append([size, *times, *ratio])
    formats = ("d", *[".0f"] * len(contest.names), ".2f")
    return tabulate(rows, [contest.key, *contest.names, "native / best"], floatfmt=formats)


def measured() -> dict[str, Any]:
    """Times of each contest on this machine, but for those that something disturbed."""
    measurements = autotune.Measurements(SHIP_SECONDS)
    with measurements.at_once():
        for contest in CONTESTS:
            measurements.ask(contest, may_wait=False)
    known = {contest.key: measurements.known(contest) for contest in CONTESTS}
    return {key: found.times for key, found in known.items() if found and found.source == autotune.MEASURED}


def printed(file: Path) -> dict[str, Any]:
    """Times of each contest as `table` has printed them; a size that was too large is as the one before."""
    times: dict[str, Any] = {}
    for block in file.read_text().split("\n\n"):
        rows = [re.split(r"  +", line.strip()) for line in block.splitlines() if not line.startswith("--")]
        sizes = {contest.key: len(contest.sizes) for contest in CONTESTS}
        if rows[0][0] not in sizes:
            continue
        (key, *names, _), *lines = rows
        for place, name in enumerate(names, 1):
            column = [float(line[place]) for line in lines]
            times.setdefault(key, {})[name] = column + column[-1:] * (sizes[key] - len(column))
    return times


def ship(options: argparse.Namespace) -> None:
    """Writes times into the table of the package."""
    times = printed(options.read) if options.read else measured()
    source = f"benchmarks/results/{options.read.name}" if options.read else f"torch {torch.__version__}"
    entry = {
        "cpu": options.cpu,
        "capability": options.capability,
        "threads": options.threads,
        "torch": TORCH,
        "from": f"{source}, {datetime.date.today()}",
        "microseconds": {
            key: {name: [round(us, 1) for us in column] for name, column in columns.items()}
            for key, columns in times.items()
        },
    }
    data = json.loads(shipped.FILE.read_text())
    of = ("cpu", "capability", "threads", "torch")
    others = [other for other in data["machines"] if [other[name] for name in of] != [entry[name] for name in of]]
    text = json.dumps({"format": autotune.FORMAT, "machines": [*others, entry]}, indent=1)
    lists = re.sub(
        r"\[[^][{}]*\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
    shipped.FILE.write_text(lists + "\n")
    missing = [contest.key for contest in CONTESTS if contest.key not in times]
    print(f"{len(times)} shapes of {options.cpu} in {shipped.FILE}; without: {', '.join(missing) or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ship", action="store_true")
    parser.add_argument("--read", type=Path)
    parser.add_argument("--cpu", default=machine.cpu_family())
    parser.add_argument("--capability", default=machine.capability())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.ship:
        ship(options)
        return
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {torch.get_num_threads()} threads, microseconds")
    if reason := native.obstacle():
        print(f"without fxbt's own kernels: {reason}")
    with torch.no_grad():
        for contest in CONTESTS:
            print(f"\n{table(contest)}", flush=True)


if __name__ == "__main__":
    main()
