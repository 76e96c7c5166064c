"""A captured graph's way through the house: canonical form, rules in order, lowering. The order is read, not solved."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from .capture.export import Captured
from .explain import log
from .graph.canonical import canonicalize
from .graph.miss import Miss
from .graph.node import is_stochastic
from .graph.record import Snapshot, StageRecord
from .lower.by_block import choose_lowerings
from .lower.cuda.graphs import Recorder
from .lower.derived_weights import Weights
from .lower.program import Program
from .match.rule import Rule, check_rules, installed_rules
from .options import Options
from .padding.drop import drop_padding
from .padding.sequences import batch_of
from .padding.without_masks import unmask
from .rewrite.layout import keep_orders, returned_orders
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


def compile(captured: Captured, rules: Sequence[Rule], options: Options | None = None) -> Compiled:
    """Canonicalize `captured.module`, run `rules` over it in order, drop padding, and lower it to a callable."""
    with log.listening():
        return _compile(captured, rules, options or Options())


def _compile(captured: Captured, rules: Sequence[Rule], options: Options) -> Compiled:
    start = time.perf_counter()
    module = captured.module
    before, orders = Snapshot(module.graph), returned_orders(module.graph)
    canonicalize(module)
    log.graph("canonical", module)
    is_needed = options.verify or not all(rule.proven or rule.outline for rule in rules)
    verifier = Verifier(module, captured.example, every=options.verify) if is_needed else None
    assumes: dict[str, torch.Tensor] = {}
    stages = [_logged(run_stage(module, rule, verifier, assumes), module) for rule in rules]
    canonicalize(module)
    keep_orders(module, orders)
    module.graph.lint()
    after = Snapshot(module.graph)
    flat = inline(module)
    weights = None if torch.is_grad_enabled() else Weights()
    lowerings = choose_lowerings(flat, captured.example) if weights is not None else None
    stages += [lowerings] if lowerings else []
    recorder = Recorder(options.cuda_graphs == "static") if options.cuda_graphs else None
    program = Program(flat, assumes, weights, options.precision, recorder)
    parts, in_parts = _parts(flat, program, weights, captured, options)
    unpadding = None
    if options.padding == "drop":
        record, unpadding = _drop_padding(flat, program, weights, captured, options, in_parts, recorder)
        stages.append(record)
    return Compiled(
        run=unpadding or in_parts(program),
        dense=program,
        unpadding=unpadding,
        module=module,
        inlined=flat,
        before=before,
        after=after,
        stages=stages,
        parts=parts,
        seconds=time.perf_counter() - start,
        stochastic=is_stochastic(flat.graph),
        derived_bytes=weights.nbytes() if weights else 0,
        peak_bytes=program.peak_bytes(*captured.example) if weights else None,
        kernels=program.kernels,
        weights=weights,
        precision=options.precision.name if options.precision and weights else None,
    )


def _logged(stage: StageRecord, module: fx.GraphModule) -> StageRecord:
    log.stage(stage)
    log.graph(stage.name, module)
    return stage


def _drop_padding(
    module: fx.GraphModule,
    dense: Program,
    weights: Weights | None,
    captured: Captured,
    options: Options,
    in_parts: Callable[[Run], Run],
    recorder: Recorder | None,
) -> tuple[StageRecord, Unpadding | None]:
    """The graph without padding beside the dense one, where that is proven."""
    unpadding = None
    with _recorded("padding", module) as record:
        weights = _at_inference(module, weights, "padding is dropped")
        _check_effects(captured, "padding is kept")
        if captured.has_objects:
            raise Miss("values go to an object among the arguments (a KV cache), where a later call may read padding")
        devices = {tensor.device for tensor in captured.example}
        if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
            raise Miss("padding is dropped on one CPU or CUDA device only", found=str(sorted(map(str, devices))))
        unpadded = drop_padding(module)
        unmasked = unmask(module, unpadded.validities)
        kind = Unpadding if devices == {torch.device("cpu")} else UnpaddingOnCuda
        made = kind(dense, unpadded, unmasked, weights, options.precision, recorder=recorder, in_parts=in_parts)
        made.check(captured.example)
        unpadding = made
    return record, unpadding


def _parts(
    module: fx.GraphModule,
    program: Program,
    weights: Weights | None,
    captured: Captured,
    options: Options,
) -> tuple[StageRecord, Callable[[Run], Run]]:
    """What makes programs of the graph run on parts of a large batch, where that is proven to be the same."""
    in_parts: Callable[[Run], Run] = _whole
    with _recorded("parts", module) as record:
        _at_inference(module, weights, "batches are parted")
        _check_effects(captured, "batches stay whole")
        if any(tensor.device.type != "cpu" for tensor in captured.example):
            raise Miss("batches are parted on a CPU only")
        made = functools.partial(InParts, batch=batch_of(module.graph), guards=captured.guards)
        made(program).check(captured.example, options.precision is not None)
        in_parts = made
    return record, in_parts


def _whole(run: Run) -> Run:
    return run


def _at_inference(module: fx.GraphModule, weights: Weights | None, what: str) -> Weights:
    if weights is None:
        raise Miss(f"gradients are enabled; {what} at inference only")
    if is_stochastic(module.graph):
        raise Miss(f"the graph draws random numbers; {what} at inference only")
    return weights


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
