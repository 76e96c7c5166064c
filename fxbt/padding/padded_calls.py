"""Makes calls like a given one, but with padding at given places, for the checks of unpadded graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.packed import COMPARISONS

HALVINGS = 64  # of an interval of lengths, in the search for one of them

Valid = Callable[[Sequence[Tensor]], Tensor]  # the tensors of a call -> [batch, length], nonzero where tokens are


@dataclass(frozen=True)
class GivenMask:
    """The input at `place` says where tokens are: where it is nonzero, or where a comparison with a number holds."""

    place: int
    comparison: str | None = None
    number: float = 1

    def example(self, tensors: Sequence[Tensor], padded: Tensor, valid: Valid) -> Tensor:
        """A tensor like the given one, with tokens wherever `padded` [batch, length] is False.

        Raises:
            ValueError: no value is known for a token or for padding.
        """
        given = tensors[self.place]
        if self.comparison is None:
            return (~padded).to(given.dtype)
        near = torch.tensor([self.number, self.number - 1, self.number + 1]).to(given.dtype)
        values = torch.cat([given.flatten(), near[near >= 0].to(given.device)])
        is_token = COMPARISONS[self.comparison](values, self.number)
        if is_token.all() or not is_token.any():
            raise ValueError(f"no values are known for which {self.comparison} {self.number} holds and fails")
        token, padding = values[is_token][0], values[~is_token][-1]
        tokens = torch.where(is_token[: given.numel()].view_as(given), given, token)
        return torch.where(padded, padding, tokens)


@dataclass(frozen=True)
class GivenLengths:
    """The input at `place`, one number per row, says how many tokens there are."""

    place: int

    def example(self, tensors: Sequence[Tensor], padded: Tensor, valid: Valid) -> Tensor:
        """Lengths that put padding exactly where `padded` [batch, length] is True.

        Raises:
            ValueError: there are none; for example if padding is at the other end.
        """
        given = tensors[self.place]
        counts = (~padded).sum(1).tolist()
        lengths = {count: self._length(tensors, count, padded.shape[1], valid) for count in set(counts)}
        made = torch.tensor([lengths[count] for count in counts], dtype=given.dtype, device=given.device).view_as(given)
        if not torch.equal(valid(self._with(tensors, made)) != 0, ~padded):
            raise ValueError("no lengths put padding there")
        return made

    def _length(self, tensors: Sequence[Tensor], count: int, length: int, valid: Valid) -> float:
        """The length that gives the first row that many tokens; a larger length never gives fewer."""
        given = tensors[self.place]
        is_float = given.is_floating_point()
        low, high = (0.0, 1.0) if is_float else (0, length)
        most = torch.finfo(given.dtype).max if is_float else torch.iinfo(given.dtype).max
        bounded, tried = False, high
        for _ in range(HALVINGS):
            found = int(valid(self._with(tensors, torch.full_like(given, min(tried, most))))[0].count_nonzero())
            if found == count:
                return tried
            bounded |= found > count
            low, high = (low, tried) if found > count else (tried, high)
            middle = (low + high) / 2 if is_float else (low + high) // 2
            tried = middle if bounded else 2 * tried
        raise ValueError(f"no length leaves {count} of {length} tokens")

    def _with(self, tensors: Sequence[Tensor], lengths: Tensor) -> list[Tensor]:
        changed = list(tensors)
        changed[self.place] = lengths
        return changed
