"""Ways of writing attention. Each one is real attention, so each one must be found, and must stay equal.

A spelling is a function of a `Projected` module and its inputs; `@spelling` wraps it in a module with projections
before and after it, so that the layouts around the attention are as in real models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS, DIM = 32, 4, 8
CONTEXT = 32
FINFO_MIN = torch.finfo(torch.float32).min

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Spelling:
    """One way of writing attention.

    Attributes:
        make: a new module with fixed weights, in eval mode.
        inputs: (batch, seq) -> keyword arguments.
        attentions: how many attentions one forward makes.
        found: how many of them the built-in rules take.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    attentions: int = 1
    found: int = 1

    def __str__(self) -> str:
        return self.name


class Projected(nn.Module):
    """Projections, buffers and small parameters for `attend(self, x, ...)`, and a projection of what it returns."""

    triangle: Tensor

    def __init__(self, attend: Callable[..., Tensor], kv_heads: int):
        super().__init__()
        self.attend = attend
        self.q = nn.Linear(HIDDEN, HIDDEN)
        self.k, self.v = (nn.Linear(HIDDEN, kv_heads * DIM) for _ in range(2))
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.1)
        self.q_norm, self.k_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.distance = nn.Embedding(2 * CONTEXT, HEADS)
        self.head_scale = nn.Parameter(torch.tensor([0.2, 0.3, 0.4, 0.5]))
        self.head_mask = nn.Parameter(torch.tensor([1.0, 0.0, 0.5, 2.0]))
        self.probe = nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.register_buffer("triangle", torch.ones(CONTEXT, CONTEXT).tril())

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.out(self.attend(self, x, **others))


class WithMask(Projected):
    """`Projected` with a (batch, seq) padding mask, 1 = real."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.out(self.attend(self, x, mask))


class WithMemory(Projected):
    """`Projected` with a second sequence (batch, length, hidden) to attend to."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        return self.out(self.attend(self, x, memory))


