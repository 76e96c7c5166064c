"""fxbt: one call that makes transformer models faster, by compiling the graph they run.

Example::

    fast = fxbt.optimize(model)  # same class, same weights, same outputs
    fast(**inputs)
    print(fast.report)
"""

from . import testing
from .analysis import attentions, axes, masks, scores
from .analysis.causality import is_causal
from .analysis.operands import Operands
from .analysis.sources import nearest_sources
from .errors import CaptureError, ExampleError, FxbtWarning, NotOptimizedError, RuleError
from .graph import blocks as ops
from .graph.blocks import block
from .graph.lowerings import lowering
from .graph.miss import Miss
from .graph.node import argument
from .match.found import Found
from .match.naming import is_float_cast, op_of
from .match.one_of import OneOf
from .match.rule import Match, Rule, rule
from .optimize import optimize, refresh, restore
from .pipeline import default_rules
from .saving import load, save

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "ExampleError",
    "Found",
    "FxbtWarning",
    "Match",
    "Miss",
    "NotOptimizedError",
    "OneOf",
    "Operands",
    "Rule",
    "RuleError",
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
    "refresh",
    "restore",
    "rule",
    "save",
    "scores",
    "testing",
]
