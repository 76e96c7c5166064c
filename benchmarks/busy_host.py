"""How many of twenty tiny models lose their graph beside as many busy loops as there are processors; it must be none.

    python benchmarks/busy_host.py > benchmarks/results/busy_host.txt

Each model is called as often as brings the first later look, too.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import warnings

import torch
from torch import nn

import fxbt

MODELS, CALLS = 20, 140
BUSY = "while True: pass"


def encoder(place: int) -> nn.Module:
    """A tiny encoder; no two are alike."""
    width = 32 * (1 + place % 4)
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=place % 2 == 0)
    return nn.TransformerEncoder(layer, 1 + place % 3, enable_nested_tensor=False).eval()


def lost() -> tuple[int, list[str]]:
    """How many of the models serve some size by the original, and what their reports say of it."""
    count, told = 0, []
    for place in range(MODELS):
        torch.manual_seed(place)
        model = encoder(place)
        fast = fxbt.optimize(model)
        width = model.layers[0].linear1.in_features  # type: ignore[index, union-attr]
        x = torch.randn(2, 8 + place, width)
        with torch.no_grad():
            for _ in range(CALLS):
                fast(x)
        found = fast.report.latest.lost if fast.report.latest else {"all": "no graph was captured"}
        count += bool(found)
        told += [f"  model {place}, {size}: {evidence}" for size, evidence in found.items()]
    return count, told


def main() -> None:
    os.environ["FXBT_TUNE"] = "1"
    torch.set_num_threads(os.cpu_count() or 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}")
    for loops in (0, os.cpu_count() or 1):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.environ["FXBT_CACHE_DIR"] = folder
            busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(loops)]
            try:
                count, told = lost()
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
        print(f"beside {loops} busy loops: {count} of {MODELS} models lost their graph")
        print("\n".join(told), end="\n" if told else "")


if __name__ == "__main__":
    main()
