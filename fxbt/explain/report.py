"""What fxbt did to a model: the object behind `fast.report`, and its text."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tabulate import tabulate
from torch import fx

from ..capture.outputs import paths
from ..graph.miss import Miss, description, module_path, short_type, source_line
from ..graph.record import Snapshot, StageRecord, hits_of
from ..torch_compat import pytree
from . import show
from .as_networkx import as_networkx

if TYPE_CHECKING:
    import networkx

    from ..capture.export import Captured
    from ..lower.cuda.graphs import Replay
    from ..lower.derived_weights import Weights
    from ..lower.spill import Spilled
    from ..runtime.compiled import Compiled
    from ..runtime.race import Races
    from ..runtime.unpadding import Unpadding

NOTHING_YET = "nothing is captured yet: call the model, or fast.warmup(...) with inputs of the real kind"
_SHOWN_MISSES = 8
_NEAR = 0.25  # of a pattern: where a rule fires elsewhere, a place with less of it is another thing altogether
_ASKED = re.compile(r"\boutput_(\w+)=True")  # what a call asked to be returned: output_attentions=True


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: what the rules did to it and how long it took. Texts are made when they are asked for.

    `module` is the rewritten graph, `derived_bytes` the memory of weights made from the model's own (merged, packed
    ones), `peak_bytes` the most that values of the captured call hold at once (None with gradients), `kernels` the
    kernel of each shape of a linear, and the microseconds that chose it. `parts` has a hit if large batches run part
    after part, else the miss that says why not. `precision` is that of linears ("bfloat16", "int8") where another one
    than the model's was asked for, `error` how far that put the outputs of the captured call from the original's, as a
    part of their magnitude. `spilled` has the bytes that `keep_original=False` moved to a file and those that stayed.
    `nodes_before` and `nodes_after` count the lines of the texts in full: operations, inputs and the return, without
    weights and sizes.

    Example::

        for signature, graph in fast.report.graphs.items():
            print(signature, graph.hits, graph.diff())
    """

    signature: str
    captured: Snapshot
    rewritten: Snapshot
    module: fx.GraphModule
    stages: list[StageRecord]
    out_spec: pytree.TreeSpec
    left: list[str]  # what its calls change in the model
    capture_seconds: float
    rewrite_seconds: float
    derived_bytes: int
    peak_bytes: int | None
    kernels: dict[str, str]
    precision: str | None = None
    error: float | None = None
    spilled: Spilled | None = None
    unpadding: Unpadding | None = None
    replays: Sequence[Replay] = ()
    parts: StageRecord = field(default_factory=lambda: StageRecord("parts"))
    weights: Weights | None = None
    races: Races | None = None

    @property
    def rounds(self) -> int:
        """After so many calls at most, a write to a weight has been seen, however it was made; 0 where none is kept.

        Example::

            fast.report.latest.rounds  # 512
        """
        return self.weights.rounds if self.weights else 0

    @property
    def before(self) -> str:
        """The graph as it was captured: see `fxbt.explain.show.text`."""
        return show.text(self.captured)

    @property
    def after(self) -> str:
        """The graph as it runs: see `fxbt.explain.show.text`."""
        return show.text(self.rewritten)

    @property
    def hits(self) -> dict[str, int]:
        """How often each rule fired."""
        return hits_of(self.stages)

    @property
    def misses(self) -> list[Miss]:
        """Every place where a rule was tried and did not fire, in the order of the stages and of the graph."""
        return [miss for stage in self.stages for miss in stage.misses]

    @property
    def nodes_before(self) -> int:
        return len(self._printers[1].printed)

    @property
    def nodes_after(self) -> int:
        return len(self._printers[0].printed)

    @property
    def calls(self) -> dict[str, int]:
        """How the calls of this graph went, where it can drop padding: "packed", "dense" (nothing was padded), or why a
        padded call ran dense.

        Example::

            fast.report.latest.calls  # {'packed': 12, 'dense': 3, 'padding stands at position 0, which is read': 1}
        """
        return dict(self.unpadding.calls) if self.unpadding else {}

    @property
    def cuda_graphs(self) -> dict[str, int]:
        """How many calls `cuda_graphs=True` recorded and replayed, and why others were not; fxbt's own at the capture
        count too.

        Example::

            fast.report.latest.cuda_graphs  # {'of a new shape': 2, 'recorded': 2, 'replayed': 40}
        """
        return dict(sum((replay.calls for replay in self.replays), Counter()))

    @property
    def cuda_graph_bytes(self) -> int:
        """The device's memory that recordings hold for their inputs and outputs."""
        return sum(replay.nbytes for replay in self.replays)

    @property
    def lost(self) -> dict[str, str]:
        """For which sizes of calls the original serves, as it was clearly faster there, and on what evidence.

        Example::

            fast.report.latest.lost  # {'64 to 127 elements': '12 of 12 pairs, 3.1 ms against 2.2 ms'}
        """
        return self.races.lost() if self.races else {}

    def diff(self) -> str:
        """What each rewrite took out and put in, equal ones once: see `fxbt.explain.show.blocks`.

        Example::

            print(fast.report.graphs[signature].diff())
        """
        rewrites = [rewrite for stage in self.stages for rewrite in stage.rewrites]
        return show.blocks(rewrites, dict(self._printers[1].symbols))

    def networkx(self) -> networkx.DiGraph:
        """The graph as it runs, for the tools of https://networkx.org: a node for each operation, input and weight.

        A node has `op` ("sdpa", "placeholder", ...), `module` (the path of the module it comes from), `rule` (the one
        that made it, or ""), `shape` (a tuple of numbers and symbols; None for what is no tensor) and `dtype`. An edge
        goes from a value to what reads it; `arguments` are the places there.

        Example::

            graph = fast.report.latest.networkx()
            attentions = [name for name, node in graph.nodes(data=True) if node["op"] == "sdpa"]
            networkx.ancestors(graph, attentions[0])  # all that it is computed from
        """
        return as_networkx(self.module.graph)

    def why(self, rule: str, at: str | None = None) -> str:
        """Why `rule` did not fire in this graph: see `Report.why`."""
        if rule not in self.hits:
            return f"no rule {rule!r} ran on this graph; the rules that ran: {', '.join(self.hits) or 'none'}"
        if at and (unknown := self._unknown_place(at)):
            return unknown
        places = [
            place for stage in self.stages if stage.name == rule for place in stage.places if _is_inside(place, at)
        ]
        misses = [miss for miss in self.misses if miss.rule == rule and _is_inside(miss.where, at)]
        parts = [_fired(rule, places)] if places else []
        if misses:
            parts += self.nearest(misses) or [_far(misses)]
        elsewhere = f"; elsewhere it fired {self.hits[rule]} times" if at else ""
        return "\n".join(parts) or f"{rule} found nothing to start from{f' at {at}' if at else ''}{elsewhere}"

    def _unknown_place(self, at: str) -> str:
        """A sentence, if no operation of the graph is inside module `at`."""
        entries = (*self.captured.entries, *self.rewritten.entries)
        parts = {tuple(module_path(entry.node).split(".")) for entry in entries}
        modules = {".".join(path[:depth]) for path in parts for depth in range(1, len(path) + 1)}
        if at in modules:
            return ""
        near = difflib.get_close_matches(at, sorted(modules), n=3)
        return f"no operation of this graph is inside {at!r}" + (f"; did you mean {', '.join(near)}?" if near else "")

    def nearest(self, misses: Sequence[Miss]) -> list[str]:
        """For each rule that came near: its nearest misses, those that read alike once, and the number of others."""
        by_rule: defaultdict[str, list[Miss]] = defaultdict(list)
        for miss in misses:
            by_rule[miss.rule].append(miss)
        return [text for group in by_rule.values() for text in self._nearest(group)]

    def _nearest(self, misses: Sequence[Miss]) -> list[str]:
        most = max(miss.nearness for miss in misses)
        if self.hits[misses[0].rule] and 0 < most < _NEAR:
            return []
        nearest = [miss for miss in misses if miss.nearness == most]
        lead = f"nearest miss of {len(misses)}" if len(misses) > 1 else "one miss"
        texts = self._grouped(nearest, lead)
        others = len(misses) - len(nearest)
        return texts + ([f"and {others} less near: report.misses has them"] if others else [])

    def _grouped(self, misses: Iterable[Miss], lead: str) -> list[str]:
        """One text for misses that differ only in the layer they are at."""
        keys = show.Keys(self._printers[0])
        groups: dict[tuple[str, ...], list[Miss]] = {}
        for miss in misses:
            key = (miss.rule, miss.reason, str(miss.nearness), *miss.details(keys.describe))
            groups.setdefault(key, []).append(miss)
        return [_miss_text(group, lead, self._describe(group[0])) for group in groups.values()]

    def _describe(self, miss: Miss) -> list[str]:
        outputs = self._outputs_of(miss.nodes)

        def describe(node: fx.Node) -> str:
            return f"%output ({', '.join(outputs)})" if node.op == "output" and outputs else self._describe_node(node)

        hints = [] if miss.hint else _output_hints(self.signature, outputs)
        return miss.details(describe) + [f"  hint      {hint}" for hint in hints]

    def _outputs_of(self, nodes: Sequence[fx.Node]) -> list[str]:
        """The names of the model's outputs that are among `nodes`: `hidden_states[3]`."""
        names = [*map(_key_text, paths(self.out_spec)), *self.left]
        returned = self.rewritten.entries[-1].args[0]
        return [name for name, value in zip(names, returned, strict=True) if value in nodes]

    def _describe_node(self, node: fx.Node) -> str:
        """A node by its name in `after`, with a quote by that in `before`, or as FX calls it."""
        after, before = self._printers
        if node in after.names:
            return after.describe(node)
        if node not in before.names:  # made by one rule and gone with another
            type = short_type(node.meta.get("val"), after.size)
            return description(f"%{node.name}", type, module_path(node), source_line(node))
        name = before.names[node]
        return before.describe(node).replace(name, f"{name}'", 1)

    @cached_property
    def _printers(self) -> tuple[show.Printer, show.Printer]:
        """Those of `after` and `before`, with the names they hand out."""
        printers = show.Printer(self.rewritten.entries), show.Printer(self.captured.entries)
        for printer in printers:
            printer.lines()
        return printers


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
    made: int = 0  # graphs, with those that made place for others

    @property
    def latest(self) -> GraphReport | None:
        """The report of the graph that was captured last."""
        return next(reversed(self.graphs.values()), None)

    @property
    def hits(self) -> dict[str, int]:
        """How often each rule fired in the latest graph; {} while there is none."""
        return self.latest.hits if self.latest else {}

    @property
    def misses(self) -> list[Miss]:
        """Every place of the latest graph where a rule was tried and did not fire, as data.

        Example::

            [(miss.rule, miss.where, miss.matched, miss.total) for miss in fast.report.misses]
        """
        return self.latest.misses if self.latest else []

    @property
    def before(self) -> str:
        """The latest graph as it was captured, as text: see `fxbt.explain.show.text`."""
        return self.latest.before if self.latest else NOTHING_YET

    @property
    def after(self) -> str:
        """The latest graph as it runs, as text."""
        return self.latest.after if self.latest else NOTHING_YET

    def diff(self) -> str:
        """What each rewrite of the latest graph took out (`-`) and put in (`+`); equal layers are written once.

        Example::

            print(fast.report.diff())
        """
        return self.latest.diff() if self.latest else NOTHING_YET

    def why(self, rule: str, at: str | None = None) -> str:
        """Why `rule` did not fire in the latest graph: its nearest misses, and where it did fire.

        The nearest misses are those that found the largest share of the pattern. Values are named as in `after`, or
        with a quote as in `before` (`%softmax_0'`).

        Args:
            rule: the rule's name, as in `hits`; an unknown one is answered with the known ones.
            at: only places inside this module, e.g. "encoder.layer.3".

        Example::

            print(fast.report.why("attention", at="encoder.layer.3"))
        """
        return self.latest.why(rule, at) if self.latest else NOTHING_YET

    def add_graph(
        self, signature: str, captured: Captured, compiled: Compiled, races: Races | None = None
    ) -> GraphReport:
        """Record a captured graph under its call signature (numbered, should the text occur twice)."""
        self.made += 1
        name = next(n for n in _numbered(signature) if n not in self.graphs)
        self.graphs[name] = GraphReport(
            signature=signature,
            captured=compiled.before,
            rewritten=compiled.after,
            module=compiled.module,
            stages=compiled.stages,
            out_spec=captured.out_spec,
            left=captured.effects.names,
            capture_seconds=captured.seconds,
            rewrite_seconds=compiled.seconds,
            derived_bytes=compiled.derived_bytes,
            peak_bytes=compiled.peak_bytes,
            kernels=compiled.kernels,
            precision=compiled.precision,
            error=compiled.error,
            spilled=compiled.spilled,
            unpadding=compiled.unpadding,
            replays=compiled.replays,
            parts=compiled.parts,
            weights=compiled.weights,
            races=races,
        )
        return self.graphs[name]

    def drop_graph(self, graph: GraphReport) -> None:
        """A graph made place for another, or stood for weights that the model no longer has."""
        self.graphs = {name: other for name, other in self.graphs.items() if other is not graph}

    def add_fallback(self, reason: str) -> None:
        """Record why the original forward ran; each reason once."""
        if reason not in self.fallbacks:
            self.fallbacks.append(reason)

    def __str__(self) -> str:
        dropped = self.made - len(self.graphs)
        title = f"graphs ({dropped} more made place for them)" if dropped else "graphs"
        sections = [(title, _graph_table(dict(self.graphs))), *_latest_sections(self.latest)]
        if self.fallbacks:
            sections.append(("the original forward ran because", _bullets(self.fallbacks)))
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
            f"{graph.capture_seconds:.2f}",
            f"{graph.rewrite_seconds:.2f}",
            f"{graph.derived_bytes / 2**20:.1f}",
            "" if graph.peak_bytes is None else f"{graph.peak_bytes / 2**20:.1f}",
        ]
        for key, graph in graphs.items()
    ]
    return _table(["signature", "nodes", "capture s", "rewrite s", "derived weights MiB", "values MiB"], rows)


