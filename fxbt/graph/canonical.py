"""One spelling per meaning: small number-preserving steps that bring a captured graph to its canonical form.

Every step looks at one node and returns what to use in its place, or None. `canonicalize` runs the table to a fixed
point, shares common subexpressions and drops dead nodes. A new spelling of a known thing becomes a step here.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..torch_compat import pytree, statically_known_true

aten = torch.ops.aten

WHOLE_AXIS = 2**63 - 1


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument called `name` in the op's schema, whether given by position, by keyword or not at all.

    Example::

        fxbt.argument(node, "attn_mask")
    """
    if name in node.kwargs:
        return node.kwargs[name]
    if name not in (known := parameters(node.target)):
        return default
    place, its_default = known[name]
    return node.args[place] if place < len(node.args) else its_default


@functools.cache
def parameters(op: Any) -> dict[str, tuple[int, Any]]:
    """Each parameter's place and default, by name; the schema itself makes them anew whenever it is asked."""
    return {each.name: (place, each.default_value) for place, each in enumerate(op._schema.arguments)}


def attribute(module: Any, node: fx.Node) -> Any:
    """The parameter, buffer or constant that a get_attr node stands for."""
    return operator.attrgetter(str(node.target))(module)


def with_graph(module: Any, graph: fx.Graph) -> fx.GraphModule:
    """A module of its own for `graph`, whose weights and constants are those of `module`."""
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({name: operator.attrgetter(name)(module) for name in names}, graph)


def writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def only_user(node: fx.Node, targets: Any) -> fx.Node | None:
    """The one node that reads `node`, if it calls one of `targets`."""
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and user.target in targets else None


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dim() != b.dim():
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def reaches_output(node: fx.Node) -> bool:
    """Whether the caller gets `node` itself or a view of it: its strides show, and writes to it would be felt."""
    return any(user.op == "output" or (_is_view(user) and reaches_output(user)) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)


def drop_inactive_dropout(node: fx.Node) -> Any:
    """dropout(x, p, train=False) -> x"""
    if node.target not in (aten.dropout.default, aten.feature_dropout.default):
        return None
    return node.args[0] if not node.args[2] or node.args[1] == 0 else None


def drop_same_dtype_cast(node: fx.Node) -> Any:
    """x.to(dtype and device that x already has) -> x"""
    if node.target not in CASTS or argument(node, "copy", False) or argument(node, "memory_format") is not None:
        return None
    source, result = _value(node.args[0]), _value(node)
    same = source.dtype == result.dtype and source.device == result.device
    return node.args[0] if same else None


