"""All errors and warnings of fxbt."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path

from torch import nn

_NOT_THE_CALLERS = (str(Path(__file__).parent), str(Path(nn.__file__).parent))


class FxbtError(Exception):
    """Base class of all errors that fxbt itself raises (the user's model never raises it)."""


class FxbtWarning(UserWarning):
    """Some calls of a model run its original forward. Warned once per model; the report lists all reasons.

    Example:
        >>> warnings.simplefilter("error", fxbt.FxbtWarning)  # fail rather than run unoptimised
    """


class NotCapturable(FxbtError):
    """No graph can serve this call. `silent`: this is expected (the call is being traced), so it is not reported."""

    def __init__(self, reason: str, silent: bool = False) -> None:
        super().__init__(reason)
        self.silent = silent


class CaptureError(FxbtError, RuntimeError):
    """A model call cannot be turned into a graph; `where` is the line of the model's code that prevents it.

    Example:
        >>> CaptureError("output holds a DynamicCache", "model.py:12: return cache").where
        'model.py:12: return cache'
    """

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(f"{reason}\n  at {where}" if where else reason)
        self.reason = reason
        self.where = where


def line_at(file: str, number: int) -> str:
    """A line of the model's code, as `CaptureError.where` shows it."""
    return f"{file}:{number}: {linecache.getline(file, number).strip()}"


class NotOptimizedError(FxbtError, ValueError):
    """`restore` or `refresh` was given a model that `optimize` did not return.

    Example:
        >>> fxbt.restore(torch.nn.Linear(2, 2))  # raises NotOptimizedError
    """


class ExampleError(FxbtError, ValueError):
    """The model itself rejects the example inputs for a capture; the model's error is the `__cause__`.

    Example:
        >>> fxbt.optimize(torch.nn.Linear(2, 2), (torch.ones(1, 3),))  # raises ExampleError
    """


class FallbackError(FxbtError, RuntimeError):
    """A call of a model optimised with `strict=True` would run the original forward; the message says why.

    Example:
        >>> fxbt.optimize(model, strict=True)(**inputs)  # raises FallbackError if no graph is proven for the call
    """


class RuleError(FxbtError, ValueError):
    """A rule that cannot work. Raised when the rule is registered, before any model runs.

    Example:
        >>> fxbt.rule(lambda x, unused: torch.tanh(x), lambda x: x, name="bad")  # raises RuleError
    """


def callers_level() -> int:
    """The `stacklevel` at which a warning points to the line that called the model, not into fxbt or nn.Module."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_CALLERS):
        frame, level = frame.f_back, level + 1
    return level
