"""The lines of DESIGN section 6's table, one test each, and the clauses of the contract that no model shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import padding_gate as gate
import padding_models as models
import pytest
import torch
from models import compare
from test_padding import calls_of, masks, random_ids
from torch import Tensor, nn

import fxbt
from fxbt.analysis.axes import sizes_of
from fxbt.kernels import packed
from fxbt.padding.drop import Unpadded, drop_padding
from fxbt.rewrite.outline import inline

SHAPES = ((3, 7), (2, 5), (4, 11))


def ran(model: nn.Module, inputs: Any = None, kinds: tuple[str, ...] = (), shapes: Any = SHAPES) -> Any:
    """The optimised model, after it was right under these kinds of masks (all, if none is named)."""
    fast: Any = fxbt.optimize(model)
    make = inputs or (lambda ids, mask: {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        for batch, length in shapes:
            for kind, mask in masks(batch, length, length).items():
                if kinds and kind not in kinds:
                    continue
                given = make(random_ids(mask), mask)
                compare(fast(**given), model(**given), atol_of_magnitude=2e-5, dropped=[mask.bool()])
    assert not fast.report.fallbacks
    return fast


def net(**variation: Any) -> nn.Module:
    return gate.Case("", lambda: gate.Net(**variation), "").model()


def unpadded(fast: Any) -> Unpadded:
    return drop_padding(inline(fast.report.latest.module))


# --- the table ---


class CausalByIndexing(gate.Net):
    """Reads its mask with index tensors, as transformers does, which says nothing of the ids' batch."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length = attention_mask.shape
        rows, keys = torch.arange(batch)[:, None, None, None], torch.arange(length)[None, None, None]
        seen = attention_mask.bool()[rows, keys] & (keys <= torch.arange(length)[None, None, :, None])
        x = self.tokens(input_ids)
        return self.attention(1, self.attention(0, x, seen), seen)


def test_ids_and_mask_may_have_batch_symbols_of_their_own() -> None:
    fast = ran(gate.Case("", CausalByIndexing, "").model())
    assert calls_of(fast)["packed"] >= 3
    ids, mask = random_ids(masks(3, 7)["right"]), masks(3, 7)["right"][1:2]
    original = fxbt.restore(fast)
    with torch.no_grad():
        try:
            expected = original(input_ids=ids, attention_mask=mask)
        except RuntimeError:
            pytest.skip("the original takes no mask of another batch")
        compare(fast(input_ids=ids, attention_mask=mask), expected, atol_of_magnitude=2e-5)


@pytest.mark.parametrize("value", [0.5, 2, -1])
def test_mask_values_other_than_0_and_1_are_guarded(value: float) -> None:
    model = net()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for mask in masks(3, 7).values():
            other = torch.where(mask == 1, 1.0, 0.0)
            other[0, 0] = value
            for given in (mask.float(), other):
                inputs = {"input_ids": random_ids(mask), "attention_mask": given}
                is_mask = bool(((given == 0) | (given == 1)).all())
                compare(fast(**inputs), model(**inputs), dropped=[mask.bool()] if is_mask else [])
    assert calls_of(fast)["attention_mask holds values other than 0 and 1"] >= 3 and calls_of(fast)["packed"] >= 3


def test_first_token_heads_are_guarded_against_left_padding() -> None:
    fast = ran(net(head=lambda net, x, mask: x[:, 0]), kinds=("nothing padded", "right", "left"))
    assert calls_of(fast)["position 0 is read, and a row has padding there"] >= 1 and calls_of(fast)["packed"] >= 1


def test_last_token_heads_are_guarded_against_empty_rows() -> None:
    """Without tokens, the position is -1: padding."""
    fast = ran(
        net(head=lambda net, x, mask: x[torch.arange(x.shape[0]), mask.sum(1) - 1]), kinds=("right", "empty row")
    )
    assert calls_of(fast)["the call reads a position where there is padding"] >= 2 and calls_of(fast)["packed"] >= 1


