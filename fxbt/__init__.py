"""fxbt: one call that makes transformer models faster, by compiling the graph they run.

Example::

    fast = fxbt.optimize(model)  # same class, same weights, same outputs
    fast(**inputs)
    print(fast.report)
"""

from . import testing
from .analysis import axes, masks
from .errors import CaptureError, ExampleError, FxbtWarning, NotOptimizedError, RuleError
from .graph import blocks as ops
from .graph.blocks import block
from .graph.canonical import argument
from .graph.lowerings import lowering
from .graph.miss import Miss
from .match.matcher import Found, is_float_cast, op_of
from .match.rule import Match, Rule, rule
from .optimize import optimize, refresh, restore
from .pipeline import default_rules

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ExampleError",
    "Found",
    "FxbtWarning",
    "Match",
    "Miss",
    "NotOptimizedError",
    "Rule",
    "RuleError",
    "argument",
    "axes",
    "block",
    "default_rules",
    "is_float_cast",
    "lowering",
    "masks",
    "op_of",
    "ops",
    "optimize",
    "refresh",
    "restore",
    "rule",
    "testing",
]
