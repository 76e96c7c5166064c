"""Attention as it stands in a graph: chains of steps on scores, roles of axes, what masks prove."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from tracing import graph_of, nodes, returned

import fxbt
from fxbt import Miss, attentions, axes, scores
from fxbt.graph.canonical import canonicalize
from fxbt.patterns import SoftmaxAttention

aten = torch.ops.aten
SHAPE = (2, 3, 5, 4)  # batch, heads, seq, head_dim


def operands() -> list[Tensor]:
    return [torch.randn(*SHAPE) for _ in range(3)]


def softmax_of(function: Callable[..., Tensor], *tensors: Tensor) -> fx.Node:
    module = graph_of(function, *tensors)
    canonicalize(module)
    (softmax,) = (node for node in module.graph.nodes if node.target in attentions.SOFTMAX)
    return softmax


def read(softmax: fx.Node) -> list[attentions.Attention]:
    """The attentions around a softmax, as the pattern of the attention rules finds them."""
    (found,) = SoftmaxAttention().matcher.find(softmax)
    return attentions.attentions_of(found)


def attention(chain: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: chain(q @ k.transpose(-1, -2)).softmax(-1) @ v


def causal(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


CHAINS = {
    "nothing": (lambda s: s, []),
    "a scale": (lambda s: s / 2, [scores.Scale]),
    "a negated scale": (lambda s: -s, [scores.Scale]),
    "a bias": (lambda s: s + torch.arange(5.0), [scores.Add]),
    "a bias, then a scale": (lambda s: (s + torch.arange(5.0)) * 0.5, [scores.Add, scores.Scale]),
    "a scale, a fill": (lambda s: (s * 0.5).masked_fill(~causal(s), -1e9), [scores.Scale, scores.Fill]),
    "a fill by where": (lambda s: torch.where(causal(s), s, -math.inf), [scores.Fill]),
    "a factor per query": (lambda s: s * torch.arange(1.0, 6.0)[:, None], [scores.ScaleBy]),
    "a softcap": (lambda s: torch.tanh(s / 50) * 50, [scores.Scale, scores.Tanh, scores.Scale]),
    "layout between": (lambda s: (s.transpose(1, 2) * 0.5).transpose(1, 2), [scores.Scale]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_steps_come_innermost_first(name: str) -> None:
    chain, expected = CHAINS[name]
    (found,) = read(softmax_of(attention(chain), *operands()))
    assert [type(step) for step in found.steps] == expected
    assert [node.name for node in (found.query, found.key, found.value)] == ["args_0", "args_1", "args_2"]


REFUSED = {
    "a factor along the keys": (lambda s: s * torch.arange(1.0, 6.0), "varies along the keys"),
    "a curve": (lambda s: s.exp(), "not a scale, bias, mask or cast"),
    "a floor that scores reach": (lambda s: s.clamp(min=-1.0), "not a scale, bias, mask or cast"),
    "a rounding division": (lambda s: torch.div(s, 2, rounding_mode="floor"), "not a scale, bias, mask or cast"),
    "a coarser dtype": (lambda s: s.bfloat16().float(), "coarser"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_step_is_refused(name: str) -> None:
    chain, reason = REFUSED[name]
    with pytest.raises(Miss, match=reason):
        read(softmax_of(attention(chain), *operands()))


def test_axes_have_the_names_of_their_roles() -> None:
    (found,) = read(softmax_of(attention(lambda s: s * 0.5), *operands()))
    layout = attentions.layout_of(found)
    assert layout.named("batch heads seq head_dim") == axes.resolve(found.query_axes)
    assert layout.named("batch key_heads keys value_dim") == axes.resolve(found.value_axes)
    assert layout.named("batch 1 seq 1")[1::2] == ((), ())
    assert not layout.groups


def test_heads_of_the_query_that_share_a_key_head_are_groups() -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bgrqk,bgkd->bgrqd", torch.einsum("bgrqd,bgkd->bgrqk", q, k).softmax(-1), v)

    tensors = torch.randn(2, 3, 6, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    (found,) = read(softmax_of(grouped, *tensors))
    layout = attentions.layout_of(found)
    assert [atom.size for atom in layout.groups] == [6]
    assert not set(layout.groups) & set(axes.atoms_of(found.key_axes))


def proven(chain: Callable[[Tensor], Tensor]) -> scores.Unmasked | None:
    (found,) = read(softmax_of(attention(chain), *operands()))
    return attentions.proven_mask(found, attentions.layout_of(found), found.steps)


def test_what_a_mask_proves() -> None:
    assert proven(lambda s: s.masked_fill(~causal(s), -math.inf)) == (True, ())
    assert proven(lambda s: s.masked_fill(torch.zeros(5, 5, dtype=torch.bool), -math.inf)) == (False, ())
    assert proven(lambda s: s.masked_fill(causal(s), -math.inf)) is None, "earlier keys"
    assert proven(lambda s: s.masked_fill(~causal(s), -100.0)) is None, "does not mask every possible score"
    assert proven(lambda s: s.masked_fill(~causal(s), -math.inf) + torch.arange(5.0)) is None, "a bias besides"


def test_what_sdpa_cannot_express() -> None:
    def reason(chain: Callable[[Tensor], Tensor]) -> str | None:
        (found,) = read(softmax_of(attention(chain), *operands()))
        return scores.beyond_sdpa(found.steps, found.dtype)

    assert reason(lambda s: s * 2 + torch.arange(5.0)) is None
    assert reason(lambda s: s.masked_fill(~causal(s), -1e9)) is None
    assert "softcapped" in str(reason(lambda s: s.tanh()))
    assert "does not mask every possible score" in str(reason(lambda s: s.masked_fill(~causal(s), -100.0)))


def test_scores_that_are_read_elsewhere_are_not_closed() -> None:
    def leaking(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        inner = q @ k.transpose(-1, -2)
        return inner.softmax(-1) @ v, inner

    softmax = softmax_of(leaking, *operands())
    with pytest.raises(Miss, match="used elsewhere"):
        read(softmax)


def test_a_call_of_sdpa_is_read_alike() -> None:
    module = graph_of(torch.nn.functional.scaled_dot_product_attention, *operands())
    (call,) = nodes(module, fxbt.ops.SDPA)
    (found,) = attentions.from_sdpa(call)
    assert found.scale == 0.5 and found.output is call and not found.steps


# --- what rules ask of values -----------------------------------------------------------------------------------


def masked(mask: Callable[[Tensor], Tensor]) -> fx.Node:
    module = graph_of(
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask(q)), *operands()
    )
    return nodes(module, fxbt.ops.SDPA)[0]


def test_is_causal() -> None:
    assert fxbt.is_causal(masked(lambda q: torch.ones(5, 5, dtype=torch.bool).tril()))
    assert fxbt.is_causal(masked(lambda q: torch.where(torch.ones(5, 5, dtype=torch.bool).tril(), 0.0, -math.inf)))
    assert fxbt.is_causal(masked(lambda q: torch.ones(5, 5, dtype=torch.bool).tril(-1))), "and hides more"
    assert not fxbt.is_causal(masked(lambda q: torch.ones(5, 5, dtype=torch.bool).tril(1))), "one key later"
    assert not fxbt.is_causal(masked(lambda q: torch.ones(5, 5, dtype=torch.bool).triu()))
    assert not fxbt.is_causal(masked(lambda q: q.sum(-1, keepdim=True) > 0)), "data proves nothing"


def test_nearest_sources_stop_at_the_first_and_at_barriers() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.linear(x, w).tanh(), w).exp() + x.sin()

    module = graph_of(function, torch.randn(2, 4), torch.randn(4, 4))
    inner, outer = nodes(module, aten.linear.default)
    result = returned(module)
    assert fxbt.nearest_sources(result, {aten.linear.default}) == [outer]
    assert fxbt.nearest_sources(outer.args[0], {aten.linear.default}) == [inner]
    assert fxbt.nearest_sources(result, {aten.linear.default}, barriers={aten.exp.default}) == []
    assert fxbt.nearest_sources(3.0, {aten.linear.default}) == []


def test_operands_are_laid_out_by_the_names_of_their_axes() -> None:
    module = graph_of(lambda x: x.sin(), torch.randn(2, 3, 4))
    (node,) = (node for node in module.graph.nodes if node.op == "placeholder")
    labels = axes.fresh(node)
    names = dict(zip(("a", "b", "c"), labels, strict=True))

    def named(text: str) -> axes.Axes:
        return tuple(() if name == "1" else names[name] for name in text.split())

    tensor = torch.randn(2, 3, 4)
    operands = fxbt.Operands([tensor], {node: 0}, [labels], named)
    assert torch.equal(operands(node, labels, "c a 1 b"), tensor.permute(2, 0, 1).unsqueeze(2))
    assert torch.equal(operands.back(operands(node, labels, "b c a"), "b c a", labels), tensor)
