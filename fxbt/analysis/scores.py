"""The steps on attention scores between the query-key product and the softmax, read backward.

S = Q K^T, then any of: c * S, S * t (t constant along the keys), S + bias, where(mask, S, fill), casts, tanh(S).
`unwind` reads the steps from a graph; other functions say what such a chain masks and rounds. Nothing is changed.

Example::

    steps: list[Step] = []
    product = unwind(softmax.args[0], labels, keys, steps)  # steps: outermost first
    steps.reverse()
    proves_unmasked(steps, seq, keys, scores_dtype(softmax))  # Unmasked(causal=True, assumes=())
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from ..graph.miss import Miss
from . import axes, masks

aten = torch.ops.aten

# A masked score must vanish beside any real score. A model's scores are higher: float32 near 1e8 has steps of 8.
LARGEST_FILL = -0.99e8
LARGEST_FILL_OF = {torch.float16: -6e4}  # its lowest number is -65504
# From ROUNDS_FROM on, float32 rounds a score by more than the tests tolerate; below ABSORBS_FROM it does not absorb it.
ROUNDS_FROM, ABSORBS_FROM = 5e3, 0.99e9
# A fill that no later bias can lift again, and that absorbs a score added to it; so it replaces any lower one.
BOTTOM = -1e30

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar}
DIVIDE = {aten.div.Tensor, aten.div.Scalar}
ADD = {aten.add.Tensor, aten.add.Scalar}
SUBTRACT = {aten.sub.Tensor, aten.sub.Scalar}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
MASKED_FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
NOT = {aten.logical_not.default, aten.bitwise_not.default}
COMPARED = {aten.eq.Scalar: False, aten.ne.Scalar: True}
CLAMPS = {aten.clamp.default, aten.clamp_min.default}
# The numbers among their arguments are positions and sizes.
BY_POSITION = {aten.slice.Tensor, aten.select.int, aten.arange.default, aten.arange.start, aten.arange.start_step}


@dataclass
class Scale:
    """S * number"""

    number: float


@dataclass
class ScaleBy:
    """S * t, or S / t; t is constant along the key axis, or a number computed from sizes"""

    node: fx.Node
    axes: axes.Axes
    divide: bool


@dataclass
class Add:
    """S + factor * bias"""

    node: fx.Node | float
    axes: axes.Axes
    factor: float


@dataclass
class Fill:
    """where(mask, S, fill) if keep else where(mask, fill, S)"""

    node: fx.Node
    axes: axes.Axes
    fill: float
    keep: bool


@dataclass
class Floor:
    """max(S, lowest); lowest is at the bottom of the number range"""

    lowest: float


@dataclass
class Tanh:
    """tanh(S)"""


Step = Scale | ScaleBy | Add | Fill | Floor | Tanh


def unwind(node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], steps: list[Step]) -> axes.Contraction:
    """Goes back from the softmax input to the query-key product; appends the steps on the way to `steps`, outermost
    first.

    Raises:
        Miss: the way contains something other than these steps.
    """
    product = axes.contraction_of(node, labels)
    if product is not None:
        query_and_key(product, keys)
        return product
    back = axes.step_back(node, labels)
    if back is not None:
        return unwind(*back, keys, steps)
    if node.op != "call_function":
        raise Miss(
            "there is no query-key product before the softmax", node=node, expected="a contraction over head_dim"
        )
    if node.target in axes.CASTS:
        product = unwind(node.args[0], labels, keys, steps)  # type: ignore[arg-type]
        check_not_coarser(node, node.meta["val"].dtype, product.lhs.meta["val"].dtype)
        return product
    if node.target is aten.tanh.default:
        steps.append(Tanh())
        return unwind(node.args[0], labels, keys, steps)  # type: ignore[arg-type]
    if node.target is aten.neg.default:
        steps.append(Scale(-1))
        return unwind(node.args[0], labels, keys, steps)  # type: ignore[arg-type]
    if node.target in MULTIPLY | DIVIDE:
        return _unwind_scale(node, labels, keys, steps)
    if node.target in ADD | SUBTRACT:
        return _unwind_sum(node, labels, keys, steps)
    if node.target in WHERE | MASKED_FILL:
        return _unwind_fill(node, labels, keys, steps)
    if node.target in CLAMPS and (lowest := _floor(node)) is not None:
        steps.append(Floor(lowest))
        return unwind(node.args[0], labels, keys, steps)  # type: ignore[arg-type]
    raise Miss(
        "an op on the scores is not a scale, bias, mask or cast",
        node=node,
        expected="scale, bias, mask or cast between the query-key product and the softmax",
    )


def scores_dtype(softmax: fx.Node) -> torch.dtype:
    """The dtype of the scores in a softmax."""
    return softmax.args[0].meta["val"].dtype


def check_not_coarser(node: fx.Node, dtype: torch.dtype, than: torch.dtype) -> None:
    """SDPA computes at least as precisely as its operands, and does not round what the model rounds."""
    if not (dtype.is_floating_point and than.is_floating_point) or torch.finfo(dtype).eps > torch.finfo(than).eps:
        raise Miss(f"attention computes in {dtype}, coarser than its operands' {than}", node=node)


def _try_operands(
    node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], candidates: tuple[int, ...]
) -> tuple[int, axes.Contraction, list[Step]]:
    """The operand of a binary op that carries the scores, with the product and the steps found inside it."""
    misses = []
    for position in candidates:
        operand = node.args[position]
        if not isinstance(operand, fx.Node):
            continue
        inner: list[Step] = []
        try:
            return position, unwind(operand, axes.broadcast_axes(operand, labels), keys, inner), inner
        except Miss as miss:
            misses.append(miss)
    raise misses[0]


def _unwind_scale(node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], steps: list[Step]) -> axes.Contraction:
    divide = node.target in DIVIDE
    if node.kwargs.get("rounding_mode") is not None:
        raise Miss("the scores are divided with rounding", node=node)
    position, product, inner = _try_operands(node, labels, keys, (0,) if divide else (0, 1))
    factor = node.args[1 - position]
    if not isinstance(factor, fx.Node):
        steps.append(Scale(1 / factor if divide else factor))  # type: ignore[operator, arg-type]
        return _extend(steps, inner, product)
    is_tensor = isinstance(factor.meta["val"], torch.Tensor)  # otherwise a number computed from sizes
    factor_axes = axes.broadcast_axes(factor, labels) if is_tensor else ()
    if not axes.is_constant_along(factor_axes, keys):
        mask = None if divide else zeroing_mask(factor, factor_axes)
        if mask is None:
            raise Miss("the scores are multiplied by a tensor that varies along the keys", node=node)
        steps.append(mask)
    else:
        steps.append(ScaleBy(factor, factor_axes, divide))
    return _extend(steps, inner, product)


def zeroing_mask(factor: fx.Node, labels: axes.Axes) -> Fill | None:
    """A product with a boolean, or with 0 and 1 made from booleans, as a fill of zero."""
    return Fill(*unexpanded(factor, labels), 0.0, True) if _is_zero_or_one(factor) else None


def _is_zero_or_one(node: fx.Node) -> bool:
    if node.meta["val"].dtype is torch.bool:
        return True
    if masks.read_constants(node):
        return False
    try:
        value = masks.evaluate(node, masks.index_symbols(node.meta["val"].dim()), {})
    except (masks.Opaque, TypeError):  # sympy raises TypeError on NaN
        return False
    return isinstance(value, sympy.Piecewise) and all(case in (0, 1) for case, _ in value.args)


def same_mask(one: Fill, other: Fill) -> bool:
    """Whether two fills mask the same positions, however their masks are negated, cast and laid out."""
    return _meaning(one) == _meaning(other)


def _meaning(step: Fill) -> tuple[fx.Node, axes.Axes, bool]:
    """(tensor, its axes, whether scores are kept where it is nonzero)."""
    node, labels, keep = step.node, step.axes, step.keep
    while True:
        node, labels = axes.peel(node, labels)
        source: Any = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(source, fx.Node):
            return node, labels, keep
        if node.target in NOT and source.meta["val"].dtype is torch.bool:
            keep = not keep
        elif node.target in COMPARED and node.args[1] == 0:
            keep = keep == COMPARED[node.target]
        elif node.target not in axes.CASTS or torch.bool not in (node.meta["val"].dtype, source.meta["val"].dtype):
            return node, labels, keep
        node = source


def _as_one_fill(zeroing: Fill, bias: fx.Node, labels: axes.Axes, factor: float) -> Fill | None:
    """S * m + (1 - m) * c as a fill of c, if m is 0 or 1 and the bias is known at every position."""
    if masks.read_constants(bias) or masks.read_constants(zeroing.node):
        return None
    places = {label: at for label, at in zip(labels, masks.index_symbols(len(labels)), strict=True) if label}

    def value_of(node: fx.Node, its: axes.Axes) -> Any:
        index = tuple(places[label] if label else sympy.Integer(0) for label in axes.resolve(its))
        return masks.evaluate(node, index, {})

    try:
        kept = masks.truth(value_of(zeroing.node, zeroing.axes))
        added = value_of(bias, axes.broadcast_axes(bias, labels))
    except (masks.Opaque, KeyError, TypeError):  # a place without a name, or NaN: not known
        return None
    if not isinstance(added, sympy.Piecewise) or not all(case.is_number for case, _ in added.args):
        return None
    added = sympy.Piecewise(*[(case * sympy.sympify(factor), when) for case, when in added.args])
    fills = {float(case) for case, _ in added.args} - {0.0}
    if len(fills) != 1 or not max(fills) < 0 or masks.zero_else_below(added, max(fills)) != kept:
        return None
    return replace(zeroing, fill=fills.pop())


def _extend(steps: list[Step], inner: list[Step], product: axes.Contraction) -> axes.Contraction:
    steps.extend(inner)
    return product


def _unwind_sum(node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], steps: list[Step]) -> axes.Contraction:
    position, product, inner = _try_operands(node, labels, keys, (0, 1))
    bias: Any = node.args[1 - position]
    alpha: Any = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    sign = -1 if node.target in SUBTRACT else 1
    bias_factor = sign * alpha if position == 0 else 1
    score_factor = 1 if position == 0 else sign * alpha
    bias_axes: axes.Axes = ()
    if isinstance(bias, fx.Node):
        bias, bias_axes = unexpanded(bias, axes.broadcast_axes(bias, labels))
        zeroing = inner[0] if inner and score_factor == 1 else None
        if isinstance(zeroing, Fill) and zeroing.fill == 0 and zeroing.keep:
            whole = _as_one_fill(zeroing, bias, axes.resolve(labels), bias_factor)
            if whole is not None:
                return _extend(steps, [whole, *inner[1:]], product)
    steps.append(Add(bias, bias_axes, bias_factor))
    if score_factor != 1:
        steps.append(Scale(score_factor))
    return _extend(steps, inner, product)


def _unwind_fill(node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], steps: list[Step]) -> axes.Contraction:
    scores, mask, fill, keep = fill_operands(node)
    if not isinstance(fill, int | float) or not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node):
        raise Miss("scores are replaced by a tensor of values, not by one number", node=node)
    steps.append(Fill(*unexpanded(mask, axes.broadcast_axes(mask, labels)), float(fill), keep))
    return unwind(scores, axes.broadcast_axes(scores, labels), keys, steps)


def unexpanded(node: fx.Node, labels: axes.Axes) -> tuple[fx.Node, axes.Axes]:
    """A mask before it was expanded, even to the shape of the scores it masks."""
    while node.target in axes.EXPANDS and (back := axes.step_back(node, labels)) is not None:
        node, labels = back
    return node, labels


def fill_operands(node: fx.Node) -> tuple[Any, Any, Any, bool]:
    """(values, mask, fill, whether the mask marks what is kept) of a where or masked_fill."""
    if node.target in MASKED_FILL:
        return node.args[0], node.args[1], node.args[2], False
    mask, values, fill = node.args
    return (values, mask, fill, True) if isinstance(values, fx.Node) else (fill, mask, values, False)


def _floor(node: fx.Node) -> float | None:
    """The bound of a clamp from below only, at the bottom of the number range, where it changes no real score."""
    lowest, highest = (*node.args[1:], None, None)[:2]
    is_bottom = isinstance(lowest, int | float) and lowest <= BOTTOM
    return lowest if is_bottom and highest is None and not node.kwargs else None  # type: ignore[return-value]


def query_and_key(
    product: axes.Contraction, keys: tuple[axes.Atom, ...]
) -> tuple[tuple[fx.Node, axes.Axes], tuple[fx.Node, axes.Axes]]:
    """The operands as (query, key): the key has the whole softmax axis, the query no part of it."""
    wanted = set(axes.leaves(keys))
    lhs, rhs = set(axes.atoms_of(product.lhs_axes)), set(axes.atoms_of(product.rhs_axes))
    if not product.contracted:
        raise Miss("the product before the softmax sums over nothing", node=product.node)
    if wanted <= rhs and not wanted & lhs:
        return (product.lhs, product.lhs_axes), (product.rhs, product.rhs_axes)
    if wanted <= lhs and not wanted & rhs:
        return (product.rhs, product.rhs_axes), (product.lhs, product.lhs_axes)
    raise Miss("the softmax does not run over the key axis of the product before it", node=product.node)


def _after(step: Step, steps: list[Step]) -> list[Step]:
    return steps[next(place for place, other in enumerate(steps) if other is step) + 1 :]


def final_of(step: Fill, steps: list[Step]) -> float:
    """The value of a fill when the scores reach the softmax, without what is added to it."""
    return step.fill * scale_of(_after(step, steps))


def is_mask(step: Fill, steps: list[Step], dtype: torch.dtype) -> bool:
    """Whether a fill is below every `dtype` score that a model computes, so that its weight is zero beside one."""
    return final_of(step, steps) <= LARGEST_FILL_OF.get(dtype, LARGEST_FILL)  # not of NaN


def shows(steps: list[Step], dtype: torch.dtype) -> str | None:
    """Why the number that masked scores become affects the result, so that no lower one may replace it; else None.

    In a row that is masked entirely, equal finite fills share the weight evenly, whatever their value.
    """
    fills = [step for step in steps if isinstance(step, Fill)]
    finals = {final_of(step, steps) for step in fills}
    weak = [step for step in fills if not is_mask(step, steps, dtype)]
    if weak:
        return f"masked scores end at {final_of(weak[0], steps):g}, which does not mask every possible score"
    for step in fills:
        if any(isinstance(other, ScaleBy) for other in _after(step, steps)):
            return "masked scores are scaled by a tensor afterwards"
    bottom = BOTTOM if dtype is not torch.float16 else -math.inf
    above = [step for step in fills if final_of(step, steps) > bottom]
    if any(isinstance(other, Add) for step in above for other in _after(step, steps)):
        return "a bias added after the mask could lift the masked scores again"
    if above and len(finals - {-math.inf}) > 1:
        return "scores are masked with several different numbers"
    if above and any(isinstance(step, Add) and may_mask(step) for step in steps):
        return "scores are masked by a fill and by a bias"
    return None


def beyond_sdpa(steps: list[Step], dtype: torch.dtype) -> str | None:
    """Why SDPA, which adds one bias to a scaled product, cannot express the steps; None if it can."""
    if any(isinstance(step, Tanh) for step in steps):
        return "the scores are softcapped"
    return shows(steps, dtype) or ("adding the mask rounds the biases" if rounding_bias(steps) else None)


def lowered(steps: list[Step], dtype: torch.dtype) -> list[Step]:
    """The same steps, with finite fills lowered so far that they absorb a score when SDPA adds the two.

    float16 has no such number: see `keeps_open`.
    """
    bottom = BOTTOM if dtype is not torch.float16 else -math.inf
    result = list(steps)
    for place, step in enumerate(steps):
        if isinstance(step, Fill) and (final := final_of(step, steps)) > bottom:
            result[place] = replace(step, fill=step.fill * (bottom / final))
    return result


def has_finite_fill(steps: list[Step]) -> bool:
    """Whether rows that are masked entirely share their weight evenly."""
    return any(isinstance(step, Fill) and step.fill > -math.inf for step in steps)


def rounding_bias(steps: list[Step]) -> fx.Node | None:
    """A mask of about -1e6: it rounds the biases it is added to, which changes rows that it blocks entirely.

    A lower one absorbs them in any order, a higher one rounds too little to matter.
    """
    biases = _biases(steps)
    for bias in biases if len(biases) > 1 else ():
        if any(ROUNDS_FROM <= abs(number) < ABSORBS_FROM for number in _numbers_in(bias)):
            return bias
    return None


def check_gradient(steps: list[Step]) -> None:
    """In rows that only a fill and a bias together mask, a fill stops the gradient and SDPA's bias does not."""
    if not torch.is_grad_enabled() or not any(isinstance(step, Fill) and step.fill > -math.inf for step in steps):
        return
    for step in steps:
        if isinstance(step, Add) and may_mask(step):
            raise Miss(
                "scores are masked by a fill and by a bias, whose gradients differ",
                node=step.node if isinstance(step.node, fx.Node) else None,
            )


