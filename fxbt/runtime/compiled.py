"""`Compiled`: a graph ready to run, with the record of its making."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from ..graph.miss import Miss
from ..graph.record import Snapshot, StageRecord, hits_of
from ..lower.cuda.graphs import Recorder, Replay
from ..lower.derived_weights import Weights
from ..lower.program import Program
from .finished import Finished
from .unpadding import Unpadding


@dataclass
class History:
    """How a graph came to be: what each step did, and the graph before and after."""

    module: fx.GraphModule
    inlined: fx.GraphModule  # the graph that was lowered; misses name its nodes
    before: Snapshot
    after: Snapshot
    stages: list[StageRecord]
    parts: StageRecord  # whether large batches can run in parts


@dataclass
class Compiled:
    """A graph ready to run, and the record of its making, which `tell` makes if another process did the work.

    Attributes:
        run: what serves calls.
        unpadding: `run`, if it can drop padding.
        told: the record, once there is one.
        measure: the most bytes that the captured call's values hold at once.
        weights: derived weights of the programs, without gradients.
        finished: what another process would make programs of.
    """

    run: Callable[..., tuple[Any, ...]]
    dense: Program
    unpadding: Unpadding | None
    tell: Callable[[], History]
    seconds: float
    stochastic: bool
    derived_bytes: int
    measure: Callable[[], int | None]
    weights: Weights | None
    finished: Finished | None = None
    recorder: Recorder | None = None  # of CUDA graphs, if requested
    precision: str | None = None  # of linear layers, if not the model's own
    error: float | None = None  # of the outputs against the original's, in another precision
    told: History | None = None
    again: Callable[[], Compiled] | None = None  # compiles it again with the kernels known to be fastest by then

    @property
    def history(self) -> History:
        """How it was made."""
        if self.told is None:
            self.told = self.tell()
        return self.told

    @property
    def module(self) -> fx.GraphModule:
        """The graph as the rules left it."""
        return self.history.module

    @property
    def stages(self) -> list[StageRecord]:
        """What each step did, in the order they ran."""
        return self.history.stages

    @cached_property
    def peak_bytes(self) -> int | None:
        """The most memory that the captured call's values hold at once; None with gradients."""
        return self.measure()

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
        for name in ("dense", "unpadding", "weights", "derived_bytes", "measure", "error", "again", "run"):
            setattr(self, name, getattr(other, name))
        vars(self).pop("peak_bytes", None)  # measured before

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
        for part in self._modules():
            for attributes in (vars(part), part._parameters, part._buffers):
                held: dict[str, Any] = {name: pairs[id(v)] for name, v in attributes.items() if id(v) in pairs}
                attributes.update(held)

    def _modules(self) -> list[nn.Module]:
        """All that holds tensors of the model by their names, beside programs."""
        graphs = [] if self.finished is None else self.finished.graphs
        told = [self.told.module, self.told.inlined] if self.told else []
        return [part for module in (*graphs, *told) for part in module.modules()]

    @property
    def replays(self) -> list[Replay]:
        """The recorders and replayers of CUDA graphs, if requested."""
        of_dense = [self.dense.replay] if self.dense.replay else []
        return [*of_dense, *(self.unpadding.replays if self.unpadding else [])]

    @property
    def refusals(self) -> list[str]:
        """The rewrites that were refused, as text."""
        return [str(miss) for miss in self.misses if miss.refused]
