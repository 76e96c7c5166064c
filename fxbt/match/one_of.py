"""`OneOf`: several rules for one meaning; at each anchor, the first that matches replaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import RuleError
from ..graph.miss import Miss
from .found import Found
from .rule import Match, Rule, check_rule
from .terms import Term

Read = tuple[list[Found], Miss | None]  # all matches of a pattern at an anchor, and why there are no more


@dataclass
class Chosen:
    """The index of the rule that matched, and its match."""

    place: int
    match: Match


class OneOf(Rule):
    """Rules that share a name, a stage and a count in `report.hits`: at each anchor, the first that matches replaces.

    The results of one rule are offered to all of them again. If none matches, the report shows the reason of the
    nearest. Each rule needs `targets`, and either a `pattern` or its own `find`; a pattern that several share is
    matched once.

    Raises:
        RuleError: one of the rules cannot work, has no targets, or has another tolerance or `proven` than the others.

    Example::

        fxbt.OneOf("attention", Attention(), SinkAttention(), CalledAttention())
    """

    def __init__(self, name: str, *rules: Rule):
        self.name, self.rules = name, rules
        for rule in rules:
            check_rule(rule)
            if not rule.targets or rule.outline:
                raise RuleError(f"rule {name!r}: {type(rule).__name__} needs targets = {{...}} and no outline")
        if len({(rule.proven, rule.tolerance) for rule in rules}) != 1:
            raise RuleError(f"rule {name!r}: its rules must agree in proven and tolerance")
        self.makes = frozenset().union(*(rule.makes for rule in rules))
        self.targets = frozenset().union(*(rule.targets for rule in rules))
        self.proven, self.tolerance = rules[0].proven, rules[0].tolerance

    def find(self, anchor: fx.Node) -> Match:
        """The match of the first rule that has one.

        Raises:
            Miss: no rule matches; the first reason that does not count ops, else that of the nearest miss.
        """
        misses: list[Miss] = []
        known: dict[tuple[Term, ...], Read] = {}
        for place, rule in enumerate(self.rules):
            if anchor.target not in rule.targets:
                continue
            try:
                match = _find(rule, anchor, known)
            except Miss as miss:
                misses.append(miss)
                continue
            return dataclasses.replace(match, facts=Chosen(place, dataclasses.replace(match, assumes=())))
        raise max(misses, key=lambda miss: (not miss.total, miss.nearness))

    def replace(self, chosen: Chosen, *tensors: torch.Tensor) -> Any:
        """What the rule that matched computes instead."""
        return self.rules[chosen.place].results(chosen.match, tensors)


def _find(rule: Rule, anchor: fx.Node, known: dict[tuple[Term, ...], Read]) -> Match:
    """The rule's match; the matches of its pattern are cached in `known`."""
    if not hasattr(rule, "pattern"):
        return rule.find(anchor)
    pattern = rule.formula.outputs
    if pattern not in known:
        known[pattern] = _read(rule, anchor)
    return rule.first_of(_again(*known[pattern]), anchor)


def _read(rule: Rule, anchor: fx.Node) -> Read:
    found: list[Found] = []
    try:
        found.extend(rule.matcher.find(anchor))
    except Miss as miss:
        return found, miss
    return found, None


def _again(matches: list[Found], miss: Miss | None) -> Iterator[Found]:
    yield from (match.anew() for match in matches)
    if miss is not None:
        raise miss
