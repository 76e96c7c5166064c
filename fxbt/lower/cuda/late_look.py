"""Derived weights on a CUDA device: from time to time compared with what would be derived now."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# looks; each derives everything again, which takes 0.05 ms on an H100 for BERT-base's merged projections
CALLS_APART = 64
# The integer dtypes that show all bits of an element, by its size in bytes.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class LateLook:
    """Whether derived values still belong to their weights, according to a look some calls ago.

    torch counts writes to a tensor, but not those through `.data`. To see those immediately, each call would have to
    wait for the device; so every 64th call makes the device compare, and a later call reads the result once it is
    there.

    Args:
        derive: computes the values from the weights.

    Example:
        >>> look = LateLook(derive, weights, values)
        >>> weights[0].data.mul_(2.0)  # uncounted
        >>> all(look.holds() for _ in range(3 * CALLS_APART))
        False
    """

    def __init__(self, derive: Callable[..., Sequence[Tensor]], weights: Sequence[Tensor], values: Sequence[Tensor]):
        self._derive, self._weights, self._values = derive, weights, values
        self._turn = itertools.count(1)
        self._found: tuple[Tensor, Any] | None = None  # whether something differs; the event after which that is known

    def holds(self) -> bool:
        """Whether no look so far has found a difference; starts the next look if it is due."""
        found = self._found
        if found is not None and found[1].query():
            self._found = None
            if found[0].item():
                return False
        if next(self._turn) % CALLS_APART == 0 and self._found is None:
            self._found = self._look()
        return True

    def holds_now(self) -> bool:
        """Whether nothing differs now; waits for the device."""
        return not self._differs().item()

    def _look(self) -> tuple[Tensor, Any]:
        differs = self._differs()
        here = torch.empty(differs.shape, dtype=differs.dtype, pin_memory=differs.device.type == "cuda")
        here.copy_(differs, non_blocking=True)
        event = torch.Event(differs.device)
        event.record()
        return here, event

    def _differs(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            fresh = self._derive(*self._weights)
        different = [(_bits(one) != _bits(other)).any() for one, other in zip(self._values, fresh, strict=True)]
        return torch.stack(different).any()


def _bits(value: Tensor) -> Tensor:
    """A value as integers, in which NaN equals itself."""
    return torch.view_as_real(value) if value.is_complex() else value.view(INTEGERS[value.element_size()])
