"""Our own kernels in one call: which ones follow each other, when they run so, and that the numbers stay."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES
from torch import Tensor
from tracing import agree, by_native, names, program

import fxbt
import fxbt.kernels.autotune
from fxbt.kernels import native
from fxbt.lower.cpu import chain, linears

pytestmark = by_native

HIDDEN, INNER = 8, 20
X = torch.randn(2, 5, HIDDEN)
SHAPES = ((2, 5), (1, 1), (3, 40), (1, 300), (2, 0), (0, 4))
WEIGHTS = {
    "qkv": torch.randn(3 * HIDDEN, HIDDEN),
    "out": torch.randn(HIDDEN, HIDDEN),
    "up": torch.randn(INNER, HIDDEN),
    "down": torch.randn(HIDDEN, INNER),
    "bias": torch.randn(HIDDEN),
    "gamma": torch.randn(HIDDEN),
}


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """The kernel for each number of rows, our own unless a test says otherwise; attention is by our own."""
    rows = ["native"] * len(linears.ROWS)

    def choose(tuner, contest):
        return ("native",) * len(contest.sizes) if contest.key.startswith("attention") else tuple(rows)

    monkeypatch.setattr(fxbt.kernels.autotune.Tuner, "choose", choose)
    with torch.no_grad():
        yield rows


@pytest.fixture
def chains(monkeypatch) -> list[int]:
    """How many kernels each chain had that ran in one call."""
    counts: list[int] = []

    def spy(self, steps, *others):
        counts.append(len(steps) // native.STEP.size)
        return original(self, steps, *others)

    original = native.Library.chain
    monkeypatch.setattr(native.Library, "chain", spy)
    return counts


def attention(x: Tensor, qkv: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    parts = F.linear(x, qkv).split((HIDDEN, HIDDEN, HIDDEN), -1)
    heads = (part.view(*x.shape[:2], 2, HIDDEN // 2).transpose(1, 2) for part in parts)
    return F.scaled_dot_product_attention(*heads, mask, **options).transpose(1, 2).reshape(x.shape)


def norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,), gamma)


def post_norm(x, qkv, out, up, down, bias, gamma, mask=None, **options):
    x = norm(F.linear(attention(x, qkv, mask, **options), out, bias) + x, gamma)
    return norm(F.linear(F.gelu(F.linear(x, up)), down, bias) + x, gamma)


def pre_norm(x, qkv, out, up, down, bias, gamma):
    x = F.linear(attention(x, qkv), out) + x
    return F.linear(F.silu(F.linear(norm(x, gamma), up)), down, bias) + x


def masked(x, mask, *weights):
    return post_norm(x, *weights, mask=mask)


@pytest.mark.parametrize(
    ("layer", "options"),
    [(post_norm, {}), (post_norm, {"is_causal": True}), (post_norm, {"scale": 0.3}), (pre_norm, {})],
)
def test_a_layer_is_one_call(layer, options, lowered, chains):
    model, run = program(lambda *given: layer(*given, **options), X, **WEIGHTS)
    assert names(lowered) == ["chain"]
    for shape in SHAPES:
        agree(model, run, torch.randn(*shape, HIDDEN))
    assert chains and set(chains) == {5}


def test_layers_share_one_block(lowered):
    def layers(count):
        def function(x, *weights):
            for _ in range(count):
                x = post_norm(x, *weights)
            return x

        return function

    floats = []
    for count in (2, 5):
        model, run = program(layers(count), X, **WEIGHTS)
        agree(model, run, torch.randn(3, 7, HIDDEN))
        floats.append(lowered[0]._plan.row)
    least = HIDDEN + 3 * HIDDEN + HIDDEN  # x, its projection and what attends, which are there at once
    assert least <= floats[0] == floats[1] <= 1.2 * least


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (2, 1, 1, 5), (1, 1, 5, 5), (2, 2, 5, 5), (2, 1, 5, 1)])
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_masks_are_added_and_one_that_blocks_a_row_is_torchs(shape, kind, lowered, chains):
    def mask(allowed: float) -> Tensor:
        made = torch.rand(shape) < allowed
        return made if kind == "boolean" else torch.where(made, torch.randn(shape), -torch.inf)

    model, run = program(masked, X, mask(2), **WEIGHTS)
    assert names(lowered)[-1] == "chain"
    agree(model, run, X, mask(2))
    assert chains
    for allowed in (0.7, 0.1, 0.0):
        agree(model, run, X, mask(allowed))


def test_a_mask_that_blocks_a_row_is_not_run_in_one_call(chains):
    model, run = program(masked, X, torch.ones(2, 1, 5, 5).bool(), **WEIGHTS)
    chains.clear()
    mask = torch.ones(2, 1, 5, 5).bool()
    mask[1, 0, 3] = False
    agree(model, run, X, mask)
    assert not chains


def test_what_is_read_elsewhere_is_a_tensor_of_its_own(lowered, chains):
    def function(x, *weights):
        first = post_norm(x, *weights)
        second = pre_norm(first, *weights)
        return second, first, second.sin()

    model, run = program(function, X, **WEIGHTS)
    found, expected = run(X), model(X)
    assert chains and names(lowered).count("chain") == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert [value.untyped_storage().nbytes() for value in found] == [4 * value.numel() for value in found]
    kept = [value.clone() for value in found]
    run(torch.randn(2, 5, HIDDEN))
    torch.testing.assert_close(found, tuple(kept), rtol=0, atol=0)


def test_the_sum_before_a_norm_may_be_read_too(lowered, chains):
    def function(x, *weights):
        total = F.linear(x, weights[1]) + x
        return total, F.linear(norm(total, weights[5]), weights[2])

    model, run = program(function, X, **WEIGHTS)
    torch.testing.assert_close(run(X), model(X), rtol=1e-5, atol=1e-5)
    assert chains and names(lowered)[0] == "chain"


def test_other_rows_begin_another_chain(lowered):
    def function(x, qkv, out, up, down, *others):
        first = F.linear(F.linear(x, out), up)[:, 0]
        return F.linear(F.relu(F.linear(first, down)), up)

    model, run = program(function, X, **WEIGHTS)
    assert names(lowered) == ["chain", "select", "chain"]
    agree(model, run, torch.randn(4, 6, HIDDEN))


def test_what_stands_between_ends_a_chain(lowered):
    model, run = program(lambda x, q, out, *others: F.linear(F.linear(x, out).sin(), out), X, **WEIGHTS)
    assert names(lowered) == ["native", "sin.default", "native"]
    agree(model, run, torch.randn(4, 6, HIDDEN))


def test_rows_for_which_another_kernel_is_faster_run_one_by_one(rows, lowered, chains):
    rows[3:] = ["packed"] * len(rows[3:])
    model, run = program(post_norm, X, **WEIGHTS)
    assert names(lowered) == ["chain"]
    for shape, is_one_call in (((2, 16), True), ((2, 17), False), ((1, 300), False)):
        chains.clear()
        agree(model, run, torch.randn(*shape, HIDDEN))
        assert bool(chains) == is_one_call


def test_without_a_kernel_of_our_own_there_is_no_chain(rows, lowered):
    rows[:] = ["packed"] * len(rows)
    program(post_norm, X, **WEIGHTS)
    assert "chain" not in names(lowered)


def test_large_blocks_are_not_taken(monkeypatch, lowered, chains):
    model, run = program(post_norm, X, **WEIGHTS)
    monkeypatch.setattr(chain, "LARGEST_BLOCK", 4 * lowered[0]._plan.row * 30)
    for tokens, is_one_call in ((15, True), (16, False)):
        chains.clear()
        agree(model, run, torch.randn(2, tokens, HIDDEN))
        assert bool(chains) == is_one_call


def test_inputs_and_weights_may_lie_otherwise(chains):
    model, run = program(post_norm, X, **WEIGHTS)
    chains.clear()
    agree(model, run, torch.randn(5, 2, HIDDEN).transpose(0, 1))
    model.gamma.data = torch.randn(HIDDEN, 2)[:, 0]
    agree(model, run, X)
    assert not chains


def test_weights_may_change(chains):
    model, run = program(post_norm, X, **{name: weight.clone() for name, weight in WEIGHTS.items()})
    for weight in model.parameters():
        weight.mul_(2)
        agree(model, run, X)
    assert chains


def test_sizes_that_do_not_fit_are_an_error():
    _, run = program(post_norm, X, **WEIGHTS)
    with pytest.raises(ValueError, match="where W is"):
        run(torch.randn(2, 5, HIDDEN + 1))


def test_without_memory_for_the_scores_it_is_an_error(monkeypatch):
    monkeypatch.setattr(native.library(), "_chain", lambda *call: 0)
    _, run = program(post_norm, X, **WEIGHTS)
    with pytest.raises(MemoryError, match="5 tokens"):
        run(X)


def test_several_threads_call_it_at_once():
    model, run = program(post_norm, X, **WEIGHTS)
    inputs = [torch.randn(2, tokens, HIDDEN) for tokens in range(1, 25)]
    expected = [model(x) for x in inputs]

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return [run(x)[0] for _ in range(20)][-1]

    with ThreadPoolExecutor(4) as threads:
        torch.testing.assert_close(list(threads.map(call, inputs)), expected, rtol=1e-5, atol=1e-5)


def test_a_model_is_one_chain_whether_padding_is_dropped_or_not(chains):
    case = next(case for case in CASES if case.name == "bert")
    model: Any = case.build("sdpa")
    whole, padded = case.inputs(3, 16, "none"), case.inputs(3, 16, "right")
    fast: Any = fxbt.optimize(model, padded)
    for inputs in (whole, padded):
        chains.clear()
        found, expected = fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        is_token = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[is_token], expected[is_token], rtol=1e-5, atol=1e-5)
        assert chains == [5 * model.config.num_hidden_layers]
    assert f"one call for {5 * model.config.num_hidden_layers} in a row" in str(fast.report)
    assert fast.report.latest.calls == {"dense": 1, "packed": 2}  # the call that was captured is served too
