"""Checks in each call that the constants on whose content a graph's proofs depend are unchanged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..capture.model_state import versions
from .cuda.late_look import LateLook


class Assumptions:
    """Constants by name, with the values they had when the graph was proven.

    On a CUDA device, comparing values would wait for it: there, a call sees what torch counts immediately, and other
    changes later (see `LateLook`).

    Example:
        >>> assumptions = Assumptions({"causal_mask": mask})
        >>> mask[0, 1] = True
        >>> assumptions.check()
        RuntimeError: causal_mask changed after the graph was proven on its content
    """

    def __init__(self, assumes: Mapping[str, Tensor]) -> None:
        self._names = list(assumes)
        self._values = [live.clone() for live in assumes.values()]
        self._watch(list(assumes.values()))

    def _watch(self, live: list[Tensor]) -> None:
        self._live = live
        on_cuda = [place for place, tensor in enumerate(live) if tensor.is_cuda]
        self._on_cpu = [place for place in range(len(live)) if place not in on_cuda]
        self._counted = [live[place] for place in on_cuda]
        self._stamp = _stamp(self._counted)
        values = [self._values[place] for place in on_cuda]
        self._late_look = LateLook(lambda *tensors: tensors, self._counted, values) if on_cuda else None

    def check(self) -> None:
        """Raises RuntimeError if a constant changed after the graph was proven."""
        for place in self._on_cpu:
            if not torch.equal(self._live[place], self._values[place]):
                raise RuntimeError(f"{self._names[place]} changed after the graph was proven on its content")
        if self._late_look is None or (self._stamp == _stamp(self._counted) and self._late_look.holds()):
            return
        if not self._late_look.holds_now():
            raise RuntimeError(f"{', '.join(self._names)}: one of them changed after the graph was proven on them")
        self._watch(self._live)

    def can_rebind(self, pairs: Mapping[int, Tensor]) -> bool:
        """Whether the tensors in `pairs`, which replace others (by their id), have the same values."""
        live = [pairs.get(id(tensor), tensor) for tensor in self._live]
        return all(map(torch.equal, live, self._values))

    def rebind(self, pairs: Mapping[int, Tensor]) -> None:
        """From now on checks these tensors."""
        self._watch([pairs.get(id(tensor), tensor) for tensor in self._live])


def _stamp(tensors: list[Tensor]) -> tuple[list[int], list[int]]:
    return versions(tensors), list(map(Tensor.data_ptr, tensors))
