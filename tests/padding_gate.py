"""Modules in which dropping padding would be wrong, or right only for some calls: each with its reason.

All are variations of one small encoder that packs: `Net` with another embedding, mask, mixer between its layers, or
head. `REFUSED` must stay dense, `GUARDED` must pack and go dense where `breaks` says so. `PACKED` are the spellings of
a mask that pack always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from models import PAD, VOCAB, EinsumAttention, MultiheadSelfAttention, PlainModel, Sizes, TorchEncoder, enliven
from torch import Tensor, nn

LOWEST = torch.finfo(torch.float32).min
HIDDEN, HEADS, CONTEXT = 16, 2, 16

Mask = Callable[[Tensor, Tensor], Tensor | None]  # (validity [b, s], x) -> an SDPA mask
Mixer = Callable[["Net", Tensor, Tensor], Any]  # (net, x, validity) -> x or outputs


def additive(mask: Tensor, x: Tensor) -> Tensor:
    """What most models do: finfo.min where the key is padding."""
    return (1.0 - mask[:, None, None, :].to(x.dtype)) * LOWEST


def unchanged(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """Two layers of masked attention; `mask`, `mix` (after the first layer) and `head` vary."""

    def __init__(
        self, mask: Mask = additive, mix: Mixer = unchanged, head: Mixer = unchanged, second: Mask | None = None
    ):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.norm = nn.LayerNorm(HIDDEN)
        self.score = nn.Linear(HIDDEN, 1)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(HIDDEN)
        self.factor = nn.Parameter(torch.tensor(-3.0))
        self.register_buffer("wall", torch.zeros(CONTEXT, CONTEXT).fill_diagonal_(LOWEST))
        self.register_buffer("door", torch.full((CONTEXT,), LOWEST).index_fill(0, torch.tensor([3]), 0.0))
        self._variation = (mask, second or mask, mix, head)

    def attention(self, layer: int, x: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv[layer](x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
        return x + self.out[layer](mixed.transpose(1, 2).flatten(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        first, second, mix, head = self._variation
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        x = self.attention(0, x, first(attention_mask, x))
        x = mix(self, self.norm(x), attention_mask)
        x = self.attention(1, x, second(attention_mask, x))
        return head(self, self.norm(x), attention_mask)


@dataclass
class Case:
    """One variation. `reason` is part of what the report must say."""

    name: str
    build: Callable[[], nn.Module]
    reason: str
    inputs: Callable[[Tensor, Tensor], dict[str, Tensor]] = field(
        default=lambda ids, mask: {"input_ids": ids, "attention_mask": mask}
    )
    breaks: Callable[[Tensor], bool] = field(default=lambda mask: True)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return enliven(self.build()).to(self.dtype)

    @property
    def tolerance(self) -> float:
        """Of the outputs' magnitude: a few roundings of the dtype."""
        return max(2e-5, 4 * torch.finfo(self.dtype).eps)


REFUSED: list[Case] = []
GUARDED: list[Case] = []
PACKED: list[Case] = []


def refuse(name: str, reason: str, **variation: Any) -> None:
    REFUSED.append(Case(name, lambda: Net(**variation), reason))


def guard(name: str, reason: str, breaks: Callable[[Tensor], bool], **variation: Any) -> None:
    GUARDED.append(Case(name, lambda: Net(**variation), reason, breaks=breaks))


def pack(name: str, dtype: torch.dtype = torch.float32, **variation: Any) -> None:
    PACKED.append(Case(name, lambda: Net(**variation), "", dtype=dtype))


MIXES = "mixes tokens, including padded ones"
UNKNOWN = "not known to keep tokens apart"
SUMS = "sums over batch or tokens"
UNMASKED = "padding is not masked out of the attention"
CUTS = "a view cuts across the axes"

# --- heads that see padding -------------------------------------------------------------------------------------

