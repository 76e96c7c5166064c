"""The only editor of graphs for rules: traces a replacement on fake tensors, splices it in, erases the old nodes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..analysis.axes import reduced, size_of
from ..graph.canonical import drop_same_dtype_cast, size_of_another
from ..graph.miss import Miss, module_path
from ..graph.node import writes
from ..graph.record import MADE, RULE, Entry, Rewrite
from ..match.rule import Match, Rule
from ..torch_compat import (
    SIZES_LOG,
    FakeTensor,
    FakeTensorMode,
    GuardOnDataDependentSymNode,
    NeedsGuard,
    free_unbacked_symbols,
    fx_config,
    guards_ignored,
    make_fx,
    statically_known_true,
    without_new_guards,
)
from .layout import ORDER, order_of
from .trace_key import match_key

Verify = Callable[[Rule, Match, list[fx.Node], list[fx.Node]], None]
Traces = dict[Hashable, fx.GraphModule]


def apply(
    module: fx.GraphModule, rule: Rule, match: Match, verify: Verify | None = None, traces: Traces | None = None
) -> Rewrite:
    """Replaces `match` in `module`'s graph by what the rule computes instead; returns the record.

    `verify(rule, match, new_nodes, results)` is called before anything is replaced, and refuses by raising `Miss`.
    `traces` caches the rule's replacements, so that each is traced once for all layers.

    Raises:
        Miss: the replacement has another shape or dtype, needs a shape guard that the graph does not have, cannot be
            placed, or does not verify. The graph is then unchanged.
    """
    graph = module.graph
    place = _place(match)
    traced = _trace_once(rule, match, {} if traces is None else traces)
    new_nodes, results = _splice(graph, traced, match, rule, place)
    try:
        _check_results(match, results)
        if verify is not None:
            verify(rule, match, new_nodes, results)
    except Miss:
        _erase(graph, new_nodes)
        raise
    for old, new in zip(match.outputs, results, strict=True):
        new.meta.setdefault(ORDER, order_of(old))
        old.replace_all_uses_with(new)
    return Rewrite(
        rule.name,
        module_path(match.anchor),
        removed=_erase_dead(graph, match.outputs),
        added=tuple(map(Entry.of, new_nodes)),
        results=tuple(zip(match.outputs, results, strict=True)),
    )


def _place(match: Match) -> fx.Node:
    """The node before which the replacement goes: the first output. Every input must come before it.

    Raises:
        Miss: an input is computed only after the first output.
    """
    first = min(match.outputs)
    for node in match.inputs:
        if node >= first:
            raise Miss("an input of the replacement is computed after its first output", node=node)
    return first


class _NeedsGuard(Miss):
    """A replacement would hold only for some sizes."""


@contextlib.contextmanager
def _without_new_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Refuses what would hold only for some sizes: tracing must not add a guard to the shape environment.

    Raises:
        _NeedsGuard: tracing asked for a guard.
    """
    shape_env = mode.shape_env
    if shape_env is None:
        yield
        return
    log = logging.getLogger(SIZES_LOG)
    level, cached = log.level, mode.cache_enabled
    log.setLevel(logging.ERROR)  # torch logs the refusal, which becomes a Miss here
    mode.cache_enabled = False  # filling the fake tensors' cache asks for guards, too
    try:
        with without_new_guards(shape_env):
            yield
    except (NeedsGuard, GuardOnDataDependentSymNode) as error:
        raise _NeedsGuard(
            "the replacement would hold only for some sizes (it needs a shape guard)", found=str(error).splitlines()[0]
        ) from error
    finally:
        log.setLevel(level)
        mode.cache_enabled = cached


class _KernelByExample(TorchFunctionMode):
    """Answers SDPA's choice of a kernel with the example's sizes; on fake tensors none runs.

    A call of other sizes chooses again. The plain kernel stands in; its result has the shape of two products.
    """

    def __init__(self, mode: FakeTensorMode):
        super().__init__()
        self._shape_env = mode.shape_env

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention or self._shape_env is None:
            return func(*args, **(kwargs or {}))
        with (
            sdpa_kernel(SDPBackend.MATH),
            guards_ignored(self._shape_env),
        ):
            return func(*args, **(kwargs or {}))


def _trace_once(rule: Rule, match: Match, traces: Traces) -> fx.GraphModule:
    key = match_key(match)
    if key in traces:
        return traces[key]
    traced = _trace(rule, match)
    values = [node.meta.get("val") for node in traced.graph.nodes]
    if key is not None and not free_unbacked_symbols(values):  # data-dependent sizes differ from place to place
        traces[key] = traced
    return traced


