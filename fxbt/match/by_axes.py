"""Matches formulas with named axes in any layout: contractions, a softmax over a named axis, and steps around it.

A formula with a softmax is anchored there: the match goes backward through its scores and forward to what its weights
multiply. A formula without one is anchored at its last contraction. Layout ops only move axes, so axes are followed as
atoms (`fxbt.axes`). In the end each atom gets the name of the axis at its place.

Example::

    (found,) = AxisMatcher(formula).find(softmax)
    found.readings[0].along["k"]  # the atoms of the axis that the softmax runs over
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Reversible, Sequence
from typing import Any

from torch import fx

from ..analysis import axes, scores, sinks, weights
from ..errors import RuleError
from ..graph.miss import Miss
from ..graph.node import is_weight
from .alternatives import always_bound
from .formula_text import formula
from .found import Found, Reading, State
from .terms import Contract, Equation, Formula, Maybe, Softmax, Steps, Term, Variable, WeightVariable

REST = "..."


class AxisMatcher:
    """One formula with named axes, matched against the nodes of one graph.

    Raises:
        RuleError: the formula has named axes in a place where they cannot be followed.
    """

    def __init__(self, pattern: Formula):
        if len(pattern.outputs) != 1:
            raise RuleError("a formula with named axes must have exactly one output")
        (self._term,) = pattern.outputs
        self._optional = pattern.names - always_bound(pattern.outputs)
        self._softmax, self._steps, self._contract = _around_the_softmax(self._term)
        specs = list(_axes_of_variables(self._term))
        self._specs = dict(specs)
        if len(specs) > len(self._specs):
            raise RuleError(
                "a variable may occur only once in a formula with named axes; use two variables, they may match the "
                "same value"
            )
        self._result = _contract_in(self._term).equation.result

    def anchors(self, nodes: Reversible[fx.Node]) -> list[fx.Node]:
        """Those of a graph's nodes at which it may stand, the last first."""
        targets = weights.SOFTMAX if self._softmax else axes.EQUATIONS
        return [node for node in reversed(nodes) if node.op == "call_function" and node.target in targets]

    def find(self, anchor: fx.Node) -> Iterator[Found]:
        """The match of the formula around `anchor`: one, with an output for each product of the weights.

        Raises:
            Miss: it does not match; the reason names the op.
        """
        start = Reading(anchor, axes.fresh(anchor))
        readings = self._around(anchor, start) if self._softmax else _down(self._term, anchor, start)[:1]
        readings = [self._named(each) for each in readings]
        _check_closed(readings)
        outputs = tuple(each.output for each in readings)
        yield Found(outputs, State(readings[0].values), self._optional, tuple(readings), self._layouts(readings))

    # --- around a softmax: its scores backward, its weights forward

    def _around(self, softmax: fx.Node, start: Reading) -> list[Reading]:
        term: Any = self._softmax
        inside, sink = _inside_softmax(term, softmax, start)
        if self._contract is None:
            return [inside]
        keys = inside.along[term.over]
        products = weights.products_of(inside.output, inside.output_labels, keys)
        found = [self._times(inside, *product) for product in products]
        name = _sink_name(term)
        if name and sink is None and len(found) == 1 and sinks.normalizer_of(softmax.args[0]):  # type: ignore[arg-type]
            (only,) = found
            output, labels, sink = sinks.multiplied_on(only.output, only.output_labels, softmax, inside.output_labels)
            found = [dataclasses.replace(only, output=output, output_labels=labels)]
        if name and sink is None and not isinstance(term.sink, Maybe):
            raise Miss("the softmax has no sink", node=softmax)
        return [each.bind(name, sink.node, sink.axes) if sink else each for each in found]

    def _times(self, inside: Reading, product: axes.Contraction, operand: fx.Node, passed: weights.Steps) -> Reading:
        """The weights, after their steps, times their value."""
        contract: Any = self._contract
        equation = contract.equation
        if product.addend is not None:
            raise Miss("the product with the value also adds a third term", node=product.node)
        (summed,) = equation.summed
        if set(axes.leaves(product.contracted)) != set(axes.leaves(inside.along[summed])):
            raise Miss("the product with the value does not sum over exactly the softmax axis", node=product.node)
        passed = passed + [scores.Scale(product.factor)] * (product.factor != 1)
        if self._steps is None and passed:
            raise Miss("steps change the weights that the pattern does not have", node=product.node)
        value = (product.rhs, product.rhs_axes) if product.lhs is operand else (product.lhs, product.lhs_axes)
        other = contract.lhs if contract.rhs in (self._softmax, self._steps) else contract.rhs
        if self._steps is not None:
            inside = inside.bind(self._steps.bound, passed, inside.output_labels)
        inside = dataclasses.replace(inside, output=product.node, output_labels=product.axes)
        return _down(other, value[0], inside, value[1])[0]

    # --- names of axes

    def _named(self, reading: Reading) -> Reading:
        """The reading with a name for each atom: that of the axis at its place."""
        along = {name: list(axes.leaves(label)) for name, label in reading.along.items()}
        known = {atom for atoms in along.values() for atom in atoms}
        places = {name: axes.atoms_of(reading.labels[name]) for name in self._specs}
        output = axes.atoms_of(reading.output_labels)
        for atom in dict.fromkeys((*output, *(atom for atoms in places.values() for atom in atoms))):
            if atom not in known:
                here = {name for name, atoms in places.items() if atom in atoms}
                along.setdefault(self._name_of(here), []).append(atom)
        return dataclasses.replace(reading, along={name: tuple(atoms) for name, atoms in along.items()})

    def _name_of(self, here: set[str]) -> str:
        """The axis of the result that exactly the variables `here` have; "..." if there is none."""
        for name in self._result:
            if name != REST and {variable for variable, spec in self._specs.items() if name in spec} == here:
                return name
        return REST

    def _layouts(self, readings: Sequence[Reading]) -> dict[str, tuple[axes.Axes, axes.Axes]]:
        """The axes of each variable as found, and as its equation orders them; those of the result under ""."""
        if len(readings) > 1:
            return {}
        (reading,) = readings
        of = {name: axes.resolve(reading.labels[name]) for name in self._specs}
        layouts = {name: (labels, _laid_out(self._specs[name], labels, reading)) for name, labels in of.items()}
        result = axes.resolve(reading.output_labels)
        return {**layouts, "": (result, _laid_out(self._result, result, reading))}


