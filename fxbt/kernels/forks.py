"""Makes a forked child able to continue: with locks that nobody holds, and one thread where the others are missing.

Only the forking thread lives on in the child. A lock held by another thread would stay held forever, over half-written
values, so the fork waits for it. GNU's OpenMP waits forever for the threads of its pool, which the child does not have,
in torch's operations as in ours; the child therefore computes with one thread, and says so.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from pathlib import Path

import torch

from ..errors import FxbtWarning

_ONE_THREAD = (
    "this process was forked from one that used OpenMP threads, and torch would wait for them forever: it now runs on "
    "one thread (torch.set_num_threads(1)); start processes with 'spawn' or 'forkserver' to use more threads"
)


class _Forks:
    """What happens around a fork of this process."""

    def __init__(self) -> None:
        self.uses_threads = False  # whether this process made a graph, and with it OpenMP's pool
        self.is_unsaid = False  # whether a child still has to say that it runs on one thread
        self._locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
        self._held: list[threading.Lock] = []

    def lock(self) -> threading.Lock:
        """A lock that a fork waits for. Code that holds one must not wait for another, nor fork.

        Example:
            >>> with (counting := FORKS.lock()):
            ...     counter += 1
        """
        made = threading.Lock()
        self._locks.add(made)
        return made

    def say(self) -> None:
        """Warns once why there is one thread, except in a DataLoader's worker, which never has more."""
        self.is_unsaid = False
        if torch.utils.data.get_worker_info() is None:
            warnings.warn(_ONE_THREAD, FxbtWarning, stacklevel=2)

    def before(self) -> None:
        """Waits until no other thread holds one of the locks, and takes them."""
        self._held = list(self._locks)
        for each in self._held:
            each.acquire()

    def after(self) -> None:
        """Releases the locks, in the parent and in the child."""
        for each in self._held:
            each.release()
        self._held = []

    def after_in_child(self) -> None:
        """Releases the locks, and switches to one thread where torch would wait for OpenMP's threads."""
        self.after()
        if self.uses_threads and torch.get_num_threads() > 1 and _has_gnu_openmp():
            torch.set_num_threads(1)
            self.is_unsaid = True


def _has_gnu_openmp() -> bool:
    """Whether torch uses GNU's OpenMP; LLVM's and Intel's start new threads in a child."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return False


FORKS = _Forks()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=FORKS.before, after_in_parent=FORKS.after, after_in_child=FORKS.after_in_child)
