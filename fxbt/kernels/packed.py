"""Computing on valid tokens only: plain functions that an unpadded graph calls.

A packed tensor holds the T valid tokens of a (batch, length) mask, rows of equal length side by side. It has the rank
and dims of the dense tensor it replaces, with batch dim 1 and token dim T (a dim that merges both has size T). `Tokens`
says where the tokens come from; it is made once per call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_compat import varlen_attention as varlen_attention_by_torch
from .attention_products import Kernel, by_products, sdpa

SMALLEST_BUCKET = 32  # tokens; smaller calls are bound by kernel launches
EXACT = 2**20  # float32 and int32 hold sums of integers up to this exactly
BOUND = 1e4  # biases and scores of an attention are smaller; what blocks a key is far larger


@dataclass(frozen=True)
class Group:
    """`count` sequences of equal `length`, side by side, from token `start` on."""

    start: int
    count: int
    length: int
    rows: Tensor  # [count], their rows in the batch
    positions: Tensor  # [count, length], the positions of their tokens in the row
    offset: int | None  # the position where all of them begin, if their tokens are contiguous


@dataclass(frozen=True)
class Tokens:
    """The places of packed tokens in the dense batch.

    `flat[t] = rows[t] * length + positions[t]`; `spans[row]` is (first token, number of tokens). `bounds` says where
    each sequence begins and the last one ends, for kernels that take all sequences at once. On CUDA there are no spans
    and groups. There, copies of the batch's first token may follow the tokens, in sequences of their own whose results
    are not used: `targets` equals `flat`, but is batch * length for these copies.
    """

    batch: int
    length: int
    rows: Tensor
    positions: Tensor
    flat: Tensor
    spans: list[tuple[int, int]]
    groups: list[Group]
    longest: int
    bounds: Tensor  # int32 [sequences + 1]
    targets: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Tokens:
        """The tokens where `mask` (batch, length) is nonzero, shortest sequences first.

        Example::

            >>> Tokens.of(torch.tensor([[1, 1], [1, 0]])).flat
            tensor([2, 0, 1])
        """
        valid = mask.bool()
        batch, length = valid.shape
        counts = valid.sum(1)
        order = counts.argsort(stable=True)
        places, positions = valid.index_select(0, order).nonzero(as_tuple=True)
        rows = order.index_select(0, places)
        flat = rows * length + positions
        sorted_counts = counts.index_select(0, order).tolist()
        starts = [0, *itertools.accumulate(sorted_counts)]
        bounds = torch.tensor(starts, dtype=torch.int32)
        spans = [(0, 0)] * batch
        for row, start, count in zip(order.tolist(), starts, sorted_counts, strict=False):
            spans[row] = (start, count)
        groups = _groups(sorted_counts, order, positions)
        longest = max(sorted_counts, default=0)
        return cls(batch, length, rows, positions, flat, spans, groups, longest, bounds, flat)

    @classmethod
    def on_device(cls, mask: Tensor, size: int, most_filled: int = 0) -> Tokens:
        """The same, row by row and without waiting for the device, for kernels that take all sequences at once.

        Args:
            mask: [batch, length], with at most `size` tokens and at least `size - most_filled`.

        Example::

            >>> Tokens.on_device(torch.tensor([[1, 1], [1, 0]]), 4, most_filled=2).bounds
            tensor([0, 2, 3, 4], dtype=torch.int32)
        """
        valid = mask.bool()
        batch, length = valid.shape
        everywhere = torch.arange(batch * length, device=mask.device)
        places = (valid.flatten().cumsum(0) - 1).masked_fill(valid.logical_not().flatten(), size)
        targets = places.new_full((size + 1,), batch * length).scatter(0, places, everywhere)[:size]
        flat = targets.masked_fill(targets == batch * length, 0) if most_filled else targets
        ends = valid.sum(1).cumsum(0)
        if most_filled:
            filled = length * torch.arange(1, -(-most_filled // length) + 1, device=mask.device)
            ends = torch.cat([ends, (ends[-1] + filled).clamp(max=size)])
        bounds = F.pad(ends, (1, 0)).to(torch.int32)
        return cls(batch, length, flat // length, flat % length, flat, [], [], min(length, size), bounds, targets)


def bucket(count: int, most: int) -> int:
    """The bucket for `count` tokens, at most `most`: buckets are within an eighth, eight per factor of two.

    Example::

        >>> [bucket(count, 4096) for count in (1, 33, 1000, 1025, 4090)]
        [32, 64, 1024, 1152, 4096]
    """
    step = bucket_step(count)
    return min(-(-count // step) * step, most)


def bucket_step(size: int) -> int:
    """The distance between the buckets around a number of tokens."""
    return max(SMALLEST_BUCKET, 1 << max(0, size.bit_length() - 4))


def _groups(counts: list[int], order: Tensor, positions: Tensor) -> list[Group]:
    groups, row, start = [], 0, 0
    for length, run in itertools.groupby(counts):
        count = len(list(run))
        if length:
            inside = positions[start : start + count * length].view(count, length)
            groups.append(Group(start, count, length, order[row : row + count], inside, _offset(inside)))
        row, start = row + count, start + count * length
    return groups


def _offset(positions: Tensor) -> int | None:
    """The position where all rows begin, if it is the same and they have no gap; else None."""
    first, last = positions[0, 0].item(), positions[0, -1].item()
    same = bool((positions == positions[0]).all())
    return int(first) if same and last - first == positions.shape[1] - 1 else None


def gather(x: Tensor, tokens: Tokens, batch: int | None, token: int, rank: int) -> Tensor:
    """A dense tensor at the valid tokens, as an operand of a packed tensor of that rank.

    `batch` and `token` are the dims (of `rank`) of batch and length; `batch` is None if `x` is the same for all rows,
    and both are equal if one dim merges them, batch first.
    """
    x = x[(None,) * (rank - x.dim())]
    if batch is None:
        return x.index_select(token, tokens.positions)
    if batch == token:
        return x.index_select(token, tokens.flat)
    together = x.movedim((batch, token), (0, 1)).flatten(0, 1)
    return together.index_select(0, tokens.flat).unsqueeze(0).movedim((0, 1), (batch, token))


def gather_rows(x: Tensor, tokens: Tokens, batch: int, token: int, rank: int) -> Tensor:
    """A value per sequence (size 1 in the token dim), repeated at every valid token."""
    x = x[(None,) * (rank - x.dim())]
    return x.index_select(batch, tokens.rows).transpose(batch, token)


def unpack(x: Tensor, tokens: Tokens, batch: int, token: int, fill: float = 0) -> Tensor:
    """A packed tensor in its dense shape, with `fill` at padding."""
    values = x.movedim(token, 0) if batch == token else x.movedim((batch, token), (0, 1))[0]
    positions = tokens.batch * tokens.length
    is_filled = tokens.targets is not tokens.flat  # by copies, which are written to one extra position
    dense = values.new_full((positions + is_filled, *values.shape[1:]), fill)
    dense.index_copy_(0, tokens.targets, values)
    dense = dense[:positions] if is_filled else dense
    if batch == token:
        return dense.movedim(0, token)
    return dense.unflatten(0, (tokens.batch, tokens.length)).movedim((0, 1), (batch, token)).contiguous()


def blocks(bias: Tensor, tokens: Tokens) -> list[Tensor]:
    """The part of a dense attention bias or mask [b|1, h|1, q|1, k|1] that each group of sequences uses."""
    bias = bias[(None,) * (4 - bias.dim())]
    return [_block(bias, group) for group in tokens.groups]


def _block(bias: Tensor, group: Group) -> Tensor:
    if group.offset is None:
        return _scattered_block(bias, group)
    for dim in (2, 3):
        if bias.shape[dim] > 1:
            bias = bias.narrow(dim, group.offset, group.length)
    return bias.index_select(0, group.rows) if bias.shape[0] > 1 else bias


def _scattered_block(bias: Tensor, group: Group) -> Tensor:
    zero = group.rows.new_zeros(())
    rows = group.rows[:, None, None] if bias.shape[0] > 1 else zero
    queries = group.positions[:, :, None] if bias.shape[2] > 1 else zero[None, None, None]
    keys = group.positions[:, None, :] if bias.shape[3] > 1 else zero[None, None, None]
    return bias.permute(0, 2, 3, 1)[rows, queries, keys].permute(0, 3, 1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    bias: list[Tensor] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attend: Kernel = sdpa,
) -> Tensor:
    """Self-attention on packed (1, heads, T, dim) tensors: every token sees the tokens of its own sequence.

    With `enable_gqa`, groups of query heads share keys, using torch's kernel.
    """
    attend = functools.partial(sdpa, enable_gqa=True) if enable_gqa else attend
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for index, group in enumerate(tokens.groups):
        attended = attend(
            *(_sequences(x, group.start, group.count, group.length) for x in (query, key, value)),
            None if bias is None else bias[index],
            is_causal,
            scale,
        )
        place = output.narrow(0, group.start, group.count * group.length)
        place.view(group.count, group.length, *place.shape[1:]).copy_(attended.transpose(1, 2))
    return output.transpose(0, 1).unsqueeze(0)


def softcapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    bias: list[Tensor] | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`attention` on softcap * tanh(scale Q K^T), to which the bias is added."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        return by_products(q, k, v, [], [] if bias is None else [bias], scale, softcap, is_causal)

    return attention(query, key, value, tokens, bias, is_causal, scale, attend=attend)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attention` with one kernel for sequences of all lengths: on CUDA, in half precision, without a bias."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    bounds, longest = tokens.bounds, tokens.longest
    window = (-1, 0 if is_causal else -1)
    output: Any = varlen_attention_by_torch(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=window, enable_gqa=enable_gqa
    )
    return output.transpose(0, 1).unsqueeze(0)


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: Tokens,
    key_tokens: Tokens,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of packed queries on packed keys: every token sees all key tokens of its row."""
    outputs = []
    for group in tokens.groups:
        for index, row in enumerate(group.rows.tolist()):
            start, length = key_tokens.spans[row]
            output = F.scaled_dot_product_attention(
                _sequences(query, group.start + index * group.length, 1, group.length),
                _sequences(key, start, 1, length),
                _sequences(value, start, 1, length),
                scale=scale,
                enable_gqa=enable_gqa,
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).transpose(0, 1).unsqueeze(0)


