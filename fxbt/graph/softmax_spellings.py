"""Canonical steps for a softmax that is written out: rules look for one node, `softmax(x, dim)`.

Each step looks at one node and returns its replacement, or None, like those of `canonical.py`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .node import argument, value_of
from .opsets import WHOLE_AXIS

aten = torch.ops.aten


def softmax_by_hand(node: fx.Node) -> Any:
    """e / e.sum(dim, keepdim) with e = exp(x) or exp(x - x.amax(dim, keepdim)) -> softmax(x, dim)

    The softmax stays finite where exp(x) would overflow or all of e would be 0.
    """
    exponential, total = _quotient(node)
    summed = _summed_exp(total)
    if summed is None or summed[0] is not exponential:
        return None
    with node.graph.inserting_before(node):
        return _softmax(*summed)


def softmax_divided_later(node: fx.Node) -> Any:
    """(e @ v) / e.sum(-1, keepdim) with e as in `softmax_by_hand` -> softmax(x, -1) @ v"""
    product, total = _quotient(node)
    summed = _summed_exp(total)
    if summed is None or not isinstance(product, fx.Node) or len(product.users) != 1:
        return None
    exponential, dim = summed
    rank = value_of(exponential).dim()
    readers = {user for user in exponential.users if user.users}  # a sum that was rewritten is dead
    if readers != {product, total} or dim != rank - 1 or rank != value_of(product).dim():
        return None
    if not _sums_last_of(product, exponential):
        return None
    with node.graph.inserting_before(node):
        softmax = _softmax(exponential, dim)
        args = fx.map_arg(product.args, lambda arg: softmax if arg is exponential else arg)
        result = node.graph.call_function(product.target, args)  # type: ignore[arg-type]
    result.meta = dict(node.meta)
    return result


def _quotient(node: fx.Node) -> tuple[Any, Any]:
    """(a, b) of a / b or a * (1 / b); (None, None) if the node is neither."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None, None
    operands: Any = node.args
    if node.target is aten.div.Tensor:
        return operands
    for one, other in (operands, operands[::-1]) if node.target is aten.mul.Tensor else ():
        is_power = other.target is aten.pow.Tensor_Scalar and other.args[1] == -1
        if is_power or other.target is aten.reciprocal.default:
            return one, other.args[0]
    return None, None


def _summed_exp(total: Any) -> tuple[fx.Node, int] | None:
    """(e, dim) if total is the sum of an exponential e over one dim, with keepdim; else None."""
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return None
    exponential: Any
    dims: Any
    exponential, dims = total.args[:2]
    if exponential.target is not aten.exp.default or len(dims) != 1 or not argument(total, "keepdim"):
        return None
    return None if argument(total, "dtype") is not None else (exponential, dims[0] % value_of(exponential).dim())


def _softmax(exponential: fx.Node, dim: int) -> fx.Node:
    """The softmax whose numerators are exponentials of scores, or of scores minus their maximum."""
    scores = exponential.args[0]
    less = _shifted_by_its_max(scores, dim)
    softmax = exponential.graph.call_function(aten.softmax.int, (scores if less is None else less, dim))
    softmax.meta = dict(exponential.meta)
    return softmax


def _sums_last_of(product: fx.Node, lhs: fx.Node) -> bool:
    """Whether a product multiplies rows of its first operand `lhs` and keeps them in place."""
    if product.target in (aten.matmul.default, aten.bmm.default):
        return product.args[0] is lhs and product.args[1] is not lhs
    if product.target is not aten.einsum.default or len(product.args) != 2:
        return False
    operands: Any = product.args[1]
    terms, _, result = str(product.args[0]).replace(" ", "").partition("->")
    first, *others = terms.split(",")
    is_plain = len(others) == 1 and operands[0] is lhs and operands[1] is not lhs and len(set(first)) == len(first)
    return is_plain and result[:-1] == first[:-1] and first[-1] not in result and first[-1] in others[0]


