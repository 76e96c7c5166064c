"""Compares the gradients of a compiled graph with the original's, on the captured call.

Equal outputs do not imply equal derivatives. Both run once more, apart from the caller's autograd: on copies of the
inputs, with checkpointed functions run plainly and nothing accumulated into `.grad`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import outputs as forms
from ..capture.call import Call
from ..capture.checkpointing import run_plainly
from ..capture.containers import Arguments
from ..capture.model_state import preserved
from ..capture.saved_tensors import hidden
from ..graph.node import parameters
from ..rewrite.verify import difference
from ..torch_compat import TorchDispatchMode, is_any_autocast_enabled

aten = torch.ops.aten
# Share of a gradient's norm. A correct graph sums an entry in another order; a lost or scaled part shows far above.
_TOLERANCE, _COARSE = 1e-2, 0.3
# Share of the largest gradient's norm: gradients that cancel to zero (a bias of attention's keys) are pure rounding.
_NOISE, _COARSE_NOISE = 3e-5, 5e-2
_OUTPUTS = {True: 0.1, False: 1e-3}  # share of the largest value, by whether numbers are coarse


def gradient_difference(
    run: Callable[..., Sequence[Any]],
    original: nn.Module,
    call: Call,
    is_stochastic: bool,
    left: Callable[[], list[Any]] = list,
) -> str | None:
    """What differs between the gradients of a graph and those of the original; None if nothing does.

    It compares the gradients of a random projection of the outputs with respect to every input and parameter that
    requires one. Dropout on a CPU draws its mean in both, and then outputs are compared, too. It returns None if other
    random numbers are drawn. After the original ran, `left` returns further values to compare with the last values of
    `run`. Tensors with hooks are left out, because the hooks would be called.
    """
    if not torch.is_grad_enabled():
        return None
    if is_stochastic and any(tensor.device.type != "cpu" for tensor in (*call.tensors, *original.parameters())):
        return None
    parameters = {name: p for name, p in original.named_parameters() if p.requires_grad and not _has_hooks(p)}
    given = dict(zip(call.names, call.tensors, strict=True))

    def of(run: Callable[[list[Tensor]], Sequence[Any]]) -> tuple[list[Any], dict[str, Tensor | None]]:
        return _with_gradients(run, given, parameters, is_stochastic)

    def run_original(tensors: list[Tensor]) -> Sequence[Any]:
        args, kwargs = call.rebuild(tensors)
        given = Arguments(args, kwargs)
        return [*forms.flatten(given.seen_in(original.forward(*args, **kwargs)))[0], *left()]

    try:
        with hidden(), run_plainly(), torch.random.fork_rng(devices=[]):
            with preserved(original):
                expected_outputs, expected = of(run_original)
            found_outputs, found = of(lambda tensors: run(*tensors))
    except _OtherChance:
        return None
    is_coarse = _is_coarse([*expected_outputs, *parameters.values()])
    if is_stochastic and (problem := _outputs_problem(found_outputs, expected_outputs, _OUTPUTS[is_coarse])):
        return problem
    return _problem(found, expected, is_coarse)


def programs_difference(
    run: Callable[..., Sequence[Any]],
    reference: Callable[..., Sequence[Any]],
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    is_stochastic: bool,
) -> str | None:
    """What differs between the outputs and gradients of two programs on a call; None if nothing does.

    It compares as `gradient_difference` does, and also which tensors have gradients at all: optimizers leave out those
    without, and apply weight decay and momentum to those of zeros.
    """
    wanted = {f"weight {place}": w for place, w in enumerate(weights) if w.requires_grad and not _has_hooks(w)}
    given = {str(place): tensor for place, tensor in enumerate(tensors)}

    def of(run: Callable[..., Sequence[Any]]) -> tuple[list[Any], dict[str, Tensor | None]]:
        return _with_gradients(lambda tensors: run(*tensors), given, wanted, is_stochastic)

    try:
        with hidden(), run_plainly(), torch.random.fork_rng(devices=[]):
            (expected_outputs, expected), (found_outputs, found) = of(reference), of(run)
    except _OtherChance as other:
        return f"it draws random numbers that are not dropout's ({other})"
    is_coarse = _is_coarse([*expected_outputs, *wanted.values()])
    if problem := _outputs_problem(found_outputs, expected_outputs, _OUTPUTS[is_coarse]):
        return problem
    if found.keys() == expected.keys() and (lone := [n for n in found if (found[n] is None) != (expected[n] is None)]):
        return f"only one of the two has a gradient of {lone[0]}"
    return _problem(found, expected, is_coarse)


def _with_gradients(
    run: Callable[[list[Tensor]], Sequence[Any]],
    given: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    is_stochastic: bool,
) -> tuple[list[Any], dict[str, Tensor | None]]:
    """The outputs for copies of the given inputs, and the gradients of inputs and parameters."""
    copies = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in given.items()}
    inputs = {f"input {name}": copy for name, copy in copies.items() if copy.requires_grad}
    with _MeanOfChance() if is_stochastic else contextlib.nullcontext():
        found = list(run(list(copies.values())))
    return found, _gradients(found, {**inputs, **parameters})


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks)


def _gradients(found: Sequence[Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradients of a fixed random projection of the outputs that require one, with respect to `inputs`."""
    wanted = {f"output {i}": t for i, t in enumerate(found) if isinstance(t, Tensor) and t.requires_grad}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.is_floating_point()}
    if not wanted:
        return {}
    generator = torch.Generator().manual_seed(0)
    projections = [torch.randn(t.shape, generator=generator).to(t) for t in wanted.values()]
    if not inputs:
        return {}
    gradients = torch.autograd.grad(
        list(wanted.values()), list(inputs.values()), projections, allow_unused=True, retain_graph=False
    )
    return dict(zip(inputs, gradients, strict=True))


