"""Projections that share an input as one: query, key, value = split(x W^T + b), W = [Wq; Wk; Wv].

Anchored at attention, the pivot: back from each operand, through whatever keeps it one projection (layout, rotary,
norms), to the linear it comes from. Linears on one input are merged: all three in self-attention, key and value in
cross-attention. The merged weights stay an expression of the originals in the graph, so they follow every change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from fxbt import Match, Miss, Rule, argument, nearest_sources, ops

aten = torch.ops.aten

LINEAR = aten.linear.default
# Past a detach, merging would turn a weight's missing gradient into zeros.
BARRIERS = {*ops.ATTENTIONS, aten.detach.default}


@dataclass
class Projections:
    """Output sizes of the merged linears, and which of them have a bias."""

    sizes: list[int]
    has_bias: list[bool]


class MergeQKV(Rule):
    """x Wq^T, x Wk^T, x Wv^T  ->  split(x [Wq; Wk; Wv]^T)"""

    name = "qkv"
    proven = True
    targets = ops.ATTENTIONS

    def find(self, anchor: fx.Node) -> Match:
        operands = (argument(anchor, name) for name in ("query", "key", "value"))
        linears = _sharing_an_input([source for operand in operands if (source := _projection(operand))])
        linears.sort()
        weights = [argument(linear, "weight") for linear in linears]
        biases = [argument(linear, "bias") for linear in linears]
        for weight in weights:
            if not isinstance(weight, fx.Node) or weight.op != "get_attr":
                raise Miss("a projection's weight is computed, not a parameter", node=linears[0])
        facts = Projections(
            [int(weight.meta["val"].shape[0]) for weight in weights],
            [bias is not None for bias in biases],
        )
        inputs = (argument(linears[0], "input"), *weights, *(bias for bias in biases if bias is not None))
        return Match(anchor, inputs, tuple(linears), facts)

    def replace(self, facts: Projections, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        matrices, given = weights[: len(facts.sizes)], iter(weights[len(facts.sizes) :])
        bias = None
        if any(facts.has_bias):
            bias = torch.cat(
                [
                    next(given) if has else matrix.new_zeros(matrix.shape[0])
                    for has, matrix in zip(facts.has_bias, matrices, strict=True)
                ]
            )
        return F.linear(x, torch.cat(matrices), bias).split(facts.sizes, dim=-1)


def _projection(operand: object) -> fx.Node | None:
    """The one linear an attention operand comes from, or None where it comes from none or from several."""
    linears = nearest_sources(operand, {LINEAR}, BARRIERS)
    return linears[0] if len(linears) == 1 else None


def _sharing_an_input(linears: list[fx.Node]) -> list[fx.Node]:
    """The largest group of different linears on one input.

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
            "query, key and value come from no linear of their own",
            expected="two linears or more on one input",
        )
    largest = max(groups.values(), key=len)
    if len(largest) < 2:
        together = len(linears) == 3 and len(set(linears)) == 1
        raise Miss(
            "one projection gives query, key and value already" if together else "no two projections share an input",
            node=largest[0],
        )
    return largest
