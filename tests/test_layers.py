"""Whole layers as one node: as many as the model has, also where it trains, and what keeps one open."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import CASES_BY_NAME, ENCODER, compare, compare_gradients, gradients, huggingface, tokens
from torch import nn

import fxbt

BOTH = {"encoder_layer": 2, "decoder_layer": 2}
LAYERS = {
    **dict.fromkeys(
        ["bert", "roberta", "distilbert", "albert", "electra", "mpnet", "deberta-v2"], {"encoder_layer": 2}
    ),
    **dict.fromkeys(["vit", "clip-vision", "wav2vec2"], {"encoder_layer": 2}),
    **dict.fromkeys(["clip-text", "gpt2", "llama"], {"decoder_layer": 2}),
    **dict.fromkeys(["whisper", "t5", "bart"], BOTH),
}
VARIANTS = [(name, implementation) for name in LAYERS for implementation in CASES_BY_NAME[name].implementations]
INPUTS = tokens(3, 7, "right")
MASK = INPUTS["attention_mask"].bool()


def layers(report: Any) -> dict[str, int]:
    return {name: report.hits[name] for name in BOTH if report.hits.get(name)}


@functools.cache
def bert(**settings: Any) -> nn.Module:
    return huggingface("BertModel", **{**ENCODER, **settings})("eager")


@pytest.mark.parametrize(("name", "implementation"), VARIANTS)
def test_every_layer_is_one_node(name: str, implementation: str) -> None:
    case = CASES_BY_NAME[name]
    with torch.no_grad():
        fast = fxbt.optimize(case.build(implementation), example_inputs=case.inputs(*case.shapes[0], case.paddings[0]))
    assert layers(fast.report) == LAYERS[name], fast.report.why("encoder_layer")


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
