"""`GuardedGraph`: a compiled graph, and everything that must hold for it to serve a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.call import Call
from ..capture.captured import Captured
from ..capture.effects import Effects
from ..capture.locks import LOCK
from ..capture.model_state import ModelState
from ..capture.number_inputs import as_tensor
from ..capture.outputs import Rebuild
from ..capture.rebinding import rebound
from ..capture.surroundings import Surroundings
from ..errors import CaptureError
from ..kernels.growing import owned
from ..stored.shelf import Text
from .cache_use import CacheUse
from .compiled import Compiled
from .race import Races

MOST_UNUSED = 2  # graphs for calls with a cache that served no call
_OTHER_NUMBERS = (1, 2, 5, 64)  # offsets from the captured number: does the graph accept one of these?


@dataclass(eq=False)
class GuardedGraph:
    """A compiled graph with the state of the model, and of what Python reads besides it, at its capture.

    Attributes:
        races: timing against the original, by the size of calls; None if the graph serves every call it can.
        shapes: shapes of the inputs at its capture.
        numbers: places of the call's numbers that are inputs. `pinned` are those that accept a single value only,
            `constants` the places of numbers that are not inputs.
        text: the graph as captured, for other processes.
        use: its use of KV caches; None if calls have none.
        served, refused: how many calls it ran, and how many it could not run, which only running it shows.
        used: when it last served, in calls.
    """

    captured: Captured
    compiled: Compiled
    state: ModelState
    around: Surroundings
    races: Races | None
    shapes: list[torch.Size]
    numbers: frozenset[str]
    pinned: frozenset[str]
    constants: frozenset[str]
    text: Text
    use: CacheUse | None = None
    served: int = 0
    refused: int = 0
    used: int = 0
    run: Callable[..., tuple[Any, ...]] = field(init=False)
    guards: Callable[..., None] = field(init=False)
    rebuild: Rebuild = field(init=False)

    def __post_init__(self) -> None:
        self.run, self.guards = self.compiled.serve, self.captured.guards
        self.rebuild = Rebuild(self.captured.out_spec)

    @property
    def is_stored(self) -> bool:
        """Whether another process captured it."""
        return self.captured.is_stored

    @property
    def effects(self) -> Effects:
        """What calls change in the model."""
        return self.captured.effects

    @property
    def uncounted(self) -> Callable[..., tuple[Any, ...]]:
        """`run` for fxbt's own calls."""
        return self.compiled.unpadding.uncounted if self.compiled.unpadding else self.compiled.run

    def applies(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph serves a call with these tensors now."""
        return accepts(self.guards, tensors) and self.holds() and not self.effects.hold(tensors)

    def output(self, call: Call) -> Any:
        """The model's output for a call; also applies its effects."""
        effects = self.effects
        if self.captured.growing and not effects:
            with owned(call.tensors, self.captured.growing, self.use):
                values = self.run(*call.tensors)
            return self.rebuild(values, call.args, call.kwargs)
        if not effects:
            return self.rebuild(self.run(*call.tensors), call.args, call.kwargs)
        values = self.run(*call.tensors, *effects.inputs())
        output = self.rebuild(effects.returned(values, call.tensors), call.args, call.kwargs)
        effects.put(values, call.tensors)  # last, after everything that may fail
        return output

    def take(self, compiled: Compiled) -> None:
        """Serves by other kernels from now on. Calls that run in other threads end as they began."""
        self.compiled.take(compiled)
        self.run = self.compiled.serve
        self.races = self.races and Races()  # it may win now

    def count(self, call: Call) -> None:
        """It served this call."""
        self.served += 1
        if self.use is not None:
            self.use.count(call.tensors)

    def rebind(self, model: nn.Module) -> bool:
        """Takes over the tensors that replaced others in the model; whether the graph holds with them."""
        found = rebound(self.state, model)
        if found is None or not self.compiled.can_rebind(found[1]):
            return False
        self.state, pairs = found
        self.compiled.rebind(pairs)
        self.effects.rebind(pairs)
        for constant in self.captured.read:
            constant.tensor = pairs.get(id(constant.tensor), constant.tensor)
        return self.holds()

    def holds(self) -> bool:
        """Whether the model and its surroundings are as at the capture."""
        return self.state.holds() and self.around.holds(LOCK.captures_elsewhere())


def accepts(guards: Callable[..., None], tensors: Sequence[Tensor]) -> bool:
    """Whether the guards hold for the sizes of these tensors."""
    try:
        guards(*tensors)
    except Exception:  # an assertion, or a size it cannot compute with: not proven either way
        return False
    return True


def pinned_numbers(captured: Captured, call: Call) -> frozenset[str]:
    """The numbers that are inputs but that the graph accepts for one value only: guards reject values near it."""
    return frozenset(place for place in call.numbers if not _takes_others(captured, call, place))


def check_pinned(pinned: frozenset[str], call: Call, others: Sequence[GuardedGraph]) -> None:
    """Checks that another graph for such calls is worth it; `others` are the existing ones.

    Raises:
        CaptureError: each graph would serve only one value of a number, or one call with a cache.
    """
    if call.past and sum(not graph.served for graph in others) >= MOST_UNUSED:
        raise CaptureError("each graph captured for calls with this cache served only a single call")
    for place in () if call.past else pinned:  # a cache's numbers change with its sizes
        if others and all(place in other.pinned for other in others):
            raise CaptureError(
                f"the number {place} decides what the model computes, so each value would need a graph of its own; "
                "pass a tensor"
            )


def _takes_others(captured: Captured, call: Call, place: str) -> bool:
    number = call.numbers[place]
    value, tensors = number.of(call.tensors), list(call.tensors)
    for other in _OTHER_NUMBERS:
        tensors[number.index] = as_tensor(value + (other if value >= 0 else -other))
        if accepts(captured.guards, tensors):
            return True
    return False


def varied_axes(shapes: list[torch.Size], known: list[list[torch.Size]]) -> frozenset[tuple[int, int]]:
    """The axes after the second, as (input, axis), whose sizes differ from those in earlier captures."""
    pairs = [(i, *pair) for earlier in known for i, pair in enumerate(zip(shapes, earlier, strict=True))]
    return frozenset((i, axis) for i, new, old in pairs for axis in range(2, len(new)) if new[axis] != old[axis])
