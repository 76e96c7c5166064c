"""fxbt: one call that makes transformer models faster, by compiling the graph they run.

Example::

    fast = fxbt.optimize(model)  # same class, same weights, same outputs
    fast(**inputs)
    print(fast.report)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CaptureError, ExampleError, FallbackError, FxbtWarning, NotOptimizedError, RuleError
from .loading import preload
from .optimize import optimize, refresh, restore

# Other public names load on first use. They bring in sympy, torch.export and dynamo, which take three times as long to
# import as torch.
if TYPE_CHECKING:
    from . import testing
    from .analysis import axes, masks, scores, weights
    from .analysis.causality import is_causal
    from .analysis.operands import Operands
    from .analysis.sources import nearest_sources
    from .graph import blocks as ops
    from .graph.blocks import block
    from .graph.lowerings import lowering
    from .graph.miss import Miss
    from .graph.node import argument
    from .match import attentions
    from .match.found import Found
    from .match.naming import is_float_cast, op_of
    from .match.one_of import OneOf
    from .match.rule import Match, Rule, rule
    from .pipeline import default_rules
    from .runtime.warmup import Warmup
    from .saving import load, save

__version__ = "0.1.0"

_MODULES = {
    "attentions": "match.attentions",
    "axes": "analysis.axes",
    "masks": "analysis.masks",
    "ops": "graph.blocks",
    "scores": "analysis.scores",
    "testing": "testing",
    "weights": "analysis.weights",
}
_HOMES = {
    "Found": "match.found",
    "Match": "match.rule",
    "Miss": "graph.miss",
    "OneOf": "match.one_of",
    "Operands": "analysis.operands",
    "Rule": "match.rule",
    "Warmup": "runtime.warmup",
    "argument": "graph.node",
    "block": "graph.blocks",
    "default_rules": "pipeline",
    "is_causal": "analysis.causality",
    "is_float_cast": "match.naming",
    "load": "saving",
    "lowering": "graph.lowerings",
    "nearest_sources": "analysis.sources",
    "op_of": "match.naming",
    "rule": "match.rule",
    "save": "saving",
}

__all__ = [
    "CaptureError",
    "ExampleError",
    "FallbackError",
    "Found",
    "FxbtWarning",
    "Match",
    "Miss",
    "NotOptimizedError",
    "OneOf",
    "Operands",
    "Rule",
    "RuleError",
    "Warmup",
    "argument",
    "attentions",
    "axes",
    "block",
    "default_rules",
    "is_causal",
    "is_float_cast",
    "load",
    "lowering",
    "masks",
    "nearest_sources",
    "op_of",
    "ops",
    "optimize",
    "preload",
    "refresh",
    "restore",
    "rule",
    "save",
    "scores",
    "testing",
    "weights",
]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use."""
    if name in _MODULES:
        value: Any = importlib.import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
