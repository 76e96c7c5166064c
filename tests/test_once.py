"""What a lowered program computes once instead of again and again, and that the numbers stay."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from tracing import agree, program

import fxbt.lower.once
from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.pipeline import compile as compile_graph


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Embeddings(torch.nn.Module):
    """Words, positions and token types as BERT adds them up."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.types = (torch.nn.Embedding(count, 6) for count in (9, 16, 2))
        self.register_buffer("position_ids", torch.arange(16)[None])
        self.register_buffer("type_ids", torch.tensor([[0, 1] * 8]))

    def forward(self, ids):
        positions = self.position_ids[:, : ids.shape[1]]
        types = torch.gather(self.type_ids, 1, positions).expand(ids.shape[0], ids.shape[1])
        return self.words(ids) + self.types(types) + self.positions(positions)


def test_positions_and_token_types_are_looked_up_once(lowered):
    model = Embeddings()
    compiled = compile_graph(capture(model, make_call(model, torch.ones(2, 5, dtype=torch.long))), ())
    assert lowered.count(torch.embedding) == 1 and torch.gather not in lowered
    for batch, length in ((3, 7), (1, 16), (2, 5)):
        agree(model, compiled.run, torch.randint(9, (batch, length)))
    with torch.no_grad():
        model.positions.weight[2] += 1.0
        model.type_ids[0, 1] = 0
    agree(model, compiled.run, torch.randint(9, (3, 7)))


def test_what_is_gathered_along_another_axis_is_gathered_as_it_was(lowered):
    def function(x, table, index):
        return torch.gather(table, 0, index[:, : x.shape[1]]) + x

    x = torch.randn(2, 3)
    index = torch.tensor([[0, 1, 2, 0, 1]] * 2)
    model, run = program(function, x, table=torch.randn(4, 3), index=index)
    assert torch.gather in lowered
    agree(model, run, x)


def test_masks_of_several_attentions_are_made_once(lowered):
    def function(x, mask):
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, mask)
        return x

    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[0, 0, 2] = False  # a row that is blocked everywhere
    model, run = program(function, torch.randn(2, 4, 5, 8), mask)
    assert lowered.count(fxbt.lower.once.additive) == 1
    agree(model, run, torch.randn(2, 4, 5, 8), mask)


def heads(x, w, sizes=(8, 8, 8), width=4, used=None):
    parts = F.linear(x, w).split(sizes, -1)
    q, k, v = (part.view(x.shape[0], x.shape[1], -1, width).transpose(1, 2) for part in parts)
    return q * 2, k + 1, v if used is None else used(v)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (16, 4, 4)])
def test_heads_are_split_once(sizes, lowered):
    model, run = program(lambda x, w: heads(x, w, sizes)[0], torch.randn(2, 5, 6), w=torch.randn(24, 6))
    model, run = program(
        lambda x, w: sum(map(torch.sum, heads(x, w, sizes))), torch.randn(2, 5, 6), w=torch.randn(24, 6)
    )
    assert lowered.count(torch.unflatten) == 1 and lowered.count(torch.transpose) == 1
    assert torch.reshape not in lowered
    agree(model, run, torch.randn(3, 7, 6))


def test_heads_are_split_once_however_they_are_viewed(lowered):
    def function(x, w):
        q, k, v = F.linear(x, w).split((8, 8, 8), -1)
        parts = (q.unflatten(-1, (2, 4)).transpose(1, 2), k.view(*k.shape[:2], -1, 4).permute(0, 2, 1, 3))
        return sum(part.sin().sum(2) for part in (*parts, v.reshape(*v.shape[:2], 2, 4).transpose(2, 1)))

    model, run = program(function, torch.randn(2, 5, 6), w=torch.randn(24, 6))
    assert lowered.count(torch.transpose) == 1 and torch.permute not in lowered
    agree(model, run, torch.randn(3, 7, 6))


def test_a_view_across_batch_and_length_is_no_view_of_heads(lowered):
    def function(x, w):
        q, k = F.linear(x, w).split((8, 8), -1)
        return sum(part.reshape(5, -1, 2, 4).transpose(1, 2).sin() for part in (q, k))

    model, run = program(function, torch.randn(2, 5, 6), w=torch.randn(16, 6))
    assert torch.unflatten not in lowered
    agree(model, run, torch.randn(3, 5, 6))


def test_parts_of_other_forms_are_split_as_they_were(lowered):
    def function(x, w):
        q, k, v = F.linear(x, w).split((8, 8, 8), -1)
        return q.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).sum() + (k * v).sum()

    model, run = program(function, torch.randn(2, 5, 6), w=torch.randn(24, 6))
    assert lowered.count(operator.getitem) == 3
    agree(model, run, torch.randn(3, 7, 6))
