"""Compares every byte of the weights with its old value, a part at each call, to find writes that nothing counts.

A call reads all of its weights at least once; 1/512 of them is read once more, whatever their size.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# calls until everything is compared: 0.6 % of MiniLM's time at 1x16, 0.8 % of BERT-base's (benchmarks/patrol.py)
ROUNDS = 512
SMALLEST_PART = 2**14  # bytes; smaller parts cost no less

Bytes = Any  # np.ndarray, a buffer


class Patrol:
    """The checksums of CPU weights, in parts; `next_holds()` compares another part at each call.

    CRC-32 detects every change of up to 32 adjacent bits, every exchange of two such stretches within a part (its
    polynomial is primitive: the pattern repeats after 2^32 - 1 bits), and all but one in 2^32 of all other changes.

    Example:
        >>> patrol = Patrol([weight])
        >>> weight.data[3] = 7.0  # uncounted
        >>> all(patrol.next_holds() for _ in range(patrol.rounds))
        False
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        stretches = [_bytes(weight) for weight in weights]
        self._parts = _parted(stretches, max(SMALLEST_PART, -(-sum(map(len, stretches)) // ROUNDS)))
        self._sums = list(map(_checksum, self._parts))
        self._turn = itertools.count()  # threads take turns; its steps are atomic

    @property
    def rounds(self) -> int:
        """The number of calls after which everything has been compared."""
        return len(self._parts)

    def next_holds(self) -> bool:
        """Whether the next part is unchanged."""
        if not self._parts:
            return True
        place = next(self._turn) % len(self._parts)
        return _checksum(self._parts[place]) == self._sums[place]

    def holds(self) -> bool:
        """Whether everything is unchanged."""
        return list(map(_checksum, self._parts)) == self._sums


def _bytes(weight: Tensor) -> Bytes:
    """A contiguous weight's own memory; .numpy() would forbid resizing it from then on."""
    flat = weight.detach().view(-1)
    return np.from_dlpack(flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8))


def _parted(stretches: list[Bytes], size: int) -> list[list[Bytes]]:
    """Stretches of memory as parts of `size` bytes each; the last part may be smaller."""
    parts: list[list[Bytes]] = []
    room = 0
    for stretch in stretches:
        while len(stretch):
            if not room:
                parts.append([])
                room = size
            piece, stretch = stretch[:room], stretch[room:]
            parts[-1].append(piece)
            room -= len(piece)
    return parts


def _checksum(part: list[Bytes]) -> int:
    checksum = 0
    for piece in part:
        checksum = zlib.crc32(piece, checksum)
    return checksum