refuse("mean", MIXES, head=lambda net, x, mask: x.mean(1))
refuse("sum", MIXES, head=lambda net, x, mask: x.sum(1))
refuse("mean of everything", MIXES, head=lambda net, x, mask: x.relu().mean())  # behind a norm x alone would cancel
refuse("max", MIXES, head=lambda net, x, mask: x.max(1).values)
refuse("amin", MIXES, head=lambda net, x, mask: x.amin(1))
refuse("variance", MIXES, head=lambda net, x, mask: x.var(1))
refuse("standard deviation", MIXES, head=lambda net, x, mask: x.std(1))
refuse("norm over tokens", MIXES, head=lambda net, x, mask: torch.linalg.vector_norm(x, dim=1))
refuse("logsumexp", MIXES, head=lambda net, x, mask: x.logsumexp(1))
refuse("softmax over tokens", MIXES, head=lambda net, x, mask: net.score(x).squeeze(-1).softmax(-1))
refuse("log_softmax over tokens", MIXES, head=lambda net, x, mask: net.score(x).squeeze(-1).log_softmax(-1))
refuse("attention pooling", MIXES, head=lambda net, x, mask: (net.score(x).softmax(1) * x).sum(1))
refuse("best position", MIXES, head=lambda net, x, mask: net.score(x).squeeze(-1).argmax(-1))
refuse("top positions", MIXES, head=lambda net, x, mask: net.score(x).squeeze(-1).topk(2, dim=-1).values)
refuse("mean over the batch", MIXES, head=lambda net, x, mask: x - x.mean(0, keepdim=True))
refuse("softmax over the batch", MIXES, head=lambda net, x, mask: x.softmax(0))
refuse("median", UNKNOWN, head=lambda net, x, mask: x.median(1).values)
refuse("flattened", "an op", head=lambda net, x, mask: torch.linalg.vector_norm(x.flatten(1), dim=1))
refuse("any over tokens", MIXES, head=lambda net, x, mask: (x > 0).any(1))
refuse("gram matrix of tokens", "pairs of tokens", head=lambda net, x, mask: x @ x.transpose(1, 2))
refuse("gram matrix of features", SUMS, head=lambda net, x, mask: x.transpose(1, 2) @ x)
refuse("einsum over tokens", SUMS, head=lambda net, x, mask: torch.einsum("bsd,bse->bde", x, x))
refuse("einsum over all", SUMS, head=lambda net, x, mask: torch.einsum("bsd,bse->de", x, x))
refuse("distances of tokens", UNKNOWN, head=lambda net, x, mask: torch.cdist(x, x))
refuse("every second token", "a range of positions", head=lambda net, x, mask: x[:, ::2])
refuse("all but the first token", "a range of positions", head=lambda net, x, mask: x[:, 1:])
refuse("mean of all but the first", "a range of positions", head=lambda net, x, mask: x[:, 1:].mean(1))
refuse("positions from a parameter", "an op", head=lambda net, x, mask: x.index_select(1, torch.arange(2)))
refuse("loss over all positions", "an op", head=lambda net, x, mask: F.cross_entropy(x.flatten(0, 1), mask.flatten()))
refuse("loss against zero", UNKNOWN, head=lambda net, x, mask: F.mse_loss(x, torch.zeros_like(x)))
refuse("length of the padded row", MIXES, head=lambda net, x, mask: x.sum(1) / x.shape[1])
refuse("a mean over the inverted mask", MIXES, head=lambda net, x, mask: (x * (1 - mask)[..., None]).sum(1))
refuse("a mean over a shifted mask", MIXES, head=lambda net, x, mask: (x * mask.roll(1, 1)[..., None]).sum(1))
refuse("a mean over a soft mask", MIXES, head=lambda net, x, mask: (x * (mask + 0.5)[..., None]).sum(1))
refuse("a mean over another row's mask", MIXES, head=lambda net, x, mask: (x * mask.flip(0)[..., None]).sum(1))
refuse("a product with an inverted mask", SUMS, head=lambda net, x, mask: (1.0 - mask.float())[:, None] @ x)
refuse(
    "a max filled where tokens are", MIXES, head=lambda net, x, mask: x.masked_fill(mask[..., None] == 1, 0.0).amax(1)
)
refuse("tokens repeated", UNKNOWN, head=lambda net, x, mask: x.repeat(1, 2, 1).sum(1))
refuse("pairs of tokens", "an op", head=lambda net, x, mask: (x[:, :, None] * x[:, None]).sum((1, 2)))

# --- mixers between the layers ----------------------------------------------------------------------------------

