"""`Shelf`: the stored graphs of one model: finds the one for a call, says why others do not fit, and adds new ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..capture.call import Call
from ..capture.captured import Captured
from ..capture.outputs import Values
from ..capture.surroundings import Surroundings
from ..errors import CaptureError
from .conditions import Conditions, conditions_of, signature_of
from .errors import Malformed, Unstorable
from .files import Folder, conditions_in, finished_in, graph_in
from .graphs import Drawing, read_graph

logger = logging.getLogger("fxbt")


@dataclass(frozen=True)
class Label:
    """What identifies a graph: the kind of its call, and its conditions; or why it cannot be stored."""

    signature: str = ""
    conditions: Conditions | None = None
    obstacle: str = ""

    @classmethod
    def of(cls, model: nn.Module, key: Hashable, around: Surroundings) -> Label:
        """The label of a graph of the model as it is now, for calls of a key."""
        try:
            return cls(signature_of(model, key), conditions_of(model, around))
        except Exception as error:  # any object may be read here
            return cls(obstacle=_why(error))


@dataclass(frozen=True)
class Text:
    """A captured graph as text, or why it has none."""

    label: Label
    draw: Callable[[], str] = str  # makes the text of the graph
    obstacle: str = ""
    finish: Callable[[], str] = str  # makes the text of what the graph became; "" for none

    @classmethod
    def of(cls, captured: Captured, model: nn.Module, label: Label) -> Text:
        """The text of a graph before any rewriting, made when somebody asks for it."""
        if label.obstacle:
            return cls(label, obstacle=label.obstacle)
        try:
            drawing = Drawing(captured, model)
        except Exception as error:  # a failure of fxbt itself; the graph works without a text
            logger.debug("a graph has no text", exc_info=error)
            return cls(label, obstacle=_why(error))
        return cls(label, lambda: json.dumps(drawing.written(), separators=(",", ":")))

    def write(self, folder: Folder) -> Path:
        """Writes the graph to a folder.

        Raises:
            Unstorable: it has no text.
            OSError: the file cannot be written.
        """
        if self.obstacle or self.label.conditions is None:
            raise Unstorable(self.obstacle)
        return folder.write(self.label.signature, self.label.conditions, self._drawn(), self.finish())

    def _drawn(self) -> str:
        try:
            return self.draw()
        except Unstorable:
            raise
        except Exception as error:  # a failure of fxbt itself
            logger.debug("a graph has no text", exc_info=error)
            raise Unstorable(_why(error)) from error


@dataclass(frozen=True)
class Stored:
    """A graph of another process: whole as it was captured, or its inputs alone with what it became (`finished`)."""

    captured: Captured
    text: Text
    finished: Any = None

    def whole(self, model: nn.Module, call: Call, expected: Values) -> Captured:
        """The graph as it was captured, for a call that returns what is `expected`.

        Raises:
            Malformed: it is none of fxbt's.
        """
        return read_graph(json.loads(self.text.draw()), model, call, expected)


class Shelf:
    """The stored graphs of one model, in a folder; None means there is no folder.

    Args:
        read: makes of a text what a graph became; None where that is for other options.

    Example:
        >>> shelf = Shelf(model, Folder(), may_write=True, note=print, read=lambda text: None)
        >>> label = Label.of(model, key, around)
        >>> stored = shelf.take(label, call, expected)
        >>> captured = stored.captured if stored else capture(model, call)
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Folder | None,
        may_write: bool,
        note: Callable[[str], None],
        read: Callable[[Any], Any],
    ) -> None:
        self._model = model
        self._folder = folder
        self._may_write = may_write
        self._note = note
        self._read = read

    def take(self, label: Label, call: Call, expected: Values) -> Stored | None:
        """A stored graph for a call that returns `expected`; else None, with the reason in the report."""
        if self._folder is None:
            return None
        if label.conditions is None:
            self._note(f"no graph is stored for this model: {label.obstacle}")
            return None
        try:
            return self._take(self._folder, label, label.conditions, call, expected)
        except Exception as error:  # of fxbt's own: what is not read is captured
            self._note(f"stored graphs were not read: {_why(error)}")
            return None

    def refuse(self, error: CaptureError) -> None:
        """Notes that a stored graph could not be made to run."""
        self._note(f"a stored graph was not used: {error}")

    def keep(self, text: Text) -> None:
        """Stores a graph, if that is wanted."""
        if self._folder is None or not self._may_write or text.label.obstacle:
            return
        try:
            text.write(self._folder)
        except (Unstorable, OSError) as error:
            self._note(f"a graph was not stored: {_why(error)}")

    def _take(
        self, folder: Folder, label: Label, conditions: Conditions, call: Call, expected: Values
    ) -> Stored | None:
        names = folder.names(label.signature)
        fitting = [name for name in names if f"-{conditions.digest()}-" in name]
        for name in fitting:
            try:
                stored = self._stored(folder, name, label, conditions, call, expected)
            except AssertionError:  # for other sizes than the call's
                continue
            except (Malformed, CaptureError, Stale) as error:
                self._note(f"{name} was not used: {_why(error)}")
                continue
            if stored is not None:
                return stored
        if names and not fitting:
            self._note(f"{names[0]} was not used: {_difference(folder, names[0], conditions)}")
        return None

    def _stored(
        self, folder: Folder, name: str, label: Label, conditions: Conditions, call: Call, expected: Values
    ) -> Stored | None:
        data = folder.read(name)
        if data is None:
            return None
        if difference := conditions.differs_from(conditions_in(data)):
            raise Stale(difference)
        try:
            text = finished_in(data)
            finished = None if text is None else self._read(text)
            captured = read_graph(graph_in(data), self._model, call, expected, is_whole=finished is None)
        except (Malformed, AssertionError, CaptureError):
            raise
        except Exception as error:  # a file that no fxbt wrote may fail torch or sympy in any way
            raise Malformed(f"the file is not a graph ({type(error).__name__}: {error})") from error
        lines = data.decode().split("\n")
        return Stored(captured, Text(label, lambda: lines[1], finish=lambda: lines[2]), finished)


class Stale(Exception):
    """A condition of a stored graph no longer holds; the message says which."""


def _difference(folder: Folder, name: str, conditions: Conditions) -> str:
    try:
        data = folder.read(name)
        return "the file is gone" if data is None else str(conditions.differs_from(conditions_in(data)))
    except Malformed as error:
        return str(error)


def _why(error: Exception) -> str:
    if isinstance(error, (Malformed, Unstorable, CaptureError, Stale)):
        return str(error)
    return f"{type(error).__name__}: {error}"
