"""Python that branches on values of tensors (`if mask.any():`): the trace takes the branch that the example takes.

A run of the original notes the answers in order; the trace gives the same answers and makes the graph assert them. A
call for which one does not hold runs the original forward.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..torch_compat import FakeTensor, assert_async

_ANOTHER_WAY = "the call goes another way than the captured one"
_LOOP = 16  # answers in a row to one line; more mean a loop that asks at every step whether to go on

Place = tuple[str, int]


def goes_another_way(error: Exception) -> bool:
    """Whether a graph stopped because a value took another branch; torch's assertions cannot raise a type of ours."""
    return isinstance(error, RuntimeError) and _ANOTHER_WAY in str(error)


@dataclass(frozen=True)
class Answer:
    """The truth value of a tensor that Python asked for, and the line of the model's code that asked."""

    place: Place
    value: bool


def assert_now(holds: Tensor, message: str) -> None:
    """Runs `aten._assert_async` by asking in Python, because on CUDA the op would kill the process."""
    if not holds.item():
        raise RuntimeError(message)


class Noted(TorchFunctionMode):
    """Notes the answers in a forward that runs unchanged.

    `is_model_code` says whether a file belongs to the model.

    Example:
        >>> with Noted(is_model_code) as noted:
        ...     model(x)
        >>> noted.answers
    """

    def __init__(self, is_model_code: Callable[[str], bool]) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        self._is_model_code = is_model_code

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _asks(func, args):
            self.answers.append(Answer(_place(self._is_model_code), bool(result)))
        return result

    def loop(self) -> Place | None:
        """The line of a loop that asks at every step; None if there is none."""
        for place, answers in itertools.groupby(self.answers, key=lambda answer: answer.place):
            if len(list(answers)) > _LOOP:
                return place
        return None


class Followed(TorchFunctionMode):
    """Gives a traced forward these answers where it asks for what the trace cannot know."""

    def __init__(self, answers: Sequence[Answer], is_model_code: Callable[[str], bool]) -> None:
        super().__init__()
        self._left = list(answers)
        self._is_model_code = is_model_code

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _asks(func, args):
            return func(*args, **(kwargs or {}))
        answer = self._next(_place(self._is_model_code))
        if answer is None or not isinstance(args[0], FakeTensor) or args[0].constant is not None:
            return func(*args, **(kwargs or {}))
        truth = args[0].reshape(()) != 0
        holds = truth if answer.value else truth.logical_not()
        file, line = answer.place
        assert_async(holds, f"{_ANOTHER_WAY} at {file}:{line}, which found {answer.value} there")
        return answer.value

    def _next(self, place: Place) -> Answer | None:
        """The next answer for this line; a run and a trace may each ask elsewhere, too."""
        for i, answer in enumerate(self._left):
            if answer.place == place:
                del self._left[: i + 1]
                return answer
        return None


def _asks(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__bool__" or (name == "item" and isinstance(args[0], Tensor) and args[0].dtype is torch.bool)


def _place(is_model_code: Callable[[str], bool]) -> Place:
    frame = sys._getframe(2)
    while frame.f_back is not None and not is_model_code(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
