"""`generate` of models that call parts of themselves: those parts run graphs too, and the tokens are the same."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_generate import PAD, SEQ2SEQ, bart, generate, graphs_of, left_padding, made, prompt, t5
from torch import Tensor

import fxbt

transformers: Any = pytest.importorskip("transformers", minversion="5.0")

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")

BLOCK, CODEBOOK, SEMANTIC = 64, 16, 24


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def served(part: Any) -> int:
    return sum(graph.served for graph in type(part)._fxbt_dispatcher.graphs)


def whisper() -> Any:
    config = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 80}
    config |= {"suppress_tokens": None, "begin_suppress_tokens": None, "forced_decoder_ids": None}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config))


@pytest.mark.parametrize("build", [t5, bart], ids=["t5", "bart"])
def test_the_encoder_is_served(build: Any) -> None:
    model, fast = made(build)
    for turn, (batch, length) in enumerate([(2, 6), (3, 9), (1, 4)]):
        ids = prompt(batch, length)
        for options in ({}, {"attention_mask": left_padding(ids)}, {"num_beams": 2}):
            assert torch.equal(generate(fast, ids, 30, **options), generate(model, ids, 30, **options))
        assert served(fast.get_encoder()) == 3 * (turn + 1)
    (path,) = fast.report.parts
    assert path.endswith("encoder") and not fast.report.parts[path].fallbacks and not fast.report.fallbacks


def test_what_an_encoder_returns_at_padding_is_the_originals() -> None:
    model, fast = made(t5)
    for batch, length in ((2, 6), (3, 8), (2, 5)):
        ids = prompt(batch, length)
        mask = left_padding(ids).flip(1)
        new, old = (each.get_encoder()(input_ids=ids, attention_mask=mask) for each in (fast, model))
        assert type(new) is type(old)
        torch.testing.assert_close(new.last_hidden_state, old.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert served(fast.encoder) == 3 and fast.get_encoder() is fast.encoder


def test_whispers_encoder_is_served() -> None:
    model, fast = made(whisper)
    for batch in (2, 1, 3):
        features = torch.randn(batch, 8, 40)
        options = {"max_new_tokens": 60, "do_sample": False, "decoder_input_ids": torch.full((batch, 3), 2)}
        assert torch.equal(*(each.generate(features, **options) for each in (fast, model)))
    assert served(fast.get_encoder()) == 3 and list(fast.report.parts) == ["model.encoder"]


def test_the_model_below_a_head() -> None:
    model, fast = made(bart)
    for _ in range(3):
        new, old = (each.model(input_ids=prompt(2, 6)).last_hidden_state for each in (fast, model))
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    assert served(fast.model) >= 2 and list(fast.report.parts) == ["model"]


def blip2() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 99, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": PAD, "eos_token_id": 2}
    config = transformers.Blip2Config(
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        qformer_config={**vision, "encoder_hidden_size": 32, "vocab_size": 99},
        text_config=transformers.OPTConfig(**text, bos_token_id=1).to_dict(),
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=98,
    )
    return transformers.Blip2ForConditionalGeneration(config)


def test_blip2() -> None:
    model, fast = made(blip2)
    for each in (model, fast):
        each.language_model.generation_config.eos_token_id = None
    for batch in (2, 3, 1):
        ids = torch.cat([torch.full((batch, 4), 98), prompt(batch, 5)], 1)
        given = {
            "pixel_values": torch.randn(batch, 3, 16, 16),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        options = {"max_new_tokens": 60, "do_sample": False}
        assert torch.equal(*(each.generate(**given, **options) for each in (fast, model)))
    parts = fast.report.parts
    assert {"vision_model", "qformer", "language_model"} <= set(parts)
    assert not [part.fallbacks for part in parts.values() if part.fallbacks]
    assert served(fast.language_model) >= 170 and served(fast.vision_model) == served(fast.qformer) == 3


def bark() -> Any:
    sizes = {"block_size": BLOCK, "num_layers": 2, "num_heads": 4, "hidden_size": 32}
    coarse_size = SEMANTIC + 2 * CODEBOOK + 4
    config = transformers.BarkConfig(
        semantic_config={**sizes, "input_vocab_size": 99, "output_vocab_size": SEMANTIC + 1},
        coarse_acoustics_config={**sizes, "input_vocab_size": coarse_size, "output_vocab_size": coarse_size},
        fine_acoustics_config={
            **sizes,
            "input_vocab_size": CODEBOOK + 1,
            "output_vocab_size": CODEBOOK + 1,
            "n_codes_total": 4,
            "n_codes_given": 1,
        },
        codec_config=transformers.EncodecConfig(
            num_filters=4,
            hidden_size=16,
            codebook_size=CODEBOOK,
            codebook_dim=16,
            upsampling_ratios=[2, 2],
            sampling_rate=2400,
        ).to_dict(),
    )
    model = transformers.BarkModel(config)
    semantic = {"semantic_vocab_size": SEMANTIC, "eos_token_id": SEMANTIC, "max_new_tokens": 20}
    semantic |= {"max_input_semantic_length": 12, "text_encoding_offset": 0, "text_pad_token": 90}
    semantic |= {"semantic_infer_token": 91}
    coarse = {"coarse_semantic_pad_token": coarse_size - 4, "coarse_infer_token": coarse_size - 3}
    coarse |= {"max_coarse_input_length": 16, "max_coarse_history": 20, "sliding_window_len": 10}
    fine = {"max_fine_history_length": 16, "max_fine_input_length": 32, "n_fine_codebooks": 4}
    made = importlib.import_module("transformers.models.bark.generation_configuration_bark")
    model.generation_config = made.BarkGenerationConfig(codebook_size=CODEBOOK)
    model.generation_config.semantic_config = semantic
    model.generation_config.coarse_acoustics_config = coarse
    model.generation_config.fine_acoustics_config = fine
    return model


def test_bark() -> None:
    model, fast = made(bark)
    for batch in (2, 1, 3):
        given = {"input_ids": prompt(batch, 12), "attention_mask": torch.ones(batch, 12, dtype=torch.long)}
        new, old = (each.generate(**given, do_sample=False) for each in (fast, model))
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
    parts = fast.report.parts
    assert {"semantic", "coarse_acoustics", "fine_acoustics"} <= set(parts)
    assert served(fast.semantic) > 40 and served(fast.coarse_acoustics) > 40 and served(fast.fine_acoustics) > 3


def test_the_original_generates_without_graphs() -> None:
    model, fast = made(t5)
    generate(fast, prompt(2, 6), 10)
    before = served(fast), served(fast.encoder)
    generate(model, prompt(2, 6), 10)
    assert (served(fast), served(fast.encoder)) == before and len(graphs_of(fast)) == 2


def test_restored_in_place() -> None:
    model = t5().eval()
    fast: Any = fxbt.optimize(model, inplace=True)
    first: Tensor = generate(fast, prompt(2, 6), 10)
    assert list(fast.report.parts) == ["encoder"]
    fxbt.restore(fast)
    assert type(model.encoder).__name__ == "T5Stack" and not hasattr(model.encoder, "report")
    assert torch.equal(generate(model, prompt(2, 6), 10), first)
