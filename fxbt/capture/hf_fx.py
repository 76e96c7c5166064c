"""transformers' own fx tracer (4.x): exports its graph like a model's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError
from ..torch_compat import pytree
from .attempts import run_forward
from .call import Call
from .captured import Captured
from .export import capture_export
from .guards import assertions


def capture_hf_fx(model: nn.Module, call: Call, example: tuple[Tensor, ...]) -> Captured:
    """The graph of transformers' HFTracer; only for the example's own shapes unless it is right on a larger one.

    Raises:
        CaptureError: the call passes tensors by position.
    """
    from transformers.utils.fx import HFTracer, get_concrete_args

    inputs = dict(zip(call.names, example, strict=True))
    if call.args or not inputs.keys() <= call.kwargs.keys():
        raise CaptureError(
            'HFTracer takes tensors only as keyword arguments; pass them by name, or use tracer="export"'
        )
    fixed = {name: value for name, value in call.kwargs.items() if name not in inputs}
    _, spec = pytree.tree_flatten(run_forward(model, call, example))
    graph = HFTracer().trace(
        model, concrete_args={**get_concrete_args(model, list(inputs)), **fixed}, dummy_inputs=inputs
    )
    traced = fx.GraphModule(model, graph)
    traced_forward = type(traced).forward

    def run(self: nn.Module, **kwargs: Any) -> Any:
        flat = pytree.tree_leaves(traced_forward(self, **{name: kwargs[name] for name in inputs}))
        return pytree.tree_unflatten(flat, spec)

    captured = capture_export(traced, call, example, run)
    if not _agrees_on_larger(captured, model, call, example):
        captured.guards = _only_these_shapes(example, call.names)  # HFTracer hardcodes sizes without saying so
    return captured


def _agrees_on_larger(captured: Captured, model: nn.Module, call: Call, example: tuple[Tensor, ...]) -> bool:
    larger = [t.repeat_interleave(2, 0) if t.ndim else t for t in example]
    larger = [t.repeat_interleave(2, 1) if t.ndim == 2 else t for t in larger]
    try:
        captured.guards(*larger)
        expected = pytree.tree_leaves(run_forward(model, call, larger))
        return all(map(_close, captured.module(*larger), expected))
    except Exception:  # a failure on another shape means: not proven
        return False


def _close(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-4)


def _only_these_shapes(example: tuple[Tensor, ...], names: list[str]) -> Callable[..., None]:
    sizes = [
        (f"t{i}.shape == {tuple(t.shape)}", f"{name}.shape == {tuple(t.shape)}")
        for i, (t, name) in enumerate(zip(example, names, strict=True))
    ]
    return assertions(len(names), sizes)
