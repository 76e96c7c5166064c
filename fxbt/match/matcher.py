"""The matcher: where in a graph a pattern's formula stands, modulo the order and grouping of sums and products.

It compares terms with nodes and backtracks over the ways a node can be read: a chain of additions is a sum of two
terms or of three, a division a power of -1, a mean a sum with a coefficient. It edits nothing. What comes out is one
`Found`, or the nearest `Miss`: how many ops matched before what was expected was not there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from ..analysis import axes
from ..graph.canonical import argument, is_pure, parameters
from ..graph.miss import Miss
from . import pointwise
from .naming import is_float_cast, op_of
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
    children,
    formula,
    merge_powers,
    names,
    plain_equation,
    powers_multiply,
    shared,
)

aten = torch.ops.aten

# Arguments that are sizes (never written), dims (compared modulo the rank) or precision (modulo casts).
SIZES = {"size", "shape", "sizes", "normalized_shape", "output_size"}
DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim"}
PRECISION = {"dtype", "layout", "device", "pin_memory", "cudnn_enable", "memory_format", "implicit"}
SHAPES = {"reshape", "view", "flatten", "unflatten"}
PERMUTATIONS = {"transpose", "permute", "t", "mT", "swapaxes", "swapdims", "movedim", "numpy_T"}
LAYOUT = axes.RESHAPES | axes.UNIT_DIMS | axes.IDENTITIES | axes.PERMUTES | axes.EXPANDS

ENDS = "the pattern ends here"
CLOSE = 1e-6  # relative: constants in model code are written with seven digits or more


def is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-30)


# --- graph values as sums and products --------------------------------------------------------------------------


@dataclass(frozen=True)
class Powers:
    """coefficient * values ** exponents; `through` are the nodes this reading passes through."""

    coefficient: float
    factors: tuple[tuple[Any, float], ...]
    through: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Addends:
    """constant + coefficients * values"""

    constant: float
    terms: tuple[tuple[float, Any], ...]
    through: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Reduced:
    """The sum of `source` over dims, or its mean where `averaged`, as `node` computes it."""

    node: fx.Node
    source: Any
    averaged: bool

    @property
    def count(self) -> int | None:
        """How many elements are summed; None where that is symbolic."""
        value = self.node.args[0].meta["val"]  # type: ignore[union-attr]
        sizes = [value.shape[dim] for dim in reduced_dims(self.node)]
        return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def reduced_dims(node: fx.Node) -> list[int]:
    dims: Any = argument(node, "dim")
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    dims = range(rank) if dims is None or dims == [] else dims if isinstance(dims, list | tuple) else [dims]
    return sorted(dim % rank for dim in dims)


def product_cuts(value: Any, limit: int) -> Iterator[Powers]:
    """The readings of a value as a product of at most `limit` factors, the value as one factor first."""
    if isinstance(value, Powers):
        yield from _all_cuts(value, limit)
        return
    if isinstance(value, int | float):
        yield Powers(float(value), ())
        return
    yield Powers(1.0, ((value, 1.0),))
    op = op_of(value)
    if op in ("mul", "div"):
        yield from _binary_cuts(value, -1.0 if op == "div" else 1.0, limit)
    elif op in EXPONENTS:
        yield from _power_cuts(value, value.args[0], EXPONENTS[op], limit)
    elif op == "pow" and isinstance(value.args[1], int | float):
        yield from _power_cuts(value, value.args[0], float(value.args[1]), limit)
    elif op == "neg" or is_float_cast(value):
        sign = -1.0 if op == "neg" else 1.0
        for cut in product_cuts(value.args[0], limit):
            yield Powers(sign * cut.coefficient, cut.factors, cut.through | {value})
    elif op == "mean" and argument(value, "dtype") is None:
        yield Powers(1.0, ((Reduced(value, value.args[0], True), 1.0),), frozenset({value}))
    elif op == "norm" and argument(value, "ord") == 2 and argument(value, "dtype") is None:
        squares = Powers(1.0, ((value.args[0], 2.0),))
        yield Powers(1.0, ((Reduced(value, squares, False), 0.5),), frozenset({value}))


def _keeps_elements(value: Any) -> bool:
    """Whether a node is its input in another layout, or under dropout."""
    return isinstance(value, fx.Node) and (value.target in LAYOUT or value.target is aten.dropout.default)


EXPONENTS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0, "square": 2.0}


def _binary_cuts(node: fx.Node, exponent: float, limit: int) -> Iterator[Powers]:
    if node.kwargs.get("rounding_mode") is not None:
        return
    for lhs in product_cuts(node.args[0], limit):
        for rhs in product_cuts(node.args[1], limit - len(lhs.factors)):
            if len(lhs.factors) + len(rhs.factors) > limit or rhs.coefficient == 0:
                continue
            inverse = tuple((value, exponent * power) for value, power in rhs.factors)
            coefficient = lhs.coefficient * rhs.coefficient**exponent
            yield _merged(Powers(coefficient, lhs.factors + inverse, lhs.through | rhs.through | {node}))


def _power_cuts(node: fx.Node, base: Any, exponent: float, limit: int) -> Iterator[Powers]:
    for cut in product_cuts(base, limit):
        raised = _raised(cut, exponent)
        if raised is not None:
            yield replace(raised, through=cut.through | {node})


def _raised(cut: Powers, exponent: float) -> Powers | None:
    """A reading raised to a power, where exponents multiply for all numbers; one factor of power 1 always."""
    if [power for _, power in cut.factors] != [1.0] or cut.coefficient != 1:
        if not all(powers_multiply(power, exponent, _is_nonnegative(value)) for value, power in cut.factors):
            return None
        if cut.coefficient <= 0 and exponent != int(exponent):
            return None
    factors = tuple((value, power * exponent) for value, power in cut.factors)
    return Powers(cut.coefficient**exponent, factors, cut.through)


def _is_nonnegative(value: Any) -> bool:
    return isinstance(value, Reduced) and isinstance(value.source, Powers)


def _merged(cut: Powers) -> Powers:
    """Equal factors as one power; a number alone is a coefficient."""
    return replace(cut, factors=tuple(merge_powers(cut.factors, _is_nonnegative)))


def _all_cuts(powers: Powers, limit: int) -> Iterator[Powers]:
    readings = [[_raised(cut, power) for cut in product_cuts(value, limit)] for value, power in powers.factors]
    for chosen in itertools.product(*readings):
        if any(cut is None for cut in chosen):
            continue
        cuts = [cut for cut in chosen if cut is not None]
        factors = tuple(factor for cut in cuts for factor in cut.factors)
        through = powers.through.union(*(cut.through for cut in cuts))
        if len(factors) <= limit:
            yield _merged(Powers(powers.coefficient * math.prod(c.coefficient for c in cuts), factors, through))


def sum_cuts(value: Any, limit: int, loose: bool = False) -> Iterator[Addends]:
    """The readings of a value as a sum of at most `limit` terms and a number; `loose` looks through layout ops."""
    if isinstance(value, int | float):
        yield Addends(float(value), ())
        return
    if limit < 1:
        return
    yield Addends(0.0, ((1.0, value),))
    op = op_of(value)
    if op in ("add", "sub", "rsub"):
        yield from _binary_sums(value, limit, loose)
    elif op == "neg" or is_float_cast(value) or (loose and _keeps_elements(value)):
        for cut in sum_cuts(value.args[0], limit, loose):
            yield _scaled(cut, -1.0 if op == "neg" else 1.0, value)


def _scaled(cut: Addends, factor: float, node: fx.Node) -> Addends:
    terms = tuple((factor * coefficient, value) for coefficient, value in cut.terms)
    return Addends(factor * cut.constant, terms, cut.through | {node})


def _binary_sums(node: fx.Node, limit: int, loose: bool) -> Iterator[Addends]:
    alpha: Any = argument(node, "alpha", 1)
    if node.meta["val"].dtype is torch.bool or not isinstance(alpha, int | float):
        return  # a sum of booleans is their "or"
    first, second = (1.0, float(alpha)) if op_of(node) == "add" else (1.0, -float(alpha))
    if op_of(node) == "rsub":
        first, second = -float(alpha), 1.0
    left_for_lhs = limit if isinstance(node.args[1], int | float) else limit - 1
    for lhs in sum_cuts(node.args[0], left_for_lhs, loose):
        for rhs in sum_cuts(node.args[1], limit - len(lhs.terms), loose):
            left, right = _scaled(lhs, first, node), _scaled(rhs, second, node)
            yield Addends(left.constant + right.constant, left.terms + right.terms, left.through | right.through)


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


class Matcher:
    """One pattern against the nodes of one graph. `loose`: layout ops and dropout between blocks do not matter."""

    def __init__(self, pattern: Formula, loose: bool = False):
        self.pattern = pattern
        self.loose = loose
        self.optional = pattern.names - _always_bound(pattern.outputs)
        self._shared = set().union(*(shared(term) for term in pattern.outputs))
        self._positions: dict[fx.Node, int] = {}
        self._nearest: Miss | None = None
        self._expected: list[Any] = []

    def find(self, anchor: fx.Node) -> Iterator[Found]:
        """The matches whose first output is `anchor`, in the order of the operands as written.

        Raises:
            Miss: after the last match, the nearest miss.
        """
        self._nearest = None
        self._positions = {}
        first, *others = self.pattern.outputs
        for state in self._match(first, anchor, State()):
            for nodes, complete in self._other_outputs(others, (anchor,), state):
                if self.loose or self._is_closed(nodes, complete):
                    yield Found(nodes, complete, self.optional)
        if self._nearest is not None:
            raise self._nearest

    def _position(self, node: fx.Node) -> int:
        if node not in self._positions:
            self._positions = {each: position for position, each in enumerate(node.graph.nodes)}
        return self._positions[node]

    # Other outputs hang on values that are bound already: they are looked for among what is computed from those.
    def _other_outputs(
        self, terms: list[Term], nodes: tuple[fx.Node, ...], state: State
    ) -> Iterator[tuple[tuple[fx.Node, ...], State]]:
        if not terms:
            yield nodes, state
            return
        seeds = [state.bound[name] for name in sorted(names(terms[0])) if name in state.bound]
        for candidate in _computed_from([*(n for n in seeds if isinstance(n, fx.Node)), *nodes], depth=8):
            if candidate in nodes:
                continue
            for found in self._match(terms[0], candidate, state):
                yield from self._other_outputs(terms[1:], (*nodes, candidate), found)

    def _is_closed(self, outputs: tuple[fx.Node, ...], state: State) -> bool:
        """Whether nothing else reads a value inside the match."""
        inside = state.interior | set(outputs)
        bound = {value for value in state.bound.values() if isinstance(value, fx.Node)}
        for node in sorted(state.interior - set(outputs) - bound, key=self._position):
            reader = next((user for user in node.users if user not in inside), None)
            if reader is not None:
                self._miss_escape(node, reader, state)
                return False
        return True

    def _miss_escape(self, node: fx.Node, reader: fx.Node, state: State, reason: str = "") -> None:
        self._keep(
            Miss(
                reason or "a value inside the pattern is used elsewhere too",
                node=node,
                found=(node, "is also used by", reader),
                expected=f"{op_of(node)} used only inside the pattern",
                matched=state.matched,
                total=self.pattern.size,
            )
        )

    def _fail(self, term: Any, value: Any, state: State, reason: str = "") -> None:
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
                expected=_Expected(self._expected) if reason is ENDS else term,
                found="" if node is not None else str(value),
                matched=state.matched,
                total=self.pattern.size,
            )
        )

    def _keep(self, miss: Miss) -> None:
        if self._nearest is None or miss.matched > self._nearest.matched:
            self._nearest = miss

    def _match(self, term: Any, value: Any, state: State) -> Iterator[State]:
        """The states in which `value` is `term`; what stands in the pattern twice is one node."""
        if term not in self._shared or not isinstance(value, fx.Node):
            yield from self._match_anew(term, value, state)
        elif term not in state.shared:
            yield from (found.share(term, value) for found in self._match_anew(term, value, state))
        elif _is_same(state.shared[term], value):
            yield state
        else:
            self._fail(term, value, state)

    def _match_anew(self, term: Any, value: Any, state: State) -> Iterator[State]:
        match term:
            case Variable():
                yield from self._match_variable(term, _plain(value), state)
            case NumberVariable():
                yield from self._match_number(term, value, state)
            case WeightVariable():
                yield from self._match_weight(term, _plain(value), state)
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
                yield from self._match_computed_from(term, _plain(value), state)
            case Pointwise():
                yield from self._match_pointwise(term, _plain(value), state)
            case Call():
                yield from self._match_call(term, _plain(value), state)
            case _:
                self._fail(term, value, state)

    def _match_variable(self, term: Variable, value: Any, state: State) -> Iterator[State]:
        if not isinstance(value, fx.Node | int | float) or isinstance(value, bool):
            self._fail(term, value, state)
        elif term.name not in state.bound:
            yield state.bind(term.name, value)
        elif _is_same(state.bound[term.name], value):
            yield state
        else:
            expected = (f"{term.name} =", state.bound[term.name])
            self._fail(expected, value, state, f"{term.name} stands for another value already")

    def _match_number(self, term: NumberVariable, value: Any, state: State) -> Iterator[State]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number:
            self._fail(term, value, state, f"{term.name} is a number")
        elif term.where is not None and not term.where(value):
            self._fail(term, value, state, f"{term.name} does not fulfil its condition")
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
            self._fail(term, value, state, f"{term.name} does not fulfil its condition")
        elif term.name not in state.bound:
            yield state.bind(term.name, value)
        elif _is_same(state.bound[term.name], value):
            yield state
        else:
            expected = (f"{term.name} =", state.bound[term.name])
            self._fail(expected, value, state, f"{term.name} stands for another weight already")

    # --- sums and products

    def _match_sum(self, term: Sum, value: Any, state: State) -> Iterator[State]:
        entered = False
        for variant in _variants(term):
            for cut in sum_cuts(_plain(value), len(variant.terms), self.loose):
                if not cut.through and len(variant.terms) > 1:
                    continue
                entered = True
                rest = 0.0 if is_close(cut.constant, variant.constant) else cut.constant - variant.constant
                inner = state.enter(cut.through, term)
                yield from self._assign_sum(variant.terms, cut.terms, rest, inner)
        if not entered:
            self._fail(term, value, state)

    def _assign_sum(
        self, terms: tuple[Term, ...], values: tuple[tuple[float, Any], ...], rest: float, state: State
    ) -> Iterator[State]:
        """Give each term a value, in any order; a rest of the constant goes to a term that can be a number."""
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
        for variant in _variants(term):
            if isinstance(single := _single(variant), Term):
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
        """Give each factor a value of its exponent, in any order; then the coefficients must agree."""
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
        """A factor that is a number: what of the coefficient the pattern does not write."""
        ratio = cut.coefficient / term.coefficient if term.coefficient else 0.0
        if ratio in (0.0, 1.0) or (ratio < 0 and exponent != 1):
            return
        rest = replace(cut, coefficient=term.coefficient)
        for found in self._match(factor, ratio ** (1 / exponent), state):
            yield from self._assign_product(term, others, values, rest, given, found)

    def _same_coefficient(self, term: Product, cut: Powers, given: dict[Term, Any], scale: float, state: State) -> bool:
        """Whether the numbers agree, counting the elements that sums and means reduce."""
        exponents, counts = _summed(term.factors), _summed(term.counts)
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
            if _is_op(term, node):
                inner = state.enter((*passed, node), term)
                yield from self._match_operands(term, node, inner)
                return
            if pairs := _factors_of_linear(term, node):
                yield from self._match_all(pairs, state.enter((*passed, node), term))
                return
        self._fail(term, value, state)

    def _readings(self, value: Any) -> Iterator[tuple[fx.Node, tuple[fx.Node, ...]]]:
        """The value, then what it is a cast of; between blocks of a loose pattern, what it is a new layout of."""
        passed: tuple[fx.Node, ...] = ()
        while isinstance(value, fx.Node):
            yield value, passed
            if not is_float_cast(value) and not (self.loose and _keeps_elements(value)):
                return
            passed, value = (*passed, value), value.args[0]

    def _match_reduced(self, term: Call, value: Reduced, state: State) -> Iterator[State]:
        if term.op != "sum":
            self._fail(term, value.node, state)
            return
        source, dims, keepdim = term.args
        if not _same_reduction(value.node, dims, keepdim):
            self._fail(term, value.node, state, "another axis is reduced")
            return
        yield from self._match(source, value.source, state.enter((value.node,), term))

    def _match_operands(self, term: Call, node: fx.Node, state: State) -> Iterator[State]:
        if term.op in PERMUTATIONS:
            yield from self._match_permutation(term, node, state)
            return
        if term.op == "sum":
            yield from self._match_reduced(term, Reduced(node, node.args[0], False), state)
            return
        pairs, unwritten = self._operand_pairs(term, node)
        if unwritten:
            self._fail(term, node, state, f"{unwritten} in the graph, unlike in the pattern")
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
        elif _same_literal(wanted, actual):
            yield state
        else:
            self._fail(wanted, actual, state)

    def _match_permutation(self, term: Call, node: fx.Node, state: State) -> Iterator[State]:
        rank = node.meta["val"].dim()
        permuted = _permuted(term, rank)
        if permuted != axes.permutation(node):
            reason = f"the tensor has {rank} axes" if permuted is None else "the axes are permuted otherwise"
            self._fail(term, node, state, reason)
            return
        yield from self._match(term.args[0], node.args[0], state)

    def _operand_pairs(self, term: Call, node: fx.Node) -> tuple[list[tuple[Any, Any]], str]:
        """(what the pattern writes, what the node has) for each operand, dims made comparable; what only one has."""
        if not hasattr(node.target, "_schema"):
            return list(zip(term.args, node.args[1:], strict=False)), ""
        written = dict(term.kwargs)
        pairs: list[tuple[Any, Any]] = []
        for name, (place, default) in parameters(node.target).items():
            actual = argument(node, name)
            is_written = place < len(term.args) or name in written
            wanted = term.args[place] if place < len(term.args) else written.pop(name, None)
            if name in SIZES or name in PRECISION:
                continue
            if not is_written:
                if not term.open and not _same_literal(default, actual):
                    return [], f"{name}={actual}"
                continue
            if name in DIMS:
                wanted, actual = (_dims(dims, _rank_of_dims(node)) for dims in (wanted, actual))
            if name == "correction" and actual is None:
                actual = 1
            if name == "equation":
                actual = plain_equation(actual)
            pairs.append((wanted, actual))
        unknown = sorted(set(written) - PRECISION - SIZES)
        return pairs, f"no {unknown[0]}" if unknown else ""

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
        node = _plain(value)
        found = slice_of(node)
        if found is None:
            self._fail(term, node, state)
            return
        source, dim, start, stop, step = found
        total = source.meta["val"].shape[dim]
        rank = source.meta["val"].dim()
        if term.dim % rank != dim or not isinstance(total, int) or _bounds(term, total) != (start, stop, step):
            self._fail(term, node, state, "another slice is taken")
            return
        yield from self._match(term.source, source, state.enter((node,), term))

    def _match_computed_from(self, term: ComputedFrom, value: Any, state: State) -> Iterator[State]:
        """The nearest ancestors that are `source`; where the source's variables are bound, none before those."""
        if not isinstance(value, fx.Node):
            self._fail(term, value, state)
            return
        known = [state.bound[name] for name in names(term.source) if name in state.bound]
        earliest = min((self._position(node) for node in known if isinstance(node, fx.Node)), default=0)
        nearest, is_found = self._nearest, False
        for node in _ancestors(value, self._position, earliest):
            if isinstance(term.source, Call) and not _is_op(term.source, node):
                continue
            for found in self._match(term.source, node, state):
                is_found = True
                yield found
            if not is_found and self._nearest is not None and self._nearest.matched <= state.matched:
                self._nearest = nearest  # passing by other values is no miss
        if not is_found:
            self._fail(term, value, state, f"this is not computed {formula(term)}")


