"""Milliseconds a call on a CUDA device, fxbt beside its peers, as a table: `python benchmarks/cuda.py [--models ...]`.

Each engine has a process of its own for each model. Those that torch compiles get ready at once, which takes minutes;
then one after the other takes its turn: gets ready, if it is not, checks its outputs against float32 on the device, and
times all columns alone. Needs torch, transformers and tabulate only. Wall clock with synchronisation, medians of at
least five calls in 0.25 s.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

SEED, VOCAB = 0, 30522
DENSE = {"1x16": (1, 16), "1x128": (1, 128), "8x128": (8, 128), "32x128": (32, 128), "16x512": (16, 512)}
MIXED = {"8 mixed <=128": (8, 128), "32 mixed <=128": (32, 128), "64 mixed <=512": (64, 512)}
Batch = dict[str, torch.Tensor]


def _bert(hidden: int, layers: int) -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * hidden
    )
    return BertModel, config


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    return LlamaModel, LlamaConfig(vocab_size=VOCAB, use_cache=False, **sizes, **heads)


def _modernbert() -> Any:
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel, ModernBertConfig(vocab_size=VOCAB, pad_token_id=0, cls_token_id=1, sep_token_id=2)


def _vit() -> Any:
    from transformers import ViTConfig, ViTModel

    return ViTModel, ViTConfig()


MODELS: dict[str, Callable[[], Any]] = {
    "BERT-base": lambda: _bert(768, 12),
    "MiniLM": lambda: _bert(384, 6),
    "Llama 0.3B": _llama,
    "ModernBERT": _modernbert,
    "ViT-base": _vit,
}


def columns(name: str) -> dict[str, Batch]:
    """The batches of a model: each is the keyword arguments of one call."""
    generator = torch.Generator().manual_seed(SEED)
    if name == "ViT-base":
        return {f"{n} images": {"pixel_values": torch.randn(n, 3, 224, 224, generator=generator)} for n in (1, 8, 64)}
    found = {}
    for column, (rows, length) in {**DENSE, **MIXED}.items():
        ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
        lengths = torch.full((rows,), length)
        if column in MIXED:
            lengths = torch.randint(length // 16, length + 1, (rows,), generator=generator)
            lengths[0] = length
        found[column] = {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}
    return found


# --- engines ----------------------------------------------------------------------------------------------------

Run = Callable[[Batch], torch.Tensor]


def hugging_face(model: Any) -> Run:
    return lambda batch: model(**batch).last_hidden_state


def compiled(**options: Any) -> Callable[[Any], Run]:
    def prepare(model: Any) -> Run:
        import torch._dynamo.config

        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.cache_size_limit = 64
        run = torch.compile(model, **options)

        def call(batch: Batch) -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return run(**batch).last_hidden_state

        return call

    return prepare


def optimized(**options: Any) -> Callable[[Any], Run]:
    def prepare(model: Any) -> Run:
        import fxbt

        fast = fxbt.optimize(model, **options)

        def call(batch: Batch) -> torch.Tensor:
            return fast(**batch).last_hidden_state

        call.fast = fast  # type: ignore[attr-defined]
        return call

    return prepare


def encoder_fast_path(model: Any) -> Run:
    """nn.TransformerEncoder's, which BetterTransformer ran."""
    import engines

    return engines.fast_path(model, {}, 1)


ENGINES: dict[str, Callable[[Any], Run]] = {
    "HF sdpa": hugging_face,
    "nn.TransformerEncoder": encoder_fast_path,
    "torch.compile, dynamic": compiled(dynamic=True),
    "torch.compile, reduce-overhead": compiled(mode="reduce-overhead", dynamic=False),
    "torch.compile, max-autotune": compiled(mode="max-autotune", dynamic=False),  # minutes until ready
    "fxbt": optimized(),
    "fxbt, padding kept": optimized(padding="keep"),
    "fxbt, cuda_graphs": optimized(cuda_graphs=True),
}
DEFAULT = [name for name in ENGINES if "max-autotune" not in name and "kept" not in name]


# --- one engine in its process ----------------------------------------------------------------------------------


def work(name: str, engine: str, dtype: torch.dtype, turn: Path) -> dict[str, Any]:
    """Gets ready, waits for its turn, and times."""
    torch.manual_seed(SEED)
    model_class, config = MODELS[name]()
    batches = {column: {k: v.cuda() for k, v in batch.items()} for column, batch in columns(name).items()}
    model = model_class._from_config(config, attn_implementation="sdpa").eval().cuda()
    with torch.no_grad():
        expected = {column: _valid(model(**batch).last_hidden_state, batch) for column, batch in batches.items()}
        flops = {column: _flops(model, batch) for column, batch in batches.items()}
        batches = {column: _to(batch, dtype) for column, batch in batches.items()}
        run = ENGINES[engine](model.to(dtype))
        if not engine.startswith("torch.compile"):
            _wait_for(turn)
        ready, errors = {}, {}
        for column, batch in batches.items():
            begin = time.perf_counter()
            for _ in range(3):  # the second records, the third replays
                output = run(batch)
            torch.cuda.synchronize()
            ready[column] = time.perf_counter() - begin
            errors[column] = float((_valid(output, batch) - expected[column]).norm() / expected[column].norm())
            del output
        if engine.startswith("torch.compile"):
            _wait_for(turn)
        times = {column: _milliseconds(run, batch) for column, batch in batches.items()}
    fast = getattr(run, "fast", None)
    return {
        "times": times,
        "errors": errors,
        "ready": ready,
        "flops": flops,
        "report": str(fast.report) if fast else "",
    }