refuse("convolution", "convolution mixes tokens", mix=lambda net, x, mask: net.conv(x.transpose(1, 2)).transpose(1, 2))
refuse("average pooling", UNKNOWN, mix=lambda net, x, mask: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2))
refuse(
    "max pooling",
    "the mask has a fixed batch or length",
    mix=lambda net, x, mask: F.max_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
)
refuse("running sum", MIXES, mix=lambda net, x, mask: x.cumsum(1))
refuse("running product", UNKNOWN, mix=lambda net, x, mask: x.cumprod(1))
refuse("running maximum", UNKNOWN, mix=lambda net, x, mask: x.cummax(1).values)
refuse("sorted", MIXES, mix=lambda net, x, mask: x.sort(1).values)
refuse("reversed", MIXES, mix=lambda net, x, mask: x.flip(1))
refuse("rolled", UNKNOWN, mix=lambda net, x, mask: x.roll(1, 1))
refuse("rolled over the batch", UNKNOWN, mix=lambda net, x, mask: x.roll(1, 0))
refuse("Fourier transform", UNKNOWN, mix=lambda net, x, mask: torch.fft.fft(x, dim=1).real)
refuse("Fourier transform of both", UNKNOWN, mix=lambda net, x, mask: torch.fft.fft2(x).real)
refuse("shifted", "an op", mix=lambda net, x, mask: x + F.pad(x, (0, 0, 1, -1)))
refuse("first token last", "range of positions", mix=lambda net, x, mask: torch.cat([x[:, 1:], x[:, :1]], 1))
refuse("batch statistics", "statistics over the batch", mix=lambda net, x, mask: batch_statistics(x))
refuse("instance norm", "an op", mix=lambda net, x, mask: F.instance_norm(x.transpose(1, 2)).transpose(1, 2))
refuse("centred over tokens", MIXES, mix=lambda net, x, mask: x - x.mean(1, keepdim=True))
refuse("squeeze and excite", MIXES, mix=lambda net, x, mask: x * x.mean(1, keepdim=True).sigmoid())
refuse("unmasked attention by hand", UNMASKED, mix=lambda net, x, mask: x + (x @ x.transpose(1, 2)).softmax(-1) @ x)
refuse("unmasked linear attention", SUMS, mix=lambda net, x, mask: x + x.relu() @ (x.relu().transpose(1, 2) @ x))
refuse("scrambled by a view", CUTS, mix=lambda net, x, mask: x.reshape(x.shape[1], x.shape[0], -1).transpose(0, 1))
refuse("unmasked second attention", UNMASKED, mix=lambda net, x, mask: net.attention(1, x, None))
refuse(
    "attention over the batch",
    "attention",
    mix=lambda net, x, mask: net.attention(1, x.transpose(0, 1), None).transpose(0, 1),
)


def batch_statistics(x: Tensor) -> Tensor:
    return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


