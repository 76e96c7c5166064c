"""The memory behind tensors: which of them share it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def memory_of(tensor: Tensor) -> int | None:
    """The id of a tensor's memory; None if there is none to compare."""
    is_plain = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if is_plain else None


def sharing(tensors: Sequence[Tensor]) -> frozenset[int]:
    """The indices of the tensors whose memory another one of them shares.

    Example:
        >>> sharing([x, x[1:], y])
        frozenset({0, 1})
    """
    memory = list(map(memory_of, tensors))
    counts = Counter(memory)
    return frozenset(place for place, each in enumerate(memory) if counts[each] > 1)
