"""Rotary position embedding as one node, half-split (Llama) or interleaved (GPT-J, RoFormer)."""

from __future__ import annotations

from typing import Any

import fxbt


class Rotary(fxbt.Rule):
    """x * cos + rotate(x) * sin, where rotate turns each pair (a, b) into (-b, a)

    Source: Su et al. 2021, "RoFormer: enhanced transformer with rotary position embedding", equation 34.
    """

    name = "rotary"
    makes = frozenset({"rotary"})
    outline = "rotary"

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        first, second = x.chunk(2, -1)
        half_split = op.cat([-second, first], -1)
        even, odd = x[..., ::2], x[..., 1::2]
        interleaved = op.flatten(op.stack([-odd, even], -1), -2)
        return x * cos + op.either(half_split, interleaved) * sin
