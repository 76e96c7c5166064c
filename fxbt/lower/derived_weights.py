"""Derived weights: what programs compute from weights and keep (merged projections, packed linears), and when to redo
it.

Every value of a graph that depends only on weights becomes a function of the weights, run once, and again when a weight
changes. The programs of one model share such values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import fx

from ..graph.node import attribute, expression, is_pure, reaches_output
from ..graph.walk import ancestors
from ..kernels.autotune import Tuner
from ..kernels.forks import FORKS
from .codegen import compile_graph
from .cuda.late_look import CALLS_APART, INTEGERS, LateLook
from .patrol import Patrol

_VERSION = attrgetter("_version")
_IS_CONTIGUOUS = torch.Tensor.is_contiguous
_SAMPLE = 16  # elements looked at in each weight; each is a cache miss, and one in every row took 10 % of 1x16


@dataclass
class Derived:
    """Values computed from weights, with the state of the weights at that time."""

    stamp: tuple[int, ...]
    # live views: they keep old storages alive, so that no new one can appear at their address unnoticed
    samples: list[np.ndarray]
    sampled: bytes
    addresses: set[int | None]
    patrol: Patrol
    values: tuple[torch.Tensor, ...]
    late_look: LateLook | None = None  # for weights on a CUDA device

    @classmethod
    def compute(cls, derive: Callable[..., tuple[torch.Tensor, ...]], weights: list[torch.Tensor]) -> Derived:
        """The values for the current weights; the stamp is read first, so that a change meanwhile is noticed next
        time."""
        derive_plainly = without_autocast(derive, {weight.device.type for weight in weights})
        with torch.inference_mode(False), torch.no_grad():
            stamp = _stamp(weights)
            on_cpu = [weight for weight in weights if not weight.is_cuda and weight.is_contiguous()]
            samples = [_sample(weight.detach()) for weight in on_cpu]
            sampled, patrol = _content(samples), Patrol(on_cpu)
            values = derive_plainly(*weights)
            on_cuda = any(weight.is_cuda for weight in weights)
            late_look = LateLook(derive_plainly, weights, values) if on_cuda else None
            return cls(stamp, samples, sampled, set(map(_address, weights)), patrol, values, late_look)

    def holds(self, weights: list[torch.Tensor]) -> bool:
        """Whether the weights are unchanged, by torch's counters and by samples, which also see uncounted writes.

        Each call also compares another part of all their bytes; on a CUDA device, a look from some calls ago counts.
        """
        return (
            self._is_stamp_of(weights)
            and _content(self.samples) == self.sampled
            and self.patrol.next_holds()
            and (self.late_look is None or self.late_look.holds())
        )

    def holds_in_full(self, weights: list[torch.Tensor]) -> bool:
        """Whether the weights are unchanged, by all of their bytes."""
        holds_late = self.late_look is None or self.late_look.holds_now()
        return holds_late and self._is_stamp_of(weights) and self.patrol.holds()

    def _is_stamp_of(self, weights: list[torch.Tensor]) -> bool:
        """Whether torch's counters tell of no change.

        They do not count `w.data = w.data.T`: a weight that is no longer contiguous, with other values at its address.
        """
        return all(map(_IS_CONTIGUOUS, weights)) and self.stamp == _stamp(weights)

    def nbytes(self) -> int:
        """The bytes of the values that are not views of weights."""
        return sum(_nbytes(value) for value in self.values if _address(value) not in self.addresses)


def without_autocast(run: Callable[..., Any], devices: Iterable[str]) -> Callable[..., Any]:
    """`run` with autocast off on these devices, whatever the caller has set."""

    def plainly(*args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return run(*args)

    return plainly


def _stamp(sources: list[torch.Tensor]) -> tuple[int, ...]:
    """Changes when a weight is written (version) or replaced (address); a graph's guards see its dtype.

    Versions only grow, so their sum is equal only if each is.
    """
    return sum(map(_VERSION, sources)), *map(torch.Tensor.data_ptr, sources)


def _sample(weight: torch.Tensor) -> np.ndarray:
    """A view of some elements of a weight as integers, spread over its rows and columns."""
    columns = max(1, weight.shape[-1]) if weight.dim() > 1 else 1
    rows_apart = max(1, -(-weight.numel() // (columns * _SAMPLE)))
    next_column = max(1, columns // _SAMPLE) if columns > 1 else 0
    integers = weight.view(-1).view(INTEGERS[weight.element_size()])
    # .numpy() would forbid resizing the weight from then on
    return np.from_dlpack(integers[:: rows_apart * columns + next_column])


def _content(samples: list[np.ndarray]) -> bytes:
    # numpy takes a tenth of torch's time for many small arrays
    return np.concatenate(samples).tobytes() if samples else b""


def _can_be_watched(weight: Any) -> bool:
    return (
        isinstance(weight, torch.Tensor)
        and weight.device.type in ("cpu", "cuda")
        and weight.is_contiguous()
        and not weight.is_inference()
    )


def _nbytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def _address(value: torch.Tensor) -> int | None:
    """The address of a value's storage; None for packed weights, which have none to look at."""
    return value.untyped_storage().data_ptr() if value.layout is torch.strided else None


