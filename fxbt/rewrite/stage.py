"""Runs one rule over one graph: matches and rewrites at each anchor until nothing is left to do."""

from __future__ import annotations

import time
from collections import deque

import torch
from torch import fx

from ..errors import RuleError
from ..graph.miss import Miss, module_path
from ..graph.node import attribute
from ..graph.record import Rewrite, StageRecord
from ..match.rule import Rule
from .outline import outline
from .splice import Traces, apply
from .verify import Verifier

DEEPEST = 8  # how many rewrites of its own results a rule may stack up before that counts as a loop


def run_stage(
    module: fx.GraphModule, rule: Rule, verifier: Verifier | None, assumes: dict[str, torch.Tensor]
) -> StageRecord:
    """Tries `rule` at each of its anchors, including those that its own rewrites create.

    Raises:
        RuleError: the rule matches its own results without end.
    """
    record = StageRecord(rule.name, nodes_before=len(module.graph.nodes))
    start = time.perf_counter()
    misses: dict[str, Miss] = {}
    erased: set[fx.Node] = set()
    traces: Traces = {}
    waiting = deque((anchor, 0) for anchor in rule.anchors(module.graph.nodes))
    while waiting:
        anchor, depth = waiting.popleft()
        if anchor in erased:
            continue
        try:
            rewrite = _try(module, rule, anchor, verifier, assumes, traces)
        except Miss as miss:
            _keep(record, misses, miss, rule, anchor)
            continue
        if rewrite is None and depth:
            continue  # the rule's own result is in its best form: counted already
        record.places.append(rewrite.where if rewrite else module_path(anchor))
        if rewrite is not None:
            _check_depth(rule, anchor, depth)
            record.rewrites.append(rewrite)
            erased.update(entry.node for entry in rewrite.removed)
            made = sorted(entry.node for entry in rewrite.added)
            waiting.extend((node, depth + 1) for node in rule.anchors(made))
    record.misses += misses.values()
    record.seconds = time.perf_counter() - start
    record.nodes_after = len(module.graph.nodes)
    return record


def _try(
    module: fx.GraphModule,
    rule: Rule,
    anchor: fx.Node,
    verifier: Verifier | None,
    assumes: dict[str, torch.Tensor],
    traces: Traces,
) -> Rewrite | None:
    match = rule.find(anchor)
    if not match.replaces:
        return None
    try:
        rewrite = outline(module, rule, match) if rule.outline else apply(module, rule, match, verifier, traces)
    except Miss as miss:
        miss.refused = True
        raise
    if verifier is not None:
        verifier.follow(rewrite)
    assumes.update((str(node.target), attribute(module, node)) for node in match.assumes)
    return rewrite


def _check_depth(rule: Rule, anchor: fx.Node, depth: int) -> None:
    if depth >= DEEPEST:
        raise RuleError(
            f"rule {rule.name!r} does not stop: its replacement matches its own pattern, {depth} times in a row at "
            f"{module_path(anchor) or 'the top'}; write a replacement that the pattern does not match"
        )


def _keep(record: StageRecord, misses: dict[str, Miss], miss: Miss, rule: Rule, anchor: fx.Node) -> None:
    """Records a miss: all refusals and reasons, but of incomplete matches only the nearest per module."""
    miss = miss.without_frames()
    if miss.total and miss.matched < min(2, miss.total) and not miss.refused:
        return  # another op altogether
    miss.rule, miss.where, miss.anchor = rule.name, module_path(anchor), anchor
    if not miss.total or miss.refused:
        record.misses.append(miss)
    elif miss.where not in misses or miss.nearness > misses[miss.where].nearness:
        misses[miss.where] = miss
