"""`Shelf`: the stored graphs of one model: which of them stands for a call, why others do not, and how to keep one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..capture.call import Call
from ..capture.export import Captured
from ..capture.surroundings import Surroundings
from ..errors import CaptureError
from ..torch_compat import pytree
from .conditions import Conditions, conditions_of, signature_of
from .errors import Malformed, Unstorable
from .files import Folder, conditions_in, graph_in
from .graphs import read_graph, written_graph

logger = logging.getLogger("fxbt")


@dataclass(frozen=True)
class Text:
    """A captured graph as text, for calls of a key; or why there is none."""

    key: Hashable
    graph: str = ""
    obstacle: str = ""

    @classmethod
    def of(cls, captured: Captured, model: nn.Module, key: Hashable) -> Text:
        """The text of a graph that nothing has rewritten yet."""
        try:
            return cls(key, json.dumps(written_graph(captured, model), separators=(",", ":")))
        except Unstorable as obstacle:
            return cls(key, obstacle=str(obstacle))
        except Exception as fault:  # of fxbt's own: the graph itself is well without a text
            logger.debug("fxbt failed to write a graph", exc_info=fault)
            return cls(key, obstacle=f"fxbt itself failed ({type(fault).__name__}: {fault})")


class Shelf:
    """The stored graphs of one model, in a folder that may be none.

    Example:
        >>> shelf = Shelf(model, Folder(), may_write=True, note=print)
        >>> label = shelf.label(key, around)
        >>> captured = shelf.take(label, call, spec) or capture(model, call)
    """

    def __init__(self, model: nn.Module, folder: Folder | None, may_write: bool, note: Callable[[str], None]) -> None:
        self._model = model
        self._folder = folder
        self._may_write = may_write
        self._note = note

    def label(self, key: Hashable, around: Surroundings) -> Label | None:
        """What tells the graphs for a call from others; None where there are none, or nothing could tell them."""
        if self._folder is None:
            return None
        try:
            return Label(signature_of(self._model, key), conditions_of(self._model, around))
        except Exception as error:  # objects of anyone's making are read here
            self._note(f"no graph is stored for this model: {_why(error)}")
            return None

    def take(self, label: Label | None, call: Call, spec: pytree.TreeSpec) -> Captured | None:
        """A stored graph for a call that returns what `spec` says; None, and why in the report, where there is none."""
        if label is None or self._folder is None:
            return None
        try:
            return self._take(self._folder, label, call, spec)
        except Exception as error:  # of fxbt's own: what is not read is captured
            self._note(f"stored graphs were not read: {_why(error)}")
            return None

    def refuse(self, error: CaptureError) -> None:
        """A stored graph could not be made to run."""
        self._note(f"a stored graph was not used: {error}")

    def keep(self, label: Label | None, text: Text) -> None:
        """Stores a graph, where that is wanted."""
        if label is None or self._folder is None or not self._may_write:
            return
        if text.obstacle:
            self._note(f"a graph was not stored: {text.obstacle}")
            return
        try:
            self._folder.write(label.signature, label.conditions, text.graph)
        except OSError as error:
            self._note(f"a graph was not stored: {error}")

    def _take(self, folder: Folder, label: Label, call: Call, spec: pytree.TreeSpec) -> Captured | None:
        exact = f"-{label.conditions.digest()}-"
        names = folder.names(label.signature)
        fitting = [name for name in names if exact in name]
        for name in fitting:
            try:
                captured = _captured(folder, name, label, self._model, call, spec)
            except AssertionError:  # for other sizes than the call's
                continue
            except (Malformed, CaptureError, Stale) as error:
                self._note(f"{name} was not used: {_why(error)}")
                continue
            if captured is not None:
                return captured
        others = [name for name in names if exact not in name]
        if others and not fitting:
            self._note(f"{others[0]} was not used: {_difference(folder, others[0], label)}")
        return None


@dataclass(frozen=True)
class Label:
    """What tells graphs from others: the kind of the call, and what they rest on."""

    signature: str
    conditions: Conditions


class Stale(Exception):
    """A stored graph rests on what is no longer so; the message says what."""


def _captured(
    folder: Folder, name: str, label: Label, model: nn.Module, call: Call, spec: pytree.TreeSpec
) -> Captured | None:
    data = folder.read(name)
    if data is None:
        return None
    if difference := label.conditions.differs_from(conditions_in(data)):
        raise Stale(difference)
    try:
        return read_graph(graph_in(data), model, call, spec)
    except (Malformed, AssertionError, CaptureError):
        raise
    except Exception as error:  # a file that no fxbt wrote may fail torch or sympy in any way
        raise Malformed(f"it is no graph ({type(error).__name__}: {error})") from error


def _difference(folder: Folder, name: str, label: Label) -> str:
    try:
        data = folder.read(name)
        return "it is gone" if data is None else str(label.conditions.differs_from(conditions_in(data)))
    except Malformed as error:
        return str(error)


def _why(error: Exception) -> str:
    if isinstance(error, (Malformed, Unstorable, CaptureError, Stale)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def save(folder: Path, model: nn.Module, text: Text, around: Surroundings) -> Path:
    """Writes a graph of a model that is as it was when the graph was captured.

    Raises:
        Unstorable: it has no text, or what it rests on has none.
        OSError: nothing can be written.
    """
    if text.obstacle:
        raise Unstorable(text.obstacle)
    return Folder(folder).write(signature_of(model, text.key), conditions_of(model, around), text.graph)
