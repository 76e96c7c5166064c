"""What an attention mask does with padding, proven from its nodes at symbolic positions (see `masks`).

With v the validity mask, i a query and j a key of row b: padding can be dropped if the mask blocks every j with
v[b, j] = 0 from every i with v[b, i] = 1, so that valid tokens see valid tokens only. What the mask says among valid
tokens is nothing, "j <= i" (which survives packing, as order does), or a block to be read at the original positions.
"""

from __future__ import annotations

import enum
import itertools
import math
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch.utils._sympy.functions import Max, Min

from .axes import sizes_of
from .canonical import argument
from .masks import (
    Index,
    Opaque,
    Rounding,
    Truth,
    converted,
    evaluate,
    index_symbols,
    is_causal,
    read_constants,
    zero_else_below,
)
from .miss import Miss
from .packed import BOUND

SDPA = torch.ops.aten.scaled_dot_product_attention.default
# An additive mask counts as blocking below this: exp of it is 0 beside any score that a model computes. -10000 is not
# enough, since a row that it blocks everywhere still averages over padding by the scores.
BLOCKING = -1e8
_POSITIONS = 2.0**31  # more than a length or position can be


class Residue(enum.Enum):
    """What a mask says among valid tokens."""

    NOTHING = "nothing"
    CAUSAL = "causal"
    BLOCK = "block"


class AttentionMask:
    """The mask of one attention, evaluated at (batch, head, query, key).

    Raises:
        Miss: its value at a position is not known.
    """

    def __init__(self, node: fx.Node):
        if node.target is torch.ops.aten.cat.default:
            raise Miss("an attention sink or other keys of their own stand beside the tokens'", node=node)
        self.node = node
        self.index = index_symbols(4)
        rank = node.meta["val"].dim()
        sizes = sizes_of(node)
        inner = tuple(sympy.Integer(0) if size == 1 else at for size, at in zip(sizes, self.index[-rank:], strict=True))
        constants = read_constants(node)
        self.assumes = {str(constant.target) for constant, content in constants.items() if _is_read(content)}
        try:
            self.value = evaluate(node, inner, constants)
        except Opaque as error:
            raise Miss("the attention mask cannot be read", node=node, found=str(error)) from error
        self._nodes = {n.name: n for n in node.graph.nodes}
        dtype = node.meta["val"].dtype
        self.limit = BLOCKING if dtype is not torch.float16 else torch.finfo(dtype).min / 2

    def validity_masks(self, graph: fx.Graph) -> list[fx.Node]:
        """The graph's inputs [batch, length] that the mask reads at (batch, key)."""
        batch, _, _, key = self.index
        names = {_name(f) for f in self.value.atoms(AppliedUndef) if f.args == (batch, key)}
        return [n for n in graph.nodes if n.op == "placeholder" and n.name in names and n.meta["val"].dim() == 2]

    def self_attention(self, mask: fx.Node) -> Residue:
        """What is left among the valid tokens of `mask`, which holds both the queries and the keys.

        Raises:
            Miss: padding is not proven to be blocked.
        """
        batch, _, query, key = self.index
        among_valid = self._at({(mask, query): 1, (mask, key): 1})
        blocked = self._check_blocked(self._at({(mask, query): 1, (mask, key): 0}))
        if not isinstance(self.value, Truth):
            self._check_open(among_valid.subs(key, query), blocked)
        return self._residue(among_valid)

    def addends(self) -> list[fx.Node]:
        """The values that the mask adds, and that are taken to be no larger than `packed.BOUND`."""
        names = {_name(f) for f in _data_in(self.value)}
        found = [self._nodes[name] for name in sorted(names) if name in self._nodes]
        return [node for node in found if node.op != "placeholder"]  # of those, the proof knows the value

    def without_padding(self, masks: list[fx.Node]) -> Residue:
        """What the mask says where all of `masks` are 1 throughout."""
        names = {mask.name for mask in masks}
        ones = {f: 1 for f in self.value.atoms(AppliedUndef) if _name(f) in names}
        return self._residue(self.value.subs(ones))

    def is_padding_alone(self, mask: fx.Node, key_mask: fx.Node) -> bool:
        """Whether every query that `mask` holds valid sees exactly the keys of its row that `key_mask` does."""
        _, _, query, key = self.index
        highest = self._range(self._at({(mask, query): 1, (key_mask, key): 0}))[1]
        return (
            highest <= self.limit and self._residue(self._at({(mask, query): 1, (key_mask, key): 1})) is Residue.NOTHING
        )

    def blocks_keys(self, key_mask: fx.Node) -> None:
        """Proves that no query sees padded keys, and all see some valid one (of a row that has any)."""
        key = self.index[3]
        blocked = self._check_blocked(self._at({(key_mask, key): 0}))
        if not isinstance(self.value, Truth):
            self._check_open(self._at({(key_mask, key): 1}), blocked)

    def _at(self, settings: dict[tuple[fx.Node, Any], int]) -> Any:
        batch = self.index[0]
        known = {(node.name, (batch, position)): value for (node, position), value in settings.items()}
        found = {f: known[_name(f), f.args] for f in self.value.atoms(AppliedUndef) if (_name(f), f.args) in known}
        return self.value.subs(found)

    def _check_blocked(self, value: Any) -> float:
        """The highest that the mask is at padding, which must be low enough."""
        highest = self._range(value)[1]
        if highest > self.limit:
            raise Miss("padding is not masked out of the attention", node=self.node, found=_shown(value))
        return highest

    def _check_open(self, value: Any, blocked: float) -> None:
        lowest = self._range(value)[0]
        if lowest == -math.inf or lowest - blocked < -self.limit / 2:
            raise Miss("a valid token may not see itself, so padding may show", node=self.node, found=_shown(value))

    def _range(self, value: Any) -> tuple[float, float]:
        """The lowest and highest that a mask can be as an addend of scores."""
        if isinstance(value, Truth):
            return (-math.inf, -math.inf) if value is sympy.false else UNKNOWN
        match value:
            case sympy.Piecewise():
                return _hull([self._range(case) for case, when in value.args if when is not sympy.false])
            case sympy.Add():
                ranges = [self._range(term) for term in value.args]
                return _known(sum(low for low, _ in ranges), sum(high for _, high in ranges))
            case sympy.Mul():
                return _product([self._range(factor) for factor in value.args])
            case Rounding():
                low, high = self._range(value.args[0])
                return float(converted(low, value.dtype)), float(converted(high, value.dtype))
            case sympy.Abs():
                low, high = self._range(value.args[0])
                return 0.0, max(-low, high)
            case Max() | Min():
                pick = max if isinstance(value, Max) else min
                lows, highs = zip(*map(self._range, value.args), strict=True)
                return pick(lows), pick(highs)
            case AppliedUndef() | sympy.Symbol() if _name(value) in self._nodes:
                # what the caller gives may be as low as a mask, or as high
                is_input = self._nodes[_name(value)].op == "placeholder"
                return UNKNOWN if is_input else (-BOUND, BOUND)
            case sympy.Symbol():
                return 0.0, _POSITIONS
        is_number = value.is_number and (value.is_real or value in (sympy.oo, -sympy.oo))
        return (float(value), float(value)) if is_number else UNKNOWN

    def _residue(self, value: Any) -> Residue:
        if value in (sympy.true, 0):
            return Residue.NOTHING
        truth = value if isinstance(value, Truth) else zero_else_below(value, self.limit)
        return Residue.CAUSAL if truth is not None and is_causal(truth, *self.index[2:]) else Residue.BLOCK


