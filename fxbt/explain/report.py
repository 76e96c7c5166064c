"""The report on a model: the object behind `fast.report`, and its text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from ..capture.captured import Captured
from ..graph.miss import Miss
from ..graph.record import StageRecord
from ..runtime.cache_use import CacheUse
from ..runtime.compiled import Compiled
from ..runtime.race import Races
from .graph_report import GraphReport

NOTHING_YET = "nothing is captured yet: call the model, or fast.warmup(...) with real inputs"
_SHOWN_MISSES = 8


@dataclass
class Report:
    """What fxbt did to one model; `print` shows it as tables.

    `graphs` has a `GraphReport` for each call signature, in the order of capture. `fallbacks` has the reasons why the
    original forward ran. `notes` says what became of stored graphs and measured kernels, `parts` has the reports of
    submodules that were called directly. `hits`, `before`, `after`, `diff()` and `why()` of the report describe the
    latest graph.

    Example::

        fast = fxbt.optimize(model)
        fast(**inputs)
        print(fast.report)
        fast.report.hits                      # {'attention': 6, 'qkv': 6}
        print(fast.report.why("attention", at="encoder.layer.3"))
    """

    graphs: dict[str, GraphReport] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # why stored graphs or measured kernels are not used
    made: int = 0  # number of graphs made, including replaced ones
    own_parts: dict[str, Report] = field(default_factory=dict)  # of submodules, called or not

    @property
    def latest(self) -> GraphReport | None:
        """The report on the graph that was captured last; None before the first capture."""
        return next(reversed(self.graphs.values()), None)

    @property
    def parts(self) -> dict[str, Report]:
        """The reports of submodules that were called directly, by path.

        Example::

            fast.generate(**inputs)
            print(fast.report.parts["model.encoder"])
        """
        found: dict[str, Report] = {}
        for name, part in self.own_parts.items():
            found |= {name: part} if part.graphs or part.fallbacks else {}
            found |= {f"{name}.{inner}": report for inner, report in part.parts.items()}
        return found

    @property
    def hits(self) -> dict[str, int]:
        """How often each rule matched in the latest graph; {} before the first capture."""
        return self.latest.hits if self.latest else {}

    @property
    def misses(self) -> list[Miss]:
        """Every place of the latest graph where a rule was tried and did not match, as data.

        Example::

            [(miss.rule, miss.where, miss.matched, miss.total) for miss in fast.report.misses]
        """
        return self.latest.misses if self.latest else []

    @property
    def before(self) -> str:
        """The latest graph as captured, as text: see `fxbt.explain.show.text`."""
        return self.latest.before if self.latest else NOTHING_YET

    @property
    def after(self) -> str:
        """The latest graph as it runs, as text."""
        return self.latest.after if self.latest else NOTHING_YET

    def diff(self) -> str:
        """What each rewrite of the latest graph removed (`-`) and added (`+`); equal layers are shown once.

        Example::

            print(fast.report.diff())
        """
        return self.latest.diff() if self.latest else NOTHING_YET

    def why(self, rule: str, at: str | None = None) -> str:
        """Why `rule` did not match in the latest graph: its nearest misses, and where it did match.

        The nearest misses found the largest share of the pattern. Values have the names of `after`, or with a quote
        those of `before` (`%softmax_0'`).

        Args:
            rule: the rule's name, as in `hits`; for an unknown name, the answer lists the known ones.
            at: only consider places inside this module, for example "encoder.layer.3".

        Example::

            print(fast.report.why("attention", at="encoder.layer.3"))
        """
        return self.latest.why(rule, at) if self.latest else NOTHING_YET

    def add_graph(
        self,
        signature: str,
        captured: Captured,
        compiled: Compiled,
        races: Races | None = None,
        is_stored: bool = False,
        use: CacheUse | None = None,
    ) -> GraphReport:
        """Records a captured graph under its call signature, numbered if the text occurs twice.

        `is_stored`: another process captured it; `use`: how it uses KV caches.
        """
        self.made += 1
        name = next(n for n in _numbered(signature) if n not in self.graphs)
        self.graphs[name] = GraphReport(
            signature, compiled, captured.out_spec, captured.effects.names, captured.seconds, races, is_stored, use
        )
        return self.graphs[name]

    def drop_graph(self, graph: GraphReport) -> None:
        """Removes a graph that was replaced, or whose weights the model no longer has."""
        self.graphs = {name: other for name, other in self.graphs.items() if other is not graph}

    def add_fallback(self, reason: str) -> None:
        """Records why the original forward ran; each reason once."""
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)

    def add_note(self, note: str) -> None:
        """Records what became of a stored graph or measured kernels; each note once."""
        if note not in self.notes:
            self.notes.append(note)

    def __str__(self) -> str:
        parts = [f"{path}, called directly\n\n{report.own_text()}" for path, report in self.parts.items()]
        return "\n\n\n".join([self.own_text(), *parts])

    def own_text(self) -> str:
        """The report as text, without those of submodules."""
        dropped = self.made - len(self.graphs)
        title = f"graphs ({dropped} more were captured and replaced)" if dropped else "graphs"
        sections = [(title, _graph_table(dict(self.graphs)))]
        if any(graph.use for graph in self.graphs.values()):
            sections.append(("calls with a KV cache", _cache_table(self.graphs.values())))
        sections += _latest_sections(self.latest)
        if self.fallbacks:
            sections.append(("the original forward ran because", _bullets(self.fallbacks)))
        if self.notes:
            sections.append(("notes", _bullets(self.notes)))
        return "\n\n".join(f"{title}\n{body}" for title, body in sections)


def _numbered(name: str) -> Iterator[str]:
    return itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))


def _graph_table(graphs: dict[str, GraphReport]) -> str:
    if not graphs:
        return NOTHING_YET
    rows = [
        [
            key,
            f"{graph.nodes_before} -> {graph.nodes_after}",
            "from disk" if graph.is_stored else f"{graph.capture_seconds:.2f}",
            f"{graph.rewrite_seconds:.2f}",
            f"{graph.derived_bytes / 2**20:.1f}",
            "" if graph.peak_bytes is None else f"{graph.peak_bytes / 2**20:.1f}",
        ]
        for key, graph in graphs.items()
    ]
    return _table(["signature", "nodes", "capture s", "rewrite s", "derived weights MiB", "values MiB"], rows)


def _cache_table(graphs: Iterable[GraphReport]) -> str:
    rows = [
        [graph.step, graph.tokens, f"{graph.cache_bytes / 2**20:.1f}", graph.signature] for graph in graphs if graph.use
    ]
    return _table(["step", "tokens", "growing caches MiB", "signature"], rows)


def _latest_sections(graph: GraphReport | None) -> list[tuple[str, str]]:
    if graph is None:
        return []
    rows = [[s.name, s.hits, len(s.misses), f"{s.seconds:.2f}"] for s in graph.stages]
    sections = [("stages of the latest graph", _table(["stage", "hits", "near misses", "seconds"], rows))]
    if unpadding := graph.compiled.unpadding:
        counts = [[verdict, count] for verdict, count in unpadding.verdicts().items()]
        sections.append(
            ("padding is dropped (unpadding); calls of the latest graph", _table(["went", "calls"], counts))
        )
    sections.append(("batches with values over 32 MiB", _parts_text(graph.parts)))
    if graph.lost:
        sections.append(("calls that the original serves because it was faster than the graph", _table_of(graph.lost)))
    if graph.fused_regions:
        rows = [list(item) for item in graph.fused_regions.items()]
        sections.append(("steps that are one kernel each on the device", _table(["steps", "state"], rows)))
    if graph.cuda_graphs:
        title = f"CUDA graphs, {graph.cuda_graph_bytes / 2**20:.1f} MiB of inputs and outputs"
        sections.append((title, _table(["went", "calls"], [list(item) for item in graph.cuda_graphs.items()])))
    if graph.precision is not None and graph.error is not None:
        sections.append(
            (
                "precision",
                f"linear layers in {graph.precision}: outputs differ by up to {graph.error:.1e}, relative to the "
                "largest value",
            )
        )
    if graph.kernels:
        title = "kernels, by rows of a linear and tokens of a sequence (time of each)"
        sections.append((f"{title}: {graph.tuning}", _table_of(graph.kernels)))
    # A miss whose op has since become part of a larger block is no loss: `why` shows it, the summary does not.
    fused = {entry.node for stage in graph.stages for rewrite in stage.rewrites for entry in rewrite.removed}
    misses = [miss for miss in graph.misses if not miss.refused and miss.anchor not in fused]
    refused = [miss for miss in graph.misses if miss.refused]
    if nearest := graph.nearest(misses):
        sections.append(("near misses", _first(nearest)))
    if refused:
        sections.append(("rewrites refused by verification", _first(graph.grouped(refused, "refused"))))
    return sections


def _first(texts: Sequence[str]) -> str:
    left_out = len(texts) - _SHOWN_MISSES
    more = [f"… and {left_out} more kinds: see report.why(rule)"] if left_out > 0 else []
    return "\n".join([*texts[:_SHOWN_MISSES], *more])


def _parts_text(parts: StageRecord) -> str:
    return "run in parts" if parts.hits else "\n".join(f"run whole: {miss}" for miss in parts.misses)


def _table_of(texts: dict[str, str]) -> str:
    return tabulate(list(texts.items()), tablefmt="plain", disable_numparse=True)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(headers: list[str], rows: list[list[Any]]) -> str:
    return tabulate(rows, headers=headers, disable_numparse=True)