def _trace(rule: Rule, match: Match) -> fx.GraphModule:
    fakes = [node.meta["val"] for node in match.inputs]
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    if mode is None:
        raise Miss("the match has no tensor input", node=match.anchor)

    def replacement(*tensors: torch.Tensor) -> Any:
        try:
            return rule.results(match, tensors)
        except (NeedsGuard, GuardOnDataDependentSymNode, Miss):
            raise
        except Exception as error:
            raise Miss(f"replace raises {type(error).__name__}: {error}", node=match.anchor) from error

    def trace() -> fx.GraphModule:
        with fx_config.patch(backed_size_oblivious=True), mode, _without_new_guards(mode):  # type: ignore[attr-defined]
            return make_fx(replacement, tracing_mode="real", pre_dispatch=True)(*map(_in_known_sizes, fakes))

    try:
        traced = trace()
    except _NeedsGuard:
        with _KernelByExample(mode):
            traced = trace()
    traced.graph.eliminate_dead_code()
    return traced


def _in_known_sizes(fake: Any) -> Any:
    """A fake tensor that uses one expression for sizes that guards prove equal."""
    if not isinstance(fake, torch.Tensor):
        return fake
    shape, strides = ([_known(size) for size in sizes] for sizes in (fake.shape, fake.stride()))
    same = all(was is now for was, now in zip(fake.shape, shape, strict=True))
    return fake if same else fake.new_empty_strided(shape, strides).requires_grad_(fake.requires_grad)


def _known(size: int | torch.SymInt) -> Any:
    expression = reduced(size)
    if not isinstance(size, torch.SymInt) or expression == size.node.expr:
        return size
    return size.node.shape_env.create_symintnode(expression, hint=size.node.hint)


def _splice(
    graph: fx.Graph, traced: fx.GraphModule, match: Match, rule: Rule, place: fx.Node
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Copies the traced nodes in front of `place`; returns the new nodes, and those that are results."""
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(placeholders, match.inputs, strict=True))
    with graph.inserting_before(place):
        for node in traced.graph.nodes:
            if node.op == "placeholder" or node.op == "output":
                continue
            if node.op == "get_attr":
                raise Miss(
                    "the replacement uses a tensor from outside; write a number, or bind it as a weight of the "
                    "pattern or an input "
                    "of the Match",
                    found=str(node.target),
                )
            copies[node] = copy = graph.node_copy(node, copies.__getitem__)
            copy.meta = provenance(node, match.anchor, rule)
            if (source := drop_same_dtype_cast(copy) or size_of_another(copy)) is not None:
                copies[node] = source
                graph.erase_node(copy)
    (returned,) = next(node for node in traced.graph.nodes if node.op == "output").args
    returned = returned if isinstance(returned, list | tuple) else (returned,)
    copied = dict.fromkeys(copies[node] for node in traced.graph.nodes if node.op == "call_function")
    new_nodes = [node for node in copied if node not in match.inputs]
    return new_nodes, [copies[node] for node in returned]


def provenance(node: fx.Node, anchor: fx.Node, rule: Rule) -> dict[str, Any]:
    """A new node's meta: its own value, and the replaced node's module path and source line."""
    meta: Any = anchor.meta
    kept = {str(key): meta[key] for key in ("nn_module_stack", "stack_trace", "custom") if key in meta}
    return {"val": node.meta.get("val"), MADE: True, RULE: rule.name, **kept}


def _check_results(match: Match, results: list[fx.Node]) -> None:
    if len(results) != len(match.outputs):
        raise Miss(
            f"the replacement returns {len(results)} results for {len(match.outputs)} outputs",
            node=match.anchor,
        )
    for old, new in zip(match.outputs, results, strict=True):
        was, now = old.meta["val"], new.meta["val"]
        same = was.dtype == now.dtype and was.device == now.device and was.dim() == now.dim()
        if not same or not all(_same_size(was, now, dim) for dim in range(was.dim())):
            raise Miss(
                "the replacement has another shape, dtype or device",
                expected=f"{was.dtype}{list(was.shape)} on {was.device}",
                found=f"{now.dtype}{list(now.shape)} on {now.device}",
            )


def _same_size(was: torch.Tensor, now: torch.Tensor, dim: int) -> bool:
    return statically_known_true(was.shape[dim] == now.shape[dim]) or size_of(was, dim) == size_of(now, dim)


def _erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    for node in reversed(nodes):
        graph.erase_node(node)


def _erase_dead(graph: fx.Graph, roots: tuple[fx.Node, ...]) -> tuple[Entry, ...]:
    """Erases the replaced nodes and the nodes that only they used. FX's own pass would keep training dropout."""
    erased: dict[fx.Node, Entry] = {}
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or node.op != "call_function" or writes(node):
            continue
        erased[node] = Entry.of(node)
        waiting.extend(node.all_input_nodes)
        graph.erase_node(node)
    return tuple(erased[node] for node in sorted(erased))
