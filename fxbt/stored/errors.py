"""Why something is not written, and why a file is not taken for a graph."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


class Unstorable(Exception):
    """A graph, or what it rests on, has no text that another process could check; the message says what."""


class Malformed(Exception):
    """A file is not what fxbt writes: it is refused as a whole."""


def checked(value: Any, kind: type[T]) -> T:
    """`value`, which a file has, if it is of the kind that stands there in fxbt's own files.

    Raises:
        Malformed: it is not; True is no int here.

    Example:
        >>> checked(["a"], list)
        ['a']
    """
    if type(value) is not kind:
        raise Malformed(f"a {type(value).__name__} stands where a {kind.__name__} belongs")
    return value
