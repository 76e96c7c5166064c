"""Padding is dropped where that is proven, and nowhere else; valid positions are exact, padded ones by contract."""

from __future__ import annotations

import itertools
from typing import Any

import padding_gate as gate
import padding_models as models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import PAD, VOCAB, compare, enliven
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import fxbt
from fxbt.kernels import packed


def masks(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """(batch, length) masks of 0/1 of every kind."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    position = torch.arange(length)
    interior = torch.rand(batch, length, generator=generator) < 0.6
    interior[:, :1] |= ~interior.any(1, keepdim=True)
    found = {
        "right": position < lengths,
        "left": position >= length - lengths,
        "interior": interior,
        "interior behind the first": interior | (position == 0),
        "empty row": interior & (torch.arange(batch) > 0)[:, None],
        "nothing padded": torch.ones(batch, length, dtype=torch.bool),
    }
    return {name: mask.long() for name, mask in found.items()}


def random_ids(mask: Tensor, seed: int = 0) -> Tensor:
    """Ids that mean something at padding too."""
    return torch.randint(5, VOCAB, mask.shape, generator=torch.Generator().manual_seed(seed))


def calls_of(fast: Any) -> dict[str, int]:
    return fast.report.latest.calls


@pytest.mark.parametrize("case", gate.REFUSED, ids=str)
def test_what_would_see_padding_stays_dense(case: gate.Case) -> None:
    model = case.model()
    fast = fxbt.optimize(model)
    with torch.no_grad():
        for mask in masks(3, 7).values():
            inputs = case.inputs(random_ids(mask), mask)
            compare(fast(**inputs), model(**inputs), atol_of_magnitude=case.tolerance)
    assert not fast.report.fallbacks
    assert fast.report.hits["padding"] == 0
    assert case.reason in fast.report.why("padding")


@pytest.mark.parametrize("case", gate.PACKED, ids=str)
def test_masks_that_hide_padding_are_packed(case: gate.Case) -> None:
    """Under every kind of mask and in three shapes, the first of which the graph is captured in, nothing padded."""
    model = case.model()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in ((3, 7), (2, 5), (4, 11)):
            for mask in reversed(masks(batch, length, length).values()):
                inputs = case.inputs(random_ids(mask), mask)
                compare(fast(**inputs), model(**inputs), atol_of_magnitude=case.tolerance, dropped=[mask.bool()])
    assert not fast.report.fallbacks
    assert calls_of(fast)["packed"] >= 9, fast.report.why("padding")


@pytest.mark.parametrize("case", gate.GUARDED, ids=str)
def test_what_is_right_for_some_calls_is_guarded(case: gate.Case) -> None:
    model = case.model()
    fast = fxbt.optimize(model)
    with torch.no_grad():
        for mask in masks(3, 7).values():
            inputs = case.inputs(random_ids(mask), mask)
            found, expected = fast(**inputs), model(**inputs)
            if mask.all():
                continue
            is_dense = case.breaks(mask)
            compare(found, expected, atol_of_magnitude=2e-5, valid=None if is_dense else mask.bool())
    assert fast.report.hits["padding"] == 1
    assert not fast.report.fallbacks
    assert any(case.reason in verdict for verdict in calls_of(fast))


# --- models -----------------------------------------------------------------------------------------------------


def check(case: models.Case, batch: int = 3, length: int = 9) -> Any:
    """Runs a case under all kinds of masks; returns the optimised model."""
    model = case.model()
    fast: Any = fxbt.optimize(model)
    for seed in range(2):
        own, other = masks(batch, length, seed), masks(batch, length + 2, seed + 7)
        for mask, decoder_mask in zip(own.values(), reversed(other.values()), strict=True):
            inputs = case.inputs(mask, decoder_mask)
            if seed:  # as tokenizers pad; otherwise any ids stand there
                inputs["input_ids"] = inputs["input_ids"].masked_fill(mask == 0, PAD)
            found, expected = fast(**inputs), model(**inputs)
            positions = [inputs[name].bool() for name in case.masks]
            compare(*without_empty_rows(found, expected, mask), dropped=positions)
    assert not fast.report.fallbacks
    return fast


def without_empty_rows(found: Any, expected: Any, mask: Tensor) -> tuple[Any, Any]:
    """What a model makes of a row without tokens is an average over padding: one value a row is left out there."""
    has_tokens = mask.bool().any(1)

    def rows(leaf: Any) -> Any:
        is_pooled = isinstance(leaf, Tensor) and leaf.dim() == 2 and leaf.shape[1] != mask.shape[1]
        return leaf[has_tokens] if is_pooled else leaf

    return tuple(pytree.tree_map(rows, output) for output in (found, expected))  # type: ignore[return-value]


@pytest.mark.parametrize("case", [*models.ENCODERS, *models.DECODERS, *models.PAIRS, *models.WITH_HEADS], ids=str)
def test_models_run_on_valid_tokens_alone(case: models.Case) -> None:
    with torch.no_grad():
        fast = check(case)
    assert fast.report.hits["padding"] == 1, fast.report.why("padding")
    assert calls_of(fast)["packed"] >= 3, calls_of(fast)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_that_makes_its_mask_of_ids(implementation: str) -> None:
    """DPR's question encoder masks its own padding id, and returns its first token."""
    model = models.Case("DPRQuestionEncoder", models.ENCODER, implementation).model()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in ((3, 9), (2, 6), (4, 13)):
            for mask in reversed(masks(batch, length).values()):
                inputs = {"input_ids": random_ids(mask).masked_fill(mask == 0, PAD)}
                compare(fast(**inputs), model(**inputs))
    assert not fast.report.fallbacks
    assert calls_of(fast)["packed"] >= 3 and calls_of(fast)["position 0 is read, and a row has padding there"] >= 3


@pytest.mark.parametrize(("case", "reason"), models.DENSE, ids=str)
def test_sinks_and_routing_to_experts_stay_dense_and_say_why(case: models.Case, reason: str) -> None:
    """Other weights send other tokens to other experts. Nothing is blanked: all is as in the original."""
    model = case.model()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for seed, (batch, length) in itertools.product(range(3), ((3, 9), (2, 6), (4, 13))):
            enliven(model, seed)
            for mask in masks(batch, length, seed).values():
                inputs = case.inputs(mask, mask)
                compare(fast(**inputs), model(**inputs))
    assert not fast.report.fallbacks
    assert fast.report.hits["padding"] == 0 and not calls_of(fast)
    assert reason in fast.report.why("padding")


def test_calls_without_padding_are_dense() -> None:
    model = models.Case("BertModel", models.ENCODER, "sdpa").model()
    fast: Any = fxbt.optimize(model)
    mask = torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        for _ in range(3):
            fast(input_ids=random_ids(mask), attention_mask=mask)
    assert calls_of(fast) == {"dense": 3}


def bert(head: str = "Model", **options: Any) -> tuple[Any, Any]:
    model = models.Case(f"Bert{head}", models.ENCODER, "sdpa").model()
    return model, fxbt.optimize(model, **options)


def test_padded_positions_keep_the_contract() -> None:
    mask = masks(3, 9)["interior behind the first"]
    inputs = {"input_ids": random_ids(mask), "attention_mask": mask}
    with torch.no_grad():
        _, fast = bert("ForQuestionAnswering", example_inputs=inputs)
        scores = fast(**inputs).start_logits
        _, fast = bert(example_inputs=inputs)
        tokens = fast(**inputs).last_hidden_state
    assert (scores[mask == 0] == torch.finfo(torch.float32).min).all()
    assert scores.argmax(-1).ne(-1).all() and mask.gather(1, scores.argmax(-1, keepdim=True)).all()
    assert (tokens[mask == 0] == 0).all() and (tokens[mask == 1] != 0).any(-1).all()


def test_keep_leaves_padding_as_it_is() -> None:
    model, fast = bert(padding="keep")
    mask = masks(3, 9)["right"]
    inputs = {"input_ids": random_ids(mask), "attention_mask": mask}
    with torch.no_grad():
        fast(**inputs)
        compare(fast(**inputs), model(**inputs))
    assert "padding" not in fast.report.hits and not calls_of(fast)
    with pytest.raises(ValueError, match="it can be 'drop'"):
        bert(padding="pack")


def test_gradients_without_a_backward_pass_keep_padding() -> None:
    model, fast = bert()
    mask = masks(3, 9)["right"]
    compare(
        fast(input_ids=random_ids(mask), attention_mask=mask), model(input_ids=random_ids(mask), attention_mask=mask)
    )
    assert "packed" not in calls_of(fast) and not fast.report.fallbacks


def test_hardly_any_padding_is_not_worth_dropping() -> None:
    model, fast = bert()
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, -1] = 0
    inputs = {"input_ids": random_ids(mask), "attention_mask": mask}
    with torch.no_grad():
        fast(**inputs)
        compare(fast(**inputs), model(**inputs))
    assert calls_of(fast) == {"hardly any padding": 2}


