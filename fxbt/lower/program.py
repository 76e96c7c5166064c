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

from ..graph.node import copy_of
from .assumptions import Assumptions
from .codegen import compile_graph
from .cpu.precision import Precision
from .cuda.graphs import Recorder, Replay, obstacle
from .derived_weights import Weights
from .memory import peak_bytes
from .steps import AT_INFERENCE, WITH_GRADIENTS, Draft, lower


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
        graph, _ = copy_of(module.graph)
        self._assumptions = Assumptions(assumes)
        self.count = len(graph.find_nodes(op="placeholder"))
        self.obstacle = obstacle(graph)  # to recording it as a CUDA graph
        draft = Draft(module, graph, weights, precision)
        lower(draft, WITH_GRADIENTS if weights is None else AT_INFERENCE)
        self.epilogues, self.regions = draft.epilogues, draft.regions
        self._places, self._derived = draft.places, weights if draft.places else None
        self._weights = draft.weights
        self._graph = draft.graph if draft.one_by_one is None else draft.one_by_one
        self.run = self._run = compile_graph(draft.graph)
        self.replay: Replay | None = None
        if recorder is not None and weights is not None:
            self._run = self.replay = Replay(self.run, self.count, recorder, self.obstacle)

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
