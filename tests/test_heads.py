"""Attention read from a projection and written as one: which forms it takes, and that the numbers stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import CASES, compare
from tracing import agree, by_native, names, program

import fxbt
import fxbt.kernels.autotune
from fxbt.kernels import native
from fxbt.lower.cpu import attention

pytestmark = by_native


@pytest.fixture(autouse=True)
def by_our_own(monkeypatch):
    """Our own kernel for all lengths, and torch's for linears."""
    monkeypatch.setattr(
        fxbt.kernels.autotune.Tuner,
        "choose",
        lambda self, contest: ("native" if contest.key.startswith("attention") else "F.linear",) * len(contest.sizes),
    )
    with torch.no_grad():
        yield


def attended(x, w, *, order=(0, 1, 2), mask=None, is_causal=False, scale=None, merge=None):
    parts = F.linear(x, w).split((8, 8, 8), -1)
    query, key, value = (parts[place].view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for place in order)
    attended = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    return (merge or (lambda y: y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8)))(attended)


X, W = torch.randn(2, 5, 6), torch.randn(24, 6)
SHAPES = ((2, 5), (1, 1), (3, 40), (1, 300), (2, 0), (0, 4))


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"order": (2, 0, 1)}, {"order": (1, 1, 0)}]
)
def test_a_projection_is_read_as_it_stands(options, lowered):
    model, run = program(lambda x, w: attended(x, w, **options), X, w=W)
    assert names(lowered) == ["linear", "attend_projection"]
    for shape in SHAPES:
        agree(model, run, torch.randn(*shape, 6))


def test_a_mask_is_added_and_one_that_blocks_a_row_is_torchs(lowered):
    model, run = program(lambda x, mask, w: attended(x, w, mask=mask), X, torch.ones(2, 1, 5, 5).bool(), w=W)
    assert names(lowered)[-1] == "attend_projection"
    for allowed in (1.0, 0.7, 0.1):
        agree(model, run, torch.randn(2, 5, 6), torch.rand(2, 1, 5, 5) < allowed)


@pytest.mark.parametrize("sizes", [(6, 4), (-1, 4), (6, -1)])
def test_heads_may_be_split_by_the_model_as_fxbt_does(sizes, lowered):
    def function(x, w):
        heads = F.linear(x, w).unflatten(2, sizes).transpose(1, 2).split_with_sizes((2, 2, 2), 1)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    model, run = program(function, X, w=W)
    assert names(lowered)[-1] == "attend_projection"
    agree(model, run, torch.randn(3, 7, 6))


SPELLINGS = {
    "timm": lambda y, b, s: y.reshape(b, s, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0),
    "selected": lambda y, b, s: [y.view(b, s, 3, 2, 4)[:, :, i].transpose(1, 2) for i in range(3)],
    "chunks of views": lambda y, b, s: [x.transpose(1, 2) for x in y.view(b, s, 6, 4).chunk(3, 2)],
    "with a dim more": lambda y, b, s: [x.view(b, s, 2, 4).transpose(1, 2) for x in y.unsqueeze(2).chunk(3, -1)],
}
APART = {
    "each head's three side by side": lambda y, b, s: y.view(b, s, 2, 12).transpose(1, 2).chunk(3, -1),
    "three dims side by side": lambda y, b, s: y.view(b, s, 2, 4, 3).permute(4, 0, 2, 1, 3).unbind(0),
    "heads inside": lambda y, b, s: [x.view(b, s, 4, 2).permute(0, 3, 1, 2) for x in y.chunk(3, -1)],
    "tokens first": lambda y, b, s: [x.reshape(s, b, 2, 4).permute(1, 2, 0, 3) for x in y.chunk(3, -1)],
    "across tokens": lambda y, b, s: [x.reshape(b, 2, s, 4) for x in y.chunk(3, -1)],
    "half a head on": lambda y, b, s: [y.split((2, 8, 8, 6), 2)[i].view(b, s, 2, 4).transpose(1, 2) for i in (1, 2, 1)],
}


def by_spelling(split):
    def function(x, w):
        attended = F.scaled_dot_product_attention(*split(F.linear(x, w), x.shape[0], x.shape[1]))
        return attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8)

    return function


