"""A sink: each query has one more score, of a key without a value. It takes weight and adds nothing.

It is written as a score that is joined to the others and cut off after the softmax, or as a factor on the result: with
L = sum_j exp(S_j),  exp(S) / (L + exp(sink)) = softmax(S) * sigmoid(log L - sink).

Source: Xiao et al. 2024, "Efficient streaming language models with attention sinks"; gpt-oss; Granite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph.miss import Miss
from . import axes
from .scores import MULTIPLY, Add, check_not_coarser, unexpanded

aten = torch.ops.aten


def joins(scores: fx.Node) -> bool:
    """Whether a softmax runs over scores that were concatenated with others."""
    return scores.target is aten.cat.default


def cut_off(softmax: fx.Node, weights: fx.Node, labels: axes.Axes) -> tuple[fx.Node, axes.Axes, Add]:
    """(scores, their axes, sink) of weights = softmax([scores, sink])[..., :keys]; the axes are those without the sink.

    Raises:
        Miss: something else is concatenated, or another part of the weights is read.
    """
    cat: Any = softmax.args[0]
    last = len(labels) - 1
    dims = [int(d) % (last + 1) for d in (axes.argument(cat, "dim", 0), softmax.args[1])]  # type: ignore[arg-type]
    sizes = [axes.sizes_of(part)[last] for part in cat.args[0]]
    if dims != [last, last] or len(sizes) != 2 or sizes.count(1) != 1:
        raise Miss("the softmax runs over joined scores", node=cat, expected="scores, and one sink for each query")
    place = sizes.index(1)
    scores, sink = cat.args[0][1 - place], cat.args[0][place]
    is_cut = weights.target is aten.slice.Tensor and int(axes.argument(weights, "dim", 0)) % (last + 1) == last
    start, step = axes.argument(weights, "start") or 0, axes.argument(weights, "step", 1)
    if not is_cut or (start, step) != (1 - place, 1) or axes.sizes_of(weights)[last] != sizes[1 - place]:
        raise Miss("the weight of the sink is not cut off", node=weights, expected="a slice of the other keys")
    rows = labels[:-1]
    node, sink_axes = unexpanded(sink, axes.broadcast_axes(sink, (*rows, ())))
    return scores, (*rows, axes.fresh(scores)[-1]), Add(node, sink_axes, 1)


def normalizer_of(scores: fx.Node) -> fx.Node | None:
    """The logsumexp that reads the same scores as the softmax; None if there is none."""
    return next((user for user in scores.users if user.target is aten.logsumexp.default), None)


def multiplied_on(
    context: fx.Node, labels: axes.Axes, softmax: fx.Node, score_axes: axes.Axes
) -> tuple[fx.Node, axes.Axes, Add]:
    """(result, its axes, sink) where result = context * sigmoid(logsumexp(scores) - sink).

    Raises:
        Miss: the logsumexp does not end in such a factor, one per query.
    """
    precision = context.meta["val"].dtype
    node = context
    while (user := _only_user(node)).target not in MULTIPLY:
        forward = labels if user.target in axes.CASTS else axes.step_forward(node, labels, user)
        if forward is None:
            raise _no_sink(user)
        if user.target in axes.CASTS:
            check_not_coarser(user, user.meta["val"].dtype, precision)
        node, labels = user, forward
    factor: Any = user.args[1] if user.args[0] is node else user.args[0]
    sigmoid, factor_axes = _back_to(aten.sigmoid.default, factor, labels, precision)
    shifted, row_axes = _back_to(aten.sub.Tensor, sigmoid.args[0], factor_axes, precision)
    normalizer, sink = shifted.args[:2]
    if shifted.kwargs.get("alpha", 1) != 1 or not isinstance(sink, fx.Node):
        raise _no_sink(shifted)
    total, total_axes = _back_to(aten.logsumexp.default, normalizer, row_axes, precision)
    if not _is_over_the_keys(total, total_axes, softmax, score_axes):
        raise _no_sink(total)
    sink, sink_axes = unexpanded(sink, axes.broadcast_axes(sink, row_axes))
    if not set(axes.atoms_of(sink_axes)) <= set(axes.atoms_of(total_axes)):
        raise _no_sink(sink)
    return user, labels, Add(sink, sink_axes, 1)


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_function":
        raise _no_sink(node)
    return users[0]


def _no_sink(node: Any) -> Miss:
    return Miss(
        "the logsumexp of the scores is used for something other than a sink",
        node=node if isinstance(node, fx.Node) else None,
        expected="the result times sigmoid(logsumexp(scores) - sink)",
    )


def _back_to(target: Any, node: Any, labels: axes.Axes, precision: torch.dtype) -> tuple[fx.Node, axes.Axes]:
    """The call of `target` behind layout ops and casts, with its axes; `node` broadcasts against `labels`."""
    if not isinstance(node, fx.Node):
        raise _no_sink(node)
    labels = axes.broadcast_axes(node, labels)
    while node.target is not target:
        if node.target in axes.CASTS:
            check_not_coarser(node, node.meta["val"].dtype, precision)
            node = node.args[0]
            continue
        back = axes.step_back(node, labels)
        if back is None:
            raise _no_sink(node)
        node, labels = back
    return node, labels


def _is_over_the_keys(total: fx.Node, total_axes: axes.Axes, softmax: fx.Node, score_axes: axes.Axes) -> bool:
    """Whether a logsumexp sums what the softmax divides by, for the same rows."""
    rank = len(score_axes)
    dim = int(softmax.args[1]) % rank  # type: ignore[arg-type]
    if total.args[0] is not softmax.args[0] or [int(d) % rank for d in total.args[1]] != [dim]:  # type: ignore[arg-type]
        return False
    kept = ((),) if axes.argument(total, "keepdim", False) else ()
    rows = (*score_axes[:dim], *kept, *score_axes[dim + 1 :])
    return axes.resolve(total_axes) == axes.resolve(rows)
