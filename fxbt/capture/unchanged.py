"""Checks at every call that nothing in a model's surroundings changed; takes about 30 ns per place."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from ..torch_compat import dict_version
from . import places
from .places import ABSENT, Place
from .settings import Settings

_CODE = operator.attrgetter("__code__")
_DEFAULTS = operator.attrgetter("__defaults__")
_BY_KEYWORD = operator.attrgetter("__kwdefaults__")
_CONTENTS = operator.attrgetter("cell_contents")
_MRO = operator.attrgetter("__mro__")


class _Attribute:
    """One attribute of many objects, as it is now."""

    def __init__(self, read: Callable[[Any], Any], owners: list[Any]) -> None:
        self.read = read
        self.owners = owners
        self.values = list(map(read, owners))


class Unchanged:
    """Checks that nothing changed since; takes about 30 ns per place."""

    def __init__(
        self,
        counted: list[Place],
        others: list[Place],
        functions: list[Any],
        cells: list[Place],
        modules: list[Any],
        settings: Settings | None,
    ) -> None:
        self._counted = counted
        self._dicts = [place.counted for place in counted]
        self._versions: list[int] = []  # at the last full comparison; none yet
        self._others = [place for place in others if not isinstance(place, places.Function)]
        self._by_attribute = [*(place for place in others if isinstance(place, places.Function)), *cells]
        kinds = list(map(type, modules))
        # Compared as lists: equal codes do the same, and a class equals only itself.
        self._listed = [
            _Attribute(type, modules),
            _Attribute(_MRO, list(dict.fromkeys(kinds))),
            _Attribute(_CODE, functions),
        ]
        full = [place for place in cells if place.kept is not ABSENT]
        self._identical = [
            _Attribute(_DEFAULTS, [f for f in functions if f.__defaults__ is not None]),
            _Attribute(_BY_KEYWORD, [f for f in functions if f.__kwdefaults__ is not None]),
            _Attribute(_CONTENTS, [place.owner for place in full]),
        ]
        self._others += [place for place in cells if place.kept is ABSENT]
        self._dtype = torch.get_default_dtype()
        self._settings = settings

    def holds(self, during_a_trace: bool) -> bool:
        """Whether nothing changed; during another thread's trace, torch's own places are ignored."""
        versions = list(map(dict_version, self._dicts))
        if versions != self._versions and not self._holds_anew(versions, during_a_trace):
            return False
        for one in self._listed:
            if list(map(one.read, one.owners)) != one.values:
                return False
        for one in self._identical:
            if not all(map(operator.is_, map(one.read, one.owners), one.values)):
                return all(place.holds() for place in (*self._by_attribute, *self._others))
        if torch.get_default_dtype() is not self._dtype or (self._settings and not self._settings.holds()):
            return False
        return all(place.holds() for place in self._others)

    def _holds_anew(self, versions: list[int], during_a_trace: bool) -> bool:
        known = self._versions or [-1] * len(versions)
        for i, (place, old, new) in enumerate(zip(self._counted, known, versions, strict=True)):
            if old == new:
                continue
            if during_a_trace and place.is_machinery:
                versions[i] = old
            elif not place.holds():
                return False
        self._versions = versions
        return True