class _Expected:
    """What was expected at a place: all that was tried there, which grows until it is read."""

    def __init__(self, terms: list[Term]):
        self._terms = terms

    def __str__(self) -> str:
        return formula(Either(tuple(dict.fromkeys(self._terms))))


def _always_bound(terms: Iterable[Any]) -> set[str]:
    """The names that every match binds: not those of optional terms or of one alternative alone."""
    bound: set[str] = set()
    for term in terms:
        match term:
            case Variable() | NumberVariable() | WeightVariable():
                bound.add(term.name)
            case Pointwise():
                bound |= _always_bound(children(term)) | ({term.bound} - {""})
            case Maybe():
                continue
            case Either():
                bound |= set.intersection(*(_always_bound([option]) for option in term.options))
            case _:
                bound |= _always_bound(children(term))
    return bound


def _variants(term: Sum | Product) -> Iterator[Any]:
    """The term with each optional operand present, then absent, and each alternative in its place."""
    operands = list(children(term))
    place = next((i for i, operand in enumerate(operands) if isinstance(operand, Maybe | Either)), None)
    if place is None:
        yield term
        return
    choice: Any = operands[place]
    for option in (choice.term, None) if isinstance(choice, Maybe) else choice.options:
        yield from _variants(_with_operand(term, place, option))


