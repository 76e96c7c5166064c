"""`Recording`: which code a block executes, and what that code read before and after it.

It uses Python's own profiling hook, in one run of the original; an active profiler keeps getting its events.
"""

from __future__ import annotations

import datetime
import gc
import io
import os
import random
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from sysconfig import get_paths
from typing import Any

from torch import nn

from .codes import Facts, functions_of, is_model_code, is_torchs
from .model_state import MEMOS, ModelState
from .settings import (
    Settings,
    foreign_to_graphs,
    foreign_to_graphs_in_c,
    is_asked,
    is_asked_of_c,
    state_of_numpy,
)
from .surroundings import Surroundings

_here = threading.local()
_DIFFERENT_EACH_TIME = frozenset(
    [
        *(getattr(time, name) for name in dir(time) if name.endswith(("time", "_ns", "monotonic", "perf_counter"))),
        *(os.urandom, input, open, io.open, os.stat, os.listdir, os.scandir, os.access, os.readlink, os.getpid),
    ]
)
_NESTING = ("_nested_tensor_from_mask", "_nested_tensor_from_mask_left_aligned")
_STDLIB = get_paths()["stdlib"]
_NOW = ("now", "utcnow", "today")
_OPENERS = frozenset([os.urandom, open, io.open, os.stat, os.listdir, os.scandir, os.access, os.readlink])
_THROUGH = frozenset(["contextlib"])  # standard modules whose callers matter instead
_FILES = {"pathlib", "uuid", "secrets", "random", "codecs", "fileinput", "shelve", "genericpath"}
_OPENING = _THROUGH | _FILES


def is_recording() -> bool:
    """Whether this thread runs a forward whose code is being recorded; no part of it may then be served by a graph."""
    return getattr(_here, "is_recording", False)


