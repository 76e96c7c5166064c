"""A rewrite rule: a formula to find in the graph, and what to compute instead."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Reversible, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import fx

from ..analysis import axes
from ..analysis.operands import Operands
from ..errors import RuleError
from ..graph.blocks import FUSED
from ..graph.miss import Miss
from .by_axes import AxisMatcher
from .ends import ANY_OP, ends_of
from .found import Found
from .language import Expression, Op, term_of
from .matcher import Matcher
from .naming import is_float_cast, op_of
from .terms import (
    Formula,
    Maybe,
    NumberVariable,
    Term,
    Variable,
    WeightVariable,
    walk,
)
from .trial import check_results

ENTRY_POINTS = "fxbt.rules"
Layouts = tuple[axes.Axes, axes.Axes]  # of a tensor: as it is in the graph, and as `replace` gets it


@dataclass
class Match:
    """A place where a rule matches.

    `inputs` are the graph values that `Rule.replace` receives as tensors; its results replace `outputs`. `facts` is the
    rule's own description, passed to `replace` unchanged. `replaces=False` means that the match is already in its best
    form: it is counted, not rewritten. `assumes` names constants whose *content* the proof read: if one changes, the
    graph is no longer used.

    Example::

        return fxbt.Match(anchor, inputs=(x, gate), outputs=(anchor,), facts={"negated": True})
    """

    anchor: fx.Node
    inputs: tuple[fx.Node, ...] = ()
    outputs: tuple[fx.Node, ...] = ()
    facts: Any = None
    replaces: bool = True
    assumes: tuple[fx.Node, ...] = ()


@dataclass
class Arguments:
    """The arguments of a pattern rule's `replace` by name: tensors (a list has its length), and all other values."""

    tensors: dict[str, int | None]
    static: dict[str, Any]
    passes_casts: bool
    layouts: dict[str, Layouts]

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The tensors by name, each laid out as the pattern says."""
        given, sizes = iter(tensors), self._sizes(tensors)
        named: dict[str, Any] = {}
        for name, count in self.tensors.items():
            named[name] = next(given) if count is None else tuple(itertools.islice(given, count))
            if name in self.layouts:
                named[name] = axes.arrange(named[name], *self.layouts[name], sizes)
        return {**self.static, **named}

    def back(self, result: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The result in the layout that the graph has."""
        was, now = self.layouts[""]
        return axes.arrange(result, now, was, self._sizes(tensors))

    def _sizes(self, tensors: Sequence[torch.Tensor]) -> axes.Sizes:
        known = [self.layouts[name][0] if name in self.layouts else () for name in self.tensors]
        return axes.sizes_from(axes.size_table(known), tensors)