def drop_copy(node: fx.Node) -> Any:
    """x.contiguous(), x.clone() -> x, except where the caller would see the strides or an alias.

    So would a convolution: it and the norms after it compute images by other algorithms where channels come last, and
    torch's group_norm loses digits there.
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
    if end in (None, WHOLE_AXIS) or same_shape(_value(node.args[0]), _value(node)):
        return node.args[0]
    return None


def whole_slice_written(node: fx.Node) -> Any:
    """slice_scatter(x, y) over all of x -> y"""
    if node.target is not aten.slice_scatter.default or reaches_output(node):
        return None
    x, y = node.args[:2]
    is_whole = argument(node, "step", 1) == 1 and argument(node, "start") in (None, 0)
    return y if is_whole and same_shape(_value(x), _value(y)) and _value(x).dtype == _value(y).dtype else None


def drop_no_op_layout(node: fx.Node) -> Any:
    """A reshape or expand to the shape x already has -> x"""
    if node.target not in (aten.reshape.default, aten.expand.default) or reaches_output(node):
        return None
    return node.args[0] if same_shape(_value(node.args[0]), _value(node)) else None


def drop_neutral(node: fx.Node) -> Any:
    """x * 1 -> x, x + 0 -> x for integers (a float -0.0 + 0 is 0.0)"""
    if node.target not in NEUTRAL or node.kwargs or reaches_output(node) or not isinstance(node.args[0], fx.Node):
        return None
    same = isinstance(node.args[1], int | float) and node.args[1] == NEUTRAL[node.target]
    if not same or _value(node.args[0]).dtype != _value(node).dtype:
        return None
    is_sum = NEUTRAL[node.target] == 0
    return None if is_sum and _value(node).dtype.is_floating_point else node.args[0]


def view_to_reshape(node: fx.Node) -> Any:
    """x.view(shape) -> x.reshape(shape): a rewritten producer may have other strides than the one captured."""
    if node.target in (aten.view.default, aten._unsafe_view.default):
        node.target = aten.reshape.default
    return None


def reshape_as_to_reshape(node: fx.Node) -> Any:
    """x.reshape_as(y), x.view_as(y) -> x.reshape(sizes of y): y itself is not read"""
    if node.target not in (aten.reshape_as.default, aten.view_as.default):
        return None
    sizes = [_size_node(node, size) for size in _value(node).shape]
    if sizes.count(None) <= 1:
        node.target, node.args = aten.reshape.default, (node.args[0], [-1 if s is None else s for s in sizes])
    return None


def _size_node(node: fx.Node, size: Any) -> Any:
    """A size as a number, or as an earlier node that has it; None where none has."""
    if not isinstance(size, torch.SymInt):
        return size
    for earlier in node.graph.nodes:
        if earlier is node:
            return None
        known = _value(earlier)
        if isinstance(known, torch.SymInt) and known.node.expr == size.node.expr:
            return earlier
    return None


def size_of_another(node: fx.Node) -> Any:
    """The size of a value inside -> the same size, read earlier: of an input, as a rule"""
    return _size_node(node, _value(node)) if node.target is aten.sym_size.int and not reaches_output(node) else None


def number_from_constant(node: fx.Node) -> Any:
    """x * tensor(0.125) -> x * 0.125, for scalars that the code wrote down (not for parameters and buffers)."""
    if node.target not in SCALAR_ARITHMETIC:
        return None
    lhs, rhs = node.args[:2]
    if node.target in COMMUTATIVE and not node.kwargs and _constant_number(lhs) is not None:
        lhs, rhs = rhs, lhs
    number = _constant_number(rhs)
    if number is not None and isinstance(lhs, fx.Node) and _value(node).dtype == _value(lhs).dtype:
        node.args = (lhs, number, *node.args[2:])
    return None


def fill_from_constant(node: fx.Node) -> Any:
    """where(mask, x, tensor(c)), masked_fill(x, mask, tensor(c)), maximum(x, tensor(c)) -> with the number c

    Of a where also full_like(x, c), on either side.
    """
    for position, overload in NUMBER_OVERLOADS.get(node.target, ()):
        others = [_value(arg) for place, arg in enumerate(node.args) if place != position and isinstance(arg, fx.Node)]
        number = _constant_number(node.args[position])
        if number is None and node.target is aten.where.self and _is_as_broadcast(node, others):
            number = _filled_with(node.args[position])
        if number is not None and _value(node).dtype in [other.dtype for other in others]:
            node.target = overload
            node.update_arg(position, number)
            return None
    return None


def _is_as_broadcast(node: fx.Node, others: list[torch.Tensor]) -> bool:
    """Whether a node has the shape that the others alone broadcast to."""
    rank = _value(node).dim()
    shapes = [[1] * (rank - other.dim()) + list(other.shape) for other in others]
    return all(any(statically_known_true(size == shape[dim]) for shape in shapes) for dim, size in _sizes(node))


def _sizes(node: fx.Node) -> Any:
    return enumerate(_value(node).shape)


def _filled_with(node: Any) -> float | int | None:
    """The number that a tensor made by full_like, full, ones_like and the like holds everywhere."""
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
    """x[mask] = c, an index_put(x, [mask], c) where the boolean mask has dims of x -> masked_fill(x, mask, c)"""
    if node.target is not aten.index_put.default or argument(node, "accumulate"):
        return None
    x: Any
    indices: Any
    value: Any
    x, indices, value = node.args[:3]
    masks = [index for index in indices if index is not None]
    if len(masks) != 1 or _value(masks[0]).dtype is not torch.bool or _value(value).dim():
        return None
    mask, first = masks[0], len(indices) - 1
    behind = _value(x).dim() - first - _value(mask).dim()
    covered = _value(x).shape[first:][: _value(mask).dim()]
    is_same = all(statically_known_true(a == b) for a, b in zip(_value(mask).shape, covered, strict=True))
    if indices[first] is not mask or not is_same:
        return None
    with node.graph.inserting_before(node):
        for _ in range(behind):
            wider = node.graph.call_function(aten.unsqueeze.default, (mask, -1))
            wider.meta = {**node.meta, "val": _value(mask).unsqueeze(-1)}
            mask = wider
        number = _constant_number(value)
        kind = aten.masked_fill.Tensor if number is None else aten.masked_fill.Scalar
        filled = node.graph.call_function(kind, (x, mask, value if number is None else number))
    filled.meta = dict(node.meta)
    return filled


def compare_with_number(node: fx.Node) -> Any:
    """x == tensor(c), x < tensor(c) -> with the number c"""
    if node.target not in COMPARISONS:
        return None
    x, constant = node.args
    number = _constant_number(constant)
    if number is not None and torch.result_type(_value(x), number) == torch.result_type(_value(x), _value(constant)):
        node.target = COMPARISONS[node.target]
        node.update_arg(1, number)
    return None


def _constant_number(node: Any) -> float | int | None:
    """The value of a scalar computed from lifted constants and numbers alone."""
    if not isinstance(node, fx.Node) or not isinstance(_value(node), torch.Tensor) or _value(node).dim() != 0:
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


def copy_to_cast_and_expand(node: fx.Node) -> Any:
    """copy(x, y), what functionalising y's write into x leaves -> y cast and expanded to x: that has a derivative"""
    if node.target is not aten.copy.default:
        return None
    into, source = node.args[:2]
    with node.graph.inserting_before(node):
        cast = node.graph.call_function(aten.to.dtype, (source, _value(node).dtype))
        cast.meta = {**node.meta, "val": _value(source).to(_value(node).dtype)}
        expanded = node.graph.call_function(aten.expand_as.default, (cast, into))
    expanded.meta = dict(node.meta)
    return expanded


