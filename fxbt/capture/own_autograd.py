"""Refuses gradients that a forward makes or changes itself, because a graph of operations cannot carry them.

The derivative of a graph is that of its operations. `detach` and blocks without gradients are operations, too, and
kept; a `torch.autograd.Function`, a hook on a value or a gradient taken inside forward is not.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError, line_at
from ..torch_compat import RUN_BACKWARD, get_proxy_mode, is_under_functorch, watching_functions
from .checkpointing import run_plainly

# Effects on gradients, by the name of the tensor method.
_METHODS = {
    "register_hook": "registers a hook on the gradient of a value",
    "register_post_accumulate_grad_hook": "registers a hook on the gradient of a parameter",
    "retain_grad": "keeps the gradient of an intermediate value",
    "detach_": "detaches a value in place, also for earlier results computed from it",
}
_READS = {"grad_fn": "reads how a value was computed (grad_fn)"}
# Functions with which torch itself gives operations their derivatives.
_OF_OPERATIONS = ("torch._library", "torch._higher_order_ops", "torch._functorch")


@contextlib.contextmanager
def refused(
    arguments: Sequence[Tensor], kept: Sequence[Tensor], is_model_code: Callable[[str], bool]
) -> Iterator[None]:
    """Raises `CaptureError` in a traced block that makes gradients itself; checkpoints run plainly and are marked.

    `arguments` and the model's `kept` parameters and buffers outlive a call, and a graph cannot change them.
    `is_model_code` says whether a file belongs to the model. Without gradients, only changes of those tensors are
    refused.
    """
    with _no_functions(is_model_code), run_plainly(), _Methods(arguments, kept, is_model_code):
        yield


@contextlib.contextmanager
def _no_functions(is_model_code: Callable[[str], bool]) -> Iterator[None]:
    """Catches functions and classes of torch, under whatever name the model calls them."""
    enter = saved_tensors_hooks.__enter__
    run_engine = getattr(*RUN_BACKWARD)

    def refuse(what: str) -> None:
        if _is_traced_here():
            raise CaptureError(
                f"forward {what}, and a graph has only the gradients of its operations", _line(is_model_code)
            )

    def watch(cls: type) -> None:
        if torch.is_grad_enabled() and not cls.__module__.startswith(_OF_OPERATIONS):
            refuse(f"applies a torch.autograd.Function, {cls.__qualname__}, which has a backward of its own")

    def entered(self: saved_tensors_hooks) -> Any:
        if torch.is_grad_enabled():
            refuse(f"controls how values are saved for the backward ({type(self).__name__})")
        return enter(self)

    def run(*args: Any, **kwargs: Any) -> Any:
        refuse("takes gradients itself (torch.autograd.grad, backward)")
        return run_engine(*args, **kwargs)

    with (
        watching_functions(watch),
        mock.patch.object(saved_tensors_hooks, "__enter__", entered),
        mock.patch.object(*RUN_BACKWARD, run),
    ):
        yield


def _is_traced_here() -> bool:
    """Whether this thread traces and is not inside torch.func, whose gradients become operations."""
    return get_proxy_mode() is not None and not is_under_functorch()


class _Methods(TorchFunctionMode):
    """Catches methods called on tensors."""

    def __init__(
        self, arguments: Sequence[Tensor], kept: Sequence[Tensor], is_model_code: Callable[[str], bool]
    ) -> None:
        super().__init__()
        self._arguments = {id(tensor) for tensor in arguments}
        self._kept = {id(tensor) for tensor in kept}
        self._is_model_code = is_model_code

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, attribute = getattr(func, "__name__", ""), getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and attribute == "data":
            return args[0].detach()  # reading .data is the same, and detach is an operation
        if name == "__set__" and attribute == "data":
            self._refuse("replaces the values of a tensor (.data = ...)")
        if torch.is_grad_enabled():
            what = _READS.get(attribute) if name == "__get__" else _METHODS.get(name)
            if what is not None:
                self._refuse(what)
        if name == "requires_grad_" or (name == "__set__" and attribute == "requires_grad"):
            self._check_requires_grad(args[0], *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _check_requires_grad(self, tensor: Tensor, requires_grad: bool = True) -> None:
        """An intermediate value that is made to require a gradient is read by nobody: nothing to carry."""
        is_argument = id(tensor) in self._arguments  # it may require one already if the model just ran on it
        if tensor.requires_grad == requires_grad and not is_argument:
            return
        if is_argument or id(tensor) in self._kept or not requires_grad:
            self._refuse("changes whether a tensor requires a gradient (requires_grad_)")

    def _refuse(self, what: str) -> None:
        raise CaptureError(f"forward {what}, and a graph cannot", _line(self._is_model_code))


def _line(is_model_code: Callable[[str], bool]) -> str:
    """The line of the model's code that runs."""
    frame: Any = sys._getframe(1)
    while frame is not None and not is_model_code(frame.f_code.co_filename):
        frame = frame.f_back
    return "" if frame is None else line_at(frame.f_code.co_filename, frame.f_lineno)
