"""The 45 architectures that BetterTransformer had a class for: fxbt has none for any of them.

For each, with eager attention and, where the model has it, with sdpa: captured, every attention found, projections
merged and layers made one node (or the reason), the outputs of the eager original at three shapes and paddings on the
one graph, and equal gradients in training mode.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from models import (
    ALL_PADDINGS,
    CLIP_TEXT,
    ENCODER,
    IMAGE_SHAPES,
    PAD,
    SEQ2SEQ,
    SEVERAL_SHAPES,
    TOKEN_SHAPES,
    VISION,
    VOCAB,
    Inputs,
    audio,
    compare_gradients,
    count_attentions,
    difference,
    enliven,
    images,
    implementations,
    speech,
    texts_and_images,
    token_pairs,
    tokens,
)
from packaging import version
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxbt

pytestmark = pytest.mark.skipif(
    version.parse(transformers.__version__).major < 5, reason="the settings are those of transformers 5"
)

CACHED = "a value inside the block is used outside it"  # keys and values that forward returns as a cache
FUSED = "one projection already computes query, key and value"
ONE_LINEAR = "one projection already computes query, key and value"


@dataclass(frozen=True)
class Row:
    """One architecture: a model class, its settings, and what is expected of it."""

    name: str
    model: str
    settings: dict[str, Any]
    inputs: Callable[[int, int, str], Inputs] = tokens
    qkv: int | str = 1  # merged projections, or the reason for none
    shapes: tuple[tuple[int, int], ...] = TOKEN_SHAPES
    paddings: tuple[str, ...] = ALL_PADDINGS
    config: str = ""  # the config class, where it is not the model's own
    layers: tuple[int, int] = (1, 0)  # encoder and decoder layers that become one node each
    open_layer: str = ""  # why another one does not
    sdpa_differs: bool = False  # transformers' own sdpa path gives other numbers than its eager one
    shuffled: bool = False  # the model shuffles image tokens: only what stands before them compares

    def __str__(self) -> str:
        return self.name

    def build(self, implementation: str) -> nn.Module:
        """The model without dropout, whose training mode then is deterministic too."""
        kind = getattr(transformers, self.model)
        config = (getattr(transformers, self.config) if self.config else kind.config_class)(**self.settings)
        _without_dropout(config)
        torch.manual_seed(0)
        return enliven(kind._from_config(config, attn_implementation=implementation))


def _without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _without_dropout(value)
        if isinstance(value, float) and ("drop" in name or name.endswith("_pdrop") or name.startswith("mask_")):
            setattr(config, name, 0.0)


ONE_LAYER = {**ENCODER, "num_hidden_layers": 1}
DECODER = {**ONE_LAYER, "bos_token_id": 3, "eos_token_id": 4}
ONE_VISION = {**VISION, "num_hidden_layers": 1}
PAIRS = {**SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "use_cache": True}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 3}
NEOX = {**DECODER, "rotary_pct": 0.5}
AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}
IMAGE = VOCAB - 1
BARK = {"num_layers": 1, "num_heads": 4, "hidden_size": 32, "block_size": 64, "input_vocab_size": VOCAB}
BLIP = {
    "vision_config": ONE_VISION,
    "qformer_config": {**ONE_LAYER, "encoder_hidden_size": 32},
    "text_config": {**ONE_LAYER, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "num_query_tokens": 4,
    "image_token_index": IMAGE,
}


def boxes(batch: int, seq: int, padding: str) -> Inputs:
    """Tokens, each with its place on a page."""
    corner = torch.randint(0, 50, (batch, seq, 2), generator=torch.Generator().manual_seed(seq))
    return {**tokens(batch, seq, padding), "bbox": torch.cat([corner, corner + 9], -1)}


def codes(batch: int, seq: int, padding: str) -> Inputs:
    """What Bark's fine model takes: the ids of two codebooks, the index of the next one."""
    generator = torch.Generator().manual_seed(seq)
    return {"codebook_idx": 2, "input_ids": torch.randint(0, VOCAB, (batch, seq, 4), generator=generator)}


def images_and_text(batch: int, seq: int, padding: str) -> Inputs:
    """Text that begins with four placeholders for the image."""
    text = tokens(batch, seq, padding)
    ids = torch.cat([torch.full((batch, 4), IMAGE), text["input_ids"].clamp(max=IMAGE - 1)], 1)
    mask = torch.cat([torch.ones(batch, 4, dtype=torch.long), text["attention_mask"]], 1)
    return {**images(batch, seq, padding), "input_ids": ids, "attention_mask": mask}


