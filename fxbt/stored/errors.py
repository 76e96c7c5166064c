"""Errors: why a graph is not written, and why a file is not accepted as a graph."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


class Unstorable(Exception):
    """A graph or its conditions have no text that another process could check; the message says why."""


class Malformed(Exception):
    """A file differs from what fxbt writes, and is refused as a whole."""


def checked(value: Any, kind: type[T]) -> T:
    """`value` from a file, if it has the type that fxbt writes there.

    Raises:
        Malformed: it has another type; True is not an int here.

    Example:
        >>> checked(["a"], list)
        ['a']
    """
    if type(value) is not kind:
        raise Malformed(f"the file has a {type(value).__name__} where a {kind.__name__} belongs")
    return value
