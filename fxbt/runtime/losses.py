"""Whether losses read padding: seen in backward passes, as gradients at padded positions of outputs.

A graph ends at the model's outputs, so no proof says what a caller computes from them. A masked mean, or a loss that
ignores labels at padding, gives a gradient of exactly zero there; a mean over all positions does not.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import FxbtWarning
from ..padding.drop import Output

_LATE = (
    "a gradient reached padded positions of output {place}, which are constant where padding is dropped: this backward "
    "lacks their part, and from now on padding is computed; if the loss reads padded positions at times, pass "
    'padding="keep"'
)


class Losses:
    """What the backward passes of one graph's calls have shown so far.

    Attributes:
        read_padding: None before the first backward pass of a watched call; True from the first gradient on that is not
            zero at padding.

    Example:
        >>> losses = Losses(contracts)
        >>> losses.watch(outputs, masks, dropped=False)
        >>> outputs[0].mean().backward()
        >>> losses.read_padding
        True
    """

    def __init__(self, contracts: Sequence[Output | None]) -> None:
        self.read_padding: bool | None = None
        self._contracts = contracts

    def watch(self, outputs: Sequence[Any], masks: Sequence[Tensor], dropped: bool) -> None:
        """Looks at the gradients of a call's outputs once they are computed.

        Args:
            masks: [batch, length] each, nonzero where tokens are.
            dropped: whether padding was not computed.
        """
        for place, (value, contract) in enumerate(zip(outputs, self._contracts, strict=True)):
            node = value.grad_fn if isinstance(value, Tensor) else None
            if node is None:
                continue
            mask = None if contract is None else masks[contract.mask]
            # a hook of the node: one of the tensor would show in it, and be lost where the caller writes in place
            node.register_prehook(functools.partial(self._look, place, value.output_nr, mask, dropped))

    def _look(
        self, place: int, result: int, mask: Tensor | None, dropped: bool, gradients: tuple[Tensor | None, ...]
    ) -> None:
        contract, gradient = self._contracts[place], gradients[result]
        if contract is not None and mask is not None and gradient is not None and _is_read(gradient, contract, mask):
            is_news, self.read_padding = not self.read_padding, True
            if dropped and is_news:
                warnings.warn(_LATE.format(place=place), FxbtWarning, stacklevel=2)
        elif self.read_padding is None:
            self.read_padding = False


def _is_read(gradient: Tensor, contract: Output, mask: Tensor) -> bool:
    """Whether a gradient of an output is other than zero at padding."""
    with torch.no_grad():
        if contract.batch == contract.token:
            rows = gradient.movedim(contract.token, 0)
        else:
            rows = gradient.movedim((contract.batch, contract.token), (0, 1)).flatten(0, 1)
        padding = (mask == 0).flatten().nonzero().squeeze(1)
        return bool(rows.index_select(0, padding).any())