@dataclass
class ByAxes(Arguments):
    """The arguments if `check` asked for an `fxbt.Operands`, which `position` and `labels` describe."""

    position: dict[fx.Node, int]
    labels: list[axes.Axes]

    def named(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        return {**self.static, "operands": Operands(tensors, self.position, self.labels, _no_names)}


def _no_names(names: str) -> axes.Axes:
    raise RuleError(f"the axes {names!r} have no names yet; name them with operands.by(...)")


class Rule:
    """A pattern and its replacement.

    `pattern` writes the formula over its parameters, with Python operators, torch functions and `op`. `replace`
    computes the replacement in plain torch; its parameters are names of the pattern: tensors for values and weights,
    floats for numbers, None for optional parts that are absent. An optional `check` refuses matches, giving a reason.
    Rules hold no state: `check` passes what it learns to `replace` with `m.bind`.

    Anything `replace` computes from weights only (a merged, folded or packed weight) is a derived weight: without
    gradients it is computed once, and again when a source changes; `state_dict` keeps the original names.

    Attributes:
        name: the name in `report.hits`.
        makes: the blocks that the replacement creates; rules with these blocks in their pattern run later.
        outline: a name in `fxbt.ops`, for rules that rewrite nothing but turn the match into one call of that function;
            `fxbt.block` adds such a function.
        proven: the match alone proves that the values stay equal. Without it, each rewrite is also run on the captured
            example, beside what it replaces, and refused if a result differs by more than `tolerance`.
        tolerance: relative to the largest value; None means rounding (2e-5 in float32).

    Example::

        class TanhGelu(fxbt.Rule):
            \"\"\"0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))  ->  gelu(x, approximate="tanh")\"\"\"
            name = "tanh_gelu"

            def pattern(self, op, x):
                inner = (x + op.pow(x, 3.0) * 0.044715) * math.sqrt(2 / math.pi)
                return x * 0.5 * (op.tanh(inner) + 1.0)

            def replace(self, x):
                return F.gelu(x, approximate="tanh")

        fast = fxbt.optimize(model, rules=[TanhGelu()])

    For a meaning that no formula can express, override `targets` and `find` instead; `replace(self, facts, *inputs)`
    then gets the values of the `Match`.
    """

    name: str = ""
    outline: str = ""
    proven: bool = False
    tolerance: float | None = None
    makes: frozenset[str] | set[str] = frozenset()
    targets: frozenset[Any] | set[Any] = frozenset()
    # Subclasses set these. They are only annotations, so that type checkers accept any signature.
    pattern: Callable[..., Any]
    replace: Callable[..., Any]

    def check(self, m: Found) -> None:
        """Refuses a match with `m.need(condition, reason)`; passes facts to `replace` with `m.bind(name=value)`."""

    @functools.cached_property
    def formula(self) -> Formula:
        """The pattern as terms.

        Raises:
            RuleError: the function is not a valid pattern; the message says why.
        """
        parameters = list(inspect.signature(self.pattern).parameters)
        return _formula(self, parameters[1:], Op())

    @functools.cached_property
    def matcher(self) -> Matcher | AxisMatcher:
        """The matcher for this rule's formula."""
        return AxisMatcher(self.formula) if self.formula.has_axes else Matcher(self.formula, loose=bool(self.outline))

    @functools.cached_property
    def _ends(self) -> set[str]:
        return ends_of(self.formula.outputs[0])

    def can_end_at(self, node: fx.Node) -> bool:
        """Whether a node calls an op that the pattern's first output can end with."""
        op = op_of(node)
        return op in self._ends or (op != "" and ANY_OP in self._ends)

    def anchors(self, nodes: Reversible[fx.Node]) -> Iterator[fx.Node]:
        """Those of a graph's nodes at which `find` is tried.

        For patterns from the last to the first, so that the largest wins.
        """
        if self.targets:
            return (node for node in nodes if node.op == "call_function" and node.target in self.targets)
        if isinstance(self.matcher, AxisMatcher):
            return iter(self.matcher.anchors(nodes))
        return filter(self.can_end_at, reversed(nodes))

    def find(self, anchor: fx.Node) -> Match:
        """The match anchored at `anchor`.

        Raises:
            Miss: the rule does not match here, or the match cannot be proven; the reason goes into the report.
        """
        return self.first_of(self.matcher.find(anchor), anchor)

    def first_of(self, matches: Iterator[Found], anchor: fx.Node) -> Match:
        """The first match of the pattern at `anchor` that the rule's own conditions accept.

        Raises:
            Miss: there is none; the first reason among those that matched most ops.
        """
        refusal: Miss | None = None
        while True:
            try:
                found = next(matches)
                _check_precision(found)
                self._call_check(found, anchor)
                return self.match_of(found, anchor)
            except StopIteration:
                raise refusal or Miss("the pattern does not match here", node=anchor, total=self.formula.size) from None
            except Miss as miss:
                if refusal is None or miss.matched > refusal.matched:
                    refusal = miss
                # otherwise a reason says more than a count
                if isinstance(self.matcher, Matcher) and self.formula.size > 1:
                    miss.matched, miss.total = miss.matched or self.formula.size, max(self.formula.size, miss.matched)

    def _call_check(self, found: Found, anchor: fx.Node) -> None:
        try:
            self.check(found)
        except Miss:
            raise
        except Exception as error:
            raise Miss(f"check raises {type(error).__name__}: {error}", node=anchor) from error

    def match_of(self, found: Found, anchor: fx.Node) -> Match:
        """The match of what was found, with the values that `replace` takes.

        Raises:
            Miss: several products read the same weights, and the rule lays none of them out.
        """
        values = found.values
        if not self.outline:
            wanted = inspect.signature(self.replace).parameters
            takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
            values = {name: value for name, value in values.items() if takes_all or name in wanted}
        tensors = {name: value for name, value in values.items() if _is_of_nodes(value)}
        static = {name: value for name, value in values.items() if name not in tensors}
        casts = any(is_float_cast(node) for node in found.interior)
        counts = {name: None if isinstance(value, fx.Node) else len(value) for name, value in tensors.items()}
        inputs = [node for value in tensors.values() for node in ((value,) if isinstance(value, fx.Node) else value)]
        facts = Arguments(counts, static, casts, found.layouts)
        if found.laid_out:
            inputs, labels = list(found.laid_out), [axes.resolve(each) for each in found.laid_out.values()]
            facts = ByAxes({}, static, False, {}, {node: place for place, node in enumerate(inputs)}, labels)
        elif len(found.readings) > 1:
            raise Miss("several products read the same weights", node=anchor, expected="a rule that lays them out")
        keeps, assumes = found.is_kept, found.assumes
        return Match(anchor, tuple(inputs), found.outputs, facts, replaces=not keeps, assumes=assumes)

    def results(self, match: Match, tensors: tuple[torch.Tensor, ...]) -> Any:
        """The result of `replace` for a match whose inputs are `tensors`."""
        if not isinstance(match.facts, Arguments):
            return self.replace(match.facts, *tensors)
        wanted = inspect.signature(self.replace).parameters
        dtypes = [node.meta["val"].dtype for node in match.outputs]
        if match.facts.passes_casts:  # compute in the precision of the result; the graph computes in at least that
            tensors = tuple(_widened(tensor, dtypes[0]) for tensor in tensors)
        given = match.facts.named(tensors)
        results = self.replace(**{name: given[name] for name in wanted if name in given})
        if "" in match.facts.layouts:
            results = match.facts.back(results, tensors)
        if not match.facts.passes_casts:
            return results
        results = results if isinstance(results, tuple) else (results,)
        return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))


