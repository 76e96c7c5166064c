"""Transformers as other libraries write them, of our own writing after their ways of spelling attention.

timm, torchvision, open_clip, x-transformers, vit-pytorch, sentence-transformers and torch.nn itself. fxbt knows none of
them. `LIBRARIES` is made for `pytest.mark.parametrize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from models import ENCODER, VOCAB, enliven, padding_mask, token_ids
from torch import Tensor, nn

WIDTH, HEADS, DIM, HIDDEN = 32, 4, 8, 48
IMAGE, PATCH = 16, 4
GRID = IMAGE // PATCH
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Library:
    """One model.

    Attributes:
        make: a new module.
        inputs: (batch, length, padding) -> positional arguments of forward.
        attentions: how many one forward computes.
        found: how many of them are attention as SDPA knows it.
        reason: why the others are not.
        paddings: what `inputs` makes of its third argument.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, str], Inputs]
    attentions: int = 1
    found: int | None = None
    reason: str = ""
    paddings: tuple[str, ...] = ("none",)

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return enliven(self.make())

    @property
    def expected(self) -> int:
        return self.attentions if self.found is None else self.found


def images(batch: int, length: int, padding: str) -> Inputs:
    return (torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(batch)),)


def states(batch: int, length: int, padding: str) -> Inputs:
    return (torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(length)),)


def masked_states(batch: int, length: int, padding: str) -> Inputs:
    """x and a mask of the kept positions."""
    return (*states(batch, length, padding), padding_mask(batch, length, padding).bool())


def ids(batch: int, length: int, padding: str) -> Inputs:
    return (token_ids(batch, length, torch.ones(batch, length)),)


def heads_first(x: Tensor, heads: int = HEADS) -> Tensor:
    """rearrange(x, "b n (h d) -> b h n d")"""
    return x.view(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)


def heads_last(x: Tensor) -> Tensor:
    """rearrange(x, "b h n d -> b n (h d)")"""
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


class MLP(nn.Module):
    """fc1, GELU, dropout, fc2, dropout"""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


# --- timm -------------------------------------------------------------------------------------------------------


class TimmAttention(nn.Module):
    """vision_transformer.Attention: fused qkv, unbound; norms on queries and keys; SDPA or not."""

    def __init__(self, fused: bool, qk_norm: bool = False):
        super().__init__()
        self.fused_attn, self.scale = fused, DIM**-0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = (nn.LayerNorm(DIM) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, length, width)))


