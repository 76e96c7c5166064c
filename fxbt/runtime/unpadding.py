"""A dense program, its packed twin and one without masks as one callable that decides call by call."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.forks import FORKS
from ..kernels.packed import Tokens
from ..lower.cpu.precision import Precision
from ..lower.cuda.graphs import Recorder, Replay
from ..lower.derived_weights import Weights
from ..lower.program import Program
from ..padding.drop import Output, Unpadded
from ..padding.padded_calls import GivenLengths
from ..padding.without_masks import Unmasked
from ..rewrite.verify import check_outputs

# Share of padding from which unpadding pays off: MiniLM on 2x8 to 32x128 tokens was up to 10 % slower packed below 1/16
# (indices, and one attention call per length), and faster from 1/9 on.
WORTH_DROPPING = 1 / 16
PACKED, DENSE, LITTLE, EMPTY = "packed", "dense", "hardly any padding", "no token in the whole batch"

Run = Callable[..., tuple[Any, ...]]


class Facts:
    """The facts that decide how a call runs, each computed on first access."""

    def __init__(self, masks: Sequence[Tensor], guards: Callable[[], Sequence[Any]]) -> None:
        self.positions = sum(mask.numel() for mask in masks)
        self._masks = masks
        self._guards = guards

    @functools.cached_property
    def are_ones(self) -> bool:
        """Whether all masks are 1 everywhere."""
        return all((mask == 1).all() for mask in self._masks)

    @functools.cached_property
    def counts(self) -> list[int]:
        """The number of tokens of each mask."""
        return [int(mask.count_nonzero()) for mask in self._masks]

    @property
    def guards(self) -> Sequence[Any]:
        """Whether each guard holds."""
        return self._guards()


class Unpadding:
    """`program(*tensors)`: on valid tokens only if there is padding and all guards hold, else on the dense graph.

    If the masks are 1 everywhere, the dense graph runs without them. `weights` is None with gradients. `in_parts` wraps
    each of these so that it may run on parts of the batch. `calls` counts "packed", "dense" (no padding), and why a
    padded call ran dense.
    """

    def __init__(
        self,
        dense: Program,
        unpadded: Unpadded,
        unmasked: Unmasked,
        weights: Weights | None,
        precision: type[Precision] | None = None,
        *,
        recorder: Recorder | None = None,
        in_parts: Callable[[Run], Run] = lambda run: run,
    ):
        self.dense = dense
        self.unmasked = Program(unmasked.module, unmasked.assumes, weights, precision, recorder)
        self.packed = Program(unpadded.module, unpadded.assumes, weights, precision)
        self.calls: Counter[str] = Counter()
        # whether the original blanks padding itself, as nn.TransformerEncoder's nested tensors do
        self.original_blanks = False
        self._masks = Program(unpadded.masks, {}, weights)
        self._given = unpadded.given
        self._is_coarse = precision is not None
        self._guards = Program(unpadded.guards, {}, weights)
        self._reasons = unpadded.reasons
        self._outputs = unpadded.outputs
        self._run_dense, self._run_unmasked = in_parts(dense), in_parts(self.unmasked)
        self._run_packed = in_parts(self._on_tokens)
        self._counting = FORKS.lock()

    @property
    def programs(self) -> list[Program]:
        """All programs besides the dense one."""
        return [self.unmasked, self.packed, self._masks, self._guards]

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        run, verdict = self._choose(tensors)
        with self._counting:
            self.calls[verdict] += 1
        return run(*tensors)

    def goes_on_for(self, other: Unpadding) -> None:
        """Counts on where another one of the same graph, which it takes the place of, stops."""
        self.calls, self._counting = other.calls, other._counting

    def uncounted(self, *tensors: Tensor) -> tuple[Any, ...]:
        """Runs one of fxbt's own calls, without counting it."""
        return self._decide(tensors)[0](*tensors)

    @property
    def replays(self) -> list[Replay]:
        """The recorders of CUDA graphs besides the dense program's."""
        return [self.unmasked.replay] if self.unmasked.replay else []

    def forget_recordings(self) -> None:
        """Frees the CUDA graphs that belong to no `Program`."""

    def _choose(self, tensors: Sequence[Tensor]) -> tuple[Run, str]:
        """What a caller's call runs, and how to count it."""
        return self._decide(tensors)

    def _decide(self, tensors: Sequence[Tensor], worth: float = WORTH_DROPPING) -> tuple[Run, str]:
        """What a call may run, and how to count it."""
        facts = self._facts(tensors)
        if facts.are_ones:
            return self._run_unmasked, DENSE
        padded = facts.positions - sum(facts.counts)
        if not padded:
            return self._run_dense, DENSE
        run_dense = self._dense_and_blanked if self.original_blanks else self._run_dense
        if padded < worth * facts.positions:
            return run_dense, LITTLE
        for holds, reason in zip(facts.guards, self._reasons, strict=True):
            if not holds:
                return run_dense, reason
        if not all(facts.counts):
            return run_dense, EMPTY
        return self._packed_run(facts), PACKED

    def _facts(self, tensors: Sequence[Tensor]) -> Facts:
        return Facts(self._masks(*tensors), lambda: self._guards(*tensors))

    def _packed_run(self, facts: Facts) -> Run:
        """The function that computes on the tokens described by these facts."""
        return self._run_packed

    def _dense_and_blanked(self, *tensors: Tensor) -> tuple[Any, ...]:
        return tuple(self.blanked(self._run_dense(*tensors), tensors))

    def _on_tokens(self, *tensors: Tensor) -> tuple[Any, ...]:
        masks = self._masks(*tensors)
        if not all(mask.any() for mask in masks):  # in a part of the batch
            return tuple(self.blanked(self.dense(*tensors), tensors))
        return self.packed(*tensors, *map(Tokens.of, masks))

    def verdicts(self) -> dict[str, int]:
        """All possible outcomes of calls with their counts: `calls`, including zeros."""
        return {**dict.fromkeys((PACKED, DENSE, LITTLE, *self._reasons), 0), **self.calls}

    def as_returned(self, outputs: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
        """A call's dense outputs as this program returns them: with padding blanked, if it drops padding."""
        drops = self._decide(tensors)[1] == PACKED
        return self.blanked(outputs, tensors) if drops or self.original_blanks else list(outputs)

    def blanked(self, outputs: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
        """A call's outputs as they are if its padding is dropped."""
        masks = self._masks(*tensors)
        return [
            value if contract is None else _blanked(value, contract, masks[contract.mask])
            for value, contract in zip(outputs, self._outputs, strict=True)
        ]

    def padded(self, example: Sequence[Tensor], positions: slice) -> list[Tensor]:
        """A call like the example whose first sequence has padding at these positions, and all others have none.

        Raises:
            ValueError: no call can have padding there, because lengths put it at one end.
        """
        tensors = list(example)
        for place, given in enumerate(self._given):
            is_padding = torch.zeros_like(self._masks(*tensors)[place], dtype=torch.bool)
            is_padding[0, positions] = True
            tensors[given.place] = given.example(tensors, is_padding, functools.partial(self._valid, place))
        return tensors

    def _valid(self, place: int, tensors: Sequence[Tensor]) -> Tensor:
        valid: Tensor = self._masks(*tensors)[place]
        return valid

    def padded_at_an_end(self, example: Sequence[Tensor]) -> list[Tensor]:
        """A call like the example whose first sequence ends in padding, or begins with it if none can end so."""
        try:
            return self.padded(example, slice(-1, None))
        except ValueError:  # tokens are at the right
            return self.padded(example, slice(0, 1))

    def check(self, example: Sequence[Tensor]) -> None:
        """Compares the programs with the dense one on the example: unpadded, padded at the right and at the left.

        Raises:
            Miss: they differ, so the proof has a hole.
        """
        for tensors in self._calls_to_check(example):
            run, verdict = self._decide(tensors, worth=0.0)
            expected: Sequence[Any] = self.dense(*tensors)
            if verdict == PACKED:
                expected = self.blanked(expected, tensors)
            check_outputs(run(*tensors), expected, self._is_coarse, "without padding")

    def _calls_to_check(self, example: Sequence[Tensor]) -> list[list[Tensor]]:
        """Calls like the example: unpadded, padded at an end, and padded at the left if masks can say so."""
        calls = [self.padded(example, slice(0)), self.padded_at_an_end(example)]
        if not any(isinstance(given, GivenLengths) for given in self._given):
            calls.append(self.padded(example, slice(0, 1)))
        return calls


def _blanked(value: Tensor, contract: Output, mask: Tensor) -> Tensor:
    padding = mask == 0
    if contract.batch == contract.token:
        padding = padding.flatten()
    elif contract.batch > contract.token:
        padding = padding.t()
    shape = [1] * value.dim()
    for dim, size in zip(sorted({contract.batch, contract.token}), padding.shape, strict=True):
        shape[dim] = size
    return value.masked_fill(padding.reshape(shape), contract.fill)