def linear_from_addmm(node: fx.Node) -> Any:
    """addmm(bias, x, w), as a Conv1D computes it -> linear(x, w^T, bias); so does mm(x, w) for a weight"""
    if node.target not in (aten.addmm.default, aten.mm.default) or node.kwargs:
        return None
    bias, x, weight = node.args if node.target is aten.addmm.default else (None, *node.args)
    if weight.op != "get_attr" or (bias is not None and _value(bias).dim() != 1):
        return None
    with node.graph.inserting_before(node):
        transposed = node.graph.call_function(aten.t.default, (weight,))
        linear = node.graph.call_function(aten.linear.default, (x, transposed, bias))
    transposed.meta = {**node.meta, "val": _value(weight).t()}
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
    if weight.op != "get_attr" or _value(weight).dim() != 2 or _value(x).dim() < 2:
        return None
    with node.graph.inserting_before(node):
        if weight is matrix:
            weight = node.graph.call_function(aten.t.default, (matrix,))
            weight.meta = {**node.meta, "val": _value(matrix).t()}
        linear = node.graph.call_function(aten.linear.default, (x, weight))
    linear.meta = dict(node.meta)
    return linear


def _is_transposed(node: fx.Node) -> bool:
    """Whether a node is the transposition of a matrix, however it is called."""
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
    same_rows = same_shape(_value(x)[..., 0], _value(node)[..., 0]) and _value(x).dim() == _value(node).dim()
    same_columns = (
        _value(x).shape[-1] == _value(flattened).shape[-1] and _value(node).shape[-1] == _value(linear).shape[-1]
    )
    if not (same_rows and same_columns):
        return None
    with node.graph.inserting_before(node):
        whole = node.graph.call_function(aten.linear.default, (x, *linear.args[1:]))
    whole.meta = {**linear.meta, "val": _value(node)}
    return whole


