"""The graph for calls without padding: masks that then say nothing are gone, all others stay."""

from __future__ import annotations

from typing import Any

import padding_gate as gate
import padding_models as models
import pytest
import sympy
import torch
from models import PAD, VOCAB, compare
from torch import Tensor, nn

import fxbt
from fxbt.graph.node import argument
from fxbt.padding.validity_sources import Validity
from fxbt.padding.without_masks import SDPA, unmask
from fxbt.rewrite.outline import inline


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def unmasked_attentions(model: nn.Module) -> list[tuple[bool, bool]]:
    """(has a mask, is causal) for each attention where nothing is padded."""
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        fast(input_ids=ids(2, 7), attention_mask=torch.ones(2, 7, dtype=torch.long))
    module = inline(fast.report.latest.module)
    (mask,) = [node for node in module.graph.nodes if node.name == "attention_mask"]
    graph = unmask(module, [Validity(mask)]).module.graph
    calls = [node for node in graph.nodes if node.target is SDPA]
    return [(argument(call, "attn_mask") is not None, bool(argument(call, "is_causal"))) for call in calls]


@pytest.mark.parametrize(
    ("case", "attentions"),
    [
        (models.Case("BertModel", models.ENCODER), [(False, False)] * 2),
        (models.Case("BertModel", models.ENCODER, "sdpa"), [(False, False)] * 2),
        (models.Case("GPT2Model", models.GPT2), [(False, True)] * 2),
        (models.Case("LlamaModel", models.DECODER, "sdpa"), [(False, True)] * 2),
        (models.Case("T5EncoderModel", models.T5), [(True, False)] * 2),  # its relative positions
        (models.Case("BloomModel", models.BLOOM), [(True, False)] * 2),  # ALiBi
        (models.Case("MistralModel", {**models.DECODER, "sliding_window": 4}), [(True, False)] * 2),
    ],
    ids=str,
)
def test_only_masks_that_say_nothing_go(case: models.Case, attentions: list[tuple[bool, bool]]) -> None:
    assert unmasked_attentions(case.model()) == attentions


def test_masks_of_ids_go_where_no_id_is_padding() -> None:
    model = gate.Case("", lambda: gate.IdsAlone(gate.not_pad), "").model()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        fast(input_ids=ids(2, 7))
    module = inline(fast.report.latest.module)
    (given,) = [node for node in module.graph.nodes if node.name == "input_ids"]

    def masks(tokens: Validity) -> int:
        graph = unmask(module, [tokens]).module.graph
        return sum(argument(node, "attn_mask") is not None for node in graph.nodes if node.target is SDPA)

    assert masks(Validity(given, sympy.Ne, PAD)) == 0
    assert masks(Validity(given, sympy.Ne, 7)) == 2
    assert masks(Validity(given, sympy.Eq, 7)) == 0  # 7 is not PAD


@pytest.mark.parametrize("value", [1, 2, -1])
def test_masks_of_other_values_are_computed(value: int) -> None:
    """All of them count as valid nowhere but in the model's own arithmetic."""
    model = models.Case("BertModel", models.ENCODER).model()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        fast(input_ids=ids(2, 7), attention_mask=torch.ones(2, 7, dtype=torch.long))
        for batch, length in ((2, 7), (3, 12), (1, 5)):
            mask = torch.ones(batch, length, dtype=torch.long)
            mask[0, 2] = value
            inputs = {"input_ids": ids(batch, length), "attention_mask": mask}
            compare(fast(**inputs), model(**inputs))
    assert not fast.report.fallbacks


class ScaledMask(nn.Module):
    """Half as open as it should be where the mask is 1: a bias that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.qkv = nn.Embedding(VOCAB, 8), nn.Linear(8, 24)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        parts = self.qkv(self.embedding(input_ids)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        position = torch.arange(input_ids.shape[1])
        bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        bias = bias - attention_mask[:, None, None, :] * (position * 0.1)
        return nn.functional.scaled_dot_product_attention(*parts, attn_mask=bias).transpose(1, 2).flatten(2)


def test_what_a_mask_adds_where_it_is_open_stays() -> None:
    model = ScaledMask().eval()
    assert unmasked_attentions(model) == [(True, False)]
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in ((2, 7), (2, 7), (3, 5)):
            inputs = {"input_ids": ids(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
            compare(fast(**inputs), model(**inputs))


class FilledByFloats(ScaledMask):
    """Blocks where a mask, given as floats, is 0."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        query, key, value = self.qkv(self.embedding(input_ids)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        scores = (query @ key.transpose(-1, -2)).masked_fill(attention_mask[:, None, None] == 0, -1e9)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def test_a_mask_of_floats_is_not_taken_for_open() -> None:
    """Captured without padding, where a mask that is lost makes no difference."""
    model = FilledByFloats().eval()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in ((2, 7), (3, 5), (2, 12)):
            for mask in (torch.ones(batch, length), torch.ones(batch, length).triu(1), torch.ones(batch, length)):
                inputs = {"input_ids": ids(batch, length), "attention_mask": mask}
                compare(fast(**inputs), model(**inputs), dropped=[mask.bool()])
    assert not fast.report.fallbacks
    assert fast.report.latest.calls["packed"] == 3
