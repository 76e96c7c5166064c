"""Explains why a trace failed, in the user's words, with the line of the model's code where it stopped."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from ..errors import CaptureError, line_at
from ..torch_compat import GuardOnDataDependentSymNode, fake_tensor
from .codes import is_model_code

_VALUES_READ = (GuardOnDataDependentSymNode, fake_tensor.DataDependentOutputException)
_VALUES_NEEDED = (
    "the model's Python code branches on or uses a number that depends on the values of tensors, and a graph only "
    "knows "
    "their shapes; compute it with tensor operations (torch.where instead of if), or pass it as a number"
)


def reads_values(error: Exception) -> bool:
    """Whether the trace failed because Python looked at the values of tensors."""
    return any(isinstance(cause, _VALUES_READ) for cause in _causes(error))


def capture_error(error: Exception) -> CaptureError:
    """The error for the user when a trace ended with `error`; fxbt's own reason if it is among the causes."""
    for cause in _causes(error):
        if isinstance(cause, CaptureError):
            return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if reads_values(error):
        return CaptureError(f"{_VALUES_NEEDED} (torch: {_shortened(first)})", where(error))
    return CaptureError(f"{type(error).__name__}: {first}", where(error))


def _shortened(text: str, most: int = 200) -> str:
    """torch's first sentence, which contains the expression."""
    text = re.sub(r" \((unhinted|Size-like symbols):.*", "", text)
    return text if len(text) <= most else f"{text[:most]} ..."


def where(error: BaseException) -> str:
    """The innermost line in the error's tracebacks that is not torch's, Python's or fxbt's own."""
    for cause in reversed(list(_causes(error))):
        frames = traceback.extract_tb(cause.__traceback__)
        user = [frame for frame in frames if is_user_code(frame.filename)]
        if user:
            return line_at(user[-1].filename, user[-1].lineno or 0)
    return ""


def is_user_code(filename: str) -> bool:
    """Whether lines of this file can be shown to the user."""
    return not filename.startswith("<") and is_model_code(filename)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
