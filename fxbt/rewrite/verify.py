"""Numeric verification: runs each rewrite on real values beside the nodes it replaces.

The canonical graph runs once on the example and keeps every value. A replacement then computes from the kept values of
its inputs, and its results must equal the kept values of its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..graph.miss import Miss
from ..graph.node import is_random
from ..graph.record import Rewrite
from ..match.rule import Match, Rule
from ..torch_compat import is_any_autocast_enabled

# Relative to the largest value compared. Reordering a sum changes float32 by about 1e-6. bfloat16 keeps eight bits, to
# which eager itself rounds the scores (its own error against float64 reaches 9e-2); float16 keeps eleven.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


class Verifier(fx.Interpreter):
    """Runs `module` once on `example` and checks rewrites against its values.

    It checks the rewrites of rules without a proof, and with `every` those of all rules.
    """

    def __init__(self, module: fx.GraphModule, example: Sequence[torch.Tensor], every: bool = True):
        super().__init__(module, garbage_collect_values=False)
        self.every = every
        with torch.no_grad():
            self.run(*example)

    def __call__(self, rule: Rule, match: Match, new_nodes: list[fx.Node], results: list[fx.Node]) -> None:
        """Raises Miss if a result differs from the value it replaces."""
        if rule.proven and not self.every:
            return
        for node in (*match.outputs, *new_nodes):
            if is_random(node):
                raise Miss("the rewrite draws random numbers, so its values cannot be verified", node=node)
        with torch.no_grad():
            for node in new_nodes:
                self.env[node] = node.target(*self._values(node.args), **self._values(node.kwargs))  # type: ignore[operator]
        for old, new in zip(match.outputs, results, strict=True):
            check_value(old, self.env[old], self.env[new], rule.tolerance)

    def follow(self, rewrite: Rewrite) -> None:
        """Records the values of a rewrite's nodes: results have the values they replace, other nodes are computed."""
        with torch.no_grad():
            for old, new in rewrite.results:
                self.env[new] = self.env[old]
            for entry in rewrite.added:
                if entry.node not in self.env:
                    self.env[entry.node] = self.run_node(entry.node)

    def _values(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, lambda node: self.env[node])


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected value; NaN matches NaN, equal infinities match."""
    if actual.numel() == 0:
        return 0.0
    wide = torch.promote_types(torch.promote_types(actual.dtype, expected.dtype), torch.float32)
    actual, expected = actual.detach().to(wide), expected.detach().to(wide)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = torch.where(same, torch.zeros_like(expected), (actual - expected).abs())
    finite = expected[expected.isfinite()]
    magnitude = float(finite.abs().max()) if finite.numel() else 1.0
    worst = float(gap.max())
    return worst / max(magnitude, torch.finfo(wide).tiny) if worst == worst else float("inf")


def tolerance_of_outputs(is_precise: bool) -> float:
    """The largest allowed difference of outputs, relative to the largest value.

    Kernels sum in another order, and half precision and int8 round.
    """
    return 1e-3 if is_precise and not is_any_autocast_enabled() else 0.1


def check_outputs(actual: Sequence[Any], expected: Sequence[Any], is_coarse: bool, way: str) -> None:
    """Compares a graph's outputs, computed another `way`, with those of the whole dense graph.

    Raises:
        Miss: they differ, so the proof of that way has a hole.
    """
    for new, old in zip(actual, expected, strict=True):
        if not isinstance(old, torch.Tensor):
            continue
        is_precise = not is_coarse and old.dtype in (torch.float32, torch.float64)
        worst = difference(new, old)
        if worst > (tolerance_of_outputs(is_precise) if old.dtype.is_floating_point else 0.0):
            raise Miss(f"the outputs {way} differ from the dense graph's", found=f"a difference of {worst:.3g}")


def check_value(node: fx.Node, expected: torch.Tensor, actual: torch.Tensor, tolerance: float | None = None) -> None:
    """Compares a replacement's value with the value it replaces; a `tolerance` of None allows rounding.

    Raises:
        Miss: they differ by more than `tolerance`, relative to the largest expected value.
    """
    tolerance = TOLERANCE.get(expected.dtype, 0.0) if tolerance is None else tolerance
    worst = difference(actual, expected)
    if worst > tolerance:
        raise Miss(
            "the rewrite changes the values",
            node=node,
            expected=f"equal within {tolerance:g} of the largest value",
            found=f"a difference of {worst:.3g}",
        )
