"""What happens to attention scores between the query-key product and the softmax: a chain of steps, read backward.

S = Q K^T, then any of: c * S, S * t (t constant along the keys), S + bias, where(mask, S, fill), casts, tanh(S). But
for the tanh they are affine, and the same steps, run on nothing, give the bias that SDPA adds to its scaled product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from fxbt import Miss, axes, masks

aten = torch.ops.aten

# A masked score must vanish beside any real score and absorb it when added: float32 near 1e9 has steps of 64.
LARGEST_FILL = -0.99e9
# From here on float32 rounds a score by more than the tolerance of the tests.
ROUNDS_FROM = 5e3
# A fill no later bias can lift again.
BOTTOM = -1e30

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar}
DIVIDE = {aten.div.Tensor, aten.div.Scalar}
ADD = {aten.add.Tensor, aten.add.Scalar}
SUBTRACT = {aten.sub.Tensor, aten.sub.Scalar}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
MASKED_FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
CLAMPS = {aten.clamp.default, aten.clamp_min.default}
# Their numbers are places and sizes.
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
Operand = Callable[[fx.Node, axes.Axes], torch.Tensor]


def unwind(node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], steps: list[Step]) -> axes.Contraction:
    """Back from the softmax input to the query-key product; what happens on the way goes to `steps`, outermost first.

    Raises:
        Miss: something else stands there.
    """
    product = axes.contraction_of(node, labels)
    if product is not None:
        query_and_key(product, keys)
        return product
    back = axes.step_back(node, labels)
    if back is not None:
        return unwind(*back, keys, steps)
    if node.op != "call_function":
        raise Miss("no query-key product before the softmax", node=node, expected="a contraction over head_dim")
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
        "the scores pass through an op that is no affine step",
        node=node,
        expected="scale, bias, mask or cast between the query-key product and the softmax",
    )


def check_not_coarser(node: fx.Node, dtype: torch.dtype, than: torch.dtype) -> None:
    """SDPA computes at least as precisely as its operands; what the model rounds on the way, it does not."""
    if not (dtype.is_floating_point and than.is_floating_point) or torch.finfo(dtype).eps > torch.finfo(than).eps:
        raise Miss(f"attention passes through {dtype}, coarser than its operands' {than}", node=node)


def _try_operands(
    node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], candidates: tuple[int, ...]
) -> tuple[int, axes.Contraction, list[Step]]:
    """Which operand of a binary op carries the scores, with the product and the steps found inside it."""
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
    is_tensor = isinstance(factor.meta["val"], torch.Tensor)  # else a number computed from sizes
    factor_axes = axes.broadcast_axes(factor, labels) if is_tensor else ()
    if set(axes.atoms_of(factor_axes)) & set(axes.leaves(keys)):
        raise Miss("the scores are multiplied by a tensor that varies along the keys", node=node)
    steps.append(ScaleBy(factor, factor_axes, divide))
    return _extend(steps, inner, product)


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
    steps.append(Add(bias, bias_axes, bias_factor))
    if score_factor != 1:
        steps.append(Scale(score_factor))
    return _extend(steps, inner, product)


def _unwind_fill(node: fx.Node, labels: axes.Axes, keys: tuple[axes.Atom, ...], steps: list[Step]) -> axes.Contraction:
    scores, mask, fill, keep = fill_operands(node)
    if not isinstance(fill, int | float) or not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node):
        raise Miss("scores are replaced by other values, not by one mask value", node=node)
    steps.append(Fill(*unexpanded(mask, axes.broadcast_axes(mask, labels)), float(fill), keep))
    return unwind(scores, axes.broadcast_axes(scores, labels), keys, steps)


def unexpanded(node: fx.Node, labels: axes.Axes) -> tuple[fx.Node, axes.Axes]:
    """A mask before it was expanded, perhaps to the shape of the very scores it masks."""
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
    """The bound of a clamp from below alone, at the bottom of the number range, where it changes no real score."""
    lowest, highest = (*node.args[1:], None, None)[:2]
    is_bottom = isinstance(lowest, int | float) and lowest <= BOTTOM
    return lowest if is_bottom and highest is None and not node.kwargs else None  # type: ignore[return-value]


def query_and_key(
    product: axes.Contraction, keys: tuple[axes.Atom, ...]
) -> tuple[tuple[fx.Node, axes.Axes], tuple[fx.Node, axes.Axes]]:
    """The operands as (query, key): the key holds the whole softmax axis, the query nothing of it."""
    wanted = set(axes.leaves(keys))
    lhs, rhs = set(axes.atoms_of(product.lhs_axes)), set(axes.atoms_of(product.rhs_axes))
    if not product.contracted:
        raise Miss("the product before the softmax sums over nothing", node=product.node)
    if wanted <= rhs and not wanted & lhs:
        return (product.lhs, product.lhs_axes), (product.rhs, product.rhs_axes)
    if wanted <= lhs and not wanted & rhs:
        return (product.rhs, product.rhs_axes), (product.lhs, product.lhs_axes)
    raise Miss("the softmax does not run over the key axis of the product before it", node=product.node)


def check_fills(steps: list[Step]) -> None:
    """A fill stands for "masked" only if it stays far below every score until the softmax."""
    for place, step in enumerate(steps):
        if not isinstance(step, Fill):
            continue
        later = steps[place + 1 :]
        final = step.fill * math.prod(other.number for other in later if isinstance(other, Scale))
        if not final <= LARGEST_FILL:  # NaN included
            raise Miss(
                f"masked scores end at {final:g}: not low enough to be a mask for every score",
                node=step.node,
                expected=f"a fill of {LARGEST_FILL:g} or lower",
            )
        if any(isinstance(other, ScaleBy) for other in later):
            raise Miss("masked scores are scaled by a tensor afterwards", node=step.node)
        if final > BOTTOM and any(isinstance(other, Add) for other in later):
            raise Miss("a bias added after the mask could lift the masked scores again", node=step.node)


def rounding_bias(steps: list[Step]) -> fx.Node | None:
    """A mask of about -1e6: it rounds what it is added to, and in rows that it blocks entirely other biases show how.

    A lower one absorbs them in any order, a smaller one rounds too little to matter.
    """
    biases = _biases(steps)
    for bias in biases if len(biases) > 1 else ():
        if any(ROUNDS_FROM <= abs(number) < -LARGEST_FILL for number in _numbers_in(bias)):
            return bias
    return None


def check_gradient(steps: list[Step]) -> None:
    """In rows that a fill and a bias mask only together, a fill stops the gradient and SDPA's bias does not."""
    if not torch.is_grad_enabled() or not any(isinstance(step, Fill) and step.fill > -math.inf for step in steps):
        return
    for bias in _biases(steps):
        if _may_mask(bias):
            raise Miss("scores are masked by a fill and by a bias, whose gradients differ", node=bias)


