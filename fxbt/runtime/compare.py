"""Compares a compiled graph with its original on the same calls, before it serves any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import outputs
from ..capture.call import Call
from ..capture.captured import Captured
from ..capture.containers import Arguments
from ..capture.effects import Effects
from ..capture.model_state import ModelState, preserved, versions
from ..capture.number_inputs import Numbers, as_tensor
from ..capture.outputs import Values
from ..progress import part
from ..rewrite.verify import difference, tolerance_of_outputs
from .compiled import Compiled
from .gradients import gradient_difference
from .guarded_graph import accepts
from .unpadding import Unpadding

_PRECISE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Comparison:
    """A compiled graph and its original; each method returns what differs, or None.

    Example:
        >>> compare = Comparison(model, captured, compiled)
        >>> compare.outputs(call, outputs.flatten(model(x)))
    """

    def __init__(self, original: nn.Module, captured: Captured, compiled: Compiled) -> None:
        self._original = original
        self._captured = captured
        self._compiled = compiled
        self._is_precise = compiled.precision is None

    def all(self, call: Call, expected: Values, numbers: Numbers) -> str | None:
        """What differs on a call (whose values in the original are `expected`), on an earlier one, or in gradients."""
        effects, is_stochastic = self._captured.effects, self._compiled.stochastic
        with part("compare with the original"):
            expected = self._again(call) if effects else expected  # the original reads what it changed
            problem = None if is_stochastic else self.outputs(call, expected)
            problem = problem or (None if is_stochastic else self._earlier(call, numbers))
            return problem or self._gradients(call, effects)

    def outputs(self, call: Call, expected: Values) -> str | None:
        """What differs between the graph's outputs and the original's, `expected`."""
        compiled, (values, spec) = self._compiled, expected
        if self._captured.out_spec != spec:
            return f"their structure is {self._captured.out_spec}, expected {spec}"
        unpadding = compiled.unpadding
        dense = compiled.run if unpadding is None else compiled.dense
        effects = self._captured.effects
        found: Sequence[Any] = dense(*effects.apart(call.tensors), *effects.inputs())
        if unpadding is not None and (problem := self._padded(unpadding, call)):
            return problem
        if unpadding is not None and unpadding.original_blanks:
            found = unpadding.blanked(found, call.tensors)
        if problem := values_difference(found, values, self._is_precise):
            return problem
        if not self._is_precise:
            pairs = zip(found, values, strict=True)
            compiled.error = max((difference(new, old) for new, old in pairs if isinstance(old, Tensor)), default=0.0)
        if unpadding is None:
            return None
        returned = unpadding.as_returned(values, call.tensors)
        return values_difference(unpadding.uncounted(*call.tensors), returned, self._is_precise)

    def _padded(self, unpadding: Unpadding, call: Call) -> str | None:
        """What differs where a sequence ends in padding; also finds out whether the original blanks padding itself."""
        tensors = unpadding.padded_at_an_end(call.tensors)
        expected, _ = original_values(self._original, call, tensors)
        found = self._compiled.dense(*tensors)
        if values_difference(found, expected, self._is_precise) is None:
            return None
        unpadding.original_blanks = True
        blanked = [unpadding.blanked(values, tensors) for values in (found, expected)]
        problem = values_difference(blanked[0], blanked[1], self._is_precise)
        return problem and f"where a sequence ends in padding, {problem}"

    def _earlier(self, call: Call, numbers: Numbers) -> str | None:
        """Compares with the values that the call's numbers had before, because Python may tell a symbol from a
        number."""
        if not call.numbers:
            return None
        tensors = list(call.tensors)
        for place, number in call.numbers.items():
            earlier = numbers.first(place, number)
            if (earlier < 0) == number.is_negative:
                tensors[number.index] = as_tensor(earlier)
        if not accepts(self._captured.guards, tensors):  # these numbers take another path through the model
            return None
        args, kwargs = call.rebuild(tensors)
        before = replace(call, args=args, kwargs=kwargs, tensors=tuple(tensors))
        return self.outputs(before, self._again(before))

    def _gradients(self, call: Call, effects: Effects) -> str | None:
        def run(*tensors: Tensor) -> Sequence[Any]:
            return self._compiled.dense(*tensors, *effects.inputs())

        with effects.attributes_kept():
            return gradient_difference(run, self._original, call, self._compiled.stochastic, effects.current)

    def _again(self, call: Call) -> Values:
        """What the original returns and leaves for a call, undone afterwards.

        Raises:
            CaptureError: it writes to other buffers than the graph, or returns memory that it writes to.
        """
        effects = self._captured.effects
        with preserved(self._original), effects.attributes_kept():
            tensors = ModelState(self._original).writable()
            before, counted = [tensor.detach().clone() for tensor in tensors], versions(tensors)
            given = call.apart().tensors
            values, spec = original_values(self._original, call, given)
            effects.note(tensors, before, counted)
            effects.check_apart(values, given)
            effects.check_others(call, given)
            return [*values, *effects.current(given)], spec


def original_values(original: nn.Module, call: Call, tensors: Sequence[Tensor]) -> Values:
    """The original's outputs for a call with these tensors, flattened."""
    args, kwargs = call.rebuild(tensors)
    given = Arguments(args, kwargs)
    return outputs.flatten(given.seen_in(original.forward(*args, **kwargs)))


def values_difference(found: Sequence[Any], expected: Sequence[Any], is_precise: bool) -> str | None:
    """The first of several values that differs, and how; None if none does."""
    for i, (new, old) in enumerate(zip(found, expected, strict=True)):
        if problem := _value_difference(new, old, is_precise):
            return f"output {i} {problem}"
    return None


def _value_difference(new: Any, old: Any, is_precise: bool) -> str | None:
    if not isinstance(old, Tensor):
        return None if type(new) is type(old) and new == old else f"is {new!r}, not {old!r}"
    if not isinstance(new, Tensor):
        return f"is a {type(new).__name__}, not a tensor"
    kinds = [(t.dtype, tuple(t.shape), t.device, t.requires_grad) for t in (new, old)]
    if kinds[0] != kinds[1]:
        return f"is {kinds[0]}, not {kinds[1]} (dtype, shape, device, requires_grad)"
    if old.is_complex():
        new, old = torch.view_as_real(new.resolve_conj()), torch.view_as_real(old.resolve_conj())
    if not old.is_floating_point():
        return None if torch.equal(new, old) else "differs in its values, which are not floating-point"
    # A row of scores masked entirely with -inf is NaN in eager attention only, so NaN may become a number.
    new, old = (t.detach()[~old.isnan()].double() for t in (new, old))
    magnitude = old[old.isfinite()].abs().max().item() if old.isfinite().any() else 0.0
    tolerance = tolerance_of_outputs(is_precise and kinds[0][0] in _PRECISE) * max(magnitude, 1e-6)
    if torch.allclose(new, old, rtol=0.0, atol=tolerance):
        return None
    return f"differs by up to {(new - old).abs().max().item():.1e} at a magnitude of {magnitude:.1e}"