class Alone(Projected):
    """`Projected` of x alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.out(self.attend(self, x))


def _states(batch: int, seq: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 10 * batch + seq)
    return 1.5 * torch.randn(batch, seq, HIDDEN, generator=generator)


def alone(batch: int, seq: int) -> Inputs:
    """x of (batch, seq, hidden)."""
    return {"x": _states(batch, seq, 1)}


def with_mask(batch: int, seq: int) -> Inputs:
    """x and a right-padded mask whose later rows are shorter."""
    length = seq - torch.arange(batch).clamp(max=seq - 1)[:, None]
    return {"x": _states(batch, seq, 1), "mask": (torch.arange(seq)[None] < length).long()}


def with_memory(batch: int, seq: int) -> Inputs:
    """x and a memory three positions longer."""
    return {"x": _states(batch, seq, 1), "memory": _states(batch, seq + 3, 2)}


SPELLINGS: list[Spelling] = []
INPUTS: dict[type[Projected], Callable[[int, int], Inputs]] = {
    Alone: alone,
    WithMask: with_mask,
    WithMemory: with_memory,
}


def spelling(
    kind: type[Projected] = Alone, *, attentions: int = 1, found: int | None = None, kv_heads: int = HEADS
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as a spelling under its own name."""

    def register(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make() -> nn.Module:
            torch.manual_seed(3)
            module = kind(attend, kv_heads)
            for linear in (module.q, module.k, module.v, module.qkv, module.out):
                nn.init.normal_(linear.weight, std=1.3 / math.sqrt(HIDDEN))
            return module.eval()

        SPELLINGS.append(
            Spelling(attend.__name__, make, INPUTS[kind], attentions, attentions if found is None else found)
        )
        return attend

    return register


def split(tensor: Tensor, heads: int = HEADS) -> Tensor:
    """[b, s, h*d] -> [b, h, s, d]"""
    return tensor.view(tensor.shape[0], tensor.shape[1], heads, -1).transpose(1, 2)


def join(tensor: Tensor) -> Tensor:
    """[b, h, s, d] -> [b, s, h*d]"""
    return tensor.transpose(1, 2).reshape(tensor.shape[0], tensor.shape[2], -1)


def projections(m: Projected, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [b, h, s, d]."""
    return split(m.q(x)), split(m.k(x)), split(m.v(x))


def fold(tensor: Tensor) -> Tensor:
    """[b, s, h*d] -> [b*h, s, d]"""
    batch, seq, _ = tensor.shape
    return tensor.reshape(batch, seq, HEADS, DIM).permute(0, 2, 1, 3).reshape(batch * HEADS, seq, DIM)


def unfold(tensor: Tensor, batch: int) -> Tensor:
    """[b*h, s, d] -> [b, s, h*d]"""
    return tensor.unflatten(0, (batch, HEADS)).transpose(1, 2).flatten(2)


# --- layouts and contractions -------------------------------------------------------------------------------


@spelling()
def matmul_method(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join((q.matmul(k.transpose(-1, -2)) / math.sqrt(DIM)).softmax(dim=-1).matmul(v))


@spelling()
def matmul_operator_functional(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join(F.softmax(q @ k.mT * DIM**-0.5, dim=3) @ v)


@spelling()
def key_permuted_at_once(m: Any, x: Tensor) -> Tensor:
    batch, seq, _ = x.shape
    q = m.q(x).view(batch, seq, HEADS, DIM).permute(0, 2, 1, 3)
    k = m.k(x).view(batch, seq, HEADS, DIM).permute(0, 2, 3, 1)
    v = m.v(x).view(batch, seq, HEADS, DIM).permute(0, 2, 1, 3)
    weights = torch.softmax(torch.matmul(q, k) / DIM**0.5, -1)
    return (weights @ v).permute(0, 2, 1, 3).contiguous().view(batch, seq, HIDDEN)


@spelling()
def bmm_folded_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = fold(m.q(x) * DIM**-0.5), fold(m.k(x)), fold(m.v(x))
    return unfold(torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v), x.shape[0])


@spelling()
def bmm_folded_heads_behind_an_empty_cache(m: Any, x: Tensor) -> Tensor:
    """TrOCR: no view has asked before whether there is more than one query; joining with nothing asked otherwise."""
    batch, seq, _ = x.shape
    q, k, v = m.q(x) * DIM**-0.5, m.k(x), m.v(x)
    k, v = (torch.cat([torch.tensor([]), t.view(batch, -1, HEADS, DIM).transpose(1, 2)], dim=-2) for t in (k, v))
    q = q.view(batch, seq, HEADS, DIM).transpose(1, 2)
    q, k, v = (t.reshape(batch * HEADS, -1, DIM) for t in (q, k, v))
    context = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return context.view(batch, HEADS, seq, DIM).transpose(1, 2).reshape(batch, seq, HIDDEN)


@spelling(WithMask)
def baddbmm_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    batch, seq, _ = x.shape
    bias = (1.0 - mask.float())[:, None, None, :] * -1e9
    bias = bias.expand(batch, HEADS, seq, seq).reshape(batch * HEADS, seq, seq)
    q, k, v = fold(m.q(x)), fold(m.k(x)), fold(m.v(x))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=DIM**-0.5)
    return unfold(scores.softmax(-1).bmm(v), batch)


@spelling()
def baddbmm_beta_zero(m: Any, x: Tensor) -> Tensor:
    batch, seq, _ = x.shape
    nothing = x.new_zeros(batch * HEADS, seq, seq)
    q, k, v = fold(m.q(x)), fold(m.k(x)), fold(m.v(x))
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0.0, alpha=DIM**-0.5)
    return unfold(scores.softmax(-1).bmm(v), batch)


@spelling()
def einsum_bqhd(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (HEADS, DIM)) for p in (m.q, m.k, m.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(DIM**0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


@spelling()
def einsum_scores_bkqh(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (HEADS, DIM)) for p in (m.q, m.k, m.v))
    scores = torch.einsum("bqhd,bkhd->bkqh", q, k) * DIM**-0.5
    return torch.einsum("bkqh,bkhd->bqhd", scores.softmax(dim=1), v).flatten(2)


@spelling()
def einsum_scores_bqkh(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (HEADS, DIM)) for p in (m.q, m.k, m.v))
    scores = torch.einsum("b i h d, b j h d -> b i j h", q, k) * DIM**-0.5
    return torch.einsum("bijh,bjhd->bihd", scores.softmax(dim=-2), v).flatten(2)


@spelling()
def einsum_heads_first(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (HEADS, DIM)).permute(2, 0, 1, 3) for p in (m.q, m.k, m.v))
    weights = torch.einsum("hbid,hbjd->hbij", q, k).mul(DIM**-0.5).softmax(-1)
    return torch.einsum("hbij,hbjd->hbid", weights, v).permute(1, 2, 0, 3).flatten(2)


@spelling()
def einsum_ellipsis(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    weights = torch.einsum("...qd,...kd->...qk", q * DIM**-0.5, k).softmax(-1)
    return join(torch.einsum("...qk,...kd->...qd", weights, v))


@spelling()
def sequence_first(m: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    seq, batch, _ = x.shape
    q, k, v = (p(x).reshape(seq, batch * HEADS, DIM).transpose(0, 1) for p in (m.q, m.k, m.v))
    weights = torch.bmm(q * DIM**-0.5, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).transpose(0, 1).reshape(seq, batch, HIDDEN).transpose(0, 1)


@spelling()
def transposed_value_times_weights(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    weights = (k @ q.mT * DIM**-0.5).softmax(dim=-2)
    return join((v.mT @ weights).mT)


@spelling()
def broadcast_multiply_and_sum(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1) * DIM**-0.5
    return join((scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(3))


@spelling()
def tensordot_free_heads_on_last_axis(m: Any, x: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (DIM, HEADS)).permute(0, 3, 1, 2) for p in (m.q, m.k, m.v))
    weights = torch.softmax(q @ k.transpose(2, 3) * DIM**-0.5, dim=-1)
    return (weights @ v).permute(0, 2, 3, 1).reshape(x.shape)


@spelling()
def without_heads(m: Any, x: Tensor) -> Tensor:
    weights = F.softmax(m.q(x) @ m.k(x).transpose(1, 2) / math.sqrt(HIDDEN), dim=-1)
    return weights @ m.v(x)


@spelling()
def chunked_heads_concatenated(m: Any, x: Tensor) -> Tensor:
    scores = split(m.q(x)) @ split(m.k(x)).mT * DIM**-0.5
    context = F.softmax(scores, dim=-1) @ split(m.v(x))
    return torch.cat([head.squeeze(1) for head in context.split(1, dim=1)], dim=-1)


@spelling()
def sdpa_call(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join(F.scaled_dot_product_attention(q, k, v))


@spelling(WithMask)
def sdpa_call_boolean_mask_and_scale(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    keep = mask.bool()[:, None, None, :]
    return join(F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.2))


# --- scale ------------------------------------------------------------------------------------------------------


@spelling()
def no_scale(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join((q @ k.mT).softmax(-1) @ v)


@spelling()
def scale_on_query_and_key(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    root = DIM**-0.25
    return join(((q * root) @ (k * root).mT).softmax(-1) @ v)


@spelling()
def scale_on_key(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join((q @ (k / DIM**0.5).mT).softmax(-1) @ v)


@spelling()
def scale_before_the_heads(m: Any, x: Tensor) -> Tensor:
    q = split(m.q(x) * 0.5)
    return join((q @ split(m.k(x)).mT).softmax(-1) @ split(m.v(x)))


@spelling()
def scale_in_the_weights(m: Any, x: Tensor) -> Tensor:
    q = split(F.linear(x, m.q.weight * DIM**-0.5, m.q.bias * DIM**-0.5))
    return join((q @ split(m.k(x)).mT).softmax(-1) @ split(m.v(x)))


@spelling()
def scale_as_tensor(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join((q @ k.mT / torch.sqrt(torch.tensor(float(DIM)))).softmax(-1) @ v)


@spelling()
def scale_from_shape(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join(((q @ k.mT) / (q.size(-1) ** 0.5)).softmax(-1) @ v)


@spelling()
def scale_per_head(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join((q @ k.mT * m.head_scale[None, :, None, None]).softmax(-1) @ v)


@spelling()
def scale_twice_and_negated(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join(F.softmin(-(q * 2.0) @ k.mT / 4.0, dim=-1) @ v)


# --- masks and biases -------------------------------------------------------------------------------------------


@spelling(WithMask)
def additive_finfo_min(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * FINFO_MIN
    return join((q @ k.mT * DIM**-0.5 + bias).softmax(-1) @ v)


@spelling(WithMask)
def boolean_masked_fill(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = (q @ k.mT * DIM**-0.5).masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    return join(scores.softmax(-1) @ v)


@spelling(WithMask)
def masked_fill_in_place(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = q @ k.mT
    scores.mul_(DIM**-0.5).masked_fill_(~mask.bool()[:, None, None, :], FINFO_MIN)
    return join(scores.softmax(-1) @ v)


@spelling(WithMask)
def torch_where(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    lowest = torch.full([], FINFO_MIN, dtype=scores.dtype)
    return join(torch.where(mask.bool()[:, None, None, :], scores, lowest).softmax(-1) @ v)


@spelling(WithMask)
def weights_zeroed_after_softmax(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    padded = mask.bool().logical_not()[:, None, None, :]
    scores = (q @ k.mT * DIM**-0.5).masked_fill(padded, FINFO_MIN)
    return join(scores.softmax(-1).masked_fill(padded, 0.0) @ v)


@spelling()
def causal_buffer(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    seq = x.shape[1]
    scores = (q @ k.mT * DIM**-0.5).masked_fill(m.triangle[:seq, :seq] == 0, float("-inf"))
    return join(scores.softmax(-1) @ v)


@spelling()
def causal_triu_added(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    future = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(diagonal=1)
    return join((q @ k.mT * DIM**-0.5 + future).softmax(-1) @ v)


@spelling()
def causal_behind_a_temperature(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    seq = x.shape[1]
    scores = q @ k.mT * m.head_scale.view(1, -1, 1, 1)
    return join(scores.masked_fill(m.triangle[:seq, :seq] == 0, FINFO_MIN).softmax(-1) @ v)


@spelling(WithMask)
def causal_arange_and_padding(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    position = torch.arange(x.shape[1])
    keep = (position[:, None] >= position[None, :])[None, None] & mask.bool()[:, None, None, :]
    return join((q @ k.mT * DIM**-0.5).masked_fill(~keep, -1e9).softmax(-1) @ v)


@spelling()
def relative_bias(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    position = torch.arange(x.shape[1])
    bias = m.distance(position[None, :] - position[:, None] + CONTEXT).permute(2, 0, 1)
    return join((q @ k.mT * DIM**-0.5 + bias).softmax(-1) @ v)


@spelling()
def alibi(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    bias = slopes[:, None, None] * torch.arange(x.shape[1])[None, None, :]
    return join((q @ k.mT * DIM**-0.5 + bias).softmax(-1) @ v)


@spelling()
def bias_then_scale(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    position = torch.arange(x.shape[1])
    bias = -(position[None, :] - position[:, None]).abs().to(x.dtype)
    return join(((bias + q @ k.mT) * DIM**-0.5).softmax(-1) @ v)


@spelling(WithMask)
def query_dependent_relative_bias(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """A bias made of the query, not of the scores (DeBERTa's and XLNet's way)."""
    q, k, v = projections(m, x)
    position = torch.arange(x.shape[1])
    table = m.distance(position[None, :] - position[:, None] + CONTEXT)
    bias = torch.einsum("bhid,ijh->bhij", q, table) + (1 - mask[:, None, None, :]) * -1e9
    return join((q @ k.mT * DIM**-0.5 + bias).softmax(-1) @ v)


# --- heads ------------------------------------------------------------------------------------------------------


@spelling()
def bias_shaped_like_the_scores(m: Any, x: Tensor) -> Tensor:
    """SAM: the scores lend their shape to what is added to them."""
    q, k, v = (t.flatten(0, 1) for t in projections(m, x))
    scores = (q * DIM**-0.5) @ k.mT
    by_query = torch.einsum("bqd,kd->bqk", q, m.distance.weight[: x.shape[1], :1].expand(-1, DIM))
    weights = (scores + by_query.reshape_as(scores)).softmax(-1)
    return join((weights @ v).unflatten(0, (-1, HEADS)))


@spelling(kv_heads=2)
def grouped_heads_expanded(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    batch, _, seq, _ = k.shape
    k, v = (t[:, :, None].expand(batch, 2, 2, seq, DIM).reshape(batch, HEADS, seq, DIM) for t in (k, v))
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling(kv_heads=2)
def grouped_heads_repeat_interleave(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling(kv_heads=2)
def grouped_heads_tiled(m: Any, x: Tensor) -> Tensor:
    """Head h uses key head h % 2 (x-transformers): the groups stand outside of the key heads."""
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    batch, _, seq, _ = k.shape
    k, v = (t[:, None].expand(-1, 2, -1, -1, -1).reshape(batch, HEADS, seq, DIM) for t in (k, v))
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5
    return join(torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v))


@spelling(kv_heads=2)
def grouped_heads_five_dims(m: Any, x: Tensor) -> Tensor:
    q = split(m.q(x)).unflatten(1, (2, 2))
    k, v = split(m.k(x), 2).unsqueeze(2), split(m.v(x), 2).unsqueeze(2)
    return join(((q @ k.mT * DIM**-0.5).softmax(-1) @ v).flatten(1, 2))


@spelling(kv_heads=2)
def grouped_heads_einsum(m: Any, x: Tensor) -> Tensor:
    q = m.q(x).unflatten(-1, (2, 2, DIM))
    k, v = m.k(x).unflatten(-1, (2, DIM)), m.v(x).unflatten(-1, (2, DIM))
    weights = torch.einsum("bqngd,bknd->bngqk", q, k).mul(DIM**-0.5).softmax(-1)
    return torch.einsum("bngqk,bknd->bqngd", weights, v).flatten(2)


@spelling(kv_heads=1)
def multi_query(m: Any, x: Tensor) -> Tensor:
    q, k, v = split(m.q(x)), m.k(x).unsqueeze(1), m.v(x).unsqueeze(1)
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling(kv_heads=1)
def multi_query_folded(m: Any, x: Tensor) -> Tensor:
    """All heads' queries as one long query sequence (BigCode's way)."""
    batch, seq, _ = x.shape
    q = m.q(x).view(batch, seq * HEADS, DIM)
    weights = torch.softmax(torch.bmm(q, m.k(x).transpose(1, 2)) * DIM**-0.5, dim=-1)
    return torch.bmm(weights, m.v(x)).view(batch, seq, HIDDEN)


# --- where q, k and v come from ---------------------------------------------------------------------------------


@spelling(WithMemory)
def cross_attention(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    q, k, v = split(m.q(x)), split(m.k(memory)), split(m.v(memory))
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling(WithMemory)
def concatenated_memory(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    everything = torch.cat([memory, x], dim=1)
    q, k, v = split(m.q(x)), split(m.k(everything)), split(m.v(everything))
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling()
def fused_qkv_chunk(m: Any, x: Tensor) -> Tensor:
    q, k, v = (split(t) for t in m.qkv(x).chunk(3, dim=-1))
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling()
def fused_qkv_split(m: Any, x: Tensor) -> Tensor:
    q, k, v = (split(t) for t in torch.split(m.qkv(x), HIDDEN, dim=2))
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling()
def fused_qkv_five_dims_unbind(m: Any, x: Tensor) -> Tensor:
    batch, seq, _ = x.shape
    q, k, v = m.qkv(x).reshape(batch, seq, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return join((q * DIM**-0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v)


@spelling()
def fused_qkv_indexed(m: Any, x: Tensor) -> Tensor:
    batch, seq, _ = x.shape
    qkv = m.qkv(x).view(batch, seq, HEADS, 3, DIM).permute(3, 0, 2, 1, 4)
    return join((qkv[0] @ qkv[1].mT * DIM**-0.5).softmax(-1) @ qkv[2])


@spelling()
def fused_qkv_slices_per_head(m: Any, x: Tensor) -> Tensor:
    qkv = m.qkv(x).unflatten(-1, (HEADS, 3 * DIM)).transpose(1, 2)
    q, k, v = qkv[..., :DIM], qkv[..., DIM : 2 * DIM], qkv[..., 2 * DIM :]
    return join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling()
def query_and_key_normalised(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join((m.q_norm(q) @ m.k_norm(k).mT * DIM**-0.5).softmax(-1) @ v)


@spelling()
def cosine_similarity(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return join((scores * m.head_scale.exp().view(1, HEADS, 1, 1)).softmax(-1) @ v)


def _rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cos + torch.cat((-second, first), dim=-1) * sin


@spelling()
def rotary(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    frequency = 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
    angle = torch.arange(x.shape[1])[:, None] * frequency[None, :]
    cos, sin = (torch.cat([t, t], dim=-1) for t in (angle.cos(), angle.sin()))
    return join((_rotate(q, cos, sin) @ _rotate(k, cos, sin).mT * DIM**-0.5).softmax(-1) @ v)


@spelling(WithMemory)
def pooled_by_one_query(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    probe = m.probe.expand(memory.shape[0], -1, -1)
    q, k, v = split(m.q(probe)), split(m.k(memory)), split(m.v(memory))
    return x + join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)


@spelling(WithMemory, attentions=2)
def two_attentions_share_keys(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    k, v = split(m.k(memory)), split(m.v(memory))
    first = (split(m.q(x)) @ k.mT * DIM**-0.5).softmax(-1) @ v
    second = (split(x) @ k.mT * DIM**-0.5).softmax(-1) @ v
    return join(first) + join(second)


@spelling(attentions=2)
def one_attention_after_another(m: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        q, k, v = projections(m, x)
        x = x + join((q @ k.mT * DIM**-0.5).softmax(-1) @ v)
    return x


# --- softmax and what follows it --------------------------------------------------------------------------------


@spelling()
def softmax_module_and_dropout(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join(m.dropout(nn.Softmax(dim=-1)(q @ k.mT * DIM**-0.5)) @ v)


@spelling()
def softmax_in_float32(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    return join(F.softmax(scores.float(), dim=-1, dtype=torch.float32).type_as(scores).to(q.dtype) @ v)


@spelling()
def softmax_by_exp_and_sum(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return join(powers / powers.sum(dim=-1, keepdim=True) @ v)


@spelling()
def softmax_of_scores_less_their_maximum(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    return join((scores - scores.max(dim=-1, keepdim=True).values).softmax(-1) @ v)


@spelling()
def weights_with_two_values(m: Any, x: Tensor) -> Tensor:
    """Of other widths, and in another layout."""
    q, k, v = projections(m, x)
    weights = (q @ k.mT * DIM**-0.5).softmax(-1)
    narrow = torch.einsum("bhij,bjhd->bihd", weights, v.transpose(1, 2)[..., :2] * 3.0)
    return join(weights @ v) + F.pad(narrow, (0, DIM - 2)).flatten(2)


@spelling(WithMask, attentions=2, found=1)
def differential_attention(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Two attentions with equal scores, of half of the value's heads each (DiffLlama's eager way)."""
    q, k, v = projections(m, x)
    bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * -1e9
    halves = [half.repeat(1, 2, 1, 1) for half in v.chunk(2, dim=1)]
    first, second = torch.cat([(q @ k.mT * DIM**-0.5 + bias).softmax(-1) @ half for half in halves], -1).chunk(2, dim=1)
    return join(torch.cat([first - 0.3 * second, first], dim=1)[..., :DIM])


@spelling()
def biases_whose_sizes_are_equal_by_a_guard(m: Any, x: Tensor) -> Tensor:
    """ProphetNet: cuts of a table side by side, min(64, s) + min(64, s + 32) - 32 columns for 2 * s keys."""
    seq = x.shape[1]
    q, k, v = projections(m, x)
    k, v = torch.cat([k, k.flip(2)], dim=2), torch.cat([v, v.flip(1)], dim=2)
    table = torch.cat([m.triangle, m.triangle.T], dim=1)
    near, far = (torch.cat([table[:seq, :seq], table[:seq, start : start + seq]], dim=1) for start in (8, CONTEXT))
    return join((q @ k.mT * DIM**-0.5 + near - far).softmax(-1) @ v)


@spelling()
def head_mask_after_softmax(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    weights = (q @ k.mT * DIM**-0.5).softmax(-1)
    return join(weights * m.head_mask.view(1, -1, 1, 1) @ v)


@spelling()
def head_mask_on_context(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join(((q @ k.mT * DIM**-0.5).softmax(-1) @ v) * m.head_mask.view(1, -1, 1, 1))


@spelling(WithMask)
def queries_gated_after_softmax(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join((q @ k.mT * DIM**-0.5).softmax(-1) * mask[:, None, :, None] @ v)


@spelling()
def attention_sink(m: Any, x: Tensor) -> Tensor:
    """A learned extra score a head that takes weight and gives no value (GPT-OSS's way)."""
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    sink = m.head_scale.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return join(torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] @ v)


@spelling(WithMask)
def attention_sink_first_behind_a_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = (q @ k.mT * DIM**-0.5).masked_fill(mask[:, None, None, :] == 0, FINFO_MIN)
    scores = torch.cat([scores.new_zeros(*scores.shape[:-1], 1), scores], dim=-1)
    return join((scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., 1:] @ v)


@spelling()
def attention_sink_as_a_factor(m: Any, x: Tensor) -> Tensor:
    """exp(S) / (sum(exp(S)) + exp(sink)) = softmax(S) * sigmoid(logsumexp(S) - sink) (Granite's way)."""
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    factor = (scores.logsumexp(-1) - m.head_scale.view(1, -1, 1)).sigmoid()
    return join(m.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype)) @ v * factor.unsqueeze(-1).to(v.dtype))


@spelling(WithMask, kv_heads=2)
def attention_sink_as_a_factor_behind_a_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """One sink for each query, grouped heads, right or left of the product, in another layout."""
    q, k, v = split(m.q(x)), split(m.k(x), 2), split(m.v(x), 2)
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.mT * DIM**-0.5).masked_fill((mask[:, None, None, :] == 0) | later, FINFO_MIN)
    sink = m.distance(torch.arange(x.shape[1])).T[None, :, :, None]
    factor = (scores.logsumexp(-1, keepdim=True) - sink).sigmoid()
    return (factor.transpose(1, 2) * (scores.softmax(-1) @ v).transpose(1, 2)).flatten(2)


