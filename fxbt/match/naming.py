"""What a node calls, by the names that patterns use."""

from __future__ import annotations

import functools
from typing import Any

from torch import fx

from ..graph.blocks import ATTENTIONS, FUSED
from ..graph.opsets import CASTS
from ..torch_compat import OpOverload
from .torch_functions import ALIASES


def op_of(node: Any) -> str:
    """The name that patterns use for the op a node calls; "" if the node calls no op.

    Example::

        fxbt.op_of(node) == "linear"
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        return _name_of(node.target)
    name = getattr(node.target, "__name__", "")
    return name if name == "getitem" or FUSED.get(name) is node.target else ""


@functools.cache
def _name_of(op: OpOverload) -> str:
    if op in ATTENTIONS:
        return "attention"
    if op._schema.is_mutable:
        return ""  # an in-place op changes the value it writes to
    name = op._schema.name.split("::")[-1].strip("_")
    return ALIASES.get(name, name)


def is_float_cast(node: Any) -> bool:
    """Whether a node only changes the precision of a floating-point value.

    Example::

        source = node.args[0] if fxbt.is_float_cast(node) else node
    """
    if not isinstance(node, fx.Node) or node.target not in CASTS:
        return False
    return bool(node.meta["val"].is_floating_point() and node.args[0].meta["val"].is_floating_point())  # type: ignore[union-attr]
