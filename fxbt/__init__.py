"""fxbt: one call that makes transformer models faster, by compiling the graph they run.

Example::

    fast = fxbt.optimize(model)  # same class, same weights, same outputs
    fast(**inputs)
    print(fast.report)
"""

from . import axes, masks, ops, testing
from .canonical import argument
from .errors import CaptureError, ExampleError, FxbtWarning, NotOptimizedError, RuleError
from .match import Found, is_float_cast, op_of
from .miss import Miss
from .optimize import optimize, refresh, restore
from .pipeline import default_rules
from .rule import Match, Rule, rule

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
    "default_rules",
    "is_float_cast",
    "masks",
    "op_of",
    "ops",
    "optimize",
    "refresh",
    "restore",
    "rule",
    "testing",
]
