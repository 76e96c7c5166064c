"""A captured graph's way through the house: `STEPS`, in the order they run. The order is read, not solved."""

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

from .capture.export import Captured
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
from .padding.drop import drop_padding
from .padding.sequences import batch_of
from .padding.without_masks import unmask
from .progress import part
from .rewrite.layout import Order, keep_orders, returned_orders
from .rewrite.outline import inline
from .rewrite.stage import run_stage
from .rewrite.verify import Verifier
from .runtime.compiled import Compiled
from .runtime.parts import InParts
from .runtime.unpadding import Run, Unpadding
from .runtime.unpadding_on_cuda import UnpaddingOnCuda


def default_rules() -> tuple[Rule, ...]:
    """The built-in rules in the order they run: small blocks first, then what is composed of them.

    Example::

        [rule.name for rule in fxbt.default_rules()]  # activation, norm, rotary, attention, qkv, mlp, layers
    """
    import fxbt.patterns as patterns  # the rules import fxbt, so they are met only when asked for

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
    """All rules in the order they run: given and installed ones as early as the blocks in their patterns exist.

    A rule whose pattern names no block comes first: the built-in ones then work on what it leaves.
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
        behind = itertools.takewhile(placed.__contains__, ordered[start:])  # those given keep their order
        ordered.insert(start + len(list(behind)), rule)
        placed.append(rule)
    return tuple(ordered)


@dataclass
class Work:
    """A graph on its way: what each step of `STEPS` finds, and leaves for those after it."""

    captured: Captured
    rules: Sequence[Rule]
    options: Options
    before: Snapshot
    measurements: Measurements  # of the model's kernels
    orders: list[Order | None]  # of the dims of outputs in memory, as captured
    stages: list[StageRecord] = field(default_factory=list)
    assumes: dict[str, torch.Tensor] = field(default_factory=dict)  # constants on whose content a proof rests, by name
    after: Snapshot = field(init=False)
    inlined: fx.GraphModule = field(init=False)
    weights: Weights | None = None  # what programs derive of weights; none with gradients
    recorder: Recorder | None = None  # of CUDA graphs
    dense: Program = field(init=False)
    parts: StageRecord = field(init=False)
    in_parts: Callable[[Run], Run] = lambda run: run
    unpad: Callable[..., Unpadding] | None = None  # what makes an `Unpadding` of a dense program and its weights
    unpadding: Unpadding | None = None

    @classmethod
    def of(cls, captured: Captured, rules: Sequence[Rule], options: Options, measurements: Measurements) -> Work:
        """The graph as it was captured."""
        graph = captured.module.graph
        return cls(captured, rules, options, Snapshot(graph), measurements, returned_orders(graph))

    @property
    def module(self) -> fx.GraphModule:
        """The graph that rules rewrite, in place."""
        return self.captured.module

    def note(self, record: StageRecord) -> None:
        """Keeps the record of a step for the report, and logs it."""
        self.stages.append(record)
        log.stage(record)
        log.graph(record.name, self.module)


def to_canonical_form(work: Work) -> None:
    """One spelling for each meaning."""
    canonicalize(work.module)
    log.graph("canonical", work.module)


def run_rules(work: Work) -> None:
    """Each rule wherever it matches, in order; what is not proven is compared on the example."""
    is_needed = work.options.verify or not all(rule.proven or rule.outline for rule in work.rules)
    verifier = Verifier(work.module, work.captured.example, every=work.options.verify) if is_needed else None
    for rule in work.rules:
        with part("run rules", rule.name):
            work.note(run_stage(work.module, rule, verifier, work.assumes))


def keep_output_strides(work: Work) -> None:
    """Outputs lie in memory as the original's do. The graph is what the report shows from here on."""
    keep_orders(work.module, work.orders)
    work.module.graph.lint()
    work.after = Snapshot(work.module.graph)


def inline_blocks(work: Work) -> None:
    """Blocks become operations again, in a copy, which say what they were a part of."""
    work.inlined = inline(work.module)


def choose_block_lowerings(work: Work) -> None:
    """Blocks that have a lowering of their own get it, where it was measured to be faster."""
    record = None if torch.is_grad_enabled() else choose_lowerings(work.inlined, work.captured.example)
    work.stages += [record] if record else []


def lower_whole(work: Work) -> None:
    """The whole graph as a callable: `lower.program.Program` has the list of what that takes."""
    options = work.options
    work.weights = None if torch.is_grad_enabled() else Weights(_tuner(work))
    work.recorder = Recorder(options.cuda_graphs == "static") if options.cuda_graphs else None
    work.dense = Program(work.inlined, work.assumes, work.weights, options.precision, work.recorder)
    work.stages += [work.dense.epilogues] if work.dense.epilogues else []


def run_in_parts(work: Work) -> None:
    """Programs of the graph run on parts of a large batch, where that is proven to be the same."""
    with _recorded("parts", work.inlined) as work.parts:
        _at_inference(work, "batches are parted")
        _check_effects(work.captured, "batches stay whole")
        if any(tensor.device.type != "cpu" for tensor in work.captured.example):
            raise Miss("batches are parted on a CPU only")
        made = functools.partial(InParts, batch=batch_of(work.inlined.graph), guards=work.captured.guards)
        made(work.dense).check(work.captured.example, work.options.precision is not None)
        work.in_parts = made


