"""`Compiled`: a graph ready to run, with the record of its making."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.miss import Miss
from ..graph.record import Snapshot, StageRecord, hits_of
from ..lower.cuda.graphs import Recorder, Replay
from ..lower.derived_weights import Weights
from ..lower.program import Program
from ..lower.spill import Spilled
from .unpadding import Unpadding


@dataclass
class Compiled:
    """A graph ready to run, and the record of its making."""

    run: Callable[..., tuple[Any, ...]]
    dense: Program
    unpadding: Unpadding | None  # `run`, if it can drop padding
    module: fx.GraphModule
    inlined: fx.GraphModule  # the graph that was lowered; misses name its nodes
    before: Snapshot
    after: Snapshot
    stages: list[StageRecord]
    parts: StageRecord  # whether large batches can run in parts
    seconds: float
    stochastic: bool
    derived_bytes: int
    peak_bytes: int | None  # bytes of the captured call's values, without gradients
    weights: Weights | None  # derived weights of the programs, without gradients
    recorder: Recorder | None = None  # of CUDA graphs, if requested
    precision: str | None = None  # of linear layers, if not the model's own
    error: float | None = None  # of the outputs against the original's, in another precision
    spilled: Spilled | None = None  # what was moved from memory to a file
    again: Callable[[], Compiled] | None = None  # compiles it again with the kernels known to be fastest by then

    @property
    def serve(self) -> Callable[..., tuple[Any, ...]]:
        """`run` for a caller's call."""
        return self.recorder.serving(self.run) if self.recorder else self.run

    @property
    def kernels(self) -> dict[str, str]:
        """The kernel of each shape, and on what ground."""
        return self.weights.tuner.answers if self.weights else {}

    @property
    def is_behind(self) -> bool:
        """Whether kernels were measured that it has not looked at."""
        return self.again is not None and self.weights is not None and self.weights.tuner.is_behind

    def has_news(self) -> bool:
        """Whether what was measured makes another choice of kernels; looks at it once."""
        has_news = self.weights is not None and self.weights.tuner.has_news()
        if not has_news and self.weights and self.weights.tuner.is_final:
            self.again = None
        return has_news

    def take(self, other: Compiled) -> None:
        """Runs from now on as `other` does, which is the same graph by other kernels."""
        if self.unpadding is not None and other.unpadding is not None:
            other.unpadding.goes_on_for(self.unpadding)
        for name in ("dense", "unpadding", "weights", "derived_bytes", "peak_bytes", "error", "again", "run"):
            setattr(self, name, getattr(other, name))

    @property
    def hits(self) -> dict[str, int]:
        """How often each rule matched."""
        return hits_of(self.stages)

    @property
    def misses(self) -> list[Miss]:
        """All misses of all stages."""
        return [miss for stage in self.stages for miss in stage.misses]

    @property
    def programs(self) -> list[Program]:
        """All programs that run calls."""
        return [self.dense, *(self.unpadding.programs if self.unpadding else [])]

    def can_rebind(self, pairs: Mapping[int, torch.Tensor]) -> bool:
        """Whether the graph holds with the tensors in `pairs`, which replace its weights (by their id)."""
        return all(program.can_rebind(pairs) for program in self.programs)

    def rebind(self, pairs: Mapping[int, torch.Tensor]) -> None:
        """Uses these tensors from now on, and releases the others."""
        if all(id(tensor) == known for known, tensor in pairs.items()):
            return  # recordings of them remain valid
        self.again = None  # it would read the old tensors
        for program in self.programs:
            program.rebind(pairs)
        if self.unpadding is not None:
            self.unpadding.forget_recordings()
        if self.weights is not None:
            self.weights.rebind(pairs)
        for part in (*self.module.modules(), *self.inlined.modules()):
            for attributes in (vars(part), part._parameters, part._buffers):
                held: dict[str, Any] = {name: pairs[id(v)] for name, v in attributes.items() if id(v) in pairs}
                attributes.update(held)

    @property
    def replays(self) -> list[Replay]:
        """The recorders and replayers of CUDA graphs, if requested."""
        of_dense = [self.dense.replay] if self.dense.replay else []
        return [*of_dense, *(self.unpadding.replays if self.unpadding else [])]

    @property
    def refusals(self) -> list[str]:
        """The rewrites that were refused, as text."""
        return [str(miss) for miss in self.misses if miss.refused]
