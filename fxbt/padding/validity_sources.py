"""Where a call says which tokens are valid: an input [batch, length], or a value that forward computes from lengths.

The latter is a boolean of the graph that depends only on one number per row and on sizes, such as `arange(length) <
lengths[:, None]`. A run computes it first, and from it where the tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch import fx

from ..analysis.axes import sizes_of
from ..analysis.masks import Index, evaluate, read_constants, slack_of
from ..analysis.rounding import Opaque
from ..graph.walk import ancestors

ROW, POSITION = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("row", "position"))
aten = torch.ops.aten
SIZE = aten.sym_size.int
SIZES_OF: dict[Any, int] = {  # the argument of which an op reads only sizes and dtype
    **dict.fromkeys((aten.ones_like.default, aten.zeros_like.default, aten.full_like.default), 0),
    **dict.fromkeys((aten.new_ones.default, aten.new_zeros.default, aten.new_full.default), 0),
    **dict.fromkeys((aten.expand_as.default, aten.view_as.default, aten.reshape_as.default), 1),
}


@dataclass(frozen=True)
class Validity:
    """Which tokens are valid: those where `source` [batch, length] is 1 (not 0), or where `relation(source, number)`
    holds.

    The relation serves token ids and boolean masks that are True at padding. A computed `source` may have dims of size
    one between batch and length; `condition` is its value at (ROW, POSITION).
    """

    source: fx.Node
    relation: type[Relational] | None = None
    number: float = 1
    condition: Relational | None = None

    @property
    def of_ids(self) -> bool:
        """Whether the source is token ids."""
        return self.relation is not None and self.source.meta["val"].dtype is not torch.bool

    @property
    def sizes(self) -> tuple[Any, Any]:
        """Batch and length."""
        sizes = sizes_of(self.source)
        return sizes[0], sizes[-1]

    @property
    def lengths(self) -> fx.Node:
        """The input that a computed source depends on."""
        return next(node for node in _computed_from(self.source) if node.op == "placeholder")

    def counted(self) -> list[fx.Node]:
        """The integers in the condition; if they are small, every dtype holds them exactly."""
        if self.condition is None or slack_of(self.condition) is None:
            return []
        names = {data.func.__name__ for data in self.condition.atoms(AppliedUndef)}
        return [node for node in _computed_from(self.source) if node.name in names]

    def assume(self, value: Any, at: Index, is_valid: bool) -> Any:
        """An evaluated expression if the token at (row, position) is valid (or is padding)."""
        if self.condition is not None:
            condition = self.condition.xreplace({ROW: at[0], POSITION: at[1]})
            return _settled(value, condition, is_valid == (self.relation is None))
        for data in value.atoms(AppliedUndef):
            if data.func.__name__ == self.source.name and data.args == at:
                value = self._assume(value, data, is_valid)
        return value

    def _assume(self, value: Any, data: Any, is_valid: bool) -> Any:
        if self.relation is None:
            return value.subs(data, int(is_valid))
        number = sympy.sympify(self.number)
        condition = self.relation(data, number)
        given = {condition: sympy.sympify(is_valid), sympy.Not(condition): sympy.sympify(not is_valid)}
        value = value.xreplace(given | {known.reversed: truth for known, truth in given.items()})
        is_number = self.relation is (sympy.Eq if is_valid else sympy.Ne)
        return value.subs(data, number) if is_number else value


def computed(mask: fx.Node, index: Index) -> Iterator[Validity]:
    """Booleans read by a mask that are computed from lengths and may mark tokens or padding.

    `index` is (row, ..., position) of the mask.
    """
    at = {index[0]: ROW, index[-1]: POSITION}
    found: set[Any] = set()
    for node in sorted(ancestors([mask])):
        value = _condition(node, index)
        condition = None if value is None else value.xreplace(at)
        if condition is None or found & {condition, condition.negated}:
            continue
        found.add(condition)
        yield Validity(node, condition=condition)
        yield Validity(node, sympy.Eq, 0, condition)


def _condition(node: fx.Node, index: Index) -> Relational | None:
    """What a boolean [batch, 1, ..., length] says at a position, if that depends on one number per row."""
    val = node.meta.get("val")
    if node.op != "call_function" or not isinstance(val, torch.Tensor) or val.dtype is not torch.bool or val.dim() < 2:
        return None
    batch, *between, length = sizes_of(node)
    inputs = [source for source in _computed_from(node) if source.op == "placeholder"]
    if batch == 1 or length == 1 or any(size != 1 for size in between) or len(inputs) != 1:
        return None
    if not _is_one_a_row(inputs[0], batch):
        return None
    try:
        value = evaluate(node, (index[0], *[sympy.Integer(0)] * len(between), index[-1]), read_constants(node))
    except Opaque:  # cannot be compared with other conditions
        return None
    is_plain = isinstance(value, Relational) and bool(value.atoms(AppliedUndef))
    return value if is_plain and _has_small_factors(value) else None


def _is_one_a_row(given: fx.Node, batch: Any) -> bool:
    """Whether an input is one number per row, as lengths are."""
    dtype = given.meta["val"].dtype
    return sizes_of(given) in ([batch], [batch, 1]) and dtype is not torch.bool and not dtype.is_complex


def _has_small_factors(condition: Relational) -> bool:
    """Whether the integers in a condition stay small if its data is small."""
    slack = slack_of(condition)
    terms = [] if slack is None else [term for term in sympy.Add.make_args(slack) if term.atoms(AppliedUndef)]
    return all(term.as_coeff_Mul()[1].is_Function and abs(term.as_coeff_Mul()[0]) == 1 for term in terms)


def _computed_from(node: fx.Node) -> list[fx.Node]:
    """The nodes whose content determines a tensor's content, including itself, but not those that only give sizes."""
    return sorted(ancestors([node], _contents))


def _contents(node: fx.Node) -> list[fx.Node]:
    """The inputs whose content a node reads, not only their sizes."""
    if node.target is SIZE:
        return []
    position = SIZES_OF.get(node.target)
    like = None if position is None else node.args[position]
    # for other nodes, computing the sizes costs too much
    is_given = isinstance(like, fx.Node) and like.op == "placeholder"
    return [source for source in node.all_input_nodes if not (is_given and source is like)]


def _settled(value: Any, condition: Relational, holds: bool) -> Any:
    """Replaces all comparisons that are equivalent to `condition` or its negation by their truth."""
    known = {}
    for other in value.atoms(Relational):
        if _is_same(other, condition):
            known[other] = sympy.sympify(holds)
        elif _is_same(other, condition.negated):
            known[other] = sympy.sympify(not holds)
    return value.xreplace(known)


def _is_same(one: Relational, other: Relational) -> bool:
    if one in (other, other.reversed):
        return True
    slack, another = slack_of(one), slack_of(other)
    return slack is not None and another is not None and sympy.expand(slack - another) == 0
