"""Epilogue fusion: formulas for what can be computed with a linear, an activation or a residual, and a layer norm.

The matcher finds `epilogues` in the graph as it is lowered: without padding or masks, and whatever blocks its nodes
were parts of. Of 410 linears with an epilogue in the graphs of the 24 models of tests/models.py, 349 have all of it in
one block, but 31 have a norm in the next layer, because a pre-norm layer ends in the sum that the next one normalises,
and 24 are in no block.
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...graph.miss import Miss, module_path
from ...graph.node import argument, same_shape
from ...graph.record import StageRecord
from ...match.found import Found
from ...match.language import Expression, Op
from ...match.rule import Match, Rule
from ...torch_compat import gelu_, silu_

aten = torch.ops.aten

STAGE = "epilogues"


@dataclass(frozen=True)
class Activation:
    """An activation that oneDNN computes exactly as torch does: its name and algorithm there.

    `write` is torch's own, in place.
    """

    name: str
    algorithm: str
    write: Callable[[Tensor], Any]

    @property
    def known_as(self) -> str:
        """Name and algorithm in one string, as in `native.ACTIVATIONS`."""
        return f"{self.name} {self.algorithm}".strip()


def fused_in(activation: Activation | None) -> tuple[str, list[Any], str]:
    """The last arguments of `mkldnn._linear_pointwise`."""
    return ("none", [], "") if activation is None else (activation.name, [], activation.algorithm)


class Norm(NamedTuple):
    """A layer norm over the features of a linear's result; with `keeps_sum`, its input is also a result."""

    epsilon: float
    keeps_sum: bool


@dataclass(frozen=True)
class Epilogue:
    """What follows a linear: its nodes in `chain`, each the input of the next, and then the norm `normalized`.

    `residual` is the other addend; `affine` are the norm's gamma and beta, or () without a norm.
    """

    chain: tuple[fx.Node, ...]
    activation: Activation | None = None
    residual: fx.Node | None = None
    normalized: fx.Node | None = None
    norm: Norm | None = None
    affine: tuple[fx.Node | None, ...] = ()

    def replace_by(self, result: fx.Node, record: StageRecord) -> None:
        """Replaces all of it by a node that computes it, and that comes after the chain's last node.

        It is a hit where more than the linear is replaced.
        """
        graph, last = result.graph, self.chain[-1]
        if len(self.chain) > 1 or self.norm is not None:
            record.places.append(module_path(self.chain[0]))
        result.meta = dict(last.meta)
        for weight in self.affine:
            if weight is not None and last < weight:
                last.prepend(weight)  # it was fetched only before the norm
        if self.norm is not None and self.norm.keeps_sum:
            with graph.inserting_after(result):
                normalized = graph.call_function(operator.getitem, (result, 1))
                total = graph.call_function(operator.getitem, (result, 0))
            total.meta = dict(last.meta)
        else:
            normalized = total = result
        if self.normalized is not None:
            normalized.meta = dict(self.normalized.meta)
            self.normalized.replace_all_uses_with(normalized)
            graph.erase_node(self.normalized)
        last.replace_all_uses_with(total)
        for node in reversed(self.chain):
            graph.erase_node(node)


# --- formulas ---------------------------------------------------------------------------------------------------


def is_float32(value: Tensor) -> bool:
    """Whether a weight has the dtype that the kernels read."""
    return value.dtype is torch.float32


def chain_of(found: Found) -> tuple[fx.Node, ...]:
    """The nodes of a match except the norm, in graph order."""
    return tuple(sorted(node for node in found.interior if node.target is not aten.layer_norm.default))


class FusedLinear(Rule):
    """x W^T + b, with which each formula here begins. The `facts` of a match are its `Epilogue`."""

    name = "linear"
    proven = True
    activation: Activation | None = None

    def pattern(self, op: Op, x: Expression) -> Any:
        return op.linear(x, op.weight("weight", is_float32), op.maybe(op.any("bias")))

    def check(self, m: Found) -> None:
        for node in m.interior:
            m.need(node.target in JOINED, "there is a cast in between")
            m.need(node.meta["val"].dtype is torch.float32, "a part of it is not computed in float32")

    def match_of(self, found: Found, anchor: fx.Node) -> Match:
        """The match, whose `facts` are its `Epilogue`."""
        return Match(anchor, outputs=found.outputs, facts=Epilogue(chain_of(found), self.activation))


class Activated(FusedLinear):
    """act(x W^T + b)"""

    def __init__(self, activation: Activation, formula: Callable[[Op, Any], Expression]) -> None:
        self.name, self.activation, self.formula_of = f"linear_{activation.name}", activation, formula

    def pattern(self, op: Op, x: Expression) -> Any:
        return self.formula_of(op, super().pattern(op, x))


