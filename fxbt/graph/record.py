"""What a stage records for later readers: nodes as they were, without text.

Later steps edit and erase nodes, but not the tuples that held their arguments. Keeping those costs a microsecond per
node, and text is created only when read (`show`, `report`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from .miss import Miss

RULE = "fxbt_rule"  # node.meta entry: the rule that added a node, for readers of the graph; decides nothing
MADE = "fxbt_made"  # node.meta entry: `is_made`


def is_made(node: fx.Node) -> bool:
    """Whether a rule added the node: its layout may differ from the model's, and fxbt may choose its kernel."""
    return bool(node.meta.get(MADE, False))


class Entry(NamedTuple):
    """A node as it was when recorded."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> Entry:
        """A node as it is now."""
        return cls(node, node.target, node.args, node.kwargs)


class Snapshot:
    """A graph as it was: `show.text` prints it, whatever happens to the graph later.

    Example::

        before = Snapshot(module.graph)
        canonicalize(module)
        print(show.text(before))
    """

    def __init__(self, graph: fx.Graph):
        self.entries = tuple(map(Entry.of, graph.nodes))


@dataclass(frozen=True)
class Rewrite:
    """One replacement: the removed and added nodes, and which new value replaces which old one."""

    rule: str
    where: str
    removed: tuple[Entry, ...]
    added: tuple[Entry, ...]
    results: tuple[tuple[fx.Node, fx.Node], ...]  # (old, new)


@dataclass
class StageRecord:
    """What one rule did to one graph.

    `places` are the module paths where it matched, `rewrites` what it changed there (nothing where the best form was
    there already).
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
        """How often the rule matched."""
        return len(self.places)


def hits_of(stages: list[StageRecord]) -> dict[str, int]:
    """How often each rule matched."""
    return {stage.name: sum(other.hits for other in stages if other.name == stage.name) for stage in stages}
