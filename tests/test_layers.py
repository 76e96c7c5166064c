"""Whole layers as one node, also where the model trains, and what keeps one open; test_models counts them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import ENCODER, compare, compare_gradients, enliven, gradients, huggingface, tokens
from padding_models import DECODER, FALCON
from torch import nn
from transformers import SwinConfig, SwinModel

import fxbt

INPUTS = tokens(3, 7, "right")
MASK = INPUTS["attention_mask"].bool()


def layers(report: Any) -> dict[str, int]:
    return {name: report.hits[name] for name in ("encoder_layer", "decoder_layer") if report.hits.get(name)}


@functools.cache
def bert(**settings: Any) -> nn.Module:
    return huggingface("BertModel", **{**ENCODER, **settings})("eager")


GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTModel", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "one norm for both branches": ("GPTJModel", {**GPT, "rotary_dim": 4}),
    "a norm for each branch": ("GPTNeoXModel", {**ENCODER, "use_cache": False}),
    "products instead of linears": ("FalconModel", FALCON),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_layers(name: str) -> None:
    architecture, settings = DECODERS[name]
    model = huggingface(architecture, **settings)("eager")
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=INPUTS)
        compare(fast(**INPUTS), model(**INPUTS), dropped=[MASK])
    assert layers(fast.report) == {"decoder_layer": 2}, fast.report.why("decoder_layer")


def test_a_layer_with_experts_stays_open_and_says_where() -> None:
    settings = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.no_grad():
        report: Any = fxbt.optimize(huggingface("MixtralModel", **settings)("eager"), example_inputs=INPUTS).report
    assert (report.hits["attention"], report.hits["qkv"], layers(report)) == (2, 2, {})
    why = report.why("decoder_layer", at="layers.0")
    assert "mlp(normalize(" in why and "at layers.0.mlp (modeling_mixtral.py:" in why


def test_a_layer_of_windows_is_one_node_and_one_of_shifted_windows_stays_open() -> None:
    sizes = {"image_size": 32, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4}
    model = enliven(SwinModel(SwinConfig(**sizes, attn_implementation="eager")))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fast: Any = fxbt.optimize(model, example_inputs={"pixel_values": images})
        compare(fast(images), model(images))
    report = fast.report
    assert (report.hits["attention"], report.hits["qkv"], report.hits["mlp"]) == (2, 2, 2)
    assert layers(report) == {"encoder_layer": 1}
    assert "encoder_layer fired once, at encoder.layers.0.blocks.0" in report.why("encoder_layer")
    assert any("blocks.1" in miss.found for miss in report.misses if miss.rule == "encoder_layer")


def test_layers_with_hidden_states_as_outputs() -> None:
    model = bert()
    fast = fxbt.optimize(model)
    with torch.no_grad():
        compare(fast(**INPUTS, output_hidden_states=True), model(**INPUTS, output_hidden_states=True), dropped=[MASK])
        compare(fast(**INPUTS, output_hidden_states=True), model(**INPUTS, output_hidden_states=True), dropped=[MASK])
    assert layers(fast.report) == {"encoder_layer": 2}


def test_layers_with_attentions_as_outputs_stay_open() -> None:
    model = bert()
    fast = fxbt.optimize(model)
    with torch.no_grad():
        fast(**INPUTS, output_attentions=True)
        compare(fast(**INPUTS, output_attentions=True), model(**INPUTS, output_attentions=True))
    assert layers(fast.report) == {}


def test_gradients() -> None:
    model = bert()
    fast = fxbt.optimize(model)
    compare_gradients(*gradients(model, fast, INPUTS))
    assert layers(fast.report) == {"encoder_layer": 2}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_graph_with_layers_compiles(backend: str) -> None:
    model = bert()
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=INPUTS)
        module = fast.report.latest.module
        given = [INPUTS[node.name] for node in module.graph.nodes if node.op == "placeholder"]
        expected = module(*given)
        actual = torch.compile(module, backend=backend)(*given)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(expected[0], model(**INPUTS).last_hidden_state, atol=1e-4, rtol=1e-4)
