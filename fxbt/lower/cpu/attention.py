"""Attention on a CPU by our own kernel, or as two batched products around a softmax, where they beat SDPA's kernel.

torch 2.13's flash kernel multiplies blocks of 32 queries through MKL there. Products of all heads of a few sequences,
or of a block of queries, are larger and faster as long as their scores stay in the cache: with 12 heads on Zen 5
1.6 times with MKL at 16 to 128 tokens, 1.8 with oneDNN from 128 on; on Zen 3, only in batches of 16 to 64 tokens. The
kernel of `native` takes 0.8 to 1.0 of SDPA's time there from 64 tokens on, and sequences of all lengths in one call.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...graph.blocks import BY_PRODUCTS, SDPA
from ...graph.node import argument
from ...kernels import native, packed
from ...kernels.attention_products import by_products, products
from ...kernels.autotune import Calls, Contest, Tuner, bucket_of
from ...kernels.forks import FORKS
from ...torch_compat import is_amx_tile_supported
from ..once import additive

LENGTHS = (16, 32, 64, 128, 256, 512)  # tokens of a sequence that are measured
UP_TO = (24, 48, 96, 192, 384)
BY_ONEDNN = "oneDNN products"
SEVERAL = 512  # tokens of several sequences: SDPA spreads them over threads, products hold the scores of all

# As SDPA of (query, key, value, bias, is_causal, scale); None stands for SDPA's own.
Kernel = Callable[..., Tensor]


def attend_fast(graph: fx.Graph, tuner: Tuner) -> None:
    """Let attentions choose their kernel by length, in a dense graph or a packed one."""
    read: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in (SDPA, BY_PRODUCTS, packed.attention) or not _can_be_products(node):
            continue
        heads, head_dim = node.args[0].meta["val"].shape[1::2]
        if node.target is BY_PRODUCTS:
            node.target = ByProducts(tuner.choose(ways_to_multiply(heads, head_dim)))
            continue
        kernels = attention_kernels()
        one, several = (
            [kernels[name] for name in tuner.choose(attentions(heads, head_dim, several))] for several in (False, True)
        )
        if not any(one + several):
            continue
        attend, library = Attend(one, several), native.library()
        has_no_bias = node.target is packed.attention and not node.args[4]
        if has_no_bias and library and attend.is_by(library.attention):
            node.target = PackedAtOnce(library)
            continue
        _read_mask(graph, node, read)
        if node.target is SDPA:
            node.target = attend
        else:
            node.kwargs = {**node.kwargs, "attend": attend}


def _read_mask(graph: fx.Graph, attention: fx.Node, read: dict[fx.Node, fx.Node]) -> None:
    """Puts a `Mask` in the place of an attention's mask, or a list of them in that of its blocks: one for all."""
    is_packed = attention.target is packed.attention
    mask = (attention.args[4] or None) if is_packed else argument(attention, "attn_mask")
    if not isinstance(mask, fx.Node):
        return
    if mask not in read:
        with graph.inserting_after(mask):
            read[mask] = graph.call_function(Mask.of_blocks if is_packed else Mask.of, (mask,))
    attention.replace_input_with(mask, read[mask])


def _can_be_products(node: fx.Node) -> bool:
    """Whether an attention is in float32 on the CPU; in SDPA's place products need a key head for each query head."""
    values: list[Any] = [operand.meta.get("val") for operand in node.args[:3] if isinstance(operand, fx.Node)]
    if len(values) != 3 or torch.is_autocast_enabled("cpu"):
        return False
    if not all(x.dim() == 4 and x.dtype is torch.float32 and x.device.type == "cpu" for x in values):
        return False
    heads, head_dim = values[0].shape[1::2]
    is_static = isinstance(heads, int) and isinstance(head_dim, int)
    return is_static and (node.target is BY_PRODUCTS or all(x.shape[1] == heads for x in values))


@dataclass(frozen=True)
class Mask:
    """A mask for SDPA, and, if it can be, as an addend to the scores: where it blocks a whole row, SDPA gives zeros."""

    mask: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, mask: Tensor) -> Mask:
        """Reads a mask (batch | 1, heads | 1, seq | 1, keys | 1) once for all attentions that it is for."""
        mask = additive(mask, torch.float32) if mask.dtype is torch.bool else mask
        if mask.dim() != 4 or mask.dtype is not torch.float32:
            return cls(mask, None)
        bias = mask
        for dim, stride in enumerate(mask.stride()):
            bias = bias.narrow(dim, 0, 1) if stride == 0 else bias  # what was expanded is read once
        bias = bias.contiguous()
        is_open = bias.numel() > 0 and not bool((bias.amax(-1) == -math.inf).any())
        return cls(mask, bias if is_open else None)

    @classmethod
    def of_blocks(cls, masks: list[Tensor]) -> list[Mask]:
        """The same for the part that each group of sequences sees."""
        return [cls.of(mask) for mask in masks]


def is_for_sdpa(attn_mask: Mask | None, dropout_p: float, *operands: Tensor) -> bool:
    """Whether no other kernel computes such an attention: its mask is no addend, it drops out, or it is empty."""
    is_masked_otherwise = attn_mask is not None and attn_mask.bias is None
    return is_masked_otherwise or bool(dropout_p) or not all(operand.numel() for operand in operands)


