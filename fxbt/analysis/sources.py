"""Finds what a value is computed from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx


def nearest_sources(value: Any, targets: Collection[Any], barriers: Collection[Any] = ()) -> list[fx.Node]:
    """The nearest calls of `targets` that a value is computed from, not looking past them or past `barriers`.

    Example::

        fxbt.nearest_sources(query, {aten.linear.default}, barriers={aten.detach.default})  # [q_proj]
    """
    waiting, seen, found = [value], set(), []
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in targets:
            found.append(node)
        elif node.target not in barriers:
            waiting.extend(node.all_input_nodes)
    return found
