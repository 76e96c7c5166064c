"""Canonicalisation: one spelling per meaning, reached in small steps that do not change any value.

Every step looks at one node and returns its replacement, or None. `canonicalize` runs the table to a fixed point,
shares common subexpressions and drops dead nodes. A new spelling of a known meaning becomes a step: here, in
`number_spellings.py` or in `softmax_spellings.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..torch_compat import statically_known_true
from .node import argument, expression, is_pure, reaches_output, same_shape, value_of
from .number_spellings import compare_with_number, fill_by_index, fill_from_constant, number_from_constant
from .opsets import BY_STRIDES, CASTS, COPIES, NEW_FILLED, SCALAR_ARITHMETIC, WHOLE_AXIS
from .softmax_spellings import (
    keys_in_parts,
    softmax_by_hand,
    softmax_divided_later,
    softmax_of_logarithms,
    softmax_of_shifted,
)

aten = torch.ops.aten


def drop_inactive_dropout(node: fx.Node) -> Any:
    """dropout(x, p, train=False) -> x"""
    if node.target not in (aten.dropout.default, aten.feature_dropout.default):
        return None
    return node.args[0] if not node.args[2] or node.args[1] == 0 else None


def drop_same_dtype_cast(node: fx.Node) -> Any:
    """x.to(dtype and device that x already has) -> x"""
    if node.target not in CASTS or argument(node, "copy", False) or argument(node, "memory_format") is not None:
        return None
    source, result = value_of(node.args[0]), value_of(node)
    same = source.dtype == result.dtype and source.device == result.device
    return node.args[0] if same else None


def drop_copy(node: fx.Node) -> Any:
    """x.contiguous(), x.clone() -> x, except where the caller would see the strides or an alias.

    Convolutions and the norms after them also depend on strides: for channels-last images they use other algorithms,
    and torch's group_norm loses digits there.
    """
    if node.target not in COPIES or reaches_output(node) or any(user.target in BY_STRIDES for user in node.users):
        return None
    if node.target is aten.detach.default and torch.is_grad_enabled():
        return None
    return node.args[0]


def drop_whole_slice(node: fx.Node) -> Any:
    """x[:, 0:everything] -> x"""
    if node.target is not aten.slice.Tensor or reaches_output(node):
        return None
    if argument(node, "step", 1) != 1 or argument(node, "start") not in (None, 0):
        return None
    end = argument(node, "end")
    if end in (None, WHOLE_AXIS) or same_shape(value_of(node.args[0]), value_of(node)):
        return node.args[0]
    return None


def whole_slice_written(node: fx.Node) -> Any:
    """slice_scatter(x, y) over all of x -> y"""
    if node.target is not aten.slice_scatter.default or reaches_output(node):
        return None
    x, y = node.args[:2]
    is_whole = argument(node, "step", 1) == 1 and argument(node, "start") in (None, 0)
    return y if is_whole and same_shape(value_of(x), value_of(y)) and value_of(x).dtype == value_of(y).dtype else None


def drop_no_op_layout(node: fx.Node) -> Any:
    """A reshape or expand to the shape x already has -> x"""
    if node.target not in (aten.reshape.default, aten.expand.default) or reaches_output(node):
        return None
    return node.args[0] if same_shape(value_of(node.args[0]), value_of(node)) else None


def drop_neutral(node: fx.Node) -> Any:
    """x * 1 -> x, x + 0 -> x for integers (a float -0.0 + 0 is 0.0)"""
    if node.target not in NEUTRAL or node.kwargs or reaches_output(node) or not isinstance(node.args[0], fx.Node):
        return None
    same = isinstance(node.args[1], int | float) and node.args[1] == NEUTRAL[node.target]
    if not same or value_of(node.args[0]).dtype != value_of(node).dtype:
        return None
    is_sum = NEUTRAL[node.target] == 0
    return None if is_sum and value_of(node).dtype.is_floating_point else node.args[0]


def view_to_reshape(node: fx.Node) -> Any:
    """x.view(shape) -> x.reshape(shape), because a rewritten producer may have other strides than the captured one"""
    if node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default
    return None


def reshape_as_to_reshape(node: fx.Node) -> Any:
    """x.reshape_as(y), x.view_as(y) -> x.reshape(sizes of y), which does not read y itself"""
    if node.target not in (aten.reshape_as.default, aten.view_as.default):
        return None
    sizes = [_size_node(node, size) for size in value_of(node).shape]
    if sizes.count(None) <= 1:
        node.target, node.args = aten.reshape.default, (node.args[0], [-1 if s is None else s for s in sizes])
    return None


def _size_node(node: fx.Node, size: Any) -> Any:
    """A size as a number, or as an earlier node with that size; None if there is none."""
    if not isinstance(size, torch.SymInt):
        return size
    for earlier in node.graph.nodes:
        if earlier is node:
            return None
        known = value_of(earlier)
        if isinstance(known, torch.SymInt) and known.node.expr == size.node.expr:
            return earlier
    return None


def size_of_another(node: fx.Node) -> Any:
    """The size of an intermediate value -> the same size read earlier, usually from an input"""
    return _size_node(node, value_of(node)) if node.target is aten.sym_size.int and not reaches_output(node) else None


def copy_to_cast_and_expand(node: fx.Node) -> Any:
    """copy(x, y), from functionalising a write of y into x -> y cast and expanded to x, which has a derivative"""
    if node.target is not aten.copy.default:
        return None
    into, source = node.args[:2]
    with node.graph.inserting_before(node):
        cast = node.graph.call_function(aten.to.dtype, (source, value_of(node).dtype))
        cast.meta = {**node.meta, "val": value_of(source).to(value_of(node).dtype)}
        expanded = node.graph.call_function(aten.expand_as.default, (cast, into))
    expanded.meta = dict(node.meta)
    return expanded


def linear_from_addmm(node: fx.Node) -> Any:
    """addmm(bias, x, w), as a Conv1D computes it -> linear(x, w^T, bias); also mm(x, w) for a weight w"""
    if node.target not in (aten.addmm.default, aten.mm.default) or node.kwargs:
        return None
    bias, x, weight = node.args if node.target is aten.addmm.default else (None, *node.args)
    if weight.op != "get_attr" or (bias is not None and value_of(bias).dim() != 1):
        return None
    with node.graph.inserting_before(node):
        transposed = node.graph.call_function(aten.t.default, (weight,))
        linear = node.graph.call_function(aten.linear.default, (x, transposed, bias))
    transposed.meta = {**node.meta, "val": value_of(weight).t()}
    linear.meta = dict(node.meta)
    return linear


def linear_from_matmul(node: fx.Node) -> Any:
    """matmul(x, w^T), matmul(x, w) -> linear(x, w), linear(x, w^T) for a weight w of two dims"""
    if node.target is not aten.matmul.default:
        return None
    x: Any
    matrix: Any
    x, matrix = node.args
    weight: Any = matrix.args[0] if _is_transposed(matrix) else matrix
    if weight.op != "get_attr" or value_of(weight).dim() != 2 or value_of(x).dim() < 2:
        return None
    with node.graph.inserting_before(node):
        if weight is matrix:
            weight = node.graph.call_function(aten.t.default, (matrix,))
            weight.meta = {**node.meta, "val": value_of(matrix).t()}
        linear = node.graph.call_function(aten.linear.default, (x, weight))
    linear.meta = dict(node.meta)
    return linear


def _is_transposed(node: fx.Node) -> bool:
    """Whether a node transposes a matrix, under any name."""
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return True
    if node.target not in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.permute.default):
        return False
    if node.target is aten.permute.default:
        return [dim % 2 for dim in node.args[1]] == [1, 0]  # type: ignore[operator]
    first, second = node.args[1:3]
    return first % 2 != second % 2  # type: ignore[operator]


def linear_of_flattened(node: fx.Node) -> Any:
    """linear(x.reshape(-1, k)).reshape(*x.shape[:-1], n) -> linear(x)"""
    linear: Any = node.args[0] if node.args else None
    if node.target not in (aten.reshape.default, aten.view.default) or linear.target is not aten.linear.default:
        return None
    flattened = linear.args[0]
    if len(linear.users) != 1 or flattened.target not in (aten.reshape.default, aten.view.default):
        return None
    x = flattened.args[0]
    same_rows = same_shape(value_of(x)[..., 0], value_of(node)[..., 0]) and value_of(x).dim() == value_of(node).dim()
    same_columns = (
        value_of(x).shape[-1] == value_of(flattened).shape[-1]
        and value_of(node).shape[-1] == value_of(linear).shape[-1]
    )
    if not (same_rows and same_columns):
        return None
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(aten.linear.default, (x, *linear.args[1:]))
    whole.meta = {**linear.meta, "val": value_of(node)}
    return whole


def variance_by_correction(node: fx.Node) -> Any:
    """x.var(dim, unbiased) -> x.var(dim, correction=0 or 1)"""
    if node.target is not aten.var.dim:
        return None
    options = {"correction": int(argument(node, "unbiased")), "keepdim": argument(node, "keepdim")}
    node.target, node.args, node.kwargs = aten.var.correction, node.args[:2], options
    return None


def number_from_size(node: fx.Node) -> Any:
    """x / size -> x / 16, if the size is known by now"""
    size = value_of(node.args[1]) if node.target in SCALAR_ARITHMETIC else None
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    if known is not None:
        node.update_arg(1, known)
    return None


def mean_by_size(node: fx.Node) -> Any:
    """x.sum(dim) / x.shape[dim] -> x.mean(dim), if the size was symbolic in the capture"""
    if node.target is not aten.div.Tensor or node.kwargs or isinstance(value_of(node.args[1]), torch.Tensor):
        return None
    total: Any = node.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return None
    dims: Any = total.args[1]
    is_plain = value_of(total).dtype == value_of(total.args[0]).dtype and value_of(total).is_floating_point()
    if len(dims or ()) != 1 or not is_plain:
        return None
    size = value_of(total.args[0]).shape[dims[0]]
    if not isinstance(size, torch.SymInt) or not statically_known_true(size == value_of(node.args[1])):
        return None
    with node.graph.inserting_before(node):
        mean = node.graph.call_function(aten.mean.dim, (*total.args[:2], argument(total, "keepdim")))
    mean.meta = dict(node.meta)
    return mean


def keep_reduced_dim(node: fx.Node) -> Any:
    """x.mean(dim).unsqueeze(dim) -> x.mean(dim, keepdim=True), also for sums, maxima and variances

    Also after arithmetic with numbers, as in rsqrt(x.mean(dim) + eps).unsqueeze(dim).
    """
    reduction: Any = node.args[0] if node.args else None
    if node.target is not aten.unsqueeze.default:
        return None
    between = []
    while reduction.target in OF_ONE_VALUE and len(reduction.users) == 1 and len(reduction.all_input_nodes) == 1:
        between.append(reduction)
        reduction = reduction.args[0]
        if not isinstance(reduction, fx.Node):
            return None
    if reduction.target not in REDUCTIONS or len(reduction.users) != 1:
        return None
    dims: Any = argument(reduction, "dim")
    if argument(reduction, "keepdim") or not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    rank = value_of(node).dim()
    if dims[0] % rank != node.args[1] % rank:
        return None
    with node.graph.inserting_before(node):
        kept = node.graph.call_function(reduction.target, reduction.args[:2], {**reduction.kwargs, "keepdim": True})
        kept.meta = {**node.meta, "val": value_of(reduction).unsqueeze(node.args[1])}
        for each in reversed(between):
            kept = node.graph.call_function(each.target, (kept, *each.args[1:]), dict(each.kwargs))
            kept.meta = {**node.meta, "val": value_of(each).unsqueeze(node.args[1])}
    return kept


def split_by_sizes(node: fx.Node) -> Any:
    """split(x, n, dim), chunk(x, n, dim) -> split_with_sizes(x, [n, n, ...], dim), if the dim's size is known"""
    if node.target not in (aten.split.Tensor, aten.chunk.default):
        return None
    dim = argument(node, "dim")
    sizes = [part.shape[dim] for part in value_of(node)]
    if not all(type(size) is int for size in sizes):
        return None
    with node.graph.inserting_before(node):
        split = node.graph.call_function(aten.split_with_sizes.default, (node.args[0], sizes, dim))
    split.meta = dict(node.meta)
    return split