@pytest.mark.parametrize("kind", ["right", "left", "interior", "empty row"])
def test_tokens_go_there_and_back(kind: str) -> None:
    mask = masks(4, 6)[kind]
    tokens = packed.Tokens.of(mask)
    dense = torch.randn(4, 6, 5) * mask[..., None]
    together = packed.gather(dense, tokens, -3, -2, 3)
    assert together.shape == (1, int(mask.sum()), 5)
    assert torch.equal(packed.unpack(together, tokens, -3, -2), dense)
    assert [group.length for group in tokens.groups] == sorted({int(n) for n in mask.sum(1) if n})


@pytest.mark.parametrize("kind", ["right", "left", "interior"])
def test_packed_attention_is_attention_of_each_sequence(kind: str) -> None:
    mask = masks(4, 6)[kind].bool()
    tokens = packed.Tokens.of(mask)
    query, key, value, bias = (torch.randn(4, 2, 6, size) for size in (8, 8, 8, 6))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, bias.masked_fill(~mask[:, None, None], -torch.inf)
    )
    together = [packed.gather(x, tokens, -4, -2, 4) for x in (query, key, value)]

    def run(*operands: Tensor) -> Tensor:
        found = packed.attention(*operands, tokens, packed.blocks(bias, tokens))
        return packed.unpack(found, tokens, -4, -2)

    compare(run(*together), expected * mask[:, None, :, None])
    traced = make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*together)
    compare(traced(*together), run(*together))