def _single(term: Product) -> Term | None:
    """The factor that is left alone where optional ones are absent."""
    is_single = term.coefficient == 1 and not term.counts and [exponent for _, exponent in term.factors] == [1.0]
    return term.factors[0][0] if is_single else None


def _with_operand(term: Sum | Product, place: int, option: Term | None) -> Any:
    if isinstance(term, Sum):
        inner = () if option is None else option.terms if isinstance(option, Sum) else (option,)
        constant = term.constant + (option.constant if isinstance(option, Sum) else 0.0)
        return Sum(constant, term.terms[:place] + inner + term.terms[place + 1 :])
    exponent = term.factors[place][1]
    before, after = term.factors[:place], term.factors[place + 1 :]
    if option is None:
        return replace(term, factors=before + after)
    if isinstance(option, Product) and exponent == 1:
        merged = before + option.factors + after
        return Product(term.coefficient * option.coefficient, merged, term.counts + option.counts)
    return replace(term, factors=(*before, (option, exponent), *after))


def _summed(powers: Iterable[tuple[Term, float]]) -> dict[Term, float]:
    summed: dict[Term, float] = {}
    for term, exponent in powers:
        summed[term] = summed.get(term, 0.0) + exponent
    return summed


def _plain(value: Any) -> Any:
    """A product of one value to the power of one is that value."""
    is_single = isinstance(value, Powers) and value.coefficient == 1 and [e for _, e in value.factors] == [1.0]
    return value.factors[0][0] if is_single else value


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values are one: the same node, perhaps in another precision, or close numbers."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return _uncast(a) is _uncast(b)
    return isinstance(a, int | float) and isinstance(b, int | float) and is_close(a, b)