class Summed(FusedLinear):
    """x W^T + b + residual"""

    name = "linear_residual"

    def pattern(self, op: Op, x: Expression) -> Any:
        return super().pattern(op, x) + op.any("residual")

    def check(self, m: Found) -> None:
        super().check(m)
        linear, residual = chain_of(m)[0].meta["val"], m.residual
        m.need(isinstance(residual, Tensor), "the other addend is a number, not a tensor")
        m.need(m["residual"] not in m.interior, "a linear is added to itself")
        m.need(residual.dtype is torch.float32, f"the other addend is in {residual.dtype}, not float32")
        m.need(linear.dim() > 1 and same_shape(linear, residual), "the other addend has another shape")

    def match_of(self, found: Found, anchor: fx.Node) -> Match:
        return Match(anchor, outputs=found.outputs, facts=Epilogue(chain_of(found), residual=found["residual"]))


class Normed(FusedLinear):
    """The layer norm of a formula's value; if something else reads that value, it is a result, too."""

    def __init__(self, inner: FusedLinear) -> None:
        self.name, self.inner = f"{inner.name}_norm", inner

    def pattern(self, op: Op, x: Expression) -> Any:
        value = self.inner.pattern(op, x)
        gamma, beta = (op.maybe(op.weight(name, is_float32)) for name in ("gamma", "beta"))
        return op.layer_norm(value, weight=gamma, bias=beta, eps=op.number("eps")), value

    def check(self, m: Found) -> None:
        self.inner.check(m)
        norm, value = m.outputs
        features = value.meta["val"].shape[-1]
        m.need(argument(norm, "normalized_shape") == [features], "the norm is not over exactly the last dim")
        for name in ("gamma", "beta"):
            m.need(
                m[name] is None or m[name].op == "get_attr", f"{name} is computed in the graph; expected a parameter"
            )

    def match_of(self, found: Found, anchor: fx.Node) -> Match:
        norm, value = found.outputs
        inner: Epilogue = self.inner.match_of(found, anchor).facts
        how, affine = Norm(found.eps, keeps_sum=len(value.users) > 1), (found["gamma"], found["beta"])
        facts = Epilogue(inner.chain, inner.activation, inner.residual, norm, how, affine)
        return Match(anchor, outputs=found.outputs, facts=facts)


def activated() -> tuple[FusedLinear, ...]:
    """A linear with each of oneDNN's activations."""
    return (
        Activated(Activation("gelu", "none", functools.partial(gelu_, approximate="none")), lambda op, y: op.gelu(y)),
        Activated(
            Activation("gelu", "tanh", functools.partial(gelu_, approximate="tanh")),
            lambda op, y: op.gelu(y, approximate="tanh"),
        ),
        Activated(Activation("relu", "", torch.relu_), lambda op, y: op.relu(y)),
        Activated(Activation("swish", "", silu_), lambda op, y: op.silu(y)),
    )


def epilogues() -> tuple[FusedLinear, ...]:
    """All formulas, longest first: the first that matches wins.

    They are made for each graph, because a matcher serves one thread.
    """
    alone = (Summed(), *activated())
    return (*map(Normed, (*alone, FusedLinear())), *alone)


JOINED = {
    *(aten.linear.default, aten.add.Tensor, aten.layer_norm.default),
    *(aten.gelu.default, aten.relu.default, aten.silu.default),
}


# --- in a graph -------------------------------------------------------------------------------------------------


def epilogue_of(
    linear: fx.Node, constant: set[fx.Node], record: StageRecord, formulas: Sequence[FusedLinear]
) -> Epilogue:
    """The epilogue of a linear: the first of the formulas that matches, or none.

    The record gets the nearest miss of those before it. The weights of norms must be among the `constant` nodes.
    """
    start = time.perf_counter()
    misses: list[Miss] = []
    epilogue = Epilogue((linear,))
    for formula, anchor in _anchors(linear, formulas):
        try:
            epilogue = _find(formula, anchor, linear, constant)
            break
        except Miss as miss:
            misses.append(miss.without_frames())
    nearest = max(misses, key=lambda miss: miss.nearness, default=None)
    if nearest is not None and nearest.matched > 1:
        nearest.rule, nearest.where, nearest.anchor = record.name, module_path(linear), linear
        record.misses.append(nearest)
    record.seconds += time.perf_counter() - start
    return epilogue


def _anchors(linear: fx.Node, formulas: Sequence[FusedLinear]) -> Iterator[tuple[FusedLinear, fx.Node]]:
    """The formulas, each with the nodes it can end at: as many steps after the linear as it has further ops."""
    behind = [[linear]]
    for formula in formulas:
        while len(behind) < formula.formula.size:
            behind.append(list(dict.fromkeys(user for node in behind[-1] for user in node.users)))
        yield from ((formula, node) for node in behind[formula.formula.size - 1] if formula.can_end_at(node))


def _find(formula: FusedLinear, anchor: fx.Node, linear: fx.Node, constant: set[fx.Node]) -> Epilogue:
    """The epilogue of this linear that a formula finds at a node.

    Raises:
        Miss: it does not match there.
    """
    matches = (found for found in formula.matcher.find(anchor) if linear in found.interior)
    epilogue: Epilogue = formula.first_of(matches, anchor).facts
    if not constant.issuperset(weight for weight in epilogue.affine if weight is not None):
        raise Miss("changes of the norm's weights cannot be noticed", node=anchor)
    return epilogue