def images_beside_text(batch: int, seq: int, padding: str) -> Inputs:
    """Text and an image for each."""
    return {**tokens(batch, seq, padding), **images(batch, seq, padding)}


def seeded_images(batch: int, seq: int, padding: str) -> Inputs:
    """Images, and the noise by which ViT-MAE hides patches."""
    generator = torch.Generator().manual_seed(batch)
    return {**images(batch, seq, padding), "noise": torch.rand(batch, 4, generator=generator)}


def wide_tables(batch: int, seq: int, padding: str) -> Inputs:
    """Tokens of a table with the seven kinds of types that TAPAS reads."""
    generator = torch.Generator().manual_seed(seq)
    return {
        **tokens(batch, seq, padding),
        "token_type_ids": torch.randint(0, 2, (batch, seq, 7), generator=generator),
    }


def text(name: str, model: str, **more: Any) -> Row:
    settings = {**ONE_LAYER, **more.pop("settings", {})}
    return Row(name, model, settings, **more)


def vision(name: str, model: str, **more: Any) -> Row:
    settings = {**ONE_VISION, **more.pop("settings", {})}
    more = {"inputs": images, "shapes": IMAGE_SHAPES, "paddings": ("none",), **more}
    return Row(name, model, settings, **more)


ROWS = [
    text("albert", "AlbertModel", settings={"embedding_size": 16}),
    Row("bark-semantic", "BarkSemanticModel", {**BARK, "output_vocab_size": VOCAB}, qkv=FUSED, layers=(0, 1)),
    Row("bark-coarse", "BarkCoarseModel", {**BARK, "output_vocab_size": VOCAB}, qkv=FUSED, layers=(0, 1)),
    Row(
        "bark-fine",
        "BarkFineModel",
        {**BARK, "output_vocab_size": VOCAB, "n_codes_total": 4, "n_codes_given": 1},
        inputs=codes,
        qkv=FUSED,
        paddings=("none",),
    ),
    Row("bart", "BartModel", PAIRS, inputs=token_pairs, qkv=3, layers=(1, 1)),
    text("bert", "BertModel"),
    text("bert-generation", "BertGenerationEncoder"),
    Row("blip-2", "Blip2Model", BLIP, inputs=images_and_text, qkv=3, shapes=SEVERAL_SHAPES, layers=(1, 2)),
    Row(
        "bloom",
        "BloomModel",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 1, "n_head": 4},
        qkv=FUSED,
        layers=(0, 1),
    ),
    text("camembert", "CamembertModel"),
    Row(
        "clip",
        "CLIPModel",
        {
            "text_config": {**CLIP_TEXT, "num_hidden_layers": 1},
            "vision_config": ONE_VISION,
            "projection_dim": 16,
        },
        inputs=texts_and_images,
        qkv=2,
        layers=(1, 1),
    ),
    Row("codegen", "CodeGenModel", {**GPT, "rotary_dim": 4}, qkv=FUSED, layers=(0, 1)),
    text("data2vec-text", "Data2VecTextModel"),
    Row(
        "distilbert",
        "DistilBertModel",
        {"vocab_size": VOCAB, "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    vision("deit", "DeiTModel"),
    text("electra", "ElectraModel", settings={"embedding_size": 16}),
    text("ernie", "ErnieModel"),
    Row("falcon-rotary", "FalconModel", {**DECODER, "alibi": False, "multi_query": True}, qkv=FUSED, layers=(0, 1)),
    Row(
        "falcon-alibi",
        "FalconModel",
        {**DECODER, "alibi": True, "multi_query": False},
        qkv=FUSED,
        sdpa_differs=True,
    ),
    Row(
        "fsmt",
        "FSMTModel",
        {**PAIRS, "langs": ["en", "de"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB},
        inputs=token_pairs,
        qkv=3,
        shapes=SEVERAL_SHAPES,
        layers=(1, 1),
    ),
    Row("gpt2", "GPT2Model", GPT, qkv=ONE_LINEAR, layers=(0, 1)),
    Row("gptj", "GPTJModel", {**GPT, "rotary_dim": 4}, layers=(0, 1)),
    Row(
        "gpt-neo",
        "GPTNeoModel",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
        qkv=2,
        layers=(0, 2),
    ),
    Row("gpt-neox", "GPTNeoXModel", NEOX, qkv=FUSED, layers=(0, 1)),
    Row("gpt-bigcode", "GPTBigCodeModel", {**GPT, "multi_query": True}, qkv=FUSED, layers=(0, 1)),
    Row("hubert", "HubertModel", AUDIO, inputs=audio, paddings=("right", "none")),
    text("layoutlm", "LayoutLMModel", inputs=boxes),
    Row("llama", "LlamaModel", {**DECODER, "num_key_value_heads": 2}, layers=(0, 1)),
    text("markuplm", "MarkupLMModel", settings={"max_depth": 4, "xpath_unit_hidden_size": 8}),
    Row("marian", "MarianModel", PAIRS, inputs=token_pairs, qkv=3, layers=(1, 1)),
    Row("mbart", "MBartModel", PAIRS, inputs=token_pairs, qkv=3, layers=(1, 1)),
    Row("m2m100", "M2M100Model", PAIRS, inputs=token_pairs, qkv=3, layers=(1, 1)),
    Row("opt", "OPTModel", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}, layers=(0, 1)),
    Row(
        "prophetnet",
        "ProphetNetModel",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "max_position_embeddings": 64,
            "pad_token_id": PAD,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "ngram": 2,
        },
        inputs=token_pairs,
        qkv=3,
        shapes=SEVERAL_SHAPES,
        open_layer="this is not computed from x",  # a decoder layer of two streams of queries
    ),
    text("rembert", "RemBertModel", settings={"input_embedding_size": 16, "output_embedding_size": 16}),
    text("roberta", "RobertaModel"),
    text("roc-bert", "RoCBertModel", settings={"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB}),
    text("roformer", "RoFormerModel", settings={"embedding_size": 16}),
    text("splinter", "SplinterModel"),
    text("tapas", "TapasModel", inputs=wide_tables, settings={"type_vocab_sizes": [3] * 7}, shapes=SEVERAL_SHAPES),
    vision(
        "vilt",
        "ViltModel",
        inputs=images_beside_text,
        settings={"vocab_size": VOCAB, "max_position_embeddings": 64},
        shapes=SEVERAL_SHAPES,
        paddings=ALL_PADDINGS,
        shuffled=True,
    ),
    vision("vit", "ViTModel"),
    vision("vit-mae", "ViTMAEModel", inputs=seeded_images),
    vision("vit-msn", "ViTMSNModel"),
    Row("wav2vec2", "Wav2Vec2Model", AUDIO, inputs=audio, paddings=("right", "none")),
    Row(
        "whisper",
        "WhisperModel",
        {**PAIRS, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64},
        inputs=speech,
        qkv=3,
        layers=(1, 1),
    ),
    text("xlm-roberta", "XLMRobertaModel"),
    vision(
        "yolos",
        "YolosModel",
        settings={"image_size": [16, 16], "num_detection_tokens": 3, "num_hidden_layers": 2},
        qkv=2,
        layers=(2, 0),
    ),
]
VARIANTS = [(row, implementation) for row in ROWS for implementation in implementations(row.model)]
IDS = [f"{row.name}-{implementation}" for row, implementation in VARIANTS]
# One after the other, so that a worker of pytest-xdist optimises a model once.
variants = pytest.mark.parametrize(("row", "implementation"), VARIANTS, ids=IDS, scope="module")


@functools.cache
def optimized(name: str, implementation: str) -> tuple[nn.Module, Any]:
    """A row's original and the optimised model, captured ahead."""
    row = next(row for row in ROWS if row.name == name)
    model = row.build(implementation)
    with torch.no_grad():
        return model, fxbt.optimize(model, example_inputs=example(row), padding="keep")


def example(row: Row) -> Inputs:
    return row.inputs(*row.shapes[0], row.paddings[0])


@variants
def test_captured_once_and_equal_everywhere(row: Row, implementation: str) -> None:
    model, fast = optimized(row.name, implementation)
    for batch, seq in row.shapes:
        for padding in row.paddings:
            inputs = row.inputs(batch, seq, padding)
            with torch.no_grad():
                compare_outputs(row, fast(**inputs), model(**inputs), seq)
    assert fast.report.fallbacks == []
    assert len(fast.report.graphs) == 1, list(fast.report.graphs)


@variants
def test_every_attention_is_found(row: Row, implementation: str) -> None:
    model, fast = optimized(row.name, implementation)
    real = count_attentions(model, example(row))
    assert real > 0
    assert fast.report.hits.get("attention", 0) == real, fast.report.why("attention")


@variants
def test_projections_are_merged_or_the_reason_is_given(row: Row, implementation: str) -> None:
    _, fast = optimized(row.name, implementation)
    merged, why = fast.report.hits.get("qkv", 0), fast.report.why("qkv")
    assert row.qkv in why if isinstance(row.qkv, str) else merged == row.qkv, f"{merged} merged; {why}"


@variants
def test_every_layer_is_one_node_or_the_reason_is_given(row: Row, implementation: str) -> None:
    """Where keys and values leave a layer as a cache, without one; that graph is captured once a row."""
    model, fast = optimized(row.name, implementation)
    if CACHED in fast.report.why("decoder_layer") + fast.report.why("encoder_layer"):
        if implementation != implementations(row.model)[-1]:
            pytest.skip("its layers give a cache: those of the sdpa model are looked at without one")
        with torch.no_grad():
            fast = fxbt.optimize(model, example_inputs={**example(row), "use_cache": False}, padding="keep")
    found = tuple(fast.report.hits[rule] for rule in ("encoder_layer", "decoder_layer"))
    why = fast.report.why("encoder_layer")
    assert found == row.layers, f"{why}\n{fast.report.why('decoder_layer')}"
    assert row.open_layer in why


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_gradients_in_training_are_the_originals(row: Row) -> None:
    if row.shuffled:
        pytest.skip("shuffles its tokens at every call")
    model = row.build("eager").train()
    fast = fxbt.optimize(model, example_inputs=example(row))
    assert fast.report.fallbacks == []
    inputs = row.inputs(*row.shapes[1], row.paddings[0])
    found, expected = (gradients_of(model, run, inputs) for run in (fast, model))
    compare_gradients(found, expected, lambda: gradients_of(wide := copy.deepcopy(model).double(), wide, inputs))


def gradients_of(model: nn.Module, run: Any, inputs: Inputs) -> dict[str, Tensor]:
    """By parameter, for a random weighting of the first output: its squares would nearly cancel behind a norm."""
    model.zero_grad()
    output = run(**inputs)[0]
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("row", [row for row in ROWS if "sdpa" in implementations(row.model)], ids=str)
def test_sdpa_models_equal_the_eager_one(row: Row) -> None:
    """Where no query is masked from every key, on which the two paths of a model differ."""
    model, fast = optimized(row.name, "sdpa")
    eager = row.build("sdpa" if row.sdpa_differs else "eager")
    eager.load_state_dict(model.state_dict())
    inputs = row.inputs(*row.shapes[1], "none")
    with torch.no_grad():
        compare_outputs(row, fast(**inputs), eager(**inputs), row.shapes[1][1])


def compare_outputs(row: Row, actual: Any, expected: Any, seq: int) -> None:
    """The same tensors to 1e-5 of their magnitude, caches included."""
    assert type(actual) is type(expected)
    pairs = [pytree.tree_leaves(fxbt.capture.outputs.flatten(output)) for output in (actual, expected)]
    assert len(pairs[0]) == len(pairs[1])
    for got, want in zip(*pairs, strict=True):
        if not isinstance(want, Tensor):
            assert got == want or not isinstance(want, int | float | str)
            continue
        assert got.shape == want.shape and got.dtype == want.dtype
        if row.shuffled and got.dim() == 3:
            got, want = got[:, :seq], want[:, :seq]
        if not want.is_floating_point():
            assert torch.equal(got, want)
            continue
        error, magnitude = difference(got, want)
        assert error <= 1e-5 * magnitude, f"{tuple(want.shape)}: off by {error:.2g} at a magnitude of {magnitude:.2g}"


def test_what_a_patch_does_not_accept_runs_the_original() -> None:
    """ViLT with a padded image: its stand-in takes complete ones alone."""
    row = next(row for row in ROWS if row.name == "vilt")
    model = row.build("eager")
    mask = torch.ones(2, 16, 16, dtype=torch.long)
    inputs = {**row.inputs(2, 7, "none"), "pixel_mask": mask}
    padded = {**inputs, "pixel_mask": mask.index_fill(1, torch.arange(8, 16), 0)}
    with torch.no_grad(), pytest.warns(fxbt.FxbtWarning):
        fast = fxbt.optimize(model, example_inputs=inputs)
        assert fast.report.fallbacks == []
        torch.manual_seed(1)
        expected = model(**padded)
        torch.manual_seed(1)
        actual = fast(**padded)
    assert len(fast.report.fallbacks) == 1
    assert actual[0].shape == expected[0].shape
    torch.testing.assert_close(actual[0][:, :7], expected[0][:, :7])


def test_the_list_is_complete() -> None:
    """45 architectures, two of them in several forms."""
    forms = {row.name.removesuffix("-rotary").removesuffix("-alibi").split("-coarse")[0] for row in ROWS}
    architectures = {"bark" if name.startswith("bark") else name for name in forms}
    assert len(architectures) == 45
    assert all(replace(row) == row for row in ROWS)
