"""The MLP (feed-forward block) of a transformer layer as one node."""

from __future__ import annotations

from typing import Any

import fxbt


def activation(op: Any, x: Any) -> Any:
    """Any activation, and the two that have no op: quick gelu and squared relu."""
    return op.either(op.activation(x), x * op.sigmoid(x * 1.702), op.pow(op.relu(x), 2))


class MLP(fxbt.Rule):
    """act(x W1^T) W2^T, or gated: (act(x Wg^T) * x Wu^T) Wd^T

    Source: Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, "GLU variants improve transformer".
    """

    name = "mlp"
    makes = frozenset({"mlp"})
    outline = "mlp"

    def pattern(self, op: Any, x: Any) -> Any:
        hidden = op.linear(x)
        return op.linear(op.either(activation(op, hidden), activation(op, hidden) * op.linear(x)))
