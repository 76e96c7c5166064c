"""Why a trace failed, in the user's words, with the line of the model's code where it stopped."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from ..errors import CaptureError, line_at
from ..torch_compat import GuardOnDataDependentSymNode, fake_tensor
from .codes import is_model_code

_VALUES_READ = (GuardOnDataDependentSymNode, fake_tensor.DataDependentOutputException)
_VALUES_NEEDED = (
    "the model's Python goes by a number that only the values of tensors give, and a graph knows their shapes alone; "
    "compute it with tensor operations (torch.where instead of if), or pass it as a number"
)


def reads_values(error: Exception) -> bool:
    """Whether it was Python's looking at values of tensors that a trace failed on."""
    return any(isinstance(cause, _VALUES_READ) for cause in _causes(error))


def capture_error(error: Exception) -> CaptureError:
    """What the user is told where a trace ended with `error`; fxbt's own reason among its causes, if there is one."""
    for cause in _causes(error):
        if isinstance(cause, CaptureError):
            return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if reads_values(error):
        return CaptureError(f"{_VALUES_NEEDED} (torch: {_shortened(first)})", where(error))
    return CaptureError(f"{type(error).__name__}: {first}", where(error))


def _shortened(text: str, most: int = 200) -> str:
    """torch's first sentence, which has the expression."""
    text = re.sub(r" \((unhinted|Size-like symbols):.*", "", text)
    return text if len(text) <= most else f"{text[:most]} ..."


def where(error: BaseException) -> str:
    """The innermost line of the error's tracebacks that is neither torch's, nor Python's, nor fxbt's own."""
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
