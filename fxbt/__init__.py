"""fxbt: one call that makes transformer models faster, by compiling the graph they run.

Example::

    fast = fxbt.optimize(model)  # same class, same weights, same outputs
    fast(**inputs)
    print(fast.report)
"""

from . import axes, masks
from .errors import CaptureError, ExampleError, FxbtWarning, NotOptimizedError
from .optimize import optimize, restore
from .pipeline import default_rules
from .rule import Match, Miss, Rule

__all__ = [
    "CaptureError",
    "ExampleError",
    "FxbtWarning",
    "Match",
    "Miss",
    "NotOptimizedError",
    "Rule",
    "axes",
    "default_rules",
    "masks",
    "optimize",
    "restore",
]