class Recording:
    """Records the Python code that runs in a `with` block on this thread.

    Example:
        >>> with Recording(model, ModelState(model)) as recording:
        ...     model(x)
        >>> around = recording.surroundings()
    """

    def __init__(self, model: nn.Module, state: ModelState) -> None:
        self.wrote = False  # whether the block changed its surroundings, or may have
        self._model = model
        self._state = state
        self._codes: dict[tuple[int, int], tuple[types.CodeType, dict[str, Any]]] = {}
        self._kinds: dict[type, None] = {}
        self._is_models: dict[int, bool] = {}
        self._obstacle: str | None = None
        self._before: Surroundings | None = None
        self._previous: Any = None
        self._numpy = ""
        self._collecting = {code for callback in gc.callbacks if (code := getattr(callback, "__code__", None))}
        self._settings: Settings | None = None
        self._asks_settings = False
        self._nests = False

    def ran(self, function: Any) -> bool:
        """Whether this Python function ran in the block."""
        code = getattr(function, "__code__", None)
        return any(code is one for one, _ in self._codes.values())

    def __enter__(self) -> Recording:
        self._previous = sys.getprofile()
        try:
            self._before = Surroundings(self._model, self._state)
            if self._previous is not None and not callable(self._previous):
                self._previous.disable()
        except Exception as error:  # any object may be read here, and a profiler may have no way to be paused
            self._obstacle = f"fxbt cannot find out what forward reads ({type(error).__name__}: {error})"
            return self
        self._numpy, self._settings = state_of_numpy(), Settings()
        _here.is_recording = True
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        if not is_recording():
            return
        _here.is_recording = False
        sys.setprofile(None)
        if callable(self._previous):
            sys.setprofile(self._previous)
        elif self._previous is not None:
            self._previous.enable()
        if self._numpy != state_of_numpy():
            self._refuse("numpy's random numbers")
        if self._settings is not None and (changed := self._settings.changed()):
            self._obstacle = self._obstacle or f"forward changes {changed[0]} for the whole process, and a graph cannot"

    def surroundings(self) -> Surroundings | str:
        """What the code of the block reads, as it is now; or why that cannot be determined."""
        if self._obstacle is not None or self._before is None:
            return str(self._obstacle)
        try:
            return self._surroundings(self._before)
        except Exception as error:  # any object may be read here
            return f"fxbt cannot find out what forward reads ({type(error).__name__}: {error})"

    def _surroundings(self, around: Surroundings) -> Surroundings | str:
        codes = [code for code, _ in self._codes.values()]
        functions = functions_of(codes)
        self.wrote = bool(around.changed())
        self.wrote |= any(Facts(code).writes_closure for code in codes if is_model_code(code.co_filename))
        if self.wrote or not self._state.holds():
            around = Surroundings(self._model, ModelState(self._model))
            for code, namespace in self._codes.values():
                around.reach(code, namespace)
            for kind in self._kinds:
                around.reach_class(kind)
        known = around.contents()
        for function in functions:
            around.reach_function(function)
        self.wrote |= around.contents() > known
        around.settings = self._settings if self._asks_settings else None
        around.nests = self._nests
        around.codes = [code for code in codes if is_model_code(code.co_filename)]
        if noted := MEMOS & around.read:
            return f"forward reads {min(noted)}, which `generate` changes"
        return around.obstacle or around.ready()

    # Events

    def _event(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if self._collects(frame):
            pass  # a callback of the garbage collector, which may run at any time
        elif event == "call":
            self._guarded(self._call, frame)
        elif event == "c_call":
            self._guarded(self._call_of_c, frame, argument)
        if callable(self._previous):
            self._previous(frame, event, argument)

    def _collects(self, frame: types.FrameType) -> bool:
        caller = frame.f_back
        return frame.f_code in self._collecting or (caller is not None and caller.f_code in self._collecting)

    def _guarded(self, note: Callable[..., None], *arguments: Any) -> None:
        try:
            note(*arguments)
        except Exception as error:  # raised from here, it would become the model's own error
            self._obstacle = (
                self._obstacle or f"fxbt cannot find out what forward reads ({type(error).__name__}: {error})"
            )

    def _call(self, frame: types.FrameType) -> None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] in ("self", "cls"):
            first = frame.f_locals.get(code.co_varnames[0])
            self._see_class(first if isinstance(first, type) else type(first))
        self._see_process(frame)
        key = (id(code), id(frame.f_globals))
        if key in self._codes:
            return
        self._codes[key] = (code, frame.f_globals)
        self._is_models[id(code)] = is_model_code(code.co_filename)
        assert self._before is not None
        self._before.reach(code, frame.f_globals)

    def _see_process(self, frame: types.FrameType) -> None:
        """Checks whether the model reads or changes something of the whole process."""
        code = frame.f_code
        is_random = code.co_filename == random.__file__
        if not is_random and not is_torchs(code.co_filename):
            return
        foreign, asks = foreign_to_graphs(code), is_asked(code)
        if not (is_random or foreign or asks) or not self._is_called_by_model(frame):
            return
        self._asks_settings |= asks
        if is_random:
            self._refuse("random." + code.co_name)
        if foreign:
            self._refuse_change(foreign)

    def _is_called_by_model(self, frame: types.FrameType, through: frozenset[str] = _THROUGH) -> bool:
        """Whether the model's code called this function, or entered a block of it."""
        caller = frame.f_back
        while caller is not None and _module_of_pythons(caller) in through:
            caller = caller.f_back
        return caller is not None and is_model_code(caller.f_code.co_filename)

    def _see_class(self, kind: type) -> None:
        if kind in self._kinds:
            return
        self._kinds[kind] = None
        assert self._before is not None
        self._before.reach_class(kind)

    def _call_of_c(self, frame: types.FrameType, function: Any) -> None:
        self._nests |= getattr(function, "__name__", "") in _NESTING and _would_nest(frame, function)
        is_models = self._is_models.get(id(frame.f_code), False)
        if foreign := foreign_to_graphs_in_c(function, is_models):
            self._refuse_change(foreign)
        module = _module_of_pythons(frame) if function in _OPENERS else ""
        if module in _OPENING and self._is_called_by_model(frame, _OPENING):
            self._refuse(f"{module}.{frame.f_code.co_name}")
        if not is_models:
            return
        self._asks_settings |= is_asked_of_c(function)
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        is_now = name in _NOW and isinstance(owner, type) and issubclass(owner, datetime.date)
        is_random = isinstance(owner, random.Random) or type(owner).__module__.startswith("numpy.random")
        if is_now or is_random or function in _DIFFERENT_EACH_TIME:
            self._refuse(f"{getattr(function, '__module__', None) or type(owner).__name__}.{name}")

    def _refuse(self, name: str) -> None:
        self._obstacle = self._obstacle or f"forward uses {name}, which returns something else each time"

    def _refuse_change(self, name: str) -> None:
        self._obstacle = self._obstacle or f"forward calls {name}, and a graph cannot"


def _would_nest(frame: types.FrameType, function: Any) -> bool:
    """Whether nn.TransformerEncoder makes nested tensors, or only asks and learns that this mask does not allow it."""
    if function.__name__ == "_nested_tensor_from_mask":
        return True
    mask = frame.f_locals["src_key_padding_mask"]
    return not function(frame.f_locals["src"], mask.logical_not())


def _module_of_pythons(frame: types.FrameType) -> str:
    """The standard module that a frame's code belongs to; "" for other code."""
    name = frame.f_code.co_filename
    if name.startswith("<frozen "):
        return name.removeprefix("<frozen ").removesuffix(">")
    file = Path(name)
    return file.stem if str(file.parent) == _STDLIB else ""
