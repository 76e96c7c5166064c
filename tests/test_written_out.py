"""Attention on scores that SDPA cannot express: the op itself, and the models it is for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from models import compare, enliven
from torch import Tensor, nn
from transformers import FunnelConfig, FunnelModel, Gemma2Config, Gemma2Model, T5GemmaConfig, T5GemmaModel
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

import fxbt
from fxbt.kernels import attention_products

BY_PRODUCTS = torch.ops.fxbt.attention_by_products.default
SHAPES = [(1, 2, 2, 5, 5), (3, 4, 2, 16, 16), (2, 6, 1, 7, 12), (4, 2, 2, 33, 33), (1, 1, 1, 1, 9)]
DIM = 8


def operands(batch: int, heads: int, key_heads: int, queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries)
    sizes = ((heads, queries), (key_heads, keys), (key_heads, keys))
    return [torch.randn(batch, length, n, DIM, generator=generator).transpose(1, 2) for n, length in sizes]


def biases(kind: str, batch: int, heads: int, queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    full = torch.randn(batch, heads, queries, keys, generator=generator)
    by_key = torch.where(torch.rand(batch, 1, 1, keys, generator=generator) < 0.3, -1e30, 0.0)
    return {"none": [], "full": [full], "two": [full[:1], by_key], "one": [full[:, :1, :1, :1]]}[kind]


def as_written(
    q: Tensor, k: Tensor, v: Tensor, before: Any, after: Any, scale: float, cap: Any, causal: bool
) -> Tensor:
    """The formula, in float64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.mT
    for bias in before:
        scores = scores + bias
    scores = scores if cap is None else cap * scores.tanh()
    for bias in after:
        scores = scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("most", [1, 64, 600, attention_products.SCORES])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("kind", ["none", "full", "two", "one"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_op_is_the_formula(shape, kind, softcap, causal, most, monkeypatch):
    monkeypatch.setattr(attention_products, "SCORES", most)  # a few sequences at a time, or a block of queries
    query, key, value = operands(*shape)
    batch, heads, _, queries, keys = shape
    before = biases("one", batch, heads, queries, keys) if softcap else []
    arguments = (query, key, value, before, biases(kind, batch, heads, queries, keys), 0.3, softcap, causal)
    found = fxbt.ops.attention_by_products(*arguments)
    torch.testing.assert_close(found.double(), as_written(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 2, 2, 4, 4), (2, 2, 2, 0, 4)], ids=str)
def test_nothing_to_attend_for(sizes):
    query, key, value = operands(*sizes)
    assert fxbt.ops.attention_by_products(query, key, value, [], [], 0.3).shape == query.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_op_is_what_torch_asks_of_one(dtype):
    query, key, value = (x.to(dtype) for x in operands(2, 4, 2, 5, 6))
    bias = torch.zeros(2, 1, 5, 6, dtype=dtype)
    torch.library.opcheck(BY_PRODUCTS, (query, key, value, [bias], [bias], 0.3, 2.0))
    torch.library.opcheck(BY_PRODUCTS, (query, key, value, [], [], 0.3))


def gemma2(**options: Any) -> nn.Module:
    return enliven(Gemma2Model(Gemma2Config(**SIZES, sliding_window=8, **options)).eval())


SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "attn_implementation": "eager",
    "pad_token_id": 0,
}


