"""Projections that share an input as one: query, key, value = split(x W^T + b), W = [Wq; Wk; Wv].

The rule starts at an attention and follows each operand back to its linear, through ops that keep one projection
separate (layout, rotary, norms). Linears that share an input are merged: all three in self-attention, key and value in
cross-attention. The merged weight remains an expression of the original weights in the graph, so it follows every
change of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fxbt
from fxbt import Miss, argument, nearest_sources, ops

aten = torch.ops.aten

LINEAR = aten.linear.default
# Merging across a detach would turn a weight's missing gradient into zeros.
BARRIERS = {*ops.ATTENTIONS, aten.detach.default}


class MergeQKV(fxbt.Rule):
    """x Wq^T, x Wk^T, x Wv^T  ->  split(x [Wq; Wk; Wv]^T)"""

    name = "qkv"
    proven = True
    targets = ops.ATTENTIONS

    def pattern(self, op: Any, query: Any, key: Any, value: Any) -> Any:
        return op.attention(query, key, value)

    def check(self, m: fxbt.Found) -> None:
        projections = [source for name in ("query", "key", "value") if (source := _projection(m[name]))]
        linears = sorted(_sharing_an_input(projections))
        weights = [argument(linear, "weight") for linear in linears]
        is_parameter = all(isinstance(weight, fx.Node) and weight.op == "get_attr" for weight in weights)
        m.need(is_parameter, "a projection's weight is computed in the graph; expected a parameter")
        biases = [argument(linear, "bias") for linear in linears]
        m.stand_for(*linears)
        m.bind(x=argument(linears[0], "input"), weights=weights, has_bias=[bias is not None for bias in biases])
        m.bind(biases=[bias for bias in biases if bias is not None])

    def replace(
        self, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], has_bias: list[bool]
    ) -> tuple[Tensor, ...]:
        given, bias = iter(biases), None
        if biases:
            pairs = zip(weights, has_bias, strict=True)
            bias = torch.cat([next(given) if has else weight.new_zeros(len(weight)) for weight, has in pairs])
        return F.linear(x, torch.cat(weights), bias).split([len(weight) for weight in weights], dim=-1)


def _projection(operand: object) -> fx.Node | None:
    """The only linear that an attention operand comes from; None if it comes from none or from several."""
    linears = nearest_sources(operand, {LINEAR}, BARRIERS)
    return linears[0] if len(linears) == 1 else None


def _sharing_an_input(linears: list[fx.Node]) -> list[fx.Node]:
    """The largest group of distinct linears that share one input.

    Raises:
        Miss: there is no such group.
    """
    groups: dict[fx.Node, list[fx.Node]] = {}
    for linear in linears:
        group = groups.setdefault(argument(linear, "input"), [])
        if linear not in group:
            group.append(linear)
    if not groups:
        raise Miss(
            "query, key and value do not come from linears of their own",
            expected="two or more linears on one input",
        )
    largest = max(groups.values(), key=len)
    if len(largest) < 2:
        together = len(linears) == 3 and len(set(linears)) == 1
        raise Miss(
            "one projection already computes query, key and value" if together else "no two projections share an input",
            node=largest[0],
        )
    return largest
