"""Attention by other kernels: SDPA's numbers, whatever the shape, and only where SDPA's rules allow it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import ENCODER, compare, tokens
from padding_models import GPT2, T5, Case
from torch import Tensor
from tracing import NATIVE, by_native, names, program

import fxbt
from fxbt.kernels import attention_products, autotune, native
from fxbt.lower.cpu import attention, chain

WINDOW = {"sliding_window": 4, "num_key_value_heads": 4, "use_cache": False}


KERNELS = [
    attention.products,
    pytest.param(native.library() and native.library().attention, marks=by_native),
]
SHAPES = [(1, 2, 5, 5, 4), (3, 2, 16, 16, 8), (2, 3, 7, 12, 4), (4, 2, 33, 33, 8), (1, 1, 1, 9, 3)]


def operands(batch: int, heads: int, queries: int, keys: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views as a merged projection gives them."""
    generator = torch.Generator().manual_seed(queries)
    sizes = (queries, keys, keys)
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, size, 3 * heads, dim, generator=generator).transpose(1, 2)[:, i * heads : (i + 1) * heads]
        for i, size in enumerate(sizes)
    )


@pytest.mark.parametrize("scores", [1, 64, 600, attention_products.SCORES])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_sdpa(kernel, shape, is_causal, scores, monkeypatch):
    monkeypatch.setattr(attention_products, "SCORES", scores)  # a few sequences at a time, or a block of queries
    query, key, value = operands(*shape)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=is_causal)
    found = kernel(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scores", [1, 600, attention_products.SCORES])
@pytest.mark.parametrize("ones", [(), (0,), (1,), (0, 1), (1, 2), (0, 3), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bias_is_added(kernel, ones, scores, monkeypatch):
    monkeypatch.setattr(attention_products, "SCORES", scores)
    batch, heads, queries, keys, _ = shape = (3, 2, 17, 12, 4)
    bias = torch.randn([1 if dim in ones else size for dim, size in enumerate((batch, heads, queries, keys))])
    bias = bias.masked_fill(torch.rand(bias.shape) < 0.3, -1e30) if bias.shape[3] > 1 else bias
    query, key, value = operands(*shape)
    full = bias.expand(batch, heads, queries, keys)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), full.double())
    torch.testing.assert_close(kernel(query, key, value, bias).double(), expected, rtol=1e-5, atol=1e-5)
    found = always(kernel)(query, key, value, attention.Mask.of(full))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_scale_is_the_callers(kernel):
    query, key, value = operands(2, 2, 5, 5, 4)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(kernel(query, key, value, scale=0.3), expected)


class Seen:
    """A kernel that keeps the shapes of its queries."""

    def __init__(self):
        self.shapes = []

    def __call__(self, query, key, value, bias=None, is_causal=False, scale=None):
        self.shapes.append(tuple(query.shape))
        return attention.sdpa(query, key, value, bias, is_causal, scale)


def always(kernel) -> attention.Attend:
    return attention.Attend([kernel] * 6, [kernel] * 6)


def test_the_length_decides_and_whether_there_are_several_sequences():
    seen = Seen()
    own = attention.sdpa
    call = attention.Attend([own, seen, own, own, own, seen], [seen, own, own, own, seen, own])
    for batch in (1, 2, 3):
        for length in (16, 32, 64, 300, 500):
            call(*operands(batch, 2, length, length, 4))
    several = [(batch, 2, length, 4) for batch in (2, 3) for length in (16, 300)]
    assert seen.shapes == [(1, 2, 32, 4), (1, 2, 500, 4), *several]


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(5, 5),
        torch.zeros(1, 1, 5, 5, dtype=torch.bool),
        torch.full((1, 1, 1, 5), -torch.inf).expand(1, 2, 5, 5),
    ],
)
def test_what_a_softmax_would_answer_otherwise_is_for_sdpa(mask):
    seen = Seen()
    always(seen)(*operands(1, 2, 5, 5, 4), attention.Mask.of(mask))
    assert not seen.shapes


