"""`Unpadding` on a CUDA device: what decides a call comes back in one transfer, and packed calls are recorded too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.packed import Tokens, bucket, bucket_step
from ..lower.cpu.precision import Precision
from ..lower.cuda.graphs import Recorder, Replay
from ..lower.derived_weights import Weights
from ..lower.program import Program
from ..padding.drop import Unpadded
from ..padding.without_masks import Unmasked
from .race import Races
from .unpadding import PACKED, Facts, Run, Unpadding

SLOWER = "computing padding was faster"


class FactsAtOnce(Facts):
    """The facts of a call, read from the device in one transfer.

    Args:
        sizes: of the masks, each [batch, length].
        values: whether each mask is 1 throughout, how many tokens each has, and whether each guard holds.
        bound: what masks and packed calls read besides inputs.
    """

    def __init__(self, sizes: Sequence[int], values: Sequence[int], bound: Sequence[Tensor] = ()) -> None:
        super().__init__((), lambda: values[2 * len(sizes) :])
        self.bound = bound
        self.positions = sum(sizes)
        self.are_ones = all(values[: len(sizes)])
        self.counts = list(values[len(sizes) : 2 * len(sizes)])
        self.buckets = tuple(bucket(count, size) for count, size in zip(self.counts, sizes, strict=True))


class UnpaddingOnCuda(Unpadding):
    """A call waits for the device once: for its numbers of tokens, and whether guards hold.

    With a recorder, packed calls compute a `bucket` of tokens, so that one recording serves all calls that fill it.
    Where computing padding was clearly faster for calls of a size (see `Race`), the dense graph serves them.
    """

    def __init__(
        self,
        dense: Program,
        unpadded: Unpadded,
        unmasked: Unmasked,
        weights: Weights,
        precision: type[Precision] | None = None,
        recorder: Recorder | None = None,
        in_parts: Callable[[Run], Run] = lambda run: run,
    ) -> None:
        super().__init__(dense, unpadded, unmasked, weights, precision, recorder, in_parts)
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

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        run, verdict = self._decide(tensors)
        if verdict == PACKED and self._is_slower(run, tensors):
            run, verdict = self._run_dense, SLOWER
        with self._counting:
            self.calls[verdict] += 1
        return run(*tensors)

    def _is_slower(self, run_packed: Run, tensors: Sequence[Tensor]) -> bool:
        """Whether computing padding is known to be faster for calls of this size."""
        race = self._races.of(max(tensor.numel() for tensor in tensors))
        if race.is_due():
            race.look(lambda: run_packed(*tensors), lambda: self._run_dense(*tensors))
        return race.evidence is not None

    def _facts(self, tensors: Sequence[Tensor]) -> Facts:
        values, *sizes = self._read(*tensors, *self._masks.bound(), *self._guards.bound())
        self.packed.check_assumptions()  # this and the next line while the device is at work
        bound = [*self._masks.bound(), *self.packed.bound()]
        return FactsAtOnce(sizes, values.tolist(), bound)

    def _facts_on_device(self, *arguments: Any) -> tuple[Any, ...]:
        """The values of `FactsAtOnce` as one tensor, and the sizes of the masks."""
        tensors, bound = arguments[: self.dense.count], arguments[self.dense.count :]
        of_masks = len(self._masks.bound())
        masks = self._masks.run(*tensors, *bound[:of_masks])
        guards = self._guards.run(*tensors, *bound[of_masks:])
        values = [*((mask == 1).all() for mask in masks), *map(torch.count_nonzero, masks), *guards]
        return torch.stack([value.reshape(()).long() for value in values]), *map(torch.numel, masks)

    def _packed_run(self, facts: Facts) -> Run:
        assert isinstance(facts, FactsAtOnce)
        if self._recorded is None or self._recorded.obstacle is not None:
            return functools.partial(self._on_tokens_of, facts.counts)
        return functools.partial(self._replayed, facts)

    def _on_tokens_of(self, counts: Sequence[int], *tensors: Tensor) -> tuple[Any, ...]:
        return self.packed(*tensors, *map(Tokens.on_device, self._masks(*tensors), counts))

    def _replayed(self, facts: FactsAtOnce, *tensors: Tensor) -> tuple[Any, ...]:
        assert self._recorded is not None
        return self._recorded(*tensors, *facts.bound, buckets=facts.buckets)

    def _on_buckets(self, *arguments: Any, buckets: tuple[int, ...]) -> tuple[Any, ...]:
        tensors, bound = arguments[: self.dense.count], arguments[self.dense.count :]
        of_masks = len(self._masks.bound())
        masks = self._masks.run(*tensors, *bound[:of_masks])
        tokens = map(Tokens.on_device, masks, buckets, map(bucket_step, buckets))
        return self.packed.run(*tensors, *tokens, *bound[of_masks:])