def _laid_out(spec: tuple[str, ...], labels: axes.Axes, reading: Reading) -> axes.Axes:
    """One dim for each axis of "..." (of size one where `labels` lack it), and one for each named axis.

    Raises:
        Miss: there is an axis that the equations do not name.
    """
    present = axes.atoms_of(labels)
    target: list[axes.Label] = []
    for name in spec:
        atoms = reading.along.get(name, ())
        target += [(atom,) if atom in present else () for atom in atoms] if name == REST else [atoms]
    if unnamed := set(present) - set(axes.atoms_of(tuple(target))):
        raise Miss(f"{unnamed} is not an axis of {' '.join(spec)}", node=reading.output)
    return tuple(target)


# --- backward --------------------------------------------------------------------------------------------------------


def _down(term: Term, node: fx.Node, reading: Reading, labels: axes.Axes | None = None) -> list[Reading]:
    """All ways in which `node`, with the axes `labels`, matches `term`; at least one.

    Raises:
        Miss: there is none.
    """
    labels = reading.output_labels if labels is None else labels
    node, labels = axes.peel(node, labels)
    match term:
        case Variable():
            return [reading.bind(term.name, node, labels)]
        case WeightVariable():
            if not is_weight(node) or not (term.where is None or term.where(node.meta["val"])):
                raise Miss(f"{term.name} is computed from the inputs, or does not meet its condition", node=node)
            return [reading.bind(term.name, node, labels)]
        case Steps():
            return _under_steps(term, node, reading, labels)
    product = axes.contraction_of(node, labels)
    if product is None or product.addend is not None or product.factor != 1:
        raise Miss("this is not a plain product of two operands", node=node, expected=formula(term))
    return _operands(term, product, reading)


