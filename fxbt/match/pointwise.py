"""Recognises pointwise regions by what they compute, however they are decomposed.

A region with one input is evaluated at points all over the number line. It may contain only analytic ops, so a region
that agrees with a function on a dense set of points, to the precision of constants in model code, is that function.

Example::

    for source, region in regions(node):
        computed([("gelu", F.gelu)], node, source, region)  # "gelu", or None
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .naming import is_float_cast, op_of

# Ops without kinks or steps: functions of these that agree on a dense set of points also agree in between.
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "neg", "pow", "reciprocal", "square"}
CURVES = {"tanh", "erf", "sigmoid", "exp"}
ENDS = {"mul", "div", "add"}  # the possible last ops of a region
LARGEST = 20  # nodes in a region; tanh gelu written out has eleven

POINTS = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-30.0, -1e-4, 1e-4, 30.0])]).double()
AGREEMENT = 1e-6  # constants in model code have seven digits or more: 0.7978845608, 1.4142135


def regions(end: Any) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """The pointwise regions with one input that end at a node, smallest first, each with its input."""
    if op_of(end) not in ENDS:
        return
    frontier: set[fx.Node] = {end}
    region: list[fx.Node] = []
    while frontier and len(region) < LARGEST:
        latest = max(frontier)
        if not _is_pointwise(latest):
            return
        frontier.remove(latest)
        region.append(latest)
        frontier.update(latest.all_input_nodes)
        if len(frontier) == 1 and any(op_of(node) in CURVES for node in region):
            yield next(iter(frontier)), region[::-1]


def _is_pointwise(node: fx.Node) -> bool:
    is_known = op_of(node) in ARITHMETIC | CURVES or is_float_cast(node)
    return is_known and node.meta["val"].is_floating_point() and not node.kwargs.get("rounding_mode")


Functions = Iterable[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]


def computed(functions: Functions, end: fx.Node, source: fx.Node, region: list[fx.Node]) -> str | None:
    """The name of the function that a region computes of its input `source`, in the input's dtype; else None."""
    value = source.meta["val"]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype != end.meta["val"].dtype:
        return None
    values: dict[Any, Any] = {source: POINTS}
    for node in region:
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        target: Any = node.target
        values[node] = args[0] if is_float_cast(node) else target(*args, **node.kwargs)
    for name, function in functions:
        if torch.allclose(values[end], function(POINTS), rtol=AGREEMENT, atol=AGREEMENT):
            return name
    return None


def escape(region: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """A value inside a region (not its result) and a node outside that reads it; None if there is none."""
    for node in region[:-1]:
        reader = next((user for user in node.users if user not in region), None)
        if reader is not None:
            return node, reader
    return None