def variance_by_correction(node: fx.Node) -> Any:
    """x.var(dim, unbiased) -> x.var(dim, correction=0 or 1)"""
    if node.target is not aten.var.dim:
        return None
    options = {"correction": int(argument(node, "unbiased")), "keepdim": argument(node, "keepdim")}
    node.target, node.args, node.kwargs = aten.var.correction, node.args[:2], options
    return None


def number_from_size(node: fx.Node) -> Any:
    """x / size -> x / 16, for a size that is known by now"""
    size = _value(node.args[1]) if node.target in SCALAR_ARITHMETIC else None
    known = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    if known is not None:
        node.update_arg(1, known)
    return None


def mean_by_size(node: fx.Node) -> Any:
    """x.sum(dim) / x.shape[dim] -> x.mean(dim), where the size was a symbol when the graph was captured"""
    if node.target is not aten.div.Tensor or node.kwargs or isinstance(_value(node.args[1]), torch.Tensor):
        return None
    total: Any = node.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return None
    dims: Any = total.args[1]
    is_plain = _value(total).dtype == _value(total.args[0]).dtype and _value(total).is_floating_point()
    if len(dims or ()) != 1 or not is_plain:
        return None
    size = _value(total.args[0]).shape[dims[0]]
    if not isinstance(size, torch.SymInt) or not statically_known_true(size == _value(node.args[1])):
        return None
    with node.graph.inserting_before(node):
        mean = node.graph.call_function(aten.mean.dim, (*total.args[:2], argument(total, "keepdim")))
    mean.meta = dict(node.meta)
    return mean


def keep_reduced_dim(node: fx.Node) -> Any:
    """x.mean(dim).unsqueeze(dim) -> x.mean(dim, keepdim=True), for sums, maxima and variances too

    Also behind arithmetic with numbers, as in rsqrt(x.mean(dim) + eps).unsqueeze(dim).
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
    rank = _value(node).dim()
    if dims[0] % rank != node.args[1] % rank:
        return None
    with node.graph.inserting_before(node):
        kept = node.graph.call_function(reduction.target, reduction.args[:2], {**reduction.kwargs, "keepdim": True})
        kept.meta = {**node.meta, "val": _value(reduction).unsqueeze(node.args[1])}
        for each in reversed(between):
            kept = node.graph.call_function(each.target, (kept, *each.args[1:]), dict(each.kwargs))
            kept.meta = {**node.meta, "val": _value(each).unsqueeze(node.args[1])}
    return kept


def split_by_sizes(node: fx.Node) -> Any:
    """split(x, n, dim), chunk(x, n, dim) -> split_with_sizes(x, [n, n, ...], dim), where the dim has a known size"""
    if node.target not in (aten.split.Tensor, aten.chunk.default):
        return None
    dim = argument(node, "dim")
    sizes = [part.shape[dim] for part in _value(node)]
    if not all(type(size) is int for size in sizes):
        return None
    with node.graph.inserting_before(node):
        split = node.graph.call_function(aten.split_with_sizes.default, (node.args[0], sizes, dim))
    split.meta = dict(node.meta)
    return split


def new_to_full(node: fx.Node) -> Any:
    """x.new_zeros(shape) -> full(shape, 0): it reads nothing of x, and so should not use it"""
    if node.target not in NEW_FILLED:
        return None
    value = _value(node)
    fill = node.args[2] if node.target is aten.new_full.default else NEW_FILLED[node.target]
    options = {"dtype": value.dtype, "device": value.device}
    with node.graph.inserting_before(node):
        full = node.graph.call_function(aten.full.default, (node.args[1], fill), options)
    full.meta = dict(node.meta)
    return full


def softmax_by_hand(node: fx.Node) -> Any:
    """e / e.sum(dim, keepdim) with e = exp(x) or exp(x - x.amax(dim, keepdim)) -> softmax(x, dim)

    A softmax is a number where exp(x) would overflow, or e be 0 throughout.
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
    rank = _value(exponential).dim()
    readers = {user for user in exponential.users if user.users}  # a sum that was written anew is dead
    if readers != {product, total} or dim != rank - 1 or rank != _value(product).dim():
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
    """(a, b) of a / b or a * (1 / b); (None, None) where node is neither."""
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
    """(e, dim) where total is the sum of an exponential e over one dim, which it keeps."""
    if not isinstance(total, fx.Node) or total.target is not aten.sum.dim_IntList:
        return None
    exponential: Any
    dims: Any
    exponential, dims = total.args[:2]
    if exponential.target is not aten.exp.default or len(dims) != 1 or not argument(total, "keepdim"):
        return None
    return None if argument(total, "dtype") is not None else (exponential, dims[0] % _value(exponential).dim())


