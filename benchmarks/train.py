"""What a training step costs: forward, backward and AdamW of a classifier, by fxbt and its peers.

Every measurement is a process of its own; rounds go through all of them in turn, so that none has the quiet minute.
Dropout is off, so that all engines compute the same. The peak is that of the steps, weights and optimizer included.

    python benchmarks/train.py [--rounds 3] [--threads 2] [--seconds 20] [--models MiniLM] [--columns mixed]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from measuring import forget_peak_memory, peak_memory, shown

CLASSES = 2
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES: dict[str, dict[str, Any]] = {
    "MiniLM": {
        **NO_DROPOUT,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-base": NO_DROPOUT,
}
# Lengths of sentences: evenly growing, with one as long as the batch; fill 0.46.
LENGTHS: dict[str, list[int]] = {
    "mixed": [128, *(12 + round(i * 83 / 14) for i in range(15))],
    "16x128": [128] * 16,
    "8x32": [32] * 8,
}
ENGINES = ("HF sdpa", "HF eager", "Inductor", "nn.TransformerEncoder", "fxbt")

Step = Callable[[Any, Any, Any], Any]  # (ids, mask, labels) -> the loss


def fill(column: str) -> float:
    lengths = LENGTHS[column]
    return sum(lengths) / (len(lengths) * max(lengths))


def hugging_face(model: str, attention: str) -> Any:
    import transformers

    config = transformers.BertConfig(**SIZES[model], num_labels=CLASSES, attn_implementation=attention)
    return transformers.BertForSequenceClassification(config)


def torchs_encoder(model: str) -> Any:
    """The same sizes in torch's own modules."""
    import torch
    from torch import nn

    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    sizes |= {name: size for name, size in SIZES[model].items() if name in sizes}

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = sizes["hidden_size"]
            self.words, self.positions = nn.Embedding(30522, hidden), nn.Embedding(512, hidden)
            self.norm = nn.LayerNorm(hidden)
            layer = nn.TransformerEncoderLayer(
                hidden, sizes["num_attention_heads"], sizes["intermediate_size"], 0.0, "gelu", batch_first=True
            )
            self.encoder = nn.TransformerEncoder(layer, sizes["num_hidden_layers"])
            self.pooler, self.classifier = nn.Linear(hidden, hidden), nn.Linear(hidden, CLASSES)

        def forward(self, ids: Any, mask: Any, labels: Any) -> Any:
            x = self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1])))
            x = self.encoder(x, src_key_padding_mask=mask == 0)
            return nn.functional.cross_entropy(self.classifier(self.pooler(x[:, 0]).tanh()), labels)

    return Classifier()


def prepared(engine: str, model: str) -> tuple[Any, Step]:
    """The model that is trained, and what computes its loss."""
    import torch

    if engine == "nn.TransformerEncoder":
        own = torchs_encoder(model).train()
        return own, own
    net = hugging_face(model, "eager" if engine == "HF eager" else "sdpa").train()
    run = net
    if engine == "Inductor":
        run = torch.compile(net, dynamic=False)
    if engine == "fxbt":
        import fxbt

        net = run = fxbt.optimize(net)
    return net, lambda ids, mask, labels: run(input_ids=ids, attention_mask=mask, labels=labels).loss


def measure(engine: str, model: str, column: str, threads: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of a step, the peak in MiB and the seconds until the third step is done, in this process."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net, loss_of = prepared(engine, model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    lengths = torch.tensor(LENGTHS[column])[torch.randperm(len(LENGTHS[column]))]
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids, labels = torch.randint(1000, 30000, mask.shape), torch.arange(len(lengths)) % CLASSES

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss_of(ids, mask, labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    ready = sum(step() for _ in range(3))  # captures or compiles, and the first steps of fxbt compute padding
    forget_peak_memory()
    end, times = time.perf_counter() + seconds, [step(), step()]
    while time.perf_counter() < end:
        times.append(step())
    if engine == "fxbt":
        assert net.report.latest.calls.get("packed" if fill(column) < 1 else "dense"), net.report
    return {"ms": 1e3 * statistics.median(times), "mib": peak_memory(), "ready": ready}


def measured(engine: str, model: str, column: str, options: argparse.Namespace) -> dict[str, Any]:
    """The same, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", engine, model, column]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
    answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--columns", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--one", nargs=3, metavar=("ENGINE", "MODEL", "COLUMN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.threads, options.seconds)))
        return
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for model in options.models:
            for column in options.columns:
                for engine in options.engines:
                    found.setdefault((model, column, engine), []).append(measured(engine, model, column, options))
    print(
        f"{'model':10} {'batch':>8} {'fill':>5}  {'engine':22} {'ms a step':>22} {'of HF sdpa':>10} {'MiB':>7} ready s"
    )
    for (model, column, engine), answers in found.items():
        times = [answer["ms"] for answer in answers]
        base = found.get((model, column, ENGINES[0]), answers)
        share = statistics.median(times) / statistics.median(answer["ms"] for answer in base)
        mib, ready = (statistics.median(answer[name] for answer in answers) for name in ("mib", "ready"))
        print(
            f"{model:10} {column:>8} {fill(column):5.2f}  {engine:22} {shown(times):>22} {share:10.2f} {mib:7.0f} "
            f"{ready:7.1f}"
        )


if __name__ == "__main__":
    main()
