"""Hooks on saved tensors that are active around a call: checkpointing, offloading to the host, compression.

Autograd passes what an operation saves for its backward to the caller's hooks. `torch.utils.checkpoint` counts those
tensors, and ends a recomputation with an exception from its hook once it has all of them.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..torch_compat import StopRecomputation, saved_tensors_hooks_now


def active_hooks() -> tuple[Any, ...]:
    """The pack and unpack hooks of the caller's innermost context; () if there is none.

    Example:
        >>> with torch.autograd.graph.save_on_cpu():
        ...     len(active_hooks())
        2
    """
    return saved_tensors_hooks_now()


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hides what this block computes from the caller's hooks: only the innermost hooks are called."""
    if not active_hooks():
        yield
        return
    with saved_tensors_hooks(_as_it_is, _as_it_is):
        yield


def comes_from_hook(error: BaseException) -> bool:
    """Whether an exception comes from the caller's own hook, and so is not a failure of the computation."""
    if isinstance(error, StopRecomputation):
        return True
    codes = {
        getattr(hook, "__code__", None) or getattr(type(hook).__call__, "__code__", None) for hook in active_hooks()
    }
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
