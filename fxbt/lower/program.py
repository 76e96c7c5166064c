"""From the rewritten graph to a callable: weights bound once, what only depends on weights computed once.

Weights become plain arguments (no attribute chain per call), ATen ops that have a direct torch binding are called
through it (about 1 us instead of 5), and without gradients every value computed from weights alone (a merged QKV
weight, say) is kept and refreshed when a source changes.
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

    `assumes` are the constants, by name, on whose content its proofs rest.

    Values derived from weights alone are kept in `weights`, if they are given: the programs of one model that are
    made with the same object share them. `kernels` says for each shape of a linear which kernel was chosen. With
    `precision`, linears compute in it. With a `recorder`, calls without gradients go through `replay`.

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
        self.kernels: dict[str, str] = weights.tuner.answers if weights is not None else {}
        self.epilogues, self.regions = draft.epilogues, draft.regions
        self._places, self._derived = draft.places, weights if draft.places else None
        self._weights = draft.weights
        if weights is not None:
            weights.note_read(self._weights)
        self._graph = draft.graph if draft.one_by_one is None else draft.one_by_one
        self.run = self._run = compile_graph(draft.graph)
        self.replay: Replay | None = None
        if recorder is not None and weights is not None:
            self._run = self.replay = Replay(self.run, self.count, recorder, self.obstacle)

    def __call__(self, *tensors: Any) -> tuple[Any, ...]:
        self.check_assumptions()
        return self._run(*tensors, *self.bound())

    def check_assumptions(self) -> None:
        """Raises RuntimeError where a constant is not what it was when the graph was proven on it."""
        self._assumptions.check()

    def can_rebind(self, pairs: Mapping[int, torch.Tensor]) -> bool:
        """Whether what was proven holds with the tensors that `pairs` puts in the places of others (by their id)."""
        return self._assumptions.can_rebind(pairs)

    def rebind(self, pairs: Mapping[int, torch.Tensor]) -> None:
        """Reads those tensors from now on; its `weights` are rebound apart, as other programs share them."""
        self._assumptions.rebind(pairs)
        self._weights = [pairs.get(id(weight), weight) for weight in self._weights]
        if self.replay is not None:
            self.replay.forget()

    def peak_bytes(self, *tensors: Any) -> int:
        """The most memory that values hold at once in such a call, besides inputs and weights."""
        return peak_bytes(self._graph, [*tensors, *self.bound()])

    def bound(self) -> list[torch.Tensor]:
        """What `run` takes behind the inputs: values derived of weights, and weights, as they are now."""
        if self._derived is None:
            return self._weights
        values = self._derived.current()
        return [*[values[place] for place in self._places], *self._weights]
