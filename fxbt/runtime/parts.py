"""Runs a large batch in parts, so that no value needs memory that the system provides anew for each call.

Above 32 MiB, glibc takes every block from the system and returns it, and each page costs a fault: BERT layers on 64 and
more sequences of 128 tokens took 1.2 to 1.3 times as long in one piece (benchmarks/parts.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..padding.sequences import Batch
from ..rewrite.verify import check_outputs

LARGE = 32 * 2**20  # bytes: glibc's DEFAULT_MMAP_THRESHOLD_MAX
PART = 16 * 2**20  # bytes of the largest value in a part
_SHAPES = 4096  # shapes whose number of parts is remembered

Run = Callable[..., tuple[Any, ...]]


class InParts:
    """`run(*tensors)`; if its values are large, runs on parts of the batch and joins the outputs.

    Args:
        run: a graph with the given `batch`, without gradients, on a CPU.
        guards: raises for inputs of shapes that the graph does not serve.
    """

    def __init__(self, run: Run, batch: Batch, guards: Callable[..., None]) -> None:
        self._run = run
        self._batch = batch
        self._guards = guards
        self._known: dict[tuple[torch.Size, ...], int] = {}

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        shapes = tuple([tensor.shape for tensor in tensors])
        count = self._known.get(shapes) or self._count(shapes)
        return self._run(*tensors) if count < 2 else self._in_parts(tensors, count)

    def check(self, example: Sequence[Tensor], is_coarse: bool) -> None:
        """Compares the joined outputs of two halves with the whole's, on an example of more than one sequence.

        Raises:
            Miss: they differ, so the proof has a hole.
        """
        if self._sequences([tensor.shape for tensor in example]) > 1:
            check_outputs(
                self._in_parts(tuple(example), 2), self._run(*example), is_coarse, "computed on parts of the batch"
            )

    def _in_parts(self, tensors: tuple[Tensor, ...], count: int) -> tuple[Any, ...]:
        parts = self._parts(tensors, count)
        if not all(map(self._holds, parts)):
            return self._run(*tensors)
        results = zip(*[self._run(*part) for part in parts], strict=True)
        return tuple(torch.cat(r) if joined else r[0] for r, joined in zip(results, self._batch.outputs, strict=True))

    def _sequences(self, shapes: Sequence[torch.Size]) -> int:
        return shapes[self._batch.inputs.index(True)][0]

    def _holds(self, part: tuple[Tensor, ...]) -> bool:
        try:
            self._guards(*part)
        except Exception:  # an assertion, or a size it cannot compute with
            return False
        return True

    def _parts(self, tensors: tuple[Tensor, ...], count: int) -> list[tuple[Tensor, ...]]:
        split = [
            tensor.tensor_split(count) if has_batch else itertools.repeat(tensor, count)
            for tensor, has_batch in zip(tensors, self._batch.inputs, strict=True)
        ]
        return list(zip(*split, strict=True))

    def _count(self, shapes: Sequence[torch.Size]) -> int:
        """The number of parts; one if joining outputs would move more bytes than it saves."""
        sizes = list(itertools.chain(*shapes))
        large = [(nbytes, count) for nbytes, count in self._batch.values(*sizes) if nbytes > LARGE]
        count = 1
        if sum(nbytes * count for nbytes, count in large) > self._batch.returned(*sizes):
            count = min(self._sequences(shapes), -(-max(nbytes for nbytes, _ in large) // PART))
        if len(self._known) < _SHAPES:
            self._known[tuple(shapes)] = count
        return count
