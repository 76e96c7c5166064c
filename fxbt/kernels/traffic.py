"""Which threads of this process are in a call of an optimised model: no kernel is timed beside another one's call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

BUSY: set[int] = set()  # threads; adding and discarding one needs no lock


def counted(call: Callable[..., Any], *args: Any) -> Any:
    """What a call returns, during which this thread is busy."""
    here = threading.get_ident()
    if here in BUSY:  # inside another one
        return call(*args)
    BUSY.add(here)
    try:
        return call(*args)
    finally:
        BUSY.discard(here)


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
