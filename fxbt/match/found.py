"""What is bound while a pattern is matched (`State`), and a match as a rule's `check` sees it (`Found`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..analysis import axes
from ..graph.miss import Miss
from .terms import Term

# --- matching ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What is bound and passed through so far."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[Term, fx.Node] = field(default_factory=dict)
    interior: frozenset[fx.Node] = frozenset()
    entered: frozenset[Term] = frozenset()  # the ops of the pattern that were found

    @property
    def matched(self) -> int:
        """How many different ops of the pattern were found."""
        return len(self.entered)

    def bind(self, name: str, value: Any) -> State:
        return State({**self.bound, name: value}, self.shared, self.interior, self.entered)

    def share(self, term: Term, node: fx.Node) -> State:
        return State(self.bound, {**self.shared, term: node}, self.interior, self.entered)

    def enter(self, nodes: Iterable[fx.Node], term: Term) -> State:
        return State(self.bound, self.shared, self.interior.union(nodes), self.entered | {term})


class Found:
    """A match, as `Rule.check` sees it: `m.x` is the fake tensor (or number) that `x` stands for, `m["x"]` its node.

    Example::

        def check(self, m):
            m.need(m.x.dim() == 3, "x has no batch axis")
            m.shape("weight", "out in")
            m.bind(eps=1e-6)
    """

    def __init__(self, anchors: tuple[fx.Node, ...], state: State, optional: set[str]):
        self._values = {**dict.fromkeys(optional), **state.bound}
        self._node = anchors[0]
        self.outputs = anchors
        self.interior = state.interior
        self.facts: dict[str, Any] = {}
        self.is_kept = False

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise KeyError(f"the pattern binds no {name!r}; it binds {', '.join(sorted(self._values))}")
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"the pattern binds no {name!r}; it binds {', '.join(sorted(self._values))}")
        value = self._values[name]
        return value.meta["val"] if isinstance(value, fx.Node) else value

    @property
    def values(self) -> dict[str, Any]:
        """All names with what they are bound to."""
        return dict(self._values)

    def need(self, condition: Any, reason: str, expected: str = "", hint: str = "") -> None:
        """Refuses the match, with `reason` in the report, unless `condition` holds."""
        if not condition:
            raise Miss(reason, node=self._node, expected=expected, hint=hint)

    def keep(self) -> None:
        """Leaves the match as it is, in its best form already: it counts in `report.hits` and is not replaced."""
        self.is_kept = True

    def shape(self, name: str, dims: str) -> dict[str, Any]:
        """Refuses the match unless `name` has as many dims as the string names; equal names must be equal sizes.

        Returns the sizes by name: `m.shape("q", "batch heads seq head_dim")["seq"]`.
        """
        value, wanted = getattr(self, name), dims.split()
        self.need(isinstance(value, torch.Tensor), f"{name} is {value!r}, no tensor", f"{name} as [{dims}]")
        self.need(value.dim() == len(wanted), f"{name} has {value.dim()} dims", f"{name} as [{dims}]")
        sizes: dict[str, Any] = {}
        for dim, label in enumerate(wanted):
            size = axes.size_of(value, dim)
            self.need(sizes.setdefault(label, size) == size, f"{name} has different sizes for {label}")
            known = self.facts.setdefault("sizes", {}).setdefault(label, size)
            self.need(known == size, f"{label} of {name} is {size}, elsewhere {known}", f"{name} as [{dims}]")
        return sizes

    def bind(self, **facts: Any) -> None:
        """Hands facts on to `replace`, which takes them by name."""
        self._values.update(facts)