def attention_with_sink(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    """Each head may look away: one more score, a number of its own, takes weight and gives nothing."""
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in net.qkv[1](x).chunk(3, dim=-1))
    scores = query @ key.transpose(-1, -2) + additive(mask, x)
    sink = net.factor.reshape(1, 1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return x + (weights @ value).transpose(1, 2).flatten(2)


refuse("an attention sink", "an attention sink", mix=attention_with_sink)


def softcapped(before: Mask | None, after: Mask | None) -> Mixer:
    """Attention on 2 tanh((scores + before) / 2) + after."""

    def mix(net: Net, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in net.qkv[1](x).chunk(3, dim=-1))
        scores = query @ key.transpose(-1, -2)
        scores = 2 * torch.tanh((scores + before(mask, x) if before else scores) / 2)
        scores = scores + after(mask, x) if after else scores
        return x + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    return mix


SEVERAL = "several biases"
refuse("a softcap without a mask", UNMASKED, mix=softcapped(None, None))
refuse("a softcap on a mask", SEVERAL, mix=softcapped(additive, None))
refuse("a softcap between masks", SEVERAL, mix=softcapped(additive, additive))
refuse("a softcap under a weak mask", UNMASKED, mix=softcapped(None, lambda mask, x: -50.0 * (1 - mask[:, None, None])))
refuse(
    "a token put in front",
    MIXES,
    mix=lambda net, x, mask: torch.cat([net.tokens.weight[:1].expand(x.shape[0], 1, -1), x], 1)[:, :-1],
)
refuse("written at a position", "an op", mix=lambda net, x, mask: x.index_fill(1, torch.tensor([1]), 0.0))

# --- masks that do not hide padding -----------------------------------------------------------------------------


def filled(value: float) -> Mask:
    return lambda mask, x: (1.0 - mask[:, None, None, :].to(x.dtype)) * value


def boolean(see: Callable[[Tensor], Tensor]) -> Mask:
    """A mask that is True where `see(mask)` [b, 1, q|1, k]."""
    return lambda mask, x: see(mask.bool()).expand(-1, 1, mask.shape[1], -1)


def half_the_heads(mask: Tensor, x: Tensor) -> Tensor:
    heads = torch.arange(HEADS)[None, :, None, None] < HEADS // 2
    return additive(mask, x) * heads.to(x.dtype)


def diagonal(length: int) -> Tensor:
    return torch.arange(length)[:, None] == torch.arange(length)


refuse("no mask", "no attention is masked", mask=lambda mask, x: None)
refuse("no mask in the second layer", UNMASKED, second=lambda mask, x: None)
refuse("-10000", UNMASKED, mask=filled(-10000.0))
refuse("-5", UNMASKED, mask=filled(-5.0))
refuse(
    "a learned fill",
    UNMASKED,
    mix=lambda net, x, mask: net.attention(1, x, (1.0 - mask[:, None, None].to(x.dtype)) * net.factor),
)
refuse("inverted", UNMASKED, mask=lambda mask, x: mask[:, None, None, :].to(x.dtype) * LOWEST)
refuse(
    "queries instead of keys",
    "no attention is masked",
    mask=lambda mask, x: (1.0 - mask[:, None, :, None].to(x.dtype)) * LOWEST,
)
refuse(
    "queries in the second layer", UNMASKED, second=lambda mask, x: (1.0 - mask[:, None, :, None].to(x.dtype)) * LOWEST
)
refuse("another row's mask", "", mask=lambda mask, x: additive(mask.flip(0), x))
refuse("another row's mask in the second layer", UNMASKED, second=lambda mask, x: additive(mask.flip(0), x))
refuse("a shifted mask", UNMASKED, second=lambda mask, x: additive(mask.roll(1, 1), x))
refuse("the first row's mask", UNMASKED, second=lambda mask, x: additive(mask[:1], x))
refuse("half the heads", UNMASKED, mask=half_the_heads)
refuse("a soft mask", UNMASKED, mask=lambda mask, x: mask[:, None, None, :].to(x.dtype) - 1.0)
refuse(
    "the first key seen by all", UNMASKED, mask=boolean(lambda m: m[:, None, None] | (torch.arange(m.shape[1]) == 0))
)
refuse(
    "past keys seen by all",
    UNMASKED,
    mask=boolean(lambda m: m[:, None, None] | torch.ones(m.shape[1], m.shape[1], dtype=torch.bool).tril()),
)
refuse("window without the mask", UNMASKED, second=boolean(lambda m: m[:, None, :, None] | m[:, None, None]))
refuse(
    "blind to itself",
    "a valid token may not see itself",
    mask=lambda mask, x: additive(mask, x) + diagonal(mask.shape[1]).to(x.dtype) * LOWEST,
)
refuse("counted mask", UNMASKED, second=lambda mask, x: additive((mask.cumsum(1) > 0).long(), x))
refuse(
    "scores that block",
    "adds a term that may itself be a mask",
    mix=lambda net, x, mask: net.attention(
        1, x, additive(mask, x) * 1e-29 + F.threshold(x @ x.transpose(1, 2), 0.0, -1e9)[:, None]
    ),
)
refuse("weights after a bias", "", mask=lambda mask, x: additive(mask, x) * x.mean())

# --- masks in half precision ---


def in_half(dtype: torch.dtype, fill: float | None = None) -> Mask:
    """(1 - mask) * finfo.min, computed in `dtype` whatever the model's."""
    lowest = torch.finfo(dtype).min if fill is None else fill
    return lambda mask, x: ((1.0 - mask[:, None, None, :].to(dtype)) * lowest).to(x.dtype)


pack(
    "padding as a whole number",  # 0.75 is 0 there
    head=lambda net, x, mask: x.masked_fill(mask[..., None] == 0, 0.75).long().float().sum(1),
)
pack("padding as a truth", head=lambda net, x, mask: x.masked_fill(mask[..., None] == 0, 0.75).bool().float().sum(1))
pack("features scattered", mix=lambda net, x, mask: x.scatter(-1, x.argsort(-1), x))
pack(
    "rows of a table that tokens choose",
    mix=lambda net, x, mask: x + net.tokens.weight.index_select(0, x.argmax(-1).flatten()).view(x.shape),
)
pack("a softcap", mix=softcapped(None, additive))
pack(
    "a softcap under a boolean mask",
    mix=softcapped(None, lambda m, x: torch.where(m[:, None, None].bool(), 0.0, LOWEST)),
)
pack("a mask in a float16 model", torch.float16, mask=in_half(torch.float16))
pack("a mask in a bfloat16 model", torch.bfloat16, mask=in_half(torch.bfloat16))
pack("a mask made in bfloat16", mask=in_half(torch.bfloat16))
refuse("a mask made in float16", UNMASKED, mask=in_half(torch.float16))  # -65504 is no mask in float32
refuse("-10000 in bfloat16", UNMASKED, mask=in_half(torch.bfloat16, -10000.0))
refuse("a soft mask in half", UNMASKED, mask=lambda mask, x: (mask[:, None, None].bfloat16() - 1.0).to(x.dtype))
REFUSED.append(
    Case("-10000 in a float16 model", lambda: Net(mask=in_half(torch.float16, -1e4)), UNMASKED, dtype=torch.float16)
)

# --- what is right for some calls only --------------------------------------------------------------------------

AT_FIRST = "position 0 is read, and a row has padding there"
guard("first token", AT_FIRST, lambda m: bool((m[:, 0] == 0).any()), head=lambda net, x, mask: x[:, 0])
guard("first two tokens", AT_FIRST, lambda m: bool((m[:, :2] == 0).any()), head=lambda net, x, mask: x[:, :2].sum(1))
guard(
    "second token",
    "position 1 is read, and a row has padding there",
    lambda m: bool((m[:, 1] == 0).any()),
    head=lambda net, x, mask: x[:, 1],
)
guard(
    "last position",
    "position -1 is read, and a row has padding there",
    lambda m: bool((m[:, -1] == 0).any()),
    head=lambda net, x, mask: x[:, -1],
)
guard(
    "last token by count",
    "the call reads a position where there is padding",
    lambda m: bool((m.gather(1, (m.sum(1, keepdim=True) - 1) % m.shape[1]) == 0).any()),
    head=lambda net, x, mask: x[torch.arange(x.shape[0]), mask.sum(1) - 1],
)
guard(
    "only causal",
    "padding comes before tokens",
    lambda m: bool((m[:, 1:] > m[:, :-1]).any()),
    mix=lambda net, x, mask: net.attention(1, x, None, is_causal=True),
)
BLOCKING_BIAS = "a bias in an attention mask is larger than 10000"
guard(
    "a bias that blocks the diagonal",
    BLOCKING_BIAS,
    lambda m: not m.all(),
    mix=lambda net, x, mask: net.attention(1, x, additive(mask, x) + net.wall[: x.shape[1], : x.shape[1]]),
)
guard(
    "a bias that blocks all keys but one",
    BLOCKING_BIAS,
    lambda m: not m.all(),
    mix=lambda net, x, mask: net.attention(1, x, additive(mask, x) + net.door[: x.shape[1]]),
)
NOT_ZERO_OR_ONE = "values other than 0 and 1"
GUARDED.append(
    Case(
        "a mask of halves",
        Net,
        NOT_ZERO_OR_ONE,
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask * 0.5},
    )
)
GUARDED.append(
    Case("a mask of twos", Net, NOT_ZERO_OR_ONE, lambda ids, mask: {"input_ids": ids, "attention_mask": 2 * mask})
)
REFUSED.append(
    Case(
        "a mask that wraps around",  # 0 - 1 is 255 in uint8
        lambda: Net(mask=lambda mask, x: (mask[:, None, None] - 1).to(x.dtype) * 1e9),
        "cannot be read",
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask.to(torch.uint8)},
    )
)