def _is_of_nodes(value: Any) -> bool:
    """Whether a value is a node, or a tuple or list of nodes."""
    items = value if isinstance(value, tuple | list) else (value,)
    return bool(items) and all(isinstance(item, fx.Node) for item in items)


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`, if that is a wider floating dtype."""
    is_float = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    return tensor.to(dtype) if is_float and torch.promote_types(tensor.dtype, dtype) == dtype else tensor


class _FunctionRule(Rule):
    """A rule made from two plain torch functions."""

    def __init__(self, pattern: Callable[..., Any], replacement: Callable[..., Any], name: str, where: Any):
        self.name = name
        self.pattern, self.replace, self._where = pattern, replacement, where

    @functools.cached_property
    def formula(self) -> Formula:
        return _formula(self, list(inspect.signature(self.pattern).parameters))

    def check(self, m: Found) -> None:
        m.need(self._where is None or self._where(m), "the rule's condition `where` does not hold")


def rule(
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    *,
    name: str,
    where: Callable[[Found], bool] | None = None,
) -> Rule:
    """A rule from two plain torch functions: where the graph computes `pattern`, compute `replacement` instead.

    Args:
        pattern: its parameters are the variables; each matches a tensor, or a number in a sum or product.
        replacement: takes some or all of the same names.
        name: the name in `report.hits`.
        where: a further condition on the match, such as `lambda m: m.w.dim() == 1`.

    Raises:
        RuleError: the pattern or its replacement cannot work.

    Example::

        rms_norm = fxbt.rule(
            lambda x, w, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w,
            lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
            name="my_rms_norm",
            where=lambda m: isinstance(m.eps, float),
        )
        fast = fxbt.optimize(model, rules=[rms_norm])
    """
    made = _FunctionRule(pattern, replacement, name, where)
    check_rule(made)
    return made


def _formula(rule: Rule, parameters: list[str], *op: Op) -> Formula:
    try:
        outputs = rule.pattern(*op, *(Expression(Variable(name)) for name in parameters))
    except Exception as error:
        raise RuleError(f"{_called(rule)}: {error}") from error
    given = outputs if isinstance(outputs, tuple) else (outputs,)
    terms = term_of(given)
    for output, term in zip(given, terms, strict=True):
        if not isinstance(term, Term) or isinstance(term, Variable | WeightVariable | NumberVariable | Maybe):
            raise RuleError(f"{_called(rule)}: the pattern returns {output}, expected a formula with at least one op")
    made = Formula(terms)
    unused = [name for name in parameters if name not in made.names]
    if unused:
        raise RuleError(
            f"{_called(rule)}: the pattern never uses its variable {unused[0]!r}; use it or remove the parameter"
        )
    _check_kinds(rule, terms)
    return made


def _check_kinds(rule: Rule, outputs: tuple[Term, ...]) -> None:
    kinds: dict[str, Any] = {}
    for term in (term for output in outputs for term in walk(output)):
        if not isinstance(term, Variable | WeightVariable | NumberVariable):
            continue
        first = kinds.setdefault(term.name, term)
        if first != term:
            raise RuleError(
                f"{_called(rule)}: the name {term.name!r} is used for a {type(first).__name__} and a "
                f"{type(term).__name__}; give each its own name"
            )


def _check_precision(found: Found) -> None:
    """Intermediate values must not be rounded more coarsely than the result: the replacement would not round them."""
    result = found.outputs[0].meta["val"].dtype
    for node in found.interior:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
            continue
        wraps = value.dtype in NARROW and value.dtype is not result
        rounds = value.is_floating_point() and torch.promote_types(value.dtype, result) != value.dtype
        if wraps or rounds:
            raise Miss(f"an intermediate value is in {value.dtype}, coarser than the result's {result}", node=node)


NARROW = {torch.int8, torch.uint8, torch.int16}  # sums in these overflow

# --- registration -----------------------------------------------------------------------------------------------


def check_rules(rules: Iterable[Any], reserved: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Checks rules and returns them as a tuple; `reserved` are names that are taken.

    Raises:
        TypeError: an item of `rules` is not a `Rule`.
        RuleError: a rule cannot work; the message names it and says why.
    """
    if isinstance(rules, Rule) or not isinstance(rules, Iterable):
        raise TypeError(f"fxbt.optimize: rules must be a sequence of rules, got {rules!r}; write rules=[MyRule()]")
    checked = tuple(rules)
    taken = dict.fromkeys(reserved, "a built-in rule")
    for given in checked:
        _check_type(given)
        check_rule(given)
        if given.name in taken:
            raise RuleError(f"{_called(given)}: the name already belongs to {taken[given.name]}; choose another")
        taken[given.name] = f"another rule ({type(given).__name__})"
    return checked


def _check_type(given: Any) -> None:
    if isinstance(given, type) and issubclass(given, Rule):
        raise TypeError(f"fxbt.optimize: rules holds the class {given.__name__}; pass an instance: {given.__name__}()")
    if not isinstance(given, Rule):
        raise TypeError(f"fxbt.optimize: rules holds {given!r}, which is not an fxbt.Rule; subclass fxbt.Rule")


def check_rule(given: Rule) -> None:
    """Raises RuleError for a rule that cannot work: no name, no pattern, unbound names, or results of another shape."""
    if not given.name:
        raise RuleError(f"{type(given).__name__} has no name; set name = '...' on the class")
    has_pattern, has_find = hasattr(given, "pattern"), type(given).find is not Rule.find
    if has_pattern == has_find:
        raise RuleError(f"{_called(given)}: define either pattern(self, op, ...) or targets and find(self, anchor)")
    if hasattr(given, "replace") == bool(given.outline):
        raise RuleError(
            f"{_called(given)}: define either replace(self, ...) or outline = '...', the name of a function of fxbt.ops"
        )
    if given.outline and given.outline not in FUSED:
        raise RuleError(
            f"{_called(given)}: outline is {given.outline!r}, expected one of fxbt.ops: {', '.join(FUSED)}; "
            "fxbt.block makes another"
        )
    if not has_pattern:
        return
    bound = given.formula.names
    _check_matcher(given)
    if given.outline:
        return
    # What `check` binds is known only after it has run.
    binds_more = type(given).check not in (Rule.check, _FunctionRule.check)
    unbound = [name for name in _required(given.replace) if name not in bound]
    if unbound and not binds_more:
        raise RuleError(
            f"{_called(given)}: replace takes {unbound[0]!r}, which the pattern does not bind; it binds "
            f"{', '.join(sorted(bound))}"
        )
    if not binds_more:
        check_results(given.pattern, given.replace, isinstance(given, _FunctionRule), _called(given))


def _check_matcher(given: Rule) -> None:
    try:
        made = given.matcher
    except RuleError as error:
        raise RuleError(f"{_called(given)}: {error}") from error
    if given.outline and isinstance(made, AxisMatcher):
        raise RuleError(f"{_called(given)}: an outline cannot follow named axes; define replace(self, ...)")


def _required(function: Callable[..., Any]) -> list[str]:
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in parameters.items() if p.default is p.empty and p.kind not in kinds]


def _called(given: Rule) -> str:
    return f"rule {given.name!r}"


def installed_rules() -> tuple[Rule, ...]:
    """The rules of installed packages: their entry points in the group "fxbt.rules", ordered by name.

    An entry point names a Rule subclass, an instance, or a sequence of either.

    Raises:
        RuleError: an entry point cannot be loaded, or contains something else; the message names it.
    """
    rules: list[Rule] = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        try:
            loaded = point.load()
            items = loaded if isinstance(loaded, list | tuple) else [loaded]
            rules += check_rules([item() if isinstance(item, type) else item for item in items])
        except Exception as error:
            raise RuleError(f"entry point {point.name} = {point.value} of {ENTRY_POINTS}: {error}") from error
    return check_rules(rules)