@spelling(found=0)
def attention_sink_that_gives_value(m: Any, x: Tensor) -> Tensor:
    """The joined score has a value of its own: no sink."""
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    weights = torch.cat([scores, m.head_scale.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1).softmax(-1)
    return join(weights @ torch.cat([v, v[:, :, :1]], dim=2))


# --- as image and text libraries write it ---------------------------------------------------------------------


@spelling()
def cosine_with_clamped_temperature(m: Any, x: Tensor) -> Tensor:
    """Swin v2: unit queries and keys, a learned temperature a head."""
    q, k, v = projections(m, x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return join((scores * m.head_scale.view(-1, 1, 1).clamp(max=math.log(100.0)).exp()).softmax(-1) @ v)


@spelling()
def normed_queries_fused_and_unbound(m: Any, x: Tensor) -> Tensor:
    """timm: one projection, unbound, norms on queries and keys, the scale on the query."""
    batch, seq, _ = x.shape
    q, k, v = m.qkv(x).reshape(batch, seq, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((m.q_norm(q) * DIM**-0.5) @ m.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
    return (m.dropout(weights) @ v).transpose(1, 2).reshape(batch, seq, HIDDEN)


@spelling()
def sequence_first_fused_with_triangle(m: Any, x: Tensor) -> Tensor:
    """open_clip's text tower: [length, batch, width], heads folded into the batch, a causal float mask."""
    batch, seq, _ = x.shape
    q, k, v = F.linear(x.transpose(0, 1), m.qkv.weight, m.qkv.bias).chunk(3, dim=-1)
    q, k, v = (t.contiguous().view(seq, batch * HEADS, DIM).transpose(0, 1) for t in (q, k, v))
    mask = torch.full((seq, seq), float("-inf")).triu(1)
    weights = (torch.bmm(q, k.transpose(1, 2)) * DIM**-0.5 + mask).softmax(dim=-1)
    return torch.bmm(weights, v).transpose(0, 1).reshape(seq, batch, HIDDEN).transpose(0, 1)


@spelling(kv_heads=1)
def one_key_head_and_learned_memory(m: Any, x: Tensor) -> Tensor:
    """x-transformers: one key head without an axis, and learned keys and values in front."""
    q, k, v = split(m.q(x)), m.k(x), m.v(x)
    memory = m.probe[..., :DIM].expand(x.shape[0], -1, -1)
    k, v = torch.cat([memory, k], dim=1), torch.cat([memory * 2, v], dim=1)
    weights = (torch.einsum("bhid,bjd->bhij", q, k) * DIM**-0.5).softmax(-1)
    return join(torch.einsum("bhij,bjd->bhid", weights, v))


@spelling()
def class_token_attends(m: Any, x: Tensor) -> Tensor:
    """CaiT: one query, all keys."""
    q, k, v = split(m.q(x[:, :1])), split(m.k(x)), split(m.v(x))
    return join((q * DIM**-0.5 @ k.mT).softmax(-1) @ v).expand(-1, x.shape[1], -1)


@spelling(found=0)
def talking_heads(m: Any, x: Tensor) -> Tensor:
    """Heads mixed before the softmax: no sum over the head's own dimension alone."""
    q, k, v = projections(m, x)
    mix = m.head_scale[:, None] * m.head_mask[None, :]
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT * DIM**-0.5, mix)
    return join(scores.softmax(-1) @ v)


@spelling()
def multihead_attention_function(m: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        x,
        x,
        x,
        HIDDEN,
        HEADS,
        m.qkv.weight,
        m.qkv.bias,
        None,
        None,
        False,
        0.0,
        m.out.weight,
        m.out.bias,
        training=False,
        need_weights=False,
    )
    return out.transpose(0, 1)


# --- idioms that people ask about -------------------------------------------------------------------------------


def masked_scores(m: Projected, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores, v, and True [b, 1, 1, k] where a key may be seen."""
    q, k, v = projections(m, x)
    return q @ k.mT * DIM**-0.5, v, mask.bool()[:, None, None, :]


@spelling(WithMask)
def where_full_like(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    return join(torch.where(keep, scores, torch.full_like(scores, FINFO_MIN)).softmax(-1) @ v)


@spelling(WithMask)
def where_ones_like_first(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    return join(torch.where(~keep, torch.ones_like(scores) * -1e9, scores).softmax(-1) @ v)


@spelling(WithMask)
def nan_to_num_of_weights(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    return join(scores.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num(0.0) @ v)


@spelling(WithMask)
def weights_filled_where_nan(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    weights = scores.masked_fill(~keep, -math.inf).softmax(-1)
    return join(weights.masked_fill(weights.isnan(), 0.0) @ v)


@spelling(WithMask)
def weights_times_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    return join((scores.masked_fill(~keep, FINFO_MIN).softmax(-1) * keep) @ v)


@spelling(WithMask)
def weights_times_mask_of_numbers(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, _ = masked_scores(m, x, mask)
    weights = scores.masked_fill(mask[:, None, None, :] == 0, -1e9).softmax(-1)
    return join((weights * (mask != 0).float()[:, None, None]) @ v)


@spelling(WithMask)
def scores_times_mask_plus_its_rest(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    return join((scores * keep.float() + (1 - keep.float()) * -1e9).softmax(-1) @ v)


@spelling(WithMask)
def scores_times_mask_less_its_rest(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    real = 1.0 - (~keep).float()
    return join((scores * real - 1e9 * (1.0 - real)).softmax(-1) @ v)


@spelling(WithMask)
def assigned_by_index(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    scores[(~keep).expand_as(scores)] = -math.inf
    return join(scores.softmax(-1) @ v)


@spelling()
def assigned_by_index_of_the_last_dims(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores, place = q @ k.mT * DIM**-0.5, torch.arange(x.shape[1])
    scores[:, :, place[:, None] < place] = -math.inf
    return join(scores.softmax(-1) @ v)


@spelling(WithMask)
def fill_of_minus_ten_thousand(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    return join(scores.masked_fill(~keep, -1e4).softmax(-1) @ v)


@spelling(WithMask)
def fill_of_minus_a_hundred_million(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    scores, v, keep = masked_scores(m, x, mask)
    return join(scores.masked_fill(~keep, -1e8).softmax(-1) @ v)


@spelling(WithMemory)
def keys_of_a_memory_and_own_keys_apart(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    old_k, old_v = split(m.k(memory)), split(m.v(memory))
    weights = torch.cat([q @ old_k.mT, q @ k.mT], -1).mul(DIM**-0.5).softmax(-1)
    old = memory.shape[1]
    return join(weights[..., :old] @ old_v + weights[..., old:] @ v)


@spelling(WithMemory)
def keys_apart_scaled_apart_and_weights_split(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    old_k, old_v = split(m.k(memory[:, :2])), split(m.v(memory[:, :2]))
    weights = torch.cat([q @ old_k.mT / 2.0, q @ k.mT / 2.0], -1).softmax(-1)
    old, own = weights.split([2, x.shape[1]], -1)
    return join(own @ v + old @ old_v)


@spelling()
def exponentials_divided_by_their_sum(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    weights = torch.exp(q @ k.mT * DIM**-0.5)
    return join((weights / weights.sum(-1, keepdim=True)) @ v)


@spelling()
def exponentials_divided_after_the_value(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    weights = torch.exp(q @ k.mT * DIM**-0.5)
    return join((weights @ v) / weights.sum(-1, keepdim=True))


@spelling()
def flash_attention_in_one_block(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return join(torch.einsum("bhqk,bhkd->bhqd", weights, v) * weights.sum(-1)[..., None].reciprocal())


@spelling()
def exponential_of_log_softmax(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    return join(F.log_softmax(q @ k.mT * DIM**-0.5, -1).exp() @ v)


@spelling()
def exponential_less_the_logsumexp(m: Any, x: Tensor) -> Tensor:
    q, k, v = projections(m, x)
    scores = q @ k.mT * DIM**-0.5
    return join(torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v)