class CrossAttention(nn.Module):
    """Queries of one input attend to the encoded tokens of another, under `mask` of (query mask, key mask)."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor | None], has_own_mask: bool = True):
        super().__init__()
        self.encoder, self.decoder = Net(), Net(mask=additive if has_own_mask else lambda mask, x: None)
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.scale, self._mask = 1 / math.sqrt(HIDDEN), mask

    def forward(self, input_ids: Tensor, attention_mask: Tensor, other_ids: Tensor, other_mask: Tensor) -> Tensor:
        memory, x = self.encoder(other_ids, other_mask), self.decoder(input_ids, attention_mask)
        query, key, value = self.query(x)[:, None], self.key(memory)[:, None], self.value(memory)[:, None]
        mask = self._mask(attention_mask, other_mask)
        return x + F.scaled_dot_product_attention(query, key, value, mask).squeeze(1)


def two_inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    other = F.pad(mask.flip(0), (1, 2), value=1)
    return {"input_ids": ids, "attention_mask": mask, "other_ids": F.pad(ids, (0, 3), value=7), "other_mask": other}


def keys_of(mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, None, :].float()) * LOWEST


def cross(name: str, reason: str, mask: Callable[[Tensor, Tensor], Tensor | None]) -> Case:
    return Case(name, lambda: CrossAttention(mask), reason, two_inputs)


REFUSED.append(cross("cross-attention without a mask", UNMASKED, lambda own, other: None))
REFUSED.append(cross("cross-attention under -10000", UNMASKED, lambda own, other: keys_of(other) / 3.4e34))
REFUSED.append(cross("cross-attention under another row's mask", UNMASKED, lambda own, other: keys_of(other.flip(0))))
refuse(
    "attention over features",
    "as if they were features",
    mix=lambda net, x, mask: F.scaled_dot_product_attention(
        *[x.transpose(1, 2)[:, None]] * 3, attn_mask=torch.zeros(HIDDEN, HIDDEN)
    )[:, 0].transpose(1, 2),
)


# --- masks made of ids, and masks that are True at padding ---


class IdsAlone(Net):
    """Makes its mask of the ids; `valid` gives what `Net` gets as validity."""

    def __init__(self, valid: Callable[[Tensor], Tensor], padding_idx: int | None = PAD, **variation: Any):
        super().__init__(**variation)
        self.tokens = nn.Embedding(VOCAB, HIDDEN, padding_idx=padding_idx)
        self._valid = valid

    def forward(self, input_ids: Tensor) -> Any:
        return super().forward(input_ids, self._valid(input_ids))


def ids_at(padding: int) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Inputs of a model that makes its mask of ids, padded with one of them."""
    return lambda ids, mask: {"input_ids": ids.masked_fill(mask == 0, padding)}