def _softmax(exponential: fx.Node, dim: int) -> fx.Node:
    """The softmax that exponentials of scores, or of scores less their maximum, are the numerators of."""
    scores = exponential.args[0]
    less = _shifted_by_its_max(scores, dim)
    softmax = exponential.graph.call_function(aten.softmax.int, (scores if less is None else less, dim))
    softmax.meta = dict(exponential.meta)
    return softmax


def _sums_last_of(product: fx.Node, lhs: fx.Node) -> bool:
    """Whether a product multiplies rows of `lhs`, its first operand, and keeps them where they are."""
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
    """(x, dim), where node is x - logsumexp(x, dim, keepdim=True)."""
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

    softmax(q @ cat([k1^T, k2^T], -1)) @ cat([v1, v2], -2), as with a cache whose keys and values stay apart.
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
    value.meta = {**node.meta, "val": torch.cat([_value(each.args[1]) for each in products], -2)}
    result.meta = dict(node.meta)
    return result


def _is_product(node: Any) -> bool:
    """Whether a node is a product of matrices on which cat can be done before it as well as after."""
    if not isinstance(node, fx.Node) or node.target not in (aten.matmul.default, aten.bmm.default):
        return False
    return _value(node.args[0]).dim() == _value(node.args[1]).dim() >= 3


def _whole_of(parts: list[Any]) -> Any:
    """What two slices, first and rest, or the two parts of a split, cut along the last dim."""
    first, rest = parts
    if first.target is operator.getitem and rest.target is operator.getitem:
        split = first.args[0]
        is_split = split is rest.args[0] and split.target is aten.split_with_sizes.default and len(split.args[1]) == 2
        is_last = is_split and argument(split, "dim", 0) % _value(first).dim() == _value(first).dim() - 1
        return split.args[0] if is_last and (first.args[1], rest.args[1]) == (0, 1) else None
    if {first.target, rest.target} != {aten.slice.Tensor} or first.args[0] is not rest.args[0]:
        return None
    last = _value(first).dim() - 1
    along = all(argument(each, "dim", 0) % (last + 1) == last and argument(each, "step", 1) == 1 for each in parts)
    end, start = argument(first, "end"), argument(rest, "start")
    is_cut = end is start or (type(end) is int and type(start) is int and end == start > 0)
    to_the_end = argument(rest, "end") in (None, WHOLE_AXIS)
    is_first = argument(first, "start") in (None, 0)
    return first.args[0] if along and is_first and is_cut and to_the_end else None


def _joined_products(softmax: fx.Node) -> fx.Node | None:
    """The cat of products of one query, scaled alike or not, that a softmax over the same dim is computed from."""
    node: Any = softmax.args[0]
    last = _value(softmax).dim() - 1
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
    """(product, how it is scaled) of what may be a product times a number."""
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
        key.meta = {**cat.meta, "val": torch.cat([_value(each) for each in keys], -1)}
        result.meta = dict(cat.meta)
        if scaled is not None:
            result = cat.graph.call_function(scaled[0], (result, scaled[1]))
            result.meta = dict(cat.meta)
    cat.replace_all_uses_with(result)
    cat.graph.erase_node(cat)