def attention_masks(graph: fx.Graph) -> dict[fx.Node, AttentionMask]:
    """The masks of all attentions of a graph.

    Raises:
        Miss: one of them cannot be read.
    """
    masks = [argument(call, "attn_mask") for call in graph.nodes if call.target is SDPA]
    return {mask: AttentionMask(mask) for mask in dict.fromkeys(masks) if isinstance(mask, fx.Node)}


def _is_read(content: torch.Tensor) -> bool:
    """Whether `masks` looks at a constant's content: a number or a square."""
    return content.numel() == 1 or (content.dim() > 1 and content.shape[-1] == content.shape[-2])


def value_at_padding(node: fx.Node, index: Index, mask: fx.Node, at: Index) -> float | None:
    """The number that `node` is at `index` wherever `mask` is 0 at `at`; None where it is none."""
    try:
        value = evaluate(node, index, {})
    except Opaque:
        return None
    padding = {f: 0 for f in value.atoms(AppliedUndef) if _name(f) == mask.name and f.args == at}
    value = value.subs(padding)
    if isinstance(value, Truth):
        return {sympy.true: 1.0, sympy.false: 0.0}.get(value)
    return float(value) if value.is_number and value.is_real else None


def _name(applied: Any) -> str:
    return applied.name if isinstance(applied, sympy.Symbol) else applied.func.__name__


def _data_in(value: Any) -> set[Any]:
    """The data among the addends of an additive mask: not what its conditions compare."""
    if isinstance(value, Truth):
        return set()
    if isinstance(value, AppliedUndef | sympy.Symbol):
        return {value}
    cases = [case for case, _ in value.args] if isinstance(value, sympy.Piecewise) else value.args
    return set().union(*map(_data_in, cases))


UNKNOWN = (-math.inf, math.inf)


def _known(low: float, high: float) -> tuple[float, float]:
    return UNKNOWN if math.isnan(low) or math.isnan(high) else (low, high)


def _hull(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _product(ranges: list[tuple[float, float]]) -> tuple[float, float]:
    ends = [math.prod(chosen) for chosen in itertools.product(*ranges)]
    return _known(min(ends), max(ends)) if not any(map(math.isnan, ends)) else UNKNOWN


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"
