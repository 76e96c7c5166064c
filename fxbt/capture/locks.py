"""One capture at a time per process; originals run meanwhile unless the capture endangers them.

What tracing patches in the whole process (`nn.Module.__call__` and `__getattr__`, torch's tracing flags, replaced
library functions) is confined to the tracing thread: see `isolated`. What remains are the modules of the traced model,
which hold fake parameters during the trace, and the process's random generator, which a capture restores: an original
that shares anything with the captured model, or is in training mode, waits.

torch.export also switches oneDNN off for the process, so sums in other threads round in another order meanwhile.

A fork waits, too: otherwise the child would start with those modules, and with patches that nobody reverts.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .model_state import ModelState


@dataclass(frozen=True, eq=False)
class _Running:
    """A model whose original runs in a thread."""

    model: nn.Module
    thread: int


class _Claim:
    """A thread's capture of a model, active once all originals that it endangers have finished."""

    def __init__(self, model: nn.Module, is_alone: bool) -> None:
        self.thread = threading.get_ident()
        self.is_active = False
        self._state = None if is_alone else ModelState(model)

    def endangers(self, model: nn.Module) -> bool:
        """Whether the original of `model` must not run during the capture."""
        if self._state is None:
            return True
        try:
            return any(module.training for module in model.modules()) or self._state.shares_with(ModelState(model))
        except Exception:  # another thread edits it, or it cannot be inspected: not proven safe
            return True


class CaptureLock:
    """Captures, one at a time, and originals, which run in parallel with each other and with harmless captures.

    Example:
        >>> with lock.capturing(model):
        ...     capture(model, call)
        >>> with lock.running(other):  # in another thread: immediately, if it shares nothing with `model`
        ...     other(x)
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: list[_Running] = []
        self._claim: _Claim | None = None

    @property
    def is_free(self) -> bool:
        """Whether no thread captures, or waits to, and this one is in no original: a capture would begin at once."""
        return self._claim is None and not self.runs_here()

    def captures_here(self) -> bool:
        """Whether this thread captures, or waits to capture."""
        claim = self._claim
        return claim is not None and claim.thread == threading.get_ident()

    def captures_elsewhere(self) -> bool:
        """Whether another thread captures now, so that functions of torch may be replaced."""
        claim = self._claim
        return claim is not None and claim.is_active and claim.thread != threading.get_ident()

    def runs_here(self) -> bool:
        """Whether this thread is inside `running`; waiting in `capturing` could then be waiting for itself."""
        here = threading.get_ident()
        return any(run.thread == here for run in tuple(self._running))

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Runs a block that calls the original `model`, once no capture endangers it."""
        if self.captures_here():
            yield
            return
        run = _Running(model, threading.get_ident())
        with self._changed:
            self._changed.wait_for(lambda: not self._is_barred(model))
            self._running.append(run)
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(run)
                self._changed.notify_all()

    def _is_barred(self, model: nn.Module) -> bool:
        claim = self._claim
        if claim is None or (not claim.is_active and self.runs_here()):  # that capture may be waiting for this thread
            return False
        return claim.endangers(model)

    @contextlib.contextmanager
    def capturing(self, model: nn.Module, is_alone: bool = False) -> Iterator[None]:
        """Runs a block that captures `model`: alone if `is_alone`, else beside originals that it does not endanger."""
        with self._changed:
            self._changed.wait_for(lambda: self._claim is None)
            claim = self._claim = _Claim(model, is_alone)
        try:
            with self._changed:
                self._changed.wait_for(lambda: not any(claim.endangers(run.model) for run in self._running))
                claim.is_active = True
            yield
        finally:
            with self._changed:
                self._claim = None
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Waits for another thread's capture, and lets none begin until the fork is over."""
        self._changed.acquire()
        self._changed.wait_for(lambda: self._claim is None or self.captures_here())

    def after_fork(self) -> None:
        """In the parent, everything continues."""
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """In the child, this thread is the only one."""
        here = threading.get_ident()
        self._changed = threading.Condition()
        self._running = [run for run in self._running if run.thread == here]


LOCK = CaptureLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=LOCK.before_fork, after_in_parent=LOCK.after_fork, after_in_child=LOCK.after_fork_in_child
    )
