"""Progress: what a capture is doing, as one line on a terminal, and the seconds of each part.

`part` names the current part; it does nothing in a call that is not watched. The line appears after two seconds if
stderr is a terminal and `FXBT_PROGRESS` is not 0. It does not slow the capture down: another thread looks up which
module's forward is running.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import nn

SILENT_SECONDS = 2.0  # no line for anything shorter
_EVERY = 0.25  # seconds between two updates
_OTHER = "other"

_here = threading.local()


class Watch:
    """What a thread does in a capture, and the seconds of each part; time in a nested part counts for that part alone.

    Example:
        >>> with watched(model) as watch:
        ...     with part("capture"):
        ...         capture(model)
        >>> watch.seconds
        {'other': 0.1, 'capture': 1.7}
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.thread = threading.get_ident()
        self.seconds: dict[str, float] = {}
        self._parts = [(_OTHER, "")]
        self._since = time.perf_counter()

    @property
    def now(self) -> tuple[str, str]:
        """The current part, and its current item."""
        return self._parts[-1]

    def enter(self, what: str, of: str = "") -> None:
        """Begins the part `what`; the part before it pauses."""
        self._count()
        self._parts.append((what, of))

    def leave(self) -> None:
        """Ends the part that began last."""
        self._count()
        self._parts.pop()

    def _count(self) -> None:
        now, (what, _) = time.perf_counter(), self.now
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self._since
        self._since = now


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Watches what this thread does for a model and shows it if wanted; nested calls continue the outer watch."""
    outer: Watch | None = getattr(_here, "watch", None)
    if outer is not None:
        yield outer
        return
    watch = _here.watch = Watch(model)
    with _line(watch) if is_wanted() else contextlib.nullcontext():
        try:
            yield watch
        finally:
            watch.leave()
            _here.watch = None


@contextlib.contextmanager
def part(what: str, of: str = "") -> Iterator[None]:
    """Names what this thread does, if it is watched, and for which item: ("run rules", "attention")."""
    watch: Watch | None = getattr(_here, "watch", None)
    if watch is None:
        yield
        return
    watch.enter(what, of)
    try:
        yield
    finally:
        watch.leave()


def is_wanted() -> bool:
    """Whether to show a line: stderr is a terminal, and `FXBT_PROGRESS` is not 0."""
    return os.environ.get("FXBT_PROGRESS", "1") != "0" and sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def _line(watch: Watch) -> Iterator[None]:
    is_over = threading.Event()
    thread = threading.Thread(target=_show, args=(watch, is_over.wait), name="fxbt-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _show(watch: Watch, is_over: Callable[[float], bool]) -> None:
    if is_over(SILENT_SECONDS):
        return
    from tqdm import tqdm  # loaded only if a line is shown

    with tqdm(bar_format="fxbt: {desc} [{elapsed}]", leave=False, file=sys.stderr, dynamic_ncols=True) as line:
        line.start_t -= SILENT_SECONDS
        paths = {id(module): path for path, module in watch.model.named_modules() if path}
        while not is_over(_EVERY):
            line.set_description_str(text_of(watch, paths))


def text_of(watch: Watch, paths: dict[int, str]) -> str:
    """The line's text: "BertModel: capture encoder.layer.7". `paths` maps the ids of modules to their paths."""
    what, of = watch.now
    of = of or _module_now(sys._current_frames().get(watch.thread), paths) or ""
    return f"{type(watch.model).__name__}: {what} {of}".rstrip()


def _module_now(frame: FrameType | None, paths: dict[int, str]) -> str | None:
    """The path of the innermost module whose forward a thread is running."""
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_varnames[:1] == ("self",):
            module: Any = frame.f_locals.get("self")
            if path := paths.get(id(module)):
                return path
        frame = frame.f_back
    return None
