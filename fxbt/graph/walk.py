"""Ways through a graph: what values are computed from, and what is computed from them.

Loops, not networkx: it walks in 0.6 of their time, but building its graph takes 2.6 walks, and ours change in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import fx


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads."""
    return node.all_input_nodes


def ancestors(nodes: Iterable[fx.Node], sources: Callable[[fx.Node], list[fx.Node]] = _inputs) -> set[fx.Node]:
    """The nodes and all that they are computed from; `sources` are those of a node that count.

    Example:
        >>> sorted(ancestors([mask]))  # in the order of the graph
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
    """What is computed from the seeds in at most `depth` steps, nearest first."""
    found, layer = dict.fromkeys(seeds), seeds
    for _ in range(depth):
        layer = [user for node in layer for user in node.users if user not in found and user.op == "call_function"]
        found.update(dict.fromkeys(layer))
    return list(found)
