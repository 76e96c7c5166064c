"""Every byte of the weights compared with what it was, a part at each call: a write that nothing counts is found.

A call reads all of its weights once at least; a part of 1/512 of them is read once more, whatever their size.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .spill import is_in_file, own_pages

ROUNDS = 512  # calls until all is compared: 0.6 % of MiniLM's time at 1x16, 0.8 % of BERT-base's (benchmarks/patrol.py)
SMALLEST_PART = 2**14  # bytes; fewer cost no less

Bytes = Any  # np.ndarray, a buffer
Piece = tuple[Bytes, bool]  # and whether it is of a file that weights were moved to


class Patrol:
    """The checksums of weights on the CPU, in parts; `next_holds()` compares another part at each call.

    CRC-32 tells every change of up to 32 neighbouring bits, every exchange of two such stretches within a part (its
    polynomial is primitive: the pattern repeats after 2^32 - 1 bits), and of all other changes all but one in 2^32.
    Pages of a file that weights were moved to (`spill`) are not read: they are as they were as long as the process has
    no copies of its own of them, which the system tells.

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
        self._turn = itertools.count()  # threads take turns: its steps are atomic

    @property
    def rounds(self) -> int:
        """After so many calls all has been compared."""
        return len(self._parts)

    def next_holds(self) -> bool:
        """Whether the next part is as it was."""
        if not self._parts:
            return True
        place = next(self._turn) % len(self._parts)
        return _checksum(self._parts[place]) == self._sums[place]

    def holds(self) -> bool:
        """Whether all is as it was."""
        return list(map(_checksum, self._parts)) == self._sums

    def release(self) -> None:
        """Lets the memory of the weights go; nothing is compared any more."""
        self._parts, self._sums = [], []


def _bytes(weight: Tensor) -> Bytes:
    """A contiguous weight's own memory; .numpy() would forbid resizing it ever after."""
    flat = weight.detach().view(-1)
    return np.from_dlpack(flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8))


def _parted(stretches: list[Bytes], size: int) -> list[list[Piece]]:
    """Stretches of memory as parts of `size` bytes each, the last one less."""
    parts: list[list[Piece]] = []
    room = 0
    for stretch in stretches:
        is_of_file = is_in_file(stretch.ctypes.data)
        while len(stretch):
            if not room:
                parts.append([])
                room = size
            piece, stretch = stretch[:room], stretch[room:]
            parts[-1].append((piece, is_of_file))
            room -= len(piece)
    return parts


def _checksum(part: list[Piece]) -> int:
    checksum = 0
    for piece, is_of_file in part:
        if not is_of_file:
            checksum = zlib.crc32(piece, checksum)
            continue
        page: Bytes
        for page in own_pages(piece):
            checksum = zlib.crc32(page, zlib.crc32(b"%d" % page.ctypes.data, checksum))
    return checksum
