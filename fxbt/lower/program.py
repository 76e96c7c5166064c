"""Turns a rewritten graph into a callable: binds weights once, and computes derived weights once.

Weights become plain arguments (no attribute chain per call), ATen ops with a direct torch binding are called through it
(about 1 us instead of 5), and without gradients every value that depends only on weights (such as a merged QKV weight)
is kept, and computed again when a weight changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..graph.node import attribute
from ..graph.record import StageRecord, is_made
from ..kernels.differentiable import attention_with_gradient
from .assumptions import Assumptions
from .bindings import BINDINGS
from .by_block import lower_blocks
from .codegen import compile_graph
from .cpu.attention import attend_fast
from .cpu.chain import chained
from .cpu.linears import choose_linears
from .cpu.precision import Precision, narrow_linears
from .cuda.graphs import Recorder, Replay, obstacle
from .cuda.pointwise import FusedRegion, fuse_pointwise
from .derived_weights import Weights, weight_only
from .growing_caches import append_in_place
from .memory import peak_bytes
from .once import look_up_once, make_masks_once, split_heads_once
from .recompute import recomputing

aten = torch.ops.aten


class Program:
    """A rewritten graph as a thread-safe callable: `program(*tensors) -> tuple of outputs`.

    Args:
        assumes: the constants, by name, on whose content its proofs depend.
        weights: keeps values derived from weights; programs of one model made with the same object share them.
        precision: linear layers compute in it.
        recorder: calls without gradients then go through `replay`.


    Example:
        >>> weights = Weights()
        >>> dense, packed = (Program(module, assumes, weights) for module in (module, without_padding))
    """

    def __init__(
        self,
        module: fx.GraphModule,
        assumes: Mapping[str, torch.Tensor],
        weights: Weights | None,
        precision: type[Precision] | None = None,
        recorder: Recorder | None = None,
    ):
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        self._assumptions = Assumptions(assumes)
        self.epilogues: StageRecord | None = None
        self._derived: Weights | None = None
        prepared = lower_blocks(graph) if weights is not None else []
        self.count = len(graph.find_nodes(op="placeholder"))
        self.obstacle = obstacle(graph)  # to recording it as a CUDA graph
        if weights is not None:
            self._derive(module, graph, weights, precision, prepared)
        self._weights = _bind_weights(module, graph)
        self.regions: list[FusedRegion] = []
        if weights is not None:
            weights.note_read(self._weights)
            if self.obstacle is None:  # to computing only on a CUDA device
                graph, self.regions = fuse_pointwise(graph)
        for node in graph.nodes:
            node.target = _binding(node) if node.op == "call_function" else node.target
        self._graph = graph
        self.run = self._run = compile_graph(recomputing(graph) if weights is None else chained(graph, weights.tuner))
        self.replay: Replay | None = None
        if recorder is not None and weights is not None:
            self._run = self.replay = Replay(self.run, self.count, recorder, self.obstacle)

    def _derive(
        self,
        module: fx.GraphModule,
        graph: fx.Graph,
        weights: Weights,
        precision: type[Precision] | None,
        prepared: list[fx.Node],
    ) -> None:
        """Lowers the graph for running without gradients; what depends only on weights moves to `weights`."""
        constant = weight_only(module, graph)
        of_weights = [node for node in prepared if node.all_input_nodes and constant.issuperset(node.all_input_nodes)]
        constant.update(of_weights)
        look_up_once(graph, constant)
        if precision is None:
            self.epilogues = choose_linears(graph, constant, weights.tuner)
        else:
            self.epilogues = narrow_linears(precision, graph, constant)
        attend_fast(graph, weights.tuner)
        make_masks_once(graph)
        split_heads_once(graph)
        append_in_place(graph)
        self._places = weights.add(module, graph, constant)
        self._derived = weights if self._places else None

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        self.check_assumptions()
        return self._run(*tensors, *self.bound())

    def check_assumptions(self) -> None:
        """Raises RuntimeError if a constant changed after the graph was proven."""
        self._assumptions.check()

    def can_rebind(self, pairs: Mapping[int, torch.Tensor]) -> bool:
        """Whether the proofs hold with the tensors in `pairs`, which replace others (by their id)."""
        return self._assumptions.can_rebind(pairs)

    def rebind(self, pairs: Mapping[int, torch.Tensor]) -> None:
        """From now on reads these tensors; its `weights` are rebound separately, because other programs share them."""
        self._assumptions.rebind(pairs)
        self._weights = [pairs.get(id(weight), weight) for weight in self._weights]
        if self.replay is not None:
            self.replay.forget()

    def peak_bytes(self, *tensors: Any) -> int:
        """The largest number of bytes that values occupy at once in such a call, besides inputs and weights."""
        return peak_bytes(self._graph, [*tensors, *self.bound()])

    def bound(self) -> list[torch.Tensor]:
        """The arguments of `run` after the inputs: derived values and weights, as they are now."""
        if self._derived is None:
            return self._weights
        values = self._derived.current()
        return [*[values[place] for place in self._places], *self._weights]


def _binding(node: fx.Node) -> Any:
    is_attention = node.target is aten.scaled_dot_product_attention.default
    if is_attention and is_made(node) and torch.is_grad_enabled():
        return attention_with_gradient
    return BINDINGS.get(node.target, node.target)


def _bind_weights(module: fx.GraphModule, graph: fx.Graph) -> list[torch.Tensor]:
    """Turns get_attr nodes into trailing placeholders; returns the tensors to pass there."""
    weights: list[torch.Tensor] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        weights.append(attribute(module, node))
        with graph.inserting_after(last[0]) if last else graph.inserting_before():
            argument = graph.placeholder(f"weight_{node.name}")
        argument.meta = dict(node.meta)
        node.replace_all_uses_with(argument)
        graph.erase_node(node)
        last = [argument]
    return weights