def softmax_of_shifted(node: fx.Node) -> Any:
    """softmax(x - x.amax(dim, keepdim), dim) -> softmax(x, dim), also where x was made smaller meanwhile

    CogView's PB-relax, https://huggingface.co/papers/2105.13290: softmax((x / a - max(x / a)) * a).
    """
    if node.target is not aten.softmax.int:
        return None
    dim = int(node.args[1]) % _value(node).dim()  # type: ignore[arg-type]
    scores = _shifted_by_its_max(node.args[0], dim) or _relaxed(node.args[0], dim)
    if scores is not None and _value(scores).dtype == _value(node.args[0]).dtype:
        node.update_arg(0, scores)
    return None


def _relaxed(node: Any, dim: int) -> Any:
    """x, where node is (x / a - max(x / a)) * a for a number a of at least one."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return None
    factor = node.args[1]
    smaller = _shifted_by_its_max(node.args[0], dim)
    if smaller is None or not isinstance(factor, int | float) or factor < 1:
        return None
    divided = smaller.target is aten.div.Tensor and smaller.args[1] == factor and not smaller.kwargs
    return smaller.args[0] if divided else None


def _shifted_by_its_max(node: Any, dim: int) -> Any:
    """x, where node is x - x.amax(dim, keepdim=True) (or x - x.max(dim, keepdim=True)[0])."""
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
    rank = _value(scores).dim() if isinstance(scores, fx.Node) else 0
    same_axis = [d % rank for d in dims] == [dim] if rank else False
    return scores if same_axis and peak.args[0] is scores and argument(peak, "keepdim") else None


CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default}
COPIES.add(aten.detach.default)
BY_STRIDES = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
    aten.group_norm.default,
    aten.batch_norm.default,
}

REDUCTIONS = {
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.var.correction,
    aten.linalg_vector_norm.default,
}
# With one tensor among their operands, the first, these keep its shape.
OF_ONE_VALUE = {
    *(aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.clamp_min.default),
}
SCALAR_ARITHMETIC = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}
COMMUTATIVE = {aten.mul.Tensor, aten.add.Tensor}
NUMBER_OVERLOADS: dict[Any, Any] = {
    aten.where.self: ((2, aten.where.ScalarOther), (1, aten.where.ScalarSelf)),
    aten.masked_fill.Tensor: ((2, aten.masked_fill.Scalar),),
    aten.maximum.default: ((1, aten.clamp_min.default),),
    aten.max.other: ((1, aten.clamp_min.default),),
}
FILLED = {aten.ones_like.default: 1, aten.ones.default: 1, aten.zeros_like.default: 0, aten.zeros.default: 0}
# What may stand between scores and their softmax, and which operand the scores are.
BETWEEN_SCORES = {
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor), 0),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.to.dtype), 0),
    aten.where.ScalarOther: 1,
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

NEW_FILLED = {aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_full.default: None}

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
    """Bring `module`'s graph to canonical form in place, and return it.

    Idempotent and number-preserving: the outputs stay equal, their strides included.

    Example::

        fxbt.capture.export.capture(model, call).module  # ->  canonicalize(module)
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
    """Compute equal expressions once.

    Not torch's CSEPass: that one takes `x + 1` for `x + 1.0`, shares two dropouts and makes two outputs one tensor.
    """
    known: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or reaches_output(node) or not is_pure(node):
            continue
        first = known.setdefault(expression(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def is_pure(node: fx.Node) -> bool:
    """Whether a node computes the same from the same inputs and writes nowhere."""
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) and not writes(node)


def expression(node: fx.Node) -> Any:
    """A key that is equal for nodes that compute the same: numbers with their type and sign, for 1 == 1.0 == True."""
    arguments, spec = pytree.tree_flatten((node.args, node.kwargs))
    return (
        node.target,
        str(spec),
        tuple((type(arg), arg if isinstance(arg, fx.Node) else repr(arg)) for arg in arguments),
    )
