"""The steps of a captured graph: `STEPS` lists them in the order in which they run. No solver reorders them."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .capture.captured import Captured
from .explain import log
from .graph.canonical import canonicalize
from .graph.miss import Miss
from .graph.node import is_stochastic
from .graph.record import Snapshot, StageRecord
from .kernels.autotune import Measurements, Tuner
from .lower.by_block import choose_lowerings
from .lower.cuda.graphs import Recorder
from .lower.derived_weights import Weights
from .lower.program import Program
from .match.rule import Rule, check_rules, installed_rules
from .options import Options
from .padding.drop import Unpadded, drop_padding
from .padding.sequences import Batch, batch_of
from .padding.without_masks import Unmasked, unmask
from .progress import part
from .rewrite.layout import Order, keep_orders, returned_orders
from .rewrite.outline import inline
from .rewrite.stage import run_stage
from .rewrite.verify import Verifier
from .runtime.compiled import Compiled, History
from .runtime.finished import Finished
from .runtime.parts import InParts
from .runtime.unpadding import Run, Unpadding
from .runtime.unpadding_on_cuda import UnpaddingOnCuda
from .runtime.unpadding_with_gradients import UnpaddingWithGradients


def default_rules() -> tuple[Rule, ...]:
    """The built-in rules in the order they run: small blocks first, then the blocks composed of them.

    Example::

        [rule.name for rule in fxbt.default_rules()]  # activation, norm, rotary, attention, qkv, mlp, layers
    """
    import fxbt.patterns as patterns  # the rules import fxbt, so this import cannot stand at the top

    return (
        patterns.Activation(),
        patterns.LayerNorm(),
        patterns.RMSNorm(),
        patterns.Attention(),
        patterns.MergeQKV(),
        patterns.Rotary(),
        patterns.MLP(),
        patterns.DecoderLayer(),
        patterns.EncoderLayer(),
        patterns.ResidualNorm(),
    )


def in_order(given: Sequence[Rule]) -> tuple[Rule, ...]:
    """All rules in the order they run. A given or installed rule runs as soon as the blocks in its pattern can exist.

    A rule whose pattern names no block runs first: the built-in rules then see its result.
    """
    ordered = list(default_rules())
    built_in = [rule.name for rule in ordered]
    check_rules(given, reserved=built_in)
    installed = check_rules(installed_rules(), reserved=[*built_in, *(rule.name for rule in given)])
    placed: list[Rule] = []
    for rule in (*given, *installed):
        ops = rule.formula.ops if hasattr(rule, "pattern") else set()
        made_by = [place for place, earlier in enumerate(ordered) if earlier.makes & ops]
        start = max(made_by, default=-1) + 1
        behind = itertools.takewhile(placed.__contains__, ordered[start:])  # given rules keep their order
        ordered.insert(start + len(list(behind)), rule)
        placed.append(rule)
    return tuple(ordered)


@dataclass
class Work:
    """A graph on its way through `STEPS`, with what each step finds and leaves for later steps."""

    captured: Captured
    rules: Sequence[Rule]
    options: Options
    before: Snapshot
    measurements: Measurements  # of the model's kernels
    orders: list[Order | None]  # the dim order of each output in memory, as captured
    stages: list[StageRecord] = field(default_factory=list)
    assumes: dict[str, torch.Tensor] = field(default_factory=dict)  # by name: constants whose content a proof relies on
    after: Snapshot = field(init=False)
    inlined: fx.GraphModule = field(init=False)
    weights: Weights | None = None  # what programs derive from weights; None with gradients
    recorder: Recorder | None = None  # of CUDA graphs
    dense: Program = field(init=False)
    parts: StageRecord = field(init=False)
    batch: Batch | None = None
    in_parts: Callable[[Run], Run] = lambda run: run
    unpadded: Unpadded | None = None
    unmasked: Unmasked | None = None
    unpad: Callable[..., Unpadding] | None = None  # what makes an `Unpadding` of a dense program and its weights
    unpadding: Unpadding | None = None
    finished: Finished | None = None  # what another process would make programs of

    @classmethod
    def of(cls, captured: Captured, rules: Sequence[Rule], options: Options, measurements: Measurements) -> Work:
        """The graph as captured."""
        graph = captured.module.graph
        return cls(captured, rules, options, Snapshot(graph), measurements, returned_orders(graph))

    @property
    def module(self) -> fx.GraphModule:
        """The graph that rules rewrite in place."""
        return self.captured.module

    def history(self) -> History:
        """What was done, once it is."""
        return History(self.module, self.inlined, self.before, self.after, self.stages, self.parts)

    def note(self, record: StageRecord) -> None:
        """Keeps the record of a step for the report and logs it."""
        self.stages.append(record)
        log.stage(record)
        log.graph(record.name, self.module)


def to_canonical_form(work: Work) -> None:
    """Canonicalisation: one spelling for each meaning."""
    canonicalize(work.module)
    log.graph("canonical", work.module)


def run_rules(work: Work) -> None:
    """Runs each rule in order, wherever it matches. Rewrites without a proof are compared on the example."""
    is_needed = work.options.verify or not all(rule.proven or rule.outline for rule in work.rules)
    verifier = Verifier(work.module, work.captured.example, every=work.options.verify) if is_needed else None
    for rule in work.rules:
        with part("run rules", rule.name):
            work.note(run_stage(work.module, rule, verifier, work.assumes))


def keep_output_strides(work: Work) -> None:
    """Keeps the memory layout of outputs as in the original. The report shows the graph as it is here."""
    keep_orders(work.module, work.orders)
    work.module.graph.lint()
    work.after = Snapshot(work.module.graph)


def inline_blocks(work: Work) -> None:
    """Inlines blocks into operations, in a copy; each operation keeps a note of its block."""
    work.inlined = inline(work.module)


def choose_block_lowerings(work: Work) -> None:
    """Gives blocks their own lowering where it was measured to be faster."""
    record = None if torch.is_grad_enabled() else choose_lowerings(work.inlined, work.captured.example)
    work.stages += [record] if record else []


def lower_whole(work: Work) -> None:
    """Makes the whole graph a callable; `lower.program.Program` lists the steps."""
    options = work.options
    work.weights = None if torch.is_grad_enabled() else Weights(_tuner(work))
    work.recorder = Recorder(options.cuda_graphs == "static") if options.cuda_graphs else None
    work.dense = Program(work.inlined, work.assumes, work.weights, options.precision, work.recorder)
    record = work.dense.epilogues
    work.stages += [record] if record and (record.places or record.misses) else []  # nothing to tell is no stage


def run_in_parts(work: Work) -> None:
    """Runs a large batch in parts, where that is proven to give the same result."""
    with _recorded("parts", work.inlined) as work.parts:
        _at_inference(work, "batches run in parts")
        _check_effects(work.captured, "so batches run whole")
        if any(tensor.device.type != "cpu" for tensor in work.captured.example):
            raise Miss("batches run in parts on a CPU only")
        _run_in_parts(work, batch_of(work.inlined.graph))


def _run_in_parts(work: Work, batch: Batch) -> None:
    made = functools.partial(InParts, batch=batch, guards=work.captured.guards)
    made(work.dense).check(work.captured.example, work.options.precision is not None)
    work.batch, work.in_parts = batch, made


def drop_padded_tokens(work: Work) -> None:
    """Adds a program that computes on valid tokens only (unpadding), where that is proven to give the same result."""
    if work.options.padding != "drop":
        return
    with _recorded("padding", work.inlined) as record:
        if work.weights is not None:
            _draws_nothing(work, "padding is dropped")
        _check_effects(work.captured, "so padding is kept")
        if work.captured.has_objects:
            raise Miss("forward stores values in an argument (a KV cache), where a later call may read padding")
        devices = {tensor.device for tensor in work.captured.example}
        if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
            raise Miss(
                "padding is dropped only if all inputs are on one CPU or CUDA device",
                found=str(sorted(map(str, devices))),
            )
        if work.weights is None and any(device.type != "cpu" for device in devices):
            raise Miss("gradients are enabled; with them, padding is dropped on a CPU only")
        unpadded = drop_padding(work.inlined)
        unmasked = unmask(work.inlined, unpadded.validities)
        _check_assumed(work, {**unpadded.assumes, **unmasked.assumes})
        _run_unpadded(work, unpadded, unmasked)
    work.stages.append(record)


def _run_unpadded(work: Work, unpadded: Unpadded, unmasked: Unmasked) -> None:
    on_cuda = any(tensor.device.type == "cuda" for tensor in work.captured.example)
    given: dict[str, Any] = {"unpadded": unpadded, "unmasked": unmasked, "precision": work.options.precision}
    given |= {"recorder": work.recorder, "in_parts": work.in_parts}
    kind: type[Unpadding] = UnpaddingOnCuda if on_cuda else Unpadding
    if work.weights is None:
        draws = is_stochastic(work.inlined.graph)
        kind, given = UnpaddingWithGradients, {**given, "is_stochastic": draws, "serves": work.captured.guards}
    unpad: Callable[..., Unpadding] = functools.partial(kind, **given)
    made = unpad(work.dense, weights=work.weights)
    made.check(work.captured.example)
    work.unpadded, work.unmasked, work.unpadding, work.unpad = unpadded, unmasked, made, unpad


# Every graph takes exactly these steps.
STEPS: tuple[Callable[[Work], None], ...] = (
    to_canonical_form,
    run_rules,
    to_canonical_form,  # what the rules made
    keep_output_strides,
    inline_blocks,
    choose_block_lowerings,
    lower_whole,
    run_in_parts,
    drop_padded_tokens,
)


def compile(
    captured: Captured,
    rules: Sequence[Rule],
    options: Options | None = None,
    measurements: Measurements | None = None,
) -> Compiled:
    """Takes a captured graph through `STEPS`; rewrites `captured.module` in place.

    `measurements` are those of the model's kernels.

    Raises:
        RuleError: a rule matches its own result without end.
    """
    start = time.perf_counter()
    options = options or Options()
    work = Work.of(captured, rules, options, measurements or Measurements(options.tune_seconds))
    with log.listening():
        for step in STEPS:
            with part(step.__name__.replace("_", " ")):
                step(work)
    work.finished = _finished(work)
    return _compiled(work, start)


def resume(
    captured: Captured,
    finished: Finished,
    options: Options,
    measurements: Measurements,
    tell: Callable[[], History],
) -> Compiled:
    """Makes programs of graphs that another process took through `STEPS`, and checks them on the example as ever.

    Args:
        captured: its module has the inputs alone.
        tell: what takes the captured graph through `STEPS` again, for those who ask what was done.

    Raises:
        Miss: a check on the example fails.
    """
    start = time.perf_counter()
    work = Work.of(captured, (), options, measurements)
    work.inlined, work.assumes, work.finished = finished.dense, dict(finished.assumes), finished
    with part("make programs"):
        lower_whole(work)
        if finished.batch is not None:
            _run_in_parts(work, finished.batch)
        if finished.unpadded is not None and finished.unmasked is not None:
            _run_unpadded(work, finished.unpadded, finished.unmasked)
    return _compiled(work, start, tell)


def _compiled(work: Work, start: float, tell: Callable[[], History] | None = None) -> Compiled:
    weights, precision = work.weights, work.options.precision
    dense, example = work.dense, work.captured.example
    return Compiled(
        run=work.unpadding or work.in_parts(dense),
        dense=dense,
        unpadding=work.unpadding,
        tell=tell or work.history,
        told=None if tell else work.history(),
        seconds=time.perf_counter() - start,
        stochastic=is_stochastic(work.inlined.graph),
        derived_bytes=weights.nbytes() if weights else 0,
        measure=lambda: _peak_bytes(dense, example) if weights else None,
        weights=weights,
        finished=work.finished,
        recorder=work.recorder,
        precision=precision.name if precision and weights else None,
        again=functools.partial(_again, work, tell) if _may_change_kernels(work) else None,
    )


def _finished(work: Work) -> Finished | None:
    """What another process would make programs of: on a CPU, without gradients."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in work.captured.example)
    if not on_cpu or work.weights is None:
        return None
    return Finished.of(work.inlined, work.assumes, work.batch, work.unpadded, work.unmasked)