class BeitAttention(nn.Module):
    """beit.Attention: biases of query and value alone, relative positions looked up in a table."""

    relative_position_index: Tensor

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH), persistent=False)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(2 * tokens, HEADS))
        index = torch.arange(tokens)[None] - torch.arange(tokens)[:, None] + tokens - 1
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        relative = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        relative = relative.view(self.tokens, self.tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        attn = ((q * DIM**-0.5) @ k.transpose(-2, -1) + relative).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(batch, length, width))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), attention, MLP()
        self.ls1, self.ls2 = LayerScale(), LayerScale()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, blocks, a norm and a head."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID * GRID + 1, WIDTH))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class AttentionPool(nn.Module):
    """attention_pool.AttentionPoolLatent: one learned query over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, 1, HEADS, DIM).transpose(1, 2)
        k, v = self.kv(x).reshape(batch, length, 2, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        attn = ((q * DIM**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(batch, 1, width))[:, 0]


class WindowAttention(nn.Module):
    """swin_transformer.WindowAttention: relative positions, and a mask for each window of a shifted grid."""

    relative_position_index: Tensor

    def __init__(self, window: int, cosine: bool):
        super().__init__()
        self.window, self.cosine = window, cosine
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, HEADS))
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(HEADS, 1, 1)))
        place = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        gap = (place[:, :, None] - place[:, None, :]).permute(1, 2, 0) + window - 1
        index = gap[..., 0] * (2 * window - 1) + gap[..., 1]
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, area, width = x.shape
        q, k, v = self.qkv(x).reshape(windows, area, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.cosine:
            attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
            attn = attn * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        else:
            attn = (q * DIM**-0.5) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(area, area, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            count = mask.shape[0]
            attn = attn.view(-1, count, HEADS, area, area) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, HEADS, area, area)
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(windows, area, width))


class SwinBlock(nn.Module):
    """Windows of a grid, shifted by half a window in every other block."""

    attn_mask: Tensor | None

    def __init__(self, shift: int, cosine: bool = False, window: int = 2):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), MLP()
        self.attn = WindowAttention(window, cosine)
        self.register_buffer("attn_mask", self._mask() if shift else None, persistent=False)

    def _mask(self) -> Tensor:
        """-100 between positions that the shift brought together."""
        region = torch.zeros(1, GRID, GRID, 1)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
            region[:, rows, columns, :] = number
        parts = self._partition(region).squeeze(-1)
        gap = parts.unsqueeze(1) - parts.unsqueeze(2)
        return gap.masked_fill(gap != 0, -100.0).masked_fill(gap == 0, 0.0)

    def _partition(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, channels)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window**2, channels)

    def _reverse(self, windows: Tensor) -> Tensor:
        x = windows.view(-1, GRID // self.window, GRID // self.window, self.window, self.window, WIDTH)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, GRID, GRID, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.norm1(x).view(-1, GRID, GRID, WIDTH)
        if self.shift:
            grid = torch.roll(grid, shifts=(-self.shift, -self.shift), dims=(1, 2))
        grid = self._reverse(self.attn(self._partition(grid), self.attn_mask))
        if self.shift:
            grid = torch.roll(grid, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + grid.view(x.shape)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    def __init__(self, cosine: bool):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.Sequential(SwinBlock(0, cosine), SwinBlock(1, cosine))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2)).mean(1)


# --- torchvision, open_clip: nn.MultiheadAttention ---------------------------------------------------------------


class EncoderBlock(nn.Module):
    """torchvision.models.vision_transformer.EncoderBlock"""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), MLP()
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class ResidualAttentionBlock(nn.Module):
    """open_clip.transformer.ResidualAttentionBlock: [length, batch, width]"""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), MLP()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class ClipText(nn.Module):
    """open_clip's text tower: sequence first, a causal mask as a buffer, the state at the largest id."""

    attn_mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(32, WIDTH))
        self.resblocks = nn.ModuleList(ResidualAttentionBlock() for _ in range(2))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(WIDTH, 16))
        self.register_buffer("attn_mask", torch.empty(32, 32).fill_(float("-inf")).triu_(1), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = (self.token_embedding(text) + self.positional_embedding[:length]).permute(1, 0, 2)
        for block in self.resblocks:
            x = block(x, self.attn_mask[:length, :length])
        x = self.ln_final(x.permute(1, 0, 2))
        pooled = x[torch.arange(x.shape[0]), text.argmax(dim=-1)]
        return F.normalize(pooled @ self.text_projection, dim=-1)


class AttentionalPooler(nn.Module):
    """open_clip (CoCa): learned queries, the batch in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(6, WIDTH))
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, kdim=WIDTH, vdim=WIDTH)
        self.ln_q, self.ln_k = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_k(x).permute(1, 0, 2)
        query = self.ln_q(self.query).unsqueeze(1).repeat(1, x.shape[1], 1)
        return self.attn(query, x, x, need_weights=False)[0].permute(1, 0, 2)


# --- x-transformers, vit-pytorch: einsum and rearrange -------------------------------------------------------------


@torch.autocast("cuda", enabled=False)
def rotary_frequencies(length: int) -> Tensor:
    angle = torch.einsum("i,j->ij", torch.arange(length).float(), 1 / 100 ** (torch.arange(0, DIM, 2) / DIM))
    return torch.stack((angle, angle), dim=-1).flatten(-2)


def rotated(t: Tensor, frequencies: Tensor) -> Tensor:
    first, second = t.unflatten(-1, (-1, 2)).unbind(-1)
    half = torch.stack((-second, first), dim=-1).flatten(-2)
    return t * frequencies.cos() + half * frequencies.sin()


class XAttention(nn.Module):
    """x_transformers.Attention, one way of it at a time."""

    slopes: Tensor

    def __init__(self, way: str, kv_heads: int = HEADS):
        super().__init__()
        self.way, self.kv_heads = way, kv_heads
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(WIDTH, kv_heads * DIM, bias=False) for _ in range(2))
        self.qk_norm_scale = nn.Parameter(torch.ones(HEADS, 1, DIM))
        self.mem_k, self.mem_v = (nn.Parameter(torch.zeros(HEADS, 3, DIM)) for _ in range(2))
        self.talking = nn.Conv2d(HEADS, HEADS, 1, bias=False)
        self.to_gate, self.head_scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(1, HEADS, 1, 1))
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).float()[:, None, None])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q = heads_first(self.to_q(x))
        k, v = (heads_first(t, self.kv_heads) for t in (self.to_k(x), self.to_v(x)))
        input_mask = mask[:, None, None, :]
        scale = DIM**-0.5
        if self.way == "qk_norm":
            q, k = (F.normalize(t, dim=-1) * self.qk_norm_scale for t in (q, k))
            scale = 10.0
        if self.way == "rotary":
            frequencies = rotary_frequencies(length)
            q, k = rotated(q, frequencies), rotated(k, frequencies)
        if self.way == "memory":
            k, v = (
                torch.cat((memory.expand(batch, -1, -1, -1), t), dim=-2)
                for memory, t in ((self.mem_k, k), (self.mem_v, v))
            )
            input_mask = F.pad(input_mask, (3, 0), value=True)
        if self.kv_heads == 1:
            k, v = k.squeeze(1), v.squeeze(1)
        elif self.kv_heads < HEADS:  # rearranged "b kv_h n d -> b (r kv_h) n d"
            k, v = (t[:, None].expand(-1, HEADS // self.kv_heads, -1, -1, -1).flatten(1, 2) for t in (k, v))
        pattern = "b j d" if k.dim() == 3 else "b h j d"
        dots = torch.einsum(f"b h i d, {pattern} -> b h i j", q, k) * scale
        if self.way == "talking":
            dots = self.talking(dots)
        if self.way == "alibi":
            place = torch.arange(length)
            dots = dots - self.slopes * (place[None, :] - place[:, None]).abs()
        dots = dots.masked_fill(~input_mask, -torch.finfo(dots.dtype).max)
        if self.way == "causal":
            dots = dots.masked_fill(
                torch.ones((length, length), dtype=torch.bool).triu(1), -torch.finfo(dots.dtype).max
            )
        if self.way == "topk":
            top, _ = dots.topk(2, dim=-1)
            dots = dots.masked_fill(dots < top[..., -1:], -torch.finfo(dots.dtype).max)
        attn = F.softmax(dots, dim=-1, dtype=torch.float32).type(dots.dtype)
        if self.way == "talking":
            attn = self.talking(attn)
        out = torch.einsum(f"b h i j, {pattern} -> b h i d", attn, v)
        if self.way == "head_scale":
            out = out * self.head_scale
        out = heads_last(out)
        return self.to_out(out * self.to_gate(x).sigmoid() if self.way == "gate" else out)


class XLayer(nn.Module):
    """Pre-norm: norm, attention, residual; norm, feed-forward, residual."""

    def __init__(self, way: str, kv_heads: int = HEADS):
        super().__init__()
        self.norm1, self.norm2, self.ff = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), MLP()
        self.attend = XAttention(way, kv_heads)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attend(self.norm1(x), mask) + x
        return self.ff(self.norm2(x)) + x


class VitAttention(nn.Module):
    """vit_pytorch.vit.Attention: the norm inside, one projection, chunked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.Softmax(dim=-1)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_first, self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        dots = torch.matmul(q, k.transpose(-1, -2)) * DIM**-0.5
        return self.to_out(heads_last(torch.matmul(self.attend(dots), v)))


class LocalitySelfAttention(VitAttention):
    """vit_pytorch.vit_for_small_dataset.LSA: a learned temperature, and no token sees itself."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.log(torch.tensor(DIM**-0.5)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_first, self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        dots = torch.matmul(q, k.transpose(-1, -2)) * self.temperature.exp()
        itself = torch.eye(dots.shape[-1], device=dots.device, dtype=torch.bool)
        dots = dots.masked_fill(itself, -torch.finfo(dots.dtype).max)
        return self.to_out(heads_last(torch.matmul(self.attend(dots), v)))


class ReAttention(VitAttention):
    """vit_pytorch.deepvit: the weights of all heads mixed before they meet the values."""

    def __init__(self) -> None:
        super().__init__()
        self.reattn_weights = nn.Parameter(torch.zeros(HEADS, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(heads_first, self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        attn = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5).softmax(dim=-1)
        attn = torch.einsum("b h i j, h g -> b g i j", attn, self.reattn_weights)
        return self.to_out(heads_last(torch.einsum("b h i j, b h j d -> b h i d", attn, v)))


class VitBlock(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attn, self.ff = attention, nn.Sequential(nn.LayerNorm(WIDTH), MLP())

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        return self.ff(x) + x


# --- sentence-transformers ------------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """models.Transformer: a Hugging Face model between dicts of features."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        self.auto_model = transformers.BertModel(transformers.BertConfig(**{**ENCODER, "num_hidden_layers": 1}))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        given = {name: features[name] for name in ("input_ids", "attention_mask")}
        return {**features, "token_embeddings": self.auto_model(**given, return_dict=False)[0]}


class Pooling(nn.Module):
    """models.Pooling"""

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens, mask = features["token_embeddings"], features["attention_mask"]
        expanded = mask.unsqueeze(-1).expand(tokens.size()).to(tokens.dtype)
        if self.mode == "mean":
            pooled = torch.sum(tokens * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
        elif self.mode == "max":
            pooled = torch.where(expanded == 0, -1e9, tokens).max(1)[0]
        elif self.mode == "cls":
            pooled = tokens[:, 0]
        else:
            weights = torch.arange(1, tokens.shape[1] + 1).unsqueeze(0).unsqueeze(-1) * expanded
            pooled = torch.sum(tokens * weights, 1) / torch.clamp(weights.sum(1), min=1e-9)
        return {**features, "sentence_embedding": pooled}


class Normalize(nn.Module):
    """models.Normalize"""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": F.normalize(features["sentence_embedding"], p=2, dim=1)}


def sentences(batch: int, length: int, padding: str) -> Inputs:
    mask = padding_mask(batch, length, padding)
    return ({"input_ids": token_ids(batch, length, mask), "attention_mask": mask},)


# --- torch.nn -------------------------------------------------------------------------------------------------------

LAYER: dict[str, Any] = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": HIDDEN, "dropout": 0.0}


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder under a mask of the kept positions, nested tensors allowed where torch allows them."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False, causal: bool = False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(**LAYER, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.batch_first, self.causal = batch_first, causal

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        triangle = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        padding = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if self.causal else ~mask
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, mask=triangle, src_key_padding_mask=padding, is_causal=self.causal)
        return x if self.batch_first else x.transpose(0, 1)


class TorchSeq2Seq(nn.Module):
    """nn.Transformer: encoder, decoder with causal self-attention, cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(
            **LAYER, num_encoder_layers=1, num_decoder_layers=1, batch_first=True, activation="gelu"
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        target = x.flip(-1)
        triangle = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.model(
            x, target, tgt_mask=triangle, src_key_padding_mask=~mask, memory_key_padding_mask=~mask, tgt_is_causal=True
        )


def vit(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(TimmBlock(attention()), TimmBlock(attention()))


def x_way(name: str, *, kv_heads: int = HEADS, found: int = 1, reason: str = "") -> Library:
    make = partial(XLayer, name, kv_heads)
    title = f"x-transformers {name}" + (f" {kv_heads} key heads" if kv_heads < HEADS else "")
    return Library(title, make, masked_states, found=found, reason=reason, paddings=("right", "left", "none"))


def torch_model(
    name: str, make: Callable[[], nn.Module], attentions: int, paddings: tuple[str, ...] = ("right", "none")
) -> Library:
    return Library(f"torch.nn {name}", make, masked_states, attentions=attentions, paddings=paddings)


LIBRARIES = [
    Library("timm vit", vit(partial(TimmAttention, fused=False)), images, attentions=2),
    Library("timm vit fused", vit(partial(TimmAttention, fused=True)), images, attentions=2),
    Library("timm vit qk norm", vit(partial(TimmAttention, fused=False, qk_norm=True)), images, attentions=2),
    Library("timm beit", vit(partial(BeitAttention, GRID * GRID + 1)), images, attentions=2),
    Library("timm swin", partial(Swin, cosine=False), images, attentions=2),
    Library("timm swin v2", partial(Swin, cosine=True), images, attentions=2),
    Library("timm attention pool", AttentionPool, states),
    Library("torchvision vit", lambda: VisionTransformer(EncoderBlock(), EncoderBlock()), images, attentions=2),
    Library("open_clip text", ClipText, ids, attentions=2),
    Library("open_clip pooler", AttentionalPooler, states),
    *map(x_way, ("plain", "qk_norm", "rotary", "memory", "alibi", "causal", "head_scale", "gate")),
    x_way("plain", kv_heads=1),
    x_way("plain", kv_heads=2),
    x_way("talking", found=0, reason="an op on the scores is not a scale, bias, mask or cast"),
    x_way("topk", found=0, reason="the scores are used elsewhere too"),
    Library("vit-pytorch vit", lambda: VisionTransformer(VitBlock(VitAttention())), images),
    Library("vit-pytorch small dataset", lambda: VisionTransformer(VitBlock(LocalitySelfAttention())), images),
    Library(
        "vit-pytorch deepvit",
        lambda: VisionTransformer(VitBlock(ReAttention())),
        images,
        found=0,
        reason="does not sum over exactly the softmax axis",
    ),
    *(
        Library(
            f"sentence-transformers {mode}",
            lambda mode=mode: nn.Sequential(Transformer(), Pooling(mode), Normalize()),
            sentences,
            paddings=("right", "none"),
        )
        for mode in ("mean", "max", "cls", "weightedmean")
    ),
    torch_model("encoder", TorchEncoder, 2, paddings=("none",)),  # see test_torchs_own_fast_path
    torch_model("encoder sequence first", partial(TorchEncoder, batch_first=False), 2),
    torch_model("encoder pre-norm", partial(TorchEncoder, norm_first=True), 2),
    torch_model("encoder causal", partial(TorchEncoder, causal=True), 2),
    torch_model("transformer", TorchSeq2Seq, 3),
]