def _latest_sections(graph: GraphReport | None) -> list[tuple[str, str]]:
    if graph is None:
        return []
    rows = [[s.name, s.hits, len(s.misses), f"{s.seconds:.2f}"] for s in graph.stages]
    sections = [("stages of the latest graph", _table(["stage", "hits", "near misses", "seconds"], rows))]
    if graph.unpadding:
        counts = [[verdict, count] for verdict, count in graph.unpadding.verdicts().items()]
        sections.append(("padding is dropped; calls of the latest graph", _table(["went", "calls"], counts)))
    sections.append(("batches with values over 32 MiB", _parts_text(graph.parts)))
    if graph.lost:
        sections.append(("calls that the original serves, which was faster than the graph", _table_of(graph.lost)))
    if graph.cuda_graphs:
        title = f"CUDA graphs, {graph.cuda_graph_bytes / 2**20:.1f} MiB of inputs and outputs"
        sections.append((title, _table(["went", "calls"], [list(item) for item in graph.cuda_graphs.items()])))
    if graph.precision is not None and graph.error is not None:
        sections.append(
            ("precision", f"linears in {graph.precision}: outputs off by up to {graph.error:.1e} of their magnitude")
        )
    if graph.spilled is not None:
        sections.append(("weights that only copies are read of (keep_original=False)", _spilled_table(graph.spilled)))
    if graph.kernels:
        sections.append(
            ("kernels, by rows of a linear and tokens of a sequence (each one's time)", _table_of(graph.kernels))
        )
    # What another rule has made part of a larger block since is no loss: `why` tells of it, not the summary.
    fused = {entry.node for stage in graph.stages for rewrite in stage.rewrites for entry in rewrite.removed}
    misses = [miss for miss in graph.misses if not miss.refused and miss.anchor not in fused]
    refused = [miss for miss in graph.misses if miss.refused]
    if nearest := graph.nearest(misses):
        sections.append(("near misses", _first(nearest)))
    if refused:
        sections.append(("rewrites refused by verification", _first(graph._grouped(refused, "refused"))))
    return sections


