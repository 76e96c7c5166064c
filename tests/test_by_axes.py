"""Patterns whose axes have names: `op.contract`, `op.softmax(over=)`, `op.steps`, and replacements laid out by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tracing import graph_of

import fxbt
from fxbt.graph.canonical import canonicalize
from fxbt.patterns import Attention
from fxbt.rewrite.trace_key import match_key
from fxbt.testing import assert_rewrites, assert_untouched

HEADS, DIM = 2, 4


class KernelAttention(fxbt.Rule):
    """(Q K^T) V  ->  Q (K^T V): attention without a softmax, linear in the length

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", equation 6.
    """

    name = "kernel_attention"

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        scores = op.contract("... q d, ... k d -> ... q k", query, key)
        return op.contract("... q k, ... k v -> ... q v", scores, value)

    def check(self, m: fxbt.Found) -> None:
        m.need(isinstance(m.size("d"), int) and not isinstance(m.size("k"), int), "the keys may be as few as channels")

    def replace(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert query.shape[-1] == key.shape[-1] == DIM, "laid out as the pattern says, whatever the model's layout"
        return query @ (key.mT @ value)


class UnscaledAttention(fxbt.Rule):
    """softmax(Q K^T) V, with nothing in between"""

    name = "unscaled_attention"

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        weights = op.softmax(op.contract("... q d, ... k d -> ... q k", query, key), over="k")
        return op.contract("... q k, ... k v -> ... q v", weights, value)

    def replace(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)


class ScaledAttention(fxbt.Rule):
    """softmax(c Q K^T) V, whatever the scale is spelled like"""

    name = "scaled_attention"

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        scores = op.steps(op.contract("... q d, ... k d -> ... q k", query, key), "scores")
        return op.contract("... q k, ... k v -> ... q v", op.softmax(scores, over="k"), value)

    def check(self, m: fxbt.Found) -> None:
        m.need(all(isinstance(step, fxbt.scores.Scale) for step in m.scores), "more than scales")
        m.bind(scale=fxbt.scores.scale_of(m.scores) * m.readings[0].factor)

    def replace(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


class Model(nn.Module):
    """Projections to (batch, seq, heads, head_dim), then `attend`, which gives (batch, seq, hidden)."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Any]):
        super().__init__()
        torch.manual_seed(0)
        self.attend = attend
        self.query, self.key, self.value = (nn.Linear(8, HEADS * DIM) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        return self.attend(*(layer(x).unflatten(-1, (HEADS, DIM)) for layer in (self.query, self.key, self.value)))


Between = Callable[[Tensor], Tensor]


def by_matmul(q: Tensor, k: Tensor, v: Tensor, between: Between) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (between(q @ k.mT) @ v).transpose(1, 2).flatten(2)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, between: Between) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", between(torch.einsum("bqhd,bkhd->bhqk", q, k)), v).flatten(2)


def by_bmm(q: Tensor, k: Tensor, v: Tensor, between: Between) -> Tensor:
    merged = [t.transpose(1, 2).reshape(-1, t.shape[1], DIM) for t in (q, k, v)]
    context = torch.bmm(between(torch.bmm(merged[0], merged[1].transpose(1, 2))), merged[2])
    return context.view(q.shape[0], HEADS, -1, DIM).transpose(1, 2).flatten(2)


def heads_first(q: Tensor, k: Tensor, v: Tensor, between: Between) -> Tensor:
    q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
    return (between(q @ k.mT) @ v).permute(1, 2, 0, 3).flatten(2)


def by_sum(q: Tensor, k: Tensor, v: Tensor, between: Between) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = between((q.unsqueeze(3) * k.unsqueeze(2)).sum(-1))
    return (scores @ v).transpose(1, 2).flatten(2)


SPELLINGS = (by_matmul, by_einsum, by_bmm, heads_first, by_sum)
SHAPES = ((2, 5, 8), (3, 7, 8), (1, 4, 8))
INPUTS = [(torch.randn(*shape),) for shape in SHAPES]


def model_of(spelling: Any, between: Between) -> Model:
    return Model(lambda q, k, v: spelling(q, k, v, between)).eval()