def softmax_of_logarithms(node: fx.Node) -> Any:
    """exp(log_softmax(x, dim)), exp(x - logsumexp(x, dim, keepdim)) -> softmax(x, dim)"""
    inner: Any = node.args[0] if node.target is aten.exp.default else None
    if not isinstance(inner, fx.Node):
        return None
    if inner.target is aten.log_softmax.int:
        args = inner.args
    elif (less := _less_its_logsumexp(inner)) is not None:
        args = less
    else:
        return None
    with node.graph.inserting_before(node):
        softmax = node.graph.call_function(aten.softmax.int, args, dict(inner.kwargs))
    softmax.meta = dict(node.meta)
    return softmax


def _less_its_logsumexp(node: fx.Node) -> Any:
    """(x, dim) if the node is x - logsumexp(x, dim, keepdim=True); else None."""
    if node.target is not aten.sub.Tensor or node.kwargs or len(node.args) != 2:
        return None
    x: Any
    total: Any
    dims: Any
    x, total = node.args
    if not isinstance(total, fx.Node) or total.target is not aten.logsumexp.default or total.args[0] is not x:
        return None
    dims = total.args[1]
    return (x, dims[0]) if len(dims) == 1 and argument(total, "keepdim") else None


def keys_in_parts(node: fx.Node) -> Any:
    """p[..., :n] @ v1 + p[..., n:] @ v2 with p = softmax of cat([q @ k1^T, q @ k2^T], -1) -> one product each

    The result is softmax(q @ cat([k1^T, k2^T], -1)) @ cat([v1, v2], -2), for a cache that keeps old keys and values
    apart.
    """
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    products: Any = node.args
    if not all(_is_product(each) and len(each.users) == 1 for each in products):
        return None
    for ordered in (products, products[::-1]):
        whole = _whole_of([each.args[0] for each in ordered])
        if whole is not None:
            products = ordered
            break
    if whole is None or whole.target is not aten.softmax.int or (joined := _joined_products(whole)) is None:
        return None
    _join_products(joined)
    with node.graph.inserting_before(node):
        value = node.graph.call_function(aten.cat.default, ([each.args[1] for each in products], -2))
        result = node.graph.call_function(aten.matmul.default, (whole, value))
    value.meta = {**node.meta, "val": torch.cat([value_of(each.args[1]) for each in products], -2)}
    result.meta = dict(node.meta)
    return result


def _is_product(node: Any) -> bool:
    """Whether a node is a matrix product that commutes with cat."""
    if not isinstance(node, fx.Node) or node.target not in (aten.matmul.default, aten.bmm.default):
        return False
    return value_of(node.args[0]).dim() == value_of(node.args[1]).dim() >= 3


def _whole_of(parts: list[Any]) -> Any:
    """The value that two slices (first and rest), or the two parts of a split, cut along the last dim; else None."""
    first, rest = parts
    if first.target is operator.getitem and rest.target is operator.getitem:
        split = first.args[0]
        is_split = split is rest.args[0] and split.target is aten.split_with_sizes.default and len(split.args[1]) == 2
        is_last = is_split and argument(split, "dim", 0) % value_of(first).dim() == value_of(first).dim() - 1
        return split.args[0] if is_last and (first.args[1], rest.args[1]) == (0, 1) else None
    if {first.target, rest.target} != {aten.slice.Tensor} or first.args[0] is not rest.args[0]:
        return None
    last = value_of(first).dim() - 1
    along = all(argument(each, "dim", 0) % (last + 1) == last and argument(each, "step", 1) == 1 for each in parts)
    end, start = argument(first, "end"), argument(rest, "start")
    is_cut = end is start or (type(end) is int and type(start) is int and end == start > 0)
    to_the_end = argument(rest, "end") in (None, WHOLE_AXIS)
    is_first = argument(first, "start") in (None, 0)
    return first.args[0] if along and is_first and is_cut and to_the_end else None


