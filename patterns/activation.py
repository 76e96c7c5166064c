"""Activations by what they compute, however they are decomposed: gelu (erf, tanh, quick) and silu.

A pointwise region with one input is evaluated at points all over the number line. Only analytic ops may stand in it,
so a region that agrees with an activation on a dense set of points, to the precision of the constants that model code
writes down, is that activation.

Source: Hendrycks and Gimpel 2016, "Gaussian error linear units", section 2; silu: Elfwing et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

import fxbt
from fxbt import Match, Miss

aten = torch.ops.aten

FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
IN_BEST_FORM = {"quick gelu"}  # torch has no kernel of its own for it

# Ops without kinks or steps: what agrees on a dense set of points agrees between them too.
ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "neg", "pow", "reciprocal", "square"}
CURVES = {"tanh", "erf", "sigmoid", "exp"}
LARGEST = 20  # nodes of a region; tanh gelu written out has eleven

POINTS = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-30.0, -1e-4, 1e-4, 30.0])]).double()
AGREEMENT = 1e-6  # constants in model code have seven digits or more: 0.7978845608, 1.4142135


class Activation(fxbt.Rule):
    """A pointwise region that computes an activation  ->  that activation's kernel"""

    name = "activation"
    makes = frozenset({"gelu", "silu"})
    proven = True
    targets = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor})

    def anchors(self, graph: fx.Graph) -> Any:
        return reversed(list(super().anchors(graph)))

    def find(self, anchor: fx.Node) -> Match:
        for x, region in _regions(anchor):
            name = _activation(anchor, x, region)
            if name is None:
                continue
            _check_closed(region, anchor, name)
            return Match(anchor, (x,), (anchor,), name, replaces=name not in IN_BEST_FORM)
        raise Miss("no activation ends here", node=anchor, total=1)

    def replace(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return FORMULAS[name](x)


def _regions(anchor: fx.Node) -> list[tuple[fx.Node, list[fx.Node]]]:
    """The pointwise regions that end at `anchor` and have one input, with it, the smallest first."""
    positions = {node: place for place, node in enumerate(anchor.graph.nodes)}
    found: list[tuple[fx.Node, list[fx.Node]]] = []
    frontier: set[fx.Node] = {anchor}
    region: list[fx.Node] = []
    while frontier and len(region) < LARGEST:
        latest = max(frontier, key=positions.__getitem__)
        if not _is_pointwise(latest):
            break
        frontier.remove(latest)
        region.append(latest)
        frontier.update(latest.all_input_nodes)
        if len(frontier) == 1 and any(fxbt.op_of(node) in CURVES for node in region):
            found.append((next(iter(frontier)), region[::-1]))
    return found


def _is_pointwise(node: fx.Node) -> bool:
    is_known = fxbt.op_of(node) in ARITHMETIC | CURVES or fxbt.is_float_cast(node)
    return is_known and node.meta["val"].is_floating_point() and not node.kwargs.get("rounding_mode")


def _activation(anchor: fx.Node, x: fx.Node, region: list[fx.Node]) -> str | None:
    """The name of the activation that a region computes; None where it is none of those known."""
    value = x.meta["val"]
    if not value.is_floating_point() or value.dtype != anchor.meta["val"].dtype:
        return None
    values: dict[Any, Any] = {x: POINTS}
    for node in region:
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        target: Any = node.target
        values[node] = args[0] if fxbt.is_float_cast(node) else target(*args, **node.kwargs)
    for name, formula in FORMULAS.items():
        if torch.allclose(values[anchor], formula(POINTS), rtol=AGREEMENT, atol=AGREEMENT):
            return name
    return None


def _check_closed(region: list[fx.Node], anchor: fx.Node, name: str) -> None:
    precision = torch.finfo(anchor.meta["val"].dtype).eps
    for node in region:
        if torch.finfo(node.meta["val"].dtype).eps > precision:
            raise Miss(f"{name} computed in a coarser dtype than its input", node=node, matched=1, total=1)
        reader = next((user for user in node.users if user not in region), None)
        if node is not anchor and reader is not None:
            raise Miss(
                f"a value inside {name} is used elsewhere too",
                node=node,
                found=(node, "is also used by", reader),
                matched=1,
                total=1,
            )