def drop_padded_tokens(work: Work) -> None:
    """The graph on valid tokens alone stands beside the whole one, where that is proven to be the same."""
    if work.options.padding != "drop":
        return
    with _recorded("padding", work.inlined) as record:
        weights = _at_inference(work, "padding is dropped")
        _check_effects(work.captured, "padding is kept")
        if work.captured.has_objects:
            raise Miss("values go to an object among the arguments (a KV cache), where a later call may read padding")
        devices = {tensor.device for tensor in work.captured.example}
        if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
            raise Miss("padding is dropped on one CPU or CUDA device only", found=str(sorted(map(str, devices))))
        unpadded = drop_padding(work.inlined)
        unmasked = unmask(work.inlined, unpadded.validities)
        kind = Unpadding if devices == {torch.device("cpu")} else UnpaddingOnCuda
        given: dict[str, Any] = {"unpadded": unpadded, "unmasked": unmasked, "precision": work.options.precision}
        given |= {"recorder": work.recorder, "in_parts": work.in_parts}
        unpad: Callable[..., Unpadding] = functools.partial(kind, **given)
        made = unpad(work.dense, weights=weights)
        made.check(work.captured.example)
        work.unpadding, work.unpad = made, unpad
    work.stages.append(record)


# The way of every graph. Nothing else touches it on its way.
STEPS: tuple[Callable[[Work], None], ...] = (
    to_canonical_form,
    run_rules,
    to_canonical_form,  # of what the rules made
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
    """Takes a captured graph through `STEPS`; `captured.module` is rewritten in place.

    `measurements` are those of the model's kernels.

    Raises:
        RuleError: a rule matches its own results without end.
    """
    start = time.perf_counter()
    options = options or Options()
    work = Work.of(captured, rules, options, measurements or Measurements(options.tune_seconds))
    with log.listening():
        for step in STEPS:
            with part(step.__name__.replace("_", " ")):
                step(work)
    return _compiled(work, start)


def _compiled(work: Work, start: float) -> Compiled:
    weights, precision = work.weights, work.options.precision
    return Compiled(
        run=work.unpadding or work.in_parts(work.dense),
        dense=work.dense,
        unpadding=work.unpadding,
        module=work.module,
        inlined=work.inlined,
        before=work.before,
        after=work.after,
        stages=work.stages,
        parts=work.parts,
        seconds=time.perf_counter() - start,
        stochastic=is_stochastic(work.inlined.graph),
        derived_bytes=weights.nbytes() if weights else 0,
        peak_bytes=work.dense.peak_bytes(*work.captured.example) if weights else None,
        weights=weights,
        recorder=work.recorder,
        precision=precision.name if precision and weights else None,
        again=functools.partial(_again, work) if _may_change_kernels(work) else None,
    )


def _tuner(work: Work) -> Tuner:
    return Tuner(work.measurements, may_wait=_may_change_kernels(work))


def _may_change_kernels(work: Work) -> bool:
    """Whether a graph may be lowered again: it can be compared on any call, and nothing keeps hold of its programs."""
    is_once = bool(work.captured.effects) or is_stochastic(work.inlined.graph)
    is_held = not work.options.keep_original or bool(work.options.cuda_graphs)
    return not (is_once or is_held or torch.is_grad_enabled())


def _again(work: Work) -> Compiled:
    """The same graph by the kernels that are known to be the fastest now; only its programs are made anew."""
    work = copy.copy(work)
    work.stages = list(work.stages)
    lower_whole(work)
    if work.unpadding is not None and work.unpad is not None:
        work.unpadding = work.unpad(work.dense, weights=work.weights)
    return _compiled(work, time.perf_counter())


def _at_inference(work: Work, what: str) -> Weights:
    if work.weights is None:
        raise Miss(f"gradients are enabled; {what} at inference only")
    if is_stochastic(work.inlined.graph):
        raise Miss(f"the graph draws random numbers; {what} at inference only")
    return work.weights


def _check_effects(captured: Captured, what: str) -> None:
    if captured.effects:
        raise Miss(f"forward changes {', '.join(captured.effects.names[:3])} in the model; {what}")


@contextlib.contextmanager
def _recorded(stage: str, module: fx.GraphModule) -> Iterator[StageRecord]:
    """The record of a stage that leaves the graph as it is: a hit, or the Miss that ends it."""
    count = len(module.graph.nodes)
    record = StageRecord(stage, nodes_before=count, nodes_after=count)
    start = time.perf_counter()
    try:
        yield record
        record.places.append("")
    except Exception as error:
        # A fault in here must not cost the dense graph.
        found = f"{type(error).__name__}: {error}"
        miss = error if isinstance(error, Miss) else Miss(f"fxbt itself failed at {stage}", found=found)
        miss.rule = stage
        record.misses.append(miss.without_frames())
    record.seconds = time.perf_counter() - start