def _inside_softmax(term: Softmax, softmax: fx.Node, start: Reading) -> tuple[Reading, scores.Add | None]:
    """The softmax with its scores (its output is the weights), and the sink if the scores are joined with one."""
    dim: Any = softmax.args[1]
    source: Any = softmax.args[0]
    given, labels, sink = softmax, start.output_labels, None
    if term.sink is not None and sinks.joins(source):
        given = weights.only_user(softmax)
        source, labels, sink = sinks.cut_off(softmax, given, labels)
    keys = labels[dim]
    if not keys:
        raise Miss("the softmax runs over an axis of size one", node=softmax)
    inside = Reading(given, labels, softmax=softmax).name(term.over, keys).via(softmax)
    return _down(term.source, source, inside)[0], sink


def _under_steps(term: Steps, node: fx.Node, reading: Reading, labels: axes.Axes) -> list[Reading]:
    """Goes back through the steps on scores to the product with the keys."""
    (keys,) = reading.along.values()
    steps: list[scores.Step] = []
    product = scores.unwind(node, labels, keys, steps)
    steps.reverse()
    if product.addend is not None:
        addend_axes = axes.broadcast_axes(product.addend, product.axes)
        steps.insert(0, scores.Add(product.addend, addend_axes, product.addend_factor))
    query, query_factor = _unscaled(product.lhs, product.lhs_axes)
    key, key_factor = _unscaled(product.rhs, product.rhs_axes)
    factor = product.factor * query_factor * key_factor
    product = dataclasses.replace(product, lhs=query[0], lhs_axes=query[1], rhs=key[0], rhs_axes=key[1])
    below = dataclasses.replace(reading.bind(term.bound, steps, reading.output_labels), factor=factor)
    return _operands(term.source, product, below)


def _unscaled(node: fx.Node, labels: axes.Axes) -> tuple[tuple[fx.Node, axes.Axes], float]:
    """Goes back through layout ops and constant factors."""
    factor = 1.0
    while True:
        node, labels = axes.peel(node, labels)
        number = _constant_factor(node)
        if number is None:
            return (node, labels), factor
        factor *= number
        node = node.args[0]  # type: ignore[assignment]


def _constant_factor(node: fx.Node) -> float | None:
    """The number by which a node multiplies its first operand; None if it does something else."""
    if node.op != "call_function" or node.target not in scores.MULTIPLY | scores.DIVIDE or node.kwargs:
        return None
    source, factor = node.args[:2]
    if not isinstance(factor, int | float) or not isinstance(source, fx.Node):
        return None
    return 1 / factor if node.target in scores.DIVIDE else factor


def _operands(term: Any, product: axes.Contraction, reading: Reading) -> list[Reading]:
    """All ways in which the operands of a product match those of `term`, in either order.

    Raises:
        Miss: there is none.
    """
    equation: Equation = term.equation
    if not product.contracted:
        raise Miss("the product sums over nothing", node=product.node)
    if reading.softmax is not None:
        dtype = reading.softmax.meta["val"].dtype
        scores.check_not_coarser(reading.softmax, dtype, product.lhs.meta["val"].dtype)
    (summed,) = equation.summed
    inside = reading.name(summed, product.contracted).via(product.node)
    lhs, rhs = (product.lhs, product.lhs_axes), (product.rhs, product.rhs_axes)
    ways: list[Reading] = []
    misses: list[Miss] = []
    for first, second in ((lhs, rhs), (rhs, lhs)):
        try:
            _check_axes(equation, first[1], second[1], inside)
            for way in _down(term.lhs, first[0], inside, first[1]):
                ways += _down(term.rhs, second[0], way, second[1])
        except Miss as miss:
            misses.append(miss)
    if not ways:
        raise misses[0]
    return ways


