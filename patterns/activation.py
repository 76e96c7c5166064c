"""Recognises activations by what they compute, however they are decomposed: gelu (erf, tanh, quick) and silu.

Source: Hendrycks and Gimpel 2016, "Gaussian error linear units", section 2; silu: Elfwing et al. 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import fxbt

FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
IN_BEST_FORM = {"quick gelu"}  # torch has no kernel for it


class Activation(fxbt.Rule):
    """A pointwise region that computes an activation  ->  that activation's kernel"""

    name = "activation"
    makes = frozenset({"gelu", "silu"})
    proven = True

    def pattern(self, op: Any, x: Any) -> Any:
        return op.pointwise(FORMULAS, x, "kind")

    def check(self, m: fxbt.Found) -> None:
        if m.kind in IN_BEST_FORM:
            m.keep()

    def replace(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        return FORMULAS[kind](x)