class Attend:
    """`scaled_dot_product_attention` by the kernel that was chosen for the length of one sequence, or of several."""

    def __init__(self, one: Sequence[Kernel | None], several: Sequence[Kernel | None]):
        self._one, self._several = one, several
        self.__name__ = "attend"  # fx names nodes by it

    def is_by(self, kernel: Kernel) -> bool:
        """Whether this kernel was chosen for all lengths."""
        return all(chosen == kernel for chosen in (*self._one, *self._several))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Mask | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kernel = (self._one if len(key) == 1 else self._several)[bucket_of(key.shape[2], UP_TO)]
        mask, bias = (attn_mask.mask, attn_mask.bias) if attn_mask else (None, None)
        if kernel is None or is_for_sdpa(attn_mask, dropout_p, query, key):
            return F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return kernel(query, key, value, bias, is_causal, scale)


class PackedAtOnce:
    """`packed.attention` without a bias, by our own kernel for sequences of all lengths."""

    def __init__(self, library: native.Library):
        self._library = library
        self.__name__ = "packed_at_once"

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: packed.Tokens,
        bias: None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return self._library.attention(query, key, value, None, is_causal, scale, tokens.bounds, tokens.longest)


class ByProducts:
    """`attention_by_products` with the products that were `chosen` for the length."""

    def __init__(self, chosen: tuple[str, ...]):
        self._contexts = [by_onednn if name == BY_ONEDNN else contextlib.nullcontext() for name in chosen]
        self.__name__ = "attend_by_products"

    def __call__(self, query: Tensor, key: Tensor, *others: Any, **options: Any) -> Tensor:
        with self._contexts[bucket_of(key.shape[2], UP_TO)]:
            return by_products(query, key, *others, **options)


# --- products by oneDNN -----------------------------------------------------------------------------------------


class _ByOneDNN:
    """`with by_onednn:` sends float32 products to oneDNN, where `onednn_is_exact`.

    Torch takes it for them only where bfloat16 would do; without instructions for that, oneDNN computes in float32.
    The setting is the process's own: other threads' products go there too meanwhile, and are as exact.
    """

    def __init__(self) -> None:
        self._setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        self._lock = FORKS.lock()
        self._running, self._before = 0, "none"

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._before, self._setting.fp32_precision = self._setting.fp32_precision, "bf16"
            self._running += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._setting.fp32_precision = self._before


by_onednn = _ByOneDNN()


def products_by_onednn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`products`, computed by oneDNN's float32 kernels, which are twice as fast as MKL's on AMD's processors."""
    with by_onednn:
        return products(query, key, value, bias, is_causal, scale)


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN computes products in float32 here though bfloat16 is allowed: not with AMX. Tried, too."""
    if platform.machine() not in ("x86_64", "AMD64") or is_amx_tile_supported():
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), by_onednn:
        for rows, inner, columns in ((16, 16, 16), (64, 64, 64), (128, 32, 128), (48, 300, 80)):
            a, b = (torch.randn(4, *shape, generator=generator) for shape in ((rows, inner), (inner, columns)))
            gap = (torch.bmm(a, b) - torch.bmm(a.double(), b.double())).abs().max()
            if gap > 1e-5 * math.sqrt(inner):  # bfloat16 would be off by 1e-3 and more
                return False
    return True


def attention_kernels() -> dict[str, Kernel | None]:
    """The kernels for an attention, by name."""
    kernels: dict[str, Kernel | None] = {"SDPA": None, **product_kernels()}
    library = native.library()
    return kernels if library is None else {**kernels, "native": library.attention}


def product_kernels() -> dict[str, Kernel]:
    """Products by torch's default library, and by oneDNN where that computes in float32."""
    return {"products": products, **({BY_ONEDNN: products_by_onednn} if onednn_is_exact() else {})}


def attentions(heads: int, head_dim: int, several: bool) -> Contest:
    """The kernels for one sequence of so many heads or for several, by their length."""
    name = f"attention {heads}x{head_dim} float32" + (", several" if several else "")
    return _contest(name, heads, head_dim, attention_kernels(), several)


def ways_to_multiply(heads: int, head_dim: int) -> Contest:
    """The products, as `attentions` of one sequence."""
    return _contest(f"products {heads}x{head_dim} float32", heads, head_dim, product_kernels())


def _contest(
    name: str, heads: int, head_dim: int, kernels: Mapping[str, Kernel | None], several: bool = False
) -> Contest:
    runs = [kernel or F.scaled_dot_product_attention for kernel in kernels.values()]

    def calls(length: int) -> list[Calls]:
        batch = max(2, SEVERAL // length) if several else 1
        query, key, value = torch.full((batch, length, 3 * heads, head_dim), 0.5).transpose(1, 2).split(heads, 1)
        return [[functools.partial(run, query, key, value)] for run in runs]

    first, *_ = kernels
    by_rule = "native" if "native" in kernels and native.comes_first() else first
    return Contest(name, tuple(kernels), LENGTHS, UP_TO, calls, by_rule)