def _biases(steps: list[Step]) -> list[fx.Node]:
    """The tensors added to the scores, innermost first."""
    return [step.node for step in steps if isinstance(step, Add) and isinstance(step.node, fx.Node)]


def may_mask(step: Add) -> bool:
    """Whether a bias is computed from a mask value, or is an argument of unknown values."""
    numbers = _numbers_in(step.node) if isinstance(step.node, fx.Node) else (step.node,)
    return any(abs(number) >= -LARGEST_FILL for number in numbers)  # it may be subtracted


def _numbers_in(bias: fx.Node) -> Iterator[float]:
    """The numbers a bias is computed from; minus infinity for an argument of unknown values.

    The result of a layer or product is an activation, which stays small.
    """
    waiting, seen = [bias], {bias}
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" and node.meta["val"].is_floating_point():
            yield -math.inf
        if node.op != "call_function" or node.target in axes.EQUATIONS or node.target is aten.embedding.default:
            continue
        if node.target not in BY_POSITION:
            yield from (arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, int | float))
        sources = [source for source in node.all_input_nodes if source not in seen]
        waiting.extend(source for source in sources if isinstance(source.meta.get("val"), torch.Tensor))
        seen.update(sources)


def scale_of(steps: list[Step]) -> float:
    """The factor by which the steps multiply the scores."""
    return math.prod(step.number for step in steps if isinstance(step, Scale))


