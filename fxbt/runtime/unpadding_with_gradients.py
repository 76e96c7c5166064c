"""`Unpadding` with gradients: padding is dropped once a backward pass has shown that the loss leaves it out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture.saved_tensors import active_hooks
from ..graph.miss import Miss
from .gradients import programs_difference
from .guarded_graph import accepts
from .losses import Losses
from .unpadding import PACKED, WORTH_DROPPING, Run, Unpadding

UNSEEN = "no backward pass has shown yet that the loss leaves padding out"
READ = "the loss reads padded positions of an output"
HOOKED = "hooks on saved tensors are active"
ROWS = 4  # of the example that programs are compared on: backward passes of 16 x 128 tokens took 5 of a capture's 12 s


class UnpaddingWithGradients(Unpadding):
    """Padded calls compute padding until the gradients of one were exactly zero at padded positions of its outputs.

    So a loss over all positions gets the original's numbers in every step. Under a caller's hooks on saved tensors
    (`torch.utils.checkpoint` around the model) padding is always computed: a forward and its recomputation must save
    the same tensors, even if there was a backward pass between them.
    """

    def __init__(self, *args: Any, is_stochastic: bool, serves: Callable[..., None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._is_stochastic = is_stochastic
        self._serves = serves  # raises for inputs of shapes that the graph does not serve
        self._losses = Losses(self._outputs)

    def _choose(self, tensors: Sequence[Tensor]) -> tuple[Run, str]:
        run, verdict = self._decide(tensors)
        if verdict != PACKED:
            return run, verdict
        if active_hooks():
            return self._run_dense, HOOKED
        if self._losses.read_padding:
            return self._run_dense, READ
        if self._losses.read_padding is None:
            return functools.partial(self._watched, self._run_dense, False), UNSEEN
        return functools.partial(self._watched, run, True), PACKED

    def _decide(self, tensors: Sequence[Tensor], worth: float = WORTH_DROPPING) -> tuple[Run, str]:
        with torch.no_grad():  # of the masks and guards
            return super()._decide(tensors, worth)

    def _watched(self, run: Run, dropped: bool, *tensors: Tensor) -> tuple[Any, ...]:
        outputs = run(*tensors)
        with torch.no_grad():
            masks = self._masks(*tensors)
        self._losses.watch(outputs, masks, dropped)
        return outputs

    def check(self, example: Sequence[Tensor]) -> None:
        """Compares the programs with the dense one on the example, gradients included, with nothing dropped out.

        Raises:
            Miss: they differ, so the proof has a hole.
        """
        example = self._some_rows(example)
        calls = self._calls_to_check(example)
        if self._decide(example, worth=0.0)[1] == PACKED:  # with its own labels at padding
            calls = [calls[0], list(example)]
        for tensors in calls:
            run, verdict = self._decide(tensors, worth=0.0)
            if run is self._run_dense:
                continue
            reference = self._dense_and_blanked if verdict == PACKED else self.dense
            weights = self.dense.bound()
            if problem := programs_difference(run, reference, tensors, weights, self._is_stochastic):
                raise Miss("outputs or gradients without padding differ from the dense graph's", found=problem)

    def _some_rows(self, example: Sequence[Tensor]) -> Sequence[Tensor]:
        """The first rows of the example, if the graph serves so few."""
        rows = self._masks(*example)[0].shape[0]
        few = [tensor[:ROWS] if tensor.dim() and tensor.shape[0] == rows else tensor for tensor in example]
        return few if accepts(self._serves, few) else example
