"""What fxbt did to a model: the object behind `fast.report`, and its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tabulate import tabulate
from torch import fx

from . import show
from .rule import Miss, StageRecord

if TYPE_CHECKING:
    from .capture import Captured
    from .pipeline import Compiled

NOTHING_YET = "nothing is captured yet: call the model, or fast.warmup(...) with inputs of the real kind"
_SHOWN_MISSES = 8


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: its texts, what the rules did to it and how long it took.

    `before` and `after` are graph texts (see `fxbt.show.text`), `module` is the rewritten graph,
    `derived_bytes` the memory of weights made from the model's own (merged ones). `nodes_before` and
    `nodes_after` count the texts' lines: operations, inputs and the return, without weights and sizes.

    Example::

        for signature, graph in fast.report.graphs.items():
            print(signature, graph.hits, graph.diff())
    """

    signature: str
    before: str
    after: str
    module: fx.GraphModule
    hits: dict[str, int]
    misses: list[Miss]
    refusals: list[str]
    stages: list[StageRecord]
    capture_seconds: float
    rewrite_seconds: float
    nodes_before: int
    nodes_after: int
    derived_bytes: int

    def diff(self) -> str:
        """What the rewrites changed, as a unified diff of the two texts.

        Example::

            print(fast.report.graphs[signature].diff())
        """
        return show.diff(self.before, self.after)

    def why(self, rule: str, at: str | None = None) -> str:
        """Why `rule` did not fire in this graph: see `Report.why`."""
        names = dict.fromkeys([*(stage.name for stage in self.stages), *self.hits])
        if rule not in names:
            return f"no rule {rule!r} ran on this graph; the rules that ran: {', '.join(names) or 'none'}"
        place = f" at {at}" if at else ""
        misses = [miss for miss in self.misses if miss.rule == rule and _is_inside(miss.where, at)]
        if misses:
            return "\n".join(_grouped(misses))
        return f"{rule} has no near miss{place}; it fired {self.hits.get(rule, 0)} times in this graph"


@dataclass
class Report:
    """What fxbt did to one model; `print` shows it as tables.

    `graphs` holds a `GraphReport` for each call signature in the order of their captures, `fallbacks` the
    reasons for which the original forward ran instead. The report's own `hits`, `before`, `after`, `diff()`
    and `why()` speak of the latest graph.

    Example::

        fast = fxbt.optimize(model)
        fast(**inputs)
        print(fast.report)
        fast.report.hits                      # {'attention': 6, 'qkv': 6}
        print(fast.report.why("attention", at="encoder.layer.3"))
    """

    graphs: dict[str, GraphReport] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def latest(self) -> GraphReport | None:
        """The report of the graph that was captured last."""
        return next(reversed(self.graphs.values()), None)

    @property
    def hits(self) -> dict[str, int]:
        """How often each rule fired in the latest graph; {} while there is none."""
        return self.latest.hits if self.latest else {}

    @property
    def before(self) -> str:
        """The latest graph as it was captured, as text."""
        return self.latest.before if self.latest else NOTHING_YET

    @property
    def after(self) -> str:
        """The latest graph as it runs, as text."""
        return self.latest.after if self.latest else NOTHING_YET

    def diff(self) -> str:
        """What the rewrites changed in the latest graph, as a unified diff.

        Example::

            print(fast.report.diff())
        """
        return self.latest.diff() if self.latest else NOTHING_YET

    def why(self, rule: str, at: str | None = None) -> str:
        """Why `rule` did not fire in the latest graph: its near misses, or a sentence saying that it fired.

        Args:
            rule: the rule's name, as in `hits`.
            at: only places inside this module, e.g. "encoder.layer.3".

        Example::

            print(fast.report.why("attention", at="encoder.layer.3"))
        """
        return self.latest.why(rule, at) if self.latest else NOTHING_YET

    def add_graph(self, signature: str, captured: Captured, compiled: Compiled) -> None:
        """Record a captured graph under its call signature (numbered, should the text occur twice)."""
        same = sum(graph.signature == signature for graph in self.graphs.values())
        self.graphs[f"{signature} ({same + 1})" if same else signature] = GraphReport(
            signature=signature,
            before=compiled.before,
            after=compiled.after,
            module=compiled.module,
            hits=compiled.hits,
            misses=compiled.misses,
            refusals=compiled.refusals,
            stages=compiled.stages,
            capture_seconds=captured.seconds,
            rewrite_seconds=compiled.seconds,
            nodes_before=len(compiled.before.splitlines()),
            nodes_after=len(compiled.after.splitlines()),
            derived_bytes=compiled.derived_bytes,
        )

    def add_fallback(self, reason: str) -> None:
        """Record why the original forward ran; each reason once."""
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)

    def __str__(self) -> str:
        sections = [("graphs", _graph_table(dict(self.graphs))), *_latest_sections(self.latest)]
        if self.fallbacks:
            sections.append(("the original forward ran because", _bullets(self.fallbacks)))
        return "\n\n".join(f"{title}\n{body}" for title, body in sections)


def _graph_table(graphs: dict[str, GraphReport]) -> str:
    if not graphs:
        return NOTHING_YET
    rows = [
        [
            key,
            f"{graph.nodes_before} -> {graph.nodes_after}",
            f"{graph.capture_seconds:.2f}",
            f"{graph.rewrite_seconds:.2f}",
            f"{graph.derived_bytes / 2**20:.1f}",
        ]
        for key, graph in graphs.items()
    ]
    return _table(["signature", "nodes", "capture s", "rewrite s", "derived weights MiB"], rows)


def _latest_sections(graph: GraphReport | None) -> list[tuple[str, str]]:
    if graph is None:
        return []
    rows = [[s.name, s.hits, len(s.misses), f"{s.seconds:.2f}"] for s in graph.stages]
    sections = [("stages of the latest graph", _table(["stage", "hits", "near misses", "seconds"], rows))]
    if graph.misses:
        sections.append(("near misses", _miss_lines(graph.misses)))
    if graph.refusals:
        sections.append(("rewrites refused by verification", _bullets(graph.refusals)))
    return sections


def _miss_lines(misses: Sequence[Miss]) -> str:
    groups = _grouped(misses)
    left_out = len(groups) - _SHOWN_MISSES
    more = [f"… and {left_out} more kinds: report.why(rule) has them all"] if left_out > 0 else []
    return "\n".join(groups[:_SHOWN_MISSES] + more)


def _grouped(misses: Iterable[Miss]) -> list[str]:
    """One text for each rule and reason, so that a repeated layer misses once: the first, and where else."""
    groups: dict[tuple[str, str], list[Miss]] = {}
    for miss in misses:
        groups.setdefault((miss.rule, miss.reason), []).append(miss)
    return [str(first) + _elsewhere(rest) for first, *rest in groups.values()]


def _elsewhere(misses: Sequence[Miss]) -> str:
    if not misses:
        return ""
    places = list(dict.fromkeys(miss.where or "the top" for miss in misses))
    return f"\n  {len(misses)} more at {', '.join(places[:3])}{', …' if len(places) > 3 else ''}"


def _is_inside(where: str, at: str | None) -> bool:
    return not at or where == at or where.startswith(at + ".")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(headers: list[str], rows: list[list[Any]]) -> str:
    return tabulate(rows, headers=headers, disable_numparse=True)