def ids_alone(name: str, reason: str, valid: Callable[[Tensor], Tensor], pad: int = PAD, **variation: Any) -> Case:
    return Case(name, lambda: IdsAlone(valid, **variation), reason, ids_at(pad))


def not_pad(ids: Tensor) -> Tensor:
    return ids.ne(PAD)


def masked_mean(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def hidden_where(mask: Tensor, x: Tensor) -> Tensor:
    """Of a mask that is True at padding."""
    return torch.zeros(mask.shape[0], 1, 1, mask.shape[1]).masked_fill(mask[:, None, None].bool(), LOWEST)


PACKED += [
    ids_alone("ids.ne(pad)", "", not_pad),
    ids_alone("ids != pad as numbers", "", lambda ids: (ids != PAD).long()),
    ids_alone("ids.eq(pad) hides", "", lambda ids: ids.eq(PAD), mask=hidden_where),
    ids_alone("ids != pad as a boolean mask", "", not_pad, mask=boolean(lambda m: m[:, None, None])),
    ids_alone(
        "ids == pad times a number", "", lambda ids: ids == PAD, mask=lambda mask, x: mask[:, None, None] * LOWEST
    ),
    ids_alone("ids > 0", "", lambda ids: ids > 0, pad=0, padding_idx=0),
    ids_alone("ids as truth", "", lambda ids: ids.bool(), pad=0, padding_idx=0),
    ids_alone("ids != pad in bfloat16", "", not_pad, mask=in_half(torch.bfloat16)),
    ids_alone("two spellings", "", not_pad, second=lambda mask, x: hidden_where(~mask, x)),
    ids_alone(
        "ids != pad and causal",
        "",
        not_pad,
        mask=boolean(lambda m: m[:, None, None] & torch.ones(m.shape[1], m.shape[1], dtype=torch.bool).tril()),
    ),
    ids_alone("masked mean by ids", "", not_pad, head=masked_mean),
    ids_alone("mask of ids as data", "", not_pad, mix=lambda net, x, mask: x + net.positions(mask.cumsum(1))),
    Case(
        "True at padding",
        lambda: Net(mask=hidden_where),
        "",
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask == 0},
    ),
]
GUARDED.append(
    Case(
        "first token under a mask of ids",
        lambda: IdsAlone(not_pad, head=lambda net, x, mask: x[:, 0]),
        AT_FIRST,
        ids_at(PAD),
        lambda m: bool((m[:, 0] == 0).any()),
    )
)
BY_IDS = "no attention is masked by an input [batch, length], an embedding's padding_idx"
REFUSED += [
    ids_alone("ids that no embedding calls padding", BY_IDS, not_pad, padding_idx=None),
    ids_alone("ids of another number", BY_IDS, lambda ids: ids.ne(7)),
    ids_alone("several special ids", BY_IDS, lambda ids: ids > 3),
    ids_alone("all ids but one hidden", BY_IDS, lambda ids: ids.eq(PAD)),
    ids_alone("mean over ids", MIXES, not_pad, head=lambda net, x, mask: x.mean(1)),
    ids_alone("mean where ids are padding", MIXES, not_pad, head=lambda net, x, mask: masked_mean(net, x, ~mask)),
    ids_alone("ids under a soft mask", BY_IDS, not_pad, mask=lambda mask, x: mask[:, None, None].to(x.dtype) - 1.0),
    ids_alone("ids under -10000", BY_IDS, not_pad, mask=filled(-10000.0)),
    ids_alone(
        "another row of ids in the second layer", UNMASKED, not_pad, second=lambda mask, x: additive(mask.roll(1, 1), x)
    ),
    ids_alone("another row's ids", BY_IDS, lambda ids: ids.flip(0).ne(PAD)),
    ids_alone("ids of a position before", BY_IDS, lambda ids: ids.roll(1, 1).ne(PAD)),
    Case(
        "True where tokens are, hidden in the second layer",
        lambda: Net(mask=boolean(lambda m: m[:, None, None]), second=hidden_where),
        "",
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask.bool()},
    ),
]


