"""`Failures`: calls that cannot be captured, so that none is tried again before the model changes."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from ..capture.locks import LOCK
from ..capture.model_state import ModelState
from ..capture.rebinding import rebound
from ..capture.surroundings import Surroundings


class Failures:
    """The keys of calls that failed, with the state of the model and its surroundings at that time.

    Attributes:
        reasons: the reason for each key.

    Example:
        >>> failures.remember(key, around, "output holds a DynamicCache")
        >>> failures.have(key)
        True
    """

    def __init__(self, original: nn.Module) -> None:
        self._original = original
        self._failed: dict[Hashable, tuple[ModelState, Surroundings | None]] = {}
        self._given_up: set[Hashable] = set()
        self.reasons: dict[Hashable, str] = {}

    def remember(self, key: Hashable, around: Surroundings | None, reason: str) -> None:
        """Records a failure; a key that fails again after a change of the model is given up."""
        self.reasons[key] = reason
        if key in self._failed:
            self._given_up.add(key)
            del self._failed[key]  # it holds the model's current weights
        if key not in self._given_up:
            self._failed[key] = (ModelState(self._original), around)

    def have(self, key: Hashable) -> bool:
        """Whether such a call would fail again."""
        if key in self._given_up or key not in self._failed:
            return key in self._given_up
        state, around = self._failed[key]
        if not state.holds() and (found := rebound(state, self._original)):
            state = found[0]  # other weights make no difference
            self._failed[key] = (state, around)
        return state.holds() and (around is None or around.holds(LOCK.captures_elsewhere()))
