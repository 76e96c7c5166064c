"""Confines what tracing patches in the whole process to the tracing thread, so that other threads see nothing of it.

FX replaces `nn.Module.__call__` and `__getattr__` by wrappers that know the modules of one trace only, and torch.export
sets flags that models read (`torch.compiler.is_compiling()`). Modules in other threads must see neither.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import fx
from torch.nn.modules import module as nn_module

from ..torch_compat import (
    IS_COMPILING,
    IS_EXPORTING,
    IS_FX_TRACING,
    IS_FX_TRACING_OF_ALL_THREADS,
    NEW_PATCHER,
    fx_trace,
    proxy_tensor,
)

OBJECTS_PER_COLLECTION = 100_000  # during a capture; Python's own number is 700


class _Here:
    """True in the thread that made it, False in others; replaces torch's flags, so it computes like a bool."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread

    def __and__(self, other: Any) -> Any:
        return bool(self) & other

    def __or__(self, other: Any) -> Any:
        return bool(self) | other

    def __xor__(self, other: Any) -> Any:
        return bool(self) ^ other

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __index__(self) -> int:
        return int(bool(self))

    def __repr__(self) -> str:
        return repr(bool(self))


def here_only(replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is `replacement` in this thread and `original` in others."""
    here = _Here()

    @functools.wraps(replacement)
    def function(*args: Any, **kwargs: Any) -> Any:
        return (replacement if here else original)(*args, **kwargs)

    return function


class _OwnPatcher(fx_trace._Patcher):
    """FX's patches of methods, for this thread only, and only until they are reverted.

    Another thread may trace, too (for example with torch.compile), and revert its patches in any order: a patch left
    behind does nothing, and one on top of ours stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._here = _Here()
        self._is_over = False

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        original = getattr(cls, name)

        @functools.wraps(new_fn)
        def method(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if self._here and not self._is_over else original)(*args, **kwargs)

        super().patch_method(cls, name, method, deduplicate)

    def revert_all_patches(self) -> list[Any]:
        """Dynamo reverts all patches while it compiles and reapplies them; in this thread it may."""
        return super().revert_all_patches() if self._here and not self._is_over else self.patches_made

    def reapply_all_patches(self) -> list[Any]:
        """See `revert_all_patches`."""
        return super().reapply_all_patches() if self._here and not self._is_over else self.patches_made

    def end(self) -> None:
        """Reverts all patches except those with another thread's patch on top."""
        self._is_over = True
        for patch in reversed(self.patches_made):
            if not _is_covered(patch):
                patch.revert()


def _is_covered(patch: Any) -> bool:
    """Whether another patch of the same method was put on top."""
    is_method = isinstance(patch, fx_trace._PatchedFnSetAttr)
    return is_method and getattr(patch.frame_dict, patch.fn_name) is not patch.new_fn


@contextlib.contextmanager
def _own_patcher() -> Iterator[fx_trace._Patcher]:
    before, patcher = fx_trace.CURRENT_PATCHER, _OwnPatcher()
    fx_trace.CURRENT_PATCHER = patcher
    try:
        with mock.patch.object(*IS_FX_TRACING, _Here()) if IS_FX_TRACING_OF_ALL_THREADS else contextlib.nullcontext():
            yield patcher
    finally:
        patcher.end()
        if fx_trace.CURRENT_PATCHER is patcher:  # otherwise another thread's, which it restores itself
            fx_trace.CURRENT_PATCHER = before


@contextlib.contextmanager
def _own_flags() -> Iterator[None]:
    with (
        mock.patch.object(*IS_COMPILING, _Here()),
        mock.patch.object(*IS_EXPORTING, _Here()),
    ):
        yield


class _WithoutWalks:
    """`pytree` for torch.fx, which finds nothing to walk through in this thread.

    From torch 2.13 on, fx walks through the arguments of each node that it makes, to warn of sizes that are no nodes:
    for 48 layers, 0.2 of 3.6 s. It has no other use for `tree_iter`.
    """

    def __init__(self) -> None:
        self._whole = fx.graph.pytree
        self.tree_iter = here_only(lambda tree, is_leaf=None: iter(()), self._whole.tree_iter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


@contextlib.contextmanager
def leaving_no_hooks() -> Iterator[None]:
    """Removes the hooks on buffers that a trace registers, which torch 2.11 leaves behind if the trace fails.

    Such a hook keeps the model alive, and raises where its forward assigns a buffer later, in the next trace too.
    """
    register = nn_module.register_module_buffer_registration_hook
    handles = []

    def registered(hook: Callable[..., Any]) -> Any:
        handles.append(register(hook))
        return handles[-1]

    try:
        with mock.patch.object(nn_module, register.__name__, here_only(registered, register)):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Runs a block whose traces are invisible to other threads and leave nothing behind in torch.

    One thread at a time: see `locks`.

    Example:
        >>> with isolated():
        ...     torch.export.export(model, (x,), strict=False)
    """
    from ..torch_compat import EXPORTS_FLAGS  # loads what no graph from disk needs

    with (
        mock.patch.object(fx.graph, "pytree", _WithoutWalks()),
        mock.patch.object(*NEW_PATCHER, _own_patcher),
        mock.patch.object(*EXPORTS_FLAGS, _own_flags),
        # torch keeps the nodes of the last trace here until the next one, and with them the model's weights
        mock.patch.object(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}),
    ):
        yield


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Lets Python's garbage collector run rarely: a trace makes little garbage, and looking for it takes 0.5 of 4.5
    s.

    A large graph makes Python look at all its objects afterwards (0.3 s with torch loaded). So it looks here, at those
    made meanwhile: the others are frozen until then, unless the process has frozen some itself.
    """
    first, *others = gc.get_threshold()
    may_freeze = bool(first) and gc.isenabled() and not gc.get_freeze_count()
    gc.set_threshold(first and max(first, OBJECTS_PER_COLLECTION), *others)  # 0 means never
    if may_freeze:
        gc.freeze()
    try:
        yield
    finally:
        gc.set_threshold(first, *others)
        if may_freeze:
            gc.collect()
            gc.unfreeze()
