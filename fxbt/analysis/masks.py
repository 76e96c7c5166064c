"""Proves what a mask says by evaluating its nodes at symbolic positions instead of on data.

A mask in a captured graph consists of arange, comparisons, where and broadcasting. `evaluate` gives its value at index
(b, h, i, j) as a sympy expression; `is_causal` tests whether that is exactly "j <= i".
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch import fx

from ..graph.node import argument, attribute
from ..graph.opsets import CASTS
from ..graph.walk import ancestors
from .axes import IDENTITIES, PERMUTES, RESHAPES, UNIT_DIMS, permutation, sizes_of
from .rounding import EXACT_FOR_POSITIONS, NO_NUMBERS, Opaque, cast_to, number_of

aten = torch.ops.aten
Index = tuple[Any, ...]
VIEWS = RESHAPES | UNIT_DIMS
Truth = Relational | BooleanFunction | BooleanAtom  # not sympy's Boolean, which includes Symbol, even integer ones


def index_symbols(count: int) -> Index:
    """Nonnegative integer symbols at which to evaluate a mask."""
    return tuple(sympy.Symbol(f"i{axis}", integer=True, nonnegative=True) for axis in range(count))


def evaluate(node: Any, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    """The value of `node` at `index` (one entry per dim): a sympy expression or boolean.

    Values read from data appear as applied functions (`mask(i0, i3)`). `constants` gives the content of get_attr nodes;
    the caller must watch those whose content the result depends on (`read_constants`).

    Raises:
        Opaque: the value of an op at a position is not known.
    """
    if not isinstance(node, fx.Node):
        return number_of(node)
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return sympy.sympify(value.node.expr if isinstance(value, torch.SymInt) else value)
    if node.op == "get_attr":
        return _constant(node, index, constants)
    if node.op != "call_function" or node.target not in EVALUATORS:
        return _data(node, index)
    return EVALUATORS[node.target](node, index, constants)


def read_constants(node: fx.Node) -> dict[fx.Node, torch.Tensor]:
    """The parameters, buffers and constants a mask is computed from, with their content."""
    constants = sorted(source for source in ancestors([node]) if source.op == "get_attr")
    return {constant: attribute(constant.graph.owning_module, constant) for constant in constants}


def looked_at(node: fx.Node) -> set[fx.Node]:
    """The nodes whose values `evaluate` may look at: beyond an op that it cannot evaluate, all is data."""
    return ancestors([node], lambda source: source.all_input_nodes if source.target in EVALUATORS else [])


def zero_else_below(value: Any, limit: float) -> Any | None:
    """Where an evaluated additive mask is 0, if it is at most `limit` everywhere else; otherwise None."""
    if isinstance(value, sympy.Piecewise):
        cases = [(zero_else_below(case, limit), when) for case, when in value.args]
        return None if any(truth is None for truth, _ in cases) else _join(cases)
    if not getattr(value, "is_number", False) or value is sympy.nan:
        return None
    if value == 0:
        return sympy.true
    return sympy.false if value <= limit else None


def truth(value: Any) -> Any:
    """A value as torch casts it to bool: nonzero is True."""
    if isinstance(value, Truth):
        return value
    return _compare(sympy.Ne, value, sympy.Integer(0))


def negate(value: Any) -> Any:
    """The negation of an evaluated boolean."""
    return sympy.Not(value)


def is_causal(value: Any, query: sympy.Symbol, key: sympy.Symbol) -> bool:
    """Whether an evaluated boolean mask (True = attend) is exactly key <= query."""
    if not isinstance(value, Truth):
        return False
    terms = [slack_of(term) for term in sympy.And.make_args(value)]
    open_terms = [slack for slack in terms if slack is None or not slack.is_nonnegative]
    return bool(open_terms) and all(
        slack is not None and sympy.expand(slack - (query - key)) == 0 for slack in open_terms
    )


def implies_causal(value: Any, query: sympy.Symbol, key: sympy.Symbol) -> bool:
    """Whether an evaluated boolean mask (True = attend) lets no query see a later key."""
    if not isinstance(value, Truth):
        return False
    slacks = [slack_of(term) for term in sympy.And.make_args(value)]
    return any(slack is not None and (query - key - slack).is_nonnegative for slack in slacks)


def without_bounds(value: Any, index: Index, shape: Sequence[Any]) -> Any:
    """An evaluated boolean mask without comparisons that hold at every position of a tensor of this shape.

    Positions run from 0 to the size minus one: `key <= length` always holds for `length + 1` keys.
    """
    if not isinstance(value, Truth):
        return value
    sizes: dict[Any, Any] = dict(zip(index, shape, strict=True))
    return sympy.And(*(term for term in sympy.And.make_args(value) if not _always_holds(term, sizes)))


def _always_holds(term: Any, sizes: dict[Any, Any]) -> bool:
    slack = slack_of(term)
    if slack is None or slack.atoms(AppliedUndef):
        return False
    for position, size in sizes.items():
        slope = sympy.diff(slack, position)
        if not slope.is_number:
            return False
        last = size.node.expr - 1 if isinstance(size, torch.SymInt) else sympy.Integer(size - 1)
        slack = slack.subs(position, 0 if slope >= 0 else last)  # at its lowest
    slack = sympy.expand(slack)
    known = [size.node.shape_env for size in sizes.values() if isinstance(size, torch.SymInt)]
    in_range = known and slack.free_symbols <= known[0].var_to_range.keys()
    return bool(slack.is_nonnegative or (in_range and known[0].bound_sympy(slack).lower >= 0))


def slack_of(term: Any) -> Any | None:
    """The integer expression that is >= 0 exactly where the comparison `term` holds; None if there is none."""
    if not isinstance(term, Relational):
        return None
    gap = sympy.expand(term.lhs - term.rhs)
    if not gap.is_integer:
        return None
    slacks = {sympy.Ge: gap, sympy.Gt: gap - 1, sympy.Le: -gap, sympy.Lt: -gap - 1}
    slack = slacks.get(type(term))
    return None if slack is None else sympy.expand(slack)


def _data(node: fx.Node, index: Index) -> Any:
    shape = node.meta["val"].shape
    read = [position for dim, position in enumerate(index) if not _is_one(shape[dim])]
    # assume nothing of floats: integer=False would say that no float is 0
    known = {} if node.meta["val"].dtype.is_floating_point else {"integer": True}
    applied = sympy.Function(node.name, **known)(*read) if read else sympy.Symbol(node.name, **known)
    return sympy.Ne(applied, 0) if node.meta["val"].dtype is torch.bool else applied


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _constant(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    """Reads a constant triangle of ones as key <= query, and a scalar as its number."""
    content = constants.get(node)
    if content is None:
        return _data(node, index)
    if content.numel() == 1:
        return number_of(content.item())
    if content.dim() < 2 or content.shape[:-2].numel() != 1 or content.shape[-1] != content.shape[-2]:
        return _data(node, index)
    square = content.reshape(content.shape[-2:])
    below = torch.ones_like(square).tril()
    if torch.equal(square, below):
        return _truth(sympy.Ge(index[-2], index[-1]), content.dtype)
    if torch.equal(square, torch.ones_like(square) - below if square.dtype != torch.bool else ~below):
        return _truth(sympy.Lt(index[-2], index[-1]), content.dtype)
    return _data(node, index)


def _truth(condition: Any, dtype: torch.dtype) -> Any:
    return condition if dtype is torch.bool else _as_number(condition)


def _as_number(value: Any) -> Any:
    return sympy.Piecewise((1, value), (0, True)) if isinstance(value, Truth) else value


def _compare(relation: Any, lhs: Any, rhs: Any) -> Any:
    for value, other, flip in ((lhs, rhs, False), (rhs, lhs, True)):
        value = _as_number(value)
        if not isinstance(value, sympy.Piecewise):
            continue
        cases = [(_compare(relation, *((other, case) if flip else (case, other))), when) for case, when in value.args]
        return _join(cases)
    return relation(lhs, rhs)


def _join(cases: list[tuple[Any, Any]]) -> Any:
    """Combines booleans by case into one boolean."""
    result, earlier = sympy.false, sympy.true
    for truth, when in cases:
        result = sympy.Or(result, sympy.And(earlier, when, truth))
        earlier = sympy.And(earlier, sympy.Not(when))
    return result


def _operand(node: fx.Node, operand: Any, index: Index) -> Index:
    """The index at which a broadcasting operand is read."""
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], torch.Tensor):
        return ()
    shape = operand.meta["val"].shape
    kept = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if _is_one(size) else at for size, at in zip(shape, kept, strict=True))


def _pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
        values = [evaluate(arg, _operand(node, arg, index), constants) for arg in node.args]
        if node.kwargs.get("alpha", 1) != 1:
            raise Opaque(str(node))
        return function(*values)

    return run


def _relational(relation: Any) -> Callable[..., Any]:
    def run(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
        return _compare(relation, *(_compared(arg, _operand(node, arg, index), constants) for arg in node.args))

    return run


def _compared(operand: Any, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    """An operand of a comparison. Possibly rounded numbers along one axis count as data: other code rounds
    otherwise."""
    value = evaluate(operand, index, constants)
    if not isinstance(operand, fx.Node) or not isinstance(operand.meta["val"], torch.Tensor):
        return value
    is_along_one_axis = sum(not _is_one(size) for size in operand.meta["val"].shape) == 1
    if not is_along_one_axis or isinstance(value, AppliedUndef | Truth | sympy.Piecewise) or value.is_number:
        return value
    is_exact = operand.meta["val"].dtype in EXACT_FOR_POSITIONS
    is_rounded = not is_exact or any(not data.is_integer for data in value.atoms(AppliedUndef))
    return _data(operand, index) if is_rounded else value


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def combine(lhs: Any, rhs: Any) -> Any:
        lhs, rhs = _as_number(lhs), _as_number(rhs)
        if isinstance(lhs, sympy.Piecewise):
            return sympy.Piecewise(*[(combine(case, rhs), when) for case, when in lhs.args])
        if isinstance(rhs, sympy.Piecewise):
            return sympy.Piecewise(*[(combine(lhs, case), when) for case, when in rhs.args])
        return function(lhs, rhs)

    return _in_numbers(_pointwise(combine))


def _in_numbers(evaluator: Callable[..., Any]) -> Callable[..., Any]:
    """An evaluator for results that do not wrap around."""

    def run(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
        if node.meta["val"].dtype in NO_NUMBERS:
            raise Opaque(f"arithmetic in {node.meta['val'].dtype}")
        return evaluator(node, index, constants)

    return run


def _where(condition: Any, then: Any, otherwise: Any) -> Any:
    condition = truth(condition)
    if isinstance(then, Truth) and isinstance(otherwise, Truth):
        return sympy.Or(sympy.And(condition, then), sympy.And(sympy.Not(condition), otherwise))
    return sympy.Piecewise((then, condition), (otherwise, True))


def _arange(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    start = argument(node, "start", 0)
    step = argument(node, "step", 1)
    return evaluate(start, (), constants) + index[0] * evaluate(step, (), constants)


def _full(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    value = evaluate(node.args[1], (), constants)
    return truth(value) if node.meta["val"].dtype is torch.bool else value


def _filled_with(number: int) -> Callable[..., Any]:
    def run(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
        return truth(sympy.Integer(number)) if node.meta["val"].dtype is torch.bool else sympy.Integer(number)

    return run


def _identity(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    return evaluate(node.args[0], index, constants)


def _expand(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    return evaluate(node.args[0], _operand(node, node.args[0], index), constants)


def _repeat(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    source: Any = node.args[0]
    kept = sizes_of(node)[-len(sizes_of(source)) :]
    is_broadcast = all(size in (1, whole) for size, whole in zip(sizes_of(source), kept, strict=True))
    return _expand(node, index, constants) if is_broadcast else _data(node, index)


def _permute(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    inner: list[Any] = [0] * len(index)
    for output_dim, input_dim in enumerate(permutation(node)):
        inner[input_dim] = index[output_dim]
    return evaluate(node.args[0], tuple(inner), constants)


def _unit_dims(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    """A reshape that only adds or removes dims of size one, also relative to an earlier reshape."""
    result_sizes = sizes_of(node)
    source: Any = node.args[0]
    while not _differ_in_units(sizes_of(source), result_sizes):
        if source.target not in VIEWS:
            return _data(node, index)
        source = source.args[0]
    positions = iter(at for at, size in zip(index, result_sizes, strict=True) if size != 1)
    inner = tuple(sympy.Integer(0) if size == 1 else next(positions) for size in sizes_of(source))
    return evaluate(source, inner, constants)


def _differ_in_units(sizes: list[Any], others: list[Any]) -> bool:
    return [size for size in sizes if size != 1] == [size for size in others if size != 1]


def _slice(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    dim = argument(node, "dim", 0) % len(index)
    start, step = argument(node, "start") or 0, argument(node, "step", 1)
    start_value = evaluate(start, (), constants)
    if not start_value.is_nonnegative:
        raise Opaque("a slice from the end")
    moved = start_value + index[dim] * step
    return evaluate(node.args[0], (*index[:dim], moved, *index[dim + 1 :]), constants)


def _select(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    source, dim, position = node.args[:3]
    dim %= source.meta["val"].dim()
    if not isinstance(position, int) or position < 0:
        raise Opaque("a select from the end")
    return evaluate(source, (*index[:dim], sympy.Integer(position), *index[dim:]), constants)


def _cast(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    value = evaluate(node.args[0], index, constants)
    dtype = node.meta["val"].dtype
    if dtype is torch.bool:
        return truth(value)
    if isinstance(value, Truth):
        return _as_number(value)
    source = node.args[0].meta["val"].dtype
    is_known = value.is_number or value.is_integer or isinstance(value, sympy.Piecewise)
    if source.is_floating_point and not dtype.is_floating_point and not is_known:
        return _data(node, index)  # rounds in an unknown way
    return cast_to(value, source, dtype)


def _triangle(relation: Any, outside: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
        diagonal = evaluate(argument(node, "diagonal", 0), (), constants)
        inside = relation(index[-1] - index[-2], diagonal)
        value = evaluate(node.args[0], index, constants)
        return sympy.And(inside, value) if isinstance(value, Truth) else sympy.Piecewise((value, inside), (0, True))

    return run


def _gather(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    """x[rows, columns] with index tensors for all dims of x."""
    source: Any
    indices: Any
    source, indices = node.args[:2]
    if any(position is None for position in indices) or len(indices) != source.meta["val"].dim():
        return _data(node, index)
    inner = tuple(evaluate(position, _operand(node, position, index), constants) for position in indices)
    if not all(position.is_nonnegative for position in inner):  # torch wraps negative ones around
        return _data(node, index)
    return evaluate(source, inner, constants)


def _diff(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    """x[i] - x[i - 1], the first against `prepend`; known if it is equal at every position."""
    source, prepend = node.args[0], argument(node, "prepend")
    dim = argument(node, "dim", -1) % len(index)
    if argument(node, "n", 1) != 1 or argument(node, "append") is not None or prepend is None:
        return _data(node, index)

    def at(position: Any) -> Index:
        return (*index[:dim], position, *index[dim + 1 :])

    zero = sympy.Integer(0)
    inside = evaluate(source, index, constants) - evaluate(source, at(index[dim] - 1), constants)
    first = evaluate(source, at(zero), constants) - evaluate(prepend, at(zero), constants)
    if sympy.expand(inside - first) != 0:
        return _data(node, index)
    return sympy.expand(first)


def _cumsum(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    """The running sum of a value that is the same number everywhere."""
    value = evaluate(node.args[0], index, constants)
    if isinstance(value, Truth):
        value = {sympy.true: sympy.Integer(1), sympy.false: sympy.Integer(0)}.get(value)
    if value is None or not value.is_number:
        return _data(node, index)
    return value * (index[node.args[1]] + 1)  # type: ignore[index]


def _and(lhs: Any, rhs: Any) -> Any:
    return sympy.And(truth(lhs), truth(rhs))


def _or(lhs: Any, rhs: Any) -> Any:
    return sympy.Or(truth(lhs), truth(rhs))


def _negation(node: fx.Node, index: Index, constants: dict[fx.Node, torch.Tensor]) -> Any:
    if node.meta["val"].dtype is not torch.bool:
        raise Opaque("bitwise not of a number")
    return sympy.Not(truth(evaluate(node.args[0], index, constants)))


def _table(entries: Sequence[tuple[Sequence[Any], Callable[..., Any]]]) -> dict[Any, Callable[..., Any]]:
    return {target: run for targets, run in entries for target in targets}


EVALUATORS = _table(
    [
        ((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
        ((aten.full.default, aten.full_like.default, aten.new_full.default), _full),
        ((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _filled_with(1)),
        ((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _filled_with(0)),
        (tuple(IDENTITIES), _identity),
        ((aten.expand.default, aten.expand_as.default), _expand),
        ((aten.repeat.default,), _repeat),
        (tuple(PERMUTES), _permute),
        (tuple(VIEWS), _unit_dims),
        ((aten.slice.Tensor,), _slice),
        ((aten.select.int,), _select),
        (tuple(CASTS), _cast),
        ((aten.tril.default,), _triangle(sympy.Le, lambda value: value)),
        ((aten.triu.default,), _triangle(sympy.Ge, lambda value: value)),
        ((aten.index.Tensor,), _gather),
        ((aten.diff.default,), _diff),
        ((aten.cumsum.default,), _cumsum),
        ((aten.add.Tensor, aten.add.Scalar), _arithmetic(operator.add)),
        ((aten.sub.Tensor, aten.sub.Scalar), _arithmetic(operator.sub)),
        ((aten.rsub.Scalar, aten.rsub.Tensor), _arithmetic(lambda lhs, rhs: rhs - lhs)),
        ((aten.mul.Tensor, aten.mul.Scalar), _arithmetic(operator.mul)),
        ((aten.neg.default,), _in_numbers(_pointwise(operator.neg))),
        ((aten.abs.default,), _pointwise(sympy.Abs)),
        ((aten.le.Tensor, aten.le.Scalar), _relational(sympy.Le)),
        ((aten.lt.Tensor, aten.lt.Scalar), _relational(sympy.Lt)),
        ((aten.ge.Tensor, aten.ge.Scalar), _relational(sympy.Ge)),
        ((aten.gt.Tensor, aten.gt.Scalar), _relational(sympy.Gt)),
        ((aten.eq.Tensor, aten.eq.Scalar), _relational(sympy.Eq)),
        ((aten.ne.Tensor, aten.ne.Scalar), _relational(sympy.Ne)),
        (
            (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor),
            _pointwise(_and),
        ),
        ((aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor), _pointwise(_or)),
        ((aten.logical_not.default, aten.bitwise_not.default), _negation),
        (
            (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
            _pointwise(_where),
        ),
        (
            (aten.masked_fill.Scalar, aten.masked_fill.Tensor),
            _pointwise(lambda value, condition, fill: _where(condition, fill, value)),
        ),
    ]
)
