"""Moves weights that nothing reads directly from memory to a file; they remain ordinary tensors.

Every call reads a packed copy of such a weight; its own memory only waits for `state_dict`, for training, or for a call
that runs the original. So its values go to a temporary file without a name, and the parameter is mapped onto that.
Reading it brings pages back, which the system may drop again; writing to it makes private pages, as after a fork, and
never reaches the file. The parameter stays the same object.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..torch_compat import storage_uses

SMALLEST = 16 * mmap.PAGESIZE  # a smaller weight would be read back as a whole in the search for changes
IN_MEMORY = ("tmpfs", "ramfs")  # file systems
_FILES: list[tuple[weakref.ref[mmap.mmap], range]] = []  # files that weights were moved to, and their addresses
# /proc/self/pagemap has a number for each page: https://docs.kernel.org/admin-guide/mm/pagemap.html
_IN_MEMORY, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61


@dataclass
class Spilled:
    """How many bytes went to a file, and how many stayed in memory, by reason."""

    nbytes: int = 0
    kept: Counter[str] = field(default_factory=Counter)


def check_can_spill() -> None:
    """Raises ValueError if a file would free no memory."""
    if not sys.platform.startswith("linux"):
        raise ValueError(f"keep_original=False needs Linux's memory mapping, but this is {sys.platform}")
    folder = Path(tempfile.gettempdir()).resolve()
    if _file_system(folder) in IN_MEMORY:
        raise ValueError(
            f"keep_original=False moves weights to a file in {folder}, which is in memory itself; set TMPDIR to a "
            "folder on a disk"
        )


def _file_system(folder: Path) -> str:
    kinds = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        kinds[Path(place.encode().decode("unicode_escape"))] = kind
    return next(kinds[place] for place in (folder, *folder.parents) if place in kinds)


@contextlib.contextmanager
def spilled(weights: Sequence[Tensor]) -> Iterator[Spilled]:
    """Moves weights to a file. Reads inside the block bring back single pages, later reads whole stretches.

    A weight whose memory something else uses stays, because the other would not see its changes any more.
    """
    gc.collect()  # so that garbage cycles share no memory
    result = Spilled()
    chosen: list[Tensor] = []
    for weight in weights:
        reason = _reason_to_keep(weight)
        if reason is None:
            chosen.append(weight)
        else:
            result.kept[reason] += weight.nbytes
    versions = [weight._version for weight in chosen]
    try:
        pages = _mapped(chosen) if chosen else None
    except OSError as error:  # no space left on the disk, or a quota
        result.kept[f"the file could not be written: {error}"] += sum(weight.nbytes for weight in chosen)
        pages = None
    if pages is None:
        yield result
        return
    pages.madvise(mmap.MADV_RANDOM)
    for weight, version, start in zip(chosen, versions, _starts(chosen), strict=False):
        if weight._version != version:  # by another thread during the copy
            result.kept["the weight changed during the move"] += weight.nbytes
            continue
        result.nbytes += weight.nbytes
        flat = torch.frombuffer(pages, dtype=weight.dtype, count=weight.numel(), offset=start)
        weight.data = flat.view(weight.shape)
    _return_free_memory()
    yield result
    pages.madvise(mmap.MADV_NORMAL)


def _reason_to_keep(weight: Tensor) -> str | None:
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_leaf or weight._is_view():
        return "not a plain tensor"
    if weight.nbytes < SMALLEST:
        return "small"
    storage = weight.untyped_storage()
    if not storage.resizable():
        return "already mapped onto a file (as loaded safetensors are), or not torch's own memory"
    if storage.nbytes() != weight.nbytes:
        return "part of a larger memory block"
    alone = torch.empty(0)
    if storage_uses(storage) > storage_uses(alone.untyped_storage()):
        return "another tensor shares its memory"
    return None


def _starts(weights: Sequence[Tensor]) -> list[int]:
    """The start of each weight in the file, and the end of the file, in whole pages."""
    starts = [0]
    for weight in weights:
        starts.append(starts[-1] + -(-weight.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    return starts


def _mapped(weights: Sequence[Tensor]) -> mmap.mmap:
    with tempfile.TemporaryFile() as file:
        starts = _starts(weights)
        for weight, start in zip(weights, starts, strict=False):
            file.seek(start)
            file.write(_bytes(weight))
        file.truncate(starts[-1])
        _forget_cached(file)
        pages = mmap.mmap(file.fileno(), starts[-1], mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    start = np.frombuffer(pages, np.uint8).ctypes.data
    _FILES[:] = [known for known in _FILES if known[0]() is not None]
    _FILES.append((weakref.ref(pages), range(start, start + len(pages))))
    return pages


def is_in_file(address: int) -> bool:
    """Whether memory at an address is mapped onto a file that weights were moved to."""
    return any(address in addresses and pages() is not None for pages, addresses in _FILES)


def own_pages(memory: np.ndarray) -> list[np.ndarray]:
    """The process's own pages in a stretch of such memory: those written since. Others are not read.

    Empty where the system does not report them (no /proc/self/pagemap).
    """
    first, page = memory.ctypes.data, mmap.PAGESIZE
    places = range(first // page, -(-(first + len(memory)) // page))
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:  # a new file after a fork
            numbers = np.frombuffer(os.pread(file.fileno(), 8 * len(places), 8 * places.start), np.uint64)
    except OSError:  # then versions, addresses and samples must suffice
        return []
    is_own = ((numbers & (_IN_MEMORY | _SWAPPED)) != 0) & ((numbers & _OF_FILE) == 0)
    starts = [max(0, place * page - first) for place, own in zip(places, is_own.tolist(), strict=False) if own]
    return [memory[start : (first + start) // page * page + page - first] for start in starts]


def _bytes(weight: Tensor) -> Any:
    return weight.detach().view(-1).view(torch.uint8).numpy()


def _forget_cached(file: IO[bytes]) -> None:
    """Writes the file's pages to the disk and drops them from memory."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _return_free_memory() -> None:
    """Returns freed memory that glibc's allocator keeps to the system; other C libraries return it themselves."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
