"""`GuardedGraph`: a compiled graph, and all that must hold for it to stand for a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.call import Call
from ..capture.effects import Effects
from ..capture.export import Captured
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

MOST_UNUSED = 2  # graphs for calls with a cache that served none
_OTHER_NUMBERS = (1, 2, 5, 64)  # beside one that a graph was captured with: does it take one of these?


@dataclass(eq=False)
class GuardedGraph:
    """A compiled graph with the state of the model, and of what Python reads beside it, that it was captured in.

    Attributes:
        races: against the original, by the size of calls; None where the graph serves all that it may.
        shapes: of the inputs it was captured with.
        numbers: places of the call's numbers that are inputs; `pinned` those of them that have one value only,
            `constants` those that are none.
        text: as it was captured, for other processes.
        use: of KV caches; None where calls have none.
        served, refused: how many calls it ran, and how many went another way, which only running it shows.
        used: when it served last, in calls.
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
        """`run`, for a call of fxbt's own."""
        return self.compiled.unpadding.uncounted if self.compiled.unpadding else self.compiled.run

    def applies(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the graph stands for a call with these tensors now."""
        return accepts(self.guards, tensors) and self.holds() and not self.effects.hold(tensors)

    def output(self, call: Call) -> Any:
        """What the model returns for a call; its effects are done."""
        effects = self.effects
        if self.captured.growing and not effects:
            with owned(call.tensors, self.captured.growing, self.use):
                values = self.run(*call.tensors)
            return self.rebuild(values, call.args, call.kwargs)
        if not effects:
            return self.rebuild(self.run(*call.tensors), call.args, call.kwargs)
        values = self.run(*call.tensors, *effects.inputs())
        output = self.rebuild(effects.outputs(values), call.args, call.kwargs)
        effects.put(values)  # last: what may fail has not
        return output

    def count(self, call: Call) -> None:
        """It served this call."""
        self.served += 1
        if self.use is not None:
            self.use.count(call.tensors)

    def rebind(self, model: nn.Module) -> bool:
        """Takes over the tensors that stand in the places of others now; whether the graph holds with them."""
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
        """Whether the model and its surroundings are those that it was captured in."""
        return self.state.holds() and self.around.holds(LOCK.captures_elsewhere())


def accepts(guards: Callable[..., None], tensors: Sequence[Tensor]) -> bool:
    """Whether guards hold for the sizes of these tensors."""
    try:
        guards(*tensors)
    except Exception:  # an assertion, or a size it cannot compute with: not proven either way
        return False
    return True


def pinned_numbers(captured: Captured, call: Call) -> frozenset[str]:
    """The numbers that a graph is for one value of, though they are inputs: its guards take no other near it."""
    return frozenset(place for place in call.numbers if not _takes_others(captured, call, place))


def check_pinned(pinned: frozenset[str], call: Call, others: Sequence[GuardedGraph]) -> None:
    """Whether another graph for such calls is worth it; `others` are those there are.

    Raises:
        CaptureError: graph after graph is for one value of a number, or for one call with a cache.
    """
    if call.past and sum(not graph.served for graph in others) >= MOST_UNUSED:
        raise CaptureError("graph after graph for calls with this cache served no other one")
    for place in () if call.past else pinned:  # the numbers of a cache go with its sizes
        if others and all(place in other.pinned for other in others):
            raise CaptureError(f"the number {place} decides what the model computes, beyond its arithmetic")


def _takes_others(captured: Captured, call: Call, place: str) -> bool:
    number = call.numbers[place]
    value, tensors = number.of(call.tensors), list(call.tensors)
    for other in _OTHER_NUMBERS:
        tensors[number.index] = as_tensor(value + (other if value >= 0 else -other))
        if accepts(captured.guards, tensors):
            return True
    return False


def varied_axes(shapes: list[torch.Size], known: list[list[torch.Size]]) -> frozenset[tuple[int, int]]:
    """The axes past the second, as (input, axis), whose sizes are not those that graphs were captured with."""
    pairs = [(i, *pair) for earlier in known for i, pair in enumerate(zip(shapes, earlier, strict=True))]
    return frozenset((i, axis) for i, new, old in pairs for axis in range(2, len(new)) if new[axis] != old[axis])