# --- random heads on random masks -------------------------------------------------------------------------------

LINKS: dict[str, gate.Mixer] = {
    "linear": lambda net, x, mask: net.out[0](x),
    "gelu": lambda net, x, mask: torch.nn.functional.gelu(x),
    "norm": lambda net, x, mask: net.norm(x),
    "softmax": lambda net, x, mask: x.softmax(-1),
    "zeroed": lambda net, x, mask: x * mask[..., None],
    "filled": lambda net, x, mask: x.masked_fill(mask[..., None] == 0, -3.0),
    "shifted up": lambda net, x, mask: x + 2.0,
    "exponential": lambda net, x, mask: x.clamp(max=2.0).exp(),
    "positions": lambda net, x, mask: x + net.positions(mask.cumsum(1)),
    "attention": lambda net, x, mask: net.attention(1, x, gate.additive(mask, x)),
    "flattened": lambda net, x, mask: net.out[1](x.flatten(0, 1)).view_as(x),
    "tokens last": lambda net, x, mask: x.transpose(1, 2).tanh().transpose(1, 2),
    "gated by the first": lambda net, x, mask: x * x[:, :1].sigmoid(),
    "minus the masked mean": lambda net, x, mask: x - (x * mask[..., None]).sum(1, keepdim=True),
    "minus the mean": lambda net, x, mask: x - x.mean(1, keepdim=True),
    "running sum": lambda net, x, mask: x.cumsum(1),
    "running mean": lambda net, x, mask: (x * mask[..., None]).cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None],
    "neighbours": lambda net, x, mask: x + x.roll(1, 1),
    "convolution": lambda net, x, mask: net.conv(x.transpose(1, 2)).transpose(1, 2),
    "reversed": lambda net, x, mask: x.flip(1),
    "pairs": lambda net, x, mask: (x @ x.transpose(1, 2)).sigmoid() @ x,
    "masked pairs": lambda net, x, mask: ((x @ x.transpose(1, 2)) * mask[:, None].float()) @ x,
}
ENDS: dict[str, gate.Mixer] = {
    "tokens": lambda net, x, mask: x,
    "scores": lambda net, x, mask: net.score(x).squeeze(-1),
    "first": lambda net, x, mask: x[:, 0],
    "last": lambda net, x, mask: x[torch.arange(x.shape[0]), mask.sum(1) - 1],
    "masked mean": lambda net, x, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1),
    "masked max": lambda net, x, mask: x.masked_fill(mask[..., None] == 0, -1e9).amax(1),
    "mean": lambda net, x, mask: x.mean(1),
    "best score": lambda net, x, mask: net.score(x).squeeze(-1).amax(-1),
}
FULL_OF_TOKENS = ("tokens", "scores")