class IdsToo(Net):
    """Attends where both a mask and the ids allow it."""

    def __init__(self, also: Callable[[Tensor], Tensor] = not_pad, **variation: Any):
        super().__init__(mask=boolean(lambda m: m[:, None, None]), **variation)
        self.tokens = nn.Embedding(VOCAB, HIDDEN, padding_idx=PAD)
        self._also = also

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return super().forward(input_ids, attention_mask.bool() & self._also(input_ids))


class CrossAttentionByIds(nn.Module):
    """Both sides make their masks of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CrossAttention(lambda own, other: keys_of(other.long()))

    def forward(self, input_ids: Tensor, other_ids: Tensor) -> Tensor:
        return self.model(input_ids, input_ids.ne(PAD), other_ids, other_ids.ne(PAD))


def two_inputs_of_ids(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inputs = two_inputs(ids, mask)
    other = inputs["other_ids"].masked_fill(inputs["other_mask"] == 0, PAD)
    return {**ids_at(PAD)(ids, mask), "other_ids": other}


def declare_padding(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = PAD
    return model


def with_padding_ids(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The padding id stands at tokens too, and other ids at padding."""
    return {"input_ids": ids.masked_fill(ids % 5 == 0, PAD), "attention_mask": mask}


PACKED += [
    Case("a mask and ids", IdsToo, "", with_padding_ids),
    Case("a mask and ids that are not padding", lambda: IdsToo(lambda ids: ids.ne(7)), "", with_padding_ids),
    Case("a mask and the mean by both", lambda: IdsToo(head=masked_mean), "", with_padding_ids),
]
PACKED.append(Case("cross-attention by ids", lambda: declare_padding(CrossAttentionByIds()), "", two_inputs_of_ids))

# --- torch's own modules ---