def _joined_products(softmax: fx.Node) -> fx.Node | None:
    """The cat of equally scaled products of one query from which a softmax over the same dim is computed; else None."""
    node: Any = softmax.args[0]
    last = value_of(softmax).dim() - 1
    if int(softmax.args[1]) % (last + 1) != last:  # type: ignore[arg-type]
        return None
    while isinstance(node, fx.Node) and node.target in BETWEEN_SCORES:
        node = node.args[BETWEEN_SCORES[node.target]]
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    parts: Any = node.args[0]
    if argument(node, "dim", 0) % (last + 1) != last or len(node.users) != 1 or len(parts) != 2:
        return None
    products = [_unscaled(part) for part in parts]
    alike = {(product.args[0], factor) for product, factor in products if _is_product(product)}
    return node if len(alike) == 1 and all(_is_product(product) for product, _ in products) else None


def _unscaled(part: Any) -> tuple[Any, Any]:
    """(product, its scaling) of a value that may be a product times a number."""
    is_scaled = part.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(part.args[1], int | float)
    return (part.args[0], (part.target, part.args[1])) if is_scaled and not part.kwargs else (part, None)


def _join_products(cat: fx.Node) -> None:
    """cat([q @ a, q @ b], -1) -> q @ cat([a, b], -1), in place."""
    products = [_unscaled(part) for part in cat.args[0]]
    keys = [product.args[1] for product, _ in products]
    query, scaled = products[0][0].args[0], products[0][1]
    with cat.graph.inserting_before(cat):
        key = cat.graph.call_function(aten.cat.default, (keys, -1))
        result = cat.graph.call_function(aten.matmul.default, (query, key))
        key.meta = {**cat.meta, "val": torch.cat([value_of(each) for each in keys], -1)}
        result.meta = dict(cat.meta)
        if scaled is not None:
            result = cat.graph.call_function(scaled[0], (result, scaled[1]))
            result.meta = dict(cat.meta)
    cat.replace_all_uses_with(result)
    cat.graph.erase_node(cat)


def softmax_of_shifted(node: fx.Node) -> Any:
    """softmax(x - x.amax(dim, keepdim), dim) -> softmax(x, dim), also if x was divided before and multiplied after

    CogView's PB-relax, https://huggingface.co/papers/2105.13290: softmax((x / a - max(x / a)) * a).
    """
    if node.target is not aten.softmax.int:
        return None
    dim = int(node.args[1]) % value_of(node).dim()  # type: ignore[arg-type]
    scores = _shifted_by_its_max(node.args[0], dim) or _relaxed(node.args[0], dim)
    if scores is not None and value_of(scores).dtype == value_of(node.args[0]).dtype:
        node.update_arg(0, scores)
    return None


def _relaxed(node: Any, dim: int) -> Any:
    """x, if the node is (x / a - max(x / a)) * a for a number a of at least one; else None."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return None
    factor = node.args[1]
    smaller = _shifted_by_its_max(node.args[0], dim)
    if smaller is None or not isinstance(factor, int | float) or factor < 1:
        return None
    divided = smaller.target is aten.div.Tensor and smaller.args[1] == factor and not smaller.kwargs
    return smaller.args[0] if divided else None


def _shifted_by_its_max(node: Any, dim: int) -> Any:
    """x, if the node is x - x.amax(dim, keepdim=True) or x - x.max(dim, keepdim=True)[0]; else None."""
    if not isinstance(node, fx.Node) or node.target is not aten.sub.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    scores: Any
    peak: Any
    scores, peak = node.args[:2]
    if isinstance(peak, fx.Node) and peak.target in (aten.detach.default, aten.alias.default):
        peak = peak.args[0]
    if isinstance(peak, fx.Node) and getattr(peak.target, "__name__", "") == "getitem" and peak.args[1] == 0:
        peak = peak.args[0]
    if not isinstance(peak, fx.Node) or peak.target not in (aten.amax.default, aten.max.dim):
        return None
    dims: Any = argument(peak, "dim")
    dims = dims if isinstance(dims, list | tuple) else [dims]
    rank = value_of(scores).dim() if isinstance(scores, fx.Node) else 0
    same_axis = [d % rank for d in dims] == [dim] if rank else False
    return scores if same_axis and peak.args[0] is scores and argument(peak, "keepdim") else None


# Ops allowed between scores and their softmax, with the position of the scores among their operands.
BETWEEN_SCORES = {
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor), 0),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.to.dtype), 0),
    aten.where.ScalarOther: 1,
}