def composed(links: list[str], end: str) -> gate.Mixer:
    def head(net: gate.Net, x: Tensor, mask: Tensor) -> Any:
        for link in links:
            x = LINKS[link](net, x, mask)
        return ENDS[end](net, x, mask)

    return head


class Spelled(nn.Module):
    """A net that is given its validity as `spelling` says, and makes 0 and 1 of that."""

    def __init__(self, net: gate.Net, spelling: str):
        super().__init__()
        self.net, self.spelling = net, spelling
        net.tokens.padding_idx = PAD

    def forward(self, input_ids: Tensor, given: Tensor | None = None) -> Any:
        return self.net(input_ids, self._validity(input_ids, given))

    def _validity(self, input_ids: Tensor, given: Tensor | None) -> Tensor:
        if given is None:
            return (input_ids != PAD if self.spelling == "by ids" else ~input_ids.eq(PAD)).long()
        return (~given).long() if self.spelling == "True at padding" else given.long()

    def inputs(self, mask: Tensor) -> dict[str, Tensor]:
        ids = random_ids(mask)
        kinds = {"numbers": mask, "True at tokens": mask.bool(), "True at padding": mask == 0, "bytes": mask.byte()}
        if self.spelling in kinds:
            return {"input_ids": ids, "given": kinds[self.spelling]}
        return {"input_ids": ids.masked_fill(mask == 0, PAD)}


SPELLINGS = ("numbers", "bytes", "True at tokens", "True at padding", "by ids", "not by padding ids")


@st.composite
def validity(draw: st.DrawFn) -> Tensor:
    batch, length = draw(st.integers(2, 4)), draw(st.integers(2, 7))
    bits = draw(st.lists(st.integers(0, 1), min_size=batch * length, max_size=batch * length))
    return torch.tensor(bits).view(batch, length)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(sorted(LINKS)), max_size=4),
    st.sampled_from(sorted(ENDS)),
    st.sampled_from(SPELLINGS),
    st.lists(validity(), min_size=3, max_size=3),
)
def test_random_heads_are_never_wrong(links: list[str], end: str, spelling: str, found: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = Spelled(gate.Net(head=composed(links, end)), spelling)
    gate.enliven(model)
    with torch.no_grad():
        fast: Any = fxbt.optimize(model)
        for mask in found:
            inputs = model.inputs(mask)
            dropped = [mask.bool()] if end in FULL_OF_TOKENS else []
            compare(fast(**inputs), model(**inputs), atol_of_magnitude=1e-4, dropped=dropped)
    assert not fast.report.fallbacks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [0, 2], ids=["unpadded first", "padded first"])
@pytest.mark.parametrize("kind", ["keep", "float mask"])
def test_zeros_of_nested_tensors_come_where_no_padding_is_dropped(kind: str, first: int) -> None:
    """nn.TransformerEncoder's fast path leaves 0 at padding, which the first call need not show."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    fast = fxbt.optimize(model, padding="keep" if kind == "keep" else "drop")
    with torch.no_grad():
        for count in (first, 0, 2, 3, 1, 0):
            x, mask = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.bool)
            mask[0, 6 - count :] = True
            padding = mask if kind == "keep" else torch.zeros(3, 6).masked_fill(mask, float("-inf"))
            expected = model(x, src_key_padding_mask=padding)
            torch.testing.assert_close(fast(x, src_key_padding_mask=padding), expected, rtol=1e-4, atol=1e-4)
    assert "nested tensors" in fast.report.fallbacks[0]
