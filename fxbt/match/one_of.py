"""Several rules for one thing: at each place the first that finds its meaning there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import RuleError
from ..graph.miss import Miss
from .rule import Match, Rule, check_rule


@dataclass
class Chosen:
    """The place of the rule that matched among the rules, and its facts."""

    place: int
    facts: Any


class OneOf(Rule):
    """Rules that share a name, a stage and a count in `report.hits`: at each anchor the first that matches replaces.

    What one of them makes is offered to all again. Where none matches, the report tells why of the nearest. Each of
    the rules overrides `targets` and `find`.

    Raises:
        RuleError: a rule among them cannot work, has a pattern, or a tolerance of its own.

    Example::

        fxbt.OneOf("attention", Attention(), SinkAttention(), CalledAttention())
    """

    def __init__(self, name: str, *rules: Rule):
        self.name, self.rules = name, rules
        for rule in rules:
            check_rule(rule)
            if not rule.targets or hasattr(rule, "pattern") or rule.outline:
                raise RuleError(f"rule {name!r}: {type(rule).__name__} has no targets and find of its own")
        if len({(rule.proven, rule.tolerance) for rule in rules}) != 1:
            raise RuleError(f"rule {name!r}: its rules must be proven alike, within the same tolerance")
        self.makes = frozenset().union(*(rule.makes for rule in rules))
        self.targets = frozenset().union(*(rule.targets for rule in rules))
        self.proven, self.tolerance = rules[0].proven, rules[0].tolerance

    def find(self, anchor: fx.Node) -> Match:
        """The match of the first rule that has one.

        Raises:
            Miss: none has. It is the first that gives a reason without counting ops, else that of the nearest.
        """
        misses: list[Miss] = []
        for place, rule in enumerate(self.rules):
            if anchor.target not in rule.targets:
                continue
            try:
                match = rule.find(anchor)
            except Miss as miss:
                misses.append(miss)
                continue
            return dataclasses.replace(match, facts=Chosen(place, match.facts))
        raise max(misses, key=lambda miss: (not miss.total, miss.nearness))

    def replace(self, chosen: Chosen, *tensors: torch.Tensor) -> Any:
        """What the rule that matched computes instead."""
        return self.rules[chosen.place].replace(chosen.facts, *tensors)
