"""Attention as two batched products around a softmax, with scores in place, in blocks that fit a cache.

softmax(softcap * tanh(scale Q K^T + before ...) + after ...) V, including what SDPA has no argument for: scores under a
tanh, biases whose order matters, and scores that a number replaces. Without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# (query, key, value, bias, is_causal, scale), as `products` takes them: every kernel that can replace SDPA
Kernel = Callable[..., Tensor]

SCORES = 2**20  # elements at a time: 4 MiB of float32, which the allocator keeps instead of returning


class Scores(NamedTuple):
    """Turns products into scores; biases are (batch | 1, heads | 1, seq | 1, keys | 1) and added one by one."""

    scale: float
    before: tuple[Tensor, ...] = ()
    softcap: float | None = None
    after: tuple[Tensor, ...] = ()
    is_causal: bool = False
    kept: Tensor | None = None  # where False, the score is zero before `after` is added

    @property
    def are_products(self) -> bool:
        """Whether scaling is the only step."""
        plain = self.softcap is None and self.kept is None
        return plain and not (self.before or self.after or self.is_causal)

    def of(self, sequences: slice, queries: slice = slice(None), keys: slice = slice(None)) -> Scores:
        """The same for a part of the batch, the queries and the keys."""
        part = (sequences, slice(None), queries, keys)

        def cut(bias: Tensor) -> Tensor:
            return bias[tuple(s if n > 1 else slice(None) for s, n in zip(part, bias.shape, strict=True))]

        kept = None if self.kept is None else cut(self.kept)
        return self._replace(before=tuple(map(cut, self.before)), after=tuple(map(cut, self.after)), kept=kept)

    def write(self, products: Tensor, first: int) -> None:
        """Turns scaled products (batch, heads, seq, keys) into scores in place; `first` is the first query's
        position."""
        for bias in self.before:
            products.add_(bias)
        if self.softcap is not None:
            products.tanh_().mul_(self.softcap)
        if self.kept is not None:
            products.masked_fill_(self.kept.logical_not(), 0.0)
        for bias in self.after:
            products.add_(bias)
        if self.is_causal:
            products.add_(_later_blocked(products, first))


def products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale Q K^T + bias) V of tensors (batch, heads, seq, head_dim), like SDPA but without gradients.

    `bias` is (batch | 1, heads | 1, seq | 1, keys | 1), with something above -inf in each row.

    Example::

        >>> torch.testing.assert_close(products(q, k, v), F.scaled_dot_product_attention(q, k, v))
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _attention(query, key, value, Scores(scale, after=() if bias is None else (bias,), is_causal=is_causal))


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's own kernel as a `Kernel`; its bias may also be a boolean mask."""
    return F.scaled_dot_product_attention(query, key, value, bias, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def _attention(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """Attention of query (batch, heads, seq, head_dim), key and value (batch, key_heads, keys, dim)."""
    batch, heads, queries, _ = query.shape
    # An accelerator has no such cache to fit into.
    most = SCORES if query.device.type == "cpu" else batch * heads * queries * key.shape[2]
    sequences = most // max(1, heads * queries * key.shape[2])
    some = _at_once if sequences or not batch else _by_blocks
    if batch <= max(1, sequences):
        return some(query, key, value, scores)
    result = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    for start in range(0, batch, max(1, sequences)):
        part = slice(start, start + max(1, sequences))
        result[part] = some(query[part], key[part], value[part], scores.of(part))
    return result


def _at_once(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    return _attended(query, _by_head(key).transpose(1, 2), _by_head(value), scores)


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """One sequence, some queries at a time; under a causal mask without the keys after them."""
    transposed, value = _by_head(key).contiguous().transpose(1, 2), _by_head(value).contiguous()
    _, heads, queries, _ = query.shape
    keys = transposed.shape[2]
    block = max(16, SCORES // (heads * keys))
    result = query.new_empty(1, queries, heads, value.shape[2]).transpose(1, 2)
    for start in range(0, queries, block):
        some = slice(start, min(queries, start + block))
        seen = slice(0, min(keys, some.stop) if scores.is_causal else keys)
        its = scores.of(slice(None), some, seen)
        result[:, :, some] = _attended(query[:, :, some], transposed[:, :, seen], value[:, seen], its, start)
    return result


def _by_head(x: Tensor) -> Tensor:
    return x[0] if x.shape[0] == 1 else x.flatten(0, 1)


def _attended(query: Tensor, transposed_key: Tensor, value: Tensor, scores: Scores, first: int = 0) -> Tensor:
    """Query (batch, heads, seq, head_dim) on key and value (batch * key_heads, ...): heads of a group become rows."""
    batch, heads, queries, head_dim = query.shape
    groups = batch * heads // max(1, len(transposed_key))
    rows = query.reshape(len(transposed_key), groups * queries, head_dim)
    written = torch.baddbmm(query.new_empty(1), rows, transposed_key, beta=0, alpha=scores.scale)
    if not scores.are_products:
        scores.write(written.view(batch, heads, queries, written.shape[2]), first)
    result = torch.bmm(torch.softmax(written, -1, out=written), value)
    return result.view(batch, heads, queries, value.shape[2])


def _later_blocked(scores: Tensor, first: int) -> Tensor:
    """-inf at keys after the query; `first` is the first query's position."""
    return scores.new_full(scores.shape[2:], -math.inf).triu_(first + 1)


@torch.library.custom_op("fxbt::attention_by_products", mutates_args=())
def attention_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    scale: float,
    softcap: float | None = None,
    is_causal: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """softmax(softcap * tanh(scale Q K^T + before ...) + after ...) V; without a softcap, also no tanh.

    query is (batch, heads, seq, head_dim), key and value are (batch, key_heads, keys, dim); biases (batch | 1, heads |
    1, seq | 1, keys | 1) are added one by one. Where the boolean `kept` (of such a shape) is False, the score is set to
    zero before `after` is added, which so replaces it. Without gradients.

    Source: softcapped scores, Gemma team 2024, "Gemma 2", section 2.

    Example::

        >>> fxbt.ops.attention_by_products(q, k, v, [], [mask], scale=0.125 / 50, softcap=50.0)
    """
    # Contiguous like its fake; the next op of a program accepts any strides.
    return by_products(query, key, value, before, after, scale, softcap, is_causal, kept).contiguous()


@attention_by_products.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    scale: float,
    softcap: float | None = None,
    is_causal: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    """`attention_by_products` without the dispatcher around it."""
    return _attention(query, key, value, Scores(scale, tuple(before), softcap, tuple(after), is_causal, kept))