def _sequences(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """(1, heads, T, dim) -> a view (count, heads, length, dim)."""
    _, heads, _, dim = x.shape
    _, per_head, per_token, per_dim = x.stride()
    strides = (length * per_token, per_head, per_token, per_dim)
    return x.as_strided((count, heads, length, dim), strides, x.storage_offset() + start * per_token)


COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "==": torch.eq,
    "!=": torch.ne,
    ">": torch.gt,
    ">=": torch.ge,
    "<": torch.lt,
    "<=": torch.le,
}


# --- what must hold of a call -----------------------------------------------------------------------------------


def is_zero_or_one(mask: Tensor) -> Tensor:
    """Whether a mask contains only 0 and 1."""
    return ((mask == 0) | (mask == 1)).all()


def is_exact(lengths: Tensor) -> Tensor:
    """Whether all lengths are small enough to be exact in every dtype."""
    return (lengths.long().abs() <= EXACT).all()


def has_tokens_of(mask: Tensor, lengths: Tensor) -> Tensor:
    """Whether every row has as many tokens as its length says; lengths up to 1 are fractions of the row."""
    said = lengths.flatten().to(torch.float64)
    if lengths.is_floating_point():
        said = torch.where((said <= 1).all(), (said * mask.shape[1]).floor(), said)
    return (mask.bool().sum(1) >= said.clamp(max=mask.shape[1])).all()


def is_valid_between(mask: Tensor, start: int, end: int | None) -> Tensor:
    """Whether no row has padding from position `start` to `end`."""
    return mask[:, start:end].bool().all()


def is_valid_at(mask: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Whether there is no padding at these rows and positions."""
    return mask.bool()[rows, positions].all()


def is_ignored_at_padding(mask: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Whether the labels [batch * length] at padding are all `ignored`."""
    return (mask.bool().flatten() | (labels == ignored)).all()


def is_padded_right(mask: Tensor) -> Tensor:
    """Whether padding comes after the tokens in every row."""
    return (mask[:, 1:].bool() <= mask[:, :-1].bool()).all()


def is_bounded(largest: Tensor) -> Tensor:
    """Whether the largest bias that a mask adds cannot itself mask."""
    return largest <= BOUND


def has_no_empty_row(mask: Tensor) -> Tensor:
    """Whether every row has a token."""
    return mask.bool().any(1).all()


def has_keys_for_queries(mask: Tensor, key_mask: Tensor) -> Tensor:
    """Whether every row with queries also has keys."""
    return (mask.bool().any(1) <= key_mask.bool().any(1)).all()
