"""Large batches part after part: the same numbers, and only where sequences are proven to be apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import CASES, compare
from torch import Tensor, nn

import fxbt
from fxbt.runtime import parts
from fxbt.runtime.parts import InParts

SIZE, LENGTH = 16, 8


class Reader(nn.Module):
    """What `form` makes of states (batch, length, size) and their like, between linears."""

    def __init__(self, form: Callable[..., Any]):
        super().__init__()
        self.before, self.after = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.table = nn.Parameter(torch.randn(LENGTH, SIZE))
        self.norm = nn.BatchNorm1d(LENGTH)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self, self.before(x))


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0], device=x.device)


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 4, SIZE // 4).transpose(1, 2)


def attend(x: Tensor) -> Tensor:
    q = heads(x)
    return F.scaled_dot_product_attention(q, q.flip(2), q * 2).transpose(1, 2).reshape(x.shape)


APART: dict[str, Callable[..., Any]] = {
    "pointwise": lambda m, x: F.gelu(x) * 2 + m.table[: x.shape[1]],
    "linear": lambda m, x: m.after(x.relu()),
    "attention": lambda m, x: m.after(attend(x)),
    "products": lambda m, x: (heads(x) @ heads(x).transpose(-1, -2)).softmax(-1) @ heads(x),
    "einsum": lambda m, x: torch.einsum("bld,bmd->blm", x, x.sin()),
    "merged with tokens": lambda m, x: m.after(x.reshape(-1, SIZE)).view(x.shape[0], x.shape[1], SIZE),
    "turned there and back": lambda m, x: m.after(x.transpose(0, 1).relu()).transpose(0, 1),
    "along tokens": lambda m, x: (x.cumsum(1), x.softmax(1), x.flip(1), x.mean(1), x.max(1).values, x.norm(dim=(1, 2))),
    "parts of features": lambda m, x: torch.cat([x[..., 4:], x[:, :, :4], *x.chunk(2, -1)], -1),
    "stacked": lambda m, x: torch.stack([x, x.cos()], 1).sum(2),
    "of each its own": lambda m, x: x[rows(x), x.argmax(1)[:, 0]],
    "gathered": lambda m, x: x.gather(1, x.argsort(1)),
    "repeated": lambda m, x: torch.bmm(m.table.repeat(x.shape[0], 1, 1), x.mT.repeat(1, 1, 2)),
    "repeated with heads": lambda m, x: (heads(x).flatten(0, 1) * m.table[:4, None, :4].repeat(x.shape[0], 1, 1)).view(
        x.shape[0], 4, x.shape[1], 4
    ),
    "scattered": lambda m, x: torch.zeros_like(x).scatter(1, x.argsort(1), x).scatter(2, x[..., :1].long() * 0, 1.0),
    "rows of a table": lambda m, x: m.table.index_select(0, x.argmax(1).flatten()).view(x.shape[0], SIZE, SIZE),
    "padded": lambda m, x: m.after(F.pad(x, (1, 2, 3, 0))[..., :SIZE]),
    "pooled": lambda m, x: (F.max_pool1d(x, 2), F.avg_pool2d(x[:, None], 2), F.adaptive_avg_pool1d(x, 4)),
    "as large as another": lambda m, x: m.table[:1].expand_as(x) * x,
    "zeros of the batch": lambda m, x: torch.cat([torch.zeros(x.shape[0], 1, SIZE), x], 1),
    "a token of its own": lambda m, x: torch.cat([m.table[:1].expand(x.shape[0], -1, -1), x], 1),
    "channels": lambda m, x: m.norm(F.conv1d(x, m.table[:, :LENGTH, None].sin())),
    "channels at each place": lambda m, x: F.conv1d(x.mean(1).t()[None], m.table.sin().sum(0)[None, :, None]).mT[0],
    "shared too": lambda m, x: (m.after(x), m.table.exp()),
}

APART["merged with heads"] = lambda m, x: torch.bmm(heads(x).flatten(0, 1), heads(x).flatten(0, 1).mT).view(
    x.shape[0], 4, x.shape[1], x.shape[1]
)

MEETING: dict[str, Callable[..., Any]] = {
    "mean": lambda m, x: x - x.mean(0),
    "mean of all": lambda m, x: x - x.mean(),
    "variance": lambda m, x: x / x.var(0, keepdim=True),
    "softmax": lambda m, x: x.softmax(0),
    "cumulated": lambda m, x: x.cumsum(0),
    "sorted": lambda m, x: x.sort(0).values,
    "best": lambda m, x: x + x.topk(1, 0).values,
    "flipped": lambda m, x: x.flip(0),
    "rolled": lambda m, x: x.roll(1, 0),
    "the first": lambda m, x: x - x[:1],
    "the first's": lambda m, x: x * x[0],
    "without the first": lambda m, x: torch.cat([x[1:], x[:1]]),
    "joined": lambda m, x: torch.cat([x, x.sin()]),
    "repeated": lambda m, x: x.repeat_interleave(2, 0),
    "twice": lambda m, x: x.repeat(2, 1, 1),
    "interleaved": lambda m, x: (
        x + m.table.repeat_interleave(x.shape[0], 0).view(-1, x.shape[0], SIZE).mT.mean(-1)[0, 0]
    ),
    "two halves": lambda m, x: torch.stack(torch.cat([x, x.cos()]).chunk(2, 0), 1),
    "likeness": lambda m, x: x.mean(1) @ x.mean(1).t(),
    "likeness by einsum": lambda m, x: torch.einsum("bd,cd->bc", x[:, 0], x[:, 1]),
    "summed over": lambda m, x: x + torch.einsum("bld,bmd->lm", x, x).sum(),
    "pairs": lambda m, x: x[:, None, 0] - x[None, :, 0],
    "turned": lambda m, x: x[:, :1].squeeze(1).t(),
    "tokens for sequences": lambda m, x: x.reshape(x.shape[1], x.shape[0], SIZE),
    "attention over the batch": lambda m, x: (
        x + F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1)
    ),
    "by the number of sequences": lambda m, x: x * x.shape[0],
    "by its inverse": lambda m, x: x / x.shape[0],
    "filled with it": lambda m, x: x + torch.full((1,), x.shape[0]),
    "number of the sequence": lambda m, x: x + rows(x)[:, None, None],
    "compared numbers": lambda m, x: x.masked_fill((rows(x) == 0)[:, None, None], 0.0),
    "rows of a table": lambda m, x: x + m.table.repeat(8, 1)[rows(x)][:, None],
    "padded": lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 0))[1:],
    "padded by another": lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 0))[:-1],
    "pooled": lambda m, x: F.avg_pool1d(x.permute(1, 2, 0), 3, 1, 1).permute(2, 0, 1),
    "scattered": lambda m, x: torch.zeros_like(x).scatter(0, (x * 0).long(), x),
    "scattered to one": lambda m, x: torch.zeros_like(x).scatter(0, (m.table[:1, :1] * 0).long()[None], 1.0),
    "table by rows": lambda m, x: x + m.table.repeat(4, 1).gather(0, (x[:, 0] * 0).long())[:, None],
    "rows given as data": lambda m, x: x[(x[:, 0, 0] * 0).long()],
    "rows shifted": lambda m, x: x[rows(x) * 0, x.argmax(1)[:, 0]],
    "rows in order of data": lambda m, x: x[x[:, 0, 0].argsort()],
    "gathered": lambda m, x: x.gather(0, (x * 0).long()),
    "selected": lambda m, x: x.index_select(0, rows(x).flip(0)),
    "statistics": lambda m, x: F.batch_norm(x, None, None, training=True),
    "channels": lambda m, x: F.conv1d(x.mean(1).t()[None], torch.ones(1, SIZE, 3), padding=1).transpose(0, 2),
    "triangle": lambda m, x: x * x[:, :, 0].triu()[:, :, None],
    "its size told": lambda m, x: (x, x.shape[0]),
    "a loss": lambda m, x: (x, x.square().mean()),
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def counts(monkeypatch) -> list[int]:
    """Anything is large, and a part one or two sequences; how many parts there were."""
    monkeypatch.setattr(parts, "LARGE", 0)
    monkeypatch.setattr(parts, "PART", 1)
    seen: list[int] = []
    in_parts = InParts._in_parts

    def noted(self: InParts, tensors: Any, count: int) -> Any:
        seen.append(count)
        return in_parts(self, tensors, max(2, count // 2))

    monkeypatch.setattr(InParts, "_in_parts", noted)
    monkeypatch.setattr(InParts, "_count", lambda self, shapes: self._sequences(shapes))
    return seen


def optimized(form: Callable[..., Any]) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = Reader(form).eval()
    fast: Any = fxbt.optimize(model, (torch.randn(3, LENGTH, SIZE),))
    return model, fast, fast.report.latest.parts


@pytest.mark.parametrize("name", APART)
def test_sequences_that_stay_apart_go_in_parts(name, counts):
    model, fast, stage = optimized(APART[name])
    assert stage.hits and "run in parts" in str(fast.report), str(stage.misses)
    counts.clear()
    for batch in (2, 5, 3, 1, 6):
        x = torch.randn(batch, LENGTH, SIZE)
        compare(fast(x), model(x))
    assert counts == [2, 5, 3, 6] and fast.report.fallbacks == []


@pytest.mark.parametrize("name", MEETING)
@pytest.mark.filterwarnings("ignore::fxbt.FxbtWarning")
def test_sequences_that_meet_do_not(name, counts):
    model = Reader(MEETING[name]).eval()
    fast: Any = fxbt.optimize(model, (torch.randn(3, LENGTH, SIZE),))
    for batch in (2, 5, 3, 6):
        x = torch.randn(batch, LENGTH, SIZE)
        compare(fast(x), model(x))
    assert not counts
    for graph in fast.report.graphs.values():
        (miss,) = graph.parts.misses  # by proof, not by what the numbers of the example show
        assert "the outputs computed on parts" not in str(miss) and "fxbt itself failed" not in str(miss)
        assert f"run whole: {miss}" in str(fast.report)


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet", "gpt2", "llama", "clip-text", "electra", "deberta-v2"])
def test_models(name, counts):
    case = next(case for case in CASES if case.name == name)
    model = case.build("eager" if "eager" in case.implementations else case.implementations[0])
    fast: Any = fxbt.optimize(model, case.inputs(2, 7, "right"))
    for padding, (batch, length) in itertools.product(("right", "left", "none"), ((5, 9), (4, 12), (2, 5))):
        counts.clear()
        inputs = case.inputs(batch, length, padding)
        actual, expected = fast(**inputs)[0], model(**inputs)[0]
        valid = inputs["attention_mask"].bool()
        compare(actual[valid], expected[valid])
        assert counts == [batch], padding
    assert fast.report.fallbacks == []


def test_a_part_without_a_token(counts):
    """Whatever stands there in the whole batch: 0, as where padding is dropped."""
    case = next(case for case in CASES if case.name == "distilbert")
    model = case.build("sdpa")
    fast: Any = fxbt.optimize(model, case.inputs(2, 7, "right"))
    inputs = case.inputs(4, 9, "right")
    inputs["attention_mask"][:2] = 0
    actual, expected = fast(**inputs)[0], model(**inputs)[0]
    valid = inputs["attention_mask"].bool()
    compare(actual[valid], expected[valid])
    assert actual[:2].eq(0).all() and fast.report.latest.calls == {"packed": 2}


def test_large_values_alone_are_parted(monkeypatch):
    model, fast, _ = optimized(APART["linear"])
    seen = []
    in_parts = InParts._in_parts
    monkeypatch.setattr(InParts, "_in_parts", lambda self, t, count: seen.append(count) or in_parts(self, t, count))
    monkeypatch.setattr(parts, "LARGE", 10 * LENGTH * SIZE * 4)
    monkeypatch.setattr(parts, "PART", 4 * LENGTH * SIZE * 4)
    for batch in (1, 10, 11, 12, 13, 64):
        x = torch.randn(batch, LENGTH, SIZE)
        compare(fast(x), model(x))
    assert seen == [3, 3, 4, 16]
    assert fast(torch.randn(0, LENGTH, SIZE)).shape == (0, LENGTH, SIZE)


def test_outputs_that_would_take_longer_to_join_are_not_parted(monkeypatch):
    model, fast, stage = optimized(lambda m, x: x.repeat(1, 1, 9))
    monkeypatch.setattr(parts, "LARGE", 0)
    monkeypatch.setattr(InParts, "_in_parts", lambda *_: pytest.fail("parted"))
    x = torch.randn(5, LENGTH, SIZE)
    compare(fast(x), model(x))
    assert stage.hits


def test_parts_that_the_graph_does_not_stand_for(counts):
    model, fast, stage = optimized(APART["linear"])
    (graph,) = type(fast)._fxbt_dispatcher._graphs
    asked = []

    def guards(*tensors: Tensor) -> None:
        asked.append(len(tensors[0]))
        assert len(tensors[0]) > 2

    monkeypatched = graph.run._guards
    graph.run._guards = guards
    x = torch.randn(5, LENGTH, SIZE)
    compare(fast(x), model(x))
    graph.run._guards = monkeypatched
    assert asked == [3, 2]


def test_a_changed_weight_is_seen(counts):
    model, fast, _ = optimized(APART["linear"])
    x = torch.randn(4, LENGTH, SIZE)
    fast(x)
    model.after.weight.mul_(2.0)
    compare(fast(x), model(x))


def test_with_gradients_batches_are_whole(counts):
    model = Reader(APART["linear"])
    with torch.enable_grad():
        fast: Any = fxbt.optimize(model, (torch.randn(3, LENGTH, SIZE),))
        fast(torch.randn(3, LENGTH, SIZE)).sum().backward()
    assert not counts
