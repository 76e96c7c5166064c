"""CUDA graphs: a program's kernels recorded once for each shape of its inputs, and launched in one go from then on.

Source: `torch.cuda.CUDAGraph`, https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.node import is_stochastic

MOST_SHAPES = 16  # recorded for one program: each holds its inputs and outputs on the device
RECORDED, REPLAYED, ONCE = "recorded", "replayed", "of a new shape"

Run = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class _Recording:
    """Kernels that read `inputs` and write `outputs`, always at the same addresses."""

    inputs: list[Tensor]
    outputs: tuple[Any, ...]
    own: list[Tensor]  # the outputs that the next replay overwrites; the others are weights
    replay: Callable[[], None]

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        for place, tensor in zip(self.inputs, tensors, strict=True):
            place.copy_(tensor)
        self.replay()
        copies = {id(value): value.clone() for value in self.own}
        return tuple(copies.get(id(value), value) for value in self.outputs)


class Replay:
    """`replay(*tensors, *weights)` is `run(*tensors, *weights)`, recorded when it comes a second time in one shape.

    Weights are read where they stand: writes to them show, and one that is moved makes a recording of its own.
    `calls` counts how calls went: "recorded", "replayed", "of a new shape", or why they were not recorded.

    Args:
        run: without gradients.
        count: how many of its arguments are inputs; they stand before the weights.
        obstacle: why it cannot be recorded, where that is known (see `obstacle`).
        record: (run, arguments) -> (what repeats its kernels, their outputs).
    """

    def __init__(
        self, run: Run, count: int, obstacle: str | None = None, record: Callable[..., Any] | None = None
    ) -> None:
        self.calls: Counter[str] = Counter()
        self._run = run
        self._count = count
        self._obstacle = obstacle
        self._record = record or Recorder()
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        with self._lock:  # the recording's inputs and outputs are one call's at a time
            recording, verdict = self._recording(arguments)
            self.calls[verdict] += 1
            if recording is not None:
                return recording(arguments[: self._count])
        return self._run(*arguments)

    def forget(self) -> None:
        """Frees what was recorded: calls are recorded anew."""
        with self._lock:
            self._recordings.clear()

    def _recording(self, arguments: Sequence[Any]) -> tuple[_Recording | None, str]:
        """What a call can replay, if anything, and how to count it."""
        if self._obstacle is not None:
            return None, self._obstacle
        key = _key(arguments[: self._count], arguments[self._count :])
        known = self._recordings.get(key)
        if known is not None:
            return known, REPLAYED
        if key not in self._recordings:
            if len(self._recordings) >= MOST_SHAPES:
                return None, f"more than {MOST_SHAPES} shapes"
            self._recordings[key] = None
            return None, ONCE
        try:
            made = self._recordings[key] = self._made(arguments)
        except Exception as error:  # what waits for the device, for one, cannot be recorded: the program runs as it is
            self._obstacle = f"cannot be recorded ({type(error).__name__}: {str(error).splitlines()[0]})"
            return None, self._obstacle
        return made, RECORDED

    def _made(self, arguments: Sequence[Any]) -> _Recording:
        inputs = [tensor.clone() for tensor in arguments[: self._count]]
        weights = arguments[self._count :]
        replay, outputs = self._record(self._run, [*inputs, *weights])
        tensors = [value for value in outputs if isinstance(value, Tensor)]
        if _addresses(tensors) & _addresses(inputs):
            raise ValueError("an output shares the memory of an input")
        return _Recording(inputs, outputs, [t for t in tensors if not _addresses([t]) & _addresses(weights)], replay)


def _key(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Hashable:
    shapes = [(tensor.shape, tensor.stride()) for tensor in tensors]
    stream = torch.cuda.current_stream() if tensors and tensors[0].is_cuda else None
    return (*shapes, *map(Tensor.data_ptr, weights), stream)


def _addresses(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


class Recorder:
    """Records on the device of the arguments; what one program records shares one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run, arguments: Sequence[Tensor]) -> tuple[Callable[[], None], tuple[Any, ...]]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run(*arguments)  # libraries make their workspaces at a first call, which must not be recorded
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run(*arguments)
        return graph.replay, outputs


def obstacle(graph: fx.Graph) -> str | None:
    """Why a graph cannot be recorded, whatever its inputs; None if it may be."""
    values = [node.meta.get("val") for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    devices = {value.device for value in values if isinstance(value, Tensor)}
    if len(devices) != 1 or devices.pop().type != "cuda":
        return "not all of its tensors are on one CUDA device"
    return "draws random numbers" if is_stochastic(graph) else None
