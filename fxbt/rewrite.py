"""The only editor of graphs for rules: trace the replacement on fake tensors, splice it in, erase what it replaces."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import _ShapeEnvGuardError, statically_known_true

from .canonical import writes
from .rule import Match, Miss, Rule

Verify = Callable[[Match, list[fx.Node], list[fx.Node]], None]


def apply(module: fx.GraphModule, rule: Rule, match: Match, verify: Verify | None = None) -> list[fx.Node]:
    """Replace `match` in `module`'s graph by what the rule computes instead; returns the nodes erased.

    `verify(match, new_nodes, results)` is called before anything is replaced, and refuses by raising `Miss`.

    Raises:
        Miss: the replacement has another shape or dtype, needs a shape guard that the graph does not have, cannot be
            placed, or does not verify. The graph is then as it was.
    """
    graph = module.graph
    place = _place(graph, match)
    traced = _trace(rule, match)
    new_nodes, results = _splice(graph, traced, match, rule, place)
    try:
        _check_results(match, results)
        if verify is not None:
            verify(match, new_nodes, results)
    except Miss:
        _erase(graph, new_nodes)
        raise
    for old, new in zip(match.outputs, results, strict=True):
        old.replace_all_uses_with(new)
    return _erase_dead(graph, match.outputs)


def _place(graph: fx.Graph, match: Match) -> fx.Node:
    """The node before which the replacement goes: the first output. Every input must stand before it.

    Raises:
        Miss: an input is computed only after the first output.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    first = min(match.outputs, key=order.__getitem__)
    for node in match.inputs:
        if order[node] >= order[first]:
            raise Miss("an input of the replacement is computed after its first output", node=node)
    return first


@contextlib.contextmanager
def _without_new_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Refuse what would only hold for some sizes: tracing must add no guard to the shape environment.

    Raises:
        Miss: a guard was asked for.
    """
    shape_env = mode.shape_env
    if shape_env is None:
        yield
        return
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, cached = log.level, mode.cache_enabled
    log.setLevel(logging.ERROR)  # torch warns of the refusal that is reported as a Miss here
    mode.cache_enabled = False  # filling the fake tensors' cache asks for guards of its own
    try:
        with shape_env.error_on_new_guards():
            yield
    except _ShapeEnvGuardError as error:
        raise Miss("the replacement needs a guard on sizes", found=str(error)) from error
    finally:
        log.setLevel(level)
        mode.cache_enabled = cached


def _trace(rule: Rule, match: Match) -> fx.GraphModule:
    fakes = [node.meta["val"] for node in match.inputs]
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, torch._subclasses.FakeTensor)), None)
    if mode is None:
        raise Miss("the match has no tensor input", node=match.anchor)

    def replacement(*tensors: torch.Tensor) -> Any:
        return rule.replace(match.facts, *tensors)

    with fx_config.patch(backed_size_oblivious=True), mode, _without_new_guards(mode):  # type: ignore[attr-defined]
        return make_fx(replacement, tracing_mode="real", pre_dispatch=True)(*fakes)


def _splice(
    graph: fx.Graph, traced: fx.GraphModule, match: Match, rule: Rule, place: fx.Node
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Copy the traced nodes in front of `place`: the new nodes, and those that are the replacement's results."""
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(placeholders, match.inputs, strict=True))
    with graph.inserting_before(place):
        for node in traced.graph.nodes:
            if node.op == "placeholder" or node.op == "output":
                continue
            if node.op == "get_attr":
                raise Miss("the replacement captures a tensor; hand it over in Match.inputs", found=str(node.target))
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = _provenance(node, match.anchor, rule)
    (returned,) = next(node for node in traced.graph.nodes if node.op == "output").args
    returned = returned if isinstance(returned, list | tuple) else (returned,)
    new_nodes = [copies[node] for node in traced.graph.nodes if node.op == "call_function"]
    return new_nodes, [copies[node] for node in returned]


def _provenance(node: fx.Node, anchor: fx.Node, rule: Rule) -> dict[str, Any]:
    """A new node's meta: its own value, the module path and source line of what it replaces, and the rule's name."""
    meta: Any = anchor.meta
    kept = {str(key): meta[key] for key in ("nn_module_stack", "stack_trace") if key in meta}
    return {"val": node.meta.get("val"), "fxbt_rule": rule.name, **kept}


def _check_results(match: Match, results: list[fx.Node]) -> None:
    if len(results) != len(match.outputs):
        raise Miss(
            f"the replacement gives {len(results)} results for {len(match.outputs)} outputs",
            node=match.anchor,
        )
    for old, new in zip(match.outputs, results, strict=True):
        was, now = old.meta["val"], new.meta["val"]
        same = was.dtype == now.dtype and was.device == now.device and was.dim() == now.dim()
        if not same or not all(statically_known_true(a == b) for a, b in zip(was.shape, now.shape, strict=True)):
            raise Miss(
                "the replacement has another shape, dtype or device",
                expected=f"{was.dtype}{list(was.shape)} on {was.device}",
                found=f"{now.dtype}{list(now.shape)} on {now.device}",
            )
        if any(user.op == "output" for user in old.users) and was.is_contiguous() and not now.is_contiguous():
            raise Miss("the model returns this value contiguous, the replacement does not", node=old)


def _erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    for node in reversed(nodes):
        graph.erase_node(node)


def _erase_dead(graph: fx.Graph, roots: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Erase the replaced nodes and what only they used. Explicitly: FX's own pass keeps training dropout."""
    erased, waiting = [], list(roots)
    while waiting:
        node = waiting.pop()
        if node in erased or node.users or node.op != "call_function" or writes(node):
            continue
        sources = node.all_input_nodes
        graph.erase_node(node)
        erased.append(node)
        waiting.extend(sources)
    return erased
