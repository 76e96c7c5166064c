"""Every error and warning of fxbt."""

from __future__ import annotations


class FxbtError(Exception):
    """Base of all errors raised by fxbt itself (never by the user's model)."""


class FxbtWarning(UserWarning):
    """A model runs slower than asked for: some calls use its original forward."""


class NotCapturable(FxbtError):
    """A call that no graph can stand for; `silent` if that is the normal course (tracing), not worth a report."""

    def __init__(self, reason: str, silent: bool = False) -> None:
        super().__init__(reason)
        self.silent = silent


class CaptureError(FxbtError, RuntimeError):
    """A model call could not be turned into a graph; `where` is the line of the model's code that stopped it."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{reason}\n  at {where}" if where else reason)
        self.reason = reason
        self.where = where


class NotOptimizedError(FxbtError, ValueError):
    """`restore` was given a model that `optimize` did not return."""


class ExampleError(FxbtError, ValueError):
    """The model itself rejects the example inputs it should be captured with."""
