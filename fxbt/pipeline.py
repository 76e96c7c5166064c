"""A captured graph's way through the house: canonical form, rules in order, lowering. The order is read, not solved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from . import rewrite, show
from .canonical import canonicalize
from .capture import Captured
from .lower import Program
from .rule import Miss, Rule, StageRecord, module_path
from .verify import Verifier, is_stochastic


@dataclass
class Compiled:
    """A graph ready to run, and the record of how it came to be."""

    run: Callable[..., tuple[Any, ...]]
    module: fx.GraphModule
    before: str
    after: str
    hits: dict[str, int]
    misses: list[Miss]
    refusals: list[str]
    stages: list[StageRecord]
    seconds: float
    stochastic: bool
    derived_bytes: int


def default_rules() -> tuple[Rule, ...]:
    """The built-in rules, in the order they run: attention first, then QKV around it.

    Example::

        fxbt.default_rules()  # (Attention(), MergeQKV())
    """
    from fxbt.patterns import (
        Attention,
        MergeQKV,
    )  # the rules import fxbt, so they are met only when asked for

    return (Attention(), MergeQKV())


def compile(captured: Captured, rules: Sequence[Rule], *, verify: bool = False) -> Compiled:
    """Canonicalize `captured.module`, run `rules` over it in order, and lower it to a callable."""
    start = time.perf_counter()
    module = captured.module
    before = show.text(module)
    canonicalize(module)
    verifier = Verifier(module, captured.example) if verify else None
    assumes: list[str] = []
    stages = [_run_stage(module, rule, verifier, assumes) for rule in rules]
    canonicalize(module)
    module.graph.lint()
    keep_derived = not torch.is_grad_enabled()
    program = Program(module, assumes, keep_derived)
    return Compiled(
        run=program,
        module=module,
        before=before,
        after=show.text(module),
        hits=_hits(stages),
        misses=[miss for stage in stages for miss in stage.misses],
        refusals=[refusal for stage in stages for refusal in stage.refusals],
        stages=stages,
        seconds=time.perf_counter() - start,
        stochastic=is_stochastic(module),
        derived_bytes=program.derived_bytes,
    )


def _hits(stages: list[StageRecord]) -> dict[str, int]:
    hits: dict[str, int] = {}
    for stage in stages:
        hits[stage.name] = hits.get(stage.name, 0) + stage.hits
    return hits


def _run_stage(module: fx.GraphModule, rule: Rule, verifier: Verifier | None, assumes: list[str]) -> StageRecord:
    """Try one rule at each of its anchors; matches do not overlap, since erased nodes are no anchors any more."""
    record = StageRecord(rule.name, nodes_before=len(module.graph.nodes))
    start = time.perf_counter()
    erased: set[fx.Node] = set()
    for anchor in list(rule.anchors(module.graph)):
        if anchor in erased:
            continue
        try:
            erased.update(_try(module, rule, anchor, verifier, assumes))
            record.hits += 1
        except Miss as miss:
            miss.rule, miss.where = rule.name, module_path(anchor)
            record.misses.append(miss)
    record.seconds = time.perf_counter() - start
    record.nodes_after = len(module.graph.nodes)
    record.refusals = [str(miss) for miss in record.misses if miss.refused]
    return record


def _try(
    module: fx.GraphModule, rule: Rule, anchor: fx.Node, verifier: Verifier | None, assumes: list[str]
) -> list[fx.Node]:
    match = rule.find(anchor)
    if not match.replaces:
        return []
    try:
        erased = rewrite.apply(module, rule, match, verifier)
    except Miss as miss:
        miss.refused = True
        raise
    assumes.extend(str(node.target) for node in match.assumes)
    return erased
