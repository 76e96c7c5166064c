"""Keeps torch.export from writing Python code for a graph after each of its passes: nobody runs that code.

For 48 layers it is written seven times, 40 ms each, and compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import fx

from .isolated import here_only

_RECOMPILE = fx.GraphModule.recompile


@contextlib.contextmanager
def code_written_later() -> Iterator[None]:
    """In this block, in this thread, a GraphModule's code is written when it is run, as `LazyGraphModule` does.

    Example:
        >>> with code_written_later():
        ...     program = torch.export.export(model, (x,), strict=False)
    """
    with mock.patch.object(fx.GraphModule, "recompile", here_only(_leave_for_later, _RECOMPILE)):
        yield


def _leave_for_later(module: Any) -> None:
    codegen = module.graph._codegen
    if hasattr(codegen, "pytree_info"):
        module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
    type(module).forward = _forward


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The `forward` of a module without code: writes it, which replaces this, and runs it."""
    _RECOMPILE(module)
    return type(module).forward(module, *args, **kwargs)
