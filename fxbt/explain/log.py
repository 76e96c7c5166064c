"""Logs what the stages do, on the logger "fxbt": set its level, or FXBT_DEBUG=1..4 to log to stderr."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from torch import fx

from ..graph.record import StageRecord
from . import show

COUNTS, REWRITES, GRAPHS, MISSES = logging.INFO, 18, 14, logging.DEBUG
_LEVELS = {"1": COUNTS, "2": REWRITES, "3": GRAPHS, "4": MISSES}

_log = logging.getLogger("fxbt")


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Makes the logger write to stderr, for a while, what the environment variable FXBT_DEBUG asks for."""
    asked = os.environ.get("FXBT_DEBUG", "0")
    if asked == "0":
        yield
        return
    if asked not in _LEVELS:
        _log.warning("FXBT_DEBUG is %r; it takes 1 (counts), 2 (and rewrites), 3 (and graphs), 4 (and misses)", asked)
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fxbt: %(message)s"))
    level, propagate = _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(_LEVELS[asked])
    _log.propagate = False  # the root logger may also write to stderr
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
        _log.propagate = propagate


def stage(record: StageRecord) -> None:
    """Logs a finished stage: its counts, its rewrites and its misses."""
    nodes = f"{record.nodes_before} -> {record.nodes_after} nodes"
    seconds = f"{1000 * record.seconds:.0f} ms"
    _log.log(COUNTS, "%s: %d hits, %d misses, %s, %s", record.name, record.hits, len(record.misses), nodes, seconds)
    if record.rewrites and _log.isEnabledFor(REWRITES):
        _log.log(REWRITES, "%s", show.blocks(record.rewrites))
    for miss in record.misses:
        _log.log(MISSES, "%s", miss)  # formatted only if written


def graph(stage: str, module: fx.GraphModule) -> None:
    """Logs the graph as a stage left it."""
    if _log.isEnabledFor(GRAPHS):
        _log.log(GRAPHS, "the graph after %s:\n%s", stage, show.text(module))
