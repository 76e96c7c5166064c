"""What a stage leaves behind for those who ask later: nodes as they were, and no text yet.

Nodes are edited and erased by the steps that follow, but the tuples that held their arguments are not: keeping those
costs a microsecond a node, and the text is made when someone looks (`show`, `report`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from .miss import Miss

RULE = "fxbt_rule"  # node.meta entry: the rule that put a node in, for those who read the graph; it decides nothing
MADE = "fxbt_made"  # node.meta entry: `is_made`


def is_made(node: fx.Node) -> bool:
    """Whether a rule put the node in: its layout may be another than the model's, and its kernel fxbt's own choice."""
    return bool(node.meta.get(MADE, False))


class Entry(NamedTuple):
    """A node as it was when it was looked at."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> Entry:
        return cls(node, node.target, node.args, node.kwargs)


class Snapshot:
    """A graph as it was: `show.text` prints it, whatever has become of the graph since.

    Example::

        before = Snapshot(module.graph)
        canonicalize(module)
        print(show.text(before))
    """

    def __init__(self, graph: fx.Graph):
        self.entries = tuple(map(Entry.of, graph.nodes))


@dataclass(frozen=True)
class Rewrite:
    """One replacement: what went, what came, and which new value stands for which old one."""

    rule: str
    where: str
    removed: tuple[Entry, ...]
    added: tuple[Entry, ...]
    results: tuple[tuple[fx.Node, fx.Node], ...]  # (old, new)


@dataclass
class StageRecord:
    """What one rule did to one graph.

    `places` are the module paths at which it fired, `rewrites` what it changed there (nothing, where the best form
    stood already).
    """

    name: str
    places: list[str] = field(default_factory=list)
    rewrites: list[Rewrite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0

    @property
    def hits(self) -> int:
        return len(self.places)


def hits_of(stages: list[StageRecord]) -> dict[str, int]:
    """How often each rule fired."""
    return {stage.name: sum(other.hits for other in stages if other.name == stage.name) for stage in stages}