def _output_hints(signature: str, outputs: Sequence[str]) -> list[str]:
    """What the call may leave out, so that `outputs` are not returned: it asked for them by output_<name>=True."""
    names = [output.partition("[")[0] for output in outputs]
    asked = [flag for flag in _ASKED.findall(signature) if any(name.endswith(flag) for name in names)]
    return [f"output_{flag}=False" for flag in asked]


def _key_text(path: Sequence[Any]) -> str:
    """`attentions[2]` for the keys "attentions" and 2."""
    return "".join(f"[{key.idx}]" if isinstance(key, pytree.SequenceKey) else _key_name(key) for key in path)


def _key_name(key: Any) -> str:
    return str(key.name if isinstance(key, pytree.GetAttrKey) else key.key)


def _first(texts: Sequence[str]) -> str:
    left_out = len(texts) - _SHOWN_MISSES
    more = [f"… and {left_out} more kinds: report.why(rule) has them"] if left_out > 0 else []
    return "\n".join([*texts[:_SHOWN_MISSES], *more])


def _miss_text(group: Sequence[Miss], lead: str, details: Sequence[str]) -> str:
    first = group[0]
    matched = f", {first.matched} of {first.total} matched" if first.total else ""
    reason = [f"  reason    {first.reason}"] if first.reason else []
    return "\n".join(
        [f"{first.rule}: {lead}, at {_places([miss.where for miss in group])}{matched}", *reason, *details]
    )


