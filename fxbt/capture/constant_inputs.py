"""Inputs whose values are constants of a graph (such as image sizes), and what a trace can compute from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode

from ..torch_compat import _disable_current_modes, fake_tensor, proxy_tensor, pytree

_MANY = 2**16  # elements of a tensor computed from constants, such as positions of patches
_MAKES = ("arange", "zeros", "ones", "full", "eye", "linspace")


@contextlib.contextmanager
def knowing() -> Iterator[None]:
    """Makes traces compute what follows from constants, also for tensors of more than one element."""
    with contextlib.ExitStack() as stack:
        for tracing in (fake_tensor, proxy_tensor):
            stack.enter_context(mock.patch.object(tracing, "CONSTANT_NUMEL_LIMIT", _MANY))
        yield


class Constants(TorchFunctionMode):
    """Makes constants of tensors that a traced forward creates from numbers: `torch.arange(4)`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _MAKES:
            return func(*args, **kwargs)
        if any(isinstance(leaf, (Tensor, SymInt)) for leaf in pytree.tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        with _disable_current_modes():
            made = func(*args, **kwargs)
        return func(*args, **kwargs) if made.requires_grad or not 0 < made.numel() <= _MANY else constant(made)


def constant(tensor: Tensor) -> Tensor:
    """A tensor with these values, which a trace knows."""
    with _disable_current_modes():
        values = tensor.tolist()
    return torch.tensor(values, dtype=tensor.dtype, device=tensor.device)