def test_what_drops_out_is_for_sdpa(monkeypatch, lowered):
    monkeypatch.setattr(autotune.Tuner, "choose", lambda self, contest: ("products",) * len(contest.sizes))

    def attend(dropout_p):
        def function(x):
            heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropout_p)

        return function

    with torch.no_grad():
        for dropout_p, name in ((0.0, "attend"), (0.5, "scaled_dot_product_attention")):
            program(attend(dropout_p), torch.randn(2, 5, 8))
            assert names(lowered)[-1] == name


@pytest.mark.parametrize("empty", [0, 2, 3])
def test_empty_tensors_are_for_sdpa(empty):
    shape = [2, 2, 5, 5, 4]
    shape[empty] = 0
    query, key, value = operands(*shape)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(always(attention.products)(query, key, value), expected)


def test_a_boolean_mask_is_added_too():
    seen = Seen()
    query, key, value = operands(2, 2, 5, 5, 4)
    mask = (torch.rand(2, 1, 5, 5) < 0.5) | torch.eye(5, dtype=torch.bool)
    found = always(seen)(query, key, value, attention.Mask.of(mask))
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, mask))
    assert seen.shapes


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_blocked_row_stays_zero(dtype):
    """What products would answer with NaN."""
    query, key, value = operands(1, 2, 5, 5, 4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    mask = mask if dtype is torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    assert (always(attention.products)(query, key, value, attention.Mask.of(mask))[:, :, 2] == 0).all()


def test_real_attentions_can_be_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("FXBT_TUNE", "1")
    monkeypatch.setenv("FXBT_CACHE_DIR", str(tmp_path))
    tuner = autotune.Tuner()
    for several, name in ((False, "attention 1x4 float32"), (True, "attention 1x4 float32, several")):
        with tuner.measurements.at_once():
            assert len(tuner.choose(attention.attentions(1, 4, several))) == len(attention.LENGTHS)
        assert "us)" in tuner.answers[name]


@pytest.mark.parametrize("padding", ["drop", "keep"])
@pytest.mark.parametrize("architecture", ["T5EncoderModel", "BertModel", "GPT2Model", "MistralModel"])
@pytest.mark.parametrize("kernel", ["products", NATIVE])
def test_models_attend_by_them(kernel, architecture, padding, monkeypatch):
    """With a bias, a mask, causal, in a window; packed and dense."""
    settings = {"T5EncoderModel": T5, "GPT2Model": GPT2, "BertModel": ENCODER, "MistralModel": {**ENCODER, **WINDOW}}
    model = Case(architecture, settings[architecture]).model()
    calls = []
    monkeypatch.setattr(chain, "LARGEST_BLOCK", 0)  # so that each is a call of its own

    def counted(run):
        return lambda *args: calls.append(args) or run(*args)

    kernels = {name: name == kernel and counted(run) for name, run in attention.attention_kernels().items()}
    monkeypatch.setattr(attention, "attention_kernels", lambda: kernels)
    if kernel == "native":
        library = native.library()
        monkeypatch.setattr(library, "_attend", counted(library._attend))  # from a projection, too
        kernels["native"] = library.attention
    monkeypatch.setattr(
        autotune.Tuner,
        "choose",
        lambda self, contest: (kernel if kernel in contest.names else contest.names[0],) * len(contest.sizes),
    )
    fast = fxbt.optimize(model, padding=padding)
    with torch.no_grad():
        for batch, length in ((2, 7), (3, 9), (3, 9), (1, 12)):
            for padded in ("right", "left", "none"):
                inputs = tokens(batch, length, padded)
                compare(fast(**inputs), model(**inputs), dropped=[inputs["attention_mask"].bool()])
    assert not fast.report.fallbacks
    assert len(calls) >= 10
