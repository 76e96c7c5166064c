"""What a forked child needs to go on where its parent was: locks that nobody holds in it, and threads that exist.

Only the thread that forks lives on in the child. A lock that another one held would be held for ever, over values that
were half written: so the fork waits for them. And GNU's OpenMP waits for ever for the threads of its pool, which did
not come along, in torch's own operations as in ours: the child computes with one thread, and says so.
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
    "this process was forked from one whose OpenMP threads did not come along, and torch would wait for them for ever: "
    "it runs on one thread here (torch.set_num_threads(1)); start processes by 'spawn' or 'forkserver' to have more"
)


class _Forks:
    """What is done around a fork of this process."""

    def __init__(self) -> None:
        self.uses_threads = False  # whether a graph was made here, and so OpenMP's pool
        self.is_unsaid = False  # that a child has one thread
        self._locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()
        self._held: list[threading.Lock] = []

    def lock(self) -> threading.Lock:
        """A lock that a fork waits for; nothing that holds one may wait for another, or fork.

        Example:
            >>> with (counting := FORKS.lock()):
            ...     counter += 1
        """
        made = threading.Lock()
        self._locks.add(made)
        return made

    def say(self) -> None:
        """Tells the caller, once, why there is one thread; a DataLoader's workers have no more anyway."""
        self.is_unsaid = False
        if torch.utils.data.get_worker_info() is None:
            warnings.warn(_ONE_THREAD, FxbtWarning, stacklevel=2)

    def before(self) -> None:
        """Waits until no other thread holds one of the locks."""
        self._held = list(self._locks)
        for each in self._held:
            each.acquire()

    def after(self) -> None:
        """Gives them back, in the parent as in the child."""
        for each in self._held:
            each.release()
        self._held = []

    def after_in_child(self) -> None:
        """As `after`; and where OpenMP's threads would be waited for, there is one from now on."""
        self.after()
        if self.uses_threads and torch.get_num_threads() > 1 and _has_gnu_openmp():
            torch.set_num_threads(1)
            self.is_unsaid = True


def _has_gnu_openmp() -> bool:
    """Whether torch's OpenMP is GNU's: LLVM's and Intel's start their threads anew in a child."""
    try:
        return "libgomp" in Path("/proc/self/maps").read_text()
    except OSError:  # no Linux
        return False


FORKS = _Forks()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=FORKS.before, after_in_parent=FORKS.after, after_in_child=FORKS.after_in_child)
