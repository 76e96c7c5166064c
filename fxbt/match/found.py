"""What is bound while a pattern is matched (`State`), and a match as a rule's `check` sees it (`Found`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
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


@dataclass(frozen=True)
class Reading:
    """A formula with named axes as it stands in a graph, with one output: what its names stand for, of which axes.

    Of `op.steps`, `values` has the list of them and `labels` the axes of what they work on. `along` has the atoms of
    each named axis, those of "..." too. `factor` is what products under steps are multiplied by besides.
    """

    output: fx.Node
    output_labels: axes.Axes
    values: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, axes.Axes] = field(default_factory=dict)
    along: Mapping[str, axes.Label] = field(default_factory=dict)
    factor: float = 1.0
    inner: tuple[fx.Node, ...] = ()  # the contractions and the softmax
    softmax: fx.Node | None = None

    def bind(self, name: str, value: Any, labels: axes.Axes) -> Reading:
        """The reading with one name more.

        Raises:
            Miss: the name stands for something else already.
        """
        if name in self.values and (self.values[name] is not value or axes.resolve(self.labels[name]) != labels):
            raise Miss(f"{name} stands for another value already", node=value)
        return replace(self, values={**self.values, name: value}, labels={**self.labels, name: labels})

    def name(self, axis: str, atoms: axes.Label) -> Reading:
        """The reading with one named axis more.

        Raises:
            Miss: the axis is another one already.
        """
        if axis in self.along and set(axes.leaves(self.along[axis])) != set(axes.leaves(atoms)):
            raise Miss(f"another axis than {axis} is summed over", node=self.output)
        return replace(self, along={**self.along, axis: atoms})

    def via(self, node: fx.Node) -> Reading:
        """The reading with one matched op more."""
        return replace(self, inner=(*self.inner, node))

    def operands(self) -> Iterator[tuple[fx.Node, axes.Axes]]:
        """The nodes that it is computed from, those of steps too, with their axes."""
        for name, value in self.values.items():
            if isinstance(value, fx.Node):
                yield value, self.labels[name]
            for step in value if isinstance(value, list) else ():
                if isinstance(getattr(step, "node", None), fx.Node):
                    yield step.node, step.axes


class Found:
    """A match, as `Rule.check` sees it: `m.x` is the fake tensor (or number) that `x` stands for, `m["x"]` its node.

    Example::

        def check(self, m):
            m.need(m.x.dim() == 3, "x has no batch axis")
            m.shape("weight", "out in")
            m.bind(eps=1e-6)
    """

    def __init__(
        self,
        anchors: tuple[fx.Node, ...],
        state: State,
        optional: set[str],
        readings: tuple[Reading, ...] = (),
        layouts: Mapping[str, tuple[axes.Axes, axes.Axes]] | None = None,
    ):
        self._made_of = anchors, state, optional, readings, layouts
        self._values = {**dict.fromkeys(optional), **state.bound}
        self._node = anchors[0]
        self.outputs = anchors
        self.interior = state.interior
        self.facts: dict[str, Any] = {}
        self.is_kept = False
        self.readings = readings
        self.layouts = dict(layouts or {})
        self.laid_out: dict[fx.Node, axes.Axes] = {}
        self.assumes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            raise KeyError(f"the pattern binds no {name!r}; it binds {', '.join(sorted(self._values))}")
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(f"the pattern binds no {name!r}; it binds {', '.join(sorted(self._values))}")
        value = self._values[name]
        return value.meta["val"] if isinstance(value, fx.Node) else value

    def size(self, axis: str) -> Any:
        """The size of a named axis of the pattern: a number, or a sympy expression where it is symbolic."""
        size = sympy.prod([atom.size for atom in axes.leaves(self.readings[0].along.get(axis, ()))])
        return int(size) if size.is_Integer else size

    @property
    def softmax(self) -> fx.Node:
        """The softmax of a pattern that has one over a named axis."""
        (softmax,) = {reading.softmax for reading in self.readings}
        assert softmax is not None, "the pattern has no softmax over a named axis"
        return softmax

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

    def anew(self) -> Found:
        """The same match, of which no rule has asked anything yet."""
        return Found(*self._made_of)

    def stand_for(self, *nodes: fx.Node) -> None:
        """Lets the results of `replace` stand for these nodes, instead of the outputs of the pattern."""
        self.outputs = nodes

    def assume(self, *constants: fx.Node) -> None:
        """Says that the content of constants was read: should one change, the graph is not used any more."""
        self.assumes = (*self.assumes, *constants)

    def lay_out(self, tensors: Mapping[fx.Node, axes.Axes]) -> None:
        """Hands `replace` these nodes, of the axes given, as its parameter `operands`: an `fxbt.Operands`."""
        self.laid_out = dict(tensors)

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