class Unmasked(NamedTuple):
    """The steps mask exactly key > query, or (if not `causal`) nothing; proven from the content of `assumes`."""

    causal: bool
    assumes: tuple[fx.Node, ...]


def proves_unmasked(
    steps: list[Step], seq: tuple[axes.Atom, ...], keys: tuple[axes.Atom, ...], dtype: torch.dtype
) -> Unmasked | None:
    """A proof that the steps mask only later keys, or nothing; None without one."""
    masking: list[Any] = [step for step in steps if not isinstance(step, Scale | Floor)]
    while masking and isinstance(masking[0], ScaleBy):  # scaling before masking masks nothing
        masking = masking[1:]
    if len(masking) != 1 or not isinstance(masking[0], Add | Fill) or not isinstance(masking[0].node, fx.Node):
        return None
    (step,) = masking
    later = math.prod(other.number for other in steps[steps.index(step) + 1 :] if isinstance(other, Scale))
    labels = axes.resolve(step.axes)
    constants = masks.read_constants(step.node)
    index = masks.index_symbols(len(labels))
    try:
        value = masks.evaluate(step.node, index, constants)
    except (masks.Opaque, TypeError):  # sympy raises TypeError on NaN: not proven
        return None
    attend = _attends(step, value, later)
    attend = masks.without_bounds(attend, index, step.node.meta["val"].shape)
    if attend is sympy.true:
        return Unmasked(False, tuple(constants))
    if attend is None or not seq or seq not in labels or keys not in labels:
        return None
    if isinstance(step, Fill) and not is_mask(step, steps, dtype):
        return None
    causal = masks.is_causal(attend, index[labels.index(seq)], index[labels.index(keys)])
    return Unmasked(True, tuple(constants)) if causal else None


def _attends(step: Add | Fill, value: Any, later: float) -> Any:
    """Where an evaluated mask lets a query attend; None if it is not a mask of zero and bottom.

    `later` is the factor that scales the masked scores afterwards.
    """
    if isinstance(step, Fill):
        truth = masks.truth(value)
        return truth if step.keep else masks.negate(truth)
    factor = step.factor * later
    return masks.zero_else_below(value, LARGEST_FILL / factor) if factor > 0 else None