def test_cross_attention_is_guarded_against_rows_without_keys() -> None:
    model = gate.Case("", lambda: gate.CrossAttention(lambda own, other: gate.keys_of(other)), "").model()

    def without_keys(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        inputs = gate.two_inputs(ids, mask)
        inputs["other_mask"] = inputs["other_mask"].index_fill(0, torch.tensor([1]), 0)
        return inputs

    assert calls_of(ran(model, gate.two_inputs, kinds=("right", "left")))["packed"] >= 2
    assert calls_of(ran(model, without_keys, kinds=("right", "left")))["a row has queries but no keys"] >= 2


@pytest.mark.parametrize("case", [c for c in gate.REFUSED if c.name in ("-10000", "a soft mask", "half the heads")])
def test_masks_that_are_soft_refuse_packing(case: gate.Case) -> None:
    assert case.reason in ran(case.model(), case.inputs).report.why("padding")


def test_a_row_that_finfo_min_blocks_everywhere_averages_over_padding() -> None:
    """A valid query that may not see itself either sees every key alike, padded ones among them: test (B)."""
    (case,) = [case for case in gate.REFUSED if case.name == "blind to itself"]
    assert "a valid token may not see itself" in ran(case.model(), case.inputs).report.why("padding")


def near(mask: Tensor, x: Tensor) -> Tensor:
    position = torch.arange(mask.shape[1])
    return gate.boolean(lambda m: m[:, None, None] & ((position[:, None] - position).abs() <= 2))(mask, x)  # type: ignore[return-value]


def distant(mask: Tensor, x: Tensor) -> Tensor:
    position = torch.arange(mask.shape[1])
    return gate.additive(mask, x) - (position[:, None] - position).abs().to(x.dtype)


@pytest.mark.parametrize("mask", [near, distant])
def test_windows_and_biases_are_those_of_original_positions(mask: gate.Mask) -> None:
    """Interior padding stands between tokens: counted among valid ones alone, they would be nearer."""
    fast = ran(net(mask=mask))
    assert calls_of(fast)["packed"] >= 9
    blocks = [node for node in unpadded(fast).module.graph.nodes if node.target is packed.blocks]
    assert len(blocks) == 1  # of both layers, read at the original positions


def test_padded_outputs_are_zero_and_scores_of_positions_the_lowest() -> None:
    mask = masks(3, 7)["interior"]
    inputs = {"input_ids": random_ids(mask), "attention_mask": mask}
    model = net(head=lambda net, x, mask: (x, net.score(x).squeeze(-1), net.score(x), x.transpose(1, 2)))
    with torch.no_grad():
        fast: Any = fxbt.optimize(model, inputs)
        tokens, scores, columns, features = fast(**inputs)
        expected = model(**inputs)
    padding = mask == 0
    lowest = torch.finfo(torch.float32).min
    assert (tokens[padding] == 0).all() and (columns[padding] == 0).all() and (scores[padding] == lowest).all()
    assert (features.transpose(1, 2)[padding] == lowest).all()  # its last axis is the tokens
    compare((tokens, scores, columns), expected[:3], dropped=[mask.bool()])
    compare(features.transpose(1, 2)[~padding], expected[3].transpose(1, 2)[~padding])


def test_a_decoder_without_a_mask_does_not_inherit_the_encoders() -> None:
    """Its positions are valid all, those beside the encoder's padding too."""
    case = models.Case("T5Model", models.T5, "sdpa", masks=("attention_mask",))
    model = case.model()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for mask in masks(3, 7).values():
            inputs = case.inputs(mask, mask)  # as many decoder tokens as the encoder has
            found, expected = fast(**inputs), model(**inputs)
            if mask.any(1).all():
                compare(found.last_hidden_state, expected.last_hidden_state)
    assert calls_of(fast)["packed"] >= 2


def test_several_consumers_share_one_unpack() -> None:
    model = models.Case("BertModel", models.ENCODER, "sdpa", extra=(("output_hidden_states", True),)).model()
    extra = {"output_hidden_states": True}
    fast = ran(model, lambda ids, mask: {"input_ids": ids, "attention_mask": mask, **extra}, kinds=("right",))
    unpacks = [node for node in unpadded(fast).module.graph.nodes if node.target is packed.unpack]
    assert len(unpacks) == 3  # the embeddings and two layers, the last of which is the output and what the pooler reads


def test_packing_does_not_specialise_the_graph() -> None:
    fast = ran(net(), shapes=((3, 7), (2, 5), (1, 9), (5, 2)))
    assert len(fast.report.graphs) == 1
    (mask,) = [domain.source for domain in unpadded(fast).validities]
    assert not any(size.is_Integer for size in sizes_of(mask))


def test_attention_weights_as_outputs_keep_padding() -> None:
    case = models.Case("BertModel", models.ENCODER)
    extra = {"output_attentions": True}
    fast = ran(case.model(), lambda ids, mask: {"input_ids": ids, "attention_mask": mask, **extra})
    assert "no attention is masked" in fast.report.why("padding")


@pytest.mark.parametrize("name", ["convolution of size 1", "batch norm at inference"])
def test_what_keeps_tokens_apart_by_its_settings_packs(name: str) -> None:
    module = nn.Conv1d(gate.HIDDEN, gate.HIDDEN, 1) if "convolution" in name else nn.BatchNorm1d(gate.HIDDEN).eval()
    model = net(mix=lambda net, x, mask: module(x.transpose(1, 2)).transpose(1, 2))
    model.register_module("extra", module)
    assert calls_of(ran(model))["packed"] >= 9


def test_sequences_are_sorted_by_length_so_that_equal_ones_are_slices() -> None:
    tokens = packed.Tokens.of(torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 1]]))
    assert [(group.start, group.count, group.length) for group in tokens.groups] == [(0, 2, 1), (2, 1, 2), (4, 1, 3)]


