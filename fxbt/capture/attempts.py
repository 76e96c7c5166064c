"""The examples with which to export a call, most general first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, line_at
from .call import Call
from .trace_errors import is_user_code, reads_values
from .value_branches import Answer, Noted

Axes = frozenset[tuple[int, int]]  # of inputs: (input index, axis)
_ASKING_LOOP = (
    "a loop decides by the values of tensors at every step whether to go on, but a graph has a fixed number of steps"
)
_MANY_SIZES = 256  # at most so many values of a call are compared at every call


@dataclass(frozen=True)
class Attempt:
    """An example, and how general a graph to ask for."""

    tensors: tuple[Tensor, ...]
    free_rank: int  # inputs up to this rank are dynamic in all dims, others in the first two
    varied: Axes = frozenset()  # further dynamic axes
    answers: tuple[Answer, ...] = ()  # answers to Python's questions for values, which the graph asserts
    fixed: frozenset[int] = frozenset()  # inputs whose values are constants of the graph, with a guard

    def frees(self, place: int, axis: int) -> bool:
        """Whether an axis of an input is dynamic."""
        return self.tensors[place].ndim <= self.free_rank or axis < 2 or (place, axis) in self.varied


def attempts(
    model: nn.Module, call: Call, example: tuple[Tensor, ...], varied: Axes, errors: list[Exception]
) -> Iterator[Attempt]:
    """What to try, most general first; `errors` has the errors of the attempts so far."""
    larger = [example]
    # A trace takes an axis of size one for a constant, so it is enlarged if the model accepts that. Beside a cache it
    # is the step of one token, whose graph needs no mask.
    inputs = [i for i in range(len(example)) if i not in number_indices(call)]
    for axes in ((0,),) if call.past else ((0,), (0, 1)):
        enlarged = _enlarge(example, axes, inputs)
        is_new = enlarged is not None and all(_shapes(enlarged) != _shapes(tensors) for tensors in larger)
        if enlarged is not None and is_new and _accepts(model, call, enlarged):
            larger.insert(0, enlarged)
    for tensors in larger:
        if varied or any(tensor.ndim == 3 for tensor in tensors):
            yield Attempt(tensors, 3, varied)
        yield Attempt(tensors, 2)
    if not reads_values(errors[0]):
        return
    for tensors in larger:
        with Noted(is_user_code) as noted:
            run_forward(model, call, tensors)
        loop = noted.loop()
        answers = () if loop else tuple(noted.answers)
        if answers:
            errors.clear()  # those questions are answered now
            yield Attempt(tensors, 2, answers=answers)
    sizes = frozenset(i for i, tensor in enumerate(example) if _may_hold_sizes(tensor))
    if sizes:
        yield Attempt(example, 3, varied, answers, sizes)
    if loop:
        raise CaptureError(_ASKING_LOOP, line_at(*loop))


def _shapes(tensors: tuple[Tensor, ...]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _may_hold_sizes(tensor: Tensor) -> bool:
    """Whether this looks like image sizes or sound lengths: few integers, at most three per item."""
    is_table = tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[1] <= 3)
    return is_table and 0 < tensor.numel() <= _MANY_SIZES and not (tensor.is_floating_point() or tensor.is_complex())


def number_indices(call: Call) -> set[int]:
    """The indices of the tensors of a call that represent numbers."""
    return {number.index for number in call.numbers.values()}


def _enlarge(example: tuple[Tensor, ...], axes: tuple[int, ...], inputs: list[int]) -> tuple[Tensor, ...] | None:
    enlarged = list(example)
    for axis in axes:
        # After the batch, only the axis of 2-D inputs (tokens) is known to be a length, not features.
        having = [i for i in inputs if (enlarged[i].ndim > axis if axis == 0 else enlarged[i].ndim == 2)]
        if not having or any(enlarged[i].shape[axis] != 1 for i in having):
            continue
        for i in having:
            enlarged[i] = fresh(enlarged[i].repeat_interleave(2, dim=axis), example[i].requires_grad)
    changed = any(new is not old for new, old in zip(enlarged, example, strict=True))
    return tuple(enlarged) if changed else None


def _accepts(model: nn.Module, call: Call, tensors: tuple[Tensor, ...]) -> bool:
    try:
        run_forward(model, call, tensors)
    except Exception:  # whatever the error, this example does not suit this model
        return False
    return True


def run_forward(model: nn.Module, call: Call, tensors: Sequence[Tensor]) -> Any:
    """The original's output for the call with these tensors in place of its own."""
    args, kwargs = call.rebuild(tensors)
    return model.forward(*args, **kwargs)


def fresh(tensor: Tensor, requires_grad: bool | None = None) -> Tensor:
    """A leaf with the same values in memory of its own; it requires gradients as the tensor does, or as given."""
    wanted = tensor.requires_grad if requires_grad is None else requires_grad
    return tensor.detach().clone().requires_grad_(wanted)