def _is_coarse(tensors: Sequence[Any]) -> bool:
    floats = [t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    return is_any_autocast_enabled() or any(dtype.itemsize < 4 for dtype in floats)


def _outputs_problem(found: Sequence[Any], expected: Sequence[Any], tolerance: float) -> str | None:
    for i, (new, old) in enumerate(zip(found, expected, strict=True)):
        if not isinstance(old, Tensor) or not old.is_floating_point():
            continue
        old = old.detach()
        worst = difference(torch.where(old.isnan(), old, new.detach()), old)  # NaN may become a number
        if worst > tolerance:
            return f"output {i}, without dropout, differs by up to {worst:.1e} of its largest value"
    return None


def _problem(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], is_coarse: bool) -> str | None:
    tolerance, noise = (_COARSE, _COARSE_NOISE) if is_coarse else (_TOLERANCE, _NOISE)
    if found.keys() != expected.keys():
        return f"only one of the two has gradients of {', '.join(found.keys() ^ expected.keys())}"
    norms = {name: _norm(old) for name, old in expected.items()}
    floor = noise * max(norms.values(), default=0.0)
    for name, old in expected.items():
        off = _norm(_gap(found[name], old))
        if off > tolerance * norms[name] + floor:
            return f"the gradient of {name} differs by {off:.1e} at a norm of {norms[name]:.1e}"
    return None


def _gap(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The difference of two gradients; None is zero, NaN counts as equal in the original and as far off elsewhere."""
    if new is None or old is None:
        return old if new is None else new
    return (new - old).masked_fill(old.isnan() | (new == old), 0.0).nan_to_num(math.inf)


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.detach().nan_to_num(0.0, posinf=None).float().norm())


class _OtherChance(Exception):
    """The model draws random numbers that are not dropout's."""


class _MeanOfChance(TorchDispatchMode):
    """Dropout draws the keep probability p itself, which its scaling by 1/p turns into one: nothing is dropped."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.bernoulli_.float:
            return args[0].fill_(args[1] if len(args) > 1 else 0.5)
        if torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs or {}):
            raise _OtherChance(str(func))
        return func(*args, **(kwargs or {}))


def _drops_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op that can drop weights does not: a fused attention with dropout_p=0."""
    if "dropout_p" not in (known := parameters(func)):
        return False
    place, default = known["dropout_p"]
    return not kwargs.get("dropout_p", args[place] if place < len(args) else default)
