"""`CacheUse`: what a graph does for calls with a KV cache, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..capture.call import Call
from ..kernels.growing import bytes_held


@dataclass(eq=False)
class CacheUse:
    """Whether a graph begins caches or goes on with them, and for how many tokens so far (of all sequences).

    Example:
        >>> use = CacheUse.of(call)
        >>> use.count(call.tensors)
        >>> use.step, use.tokens
        ('prefill', 12)
    """

    step: str
    place: int  # of the input whose first two axes are the new tokens
    tokens: int = 0

    @classmethod
    def of(cls, call: Call) -> CacheUse | None:
        """That of a graph for such calls; None where no object among the arguments keeps values of tokens."""
        if call.new_tokens is None:
            return None
        return cls("decode" if call.past else "prefill", call.new_tokens)

    def count(self, tensors: Sequence[Tensor]) -> None:
        """A call with these inputs was served."""
        batch, count = tensors[self.place].shape[:2]
        self.tokens += batch * count

    @property
    def nbytes(self) -> int:
        """The memory of caches that are in use and grow in place, with the room behind them."""
        return bytes_held(self)
