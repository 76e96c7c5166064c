"""Weights that nothing reads as they are, moved from memory to a file: they stay tensors like any others.

What a weight was packed into takes its place in every call; its own memory is a copy that only waits: for
`state_dict`, for training, for a call that no graph is proven for. So its values go to a temporary file without a name
and the parameter is mapped onto that. Reading it brings pages back, which the system may drop again; writing to it
makes pages of its own, as after a fork, and never reaches the file. The parameter stays the object that it was.
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

SMALLEST = 16 * mmap.PAGESIZE  # below that, looking for changes would bring all of it back
IN_MEMORY = ("tmpfs", "ramfs")  # file systems
_FILES: list[tuple[weakref.ref[mmap.mmap], range]] = []  # that weights were moved to, and the addresses they are at
# In /proc/self/pagemap, a number for each page: https://docs.kernel.org/admin-guide/mm/pagemap.html
_IN_MEMORY, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61


@dataclass
class Spilled:
    """How many bytes went to a file, and how many stayed in memory, by the reason."""

    nbytes: int = 0
    kept: Counter[str] = field(default_factory=Counter)


def check_can_spill() -> None:
    """Raises ValueError where a file would free no memory."""
    if not sys.platform.startswith("linux"):
        raise ValueError(f"keep_original=False needs Linux's memory mapping, this is {sys.platform}")
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
    """Moves weights to a file; what the block reads of them brings single pages back, later reads whole stretches.

    A weight whose memory something else looks at too stays, as that would not see its changes any more.
    """
    gc.collect()  # what only a cycle of garbage holds shares no memory
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
    except OSError as error:  # no space left on the disk, a quota
        result.kept[f"the file could not be written: {error}"] += sum(weight.nbytes for weight in chosen)
        pages = None
    if pages is None:
        yield result
        return
    pages.madvise(mmap.MADV_RANDOM)
    for weight, version, start in zip(chosen, versions, _starts(chosen), strict=False):
        if weight._version != version:  # by another thread, while it was copied
            result.kept["it was written to meanwhile"] += weight.nbytes
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
        return "mapped onto a file already (as safetensors are when they are loaded), or not torch's own"
    if storage.nbytes() != weight.nbytes:
        return "a part of other memory"
    alone = torch.empty(0)
    if storage_uses(storage) > storage_uses(alone.untyped_storage()):
        return "another tensor shares its memory"
    return None


def _starts(weights: Sequence[Tensor]) -> list[int]:
    """Where each weight begins in the file, and where the file ends: at whole pages."""
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
    """What of a stretch of such memory is the process's own: pages that were written since. Others are not read.

    Where the system does not tell (no /proc/self/pagemap), none.
    """
    first, page = memory.ctypes.data, mmap.PAGESIZE
    places = range(first // page, -(-(first + len(memory)) // page))
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:  # another one after a fork
            numbers = np.frombuffer(os.pread(file.fileno(), 8 * len(places), 8 * places.start), np.uint64)
    except OSError:  # then versions, addresses and samples have to do
        return []
    is_own = ((numbers & (_IN_MEMORY | _SWAPPED)) != 0) & ((numbers & _OF_FILE) == 0)
    starts = [max(0, place * page - first) for place, own in zip(places, is_own.tolist(), strict=False) if own]
    return [memory[start : (first + start) // page * page + page - first] for start in starts]


def _bytes(weight: Tensor) -> Any:
    return weight.detach().view(-1).view(torch.uint8).numpy()


def _forget_cached(file: IO[bytes]) -> None:
    """The file's pages are on the disk, and no longer in memory too."""
    file.flush()
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _return_free_memory() -> None:
    """What glibc's allocator keeps of freed weights goes back to the system; other C libraries return it themselves."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
