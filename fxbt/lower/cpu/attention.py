"""Attention on a CPU with our own kernel, or as two batched products around a softmax, where these beat SDPA's kernel.

torch 2.13's flash kernel multiplies blocks of 32 queries with MKL. Products over all heads of a few sequences, or of a
block of queries, are larger, and faster while their scores fit the cache: 1.6 times with 12 heads, MKL and 16 to 128
tokens on Zen 5; on Zen 3 only for batches of 16 to 64 tokens. There, the kernel of `native` takes 0.8 to 1.0 of SDPA's
time from 64 tokens on, and handles sequences of all lengths in one call.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.blocks import SDPA
from ...graph.node import argument, parameters
from ...kernels import native, packed
from ...kernels.attention_products import Kernel, products, sdpa
from ...kernels.autotune import Tuner
from ...kernels.turns import Calls, Contest, bucket_of
from ..once import additive
from .heads import Heads, projected

LENGTHS = (16, 32, 64, 128, 256, 512)  # measured numbers of tokens per sequence
UP_TO = (24, 48, 96, 192, 384)
SEVERAL = 512  # tokens of several sequences: SDPA spreads them over threads, products hold the scores of all of them


def attend_fast(graph: fx.Graph, tuner: Tuner) -> None:
    """Lets attentions choose their kernel by length, in a dense or packed graph."""
    read: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in (SDPA, packed.attention) or not _can_be_products(node):
            continue
        heads, head_dim = node.args[0].meta["val"].shape[1::2]
        kernels = attention_kernels()
        one, several = (
            [kernels[name] for name in tuner.choose(attentions(heads, head_dim, several))] for several in (False, True)
        )
        attend = Attend(one, several)
        if not attend.is_by(sdpa):
            _use(graph, node, attend, read)
    graph.eliminate_dead_code()  # removes views between a projection and its attention


def _use(graph: fx.Graph, node: fx.Node, attend: Attend, read: dict[fx.Node, fx.Node]) -> None:
    """Replaces an attention by the chosen kernel, from its projection on if possible."""
    given, library = _given(node), native.library()
    tokens, mask, options = given.get("tokens"), _read_mask(graph, given, read), (given["is_causal"], given["scale"])
    operands, node.kwargs = node.args[:3], {}
    if library is None or not attend.is_by(library.attention) or (tokens and mask):
        target: Any = packed.attention if tokens else attend
        node.target, node.args = target, (*operands, *([tokens] if tokens else []), mask, *options)
        node.kwargs = {"attend": attend} if tokens else {}  # type: ignore[dict-item]
    elif found := projected(node):
        projection, heads, merged = found
        node.target = AttendProjection(heads, library, is_packed=tokens is not None)
        node.args, node.meta = (projection, tokens or mask, *options), dict(merged.meta)
        merged.replace_all_uses_with(node)
    else:
        node.target = packed_at_once(library) if tokens else attend
        node.args = (*operands, tokens or mask, *options)


def _given(attention: fx.Node) -> dict[str, Any]:
    """The arguments of a dense or packed attention, by name."""
    if attention.target is SDPA:
        return {name: argument(attention, name) for name in parameters(SDPA)}
    bound = inspect.signature(packed.attention).bind(*attention.args, **attention.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _read_mask(graph: fx.Graph, given: dict[str, Any], read: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The `Mask` of an attention, or the list of them for a packed one's blocks; shared by all attentions."""
    mask, function = (given["bias"], Mask.of_blocks) if "tokens" in given else (given["attn_mask"], Mask.of)
    if mask is None or mask in read:
        return read.get(mask)
    with graph.inserting_after(mask):
        read[mask] = graph.call_function(function, (mask,))
    return read[mask]


def _can_be_products(node: fx.Node) -> bool:
    """Whether an attention is in float32 on the CPU, with one key head per query head."""
    values: list[Any] = [operand.meta.get("val") for operand in node.args[:3] if isinstance(operand, fx.Node)]
    if len(values) != 3 or torch.is_autocast_enabled("cpu"):
        return False
    if not all(x.dim() == 4 and x.dtype is torch.float32 and x.device.type == "cpu" for x in values):
        return False
    heads, head_dim = values[0].shape[1::2]
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return False
    drops_out = node.target is SDPA and argument(node, "dropout_p") != 0
    return not drops_out and all(x.shape[1] == heads for x in values)