@pytest.mark.parametrize("name", SPELLINGS)
def test_heads_are_found_however_they_are_split(name, lowered):
    model, run = program(by_spelling(SPELLINGS[name]), X, w=W)
    assert names(lowered) == ["linear", "attend_projection"]
    for shape in SHAPES:
        agree(model, run, torch.randn(*shape, 6))


@pytest.mark.parametrize("name", APART)
def test_heads_that_lie_apart_are_views(name, lowered):
    model, run = program(by_spelling(APART[name]), X, w=W)
    assert "attend_projection" not in names(lowered) and "attend" in names(lowered)
    for shape in SHAPES:
        agree(model, run, torch.randn(*shape, 6))


@pytest.mark.parametrize("name", ["deberta-v2", "vit", "gpt2"])
def test_models_have_no_views_of_heads(name, lowered):
    """DeBERTa's heads are flattened into its batch and taken out again."""
    case = next(case for case in CASES if case.name == name)
    model = case.build(case.implementations[-1])
    fast = fxbt.optimize(model, padding="keep")
    for batch, length in case.shapes:
        for padding in case.paddings:
            inputs = case.inputs(batch, length, padding)
            compare(fast(**inputs), model(**inputs), atol_of_magnitude=case.tolerance, dropped=case.valid(inputs))
    assert names(lowered).count("attend_projection") == case.attentions
    assert "attend" not in names(lowered)
    assert not fast.report.fallbacks


def test_weights_may_change(lowered):
    model, run = program(lambda x, w: attended(x, w), X, w=W.clone())
    agree(model, run, X)
    model.w.mul_(2)
    agree(model, run, X)


@pytest.mark.parametrize(
    "merge",
    [
        lambda y: y.transpose(1, 2).reshape(y.shape[0], -1),
        lambda y: y.permute(2, 0, 1, 3).reshape(y.shape[2], y.shape[0], 8),
        lambda y: y.reshape(y.shape[0], y.shape[2], 8),
        lambda y: y.transpose(1, 2).reshape(y.shape[0], y.shape[2], 8).sum() + y.sum(),
        lambda y: y,
    ],
    ids=["all in one", "tokens first", "across heads", "read twice", "apart"],
)
def test_heads_that_are_merged_otherwise_are_views(merge, lowered):
    model, run = program(lambda x, w: attended(x, w, merge=merge), X, w=W)
    assert "attend_projection" not in names(lowered) and "attend" in names(lowered)
    for shape in ((2, 5), (3, 7), (1, 1)):
        agree(model, run, torch.randn(*shape, 6))


def test_heads_of_two_projections_are_views(lowered):
    def function(x, w, other):
        def heads(w):
            parts = F.linear(x, w).split((8, 8), -1)
            return [part.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2) for part in parts]

        (query, key), (value, gate) = heads(w), heads(other)
        attended = F.scaled_dot_product_attention(query, key, value) * gate
        return attended.transpose(1, 2).reshape(x.shape[0], x.shape[1], 8)

    model, run = program(function, X, w=W[:16], other=torch.randn(16, 6))
    assert "attend_projection" not in names(lowered) and "attend" in names(lowered)
    agree(model, run, torch.randn(3, 7, 6))


def test_lengths_for_another_kernel_keep_the_views(monkeypatch, lowered):
    def choose(self, contest):
        first, *_ = contest.names
        short = "native" if contest.key.startswith("attention") else first
        return (short, short, *[first] * (len(contest.sizes) - 2))

    monkeypatch.setattr(fxbt.kernels.autotune.Tuner, "choose", choose)
    model, run = program(lambda x, w: attended(x, w), X, w=W)
    assert "attend_projection" not in names(lowered) and "attend" in names(lowered)
    agree(model, run, torch.randn(2, 300, 6))


def test_a_projection_that_does_not_hold_the_heads_is_an_error():
    library = native.library()
    assert library is not None
    run = library.attention_of((2, 2, 2), (0, 2, 4), 4)
    with pytest.raises(ValueError, match="6 heads|heads of 4"):
        run(torch.randn(2, 5, 20))
    with pytest.raises(ValueError, match="key heads"):
        library.attention_of((3, 2, 2), (0, 3, 5), 4)


def test_the_forms_that_are_read_are_those_of_attend():
    call = attention.Attend([attention.sdpa] * 6, [attention.sdpa] * 6)
    library = native.library()
    assert library is not None and not call.is_by(library.attention)
    assert attention.Attend([library.attention] * 6, [library.attention] * 6).is_by(library.attention)
