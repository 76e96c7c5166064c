"""The report on one graph: the rules' hits and misses, the texts before and after, and what its calls did."""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import fx

from ..capture.outputs import paths
from ..graph.miss import Miss, description, module_path, short_type, source_line
from ..graph.record import Snapshot, StageRecord
from ..runtime.cache_use import CacheUse
from ..runtime.compiled import Compiled
from ..runtime.race import Races
from ..torch_compat import pytree
from . import show
from .as_networkx import as_networkx

if TYPE_CHECKING:
    import networkx

_NEAR = 0.25  # of a pattern: where a rule fires elsewhere, a place with less of it is another thing altogether
_ASKED = re.compile(r"\boutput_(\w+)=True")  # what a call asked to be returned: output_attentions=True


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: what the rules did to it and how long that took. Texts are created on access.

    `nodes_before` and `nodes_after` count the lines of the uncollapsed texts: operations, inputs and the return,
    without weights and sizes.

    Example::

        for signature, graph in fast.report.graphs.items():
            print(signature, graph.hits, graph.diff())
    """

    signature: str
    compiled: Compiled
    out_spec: pytree.TreeSpec
    left: list[str]  # what its calls change in the model
    capture_seconds: float
    races: Races | None = None
    is_stored: bool = False  # another process captured it
    use: CacheUse | None = None

    @property
    def captured(self) -> Snapshot:
        """The graph as captured, as records of its nodes."""
        return self.compiled.history.before

    @property
    def rewritten(self) -> Snapshot:
        """The graph after the rules, as records of its nodes."""
        return self.compiled.history.after

    @property
    def module(self) -> fx.GraphModule:
        """The graph after the rules."""
        return self.compiled.module

    @property
    def stages(self) -> list[StageRecord]:
        """What each step did, in the order in which they ran."""
        return self.compiled.stages

    @property
    def rewrite_seconds(self) -> float:
        """The seconds for rewriting and lowering the graph."""
        return self.compiled.seconds

    @property
    def derived_bytes(self) -> int:
        """The bytes of weights derived from the model's own (merged or packed ones)."""
        return self.compiled.derived_bytes

    @property
    def peak_bytes(self) -> int | None:
        """The largest number of bytes that values of the captured call occupy at once; None with gradients."""
        return self.compiled.peak_bytes

    @property
    def kernels(self) -> dict[str, str]:
        """The kernel chosen for each shape of a linear or an attention, with the times that decided it, if any."""
        return self.compiled.kernels

    @property
    def tuning(self) -> str:
        """How many shapes have kernels that were measured here, that came with the package, or by rule.

        Example::

            fast.report.latest.tuning  # "4 measured, 2 by rule; measuring took 0.61 of 2 s"
        """
        return str(self.compiled.weights.tuner) if self.compiled.weights and self.kernels else ""

    @property
    def parts(self) -> StageRecord:
        """A hit if large batches run in parts, else the miss that says why not."""
        return self.compiled.history.parts

    @property
    def precision(self) -> str | None:
        """The precision of linear layers ("bfloat16", "int8") if `dtype` or `quantize` changed it, else None."""
        return self.compiled.precision

    @property
    def error(self) -> float | None:
        """The largest difference that `precision` made on the captured call, relative to the output's largest value."""
        return self.compiled.error

    @property
    def step(self) -> str:
        """ "prefill" for calls that start a KV cache, "decode" for calls that continue one; "" without a cache.

        Example::

            {graph.step: graph.tokens for graph in fast.report.graphs.values()}  # {'prefill': 64, 'decode': 512}
        """
        return self.use.step if self.use else ""

    @property
    def tokens(self) -> int:
        """The number of tokens, of all sequences, in the graph's calls with a KV cache."""
        return self.use.tokens if self.use else 0

    @property
    def cache_bytes(self) -> int:
        """The bytes of KV caches in use that the graph lengthens in place, including their free room."""
        return self.use.nbytes if self.use else 0

    @property
    def rounds(self) -> int:
        """A write to a weight that PyTorch does not count is seen within this many calls; 0 if no weight is derived.

        Example::

            fast.report.latest.rounds  # 512
        """
        weights = self.compiled.weights
        return weights.rounds if weights else 0

    @property
    def before(self) -> str:
        """The graph as captured: see `fxbt.explain.show.text`."""
        return show.text(self.captured)

    @property
    def after(self) -> str:
        """The graph as it runs: see `fxbt.explain.show.text`."""
        return show.text(self.rewritten)

    @property
    def hits(self) -> dict[str, int]:
        """How often each rule matched."""
        return self.compiled.hits

    @property
    def misses(self) -> list[Miss]:
        """Every place where a rule was tried and did not match, in the order of the stages and of the graph."""
        return self.compiled.misses

    @property
    def nodes_before(self) -> int:
        """The number of lines of the captured graph's uncollapsed text."""
        return len(self._printers[1].printed)

    @property
    def nodes_after(self) -> int:
        """The number of lines of the rewritten graph's uncollapsed text."""
        return len(self._printers[0].printed)

    @property
    def calls(self) -> dict[str, int]:
        """How many calls ran "packed" (unpadded), "dense" (nothing was padded), or dense for a reason, by that reason.

        Empty if the graph cannot drop padding.

        Example::

            fast.report.latest.calls  # {'packed': 12, 'dense': 3, 'position 0 is read, and a row has padding there': 1}
        """
        unpadding = self.compiled.unpadding
        return dict(unpadding.calls) if unpadding else {}

    @property
    def cuda_graphs(self) -> dict[str, int]:
        """How many calls `cuda_graphs=True` recorded and replayed, and why others were not, including fxbt's own calls.

        Example::

            fast.report.latest.cuda_graphs  # {'of a new shape': 2, 'recorded': 2, 'replayed': 40}
        """
        return dict(sum((replay.calls for replay in self.compiled.replays), Counter()))

    @property
    def fused_regions(self) -> dict[str, str]:
        """The steps that run as one kernel on a CUDA device: "compiled" once they were called, or why they are not.

        Example::

            fast.report.latest.fused_regions  # {'add, layer_norm': 'compiled', 'silu, mul': 'not called yet'}
        """
        regions = [region for program in self.compiled.programs for region in program.regions]
        return {region.steps: region.state for region in regions}

    @property
    def cuda_graph_bytes(self) -> int:
        """The bytes of device memory that recordings hold for their inputs and outputs."""
        return sum(replay.nbytes for replay in self.compiled.replays)

    @property
    def lost(self) -> dict[str, str]:
        """The call sizes that the original serves because it was clearly faster, with the evidence.

        Example::

            fast.report.latest.lost  # {'64 to 127 elements': '12 of 12 pairs, 3.1 ms against 2.2 ms'}
        """
        return self.races.lost() if self.races else {}

    def diff(self) -> str:
        """What each rewrite removed and added, equal rewrites once: see `fxbt.explain.show.blocks`.

        Example::

            print(fast.report.graphs[signature].diff())
        """
        rewrites = [rewrite for stage in self.stages for rewrite in stage.rewrites]
        return show.blocks(rewrites, dict(self._printers[1].symbols))

    def networkx(self) -> networkx.DiGraph:
        """The graph as it runs, for https://networkx.org: a node for each operation, input and weight.

        A node has `op` ("sdpa", "placeholder", ...), `module` (the path of its module), `rule` (the one that made it,
        or ""), `shape` (a tuple of ints and symbols; None if it is not a tensor) and `dtype`. An edge goes from a
        value to its reader; `arguments` are its positions there.

        Example::

            graph = fast.report.latest.networkx()
            attentions = [name for name, node in graph.nodes(data=True) if node["op"] == "sdpa"]
            networkx.ancestors(graph, attentions[0])  # everything it is computed from
        """
        return as_networkx(self.module.graph)

    def why(self, rule: str, at: str | None = None) -> str:
        """Why `rule` did not match in this graph: see `Report.why`."""
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
        elsewhere = f"; it fired {self.hits[rule]} times elsewhere" if at else ""
        return "\n".join(parts) or f"{rule} found no op to start from{f' at {at}' if at else ''}{elsewhere}"

    def _unknown_place(self, at: str) -> str:
        """A sentence saying so, if no operation of the graph is inside module `at`; else ""."""
        entries = (*self.captured.entries, *self.rewritten.entries)
        parts = {tuple(module_path(entry.node).split(".")) for entry in entries}
        modules = {".".join(path[:depth]) for path in parts for depth in range(1, len(path) + 1)}
        if at in modules:
            return ""
        near = difflib.get_close_matches(at, sorted(modules), n=3)
        return f"no operation of this graph is inside {at!r}" + (f"; did you mean {', '.join(near)}?" if near else "")

    def nearest(self, misses: Sequence[Miss]) -> list[str]:
        """For each rule that came near: its nearest misses, without repetition, and the number of others."""
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
        texts = self.grouped(nearest, lead)
        others = len(misses) - len(nearest)
        return texts + ([f"and {others} that matched less: see report.misses"] if others else [])

    def grouped(self, misses: Iterable[Miss], lead: str) -> list[str]:
        """One text for misses that differ only in their layer."""
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
        """The names of the model's outputs among `nodes`, such as `hidden_states[3]`."""
        names = [*map(_key_text, paths(self.out_spec)), *self.left]
        returned = self.rewritten.entries[-1].args[0]
        return [name for name, value in zip(names, returned, strict=True) if value in nodes]

    def _describe_node(self, node: fx.Node) -> str:
        """A node by its name in `after`, by its quoted name in `before`, or by its FX name."""
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
        """The printers of `after` and `before`, with the names they assign."""
        printers = show.Printer(self.rewritten.entries), show.Printer(self.captured.entries)
        for printer in printers:
            printer.lines()
        return printers


