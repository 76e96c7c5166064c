"""CUDA graphs: records a program's kernels once per shape of its inputs, and then launches them at once.

Source: `torch.cuda.CUDAGraph`, https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.node import is_stochastic

MOST_RECORDINGS = 64  # per program; the least recently used go first, because each holds its inputs and outputs
MOST_BYTES_SHARE = 1 / 8  # share of the device's memory for the recordings of one program
RECORDED, REPLAYED, ONCE = "recorded", "replayed", "of a new shape"

Run = Callable[..., tuple[Any, ...]]
_now = threading.local()  # what this thread is doing


def is_recording() -> bool:
    """Whether this thread records a program, or warms up for it."""
    return getattr(_now, "is_recording", False)


@contextlib.contextmanager
def _at(**what: bool) -> Iterator[None]:
    before = dict(vars(_now))
    vars(_now).update(what)
    try:
        yield
    finally:
        vars(_now).clear()
        vars(_now).update(before)


@dataclass(frozen=True)
class _Recording:
    """Kernels that read `inputs` and write `outputs`, always at the same addresses."""

    inputs: list[Tensor]
    outputs: tuple[Any, ...]
    own: list[Tensor]  # the outputs that the next replay overwrites; the others are weights
    replay: Callable[[], None]

    def __call__(self, tensors: Sequence[Tensor], is_static: bool) -> tuple[Any, ...]:
        for place, tensor in zip(self.inputs, tensors, strict=True):
            place.copy_(tensor)
        self.replay()
        if is_static:
            return self.outputs
        copies = {id(value): value.clone() for value in self.own}
        return tuple(copies.get(id(value), value) for value in self.outputs)

    @property
    def nbytes(self) -> int:
        """The bytes of inputs and outputs; all recordings share the memory between them."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.own))


