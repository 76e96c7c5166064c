"""Writes in place: which the graph itself says otherwise, which torch does, and which are refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.export import ExportedProgram
from tracing import captured

from fxbt.errors import CaptureError
from fxbt.graph.node import writes


@pytest.fixture
def decomposed(monkeypatch):
    """The programs that torch functionalised."""
    programs = []

    def spy(program, *args):
        programs.append(program)
        return original(program, *args)

    original = ExportedProgram.run_decompositions
    monkeypatch.setattr(ExportedProgram, "run_decompositions", spy)
    return programs


def scores_of(x):
    return x @ x.mT


def added_to_twice(x):
    scores = scores_of(x)
    scores += 1
    return scores.mul_(2).softmax(-1)


def filled(x):
    scores = scores_of(x)
    return scores.masked_fill_(scores > 1, -1.0)


def written_after_use(x):
    scores = scores_of(x)
    weights = scores.softmax(-1)
    scores.zero_()
    return weights + scores.sum()


def view_read_before(x):
    scores = scores_of(x)
    total = scores.view(-1).sum()
    scores.add_(total)
    return scores


def dropped_out_and_added(x):
    hidden = F.dropout(x * 2, training=False)
    hidden += x
    return hidden


def view_read_after(x):
    scores = scores_of(x)
    row = scores[0]
    scores.add_(1)
    return scores, row


def view_written(x):
    scores = scores_of(x)
    scores[:, 0] = 0.0
    return scores


def detached_read_after(x):
    scores = scores_of(x)
    kept = scores.detach()
    scores.add_(1)
    return kept


def of_a_wider_dtype(x):
    half = x.bfloat16() * 2
    half.add_(x)
    return half


def with_gaps_between_rows(x):
    gaps = torch.empty_strided(x.shape, (64, 1))
    gaps.fill_(1.0)
    return gaps * x


def returned_as_it_was(x):
    scores = scores_of(x)
    scores.add_(1)
    return scores, x


def to_the_argument(x):
    x.add_(1)
    return x * 2


def to_the_argument_through_dropout(x):
    hidden = F.dropout(x, training=False)
    hidden += 1
    return hidden


def to_what_dropout_was_given(x):
    hidden = x * 2
    dropped = F.dropout(hidden, training=False)
    dropped += 1
    return hidden


def to_what_dropout_of_nothing_was_given(x):
    hidden = x * 2
    dropped = F.dropout(hidden, 0.0, training=True)
    dropped += 1
    return hidden


def to_a_part_of_what_dropout_was_given(x):
    hidden = x * 2
    F.dropout(hidden, training=False)[0] = 1.0
    return hidden


def to_what_einsum_was_given(x):
    hidden = x * 2
    turned = torch.einsum("ij->ji", hidden)
    turned += 1
    return hidden


ALONE = (added_to_twice, filled, written_after_use, view_read_before, dropped_out_and_added, returned_as_it_was)
SHARED = (view_read_after, view_written, detached_read_after, of_a_wider_dtype, with_gaps_between_rows)
REFUSED = (
    to_the_argument,
    to_the_argument_through_dropout,
    to_what_einsum_was_given,
)
THROUGH_DROPOUT = (
    to_what_dropout_was_given,
    to_what_dropout_of_nothing_was_given,
    to_a_part_of_what_dropout_was_given,
)


def runs_like(forward):
    """Captures, and compares the results at three shapes."""
    graph = captured(forward, torch.randn(4, 6))
    assert not any(map(writes, graph.module.graph.nodes))
    for shape in ((4, 6), (3, 6), (7, 9)):
        x = torch.randn(shape)
        graph.guards(x)
        found, expected = graph.module(x), forward(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("forward", ALONE)
def test_writes_to_a_value_that_nothing_else_holds_need_no_second_trace(forward, decomposed):
    runs_like(forward)
    assert decomposed == []


@pytest.mark.parametrize("forward", SHARED)
def test_other_writes_are_torchs_to_follow(forward, decomposed):
    runs_like(forward)
    assert len(decomposed) == 1


@pytest.mark.parametrize("forward", REFUSED)
def test_writes_that_show_where_no_graph_sees_it_are_refused(forward):
    with pytest.raises(CaptureError, match="writes in place"):
        captured(forward, torch.randn(4, 6))


@pytest.mark.parametrize("forward", THROUGH_DROPOUT)
def test_writes_through_inactive_dropout_are_followed_where_torch_follows_them(forward):
    """A trace of torch 2.14 has one value for what such a dropout is given and returns; those before have two."""
    if torch.__version__ >= "2.14":
        runs_like(forward)
        return
    with pytest.raises(CaptureError, match="writes in place"):
        captured(forward, torch.randn(4, 6))


def test_dropout_in_training_gives_a_value_of_its_own():
    def forward(x):
        hidden = x * 2
        dropped = F.dropout(hidden, 0.5, training=True)
        dropped += 1
        return hidden

    runs_like(forward)