def _output_hints(signature: str, outputs: Sequence[str]) -> list[str]:
    """The arguments that would leave `outputs` out, if the call asked for them with output_<name>=True."""
    names = [output.partition("[")[0] for output in outputs]
    asked = [flag for flag in _ASKED.findall(signature) if any(name.endswith(flag) for name in names)]
    return [f"output_{flag}=False" for flag in asked]


def _key_text(path: Sequence[Any]) -> str:
    """`attentions[2]` for the keys "attentions" and 2."""
    return "".join(f"[{key.idx}]" if isinstance(key, pytree.SequenceKey) else _key_name(key) for key in path)


def _key_name(key: Any) -> str:
    return str(key.name if isinstance(key, pytree.GetAttrKey) else key.key)


def _miss_text(group: Sequence[Miss], lead: str, details: Sequence[str]) -> str:
    first = group[0]
    matched = f", {first.matched} of {first.total} matched" if first.total else ""
    reason = [f"  reason    {first.reason}"] if first.reason else []
    return "\n".join(
        [f"{first.rule}: {lead}, at {_places([miss.where for miss in group])}{matched}", *reason, *details]
    )


def _far(misses: Sequence[Miss]) -> str:
    return f"and {len(misses)} places that match little of its pattern: see report.misses"


def _fired(rule: str, places: Sequence[str]) -> str:
    return f"{rule} fired {'once' if len(places) == 1 else f'{len(places)} times'}, at {_places(places)}"


def _places(paths: Sequence[str]) -> str:
    """`encoder.layer.0..11` for paths in repeated layers, else the first path and how many more there are."""
    different = list(dict.fromkeys(path or "the top" for path in paths))
    place = show.common_place(different)
    more = len(different) - 1 if place == different[0] else 0
    return place + (f" and {more} more places" if more > 0 else "")


def _is_inside(where: str, at: str | None) -> bool:
    return not at or where == at or where.startswith(at + ".")
