"""Small functions as captured graphs: the test bench of the rooms between capture and lowering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.capture.export import Captured
from fxbt.kernels import native
from fxbt.pipeline import compile as compile_graph

by_native = pytest.mark.skipif(native.library() is None, reason=f"no native kernel: {native.obstacle()}")
NATIVE = pytest.param("native", marks=by_native)


class Function(nn.Module):
    """A function as a module; tensors given by keyword become its parameters."""

    def __init__(self, function: Callable[..., Any], **weights: torch.Tensor):
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight) if weight.is_floating_point() else weight)
        self.names = tuple(weights)

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors, *(getattr(self, name) for name in self.names))


def captured(function: Callable[..., Any], *tensors: torch.Tensor, **weights: torch.Tensor) -> Captured:
    model = Function(function, **weights).eval()
    with torch.no_grad():
        return capture(model, make_call(model, *tensors))


def graph_of(function: Callable[..., Any], *tensors: torch.Tensor, **weights: torch.Tensor) -> fx.GraphModule:
    return captured(function, *tensors, **weights).module


def nodes(module: fx.GraphModule, target: Any) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target is target]


def returned(module: fx.GraphModule) -> fx.Node:
    return module.graph.output_node().args[0][0]


def program(function: Callable[..., Any], *tensors: torch.Tensor, **weights: torch.Tensor) -> tuple[Function, Any]:
    """A function as a module, and as a compiled graph without rules."""
    model = Function(function, **weights).eval()
    return model, compile_graph(capture(model, make_call(model, *tensors)), ()).run


def names(targets: list[Any]) -> list[str]:
    return [target.__name__ for target in targets]


def agree(model: nn.Module, run: Callable[..., Any], *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(run(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-5)