def _peak_bytes(dense: Program, example: Sequence[torch.Tensor]) -> int:
    with torch.inference_mode(False), torch.no_grad():
        return dense.peak_bytes(*example)


def _tuner(work: Work) -> Tuner:
    return Tuner(work.measurements, may_wait=_may_change_kernels(work))


def _may_change_kernels(work: Work) -> bool:
    """Whether a graph may be lowered again: it can be compared on any call, and nothing keeps hold of its programs."""
    is_once = bool(work.captured.effects) or is_stochastic(work.inlined.graph)
    return not (is_once or work.options.cuda_graphs or torch.is_grad_enabled())


def _again(work: Work, tell: Callable[[], History] | None) -> Compiled:
    """The same graph by the kernels that are known to be the fastest now; only its programs are made anew."""
    work = copy.copy(work)
    work.stages = list(work.stages)
    lower_whole(work)
    if work.unpadding is not None and work.unpad is not None:
        work.unpadding = work.unpad(work.dense, weights=work.weights)
    return _compiled(work, time.perf_counter(), tell)


def _at_inference(work: Work, what: str) -> None:
    if work.weights is None:
        raise Miss(f"gradients are enabled; {what} only under torch.no_grad() or inference_mode()")
    _draws_nothing(work, what)


def _draws_nothing(work: Work, what: str) -> None:
    if is_stochastic(work.inlined.graph):
        raise Miss(f"the graph draws random numbers (dropout in train()?); {what} only without them")


def _check_effects(captured: Captured, what: str) -> None:
    if captured.effects:
        raise Miss(f"forward changes {', '.join(captured.effects.names[:3])} in the model, {what}")


def _check_assumed(work: Work, assumed: dict[str, torch.Tensor]) -> None:
    learned = [name for name, tensor in assumed.items() if tensor.requires_grad]
    if work.weights is None and learned:
        raise Miss(f"a mask is proven by the content of {learned[0]}, which training changes")


@contextlib.contextmanager
def _recorded(stage: str, module: fx.GraphModule) -> Iterator[StageRecord]:
    """The record of a step that leaves the graph as it is: a hit, or the Miss that ended it."""
    count = len(module.graph.nodes)
    record = StageRecord(stage, nodes_before=count, nodes_after=count)
    start = time.perf_counter()
    try:
        yield record
        record.places.append("")
    except Exception as error:
        # A failure here must not cost the dense graph.
        found = f"{type(error).__name__}: {error}"
        miss = error if isinstance(error, Miss) else Miss(f"fxbt itself failed at the step {stage!r}", found=found)
        miss.rule = stage
        record.misses.append(miss.without_frames())
    record.seconds = time.perf_counter() - start