def new_to_full(node: fx.Node) -> Any:
    """x.new_zeros(shape) -> full(shape, 0), which does not read x"""
    if node.target not in NEW_FILLED:
        return None
    value = value_of(node)
    fill = node.args[2] if node.target is aten.new_full.default else NEW_FILLED[node.target]
    options = {"dtype": value.dtype, "device": value.device}
    with node.graph.inserting_before(node):
        full = node.graph.call_function(aten.full.default, (node.args[1], fill), options)
    full.meta = dict(node.meta)
    return full


REDUCTIONS = {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.var.correction,
    aten.linalg_vector_norm.default,
}
# If their first operand is the only tensor, these ops keep its shape.
OF_ONE_VALUE = {
    *(aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.clamp_min.default),
}

NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}

STEPS: tuple[Callable[[fx.Node], Any], ...] = (
    copy_to_cast_and_expand,
    drop_inactive_dropout,
    drop_same_dtype_cast,
    drop_copy,
    drop_whole_slice,
    whole_slice_written,
    view_to_reshape,
    reshape_as_to_reshape,
    size_of_another,
    drop_no_op_layout,
    number_from_constant,
    drop_neutral,
    fill_from_constant,
    compare_with_number,
    linear_from_addmm,
    linear_from_matmul,
    linear_of_flattened,
    variance_by_correction,
    number_from_size,
    mean_by_size,
    keep_reduced_dim,
    split_by_sizes,
    new_to_full,
    fill_by_index,
    softmax_by_hand,
    softmax_divided_later,
    softmax_of_logarithms,
    softmax_of_shifted,
    keys_in_parts,
)


def canonicalize(module: fx.GraphModule) -> fx.GraphModule:
    """Canonicalises `module`'s graph in place and returns the module.

    Idempotent, and changes neither the values nor the strides of outputs.

    Example::

        fxbt.capture.capture.capture(model, call).module  # ->  canonicalize(module)
    """
    for node in module.graph.nodes:
        if node.op == "call_function":
            _apply_steps(node)
    _share_common(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _apply_steps(node: fx.Node) -> None:
    for step in STEPS:
        replacement = step(node)
        if replacement is None:
            continue
        node.replace_all_uses_with(replacement)
        node.graph.erase_node(node)
        return


def _share_common(graph: fx.Graph) -> None:
    """Computes equal expressions once (common subexpression elimination).

    torch's CSEPass does not serve here: it confuses `x + 1` with `x + 1.0`, shares two dropouts, and merges two
    outputs.
    """
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or reaches_output(node) or not is_pure(node):
            continue
        first = known.setdefault(expression(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