def _biases(steps: list[Step]) -> list[fx.Node]:
    """The tensors that are added to the scores, innermost first."""
    return [step.node for step in steps if isinstance(step, Add) and isinstance(step.node, fx.Node)]


def _may_mask(bias: fx.Node) -> bool:
    """Whether a bias is computed from a mask value, or is an argument of which nothing is known."""
    return any(number <= LARGEST_FILL for number in _numbers_in(bias))


def _numbers_in(bias: fx.Node) -> Iterator[float]:
    """The numbers a bias is computed from; minus infinity for an argument of which nothing is known.

    What a layer or a product gives is an activation, and those stay small.
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
    """What the steps multiply the scores by."""
    return math.prod(step.number for step in steps if isinstance(step, Scale))


def bias_of(steps: list[Step], operand: Operand) -> torch.Tensor | None:
    """What the steps add to the scaled product: the chain, innermost first, run on a score of zero.

    `operand` gives a step's tensor laid out as (batch, heads, seq, keys). A lone -inf fill stays a boolean mask.
    """
    if len(steps) == 1 and isinstance(steps[0], Fill) and steps[0].fill == -math.inf:
        mask = operand(steps[0].node, steps[0].axes)
        return mask if steps[0].keep else mask.logical_not()
    bias: torch.Tensor | None = None
    for step in steps:
        bias = _apply(step, bias, operand)
    return bias


def _apply(step: Step, bias: torch.Tensor | None, operand: Operand) -> torch.Tensor | None:
    if isinstance(step, Scale):
        return None if bias is None else bias * step.number
    if isinstance(step, Floor):
        return None if bias is None else bias.clamp(min=step.lowest)
    if isinstance(step, ScaleBy):
        return None if bias is None else times(bias, operand(step.node, step.axes), step.divide)
    if isinstance(step, Fill):
        mask = operand(step.node, step.axes).bool()
        keep = mask if step.keep else mask.logical_not()
        zero = torch.zeros((), device=keep.device)
        return torch.where(keep, zero if bias is None else bias, step.fill)
    assert isinstance(step, Add), "scores under a tanh are no sum with a bias"
    term = _addend(step, operand)
    return term if bias is None else bias + term


def _addend(step: Add, operand: Operand) -> torch.Tensor:
    if not isinstance(step.node, fx.Node):
        return torch.full((1, 1, 1, 1), step.node * step.factor)
    tensor = operand(step.node, step.axes)
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    return tensor if step.factor == 1 else tensor * step.factor


def times(tensor: torch.Tensor, factor: torch.Tensor, divide: bool) -> torch.Tensor:
    return tensor / factor if divide else tensor * factor


class Unmasked(NamedTuple):
    """That the steps mask exactly key > query, or (not `causal`) nothing; proven from the content of `assumes`."""

    causal: bool
    assumes: tuple[fx.Node, ...]


def proves_unmasked(steps: list[Step], seq: tuple[axes.Atom, ...], keys: tuple[axes.Atom, ...]) -> Unmasked | None:
    """Whether the steps mask later keys alone, or nothing; None where neither is proven."""
    masking: list[Any] = [step for step in steps if not isinstance(step, Scale | Floor)]
    while masking and isinstance(masking[0], ScaleBy):  # what scales the scores before they are masked masks nothing
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
    except (masks.Opaque, TypeError):  # sympy raises TypeError on NaN: not proven either
        return None
    attend = _attends(step, value, later)
    if attend is sympy.true:
        return Unmasked(False, tuple(constants))
    if attend is None or not seq or seq not in labels or keys not in labels:
        return None
    causal = masks.is_causal(attend, index[labels.index(seq)], index[labels.index(keys)])
    return Unmasked(True, tuple(constants)) if causal else None


def _attends(step: Add | Fill, value: Any, later: float) -> Any:
    """Where an evaluated mask lets a query attend: a boolean, or None where it is no mask of zero and bottom.

    `later` is the factor by which the masked scores are scaled afterwards.
    """
    if isinstance(step, Fill):
        truth = masks.truth(value)
        return truth if step.keep else masks.negate(truth)
    factor = step.factor * later
    return masks.zero_else_below(value, LARGEST_FILL / factor) if factor > 0 else None