def _wait_for(turn: Path) -> None:
    print("READY", flush=True)
    while not turn.exists():
        time.sleep(0.02)


def _flops(model: Any, batch: Batch) -> float:
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    return float(counter.get_total_flops())


def _to(batch: Batch, dtype: torch.dtype) -> Batch:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def _valid(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    return states[batch["attention_mask"].bool()].float() if "attention_mask" in batch else states.float()


def _milliseconds(run: Run, batch: Batch) -> float:
    taken: list[float] = []
    for _ in range(3):
        run(batch)
    torch.cuda.synchronize()
    end = time.perf_counter() + 0.25
    while time.perf_counter() < end or len(taken) < 5:
        begin = time.perf_counter()
        run(batch)
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken)


# --- all of them ------------------------------------------------------------------------------------------------


def measure(models: list[str], engines: list[str], dtype: str, patience: float) -> dict[str, dict[str, Any]]:
    """For each model and engine what `work` found, or {"failed": why}."""
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for name in models:
            for engine in engines:
                place = Path(folder) / str(len(started))
                command = [sys.executable, __file__, "--work", name, engine, dtype, str(place)]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{place}.inductor", "OMP_NUM_THREADS": "2"}
                log = place.with_suffix(".log").open("w+")
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                started.append((name, engine, place, process, log))
        end = time.monotonic() + patience
        for _, _, place, process, _ in started:
            log_file = place.with_suffix(".log")
            while process.poll() is None and "READY" not in log_file.read_text():
                if time.monotonic() > end:  # it would disturb the others
                    process.kill()
                time.sleep(0.1)
        for name, engine, place, process, _ in started:
            place.touch()  # its turn
            process.wait()
            result = place.with_suffix(".json")
            log_text = place.with_suffix(".log").read_text()
            found[name][engine] = json.loads(result.read_text()) if result.exists() else {"failed": log_text[-1500:]}
            print(name, engine, found[name][engine].get("times", "failed"), file=sys.stderr, flush=True)
    return found


def peak(dtype: torch.dtype) -> float:
    """Operations a second of a large product on this device."""
    x = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    seconds = _milliseconds(lambda batch: x @ x, {}) / 1e3
    return 2 * 8192**3 / seconds


def tables(found: dict[str, dict[str, Any]], dtype: str) -> str:
    """The tables as Markdown: times, the largest error, seconds until ready, and the share of the peak."""
    most = peak(getattr(torch, dtype))
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}, ms a call"
    parts = [f"{where}; a product of 8192x8192 runs at {most / 1e12:.0f} TFLOP/s"]
    for name, engines in found.items():
        names = list(columns(name))
        rows = []
        for engine, result in engines.items():
            if "failed" in result:
                rows.append([engine, *["failed"] * len(names)])
                continue
            ready, worst = sum(result["ready"].values()), max(result["errors"].values())
            rows.append([engine, *(f"{result['times'][c]:.2f}" for c in names), f"{worst:.1e}", f"{ready:.1f}"])
            if engine == "fxbt, cuda_graphs":
                shares = [result["flops"][c] / (result["times"][c] / 1e3) / most for c in names]
                rows.append(["  its share of the peak", *(f"{100 * share:.0f} %" for share in shares)])
        parts.append(tabulate(rows, [name, *names, "error", "ready, s"], tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["BERT-base", "MiniLM", "Llama 0.3B", "ModernBERT"]
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=DEFAULT)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--patience", type=float, default=150.0, help="seconds until all must be ready")
    parser.add_argument("--output", type=Path, help="a folder for the numbers and reports as JSON")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, engine, dtype, place = arguments.work
        result = work(name, engine, getattr(torch, dtype), Path(place))
        Path(place).with_suffix(".json").write_text(json.dumps(result))
        return
    found = measure(arguments.models, arguments.engines, arguments.dtype, arguments.patience)
    text = tables(found, arguments.dtype)
    print(text)
    for name, engines in found.items():
        for engine, result in engines.items():
            if "failed" in result:
                print(f"\n{name}, {engine} failed:\n{result['failed']}")
    if arguments.output:
        (arguments.output / "cuda.json").write_text(json.dumps(found))
        (arguments.output / "cuda.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
