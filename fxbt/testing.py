"""Test your own rules as fxbt tests its rules: does a rule fire, and do the outputs stay equal?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .explain.report import Report
from .match.one_of import OneOf
from .match.rule import Rule
from .optimize import optimize
from .pipeline import default_rules
from .rewrite.verify import TOLERANCE, difference
from .torch_compat import pytree

Inputs = Mapping[str, Any] | Sequence[Any]


def assert_rewrites(
    rule: Rule,
    model: nn.Module,
    inputs: Inputs,
    *others: Inputs,
    times: int | None = None,
    tolerance: float | None = None,
) -> Report:
    """Asserts that `rule` fires in `model` and that the outputs stay equal; returns the report.

    Args:
        rule: your own rule, or a built-in one.
        model: captured as it is, in train() or eval() mode, without gradients.
        inputs: keyword arguments as a dict, or positional ones as a sequence.
        others: inputs of other shapes to compare on; the default is `inputs` with three times the batch.
        times: how often the rule must fire; the default is at least once.
        tolerance: largest allowed difference, relative to the largest output; the default is rounding (2e-5 in
            float32).

    Raises:
        AssertionError: the rule did not fire (the message says why), or an output differs.

    Example::

        fxbt.testing.assert_rewrites(TanhGelu(), model, {"x": torch.randn(2, 5, 8)}, times=1)
    """
    fast, report = _optimized(rule, model, inputs)
    hits = report.hits.get(rule.name, 0)
    fired = hits == times if times is not None else hits > 0
    assert fired, f"{rule.name} fired {hits} times, expected {times or 'at least one'}\n{report.why(rule.name)}"
    for given in (inputs, *(others or [_larger_batch(inputs)])):
        _assert_equal(fast, model, given, rule.tolerance if tolerance is None else tolerance)
    return report


def assert_untouched(rule: Rule, model: nn.Module, inputs: Inputs, *, reason: str | None = None) -> Report:
    """Asserts that `rule` does not fire in `model`, for exactly this `reason`, and that the outputs stay equal.

    Raises:
        AssertionError: the rule fired, no miss has this reason (the message lists the reasons), or an output differs.

    Example::

        fxbt.testing.assert_untouched(
            TanhGelu(), model, inputs, reason="a value inside the pattern is used elsewhere too"
        )
    """
    fast, report = _optimized(rule, model, inputs)
    hits = report.hits.get(rule.name, 0)
    assert hits == 0, f"{rule.name} fired {hits} times, expected none\n{report.diff()}"
    reasons = sorted({miss.reason for miss in report.misses if miss.rule == rule.name})
    assert reason is None or reason in reasons, f"{rule.name} did not match because of {reasons}, expected {reason!r}"
    _assert_equal(fast, model, inputs, None)
    return report


def _optimized(rule: Rule, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Report]:
    built_in = {type(member) for known in default_rules() for member in _members(known)}
    is_built_in = all(type(member) in built_in for member in _members(rule))
    fast = optimize(model, rules=[] if is_built_in else [rule])
    with torch.no_grad():
        _call(fast, inputs)
    report: Report = fast.report  # type: ignore[assignment]
    assert not report.fallbacks, f"the model was not captured: {report.fallbacks[0]}"
    return fast, report


def _members(rule: Rule) -> tuple[Rule, ...]:
    return rule.rules if isinstance(rule, OneOf) else (rule,)


def _call(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _larger_batch(inputs: Inputs) -> Inputs:
    def repeat(value: Any) -> Any:
        return torch.cat([value, value, value]) if isinstance(value, torch.Tensor) and value.dim() else value

    return pytree.tree_map(repeat, inputs)


def _assert_equal(fast: nn.Module, model: nn.Module, inputs: Inputs, tolerance: float | None) -> None:
    with torch.no_grad():
        actual, expected = (pytree.tree_leaves(_call(each, inputs)) for each in (fast, model))
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    for place, (new, old) in enumerate(zip(actual, expected, strict=True)):
        if not isinstance(old, torch.Tensor):
            continue
        allowed = TOLERANCE.get(old.dtype, 0.0) if tolerance is None else tolerance
        worst = difference(new, old)
        assert worst <= allowed, f"output {place} differs by {worst:.2g} (allowed {allowed:g}) on inputs {shapes}"