def tokens(batch: int, length: int, padded: str = "none") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 99, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    padding = {"none": slice(0), "right": slice(length - 3, None), "left": slice(0, 3)}[padded]
    mask[0, padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def optimized(model: nn.Module, **options: Any) -> Any:
    with torch.no_grad():
        return fxbt.optimize(model, tokens(2, 7, "right") | options, padding="keep")


def written(fast: Any) -> int:
    """Attentions that the latest graph writes out."""
    return sum(node.target is BY_PRODUCTS for node in fast.report.latest.module.graph.nodes)


@pytest.mark.parametrize("padded", ["none", "right", "left"])
@pytest.mark.parametrize("shape", [(2, 7), (3, 12), (1, 24)], ids=str)
def test_gemma2_with_windows_and_grouped_heads(shape, padded):
    model = gemma2()
    fast = optimized(model, use_cache=False)
    with torch.no_grad():
        inputs = tokens(*shape, padded)
        valid = inputs["attention_mask"].bool()
        actual, expected = (m(**inputs, use_cache=False).last_hidden_state for m in (fast, model))
    compare(actual[valid], expected[valid])
    assert fast.report.hits["attention"] == fast.report.hits["qkv"] == 2
    assert fast.report.fallbacks == []


def test_a_softcap_that_is_lower_gives_other_numbers():
    """Else the comparison above proved nothing about it."""
    with torch.no_grad():
        one, other = (gemma2() for _ in range(2))
        other.config.attn_logit_softcapping = None
        for layer in other.layers:
            layer.self_attn.attn_logit_softcapping = None
        inputs = tokens(2, 12)
        gap = (one(**inputs)[0] - other(**inputs)[0]).abs().max()
    assert gap > 1e-3


def test_gemma2_in_bfloat16_is_as_near_to_float64_as_its_original():
    model = gemma2().to(torch.bfloat16)
    exact = gemma2().double()
    exact.load_state_dict(model.state_dict())
    fast = optimized(model, use_cache=False)
    with torch.no_grad():
        inputs = tokens(3, 12)
        outputs = [m(**inputs, use_cache=False)[0].double() for m in (fast, model, exact)]
    actual, expected = ((output - outputs[2]).norm() for output in outputs[:2])
    assert fast.report.hits["attention"] == 2
    assert actual <= 1.1 * expected


def test_t5gemma_layers_are_one_node():
    part = T5GemmaModuleConfig(**SIZES, sliding_window=8)
    model = enliven(T5GemmaModel(T5GemmaConfig(encoder=part, decoder=part, attn_implementation="eager")).eval())

    def inputs(*shape: Any) -> dict[str, Any]:
        given = tokens(*shape)
        return given | {f"decoder_{name}": tensor for name, tensor in given.items()} | {"use_cache": False}

    with torch.no_grad():
        fast: Any = fxbt.optimize(model, inputs(2, 7, "right"), padding="keep")
        for shape in ((3, 12, "left"), (1, 9, "right"), (2, 7, "none")):
            given = inputs(*shape)
            valid = given["attention_mask"].bool()
            actual, expected = (m(**given).last_hidden_state for m in (fast, model))
            compare(actual[valid], expected[valid])
    assert fast.report.hits["attention"] == 6
    assert fast.report.hits["encoder_layer"] >= 2


def test_funnel_adds_its_mask_last():
    """-1e6 * (1 - mask) on three biases: it rounds them, so that their order shows in rows it blocks entirely."""
    sizes: dict[str, Any] = {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8}
    model = enliven(FunnelModel(FunnelConfig(vocab_size=99, d_inner=64, **sizes)).eval())
    fast = optimized(model)
    with torch.no_grad():
        for shape, padded in itertools.product(((2, 7), (3, 16), (4, 9)), ("none", "right")):
            inputs = tokens(*shape, padded)
            compare(fast(**inputs)[0], model(**inputs)[0])
    assert fast.report.hits["attention"] == 3
    assert fast.report.fallbacks == []


def test_with_gradients_scores_stay_as_they_are():
    model = gemma2().train()
    fast: Any = fxbt.optimize(model, tokens(2, 7) | {"use_cache": False})
    given = tokens(2, 9) | {"use_cache": False}
    for each in (model, fast):
        each.zero_grad()
        each(**given)[0].square().sum().backward()
        each.kept = [p.grad.clone() for p in each.parameters()]
    for actual, expected in zip(fast.kept, model.kept, strict=True):
        compare(actual, expected)
    assert fast.report.hits.get("attention", 0) == 0
    assert "softcapped; SDPA cannot express it, and the kernel that can has no gradient" in fast.report.why("attention")


def test_under_autocast_scores_stay_as_they_are():
    model = gemma2()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast: Any = fxbt.optimize(model, tokens(2, 7) | {"use_cache": False}, padding="keep")
        given = tokens(2, 9) | {"use_cache": False}
        torch.testing.assert_close(fast(**given)[0], model(**given)[0], rtol=0.05, atol=0.05)  # rounded to bfloat16
    assert fast.report.hits.get("attention", 0) == 0
    assert "ignores autocast" in fast.report.why("attention")