def last(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_contractions_in_any_layout(spelling: Any) -> None:
    assert_rewrites(KernelAttention(), model_of(spelling, lambda s: s), *INPUTS, times=1)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_softmax_over_a_named_axis(spelling: Any) -> None:
    rule = UnscaledAttention()
    rule.name = "first"  # before the built-in ones, which would take it
    assert_rewrites(rule, model_of(spelling, last), *INPUTS, times=1)


@pytest.mark.parametrize("between", [lambda s: (s / 2).softmax(-1), lambda s: (-s * 0.5).neg().softmax(-1), last])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_steps_in_between(spelling: Any, between: Between) -> None:
    assert_rewrites(ScaledAttention(), model_of(spelling, between), *INPUTS, times=1)


def test_golden(golden: Callable[[str, str], None]) -> None:
    report = assert_rewrites(KernelAttention(), model_of(by_bmm, lambda s: s), INPUTS[0], times=1)
    golden("by_axes_kernel_attention", f"== before\n{report.before}\n== after\n{report.after}")


def test_an_axis_that_one_operand_lacks() -> None:
    """One key head for all query heads: an axis of the query alone."""

    def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhqk,bkd->bqhd", torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]), v[:, :, 0])

    assert_rewrites(KernelAttention(), Model(one_key_head).eval(), *INPUTS, times=1)


def test_changed_weights_and_gradients() -> None:
    model = model_of(by_bmm, lambda s: s)
    fast = fxbt.optimize(model, rules=[KernelAttention()])
    for _ in range(2):
        (x,) = INPUTS[0]
        actual, expected = fast(x), model(x)
        torch.testing.assert_close(actual, expected)
        (actual_gradient,) = torch.autograd.grad(actual.square().sum(), [model.key.weight])
        (gradient,) = torch.autograd.grad(expected.square().sum(), [model.key.weight])
        torch.testing.assert_close(actual_gradient, gradient)
        with torch.no_grad():
            model.key.weight.mul_(0.5)
    assert fast.report.hits["kernel_attention"] == 1
    assert not fast.report.fallbacks


NEAR_MISSES = {
    "a scale": (KernelAttention, lambda s: s * 0.5, "not a plain product"),
    "a curve": (KernelAttention, lambda s: s.relu(), "not a plain product"),
    "a softmax over the queries": (
        UnscaledAttention,
        lambda s: s.softmax(-2),
        "not sum over exactly",
    ),
    "a scale before": (UnscaledAttention, lambda s: (s * 0.5).softmax(-1), "not a plain product"),
    "a scale after": (
        UnscaledAttention,
        lambda s: s.softmax(-1) * 2,
        "that the pattern does not have",
    ),
    "a bias": (ScaledAttention, lambda s: (s + torch.arange(s.shape[-1])).softmax(-1), "more than scales"),
    "a curve before": (
        ScaledAttention,
        lambda s: s.exp().softmax(-1),
        "not a scale, bias, mask or cast",
    ),
    "transposed weights": (
        UnscaledAttention,
        lambda s: s.softmax(-1).mT,
        "not sum over exactly",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    rule, between, reason = NEAR_MISSES[name]
    report = assert_untouched(rule(), model_of(by_matmul, between), INPUTS[0])
    reasons = [miss.reason for miss in report.misses if miss.rule == rule.name]
    assert any(reason in given for given in reasons), reasons


def test_another_axis_is_summed() -> None:
    def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (q @ k.mT).mT @ v  # the queries are summed over: K (Q^T V) by another name

    model = Model(over_queries).eval()
    assert_rewrites(KernelAttention(), model, *INPUTS, times=1)  # names are only names: q and k change places

    def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhqk,bkhd->bqd", torch.einsum("bqhd,bkhd->bhqk", q, k), v)

    assert_untouched(KernelAttention(), Model(over_heads).eval(), INPUTS[0])


class NamedBatch(KernelAttention):
    """The same without "...": one batch axis for all operands."""

    name = "named_batch"

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        scores = op.contract("b q d, b k d -> b q k", query, key)
        return op.contract("b q k, b k v -> b q v", scores, value)

    def replace(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.bmm(query, torch.bmm(key.mT, value))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_named_axis_stands_for_several(spelling: Any) -> None:
    assert_rewrites(NamedBatch(), model_of(spelling, lambda s: s), *INPUTS, times=1)


def test_an_axis_without_a_name() -> None:
    def one_value_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhqk,bkd->bqhd", torch.einsum("bqhd,bkhd->bhqk", q, k), v[:, :, 0])

    model = Model(one_value_head).eval()
    report = assert_untouched(NamedBatch(), model, INPUTS[0])
    assert any("is not an axis of" in miss.reason for miss in report.misses)
    assert_rewrites(KernelAttention(), model, *INPUTS, times=1)


class Weights(fxbt.Rule):
    """softmax(Q K^T), the weights themselves, as a softmax by hand"""

    name = "weights"

    def pattern(self, op: Any, query: Any, key: Any) -> Any:
        return op.softmax(op.contract("... q d, ... k d -> ... q k", query, key), over="k")

    def replace(self, query: Tensor, key: Tensor) -> Tensor:
        exponentials = (query @ key.mT).exp()
        return exponentials / exponentials.sum(-1, keepdim=True)


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_softmax_alone(dim: int) -> None:
    """Over the queries too: that is the axis k of the pattern, then."""

    def weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(dim)

    report = assert_rewrites(Weights(), Model(weights).eval(), *INPUTS, times=1)
    assert "[weights]" in report.after, "and canonical: a softmax again"


def test_a_value_inside_that_is_read_elsewhere() -> None:
    def leaking(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q.transpose(1, 2) @ k.transpose(1, 2).mT
        return scores @ v.transpose(1, 2), scores

    assert_untouched(KernelAttention(), Model(leaking).eval(), INPUTS[0], reason="the scores are used elsewhere too")


def test_several_products_of_the_same_weights() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT).softmax(-1)
        other = v.sin()
        return weights @ v, weights @ other

    reason = "several products read the same weights"
    assert_untouched(UnscaledAttention(), Model(twice).eval(), INPUTS[0], reason=reason)
    assert_rewrites(Attention(), Model(twice).eval(), *INPUTS, times=1)


# --- what a pattern says ------------------------------------------------------------------------------------------


def rule_of(pattern: Callable[..., Any]) -> fxbt.Rule:
    class Given(fxbt.Rule):
        name = "given"

        def replace(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    Given.pattern = lambda self, op, x, y: pattern(op, x, y)  # type: ignore[assignment, misc]
    return Given()


WRONG = {
    "no arrow": (lambda op, x, y: op.contract("a b, b c", x, y), "an equation like"),
    "three operands": (lambda op, x, y: op.contract("a b, b c, c d -> a d", x, y), "an equation like"),
    "an axis twice": (lambda op, x, y: op.contract("a a, a b -> b", x, y), "names an axis twice"),
    "an axis that only one operand has": (
        lambda op, x, y: op.contract("a b c, c d -> a d", x, y),
        "that only one operand has",
    ),
    "an axis of neither": (
        lambda op, x, y: op.contract("a b, b c -> a d c", x, y),
        "that only one operand has|that neither has",
    ),
    "nothing is summed": (lambda op, x, y: op.contract("a b, b c -> a b c", x, y), "sums over 0 axes"),
    "two axes are summed": (lambda op, x, y: op.contract("a b c, b c d -> a d", x, y), "sums over 2 axes"),
    "a curve inside": (
        lambda op, x, y: op.contract("a b, b c -> a c", op.tanh(x), y),
        "must be a variable",
    ),
    "a variable twice": (
        lambda op, x, y: op.contract("a b, b c -> a c", op.contract("a d, d b -> a b", x, y), y),
        "once",
    ),
    "steps on a variable": (lambda op, x, y: op.contract("a b, b c -> a c", op.steps(x, "s"), y), "not"),
    "a curve around": (lambda op, x, y: op.tanh(op.contract("a b, b c -> a c", x, y)), "op.contract"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_a_pattern(name: str) -> None:
    pattern, reason = WRONG[name]
    with pytest.raises(fxbt.RuleError, match=reason):
        fxbt.optimize(Model(lambda q, k, v: q), rules=[rule_of(pattern)])


def test_the_attention_rules_share_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rules speak of a softmax; its graph is read once."""
    unwind, read = fxbt.scores.unwind, []

    def counting(node: fx.Node, *others: Any) -> Any:
        read.append(node)
        return unwind(node, *others)

    attention = Attention()
    monkeypatch.setattr(fxbt.scores, "unwind", counting)
    assert len({rule.formula.outputs for rule in attention.rules[:3]}) == 1
    report = assert_rewrites(attention, model_of(by_matmul, lambda s: s.tanh().softmax(-1)), *INPUTS, times=1)
    assert "attention_by_products" in report.after, "the third rule took it"
    starts = [node for node in read if node.op == "call_function" and node.target is torch.ops.aten.tanh.default]
    assert len(starts) == 1


@pytest.mark.parametrize("between", [last, lambda s: (s.tanh() * 5 + torch.arange(s.shape[-1])).softmax(-1)])
def test_equal_layers_share_one_trace(between: Between) -> None:
    """What `replace` gets of an attention is comparable, so that a model of twelve layers traces it once."""

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attended = by_matmul(q, k, v, between).unflatten(-1, (HEADS, DIM))
        return by_matmul(attended, attended, attended, between)

    module = graph_of(Model(twice).eval(), torch.randn(*SHAPES[0]))
    canonicalize(module)
    with torch.no_grad():
        softmaxes = [node for node in module.graph.nodes if node.target in fxbt.attentions.SOFTMAX]
        matches = [Attention().find(softmax) for softmax in softmaxes]
    assert len(matches) == 2
    assert all(match_key(match) is not None for match in matches)