def _check_axes(equation: Equation, lhs: axes.Axes, rhs: axes.Axes, reading: Reading) -> None:
    """Raises Miss if an operand lacks an axis that the equation gives it, or has one that the equation does not."""
    for name in {*equation.lhs, *equation.rhs} & set(reading.along):
        atoms = set(axes.leaves(reading.along[name]))
        for names, labels in ((equation.lhs, lhs), (equation.rhs, rhs)):
            present = atoms & set(axes.atoms_of(labels))
            if present != (atoms if name in names else set()):
                raise Miss(f"the product does not have the axis {name} where {equation} has it", node=reading.output)


def _check_closed(readings: Sequence[Reading]) -> None:
    """Checks that the matched ops die with the rewrite; otherwise they would be computed twice.

    What the replacement itself reads stays alive: a bias computed from the scores keeps them.

    Raises:
        Miss: something else reads the scores or the weights.
    """
    operands = {node for reading in readings for node, _ in reading.operands()}
    dying = {reading.output for reading in readings}
    waiting = [node for output in dying for node in output.all_input_nodes]
    while waiting:
        node = waiting.pop()
        is_kept = node.op != "call_function" or node in dying or node in operands
        if is_kept or not all(user in dying for user in node.users):
            continue
        dying.add(node)
        waiting.extend(node.all_input_nodes)
    for read in (node for reading in readings for node in reading.inner):
        if read not in dying:
            raise Miss("the scores are used elsewhere too", node=read, expected="one use: the softmax")


# --- the shape of the formula ----------------------------------------------------------------------------------------


def _around_the_softmax(term: Term) -> tuple[Softmax | None, Steps | None, Contract | None]:
    """The softmax of a formula and what surrounds it: steps on its weights, and the product with a value.

    Raises:
        RuleError: something else surrounds it.
    """
    if isinstance(term, Softmax):
        _check_contracts(term.source, under_softmax=True)
        return term, None, None
    sides = (term.lhs, term.rhs) if isinstance(term, Contract) else ()
    for side, other in (sides, sides[::-1]) if sides else ():
        steps = side if isinstance(side, Steps) else None
        softmax = steps.source if steps else side
        if isinstance(softmax, Softmax):
            _check_contracts(softmax.source, under_softmax=True)
            _check_contracts(other)
            return softmax, steps, term  # type: ignore[return-value]
    _check_contracts(term)
    return None, None, None


def _check_contracts(term: Term, under_softmax: bool = False) -> None:
    """Raises RuleError unless the term is a contraction of variables and weights, or under a softmax one after
    steps."""
    if isinstance(term, Variable | WeightVariable):
        return
    if under_softmax and isinstance(term, Steps):
        term = term.source
        under_softmax = False
        if not isinstance(term, Contract):
            raise RuleError(f"the steps before a softmax must begin at an op.contract, not at {formula(term)}")
    if not isinstance(term, Contract):
        raise RuleError(f"an operand of op.contract must be a variable or another op.contract, not {formula(term)}")
    _check_contracts(term.lhs)
    _check_contracts(term.rhs)


def _axes_of_variables(term: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The axes of each variable, as its equation names them."""
    if isinstance(term, Softmax | Steps):
        yield from _axes_of_variables(term.source)
    if not isinstance(term, Contract):
        return
    for operand, names in ((term.lhs, term.equation.lhs), (term.rhs, term.equation.rhs)):
        if isinstance(operand, Variable | WeightVariable):
            yield operand.name, names
        else:
            yield from _axes_of_variables(operand)


def _contract_in(term: Any) -> Contract:
    """The outermost contraction of a formula."""
    while not isinstance(term, Contract):
        term = term.source
    return term


def _sink_name(term: Softmax) -> str:
    sink = term.sink.term if isinstance(term.sink, Maybe) else term.sink
    return sink.name if isinstance(sink, Variable) else ""
