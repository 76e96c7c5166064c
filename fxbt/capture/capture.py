"""Turns a model and a `Call` into a `Captured`: a rehearsal, then a tracer; the model stays as it was."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..progress import part
from .attempts import Axes, fresh, run_forward
from .call import Call
from .captured import Captured
from .equal_layers import graph_difference, one_by_one
from .export import capture_export
from .hf_fx import capture_hf_fx
from .model_state import ModelState, Slot, preserved
from .settings import numpy_unmoved
from .surroundings import Surroundings
from .trace_errors import capture_error


def capture(
    model: nn.Module,
    call: Call,
    tracer: str = "auto",
    *,
    rehearse: bool = True,
    varied: Axes = frozenset(),
    around: Surroundings | None = None,
    verify: bool = False,
) -> Captured:
    """Captures `model` as `call` calls it, under the caller's grad mode and autocast and the model's training flags.

    Whatever happens, the model's attributes and its surroundings (`around`) are restored.

    Args:
        rehearse: run the model first, for models that create tensors at their first call, and to see whether it changes
            its attributes at every call. A caller that just saw a call change nothing can skip it.
        varied: axes after the second of inputs with four and more dims, as (input, axis), that are dynamic, too.
            Making all of them dynamic takes minutes for some vision models (window attention), and hides the head size.
        verify: also trace equal layers one by one, and refuse if that gives another graph.

    Raises:
        CaptureError: with the reason, and the line of the model's code where it stopped.

    Example:
        >>> captured = capture(model, make_call(model, input_ids=ids, attention_mask=mask))
        >>> outputs = captured.module(ids, mask)
    """
    start = time.perf_counter()
    _refuse_scripted(model)
    kept = contextlib.nullcontext() if around is None else around.kept()
    with part("capture"), _plain_modes(), preserved(model), numpy_unmoved(), kept:
        example = tuple(fresh(tensor) for tensor in call.tensors)
        slots = _rehearse(model, call, example, around) if rehearse else []
        state = ModelState(model)
        try:
            captured = _capture(model, call, example, tracer, varied, slots)
            if verify and captured.copied:
                with one_by_one():
                    _check_same(captured, _capture(model, call, example, tracer, varied, slots))
        except CaptureError:
            raise
        except Exception as error:
            raise capture_error(error) from error
        finally:
            state.restore()
    captured.seconds = time.perf_counter() - start
    return captured


def _refuse_scripted(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"{path or 'the model'} is a TorchScript module, which has no Python code to trace")


def _capture(
    model: nn.Module, call: Call, example: tuple[Tensor, ...], tracer: str, varied: Axes, slots: list[Slot]
) -> Captured:
    if tracer == "hf-fx":
        if slots:
            raise CaptureError(f"forward changes attributes of the model ({slots[0].name}), and a graph cannot")
        return capture_hf_fx(model, call, example)
    return capture_export(model, call, example, type(model).forward, varied, slots)


def _check_same(captured: Captured, whole: Captured) -> None:
    if found := graph_difference(captured.module.graph, whole.module.graph):
        raise CaptureError(f"layers that look equal gave different traces: {found}")


def _rehearse(model: nn.Module, call: Call, example: tuple[Tensor, ...], around: Surroundings | None) -> list[Slot]:
    """Runs the model until nothing changes; returns the attributes that it sets to another tensor in each call.

    These attributes keep their values. The previous call has already shaped everything besides the model's attributes,
    so the first run must not change that.
    """
    first = ModelState(model)
    try:
        run_forward(model, call, _anew(example))
        if around is not None and (written := around.changed()):
            raise CaptureError(f"forward writes to {', '.join(written[:3])} outside the model, and a graph cannot")
        slots = [] if first.holds() else _slots(model, call, example)
    except Exception:
        first.restore()
        raise
    first.put_back(slots)
    return slots


def _slots(model: nn.Module, call: Call, example: tuple[Tensor, ...]) -> list[Slot]:
    """The attributes that the second and later runs set to another tensor; nothing else may change by then."""
    second = ModelState(model)
    run_forward(model, call, _anew(example))
    if second.holds():
        return []
    third = ModelState(model, slots := second.replaced())
    run_forward(model, call, _anew(example))
    if third.holds():
        return slots
    changed = "; ".join(third.changed()[:3])
    raise CaptureError(f"forward changes attributes of the model ({changed}), and a graph cannot")


def _anew(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values in new tensors, as in a new call: a model that keeps its input keeps another one each time."""
    return tuple(map(fresh, example))


@contextlib.contextmanager
def _plain_modes() -> Iterator[None]:
    """Leaves inference mode, whose tensors cannot be traced, but keeps the caller's grad mode."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield
