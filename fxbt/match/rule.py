"""What a rewrite rule is: a formula that it finds in the graph, and what to compute instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import fx

from ..errors import RuleError
from ..graph.blocks import FUSED
from ..graph.miss import Miss
from .found import Found
from .language import Expression, Op, term_of
from .matcher import Matcher
from .naming import is_float_cast, op_of
from .pointwise import ENDS
from .same_op import PERMUTATIONS, SHAPES
from .terms import (
    Call,
    Either,
    Formula,
    Maybe,
    NumberVariable,
    Pointwise,
    Product,
    Sum,
    Term,
    Variable,
    WeightVariable,
    children,
    walk,
)
from .trial import check_results

ENTRY_POINTS = "fxbt.rules"


@dataclass
class Match:
    """A place where a rule's meaning was found.

    `inputs` are the graph's values that `Rule.replace` receives as tensors; `outputs` the nodes its results stand
    for; `facts` is the rule's own description, handed to `replace` unchanged. `replaces=False` means: found, and
    already in its best form (counted, not rewritten). `assumes` names constants whose *content* the proof read:
    should one change, the graph is not used any more.

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
    """What `replace` of a pattern rule receives by name: which inputs, and what is no tensor."""

    tensors: tuple[str, ...]
    static: dict[str, Any]
    passes_casts: bool

    def named(self, tensors: Iterable[torch.Tensor]) -> dict[str, Any]:
        return {**self.static, **dict(zip(self.tensors, tensors, strict=True))}


class Rule:
    """A pattern and its replacement.

    `pattern` writes the formula over its parameters, with Python's operators, torch functions and `op`. `replace`
    says in plain torch what to compute instead; it takes the pattern's names: tensors for values and weights, floats
    for numbers, None for what was optional and absent. `check`, where it is defined, refuses matches with a reason.
    Rules hold no state: what `check` learns goes to `replace` through `m.bind`.

    What `replace` computes from weights alone (a merged, folded or packed weight) is derived: without gradients it is
    computed once, and again whenever a source changes; `state_dict` keeps the original names.

    Attributes:
        name: what `report.hits` counts under.
        makes: the blocks whose nodes it makes; rules with these in their pattern run after it.
        outline: a name in `fxbt.ops`, for rules that rewrite nothing but make the match one call node of that function;
            `fxbt.block` adds one.
        proven: the match alone proves the numbers. Otherwise each rewrite also runs, on the captured example, beside
            what it replaces, and is refused where a result differs by more than `tolerance`.
        tolerance: of the largest value; None for rounding (2e-5 in float32).

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

    A meaning that no formula can say (attention, whatever its layout) overrides `targets` and `find` instead; its
    `replace(self, facts, *inputs)` gets the `Match`'s own.
    """

    name: str = ""
    outline: str = ""
    proven: bool = False
    tolerance: float | None = None
    makes: frozenset[str] | set[str] = frozenset()
    targets: frozenset[Any] | set[Any] = frozenset()
    # Set by subclasses: annotations only, so that their own signatures are not checked against these.
    pattern: Callable[..., Any]
    replace: Callable[..., Any]

    def check(self, m: Found) -> None:
        """Refuses a match by `m.need(condition, reason)`; hands facts to `replace` by `m.bind(name=value)`."""

    @functools.cached_property
    def formula(self) -> Formula:
        """The pattern as terms.

        Raises:
            RuleError: the pattern is none; the message says why.
        """
        parameters = list(inspect.signature(self.pattern).parameters)
        return _formula(self, parameters[1:], Op())

    @functools.cached_property
    def _matcher(self) -> Matcher:
        return Matcher(self.formula, loose=bool(self.outline))

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The nodes at which `find` is tried: for patterns from the last to the first, so that the largest wins."""
        if self.targets:
            return (node for node in graph.nodes if node.op == "call_function" and node.target in self.targets)
        heads = _heads(self.formula.outputs[0])
        ops = ((node, op_of(node)) for node in reversed(graph.nodes))
        return (node for node, op in ops if op in heads or (op and ANY_OP in heads))

    def find(self, anchor: fx.Node) -> Match:
        """The match anchored at `anchor`.

        Raises:
            Miss: this is not the rule's meaning, or it cannot be proven; the reason goes into the report.
        """
        refusal: Miss | None = None
        matches = self._matcher.find(anchor)
        while True:
            try:
                found = next(matches)
                _check_precision(found)
                self._call_check(found, anchor)
                return self._match(found)
            except StopIteration:
                raise refusal or Miss("the pattern is not here", node=anchor, total=self.formula.size) from None
            except Miss as miss:
                if refusal is None or miss.matched > refusal.matched:
                    refusal = miss
                miss.matched, miss.total = miss.matched or self.formula.size, max(self.formula.size, miss.matched)

    def _call_check(self, found: Found, anchor: fx.Node) -> None:
        try:
            self.check(found)
        except Miss:
            raise
        except Exception as error:
            raise Miss(f"check raises {type(error).__name__}: {error}", node=anchor) from error

    def _match(self, found: Found) -> Match:
        tensors = {name: value for name, value in found.values.items() if isinstance(value, fx.Node)}
        static = {name: value for name, value in found.values.items() if name not in tensors}
        casts = any(is_float_cast(node) for node in found.interior)
        facts = Arguments(tuple(tensors), static, casts)
        return Match(found.outputs[0], tuple(tensors.values()), found.outputs, facts, replaces=not found.is_kept)

    def results(self, match: Match, tensors: tuple[torch.Tensor, ...]) -> Any:
        """What `replace` gives for a match, its inputs being `tensors`."""
        if not isinstance(match.facts, Arguments):
            return self.replace(match.facts, *tensors)
        wanted = inspect.signature(self.replace).parameters
        dtypes = [node.meta["val"].dtype for node in match.outputs]
        if match.facts.passes_casts:  # computed in the precision of the result, as the graph does at least
            tensors = tuple(_widened(tensor, dtypes[0]) for tensor in tensors)
        given = match.facts.named(tensors)
        results = self.replace(**{name: given[name] for name in wanted if name in given})
        if not match.facts.passes_casts:
            return results
        results = results if isinstance(results, tuple) else (results,)
        return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype` where that is a wider floating dtype."""
    is_float = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    return tensor.to(dtype) if is_float and torch.promote_types(tensor.dtype, dtype) == dtype else tensor


class _FunctionRule(Rule):
    """A rule of two plain torch functions."""

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
        pattern: its parameters are the variables; a variable stands for a tensor or, in a sum or product, a number.
        replacement: takes some or all of the same names.
        name: what `report.hits` counts under.
        where: a further condition on the match, as in `lambda m: m.w.dim() == 1`.

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
            raise RuleError(f"{_called(rule)}: the pattern gives {output}, expected a formula of at least one op")
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
                f"{_called(rule)}: the name {term.name!r} stands for a {type(first).__name__} and a "
                f"{type(term).__name__}; give each its own name"
            )


def _check_precision(found: Found) -> None:
    """What the pattern rounds on its way must not be coarser than what it gives: the replacement would not round."""
    result = found.outputs[0].meta["val"].dtype
    for node in found.interior:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
            continue
        wraps = value.dtype in NARROW and value.dtype is not result
        rounds = value.is_floating_point() and torch.promote_types(value.dtype, result) != value.dtype
        if wraps or rounds:
            raise Miss(f"computed in {value.dtype} on the way to {result}", node=node)


NARROW = {torch.int8, torch.uint8, torch.int16}  # sums in these overflow
ANY_OP = "any op"
GENERIC = {"normalize": {"layer_norm", "rms_norm"}, "activation": {ANY_OP}}
SUM_OPS = {"add", "sub", "rsub", "neg"}
PRODUCT_OPS = {"mul", "div", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "square", "mean", "norm"}


def _heads(term: Any) -> set[str]:
    """The ops that a match of the term can end with."""
    match term:
        case Pointwise():
            return set(ENDS)
        case Either():
            return set().union(*(_heads(option) for option in term.options))
        case Sum() | Product():
            wanted = [child for child in children(term) if not isinstance(child, Maybe)]
            left_alone = _heads(wanted[0]) if len(wanted) == 1 and len(children(term)) > 1 else set()
            return left_alone | (SUM_OPS if isinstance(term, Sum) else PRODUCT_OPS)
        case Call():
            if term.op in GENERIC:
                return GENERIC[term.op]
            family = next((names for names in (SHAPES, PERMUTATIONS) if term.op in names), {term.op})
            return set(family) | {"sum": {"mean", "norm"}, "matmul": {"linear"}}.get(term.op, set())
    return {"slice", "getitem"}


# --- registration -----------------------------------------------------------------------------------------------


def check_rules(rules: Iterable[Any], reserved: Iterable[str] = ()) -> tuple[Rule, ...]:
    """The rules as a tuple; `reserved` are names that are taken.

    Raises:
        TypeError: something in `rules` is no `Rule` instance.
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
            raise RuleError(f"{_called(given)}: the name is {taken[given.name]}'s already; choose another")
        taken[given.name] = f"another rule ({type(given).__name__})"
    return checked


def _check_type(given: Any) -> None:
    if isinstance(given, type) and issubclass(given, Rule):
        raise TypeError(f"fxbt.optimize: rules holds the class {given.__name__}; pass an instance: {given.__name__}()")
    if not isinstance(given, Rule):
        raise TypeError(f"fxbt.optimize: rules holds {given!r}, which is no fxbt.Rule; subclass fxbt.Rule")


def check_rule(given: Rule) -> None:
    """Raises RuleError for a rule that cannot work: no name, no pattern, unbound names, another shape or dtype."""
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
    if given.outline:
        return
    # What `check` binds is known only once it ran.
    binds_more = type(given).check not in (Rule.check, _FunctionRule.check)
    unbound = [name for name in _required(given.replace) if name not in bound]
    if unbound and not binds_more:
        raise RuleError(
            f"{_called(given)}: replace takes {unbound[0]!r}, which the pattern does not bind; it binds "
            f"{', '.join(sorted(bound))}"
        )
    if not binds_more:
        check_results(given.pattern, given.replace, isinstance(given, _FunctionRule), _called(given))


def _required(function: Callable[..., Any]) -> list[str]:
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(function).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in parameters.items() if p.default is p.empty and p.kind not in kinds]


def _called(given: Rule) -> str:
    return f"rule {given.name!r}"


def installed_rules() -> tuple[Rule, ...]:
    """The rules that installed packages ship: their entry points in the group "fxbt.rules", in order of their names.

    An entry point names a Rule subclass, an instance, or a sequence of either.

    Raises:
        RuleError: an entry point cannot be loaded or holds something else; the message names it.
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
