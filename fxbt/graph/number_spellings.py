"""Canonical steps for numbers held as one-element tensors, and for fills with such a number.

Each step looks at one node and returns its replacement, or None, like those of `canonical.py`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from ..torch_compat import statically_known_true
from .node import argument, attribute, value_of
from .opsets import COMMUTATIVE, FILLED, SCALAR_ARITHMETIC

aten = torch.ops.aten


def number_from_constant(node: fx.Node) -> Any:
    """x * tensor(0.125) -> x * 0.125, for scalars written in the code (not for parameters and buffers)"""
    if node.target not in SCALAR_ARITHMETIC:
        return None
    lhs, rhs = node.args[:2]
    if node.target in COMMUTATIVE and not node.kwargs and _constant_number(lhs) is not None:
        lhs, rhs = rhs, lhs
    number = _constant_number(rhs)
    if number is not None and isinstance(lhs, fx.Node) and value_of(node).dtype == value_of(lhs).dtype:
        node.args = (lhs, number, *node.args[2:])
    return None


def fill_from_constant(node: fx.Node) -> Any:
    """where(mask, x, tensor(c)), masked_fill(x, mask, tensor(c)), maximum(x, tensor(c)) -> the same with the number c

    In a where, also full_like(x, c) on either side.
    """
    for position, overload in NUMBER_OVERLOADS.get(node.target, ()):
        others = [
            value_of(arg) for place, arg in enumerate(node.args) if place != position and isinstance(arg, fx.Node)
        ]
        number = _constant_number(node.args[position])
        if number is None and node.target is aten.where.self and _is_as_broadcast(node, others):
            number = _filled_with(node.args[position])
        if number is not None and value_of(node).dtype in [other.dtype for other in others]:
            node.target = overload
            node.update_arg(position, number)
            return None
    return None


def _is_as_broadcast(node: fx.Node, others: list[torch.Tensor]) -> bool:
    """Whether a node has the shape to which the other values alone broadcast."""
    rank = value_of(node).dim()
    shapes = [[1] * (rank - other.dim()) + list(other.shape) for other in others]
    return all(any(statically_known_true(size == shape[dim]) for shape in shapes) for dim, size in _sizes(node))


def _sizes(node: fx.Node) -> Any:
    return enumerate(value_of(node).shape)


def _filled_with(node: Any) -> float | int | None:
    """The number that fills a tensor made by full_like, full, ones_like and the like; None if there is none."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in (aten.full_like.default, aten.full.default):
        number: Any = node.args[1]
        return number if isinstance(number, int | float) else _constant_number(number)
    if node.target in FILLED:
        return FILLED[node.target]
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], int | float):
        inner = _filled_with(node.args[0])
        return None if inner is None else inner * node.args[1]
    return _filled_with(node.args[0]) if node.target in (aten.expand.default, aten.reshape.default) else None


def fill_by_index(node: fx.Node) -> Any:
    """x[mask] = c, an index_put(x, [mask], c) whose boolean mask has dims of x -> masked_fill(x, mask, c)"""
    if node.target is not aten.index_put.default or argument(node, "accumulate"):
        return None
    x: Any
    indices: Any
    value: Any
    x, indices, value = node.args[:3]
    masks = [index for index in indices if index is not None]
    if len(masks) != 1 or value_of(masks[0]).dtype is not torch.bool or value_of(value).dim():
        return None
    mask, first = masks[0], len(indices) - 1
    behind = value_of(x).dim() - first - value_of(mask).dim()
    covered = value_of(x).shape[first:][: value_of(mask).dim()]
    is_same = all(statically_known_true(a == b) for a, b in zip(value_of(mask).shape, covered, strict=True))
    if indices[first] is not mask or not is_same:
        return None
    with node.graph.inserting_before(node):
        for _ in range(behind):
            wider = node.graph.call_function(aten.unsqueeze.default, (mask, -1))
            wider.meta = {**node.meta, "val": value_of(mask).unsqueeze(-1)}
            mask = wider
        number = _constant_number(value)
        kind = aten.masked_fill.Tensor if number is None else aten.masked_fill.Scalar
        filled = node.graph.call_function(kind, (x, mask, value if number is None else number))
    filled.meta = dict(node.meta)
    return filled


def compare_with_number(node: fx.Node) -> Any:
    """x == tensor(c), x < tensor(c) -> the same with the number c"""
    if node.target not in COMPARISONS:
        return None
    x, constant = node.args
    number = _constant_number(constant)
    if number is not None and torch.result_type(value_of(x), number) == torch.result_type(
        value_of(x), value_of(constant)
    ):
        node.target = COMPARISONS[node.target]
        node.update_arg(1, number)
    return None


def _constant_number(node: Any) -> float | int | None:
    """The value of a scalar that is computed only from lifted constants and numbers; else None."""
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), torch.Tensor) or value_of(node).dim() != 0:
        return None
    content = _constant_tensor(node)
    return None if content is None else content.item()


def _constant_tensor(node: fx.Node) -> torch.Tensor | None:
    if node.op == "get_attr":
        is_lifted = re.search(r"(^|\W|_)lifted_tensor_\d+$", str(node.target))
        return attribute(node.graph.owning_module, node) if is_lifted else None
    if node.target not in CONSTANT_OPS:
        return None
    args = [_constant_tensor(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
    if any(arg is None for arg in args) or any(isinstance(arg, fx.Node) for arg in node.kwargs.values()):
        return None
    return node.target(*args, **node.kwargs)


NUMBER_OVERLOADS: dict[Any, Any] = {
    aten.where.self: ((2, aten.where.ScalarOther), (1, aten.where.ScalarSelf)),
    aten.masked_fill.Tensor: ((2, aten.masked_fill.Scalar),),
    aten.maximum.default: ((1, aten.clamp_min.default),),
    aten.max.other: ((1, aten.clamp_min.default),),
}
COMPARISONS = {
    aten.eq.Tensor: aten.eq.Scalar,
    aten.ne.Tensor: aten.ne.Scalar,
    aten.lt.Tensor: aten.lt.Scalar,
    aten.le.Tensor: aten.le.Scalar,
    aten.gt.Tensor: aten.gt.Scalar,
    aten.ge.Tensor: aten.ge.Scalar,
}
CONSTANT_OPS = {
    aten.full.default,
    aten.scalar_tensor.default,
    aten.lift_fresh_copy.default,
    aten.detach.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.to.dtype,
    aten._to_copy.default,
}