def _uncast(node: fx.Node) -> fx.Node:
    """What a node is, rounded nowhere: through casts to a dtype that holds every value of the one before."""
    while is_float_cast(node):
        source: Any = node.args[0]
        dtype = node.meta["val"].dtype
        if torch.promote_types(source.meta["val"].dtype, dtype) != dtype:
            break
        node = source
    return node


def _is_op(term: Call, node: fx.Node) -> bool:
    op = op_of(node)
    if term.op == "normalize":
        return op in ("layer_norm", "rms_norm")
    if term.op == "activation":
        is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and not is_float_cast(node)
        return is_pointwise and len(node.all_input_nodes) == 1 and is_pure(node)
    return op == term.op or (op in SHAPES and term.op in SHAPES) or (op in PERMUTATIONS and term.op in PERMUTATIONS)


def _factors_of_linear(term: Call, node: fx.Node) -> list[tuple[Any, Any]]:
    """The factors of a pattern's matmul with what a linear multiplies: such is the canonical form of x @ w, x @ w.T."""
    if term.op != "matmul" or op_of(node) != "linear" or argument(node, "bias") is not None:
        return []
    (first, second), (x, weight) = term.args, node.args[:2]
    if op_of(weight) in PERMUTATIONS:
        return [(first, x), (second, weight.args[0])]  # type: ignore[union-attr]
    if isinstance(second, Call) and second.op in PERMUTATIONS and _permuted(second, 2) == [1, 0]:
        return [(first, x), (second.args[0], weight)]
    return []