def weight_only(module: fx.GraphModule, graph: fx.Graph) -> set[fx.Node]:
    """The nodes computed only from weights, including the weights."""
    constant = {node for node in graph.nodes if node.op == "get_attr" and _can_be_watched(attribute(module, node))}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        from_weights = bool(inputs) and all(source in constant for source in inputs)
        is_tensor = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        if is_tensor and from_weights and is_pure(node) and not reaches_output(node):
            constant.add(node)
    return constant


class Weights:
    """The values that a model's programs derive from weights, each computed once and kept until a weight changes.

    A program registers what it needs with `add` and picks it from `current()`; equal expressions share one value.
    Because packed weights are shared, one `tuner` decides which kernels read them.
    """

    def __init__(self, tuner: Tuner | None = None) -> None:
        self.tuner = tuner or Tuner()
        self._graph = fx.Graph()
        self._sources: list[torch.Tensor] = []
        self._last_source: fx.Node | None = None
        self._known: dict[Any, fx.Node] = {}
        self._values: dict[fx.Node, int] = {}  # node -> its index among the derived values
        self._compute: Callable[..., tuple[torch.Tensor, ...]] | None = None
        self._derived: Derived | None = None
        self._lock = FORKS.lock()

    def add(self, module: fx.GraphModule, graph: fx.Graph, constant: set[fx.Node]) -> list[int]:
        """Moves the nodes in `constant` out of `graph`; those still needed become its last placeholders.

        Returns the index in `current()` of each such placeholder's value.
        """
        calls = [node for node in graph.nodes if node in constant and node.op == "call_function"]
        used = [node for node in calls if any(user not in constant for user in node.users)]
        needed = ancestors(used)
        with self._lock:
            copies = self._copy(module, [node for node in graph.nodes if node in needed])
            places = [self._values.setdefault(copies[node], len(self._values)) for node in used]
            self._derived = self._compute = None
        last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
        for node in used:
            with graph.inserting_after(last[0]) if last else graph.inserting_before():
                stand_in = graph.placeholder(f"derived_{node.name}")
            stand_in.meta = dict(node.meta)
            node.replace_all_uses_with(stand_in)
            last = [stand_in]
        graph.eliminate_dead_code()
        return places

    def current(self) -> tuple[torch.Tensor, ...]:
        """The derived values for the current weights."""
        derived = self._derived
        if derived is None or not derived.holds(self._sources):
            with self._lock:
                self._compute = self._compute or self._function()
                derived = self._derived = Derived.compute(self._compute, self._sources)
        return derived.values

    def refresh(self) -> bool:
        """Derives everything again; returns whether it was out of date."""
        with self._lock:
            derived = self._derived
            if not self._values or derived is None:
                return False
            held = derived.holds_in_full(self._sources)
            self._compute = self._compute or self._function()
            self._derived = Derived.compute(self._compute, self._sources)
            return not held

    def rebind(self, pairs: Mapping[int, torch.Tensor]) -> None:
        """From now on derives values from the tensors in `pairs`, which replace others (by their id)."""
        with self._lock:
            new = [pairs.get(id(weight), weight) for weight in self._sources]
            places = {id(weight): self._known.pop(id(weight)) for weight in self._sources}
            self._known.update({id(now): places[id(old)] for old, now in zip(self._sources, new, strict=True)})
            self._sources, self._derived = new, None

    @property
    def rounds(self) -> int:
        """Within this many calls, every write to a weight is noticed, however it was made."""
        if self._derived is None:
            return 0
        return max(self._derived.patrol.rounds, 2 * CALLS_APART if self._derived.late_look else 0)

    def nbytes(self) -> int:
        """The bytes of the derived values."""
        if not self._values:
            return 0
        self.current()
        return self._derived.nbytes() if self._derived else 0

    def _copy(self, module: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        copies: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            if node.op == "get_attr":
                copies[node] = self._source(attribute(module, node))
                continue
            copy = self._graph.node_copy(node, copies.__getitem__)
            copies[node] = self._known.setdefault(expression(copy), copy)
            if copies[node] is not copy:
                self._graph.erase_node(copy)
        return copies

    def _source(self, weight: torch.Tensor) -> fx.Node:
        if id(weight) not in self._known:
            last = self._last_source
            with self._graph.inserting_before() if last is None else self._graph.inserting_after(last):
                self._last_source = self._known[id(weight)] = self._graph.placeholder(f"weight_{len(self._sources)}")
            self._sources.append(weight)
        return self._known[id(weight)]

    def _function(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self._graph, copies)
        graph.output(tuple(copies[node] for node in self._values))
        return compile_graph(graph)
