"""Which threads of this process are in a call of an optimised model: no kernel is timed beside another one's call."""

from __future__ import annotations

import os
import threading

BUSY: set[int] = set()  # threads; adding and discarding one needs no lock


def is_alone() -> bool:
    """Whether no other thread is in a call.

    Example:
        >>> BUSY.add(threading.get_ident())
        >>> is_alone()
        True
    """
    return not BUSY - {threading.get_ident()}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BUSY.clear)  # the other threads did not come along