def _permuted(term: Call, rank: int) -> list[int] | None:
    """The axes of a tensor as a term of `PERMUTATIONS` has them; None where it has others."""
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    try:
        permuted = getattr(probe, term.op)
        permuted = permuted(*term.args[1:], **dict(term.kwargs)) if callable(permuted) else permuted
    except (IndexError, RuntimeError):
        return None
    return [size - 2 for size in permuted.shape]


def _rank_of_dims(node: fx.Node) -> int:
    """How many dims a negative one counts in: of what is read, or of the result that has one more."""
    source = node.args[0]
    is_larger = op_of(node) == "unsqueeze" or not isinstance(source, fx.Node)
    return (node if is_larger else source).meta["val"].dim()  # type: ignore[union-attr]


def _dims(dims: Any, rank: int) -> Any:
    if isinstance(dims, int):
        dims = [dims]
    return sorted(dim % rank for dim in dims) if isinstance(dims, list | tuple) else dims


def _same_literal(wanted: Any, actual: Any) -> bool:
    if isinstance(wanted, int | float) and isinstance(actual, int | float):
        return bool(wanted == actual) if isinstance(wanted, bool) else is_close(wanted, actual)
    return bool(wanted == actual)


def _same_reduction(node: fx.Node, dims: Any, keepdim: bool) -> bool:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    wanted = list(range(rank)) if dims is None else sorted(dim % rank for dim in dims)
    return wanted == reduced_dims(node) and bool(argument(node, "keepdim", False)) == bool(keepdim)


