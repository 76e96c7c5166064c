"""The steps on attention weights between the softmax and their product with the value, read forward.

P = softmax(S), then any of: c * P, P * t (t constant along the keys), P * mask, where(mask, P, 0), dropout, casts, NaN
replaced by zero. `products_of` reads the steps from a graph. Nothing is changed.

Example::

    ((product, operand, steps),) = products_of(softmax, labels, keys)
    steps  # [Dropout(0.1), ScaleBy(head_mask, ...)], innermost first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.miss import Miss
from . import axes
from .scores import (
    DIVIDE,
    MASKED_FILL,
    MULTIPLY,
    WHERE,
    Fill,
    Scale,
    ScaleBy,
    check_not_coarser,
    fill_operands,
    unexpanded,
    zeroing_mask,
)

aten = torch.ops.aten

SAFE_SOFTMAX = aten._safe_softmax.default  # gives 0, not NaN, where all scores are -inf, as SDPA does
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default, aten.special_softmax.default, SAFE_SOFTMAX})


@dataclass
class Dropout:
    """P * random / (1 - p)"""

    p: float


@dataclass
class ZeroNan:
    """where(isnan(P), 0, P), for the weights of rows that -inf masks entirely"""


Step = Scale | ScaleBy | Fill | Dropout | ZeroNan
Steps = list[Step]


def products_of(weights: fx.Node, labels: axes.Axes, keys: axes.Label) -> list[tuple[axes.Contraction, fx.Node, Steps]]:
    """The products of the weights with a value, or with several values, as in two equal attentions.

    Each is the product, its operand that is the weights, and the steps on the weights.

    Raises:
        Miss: the weights are used for something else.
    """
    products = [axes.contraction_with(user, weights, labels) for user in weights.users]
    if len(products) > 1 and all(products):
        return [(product, weights, []) for product in products if product]
    return [_follow(weights, labels, keys)]


def _follow(node: fx.Node, labels: axes.Axes, keys: axes.Label) -> tuple[axes.Contraction, fx.Node, Steps]:
    """Goes forward from the softmax, through steps that do not mix keys, to the contraction with the value."""
    steps: Steps = []
    dtypes: list[torch.dtype] = []
    while True:
        user = _without_nan(node) or only_user(node)
        product = axes.contraction_with(user, node, labels) or _multiplied_and_summed(user, node, labels)
        if product is not None:
            value = product.lhs if product.rhs is node else product.rhs
            for dtype in dtypes:
                check_not_coarser(product.node, dtype, value.meta["val"].dtype)
            return product, node, steps
        forward = axes.step_forward(node, labels, user)
        if forward is None and user.target in axes.CASTS:
            dtypes.append(user.meta["val"].dtype)
        elif forward is None:
            steps.append(_step(user, node, labels, keys, steps))
        node, labels = user, labels if forward is None else forward


def _step(user: fx.Node, weights: fx.Node, labels: axes.Axes, keys: axes.Label, steps: Steps) -> Step:
    """The step that `user` is on the weights, after the earlier `steps`."""
    if _zeroes_nan(user, weights):
        return ZeroNan()
    is_zeroed = any(isinstance(step, Fill) for step in steps)
    mask = None if is_zeroed else _multiplied_mask(user, weights, labels, keys)
    if mask is not None:
        return mask
    if user.target in MULTIPLY | DIVIDE:
        return _weight_factor(user, weights, labels, keys)
    if user.target is aten.dropout.default:
        if any(isinstance(step, Dropout) and step.p for step in steps):
            raise Miss("dropout is applied to the attention weights twice", node=user)
        return Dropout(float(user.args[1]))  # type: ignore[arg-type]
    if user.target in WHERE | MASKED_FILL:
        if is_zeroed:
            raise Miss("the attention weights are masked twice", node=user)
        return _zeroing(user, weights, labels)
    raise Miss(
        "the attention weights are used by an op other than their product with the value",
        node=user,
        expected="dropout, cast, a factor per query, then a contraction over the keys",
    )


def _multiplied_and_summed(user: fx.Node, weights: fx.Node, labels: axes.Axes) -> axes.Contraction | None:
    """(weights * value).sum(keys) as a contraction."""
    if user.target not in MULTIPLY or len(user.users) != 1:
        return None
    return axes.contraction_with(next(iter(user.users)), weights, labels)


def _without_nan(weights: fx.Node) -> fx.Node | None:
    """where(isnan(weights), 0, weights), if nothing else reads the weights; else None."""
    users = list(weights.users)
    fills = [user for user in users if user.target in WHERE | MASKED_FILL]
    if len(users) != 2 or len(fills) != 1:
        return None
    (asked,) = (user for user in users if user is not fills[0])
    values, mask, fill, keep = fill_operands(fills[0])
    is_nan = asked.target is aten.isnan.default or (asked.target is aten.ne.Tensor and len(asked.all_input_nodes) == 1)
    is_zeroed = (values, mask, fill, keep) == (weights, asked, 0, False)
    return fills[0] if is_nan and is_zeroed and len(asked.users) == 1 else None


def _zeroes_nan(user: fx.Node, weights: fx.Node) -> bool:
    """Whether NaN weights become zero, in rows that -inf masks entirely, as SDPA does."""
    if user.target is aten.nan_to_num.default:
        if axes.argument(user, "nan") not in (None, 0):
            raise Miss("NaN attention weights become a number other than 0", node=user, expected="nan_to_num(0.0)")
        return True
    return user is _without_nan(weights)


def _multiplied_mask(user: fx.Node, weights: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...]) -> Fill | None:
    """The mask that multiplies the weights along the keys, if it is proven to be 0 or 1."""
    if user.target not in MULTIPLY or not all(isinstance(arg, fx.Node) for arg in user.args[:2]):
        return None
    factor: Any = user.args[1] if user.args[0] is weights else user.args[0]
    factor_axes = axes.broadcast_axes(factor, labels)
    return None if axes.is_constant_along(factor_axes, keys) else zeroing_mask(factor, factor_axes)


def _zeroing(user: fx.Node, weights: fx.Node, labels: axes.Axes) -> Fill:
    scores, mask, fill, keep = fill_operands(user)
    if scores is not weights or fill != 0 or not isinstance(mask, fx.Node):
        raise Miss("the attention weights are replaced by other values", node=user, expected="a fill of 0")
    return Fill(*unexpanded(mask, axes.broadcast_axes(mask, labels)), 0.0, keep)


def only_user(node: fx.Node) -> fx.Node:
    """The only node that reads the weights; raises Miss if there is another."""
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_function":
        extra = users[-1] if users else node
        raise Miss(
            "the attention weights are used elsewhere too",
            node=node,
            expected="one use: the value product",
            found=(node, "is also used by", extra),
        )
    return users[0]


def _weight_factor(user: fx.Node, node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...]) -> Scale | ScaleBy:
    divide = user.target in DIVIDE
    position = 0 if user.args[0] is node else 1
    factor: Any = user.args[1 - position]
    if divide and (position == 1 or user.kwargs):
        raise Miss("a value is divided by the attention weights", node=user)
    if not isinstance(factor, fx.Node):
        return Scale(1 / factor if divide else factor)
    factor_axes = axes.broadcast_axes(factor, labels)
    if not axes.is_constant_along(factor_axes, keys):
        raise Miss("the attention weights are multiplied by a tensor that varies along the keys", node=user)
    return ScaleBy(factor, factor_axes, divide)