# --- the contract ---


def test_without_a_mask_everything_is_as_ever() -> None:
    model = models.Case("BertModel", models.ENCODER, "sdpa").model()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in SHAPES:
            ids = random_ids(torch.ones(batch, length))
            compare(fast(input_ids=ids), model(input_ids=ids))
    assert fast.report.hits["padding"] == 0 and not fast.report.fallbacks


def test_dropping_is_the_default() -> None:
    """With gradients once a backward pass was seen: see tests/test_training_padding.py."""
    model, mask = net(), masks(3, 7)["right"]
    inputs = {"input_ids": random_ids(mask), "attention_mask": mask}
    fast: Any = fxbt.optimize(model)
    compare(fast(**inputs), model(**inputs))
    assert "packed" not in calls_of(fast)
    with torch.no_grad():
        compare(fast(**inputs), model(**inputs), dropped=[mask.bool()])
    assert calls_of(fast) == {"packed": 1}


def test_the_report_counts_packed_dense_and_guarded_calls() -> None:
    fast = ran(net(head=lambda net, x, mask: x[:, 0]), kinds=("nothing padded", "right", "left"))
    calls = calls_of(fast)
    assert set(calls) == {"packed", "dense", "position 0 is read, and a row has padding there"}
    lines = str(fast.report).splitlines()
    for verdict, count in calls.items():
        assert any(line.split() == [*verdict.split(), str(count)] for line in lines), f"{verdict}: {count}"
    assert "0 and 1" in str(fast.report)  # a guard that no call has met yet


def test_a_graph_that_stays_dense_says_why() -> None:
    fast = ran(net(head=lambda net, x, mask: x.mean(1)))
    assert not calls_of(fast)
    why = fast.report.why("padding")
    assert "mixes tokens" in why and "mean" in why and "padding_gate.py" in why


@pytest.mark.parametrize("place", ["help", "README"])
def test_the_contract_is_written_where_users_look(place: str) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    text = " ".join((fxbt.optimize.__doc__ if place == "help" else readme).split())  # type: ignore[union-attr]
    for clause in ("valid positions are exact", "padded positions of outputs are 0", "last axis is the tokens"):
        assert clause in text
    assert "the lowest finite value, so that no argmax or softmax lands there" in text


def test_the_gate_is_wide() -> None:
    cases = [*gate.REFUSED, *gate.GUARDED]
    assert len(cases) >= 60 and len({str(case) for case in cases}) == len(cases)