def is_weight(value: Any) -> bool:
    """Whether a node is a parameter, buffer or constant, or computed from such alone."""
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_function"):
            return False
        if node.op == "call_function" and (not node.all_input_nodes or not is_pure(node)):
            return False
        seen.add(node)
        waiting += [source for source in node.all_input_nodes if source not in seen]
    return True


def slice_of(node: Any) -> tuple[fx.Node, int, int, int, int] | None:
    """(source, dim, start, stop, step) of a node that is a slice, however it is cut out; None where it is none."""
    if not isinstance(node, fx.Node) or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    source: Any = node.args[0]
    if node.target is aten.slice.Tensor:
        dim, rank = argument(node, "dim"), source.meta["val"].dim()
        total = source.meta["val"].shape[dim % rank]
        start, stop, step = argument(node, "start") or 0, argument(node, "end"), argument(node, "step")
        if not all(isinstance(number, int) for number in (total, start, step, stop or 0)):
            return None
        return source, dim % rank, *slice(start, stop, step).indices(total)
    if op_of(node) != "getitem" or op_of(source) not in ("split", "split_with_sizes", "chunk"):
        return None
    whole: Any = source.args[0]
    dim = argument(source, "dim") % whole.meta["val"].dim()
    sizes = [part.shape[dim] for part in source.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    index: Any = node.args[1]
    start = sum(sizes[:index])
    return whole, dim, start, start + sizes[index], 1


def _bounds(term: Part | Slice, total: int) -> tuple[int, int, int]:
    if isinstance(term, Part):
        width = -(-total // term.of)
        return term.index * width, min((term.index + 1) * width, total), 1
    return slice(term.start, term.stop, term.step).indices(total)


def _computed_from(seeds: list[fx.Node], depth: int) -> list[fx.Node]:
    """What is computed from the seeds in at most `depth` steps, nearest first."""
    found, layer = dict.fromkeys(seeds), seeds
    for _ in range(depth):
        layer = [user for node in layer for user in node.users if user not in found and user.op == "call_function"]
        found.update(dict.fromkeys(layer))
    return list(found)


def _ancestors(node: fx.Node, position: Callable[[fx.Node], int], earliest: int) -> Iterator[fx.Node]:
    """A node and what it is computed from, latest first, none before position `earliest`."""
    waiting, seen = {node}, {node}
    while waiting:
        latest = max(waiting, key=position)
        waiting.remove(latest)
        yield latest
        sources = [s for s in latest.all_input_nodes if s not in seen and position(s) >= earliest]
        seen.update(sources)
        waiting.update(sources)
