"""The matcher: finds where a pattern's formula stands in a graph, in any order and grouping of sums and products.

It compares terms with nodes and backtracks over the ways to read a node: a chain of additions is a sum of two terms or
of three, a division a power of -1, a mean a sum with a coefficient. It changes nothing. The result is a `Found`, or the
nearest `Miss`, which says how many ops matched before one did not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx

from ..analysis import axes
from ..graph.miss import Miss
from ..graph.node import is_weight
from ..graph.walk import computed_from, latest_first
from . import pointwise
from .alternatives import always_bound, single_factor, summed_exponents, variants
from .formula_text import formula
from .found import Found, State
from .naming import is_float_cast, op_of
from .once_matched import Notes, Remembered
from .readings import Powers, Reduced, is_close, is_same, keeps_elements, plain, product_cuts, slice_of, sum_cuts
from .same_op import (
    PERMUTATIONS,
    bounds_of,
    factors_of_linear,
    is_op,
    operand_pairs,
    permuted_axes,
    same_literal,
    same_reduction,
)
from .terms import (
    Call,
    ComputedFrom,
    Either,
    Formula,
    Maybe,
    NumberVariable,
    Part,
    Pointwise,
    Product,
    Slice,
    Sum,
    Term,
    Variable,
    WeightVariable,
    inner_outputs,
    names,
    shared,
)

ENDS = "the pattern ends here"


class Matcher:
    """One pattern, matched against the nodes of one graph. `loose` ignores layout ops and dropout between blocks."""

    def __init__(self, pattern: Formula, loose: bool = False):
        self.pattern = pattern
        self.loose = loose
        self.optional = pattern.names - always_bound(pattern.outputs)
        self._shared = set().union(*(shared(term) for term in pattern.outputs)) | inner_outputs(pattern.outputs)
        self._nearest: Miss | None = None
        self._expected: list[Any] = []
        self._notes = Notes()
        self._known: dict[Any, Remembered] = {}

    def find(self, anchor: fx.Node) -> Iterator[Found]:
        """The matches whose first output is `anchor`, trying operands in the order in which they are written.

        Raises:
            Miss: after the last match, the nearest miss.
        """
        self._nearest, self._notes, self._known = None, Notes(), {}
        first, *others = self.pattern.outputs
        for state in self._match(first, anchor, State()):
            for nodes, complete in self._other_outputs(others, (anchor,), state):
                if self.loose or self._is_closed(nodes, complete):
                    yield Found(nodes, complete, self.optional)
        self._notes, self._known = Notes(), {}  # the rule outlives the graph
        if self._nearest is not None:
            raise self._nearest

    # One that stands inside another was found with it. Others hang on values that are bound already: they are looked
    # for among what is computed from those.
    def _other_outputs(
        self, terms: list[Term], nodes: tuple[fx.Node, ...], state: State
    ) -> Iterator[tuple[tuple[fx.Node, ...], State]]:
        if not terms:
            yield nodes, state
            return
        for candidate in self._candidates(terms[0], nodes, state):
            if candidate in nodes:
                continue
            for found in self._match(terms[0], candidate, state):
                yield from self._other_outputs(terms[1:], (*nodes, candidate), found)

    def _candidates(self, term: Term, nodes: tuple[fx.Node, ...], state: State) -> list[fx.Node]:
        if term in state.shared:
            return [state.shared[term]]
        seeds = [state.bound[name] for name in sorted(names(term)) if name in state.bound]
        return computed_from([*(n for n in seeds if isinstance(n, fx.Node)), *nodes], depth=8)

    def _is_closed(self, outputs: tuple[fx.Node, ...], state: State) -> bool:
        """Whether only nodes of the match read the values inside it."""
        inside = state.interior | set(outputs)
        bound = {value for value in state.bound.values() if isinstance(value, fx.Node)}
        for node in sorted(state.interior - set(outputs) - bound):
            reader = next((user for user in node.users if user not in inside), None)
            if reader is not None:
                self._miss_escape(node, reader, state)
                return False
        return True

    def _miss_escape(self, node: fx.Node, reader: fx.Node, state: State, reason: str = "") -> None:
        miss = Miss(
            reason or "a value inside the pattern is used elsewhere too",
            node=node,
            found=(node, "is also used by", reader),
            expected=f"{op_of(node)} used only inside the pattern",
            matched=state.matched,
            total=self.pattern.size,
        )
        self._notes.do(functools.partial(self._keep, miss))

    def _fail(self, term: Any, value: Any, state: State, reason: str = "") -> None:
        self._notes.do(functools.partial(self._note_failure, term, value, state, reason))

    def _note_failure(self, term: Any, value: Any, state: State, reason: str) -> None:
        node = value if isinstance(value, fx.Node) else None
        reason = reason or ENDS
        nearest = self._nearest
        if nearest is not None and state.matched <= nearest.matched:
            if (state.matched, node, reason) == (nearest.matched, nearest.node, ENDS) and node is not None:
                self._expected.append(term)
            return
        self._expected = [term]
        self._keep(
            Miss(
                reason,
                node=node,
                expected=term if isinstance(term, tuple) else _Expected(self._expected),
                found="" if node is not None else str(value),
                matched=state.matched,
                total=self.pattern.size,
            )
        )

    def _keep(self, miss: Miss) -> None:
        if self._nearest is None or miss.matched > self._nearest.matched:
            self._nearest = miss

    def _match(self, term: Any, value: Any, state: State) -> Iterator[State]:
        """The states in which `value` matches `term`; a term that occurs twice in the pattern must be one node.

        Alternatives of a pattern ask the same question again: how a sum's first term matches, for each way to write
        its second. They get the same states, and note the same misses.
        """
        if not isinstance(value, fx.Node):
            return self._match_either(term, value, state)
        key = (term, value, id(state))
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Remembered(state, self._match_either(term, value, state))
        return known.states(self._notes)

    def _match_either(self, term: Any, value: Any, state: State) -> Iterator[State]:
        if term not in self._shared or not isinstance(value, fx.Node):
            yield from self._match_anew(term, value, state)
        elif term not in state.shared:
            yield from (found.share(term, value) for found in self._match_anew(term, value, state))
        elif is_same(state.shared[term], value):
            yield state
        else:
            self._fail(term, value, state)

    def _match_anew(self, term: Any, value: Any, state: State) -> Iterator[State]:
        match term:
            case Variable():
                yield from self._match_variable(term, plain(value), state)
            case NumberVariable():
                yield from self._match_number(term, value, state)
            case WeightVariable():
                yield from self._match_weight(term, plain(value), state)
            case Either():
                for option in term.options:
                    yield from self._match(option, value, state)
            case Sum():
                yield from self._match_sum(term, value, state)
            case Product():
                yield from self._match_product(term, value, state)
            case Part() | Slice():
                yield from self._match_slice(term, value, state)
            case ComputedFrom():
                yield from self._match_computed_from(term, plain(value), state)
            case Pointwise():
                yield from self._match_pointwise(term, plain(value), state)
            case Call():
                yield from self._match_call(term, plain(value), state)
            case _:
                self._fail(term, value, state)

    def _match_variable(self, term: Variable, value: Any, state: State) -> Iterator[State]:
        if not isinstance(value, fx.Node | int | float) or isinstance(value, bool):
            self._fail(term, value, state)
        elif term.name not in state.bound:
            yield state.bind(term.name, value)
        elif is_same(state.bound[term.name], value):
            yield state
        else:
            expected = (f"{term.name} =", state.bound[term.name])
            self._fail(expected, value, state, f"{term.name} already matched another value")

    def _match_number(self, term: NumberVariable, value: Any, state: State) -> Iterator[State]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number:
            self._fail(term, value, state, f"{term.name} must be a number")
        elif term.where is not None and not term.where(value):
            self._fail(term, value, state, f"{term.name} does not meet its condition")
        elif term.name not in state.bound:
            yield state.bind(term.name, value)
        elif is_close(state.bound[term.name], value):
            yield state
        else:
            self._fail(term, value, state, f"{term.name} is {state.bound[term.name]:g} elsewhere")

    def _match_weight(self, term: WeightVariable, value: Any, state: State) -> Iterator[State]:
        if not is_weight(value):
            self._fail(term, value, state, f"{term.name} is computed from the inputs")
        elif term.where is not None and not term.where(value.meta["val"]):
            self._fail(term, value, state, f"{term.name} does not meet its condition")
        elif term.name not in state.bound:
            yield state.bind(term.name, value)
        elif is_same(state.bound[term.name], value):
            yield state
        else:
            expected = (f"{term.name} =", state.bound[term.name])
            self._fail(expected, value, state, f"{term.name} already matched another weight")

    # --- sums and products

    def _match_sum(self, term: Sum, value: Any, state: State) -> Iterator[State]:
        entered: dict[Any, State] = {}  # one state for all variants, which is what `_match` knows it by
        for variant in variants(term):
            for cut in sum_cuts(plain(value), len(variant.terms), self.loose):
                if not cut.through and len(variant.terms) > 1:
                    continue
                rest = 0.0 if is_close(cut.constant, variant.constant) else cut.constant - variant.constant
                inner = entered.setdefault(cut.through, state.enter(cut.through, term))
                yield from self._assign_sum(variant.terms, cut.terms, rest, inner)
        if not entered:
            self._fail(term, value, state)

    def _assign_sum(
        self, terms: tuple[Term, ...], values: tuple[tuple[float, Any], ...], rest: float, state: State
    ) -> Iterator[State]:
        """Gives each term a value, in any order; what remains of the constant goes to a term that can be a number."""
        if not terms:
            if not values and rest == 0:
                yield state
            return
        term, *others = terms
        for place, (coefficient, value) in enumerate(values):
            left = values[:place] + values[place + 1 :]
            scaled = value if coefficient == 1 else Powers(coefficient, ((value, 1.0),))
            for found in self._match(term, scaled, state):
                yield from self._assign_sum(tuple(others), left, rest, found)
        if isinstance(term, Variable | NumberVariable) and rest != 0:
            for found in self._match(term, rest, state):
                yield from self._assign_sum(tuple(others), values, 0.0, found)

    def _match_product(self, term: Product, value: Any, state: State) -> Iterator[State]:
        entered = False
        for variant in variants(term):
            if isinstance(single := single_factor(variant), Term):
                entered = True
                yield from self._match(single, value, state)
                continue
            limit = sum(max(1, math.ceil(abs(exponent))) for _, exponent in variant.factors)
            for cut in product_cuts(value, limit):
                if not cut.through and not isinstance(value, Powers):
                    continue
                entered = True
                yield from self._assign_product(
                    variant, variant.factors, cut.factors, cut, {}, state.enter(cut.through, term)
                )
        if not entered:
            self._fail(term, value, state)

    def _assign_product(
        self,
        term: Product,
        factors: tuple[tuple[Term, float], ...],
        values: tuple[tuple[Any, float], ...],
        cut: Powers,
        given: dict[Term, Any],
        state: State,
    ) -> Iterator[State]:
        """Gives each factor a value with its exponent, in any order; then the coefficients must agree."""
        if not factors:
            if not values and self._same_coefficient(term, cut, given, 1.0, state):
                yield state
            return
        (factor, exponent), *others = factors
        for place, (value, power) in enumerate(values):
            if not is_close(power, exponent):
                continue
            left = values[:place] + values[place + 1 :]
            for found in self._match(factor, value, state):
                yield from self._assign_product(term, tuple(others), left, cut, {**given, factor: value}, found)
        if isinstance(factor, Variable | NumberVariable) and len(values) == len(others):
            yield from self._number_factor(term, factor, exponent, tuple(others), values, cut, given, state)

    def _number_factor(
        self,
        term: Product,
        factor: Term,
        exponent: float,
        others: tuple[tuple[Term, float], ...],
        values: tuple[tuple[Any, float], ...],
        cut: Powers,
        given: dict[Term, Any],
        state: State,
    ) -> Iterator[State]:
        """Matches a factor with a number: the part of the coefficient that the pattern does not write."""
        ratio = cut.coefficient / term.coefficient if term.coefficient else 0.0
        if ratio in (0.0, 1.0) or (ratio < 0 and exponent != 1):
            return
        rest = replace(cut, coefficient=term.coefficient)
        for found in self._match(factor, ratio ** (1 / exponent), state):
            yield from self._assign_product(term, others, values, rest, given, found)

    def _same_coefficient(self, term: Product, cut: Powers, given: dict[Term, Any], scale: float, state: State) -> bool:
        """Whether the coefficients agree, counting the elements that sums and means reduce."""
        exponents, counts = summed_exponents(term.factors), summed_exponents(term.counts)
        expected = term.coefficient * scale
        for factor, value in given.items():
            averaged = isinstance(value, Reduced) and value.averaged
            excess = counts.get(factor, 0.0) + (exponents[factor] if averaged else 0.0)
            if excess == 0:
                continue
            reduced = value if isinstance(value, Reduced) else Reduced(value, value.args[0], False)
            if reduced.count is None:
                self._fail(term, reduced.node, state, "the number of summed elements is not known")
                return False
            expected *= float(reduced.count) ** excess
        if is_close(cut.coefficient, expected):
            return True
        self._fail(term, cut.coefficient, state, f"the factor is {cut.coefficient:g}, expected {expected:g}")
        return False

    # --- ops

    def _match_call(self, term: Call, value: Any, state: State) -> Iterator[State]:
        if isinstance(value, Reduced):
            yield from self._match_reduced(term, value, state)
            return
        for node, passed in self._readings(value):
            if is_op(term, node):
                inner = state.enter((*passed, node), term)
                yield from self._match_operands(term, node, inner)
                return
            if pairs := factors_of_linear(term, node):
                yield from self._match_all(pairs, state.enter((*passed, node), term))
                return
        self._fail(term, value, state)

    def _readings(self, value: Any) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
        """The value, and what it is a cast of; in a loose pattern also what it is another layout of."""
        passed: tuple[fx.Node, ...] = ()
        while isinstance(value, fx.Node):
            yield value, passed
            if not is_float_cast(value) and not (self.loose and keeps_elements(value)):
                return
            passed, value = (*passed, value), value.args[0]

    def _match_reduced(self, term: Call, value: Reduced, state: State) -> Iterator[State]:
        if term.op != "sum":
            self._fail(term, value.node, state)
            return
        source, dims, keepdim = term.args
        if not same_reduction(value.node, dims, keepdim):
            self._fail(term, value.node, state, "the op reduces another axis")
            return
        yield from self._match(source, value.source, state.enter((value.node,), term))

    def _match_operands(self, term: Call, node: fx.Node, state: State) -> Iterator[State]:
        if term.op in PERMUTATIONS:
            yield from self._match_permutation(term, node, state)
            return
        if term.op == "sum":
            yield from self._match_reduced(term, Reduced(node, node.args[0], False), state)
            return
        pairs, unwritten = operand_pairs(term, node)
        if unwritten:
            self._fail(term, node, state, f"the graph has {unwritten}, unlike the pattern")
            return
        yield from self._match_all(pairs, state)

    def _match_all(self, pairs: list[tuple[Any, Any]], state: State) -> Iterator[State]:
        if not pairs:
            yield state
            return
        (wanted, actual), *rest = pairs
        for found in self._match_operand(wanted, actual, state):
            yield from self._match_all(rest, found)

    def _match_operand(self, wanted: Any, actual: Any, state: State) -> Iterator[State]:
        if isinstance(wanted, Maybe):
            yield from [state] if actual is None else self._match(wanted.term, actual, state)
        elif isinstance(wanted, Term):
            yield from self._match(wanted, actual, state)
        elif isinstance(wanted, tuple):
            items = actual if isinstance(actual, list | tuple) else [actual]
            if len(items) == len(wanted):
                yield from self._match_all(list(zip(wanted, items, strict=True)), state)
        elif same_literal(wanted, actual):
            yield state
        else:
            self._fail(wanted, actual, state)

    def _match_permutation(self, term: Call, node: fx.Node, state: State) -> Iterator[State]:
        rank = node.meta["val"].dim()
        permuted = permuted_axes(term, rank)
        if permuted != axes.permutation(node):
            reason = f"the tensor has {rank} axes" if permuted is None else "the axes are permuted in another order"
            self._fail(term, node, state, reason)
            return
        yield from self._match(term.args[0], node.args[0], state)

    # --- regions, slices and ancestry

    def _match_pointwise(self, term: Pointwise, value: Any, state: State) -> Iterator[State]:
        for source, region in pointwise.regions(value):
            name = pointwise.computed(term.functions, value, source, region)
            if name is None:
                continue
            inner = state.enter(region, term)
            if (escape := pointwise.escape(region)) is not None:
                self._miss_escape(*escape, inner, f"a value inside {name} is used elsewhere too")
                continue
            yield from self._match(term.source, source, inner.bind(term.bound, name) if term.bound else inner)
        self._fail(term, value, state)

    def _match_slice(self, term: Part | Slice, value: Any, state: State) -> Iterator[State]:
        node = plain(value)
        found = slice_of(node)
        if found is None:
            self._fail(term, node, state)
            return
        source, dim, start, stop, step = found
        total = source.meta["val"].shape[dim]
        rank = source.meta["val"].dim()
        if term.dim % rank != dim or not isinstance(total, int) or bounds_of(term, total) != (start, stop, step):
            self._fail(term, node, state, "the op takes another slice")
            return
        yield from self._match(term.source, source, state.enter((node,), term))

    def _match_computed_from(self, term: ComputedFrom, value: Any, state: State) -> Iterator[State]:
        """The nearest ancestors that match `source`, but none before the source's bound variables."""
        if not isinstance(value, fx.Node):
            self._fail(term, value, state)
            return
        known = [state.bound[name] for name in names(term.source) if name in state.bound]
        earliest = min((node for node in known if isinstance(node, fx.Node)), default=None)
        before: list[Miss | None] = []
        is_found = False
        self._notes.do(lambda: before.append(self._nearest))
        for node in latest_first(value, earliest):
            if isinstance(term.source, Call) and not is_op(term.source, node):
                continue
            for found in self._match(term.source, node, state):
                is_found = True
                yield found
            if not is_found:
                self._notes.do(lambda: self._skip(state, before[-1]))
        if not is_found:
            self._fail(term, value, state, f"this is not computed {formula(term)}")

    def _skip(self, state: State, nearest: Miss | None) -> None:
        """Skipping other values is not a miss."""
        if self._nearest is not None and self._nearest.matched <= state.matched:
            self._nearest = nearest


class _Expected:
    """Everything that was tried at one place; it grows until it is printed."""

    def __init__(self, terms: list[Term]):
        self._terms = terms

    def __str__(self) -> str:
        return formula(Either(tuple(dict.fromkeys(self._terms))))
