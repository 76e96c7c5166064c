"""`CacheUse`: how a graph serves calls with a KV cache, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..capture.call import Call
from ..kernels.growing import bytes_held


@dataclass(eq=False)
class CacheUse:
    """Whether a graph starts caches or continues them, and for how many tokens so far (of all sequences).

    Example:
        >>> use = CacheUse.of(call)
        >>> use.count(call.tensors)
        >>> use.step, use.tokens
        ('prefill', 12)
    """

    step: str
    place: int  # index of the input whose first two axes are the new tokens
    tokens: int = 0

    @classmethod
    def of(cls, call: Call) -> CacheUse | None:
        """The use of a graph for such calls; None if no object among the arguments stores values of tokens."""
        if call.new_tokens is None:
            return None
        return cls("decode" if call.past else "prefill", call.new_tokens)

    def count(self, tensors: Sequence[Tensor]) -> None:
        """Counts a served call with these inputs."""
        batch, count = tensors[self.place].shape[:2]
        self.tokens += batch * count

    @property
    def nbytes(self) -> int:
        """The bytes of caches in use that grow in place, including their free room."""
        return bytes_held(self)
