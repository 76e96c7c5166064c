"""The bindings during matching (`State`), and a match as a rule's `check` sees it (`Found`)."""

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


@dataclass(frozen=True)
class State:
    """The bindings and the nodes passed so far."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[Term, fx.Node] = field(default_factory=dict)
    interior: frozenset[fx.Node] = frozenset()
    entered: frozenset[Term] = frozenset()  # the pattern's ops found so far

    @property
    def matched(self) -> int:
        """How many different ops of the pattern were found."""
        return len(self.entered)

    def bind(self, name: str, value: Any) -> State:
        """The state with one more name bound."""
        return State({**self.bound, name: value}, self.shared, self.interior, self.entered)

    def share(self, term: Term, node: fx.Node) -> State:
        """The state in which a repeated term is this node."""
        return State(self.bound, {**self.shared, term: node}, self.interior, self.entered)

    def enter(self, nodes: Iterable[fx.Node], term: Term) -> State:
        """The state after matching these nodes with an op of the pattern."""
        return State(self.bound, self.shared, self.interior.union(nodes), self.entered | {term})


@dataclass(frozen=True)
class Reading:
    """A match of a formula with named axes for one output: what its names are bound to, and their axes.

    For `op.steps`, `values` has the list of steps and `labels` the axes of their input. `along` has the atoms of each
    named axis, and those of "...". `factor` is a further constant factor of the products under the steps.
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
        """The reading with one more name bound.

        Raises:
            Miss: the name is already bound to another value.
        """
        if name in self.values and (self.values[name] is not value or axes.resolve(self.labels[name]) != labels):
            raise Miss(f"{name} already matched another value", node=value)
        return replace(self, values={**self.values, name: value}, labels={**self.labels, name: labels})

    def name(self, axis: str, atoms: axes.Label) -> Reading:
        """The reading with one more named axis.

        Raises:
            Miss: the name already belongs to another axis.
        """
        if axis in self.along and set(axes.leaves(self.along[axis])) != set(axes.leaves(atoms)):
            raise Miss(f"the op sums over an axis other than {axis}", node=self.output)
        return replace(self, along={**self.along, axis: atoms})

    def via(self, node: fx.Node) -> Reading:
        """The reading with one more matched op."""
        return replace(self, inner=(*self.inner, node))

    def operands(self) -> Iterator[tuple[fx.Node, axes.Axes]]:
        """The nodes it is computed from, including those of steps, with their axes."""
        for name, value in self.values.items():
            if isinstance(value, fx.Node):
                yield value, self.labels[name]
            for step in value if isinstance(value, list) else ():
                if isinstance(getattr(step, "node", None), fx.Node):
                    yield step.node, step.axes


class Found:
    """A match as `Rule.check` sees it: `m.x` is the fake tensor (or number) bound to `x`, `m["x"]` its node.

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
        """The size of a named axis: an int, or a sympy expression if it is symbolic."""
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
        """All names and what they are bound to."""
        return dict(self._values)

    def need(self, condition: Any, reason: str, expected: str = "", hint: str = "") -> None:
        """Refuses the match unless `condition` holds; `reason` goes into the report.

        Raises:
            Miss: the condition does not hold.
        """
        if not condition:
            raise Miss(reason, node=self._node, expected=expected, hint=hint)

    def keep(self) -> None:
        """Leaves the match as it is, because it is already in its best form: counted in `report.hits`, not replaced."""
        self.is_kept = True

    def anew(self) -> Found:
        """The same match, before any rule changed it."""
        return Found(*self._made_of)

    def stand_for(self, *nodes: fx.Node) -> None:
        """Makes the results of `replace` stand for these nodes instead of the pattern's outputs."""
        self.outputs = nodes

    def assume(self, *constants: fx.Node) -> None:
        """Records that a proof read the content of these constants; if one changes, the graph is dropped."""
        self.assumes = (*self.assumes, *constants)

    def lay_out(self, tensors: Mapping[fx.Node, axes.Axes]) -> None:
        """Passes these nodes, with these axes, to `replace` as its parameter `operands` (an `fxbt.Operands`)."""
        self.laid_out = dict(tensors)

    def shape(self, name: str, dims: str) -> dict[str, Any]:
        """Refuses the match unless `name` has as many dims as `dims` names; equal names must have equal sizes.

        Returns:
            The size of each named dim: `m.shape("q", "batch heads seq head_dim")["seq"]`.

        Raises:
            Miss: the value is not a tensor, or its shape does not fit.
        """
        value, wanted = getattr(self, name), dims.split()
        self.need(isinstance(value, torch.Tensor), f"{name} is {value!r}, not a tensor", f"{name} as [{dims}]")
        self.need(value.dim() == len(wanted), f"{name} has {value.dim()} dims", f"{name} as [{dims}]")
        sizes: dict[str, Any] = {}
        for dim, label in enumerate(wanted):
            size = axes.size_of(value, dim)
            self.need(sizes.setdefault(label, size) == size, f"{name} has different sizes for {label}")
            known = self.facts.setdefault("sizes", {}).setdefault(label, size)
            self.need(known == size, f"{label} of {name} is {size}, elsewhere {known}", f"{name} as [{dims}]")
        return sizes

    def bind(self, **facts: Any) -> None:
        """Passes facts to `replace`, which takes them as parameters by name."""
        self._values.update(facts)
