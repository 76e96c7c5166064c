"""Epilogue fusion: what follows a linear and can be computed with it, an activation or a residual, and a layer norm.

This is the only search in lowering, because a block's record would not be enough: of 410 linears with an epilogue in
the graphs of the 24 models of tests/models.py, 349 have all of it in one block, but 55 have a norm in the next layer
(31) or in no block (24), because a pre-norm layer ends in the sum that the next one normalises. And the conditions (one
reader, shape, dtype) must be checked in each graph anyway, because padding is dropped and a user's blocks go before
layers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ...graph.node import argument, only_user, same_shape
from ...torch_compat import gelu_, silu_

aten = torch.ops.aten


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


ACTIVATIONS: dict[Any, Callable[[fx.Node], Activation]] = {
    aten.gelu.default: lambda node: _gelu(argument(node, "approximate")),
    aten.relu.default: lambda node: Activation("relu", "", torch.relu_),
    aten.silu.default: lambda node: Activation("swish", "", silu_),
}


def _gelu(approximate: str) -> Activation:
    write = functools.partial(gelu_, approximate=approximate)
    return Activation("gelu", approximate, write)


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
    activation: Activation | None
    residual: fx.Node | None
    normalized: fx.Node | None
    norm: Norm | None
    affine: tuple[fx.Node | None, ...]

    @classmethod
    def of(cls, linear: fx.Node, constant: set[fx.Node]) -> Epilogue:
        """The epilogue of this linear; the weights of its norm must be among the `constant` nodes."""
        activated, activation = activation_after(linear)
        add, residual = _residual(linear) if activated is None else (None, None)
        chain = tuple(node for node in (linear, activated, add) if node is not None)
        normalized = next((user for user in chain[-1].users if _can_be_joined(user, chain[-1], constant)), None)
        if normalized is None:
            return cls(chain, activation, residual, None, None, ())
        norm = Norm(argument(normalized, "eps"), keeps_sum=len(chain[-1].users) > 1)
        affine = (argument(normalized, "weight"), argument(normalized, "bias"))
        return cls(chain, activation, residual, normalized, norm, affine)

    def replace_by(self, result: fx.Node) -> None:
        """Replaces all of it by a node that computes it, and that comes after the chain's last node."""
        graph, last = result.graph, self.chain[-1]
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


def activation_after(linear: fx.Node) -> tuple[fx.Node | None, Activation | None]:
    """The activation that alone reads a linear, if oneDNN has it: its node and description."""
    node = only_user(linear, ACTIVATIONS)
    return (None, None) if node is None else (node, ACTIVATIONS[node.target](node))


def _residual(linear: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The add and its other operand, if a linear's result is only added to a value of its own shape."""
    add = only_user(linear, (aten.add.Tensor,))
    if add is None or add.kwargs or not all(isinstance(value, fx.Node) for value in add.args) or len(add.args) != 2:
        return None, None
    other: Any = add.args[1] if add.args[0] is linear else add.args[0]
    values = [node.meta["val"] for node in (linear, other)]
    if not all(isinstance(value, Tensor) for value in values):  # a number computed from sizes
        return None, None
    if other is linear or values[0].dtype != values[1].dtype or values[0].dim() < 2 or not same_shape(*values):
        return None, None
    return add, other


def _can_be_joined(norm: fx.Node, value: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a node is the layer norm of a value over its last dim, with float32 weights or none."""
    if norm.target is not aten.layer_norm.default or norm.args[0] is not value:
        return False
    weights = [weight for weight in (argument(norm, "weight"), argument(norm, "bias")) if weight is not None]
    features = value.meta["val"].shape[-1]
    return argument(norm, "normalized_shape") == [features] and all(
        weight.op == "get_attr" and weight in constant and weight.meta["val"].dtype is torch.float32
        for weight in weights
    )