@dataclass(frozen=True)
class Mask:
    """A mask for SDPA, and if possible as an addend to the scores; in rows that it blocks entirely, SDPA gives
    zeros."""

    mask: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Mask:
        """Reads a mask (batch | 1, heads | 1, seq | 1, keys | 1) once for all its attentions."""
        mask = additive(mask, torch.float32) if mask.dtype is torch.bool else mask
        if mask.dim() != 4 or mask.dtype is not torch.float32:
            return cls(mask, None)
        bias = mask
        for dim, stride in enumerate(mask.stride()):
            bias = bias.narrow(dim, 0, 1) if stride == 0 else bias  # an expanded dim is read once
        bias = bias.contiguous()
        is_open = bias.numel() > 0 and not bool((bias.amax(-1) == -math.inf).any())
        return cls(mask, bias if is_open else None)

    @classmethod
    def of_blocks(cls, masks: list[Tensor]) -> list[Mask]:
        """The same for the part of each group of sequences."""
        return [cls.of(mask) for mask in masks]


def is_for_sdpa(mask: Mask | None, *operands: Tensor) -> bool:
    """Whether only SDPA computes such an attention: its mask is not an addend, or it is empty."""
    is_masked_otherwise = mask is not None and mask.bias is None
    return is_masked_otherwise or not all(operand.numel() for operand in operands)


class Attend:
    """The kernels chosen for the lengths of one sequence and of several; a `Kernel` itself, except for its mask."""

    def __init__(self, one: Sequence[Kernel], several: Sequence[Kernel]):
        self._one, self._several = one, several
        self.__name__ = "attend"  # fx names nodes after it

    def is_by(self, kernel: Kernel) -> bool:
        """Whether this kernel was chosen for all lengths."""
        return all(chosen == kernel for chosen in (*self._one, *self._several))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None = None, *options: Any) -> Tensor:
        kernel = (self._one if len(key) == 1 else self._several)[bucket_of(key.shape[2], UP_TO)]
        if kernel is sdpa or is_for_sdpa(mask, query, key):
            return sdpa(query, key, value, mask.mask if mask else None, *options)
        return kernel(query, key, value, mask.bias if mask else None, *options)


def packed_at_once(library: native.Library) -> Callable[..., Tensor]:
    """`packed.attention` without a bias, with our own kernel for sequences of all lengths."""

    def packed_at_once(q: Tensor, k: Tensor, v: Tensor, tokens: packed.Tokens, is_causal: bool, scale: Any) -> Tensor:
        return library.attention(q, k, v, None, is_causal, scale, tokens.bounds, tokens.longest)

    return packed_at_once


class AttendProjection:
    """Attention on the heads of a projection (batch, seq, columns) with our own kernel, without views, heads merged
    again.

    It takes a mask, or the tokens if it `is_packed`, and all options of a `Kernel`.
    """

    def __init__(self, heads: Heads, library: native.Library, is_packed: bool):
        self.heads, self.is_packed = heads, is_packed
        self._run = library.attention_of(*heads)
        self.__name__ = "attend_projection"

    def __call__(self, projection: Tensor, seen: Any, is_causal: bool, scale: float | None) -> Tensor:
        if self.is_packed:
            return self._run(projection, None, is_causal, scale, seen.bounds, seen.longest)
        if is_for_sdpa(seen, projection):
            query, key, value = self.heads.of(projection)
            attended = sdpa(query, key, value, seen.mask if seen else None, is_causal, scale)
            return attended.transpose(1, 2).flatten(2)
        return self._run(projection, seen.bias if seen else None, is_causal, scale)


def attention_kernels() -> dict[str, Kernel]:
    """The kernels for an attention, by name."""
    kernels: dict[str, Kernel] = {"SDPA": sdpa, "products": products}
    library = native.library()
    return kernels if library is None else {**kernels, "native": library.attention}


def attentions(heads: int, head_dim: int, several: bool) -> Contest:
    """The kernels for attention of one or several sequences with so many heads, by sequence length."""
    name = f"attention {heads}x{head_dim} float32" + (", several" if several else "")
    return _contest(name, heads, head_dim, attention_kernels(), several)


def _contest(name: str, heads: int, head_dim: int, kernels: Mapping[str, Kernel], several: bool = False) -> Contest:
    def calls(length: int) -> list[Calls]:
        batch = max(2, SEVERAL // length) if several else 1
        qkv = torch.full((batch, length, 3 * heads, head_dim), 0.5, dtype=torch.float32, device="cpu")
        query, key, value = qkv.transpose(1, 2).split(heads, 1)
        return [[functools.partial(run, query, key, value)] for run in kernels.values()]

    first, *_ = kernels
    by_rule = "native" if "native" in kernels and native.comes_first() else first
    return Contest(name, tuple(kernels), LENGTHS, UP_TO, calls, by_rule)
