"""Attention on packed tokens in graphs with gradients: plain operations that autograd follows, one call per length.

`kernels.packed` writes results into a buffer and views tokens by strides; the backward of both copies whole tensors for
each length. Here tokens are split once, and results are joined once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .differentiable import attention_with_gradient
from .packed import Tokens


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    bias: list[Tensor] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """`packed.attention` of (1, heads, T, dim) tensors for training; dropout drops weights between valid tokens.

    Example:
        >>> attention(*(torch.randn(1, 4, 3, 8, requires_grad=True) for _ in range(3)), Tokens.of(mask))
    """
    sizes = [group.count * group.length for group in tokens.groups]
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    parts = zip(*(_split(x, sizes) for x in (query, key, value)), strict=True)
    attended = []
    for index, (group, operands) in enumerate(zip(tokens.groups, parts, strict=True)):
        q, k, v = (part.unflatten(1, (group.count, group.length)).transpose(0, 1) for part in operands)
        mask = None if bias is None else bias[index]
        attended.append(attention_with_gradient(q, k, v, mask, dropout_p, is_causal, **options))
    return _joined(attended)


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    key_tokens: Tokens,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """`packed.cross_attention` for training: every token sees all key tokens of its row."""
    queries = _split(query, [group.length for group in tokens.groups for _ in range(group.count)])
    rows = [row for group in tokens.groups for row in group.rows.tolist()]
    keys, values = (_by_row(x, key_tokens) for x in (key, value))
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    attended = [
        attention_with_gradient(part[None], keys[row][None], values[row][None], None, dropout_p, **options)
        for part, row in zip(queries, rows, strict=True)
    ]
    return _joined(attended)


def _split(x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """(1, heads, T, dim) -> (heads, size, dim) for each of the sizes, which sum to T."""
    return x.squeeze(0).split(list(sizes), dim=1)


def _by_row(x: Tensor, tokens: Tokens) -> list[Tensor]:
    """(1, heads, T, dim) -> (heads, length, dim) for each row of the batch."""
    order = sorted(range(len(tokens.spans)), key=lambda row: tokens.spans[row])
    parts = _split(x, [tokens.spans[row][1] for row in order])
    return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]


def _joined(attended: Sequence[Tensor]) -> Tensor:
    """(count, heads, length, dim) of each length -> (1, heads, T, dim), with a token's heads side by side in memory."""
    return torch.cat([each.transpose(1, 2).flatten(0, 1) for each in attended]).transpose(0, 1).unsqueeze(0)