class Recorder:
    """Records programs on the device of their arguments. The programs of one graph share it.

    Recordings on one stream share one pool of memory, in which a recording's outputs occupy the place of another's
    intermediate values. So all of them hold `lock` from copying inputs until outputs are copied. Streams run in
    parallel, so each has its own pool.

    Args:
        is_static: callers (see `serving`) get a recording's own outputs, which the next replay overwrites.
    """

    def __init__(self, is_static: bool = False) -> None:
        self.is_static = is_static
        self.lock = threading.RLock()
        self._pools: dict[Any, tuple[Any, Any]] = {}  # by stream: a pool, and a recording in it that stays

    def serving(self, run: Run) -> Run:
        """`run` for a caller's call; fxbt's own calls, which compare outputs, get copies."""
        if not self.is_static:
            return run

        def served(*tensors: Tensor) -> tuple[Any, ...]:
            with _at(is_serving=True):
                return run(*tensors)

        return served

    def record(self, run: Run, arguments: Sequence[Tensor]) -> tuple[Callable[[], None], tuple[Any, ...]]:
        """Runs a program once to warm up and once to record it; returns (a function that replays it, its outputs)."""
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            run(*arguments)  # libraries allocate their workspaces at a first call, which must not be recorded
        current.wait_stream(stream)
        with torch.cuda.stream(current):  # a recording that cannot begin would leave another stream
            return self._recorded(run, arguments, self._pool(current))

    def _pool(self, stream: Any) -> Any:
        """The pool of a stream's recordings. torch frees it with its last recording, so one always stays."""
        if stream not in self._pools:
            pool = torch.cuda.graph_pool_handle()
            replay, _ = self._recorded(lambda: (torch.zeros(1, device=stream.device),), (), pool)
            self._pools[stream] = pool, replay
        return self._pools[stream][0]

    def _recorded(self, run: Run, arguments: Sequence[Tensor], pool: Any) -> tuple[Callable[[], None], tuple[Any, ...]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = run(*arguments)
        return graph.replay, outputs

    def most_bytes(self, tensor: Tensor) -> float:
        """How many bytes the recordings of one program may hold on the device of a tensor."""
        if not tensor.is_cuda:
            return math.inf
        return MOST_BYTES_SHARE * torch.cuda.get_device_properties(tensor.device).total_memory


class Replay:
    """`replay(*tensors, *weights)` is `run(*tensors, *weights)`, recorded when a shape comes a second time.

    Weights are read in place: writes to them are seen, and a moved weight gets a recording of its own. Keyword
    arguments are passed to `run`; each of their values has its own recordings. `calls` counts "recorded", "replayed",
    "of a new shape", and why calls were not recorded.

    Args:
        run: a function without gradients.
        count: how many of its arguments are inputs; they come before the weights.
        obstacle: why it cannot be recorded, if known (see `obstacle`).
        is_static: by default the recorder's.
    """

    def __init__(
        self, run: Run, count: int, recorder: Recorder, obstacle: str | None = None, is_static: bool | None = None
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.obstacle = obstacle
        self._run = run
        self._count = count
        self._recorder = recorder
        self._is_static = recorder.is_static if is_static is None else is_static
        self._recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()  # None: seen once

    def __call__(self, *arguments: Any, **static: Hashable) -> tuple[Any, ...]:
        with self._recorder.lock:
            recording, verdict = self._recording(arguments, static)
            self.calls[verdict] += 1
            if recording is not None:
                return recording(arguments[: self._count], self._is_static and getattr(_now, "is_serving", False))
        return self._run(*arguments, **static)

    def forget(self) -> None:
        """Frees the recordings; later calls are recorded again."""
        with self._recorder.lock:
            self._recordings.clear()

    @property
    def nbytes(self) -> int:
        """The bytes that recordings hold for their inputs and outputs."""
        with self._recorder.lock:
            return sum(recording.nbytes for recording in self._recordings.values() if recording is not None)

    def _recording(self, arguments: Sequence[Any], static: dict[str, Hashable]) -> tuple[_Recording | None, str]:
        """What a call can replay, if anything, and how to count it."""
        if self.obstacle is not None:
            return None, self.obstacle
        key = (*static.values(), *_key(arguments[: self._count], arguments[self._count :]))
        known = self._recordings.get(key)
        if known is not None:
            self._recordings.move_to_end(key)
            return known, REPLAYED
        if key not in self._recordings:
            self._recordings[key] = None
            self._drop_oldest(arguments)
            return None, ONCE
        try:
            made = self._recordings[key] = self._made(arguments, static)
        except Exception as error:  # for example something that waits for the device: the program then runs unrecorded
            self.obstacle = f"cannot be recorded ({type(error).__name__}: {str(error).splitlines()[0]})"
            return None, self.obstacle
        self._recordings.move_to_end(key)
        self._drop_oldest(arguments)
        return made, RECORDED

    def _drop_oldest(self, arguments: Sequence[Any]) -> None:
        """Frees the least recently used recordings while there are too many or they hold too much."""
        most = self._recorder.most_bytes(arguments[0]) if arguments else math.inf
        while len(self._recordings) > 1 and (len(self._recordings) > MOST_RECORDINGS or self.nbytes > most):
            self._recordings.popitem(last=False)

    def _made(self, arguments: Sequence[Any], static: dict[str, Hashable]) -> _Recording:
        inputs = [tensor.clone() for tensor in arguments[: self._count]]
        weights = arguments[self._count :]
        run = functools.partial(self._run, **static)
        with _at(is_recording=True):
            replay, outputs = self._recorder.record(run, [*inputs, *weights])
        tensors = [value for value in outputs if isinstance(value, Tensor)]
        if _addresses(tensors) & _addresses(inputs):
            raise ValueError("an output shares the memory of an input")
        return _Recording(inputs, outputs, [t for t in tensors if not _addresses([t]) & _addresses(weights)], replay)


def _key(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Hashable, ...]:
    shapes = [(tensor.shape, tensor.stride()) for tensor in tensors]
    stream = torch.cuda.current_stream() if tensors and tensors[0].is_cuda else None
    return (*shapes, *map(Tensor.data_ptr, weights), stream)


def _addresses(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def obstacle(graph: fx.Graph) -> str | None:
    """Why a graph cannot be recorded, whatever its inputs; None if it can."""
    values = [node.meta.get("val") for node in graph.nodes if node.op in ("placeholder", "get_attr")]
    devices = {value.device for value in values if isinstance(value, Tensor)}
    if len(devices) != 1 or devices.pop().type != "cuda":
        return "not all of its tensors are on one CUDA device"
    return "draws random numbers" if is_stochastic(graph) else None
