"""Whether a node is the op that a pattern calls, and which operands to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph.node import argument, is_pure, parameters
from .naming import is_float_cast, op_of
from .readings import is_close, reduced_dims
from .terms import Call, Part, Slice
from .torch_functions import plain_equation

# Arguments that are sizes (never written in patterns), dims (compared modulo the rank) or precision (ignored).
SIZES = {"size", "shape", "sizes", "normalized_shape", "output_size"}
DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim"}
PRECISION = {"dtype", "layout", "device", "pin_memory", "cudnn_enable", "memory_format", "implicit"}
SHAPES = {"reshape", "view", "flatten", "unflatten"}
PERMUTATIONS = {"transpose", "permute", "t", "mT", "swapaxes", "swapdims", "movedim", "numpy_T"}


def is_op(term: Call, node: fx.Node) -> bool:
    """Whether a node calls a term's op; all names of reshapes count as one op, and so do all permutations."""
    op = op_of(node)
    if term.op == "normalize":
        return op in ("layer_norm", "rms_norm")
    if term.op == "activation":
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and not is_float_cast(node)
        return is_pointwise and len(node.all_input_nodes) == 1 and is_pure(node)
    return op == term.op or (op in SHAPES and term.op in SHAPES) or (op in PERMUTATIONS and term.op in PERMUTATIONS)


def factors_of_linear(term: Call, node: fx.Node) -> list[tuple[Any, Any]]:
    """Pairs the factors of a pattern's matmul with those of a linear, the canonical form of x @ w and x @ w.T."""
    if term.op != "matmul" or op_of(node) != "linear" or argument(node, "bias") is not None:
        return []
    (first, second), (x, weight) = term.args, node.args[:2]
    if op_of(weight) in PERMUTATIONS:
        return [(first, x), (second, weight.args[0])]  # type: ignore[union-attr]
    if isinstance(second, Call) and second.op in PERMUTATIONS and permuted_axes(second, 2) == [1, 0]:
        return [(first, x), (second.args[0], weight)]
    return []


def operand_pairs(term: Call, node: fx.Node) -> tuple[list[tuple[Any, Any]], str]:
    """(pattern's value, node's value) for each operand, with comparable dims; and what only one of them has."""
    if not hasattr(node.target, "_schema"):
        return list(zip(term.args, node.args[1:], strict=False)), ""
    written = dict(term.kwargs)
    pairs: list[tuple[Any, Any]] = []
    for name, (place, default) in parameters(node.target).items():
        actual = argument(node, name)
        is_written = place < len(term.args) or name in written
        wanted = term.args[place] if place < len(term.args) else written.pop(name, None)
        if name in SIZES or name in PRECISION:
            continue
        if not is_written:
            if not term.open and not same_literal(default, actual):
                return [], f"{name}={actual}"
            continue
        if name in DIMS:
            wanted, actual = (_plain_dims(dims, _rank_of_dims(node)) for dims in (wanted, actual))
        if name == "correction" and actual is None:
            actual = 1
        if name == "equation":
            actual = plain_equation(actual)
        pairs.append((wanted, actual))
    unknown = sorted(set(written) - PRECISION - SIZES)
    return pairs, f"no {unknown[0]}" if unknown else ""


def permuted_axes(term: Call, rank: int) -> list[int] | None:
    """The dims of a tensor after the term's permutation; None if it does not fit this rank."""
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    try:
        permuted = getattr(probe, term.op)
        permuted = permuted(*term.args[1:], **dict(term.kwargs)) if callable(permuted) else permuted
    except (IndexError, RuntimeError):
        return None
    return [size - 2 for size in permuted.shape]


def _rank_of_dims(node: fx.Node) -> int:
    """The rank in which a negative dim counts: the input's, or the result's if that has one more dim."""
    source = node.args[0]
    is_larger = op_of(node) == "unsqueeze" or not isinstance(source, fx.Node)
    return (node if is_larger else source).meta["val"].dim()  # type: ignore[union-attr]


def _plain_dims(dims: Any, rank: int) -> Any:
    if isinstance(dims, int):
        dims = [dims]
    return sorted(dim % rank for dim in dims) if isinstance(dims, list | tuple) else dims


def same_literal(wanted: Any, actual: Any) -> bool:
    """Whether two arguments that are not tensors are equal, numbers to seven digits."""
    if isinstance(wanted, int | float) and isinstance(actual, int | float):
        return bool(wanted == actual) if isinstance(wanted, bool) else is_close(wanted, actual)
    return bool(wanted == actual)


def same_reduction(node: fx.Node, dims: Any, keepdim: bool) -> bool:
    """Whether a node reduces exactly these dims (None: all) with the same `keepdim`."""
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    wanted = list(range(rank)) if dims is None else sorted(dim % rank for dim in dims)
    return wanted == reduced_dims(node) and bool(argument(node, "keepdim", False)) == bool(keepdim)


def bounds_of(term: Part | Slice, total: int) -> tuple[int, int, int]:
    """(start, stop, step) of the part that a term takes of a dim of `total` elements."""
    if isinstance(term, Part):
        width = -(-total // term.of)
        return term.index * width, min((term.index + 1) * width, total), 1
    return slice(term.start, term.stop, term.step).indices(total)
