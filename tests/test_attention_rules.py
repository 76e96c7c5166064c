"""The four attention rules, each alone: what it takes and leaves to the others, numbers, a graph before and after."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tracing import graph_of

import fxbt
from fxbt.graph.canonical import canonicalize
from fxbt.patterns import Attention, CalledAttention, SinkAttention, SoftmaxAttention, WrittenOutAttention
from fxbt.testing import assert_rewrites, assert_untouched

HEADS, DIM = 2, 4
RULES = {rule.__name__: rule for rule in (SoftmaxAttention, SinkAttention, WrittenOutAttention, CalledAttention)}


class Model(nn.Module):
    """Projections, then `attend(query, key, value, sink)` with tensors (batch, heads, seq, head_dim)."""

    def __init__(self, attend: Callable[..., Tensor], key_heads: int = HEADS):
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.query = nn.Linear(8, HEADS * DIM)
        self.key, self.value = nn.Linear(8, key_heads * DIM), nn.Linear(8, key_heads * DIM)
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.attend(*parts, self.sink)


def future(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)


def plain(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return (q @ k.mT / 2).masked_fill(future(q, k), -1e9).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)


def with_bias(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return (sink.view(-1, 1, 1) * future(q, k) + q * 0.5 @ k.mT).softmax(-1) @ v


def joined_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    column = sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([q @ k.mT * 0.5, column], -1).softmax(-1)[..., :-1] @ v


def sink_first(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    column = sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([column, q @ k.mT * 0.5], -1).softmax(-1)[..., 1:] @ v


def factor_of_a_sink(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    scores = q @ k.mT * 0.5
    return scores.softmax(-1) @ v * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink.view(-1, 1, 1))


def softcap(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT * 0.5 / 5.0) * 5.0).masked_fill(future(q, k), -1e9).softmax(-1) @ v


def weak_fill(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(future(q, k), -100.0).softmax(-1) @ v


def called_causally(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~future(q, k))


def called_with_expanded_heads(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    k, v = k.repeat_interleave(HEADS, 1), v.repeat_interleave(HEADS, 1)
    return F.scaled_dot_product_attention(q, k, v)


SPELLINGS = {
    "SoftmaxAttention": (plain, by_einsum, with_bias),
    "SinkAttention": (joined_sink, sink_first, factor_of_a_sink),
    "WrittenOutAttention": (softcap, weak_fill),
    "CalledAttention": (called_causally, called_with_expanded_heads),
}
CASES = [(rule, attend) for rule, spellings in SPELLINGS.items() for attend in spellings]
MAKES = {"WrittenOutAttention": "attention_by_products"}


def model_of(attend: Callable[..., Tensor]) -> Model:
    return Model(attend, 1 if attend is called_with_expanded_heads else HEADS).eval()


def anchor_of(model: Model) -> fx.Node:
    module = graph_of(model, torch.randn(2, 5, 8))
    canonicalize(module)
    anchors = fxbt.attentions.SOFTMAX | {fxbt.ops.SDPA}
    (anchor,) = (node for node in module.graph.nodes if node.target in anchors)
    return anchor


@pytest.mark.parametrize(("rule", "attend"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_one_rule_takes_it(rule: str, attend: Callable[..., Tensor]) -> None:
    anchor = anchor_of(model_of(attend))
    with torch.no_grad():
        assert RULES[rule]().find(anchor).replaces
        others = [other for name, other in RULES.items() if name != rule and anchor.target in other.targets]
        for other in others:
            with pytest.raises(fxbt.Miss, match="another attention rule handles this softmax"):
                other().find(anchor)


@pytest.mark.parametrize(("rule", "attend"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_its_numbers(rule: str, attend: Callable[..., Tensor]) -> None:
    inputs = torch.randn(2, 5, 8), torch.randn(1, 7, 8), torch.randn(3, 4, 8)
    report = assert_rewrites(RULES[rule](), model_of(attend), *((x,) for x in inputs), times=1)
    assert MAKES.get(rule, "sdpa(") in report.after


@pytest.mark.parametrize("rule", SPELLINGS)
def test_golden(rule: str, golden: Callable[[str, str], None]) -> None:
    attend = SPELLINGS[rule][0]
    report = assert_rewrites(RULES[rule](), model_of(attend), (torch.randn(2, 5, 8),), times=1)
    golden(f"attention_{attend.__name__}", f"== before\n{report.before}\n== after\n{report.after}")


NEAR_MISSES = {
    "weights along the queries": lambda q, k, v, sink: (q @ k.mT).softmax(-2) @ v,
    "a product over the queries": lambda q, k, v, sink: (q @ k.mT).softmax(-1).mT @ v,
    "weights squared": lambda q, k, v, sink: (q @ k.mT).softmax(-1).square() @ v,
    "two sinks": lambda q, k, v, sink: (
        torch.cat([q @ k.mT, sink.expand(*q.shape[:3], HEADS)], -1).softmax(-1)[..., :-HEADS] @ v
    ),
    "a sink that keeps its weight": lambda q, k, v, sink: (
        torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1) @ torch.cat([v, v[:, :, :1]], 2)
    ),
    "a softcap after the mask": lambda q, k, v, sink: (q @ k.mT).masked_fill(future(q, k), -1e9).tanh().softmax(-1) @ v,
    "two softcaps": lambda q, k, v, sink: (q @ k.mT).tanh().tanh().softmax(-1) @ v,
    "a factor on each key": lambda q, k, v, sink: (q @ k.mT * k.sum(-1).unsqueeze(2)).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    assert_untouched(Attention(), Model(NEAR_MISSES[name]).eval(), (torch.randn(2, 5, 8),))


def test_a_mask_that_hides_more_stays() -> None:
    def window(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        near = ~future(q, k) & (future(q, k).mT.cumsum(-1) < 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near)

    with torch.no_grad():
        match = CalledAttention().find(anchor_of(Model(window).eval()))
    assert not match.replaces, "found, and left as it is"


def test_infinite_fills_that_mask_whole_rows_stay_zero() -> None:
    """SDPA's -inf gives 0 in a row without keys; a finite fill the mean of the values."""

    def nothing(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(torch.ones_like(future(q, k)), -1e9).softmax(-1) @ v

    model = Model(nothing).eval()
    assert_rewrites(Attention(), model, (torch.randn(2, 5, 8),), times=1)
    x = torch.randn(2, 5, 8)
    mean = model.value(x).unflatten(-1, (-1, DIM)).transpose(1, 2).mean(2, keepdim=True)
    torch.testing.assert_close(model(x), mean.expand(-1, -1, 5, -1))
    assert math.isfinite(float(model(x).sum()))
