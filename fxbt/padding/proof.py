"""Proves what an attention mask does to padding, from its nodes at symbolic positions (see `masks`).

Let v be the validity mask, i a query and j a key of row b. Padding can be dropped if the mask blocks every j with v[b,
j] = 0 from every i with v[b, i] = 1, so that valid tokens see only valid tokens. Among valid tokens, the mask says
nothing, "j <= i" (which packing preserves, because it preserves order), or it is a block to read at the original
positions.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import fx

from ..analysis.axes import IDENTITIES, RESHAPES, UNIT_DIMS, sizes_of
from ..analysis.masks import (
    Index,
    Truth,
    evaluate,
    index_symbols,
    is_causal,
    looked_at,
    read_constants,
    zero_else_below,
)
from ..analysis.rounding import Opaque, Rounding, converted
from ..graph.blocks import ATTENTIONS, mask_of
from ..graph.miss import Miss
from ..graph.node import argument
from ..graph.opsets import CASTS
from ..kernels.packed import BOUND
from ..torch_compat import Max, Min
from .validity_sources import Validity, computed

EMBEDDING = torch.ops.aten.embedding.default
# An additive mask blocks below this: exp of it is 0 beside any score that a model computes. -10000 is not enough: a row
# that it blocks everywhere still averages over padding by the scores.
BLOCKING = -1e8
_POSITIONS = 2.0**31  # larger than any length or position


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
            raise Miss("the attention has keys that are not the tokens' own, such as an attention sink", node=node)
        self.node = node
        self.index = index_symbols(4)
        rank = node.meta["val"].dim()
        sizes = sizes_of(node)
        inner = tuple(sympy.Integer(0) if size == 1 else at for size, at in zip(sizes, self.index[-rank:], strict=True))
        constants, seen = read_constants(node), looked_at(node)
        self.assumes = {str(each.target) for each, content in constants.items() if each in seen and is_read(content)}
        try:
            self.value = evaluate(node, inner, constants)
        except Opaque as error:
            raise Miss("the attention mask cannot be read", node=node, found=str(error)) from error
        self._nodes = {n.name: n for n in node.graph.nodes}
        dtype = node.meta["val"].dtype
        self.limit = BLOCKING if dtype is not torch.float16 else torch.finfo(dtype).min / 2

    def validities(self, graph: fx.Graph) -> list[Validity]:
        """What may say which keys are valid: inputs [batch, length] that the mask reads at (batch, key), and booleans
        computed from lengths."""
        batch, _, _, key = self.index
        read = {_name(f): f for f in self.value.atoms(AppliedUndef) if f.args == (batch, key)}
        inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name in read and n.meta["val"].dim() == 2]
        given = [found for node in inputs for found in self._validities(node, read[node.name])]
        return [*given, *self._that_block(computed(self.node, self.index))]

    def _validities(self, node: fx.Node, data: Any) -> list[Validity]:
        """The readings of an input: a mask of 0 and 1, a boolean mask of tokens or of padding, or ids with a
        padding_idx."""
        conditions = [c if c.lhs == data else c.reversed for c in self.value.atoms(Relational) if data in c.args]
        conditions = [c for one in conditions if one.rhs.is_Integer for c in (one, sympy.Not(one))]
        pads = _padding_ids(node)
        if node.meta["val"].dtype is torch.bool:
            found = [Validity(node), Validity(node, sympy.Eq, 0)]
        elif pads is not None and conditions:
            found = [Validity(node, type(c), int(c.rhs)) for c in conditions if any(_spares(c, data, p) for p in pads)]
        else:
            return [Validity(node)]
        return self._that_block(found)

    def _that_block(self, found: Iterable[Validity]) -> list[Validity]:
        """Those whose padding the mask blocks."""
        batch, _, _, key = self.index
        return [one for one in found if self._range(one.assume(self.value, (batch, key), False))[1] <= self.limit]

    def self_attention(self, tokens: Validity) -> Residue:
        """What the mask says among the valid tokens, which are both the queries and the keys.

        Raises:
            Miss: padding is not proven to be blocked.
        """
        query, key = self.index[2:]
        among_valid = self._at((tokens, query, True), (tokens, key, True))
        blocked = self._check_blocked(self._at((tokens, query, True), (tokens, key, False)))
        if not isinstance(self.value, Truth):
            self._check_open(among_valid.subs(key, query), blocked)
        return self._residue(among_valid)

    def addends(self) -> list[fx.Node]:
        """The values that the mask adds, which count as no larger than `packed.BOUND`."""
        names = {_name(f) for f in _data_in(self.value)}
        found = [self._nodes[name] for name in sorted(names) if name in self._nodes]
        return [node for node in found if node.op != "placeholder"]  # the proof knows the values of inputs

    def without_padding(self, validities: list[Validity]) -> Residue:
        """What the mask says if all tokens are valid."""
        batch, _, query, key = self.index
        value = self.value
        places = {(batch, query), (batch, key), *(data.args for data in self.value.atoms(AppliedUndef))}
        for tokens, at in itertools.product(validities, sorted(places, key=str)):
            value = tokens.assume(value, at, True) if len(at) == 2 else value
        return self._residue(value)

    def is_padding_alone(self, tokens: Validity, keys: Validity) -> bool:
        """Whether every valid query sees exactly the valid keys of its row."""
        query, key = self.index[2:]
        highest = self._range(self._at((tokens, query, True), (keys, key, False)))[1]
        among_valid = self._at((tokens, query, True), (keys, key, True))
        return highest <= self.limit and self._residue(among_valid) is Residue.NOTHING

    def blocks_keys(self, keys: Validity) -> None:
        """Proves that no query sees padded keys, and every query sees some valid key (of a row that has any)."""
        key = self.index[3]
        blocked = self._check_blocked(self._at((keys, key, False)))
        if not isinstance(self.value, Truth):
            self._check_open(self._at((keys, key, True)), blocked)

    def _at(self, *settings: tuple[Validity, Any, bool]) -> Any:
        """The mask with valid tokens or padding at these positions."""
        value = self.value
        for tokens, position, is_valid in settings:
            value = tokens.assume(value, (self.index[0], position), is_valid)
        return value

    def _check_blocked(self, value: Any) -> float:
        """The highest value of the mask at padding, which must be low enough to block."""
        highest = self._range(value)[1]
        if highest > self.limit:
            raise Miss("padding is not masked out of the attention", node=self.node, found=_shown(value))
        return highest

    def _check_open(self, value: Any, blocked: float) -> None:
        lowest = self._range(value)[0]
        if lowest == -math.inf or lowest - blocked < -self.limit / 2:
            raise Miss(
                "a valid token may not see itself, so padding may affect it", node=self.node, found=_shown(value)
            )

    def _range(self, value: Any) -> tuple[float, float]:
        """The lowest and highest values of a mask as an addend of scores."""
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
                # the caller's values may be as low or as high as a mask
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
    masks = [mask_of(call) for call in graph.nodes if call.target in ATTENTIONS]
    return {mask: AttentionMask(mask) for mask in dict.fromkeys(masks) if isinstance(mask, fx.Node)}


def is_read(content: torch.Tensor) -> bool:
    """Whether `masks` looks at a constant's content: a number or a square."""
    return content.numel() == 1 or (content.dim() > 1 and content.shape[-1] == content.shape[-2])