def _far(misses: Sequence[Miss]) -> str:
    return f"and {len(misses)} places with little of its pattern: report.misses has them"


def _fired(rule: str, places: Sequence[str]) -> str:
    return f"{rule} fired {'once' if len(places) == 1 else f'{len(places)} times'}, at {_places(places)}"


def _places(paths: Sequence[str]) -> str:
    """`encoder.layer.0..11` for a path in repeated layers, else the first path and how many more there are."""
    different = list(dict.fromkeys(path or "the top" for path in paths))
    place = show.common_place(different)
    more = len(different) - 1 if place == different[0] else 0
    return place + (f" and {more} more places" if more > 0 else "")


def _is_inside(where: str, at: str | None) -> bool:
    return not at or where == at or where.startswith(at + ".")


def _parts_text(parts: StageRecord) -> str:
    return "run part after part" if parts.hits else "\n".join(f"run whole: {miss}" for miss in parts.misses)


def _spilled_table(spilled: Spilled) -> str:
    sizes = {"moved to a file": spilled.nbytes, **{f"in memory: {why}": size for why, size in spilled.kept.items()}}
    return _table_of({what: f"{size / 2**20:.1f} MiB" for what, size in sizes.items()})


def _table_of(texts: dict[str, str]) -> str:
    return tabulate(list(texts.items()), tablefmt="plain", disable_numparse=True)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(headers: list[str], rows: list[list[Any]]) -> str:
    return tabulate(rows, headers=headers, disable_numparse=True)
