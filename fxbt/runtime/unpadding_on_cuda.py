"""`Unpadding` on a CUDA device: the deciding facts come back in one transfer, and packed calls are recorded, too."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.packed import Tokens, bucket, bucket_step
from ..lower.cuda.graphs import Recorder, Replay
from .race import Races
from .unpadding import PACKED, Facts, Run, Unpadding

SLOWER = "computing on padding was faster"


class FactsAtOnce(Facts):
    """The facts of a call, read from the device in one transfer.

    Args:
        sizes: the number of positions of each mask.
        values: whether each mask is 1 everywhere, how many tokens each has, and whether each guard holds.
    """

    def __init__(self, sizes: Sequence[int], values: Sequence[int]) -> None:
        super().__init__((), lambda: values[2 * len(sizes) :])
        self.positions = sum(sizes)
        self.are_ones = all(values[: len(sizes)])
        self.counts = list(values[len(sizes) : 2 * len(sizes)])
        self.buckets = tuple(bucket(count, size) for count, size in zip(self.counts, sizes, strict=True))


class UnpaddingOnCuda(Unpadding):
    """A call waits for the device once: for the numbers of tokens, and whether guards hold.

    With a recorder, packed calls compute a whole `bucket` of tokens, so that one recording serves all calls in that
    bucket. If computing on padding was clearly faster for calls of a size (see `Race`), the dense graph serves them.
    """

    def __init__(self, *args: Any, recorder: Recorder | None = None, **options: Any) -> None:
        super().__init__(*args, recorder=recorder, **options)
        self._races = Races()
        self._read: Run = self._facts_on_device
        self._recorded: Replay | None = None
        if recorder is not None:
            count = self.dense.count
            self._read = Replay(self._read, count, recorder, self.dense.obstacle, is_static=False)
            self._recorded = Replay(self._on_buckets, count, recorder, self.packed.obstacle)

    @property
    def replays(self) -> list[Replay]:
        return [*super().replays, *([self._recorded] if self._recorded else [])]

    def forget_recordings(self) -> None:
        for replay in (self._read, self._recorded):
            if isinstance(replay, Replay):
                replay.forget()

    def _choose(self, tensors: Sequence[Tensor]) -> tuple[Run, str]:
        run, verdict = self._decide(tensors)
        if verdict == PACKED and self._is_slower(run, tensors):
            return self._run_dense, SLOWER
        return run, verdict

    def _is_slower(self, run_packed: Run, tensors: Sequence[Tensor]) -> bool:
        """Whether computing on padding is known to be faster for calls of this size."""
        race = self._races.of(max(tensor.numel() for tensor in tensors))
        if race.is_due():
            race.look(lambda: run_packed(*tensors), lambda: self._run_dense(*tensors))
        return race.evidence is not None

    def _facts(self, tensors: Sequence[Tensor]) -> Facts:
        values, *sizes = self._read(*tensors, *self._masks.bound(), *self._guards.bound())
        return FactsAtOnce(sizes, values.tolist())

    def _facts_on_device(self, *arguments: Any) -> tuple[Any, ...]:
        """The values of `FactsAtOnce` as one tensor, and the sizes of the masks."""
        tensors, masks, bound = self._with_masks(arguments)
        guards = self._guards.run(*tensors, *bound)
        values = [*((mask == 1).all() for mask in masks), *map(torch.count_nonzero, masks), *guards]
        return torch.stack([value.reshape(()).long() for value in values]), *map(torch.numel, masks)

    def _with_masks(self, arguments: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """(inputs, their masks, other bound values) from the arguments: inputs, what masks read, other bound values."""
        tensors, bound = arguments[: self.dense.count], arguments[self.dense.count :]
        of_masks = len(self._masks.bound())
        return tensors, self._masks.run(*tensors, *bound[:of_masks]), bound[of_masks:]

    def _packed_run(self, facts: Facts) -> Run:
        assert isinstance(facts, FactsAtOnce)
        if self._recorded is None or self._recorded.obstacle is not None:
            return functools.partial(self._on_tokens_of, facts.counts)
        return functools.partial(self._replayed, facts.buckets)

    def _on_tokens_of(self, counts: Sequence[int], *tensors: Tensor) -> tuple[Any, ...]:
        return self.packed(*tensors, *map(Tokens.on_device, self._masks(*tensors), counts))

    def _replayed(self, buckets: tuple[int, ...], *tensors: Tensor) -> tuple[Any, ...]:
        assert self._recorded is not None
        self.packed.check_assumptions()
        return self._recorded(*tensors, *self._masks.bound(), *self.packed.bound(), buckets=buckets)

    def _on_buckets(self, *arguments: Any, buckets: tuple[int, ...]) -> tuple[Any, ...]:
        tensors, masks, bound = self._with_masks(arguments)
        tokens = map(Tokens.on_device, masks, buckets, map(bucket_step, buckets))
        return self.packed.run(*tensors, *tokens, *bound)
