"""What dropping padding is worth: MiniLM's shape on batches of mixed lengths, the dense graph against the packed one.

Every measurement is a process of its own; rounds go through all of them in turn, so that none has the quiet minute.
The ideal is 1 / fill (the share of valid tokens), and more where attention, which is quadratic, is worth seeing.

    python benchmarks/padding.py [--rounds 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from measuring import shown

BATCH, LENGTH = 32, 128
MODES = ("keep", "drop")


def evenly(count: int, first: int, last: int) -> list[int]:
    return [first + round(i * (last - first) / (count - 1)) for i in range(count)]


# A few sentences as long as the batch among shorter ones of evenly growing lengths.
LENGTHS = {
    "mostly short": [LENGTH] * 3 + evenly(29, 8, 59),
    "mixed": [LENGTH] * 2 + evenly(30, 6, 103),
    "mostly long": [LENGTH] * 4 + evenly(28, 10, 123),
    "all full": [LENGTH] * BATCH,
}


def fill(name: str) -> float:
    return sum(LENGTHS[name]) / (BATCH * LENGTH)


def measure(mode: str, name: str, threads: int) -> float:
    """Milliseconds of one call: the best of three, in this process."""
    import torch
    import transformers

    import fxbt

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    model = transformers.BertModel(config).eval()
    fast = fxbt.optimize(model, padding=mode)
    lengths = torch.tensor(LENGTHS[name])[torch.randperm(BATCH)]
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, mask.shape)
    times = []
    with torch.inference_mode():
        for _ in range(2):  # capture, then warm
            fast(input_ids=ids, attention_mask=mask)
        for _ in range(3):
            start = time.perf_counter()
            fast(input_ids=ids, attention_mask=mask)
            times.append(1e3 * (time.perf_counter() - start))
    assert fast.report.hits.get("padding", 0) == (mode == "drop"), fast.report.why("padding")
    return min(times)


def measured(mode: str, name: str, threads: int) -> float:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--one", mode, name, "--threads", str(threads)]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "LENGTHS"), help="one measurement, as a number")
    options = parser.parse_args()
    if options.one:
        print(measure(*options.one, options.threads))
        return
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for name in LENGTHS:
            for mode in MODES:
                found.setdefault((mode, name), []).append(measured(mode, name, options.threads))
    print(f"{'lengths':12} {'fill':>5} {'dense ms':>22} {'packed ms':>22} {'speedup':>8} {'of 1/fill':>9}")
    for name in LENGTHS:
        dense, packed = (found[mode, name] for mode in MODES)
        speedup = statistics.median(dense) / statistics.median(packed)
        print(
            f"{name:12} {fill(name):5.2f} {shown(dense):>22} {shown(packed):>22} "
            f"{speedup:8.2f} {speedup * fill(name):9.0%}"
        )


if __name__ == "__main__":
    main()