def plain(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: PlainModel(Sizes(), attention)


def bare_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, HIDDEN, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def vectors(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Vectors instead of ids, and a mask that is True at padding."""
    return {"src": F.one_hot(ids % HIDDEN, HIDDEN).float(), "src_key_padding_mask": mask == 0}


PACKED += [
    Case("nn.TransformerEncoder, post-norm", lambda: TorchEncoder(Sizes(), norm_first=False), ""),
    Case("nn.TransformerEncoder, pre-norm", lambda: TorchEncoder(Sizes(), norm_first=True), ""),
    Case("nn.TransformerEncoder on vectors", bare_encoder, "", vectors),
    Case("nn.MultiheadAttention", plain(lambda: MultiheadSelfAttention(Sizes(), need_weights=False)), ""),
    Case("nn.MultiheadAttention by weights", plain(lambda: MultiheadSelfAttention(Sizes(), need_weights=True)), ""),
    Case("attention by einsum", plain(lambda: EinsumAttention(Sizes())), ""),
]

# --- from attacks on the proof: what nearly packs, and what does though it seems not to ---


def one_plus(net: Net, x: Tensor) -> Tensor:
    """Scores of pairs of tokens."""
    return net.score(x) + net.score(x).transpose(1, 2)


refuse("pairs summed over valid keys", MIXES, head=lambda net, x, mask: (one_plus(net, x) * mask[:, None]).sum(1))
refuse("rows by length", "positions given as data", head=lambda net, x, mask: x[mask.sum(1).argsort()])
refuse("a product with a softmaxed mask", SUMS, head=lambda net, x, mask: mask[:, None].to(x.dtype).softmax(-1) @ x)
refuse("other rows by a mask", SUMS, head=lambda net, x, mask: torch.einsum("bs,csd->bcd", mask.to(x.dtype), x))
refuse(
    "features at positions that tokens give",
    "positions given as data",
    head=lambda net, x, mask: masked_mean(net, x, mask).gather(1, x.argmax(-1)),
)
refuse(
    "tokens as the weights of a linear",
    UNKNOWN,
    head=lambda net, x, mask: F.linear(x.flatten(0, 1), x.flatten(0, 1))[:, :1].view(x.shape[0], -1),
)
refuse("tokens by a mask", "positions given as data", head=lambda net, x, mask: x[mask.bool()])
refuse("padding replaced by a token", MIXES, head=lambda net, x, mask: replaced(net, x, mask).sum(1))
refuse("a mean of other outputs", MIXES, head=lambda net, x, mask: (x, x.mean(1)))
refuse("a sum by class", UNKNOWN, head=lambda net, x, mask: by_class(x, mask))
refuse(
    "a loss that ignores padding",
    "whose labels come from the mask",
    head=lambda net, x, mask: token_losses(x, mask).mean(),
)
refuse("a mask or the diagonal", UNMASKED, mask=boolean(lambda m: m[:, None, None] | diagonal(m.shape[1])))
refuse("0 and up are valid", UNMASKED, mask=lambda mask, x: torch.where(mask[:, None, None] >= 0, 0.0, LOWEST))
refuse(
    "a fill that takes the mask back",
    UNMASKED,
    mask=lambda mask, x: additive(mask, x) + (mask == 0)[:, None, None] * -LOWEST,
)
refuse("at least -5", "", mask=lambda mask, x: additive(mask, x).clamp(min=-5.0))
refuse("int32 that overflows", "", mask=lambda mask, x: ((mask.int()[:, None, None] - 1) * (2**31 - 1) * 2).to(x.dtype))


def replaced(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None].bool(), x, net.tokens.weight[0])


def by_class(x: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 2, HIDDEN).scatter_add(1, mask[..., None].expand(-1, -1, HIDDEN), x)


def token_losses(x: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(x.flatten(0, 1), torch.where(mask == 1, 1, -100).flatten(), ignore_index=-100)


def filled_scores(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    return net.score(x).squeeze(-1).masked_fill(mask == 0, -1e4)


pack("softmax of filled scores", head=lambda net, x, mask: filled_scores(net, x, mask).softmax(-1))
pack("argmax of filled scores", head=lambda net, x, mask: filled_scores(net, x, mask).argmax(-1))
pack("logsumexp of filled tokens", head=lambda net, x, mask: x.masked_fill(mask[..., None] == 0, -1e9).logsumexp(1))
pack("variance of zeroed tokens", head=lambda net, x, mask: (x * mask[..., None]).var(1))
pack("running sum of zeroed tokens", mix=lambda net, x, mask: (x * mask[..., None]).cumsum(1))
pack("mean of tokens added to each", mix=lambda net, x, mask: x + masked_mean(net, x, mask)[:, None])
pack("tokens counted", mix=lambda net, x, mask: x + net.positions(mask.cumsum(1) * mask))
pack("tokens see tokens, padding sees padding", mask=boolean(lambda m: m[:, None, None] == m[:, None, :, None]))
PACKED += [
    Case("a mask of float64", Net, "", lambda ids, mask: {"input_ids": ids, "attention_mask": mask.double()}),
    Case("a mask of uint8", Net, "", lambda ids, mask: {"input_ids": ids, "attention_mask": mask.to(torch.uint8)}),
    Case(
        "a mean of what is True at padding",
        lambda: Net(mask=hidden_where, head=lambda net, x, mask: masked_mean(net, x, ~mask)),
        "",
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask == 0},
    ),
]
REFUSED += [
    Case(
        "a mean of padding, where that is True",
        lambda: Net(mask=hidden_where, head=masked_mean),
        MIXES,
        lambda ids, mask: {"input_ids": ids, "attention_mask": mask == 0},
    ),
    ids_alone("as many as there are ids", BY_IDS, lambda ids: torch.arange(ids.shape[1]) < not_pad(ids).sum(1, True)),
]