def _padding_ids(node: fx.Node) -> set[int] | None:
    """The padding_idx of embeddings that look a value up; None if none does."""
    found: set[int] | None = None
    for user in node.users:
        inner = None
        if user.target is EMBEDDING and user.args[1] is node:
            padding = argument(user, "padding_idx", -1)
            inner = {padding} if isinstance(padding, int) and padding >= 0 else set()
        elif user.target in RESHAPES | UNIT_DIMS | IDENTITIES | CASTS:
            inner = _padding_ids(user)
        found = inner if found is None else found | (inner or set())
    return found


def _spares(condition: Relational, data: Any, padding: int) -> bool:
    """Whether a condition on nonnegative ids holds for all but one."""
    others = (padding + 1, padding - 1) if padding else (1,)
    return condition.subs(data, padding) == sympy.false and all(condition.subs(data, n) == sympy.true for n in others)


def value_at_padding(node: fx.Node, index: Index, tokens: Validity, at: Index) -> float | None:
    """The number that `node` has at `index` wherever the token at `at` is padding; None if it is not one number."""
    try:
        value = evaluate(node, index, {})
    except Opaque:
        return None
    value = tokens.assume(value, at, False)
    if isinstance(value, Truth):
        return {sympy.true: 1.0, sympy.false: 0.0}.get(value)
    return float(value) if value.is_number and value.is_real else None


def _name(applied: Any) -> str:
    return applied.name if isinstance(applied, sympy.Symbol) else applied.func.__name__


def _data_in(value: Any) -> set[Any]:
    """The data among the addends of an additive mask, without what its conditions compare."""
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
