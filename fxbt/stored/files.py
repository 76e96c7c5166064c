"""The files of stored graphs: flat files in a folder, replaced as a whole, found by parts of their names.

A file has two or three lines of JSON: what the graph rests on, the graph as it was captured, and what it became. None
can run code when it is read.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..kernels import cache
from .conditions import Conditions
from .descriptions import digest
from .errors import Malformed, checked

FORMAT = 1  # of the files; another format is refused
MOST_BYTES = 64 << 20
KEPT = 16  # graphs in the cache per kind of call
_NAME = re.compile(r"graph-[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}\.json")
_PARTS = ("versions", "model", "ran", "reached")


@dataclass(frozen=True)
class Folder:
    """A folder of stored graphs; without a path, the user's cache, where nobody else can write.

    Example:
        >>> Folder(Path("graphs")).names("0123456789abcdef")
        []
    """

    path: Path | None = None

    def names(self, signature: str) -> list[str]:
        """The files for a kind of call; in the cache, newest first."""
        return [name for name in self._files(f"graph-{signature}-") if _NAME.fullmatch(name)]

    def _files(self, start: str) -> list[str]:
        if self.path is None:
            return cache.names(start)
        return sorted(path.name for path in self.path.glob(f"{start}*"))

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None if there is none to read.

        Raises:
            Malformed: it is not a plain file, or too large.
        """
        if self.path is None:
            found = cache.find(name, MOST_BYTES)
            return None if found is None else found.data
        try:
            return cache.read(self.path / name, MOST_BYTES, of_anyone=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Malformed(str(error)) from error

    def write(self, signature: str, conditions: Conditions, graph: str, finished: str = "") -> Path:
        """Writes a graph, as text, with what it rests on, and what it became, if that is known.

        Raises:
            OSError: the file cannot be written.
        """
        name = f"graph-{signature}-{conditions.digest()}-{digest(graph)}.json"
        head = json.dumps({"format": FORMAT, **asdict(conditions)}, separators=(",", ":"))
        data = "".join(f"{line}\n" for line in (head, graph, finished) if line).encode()
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            return cache.write_to(self.path, name, data)
        written = cache.write(name, data)
        for old in self.names(signature)[KEPT:]:
            cache.remove(old)
        return written


def conditions_in(data: bytes) -> Conditions:
    """The conditions that a file states for its graph.

    Raises:
        Malformed: it states none.
    """
    found = _json(data.partition(b"\n")[0])
    if found.pop("format", None) != FORMAT:
        raise Malformed("the file was written by another version of fxbt")
    if set(found) != set(_PARTS):
        raise Malformed("the file does not state the graph's conditions")
    lines = {part: checked(found[part], dict) for part in _PARTS}
    if any(type(text) is not str for part in lines.values() for text in part.values()):
        raise Malformed("the file does not state the graph's conditions")
    return Conditions(**lines)


def graph_in(data: bytes) -> dict[str, Any]:
    """The graph in a file, as `graphs.read_graph` takes it.

    Raises:
        Malformed: there is none.
    """
    return _json(data.partition(b"\n")[2].partition(b"\n")[0])


def finished_in(data: bytes) -> dict[str, Any] | None:
    """What a graph became, as `runtime.finished.read` takes it; None where the file has the captured graph alone.

    Raises:
        Malformed: there is something else.
    """
    text = data.partition(b"\n")[2].partition(b"\n")[2]
    return _json(text) if text else None


def _json(data: bytes) -> dict[str, Any]:
    try:
        return checked(json.loads(data), dict)
    except (ValueError, RecursionError) as error:  # not text, not JSON, or numbers or nesting without end
        raise Malformed(f"the file is not JSON ({type(error).__name__})") from error
