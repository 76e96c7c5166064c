"""transformers.pipeline with an optimised model: the same text, on graphs. Tokenizers are made here, from no hub."""

import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_generate import GROUPED, SEQ2SEQ, gpt2, graphs_of, made, of, served

transformers: Any = pytest.importorskip("transformers", minversion="5.0")
tokenizers: Any = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")

STEPS = 60


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tokenizer() -> Any:
    """Words w5 to w98 are the tokens 5 to 98."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4} | {f"w{i}": i for i in range(5, 99)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **special)


@pytest.mark.parametrize("build", [gpt2, of("Llama", GROUPED)], ids=["gpt2", "llama"])
def test_text_generation(build: Any) -> None:
    model, fast = made(build)
    texts = ["w5 w6 w7", "w8 w9 w10 w11 w12", "w13 w14"]
    options = {"max_new_tokens": STEPS, "do_sample": False}
    for batch_size in (1, 2, 3):
        found, expected = (
            transformers.pipeline("text-generation", model=each, tokenizer=tokenizer(), batch_size=batch_size)(
                texts, **options
            )
            for each in (fast, model)
        )
        assert found == expected and len(found[0][0]["generated_text"].split()) > STEPS // 2
    assert not fast.report.fallbacks and served(fast) >= (3 + 2 + 1) * STEPS - len(graphs_of(fast))
    steps = {graph.step for graph in fast.report.graphs.values()}
    assert steps == {"prefill", "decode"} and "calls with a KV cache" in str(fast.report)


def whisper() -> Any:
    config = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 80}
    config |= {"suppress_tokens": None, "begin_suppress_tokens": None, "forced_decoder_ids": None}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config))


def whisper_tokenizer(folder: Path) -> Any:
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "<|endoftext|>", *string.ascii_letters])}
    vocab |= {f"t{i}": i for i in range(len(vocab), 98)} | {"<|notimestamps|>": 98}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return transformers.WhisperTokenizer(*files, pad_token="<|endoftext|>")


def test_speech_recognition(tmp_path: Path) -> None:
    model, fast = made(whisper)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    draw = numpy.random.default_rng(0)
    sounds = [draw.normal(size=size).astype("float32") for size in (9000, 15000, 16000)]
    options = {"generate_kwargs": {"max_new_tokens": STEPS, "do_sample": False}}
    for batch_size in (1, 2):
        found, expected = (
            transformers.pipeline(
                "automatic-speech-recognition",
                model=each,
                tokenizer=whisper_tokenizer(tmp_path),
                feature_extractor=extractor,
                batch_size=batch_size,
            )(list(sounds), **options)
            for each in (fast, model)
        )
        assert found == expected and all(result["text"] for result in found)
    assert not fast.report.fallbacks and served(fast) > 3 * STEPS
    assert list(fast.report.parts) == ["model.encoder"] and not fast.report.parts["model.encoder"].fallbacks
