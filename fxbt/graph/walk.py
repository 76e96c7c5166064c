"""Walks through a graph: from values to what they are computed from, and to what is computed from them.

These are plain loops because a networkx walk takes 0.6 of their time, but building its graph takes 2.6 walks, and our
graphs change between walks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import fx


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads."""
    return node.all_input_nodes


def ancestors(nodes: Iterable[fx.Node], sources: Callable[[fx.Node], list[fx.Node]] = _inputs) -> set[fx.Node]:
    """The nodes and everything they are computed from; `sources` returns the inputs of a node to follow.

    Example:
        >>> sorted(ancestors([mask]))  # in graph order
    """
    found = set(nodes)
    waiting = list(found)
    while waiting:
        new = [source for source in sources(waiting.pop()) if source not in found]
        found.update(new)
        waiting += new
    return found


def latest_first(node: fx.Node, earliest: fx.Node | None) -> Iterator[fx.Node]:
    """A node and what it is computed from, latest first, none that stands before `earliest`."""
    waiting, seen = {node}, {node}
    while waiting:
        latest = max(waiting)
        waiting.remove(latest)
        yield latest
        sources = [s for s in latest.all_input_nodes if s not in seen and (earliest is None or s >= earliest)]
        seen.update(sources)
        waiting.update(sources)


def computed_from(seeds: list[fx.Node], depth: int) -> list[fx.Node]:
    """Everything computed from the seeds in at most `depth` steps, nearest first."""
    found, layer = dict.fromkeys(seeds), seeds
    for _ in range(depth):
        layer = [user for node in layer for user in node.users if user not in found and user.op == "call_function"]
        found.update(dict.fromkeys(layer))
    return list(found)
