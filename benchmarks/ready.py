"""How long a user waits: the import, and the first call of a model by its number of layers, beside other engines.

Each figure is of a process of its own on BERT, 256 wide, two sequences of 16 tokens: seconds from the loaded model to
the end of the first call, by the clock and (in brackets) of processor time of it and those it starts, which says
more on a busy host. cold: with an empty cache folder. known: an earlier process compiled and measured the kernels.
from disk: an earlier process stored the graphs, by `optimize(model, cache=True)`, or filled torch.compile's own caches.
ONNX Runtime and OpenVINO convert the model, which their figures are mostly of. Medians of the rounds, which go through
all of them in turns.

    python benchmarks/ready.py [--layers 4 12 32 48] [--rounds 1] [--peers] [--out benchmarks/results/ready]

ONNX Runtime and OpenVINO are measured where the interpreter has them (.venv-bench/bin/python, with PYTHONPATH=.).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results" / "ready"
IMPORTS = ["torch", "fxbt over torch", "what a capture needs"]
COLD, KNOWN, STORED = "fxbt, cold", "fxbt, known", "fxbt, from disk"
COMPILE, COMPILED = "torch.compile, cold", "torch.compile, from disk"
ONNX, OPENVINO = "ONNX Runtime", "OpenVINO"
# Those that share a cache folder, in the order they fill it; what `to store` names fills it and is not shown.
TO_STORE = "to store"
FOLDERS = ((COLD, KNOWN, TO_STORE, STORED), (COMPILE, COMPILED), (ONNX,), (OPENVINO,))
NEEDED = {ONNX: "onnxruntime", OPENVINO: "openvino"}

Seconds = tuple[float, float]  # by the clock, of processor time


def now() -> Seconds:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(each.ru_utime + each.ru_stime for each in used)


def since(start: Seconds) -> Seconds:
    end = now()
    return end[0] - start[0], end[1] - start[1]


def imports() -> list[Seconds]:
    """What a process waits for torch, for fxbt, and for what `fxbt.preload()` loads."""
    seconds = []
    for load in ("import torch", "import fxbt", "fxbt.preload().join()"):
        start = now()
        exec(load, globals())
        seconds.append(since(start))
    return seconds


def first_call(layers: int, engine: str) -> list[Seconds]:
    """What the first and the second call of a loaded model take."""
    import torch
    import transformers

    import fxbt

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "vocab_size": 1000}
    model: Any = transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers, **sizes)).eval()
    ids = torch.randint(5, 900, (2, 16))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    if engine.startswith("fxbt"):
        fxbt.preload().join()  # a user's loads while the weights do
    seconds = []
    with torch.no_grad():
        start = now()
        fast = ready(engine, model, {"input_ids": ids, "attention_mask": mask})
        for _ in range(2):
            fast(input_ids=ids, attention_mask=mask)
            seconds.append(since(start))
            start = now()
        if engine.startswith("fxbt"):
            fast.warmup(input_ids=ids, attention_mask=mask)  # measures the kernels, for `known`
    return seconds


def ready(engine: str, model: Any, inputs: dict[str, Any]) -> Callable[..., Any]:
    """The model as an engine runs it, for batches and lengths of any size."""
    import torch

    import fxbt

    if engine in (COMPILE, COMPILED):
        return torch.compile(model, dynamic=True)
    if engine in NEEDED:
        from engines import ENGINES

        run = ENGINES[engine].prepare(model, inputs, torch.get_num_threads())
        return lambda **given: run(given)
    return fxbt.optimize(model, cache=engine in (TO_STORE, STORED))


def in_a_process(cache: str, *arguments: str) -> list[Seconds]:
    names = ("FXBT_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    environment = {**os.environ, **dict.fromkeys(names, cache), "FXBT_TUNE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--work", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(layers: list[int], rounds: int, peers: bool) -> dict[str, list[list[Seconds]]]:
    """Name -> for each round, the seconds of its parts."""
    found: dict[str, list[list[Seconds]]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            found.setdefault("imports", []).append(in_a_process(cache, "imports"))
        for count in layers:
            for engines in FOLDERS if peers else FOLDERS[:1]:
                _measure(found, count, [engine for engine in engines if is_there(engine)])
    return found


def _measure(found: dict[str, list[list[Seconds]]], count: int, engines: list[str]) -> None:
    """One process after the other, with one cache folder that is empty at first."""
    with tempfile.TemporaryDirectory() as cache:
        for engine in engines:
            seconds = in_a_process(cache, str(count), engine)
            if engine != TO_STORE:
                found.setdefault(f"{engine} {count}", []).append(seconds)


def is_there(engine: str) -> bool:
    """Whether what an engine needs is installed."""
    return engine not in NEEDED or importlib.util.find_spec(NEEDED[engine]) is not None


def shown(rounds: list[list[Seconds]], part: int) -> str:
    clock, processor = (statistics.median(each[part][kind] for each in rounds) for kind in (0, 1))
    return f"{clock:.2f} ({processor:.2f})"


def text(found: dict[str, Any], layers: list[int], about: dict[str, Any]) -> str:
    loads = [[name, shown(found["imports"], place)] for place, name in enumerate(IMPORTS)]
    engines = [engine for folder in FOLDERS for engine in folder if f"{engine} {layers[0]}" in found]
    parts = [
        [engine + call, *(shown(found[f"{engine} {count}"], part) for count in layers)]
        for part, call in enumerate((": first call", ": second call"))
        for engine in engines
    ]
    return "\n\n".join(
        [
            "\n".join(f"{key}: {value}" for key, value in about.items()),
            tabulate(loads, headers=["import", "s (of processor)"], disable_numparse=True),
            tabulate(parts, headers=["", *(f"{count} layers" for count in layers)], disable_numparse=True),
            (__doc__ or "").split("\n\n")[1],
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 32, 48])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        done = imports() if options.work == ["imports"] else first_call(int(options.work[0]), options.work[1])
        print(json.dumps(done))
        return
    load = os.getloadavg()[0]
    found = measured(options.layers, options.rounds, options.peers)
    about = {"date": time.strftime("%Y-%m-%d"), "processors": os.cpu_count(), "rounds": options.rounds}
    about["load of the host before and after"] = f"{load:.1f}, {os.getloadavg()[0]:.1f}"
    result = text(found, options.layers, about)
    print(result)
    options.out.with_suffix(".txt").write_text(result + "\n")
    options.out.with_suffix(".json").write_text(json.dumps({**about, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
