"""The pattern language: what each part of it matches, what it must not, and that a match always means equal numbers."""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from tracing import graph_of

import fxbt
from fxbt import pipeline
from fxbt.errors import RuleError
from fxbt.graph.canonical import canonicalize
from fxbt.graph.miss import Miss
from fxbt.match.found import State
from fxbt.match.once_matched import Notes, Remembered
from fxbt.match.readings import sum_cuts
from fxbt.testing import assert_rewrites, assert_untouched

X, Y, Z = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def traced(function: Callable[..., Any], *tensors: Tensor) -> fx.GraphModule:
    """`function` as a canonical graph."""
    module = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*tensors)
    canonicalize(module)
    return module


def matches(rule: fxbt.Rule, module: fx.GraphModule) -> list[fxbt.Match]:
    """The rule's match at each anchor that has one, the last first."""
    found = []
    for anchor in rule.anchors(module.graph.nodes):
        try:
            found.append(rule.find(anchor))
        except Miss:
            continue
    return found


class Pattern(fxbt.Rule):
    """A rule for a pattern that is written with `op`."""

    name = "pattern"

    def __init__(self, pattern: Callable[..., Any]):
        self.pattern = pattern

    def replace(self, **values: Any) -> Any:
        return tuple(values.values())


def bound(pattern: Callable[..., Any], function: Callable[..., Any], *tensors: Tensor) -> dict[str, Any] | None:
    """What the pattern's names stand for where it matches the value that `function` returns; None where it does not."""
    module = traced(function, *(tensors or (X, Y, Z)))
    (result,) = module.graph.output_node().args
    result = result[0] if isinstance(result, list | tuple) else result
    match = next((match for match in matches(Pattern(pattern), module) if match.anchor is result), None)
    return None if match is None else match.facts.named(match.inputs)


# --- sums and products ------------------------------------------------------------------------------------------

EQUAL = {
    "a sum in another order": (lambda op, x, y, z: op.tanh(x) + y + op.exp(z), lambda x, y, z: z.exp() + x.tanh() + y),
    "a sum grouped to the right": (
        lambda op, x, y, z: op.tanh(x) + y + op.exp(z),
        lambda x, y, z: x.tanh() + (y + z.exp()),
    ),
    "a product in another order": (lambda op, x, y: op.tanh(x) * y * op.exp(x), lambda x, y, z: x.exp() * y * x.tanh()),
    "a product grouped to the right": (
        lambda op, x, y: op.tanh(x) * y * op.exp(x),
        lambda x, y, z: y * (x.exp() * x.tanh()),
    ),
    "a subtraction": (lambda op, x, y: op.tanh(x) - op.exp(y), lambda x, y, z: -y.exp() + x.tanh()),
    "a subtraction from a number": (lambda op, x: 1 - op.tanh(x), lambda x, y, z: torch.rsub(x.tanh(), 1)),
    "alpha": (lambda op, x, y: op.tanh(x) - op.exp(y) * 2, lambda x, y, z: torch.sub(x.tanh(), y.exp(), alpha=2)),
    "a division": (lambda op, x, y: op.tanh(x) / op.exp(y), lambda x, y, z: y.exp().reciprocal() * x.tanh()),
    "a division by a number": (lambda op, x: op.tanh(x) * 0.125, lambda x, y, z: x.tanh() / 8),
    "a square": (lambda op, x: op.tanh(x) ** 2 * 3, lambda x, y, z: x.tanh() * 3 * x.tanh()),
    "a cube": (lambda op, x: op.pow(x, 3.0) * op.tanh(x), lambda x, y, z: x * x.tanh() * x * x),
    "an inverse root": (lambda op, x, y: y * op.rsqrt(op.exp(x)), lambda x, y, z: y / x.exp().sqrt()),
    "a negation": (lambda op, x, y: -(op.tanh(x) * y), lambda x, y, z: x.tanh() * -y),
    "a number to seven digits": (lambda op, x: op.tanh(x) * 0.7978845608, lambda x, y, z: x.tanh() * 0.79788456),
    "a mean": (lambda op, x: op.mean(op.exp(x), -1), lambda x, y, z: x.exp().sum(1) / 4),
    "a norm": (lambda op, x: op.norm(op.exp(x), 2, -1), lambda x, y, z: x.exp().square().sum(-1).sqrt()),
}
UNEQUAL = {
    "another number": (lambda op, x: op.tanh(x) * 0.7978, lambda x, y, z: x.tanh() * 0.79788456),
    "another sign": (lambda op, x, y: op.tanh(x) - op.exp(y), lambda x, y, z: x.tanh() + y.exp()),
    "another alpha": (lambda op, x, y: op.tanh(x) + op.exp(y), lambda x, y, z: torch.add(x.tanh(), y.exp(), alpha=2)),
    "one term more": (lambda op, x, y: op.tanh(x) + op.exp(y), lambda x, y, z: x.tanh() + y.exp() + 1),
    "the inverse": (lambda op, x, y: op.tanh(x) / op.exp(y), lambda x, y, z: y.exp() / x.tanh()),
    "the root of a square": (lambda op, x: op.tanh(x) * 3, lambda x, y, z: (x.tanh() ** 2) ** 0.5 * 3),
    "a root times itself": (lambda op, x: op.tanh(x) * 3, lambda x, y, z: x.tanh().sqrt() * 3 * x.tanh().sqrt()),
    "the root of a negation": (lambda op, x: op.sqrt(op.tanh(x)), lambda x, y, z: (-x.tanh()).sqrt()),
    "a ratio that is 1 but at 0": (lambda op, x: op.tanh(x) * 3, lambda x, y, z: x.tanh() * 3 * x.tanh() / x.tanh()),
    "two roots of negatives": (
        lambda op, x, y: op.sqrt(op.tanh(x)) * op.sqrt(op.tanh(y)),
        lambda x, y, z: (x.tanh() * y.tanh()).sqrt(),
    ),
    "a floor division": (
        lambda op, x, y: op.tanh(x) / op.exp(y),
        lambda x, y, z: torch.div(x.tanh(), y.exp(), rounding_mode="floor"),
    ),
    "a mean over another axis": (lambda op, x: op.mean(op.exp(x), -1), lambda x, y, z: x.exp().mean(0)),
    "a sum over another number": (lambda op, x: op.mean(op.exp(x), -1), lambda x, y, z: x.exp().sum(-1) / 3),
    "a product of means, scaled": (
        lambda op, x, y: op.mean(x, -1) * op.mean(x, -1) * op.exp(y),
        lambda x, y, z: x.mean(-1) * x.mean(-1) * 4 * y.exp().sum(-1),
    ),
}


@pytest.mark.parametrize("case", EQUAL)
def test_sums_and_products_match(case: str) -> None:
    assert bound(*EQUAL[case]) is not None


@pytest.mark.parametrize("case", UNEQUAL)
def test_sums_and_products_do_not_match(case: str) -> None:
    assert bound(*UNEQUAL[case]) is None


def test_a_sum_of_booleans_is_no_sum() -> None:
    names = lambda op, a, b, c: op.tanh(a + b + c)  # noqa: E731
    assert bound(names, lambda a, b, c: ((a + b) + c).tanh(), X, Y, Z) is not None
    assert bound(names, lambda a, b, c: ((a + b) + c).tanh(), X > 0, Y > 0, Z) is None


def test_narrow_integers_and_coarse_floats_on_the_way_are_refused() -> None:
    names = lambda op, a, b, c: op.tanh(a + b + c)  # noqa: E731
    assert bound(names, lambda a, b, c: ((a + b) + c).tanh(), X.to(torch.int8), Y.to(torch.int8), Z) is None
    assert bound(names, lambda a, b, c: ((a + b) + c).tanh(), X.half(), Y.half(), Z) is None
    assert bound(names, lambda a, b, c: ((a + b) + c).tanh(), X.half(), Y.half(), Z.bfloat16()) is None


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "relu": lambda x, y: F.relu(x) * y,
    "silu": lambda x, y: F.silu(x) * y,
    "gelu": lambda x, y: F.gelu(x, approximate="tanh") * y,
    "leaky_relu": lambda x, y: F.leaky_relu(x, 0.2) * y,
    "elu": lambda x, y: F.elu(x) * y,
    "relu6": lambda x, y: F.relu6(x) * y,
    "softplus": lambda x, y: F.softplus(x) * y,
    "softmax": lambda x, y: F.softmax(x, dim=-1) * y,
    "log_softmax": lambda x, y: F.log_softmax(x, -1) * y,
    "dropout": lambda x, y: F.dropout(torch.tanh(x), 0.1, False) * y,
    "linear": lambda x, y: F.linear(x, y).tanh(),
    "layer_norm": lambda x, y: F.layer_norm(x, (4,)) * y,
    "rms_norm": lambda x, y: F.rms_norm(x, (4,)) * y,
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y).tanh(),
    "comparisons": lambda x, y: torch.where(x > 0.5, x, y) * (y <= x),
    "masked_fill": lambda x, y: x.masked_fill(y < 0, -1.0).tanh(),
    "clamp": lambda x, y: x.clamp(0, 1) * y,
    "einsum": lambda x, y: torch.einsum("qd,kd->qk", x, y) * 2,
    "matmul": lambda x, y: (x @ y.T).tanh(),
    "variance": lambda x, y: x.var(-1, keepdim=True) * y,
    "biased variance": lambda x, y: torch.var(x, -1, unbiased=False, keepdim=True) * y,
    "largest": lambda x, y: x.amax(-1, keepdim=True) * y,
    "cat": lambda x, y: torch.cat([x, y], -1).tanh(),
    "a dim more": lambda x, y: x[..., None] * y.unsqueeze(-1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_functions_match_what_they_trace_to(name: str) -> None:
    function = FUNCTIONS[name]
    values = (X[None, None], Y[None, None]) if name == "attention" else (X, Y)
    assert bound(lambda op, x, y: function(x, y), lambda x, y: function(x, y), *values) is not None


def test_an_einsum_has_no_letters_of_its_own() -> None:
    pattern = lambda op, x, y: op.einsum("qd,kd->qk", x, y) * 2.0  # noqa: E731
    assert bound(pattern, lambda x, y, z: 2 * torch.einsum("ij,lj->il", x, y)) is not None
    assert bound(pattern, lambda x, y, z: 2 * torch.einsum("ij,lj->li", x, y)) is None


def test_the_functional_embedding_takes_its_weight_last() -> None:
    ids = torch.tensor([[0, 2], [1, 1]])
    names = bound(lambda op, i, w: F.embedding(i, w) * 2, lambda i, w: 2 * F.embedding(i, w), ids, X)
    assert names is not None and names["i"].meta["val"].dtype is torch.int64


# --- variables --------------------------------------------------------------------------------------------------


def test_numbers_and_weights() -> None:
    number = lambda op, x: op.tanh(x) * op.number("n", where=lambda n: n > 1)  # noqa: E731
    assert bound(number, lambda x, y, z: x.tanh() * 2.5)["n"] == 2.5  # type: ignore[index]
    assert bound(number, lambda x, y, z: x.tanh() * 0.5) is None
    assert bound(number, lambda x, y, z: x.tanh() * y) is None
    weight = Pattern(lambda op, x: op.tanh(x) @ op.weight("w", where=lambda w: w.dim() == 2))

    def hits(function: Callable[..., Any]) -> int:
        return len(matches(weight, graph_of(function, X, Y, matrix=torch.eye(4))))

    assert hits(lambda x, y, matrix: x.tanh() @ matrix) == 1
    assert hits(lambda x, y, matrix: x.tanh() @ (matrix * 2).exp()) == 1, "computed from weights alone"
    assert hits(lambda x, y, matrix: x.tanh() @ (matrix * y[0])) == 0
    assert hits(lambda x, y, matrix: x.tanh() @ matrix[0]) == 0


def test_a_product_with_a_weight_is_a_linear() -> None:
    plain = Pattern(lambda op, x: op.exp(x) @ op.weight("w"))
    transposed = Pattern(lambda op, x: op.exp(x) @ op.weight("w").T)
    biased = Pattern(lambda op, x: op.exp(x) @ op.weight("w").T + op.weight("b"))

    def hits(rule: fxbt.Rule, function: Callable[..., Any]) -> int:
        return len(matches(rule, graph_of(function, X, matrix=torch.rand(4, 4), vector=torch.rand(4))))

    assert hits(plain, lambda x, matrix, vector: x.exp() @ matrix) == 1
    assert hits(transposed, lambda x, matrix, vector: x.exp() @ matrix.t()) == 1
    assert hits(transposed, lambda x, matrix, vector: F.linear(x.exp(), matrix)) == 1
    assert hits(transposed, lambda x, matrix, vector: F.linear(x.exp(), matrix, vector)) == 0
    assert hits(biased, lambda x, matrix, vector: x.exp() @ matrix.t() + vector) == 1


def test_one_name_is_one_value() -> None:
    silu = lambda op, x: x * op.sigmoid(x)  # noqa: E731
    assert bound(silu, lambda x, y, z: x.sigmoid() * x) is not None
    assert bound(silu, lambda x, y, z: y.sigmoid() * x) is None
    assert bound(silu, lambda x, y, z: x * x.float().sigmoid().half(), X.half(), Y, Z) is not None, "widened"
    assert bound(silu, lambda x, y, z: x * x.half().float().sigmoid()) is None, "rounded on the way"
    twice = lambda op, x: op.tanh(x) * op.number("n") + op.number("n")  # noqa: E731
    assert bound(twice, lambda x, y, z: 3 * x.tanh() + 3) is not None
    assert bound(twice, lambda x, y, z: 3 * x.tanh() + 4) is None


def test_either() -> None:
    pattern = lambda op, x, y: op.either(op.tanh(x), op.exp(x)) * y  # noqa: E731
    assert bound(pattern, lambda x, y, z: x.tanh() * y) is not None
    assert bound(pattern, lambda x, y, z: y * x.exp()) is not None
    assert bound(lambda op, x: op.either(op.tanh(x), op.exp(x)) * 3.0, lambda x, y, z: 3.0 * x.sin()) is None


def test_maybe() -> None:
    factor = lambda op, x: op.tanh(x) * op.maybe(op.exp(op.any("w")))  # noqa: E731
    assert bound(factor, lambda x, y, z: y.exp() * x.tanh())["w"] is not None  # type: ignore[index]
    assert bound(factor, lambda x, y, z: x.tanh())["w"] is None  # type: ignore[index]
    addend = lambda op, x: op.tanh(x) - op.maybe(op.exp(op.any("b")))  # noqa: E731
    assert bound(addend, lambda x, y, z: x.tanh() - y.exp())["b"] is not None  # type: ignore[index]
    assert bound(addend, lambda x, y, z: x.tanh())["b"] is None  # type: ignore[index]
    assert bound(addend, lambda x, y, z: x.tanh() - 1) is None, "the absent addend is 0"
    argument = lambda op, x, w: op.linear(x, w, op.maybe(op.any("b")))  # noqa: E731
    assert bound(argument, lambda x, y, z: F.linear(x, y, z[:, 0]))["b"] is not None  # type: ignore[index]
    assert bound(argument, lambda x, y, z: F.linear(x, y))["b"] is None  # type: ignore[index]


# --- dims, slices, permutations ---------------------------------------------------------------------------------


def test_negative_axes_and_unwritten_sizes() -> None:
    assert bound(lambda op, x: op.softmax(x, -1), lambda x, y, z: x.softmax(1)) is not None
    assert bound(lambda op, x: op.softmax(x, -1), lambda x, y, z: x.softmax(0)) is None
    assert bound(lambda op, x: op.tanh(x.reshape(1)), lambda x, y, z: x.view(2, 6).tanh()) is not None
    assert bound(lambda op, x: op.layer_norm(x), lambda x, y, z: F.layer_norm(x, (4,))) is not None


def test_chunks_and_slices() -> None:
    half = lambda op, x: op.tanh(x.chunk(2, -1)[1])  # noqa: E731
    for spelling in (
        lambda x, y, z: x.chunk(2, 1)[1].tanh(),
        lambda x, y, z: x[:, 2:].tanh(),
        lambda x, y, z: x[..., -2:].tanh(),
        lambda x, y, z: x.split(2, -1)[1].tanh(),
        lambda x, y, z: x.split([2, 2], -1)[1].tanh(),
    ):
        assert bound(half, spelling) is not None
    assert bound(half, lambda x, y, z: x[:, :2].tanh()) is None
    assert bound(half, lambda x, y, z: x[:, 1:3].tanh()) is None
    first = lambda op, x: op.tanh(x.chunk(3, -1)[0])  # noqa: E731
    assert bound(first, lambda x, y, z: x[:, :1].tanh()) is None, "chunks of 4 are 2, 2"
    assert bound(first, lambda x, y, z: x[:, :2].tanh()) is not None
    odd = lambda op, x: op.tanh(x[..., 1::2])  # noqa: E731
    assert bound(odd, lambda x, y, z: x[:, 1::2].tanh()) is not None
    assert bound(odd, lambda x, y, z: x[:, ::2].tanh()) is None


@pytest.mark.parametrize(
    "spelling", [lambda x: x.transpose(0, 1), lambda x: x.permute(1, 0), lambda x: x.mT, lambda x: x.swapaxes(-1, 0)]
)
def test_permutations(spelling: Callable[[Any], Any]) -> None:
    assert bound(lambda op, x: op.tanh(x.transpose(-1, -2)), lambda x, y, z: spelling(x).tanh()) is not None
    assert bound(lambda op, x: op.tanh(spelling(x)), lambda x, y, z: x.t().tanh()) is not None
    assert bound(lambda op, x: op.tanh(x.transpose(1, 2)), lambda x, y, z: spelling(x).tanh()) is None


# --- outputs, interiors, order ----------------------------------------------------------------------------------


class SumAndDifference(fxbt.Rule):
    """tanh(x) + y, tanh(x) - y"""

    name = "butterfly"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        t = op.tanh(x)
        return t + op.exp(y), t - op.exp(y)

    def replace(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x.tanh() + y.exp()
        return total, total - 2 * y.exp()


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.eye(4) * 1.5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.function(x @ self.weight, y)


def butterfly(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.tanh() + y.exp(), x.tanh() - y.exp()


def butterfly_backwards(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    difference = x.tanh() - y.exp()
    return x.tanh() + y.exp(), difference


@pytest.mark.parametrize("function", [butterfly, butterfly_backwards])
def test_outputs_in_either_order(function: Callable[..., Any]) -> None:
    assert_rewrites(SumAndDifference(), Function(function).eval(), (X, Y), times=1)


def test_an_output_that_is_not_there() -> None:
    assert_untouched(SumAndDifference(), Function(lambda x, y: x.tanh() + y.exp()).eval(), (X, Y))


def test_two_candidates_for_one_output() -> None:
    def three(x: Tensor, y: Tensor) -> Any:
        return x.tanh() + y.exp(), x.tanh() - y.exp(), (y - 1) + y.exp()

    assert_untouched(
        SumAndDifference(), Function(three).eval(), (X, Y), reason="a value inside the pattern is used elsewhere too"
    )


def of_a_sum(op: Any, x: Any, y: Any) -> Any:
    total = op.exp(x) + y
    return op.tanh(total), total


@pytest.mark.parametrize("turned", [False, True])
def test_an_output_inside_another_is_the_value_found_there(turned: bool) -> None:
    pattern = Pattern((lambda op, x, y: of_a_sum(op, x, y)[::-1]) if turned else of_a_sum)
    module = traced(lambda x, y: (lambda total: (total.tanh(), total * 2, y * 2))(x.exp() + y), X, Y)
    (match,) = matches(pattern, module)
    outer, inner = match.outputs[::-1] if turned else match.outputs
    assert outer.args[0] is inner and pattern.formula.size == 3
    assert [node.name for node in match.inputs] == ["x_1", "y_1"]


def test_a_value_beside_it_is_no_output_that_stands_inside() -> None:
    module = traced(lambda x, y: (x.exp().tanh(), x.exp() + y), X, Y)
    assert not matches(Pattern(of_a_sum), module)


class Gate(fxbt.Rule):
    """x * tanh(x) + 1"""

    name = "gate"

    def pattern(self, op: Any, x: Any) -> Any:
        return x * op.tanh(x) + 1.0

    def replace(self, x: Tensor) -> Tensor:
        return torch.addcmul(torch.ones_like(x), x, x.tanh())


def test_an_interior_value_used_elsewhere_is_refused() -> None:
    def leaking(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        curve = x.tanh()
        return x * curve + 1, curve * y

    reason = "a value inside the pattern is used elsewhere too"
    assert_untouched(Gate(), Function(leaking).eval(), (X, Y), reason=reason)


def test_an_alias_written_to_between_is_another_value() -> None:
    def writing(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        curve = x.tanh()
        x.add_(y)
        return x * curve + 1

    assert_untouched(Gate(), Function(writing).eval(), (X, Y))


def test_overlapping_matches_are_the_same_on_every_run() -> None:
    rule = fxbt.rule(
        lambda x, y: torch.exp(x) + torch.exp(y), lambda x, y: torch.exp(torch.logaddexp(x, y)), name="log_add"
    )
    model = Function(lambda x, y: (x.exp() + y.exp()) + (x * 2).exp() + (y * 2).exp()).eval()
    texts = {str(assert_rewrites(rule, model, (X, Y)).after) for _ in range(3)}
    assert len(texts) == 1


def test_a_rule_that_loops_is_named_and_the_model_still_runs() -> None:
    rule = fxbt.rule(lambda x: torch.tanh(x), lambda x: torch.tanh(x) * 1.0 + 0.0, name="spinning")
    model = Function(lambda x, y: x.tanh() + y).eval()
    fast = fxbt.optimize(model, rules=[rule])
    with torch.no_grad(), pytest.warns(UserWarning, match="'spinning' does not stop"):
        torch.testing.assert_close(fast(X, Y), model(X, Y))
    assert "rule 'spinning' does not stop" in str(fast.report.fallbacks)


@pytest.mark.parametrize("place", ["check", "replace"])
def test_a_rule_that_raises_is_a_miss_that_says_so(place: str) -> None:
    def fail(*args: Any) -> Any:
        raise ValueError("no such thing")

    made = fxbt.rule(lambda x: torch.tanh(x) * 3, lambda x: 3 * torch.tanh(x), name="raising", where=fail)
    if place == "replace":
        made = fxbt.rule(
            lambda x: torch.tanh(x) * 3, lambda x: torch.tanh(x) * 3 if x.dim() == 3 else fail(), name="raising"
        )
    model = Function(lambda x, y: x.tanh() * 3 + y).eval()
    assert_untouched(made, model, (X, Y), reason=f"{place} raises ValueError: no such thing")


def test_a_wrong_replacement_is_refused_on_its_numbers() -> None:
    wrong = fxbt.rule(lambda x: torch.tanh(x) * 3, lambda x: torch.tanh(x) * 3.001, name="wrong")
    model = Function(lambda x, y: x.tanh() * 3 + y).eval()
    assert_untouched(wrong, model, (X, Y), reason="the rewrite changes the values")


# --- a match means equal numbers --------------------------------------------------------------------------------

LEAVES = st.sampled_from(["x", "y", "x", "y", "2.0", "-0.5", "3"])
UNARY = ["-{}", "({})**2", "({})**3", "({})**0.5", "({})**-1", "torch.tanh({})", "torch.sqrt({})", "torch.rsqrt({})"]
UNARY += ["({}).mean(-1, keepdim=True)", "({}).sum(-1, keepdim=True)"]
BINARY = ["({} + {})", "({} - {})", "({} * {})", "({} / {})"]


def _grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    one = st.tuples(st.sampled_from(UNARY), inner)
    two = st.tuples(st.sampled_from(BINARY), inner, inner)
    return one | two | two


TREES = st.recursive(LEAVES, _grow, max_leaves=6)


def text(tree: Any) -> str:
    return tree if isinstance(tree, str) else tree[0].format(*(f"({text(part)})" for part in tree[1:]))


def reordered(tree: Any, draw: Callable[..., Any]) -> Any:
    """An algebraically equal tree: operands swapped, sums and products regrouped."""
    if isinstance(tree, str):
        return tree
    head, *parts = tree
    parts = [reordered(part, draw) for part in parts]
    if head in ("({} + {})", "({} * {})") and draw(st.booleans()):
        parts = parts[::-1]
    if head in ("({} + {})", "({} * {})") and not isinstance(parts[1], str) and parts[1][0] == head:
        return (head, (head, parts[0], parts[1][1]), parts[1][2])
    return (head, *parts)


def mutated(tree: Any, draw: Callable[..., Any]) -> Any:
    """The tree with one op or leaf changed somewhere."""
    if isinstance(tree, str):
        return draw(LEAVES)
    head, *parts = tree
    place = draw(st.integers(0, len(parts)))
    if place == len(parts):
        return (draw(st.sampled_from(UNARY if len(parts) == 1 else BINARY)), *parts)
    parts[place] = mutated(parts[place], draw)
    return (head, *parts)


def function_of(tree: Any) -> Callable[..., Any]:
    return eval(f"lambda x, y: {text(tree)}", {"torch": torch})  # noqa: S307


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_match_means_equal_numbers(data: st.DataObject) -> None:
    tree = data.draw(TREES)
    other = (reordered if data.draw(st.booleans()) else mutated)(tree, data.draw)
    values = [torch.tensor([[-2.0, -0.7, 0.3, 1.1], [0.5, 3.0, -1.3, 0.9]]).double()]
    values.append(torch.tensor([[0.6, -1.7, 2.3, -0.1], [1.5, -0.4, -1.1, 0.8]]).double())
    try:
        rule = Pattern(lambda op, x, y: function_of(tree)(x, y))
        assert rule.formula
        module = traced(function_of(other), *values)
    except (RuleError, RuntimeError, TypeError, ArithmeticError, AttributeError):
        return  # no pattern, or no function of tensors
    run = fx.Interpreter(module, garbage_collect_values=False)
    run.run(*values)
    for match in matches(rule, module):
        named = match.facts.named([run.env[node] for node in match.inputs])
        actual = function_of(tree)(*(torch.as_tensor(named[name], dtype=torch.float64) for name in "xy"))
        expected = run.env[match.anchor]
        message = f"{text(tree)} matched in {text(other)} with {match.facts.static}, {match.inputs}"
        assert torch.allclose(
            torch.as_tensor(actual).double().expand_as(expected), expected, rtol=1e-6, atol=1e-9, equal_nan=True
        ), message


# --- blocks, order, weights, entry points -----------------------------------------------------------------------


class Blocks(fxbt.Rule):
    """A pattern of one block."""

    name = "block"
    outline = "mlp"

    def __init__(self, block: Callable[..., Any]):
        self._block = block

    def pattern(self, op: Any, x: Any) -> Any:
        return op.tanh(self._block(op, x))


@pytest.mark.parametrize(
    ("block", "after"),
    [
        (lambda op, x: op.exp(x), None),
        (lambda op, x: op.linear(x), None),
        (lambda op, x: op.layer_norm(x), "LayerNorm"),
        (lambda op, x: op.rms_norm(x), "RMSNorm"),
        (lambda op, x: op.attention(x), "Attention"),
        (lambda op, x: op.mlp(x), "MLP"),
    ],
    ids=["op", "linear", "layer_norm", "rms_norm", "attention", "mlp"],
)
def test_a_rule_runs_as_soon_as_its_blocks_are_there(block: Callable[..., Any], after: str | None) -> None:
    given_rule = Blocks(block)
    ordered = pipeline.in_order([given_rule])
    place = ordered.index(given_rule)
    assert (type(ordered[place - 1]).__name__ if place else None) == after


class ScaleIntoLinear(fxbt.Rule):
    """linear(x, w, b) * s  ->  linear(x, w * s, b * s)"""

    name = "fold_scale"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.linear(x, op.weight("w"), op.weight("b")) * op.weight("s")

    def replace(self, x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return F.linear(x, w * s[:, None], b * s)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.scale).tanh()


def test_derived_weights_follow_their_sources() -> None:
    model = Scaled().eval()
    assert_rewrites(ScaleIntoLinear(), model, (X,), times=1)
    fast = fxbt.optimize(model, rules=[ScaleIntoLinear()])
    assert list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        fast(X)
        torch.testing.assert_close(fast(X), model(X))
        model.scale.mul_(2)
        torch.testing.assert_close(fast(X), model(X))
        fast.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
        torch.testing.assert_close(fast(X), model(X))
    assert list(fast.report.graphs) and fast.report.hits["fold_scale"] == 1


def test_derived_weights_are_computed_anew_under_gradients() -> None:
    model = Scaled().eval()
    fast = fxbt.optimize(model, rules=[ScaleIntoLinear()])
    fast(X)
    wanted = torch.autograd.grad(model(X).square().sum(), list(model.parameters()))
    actual = torch.autograd.grad(fast(X).square().sum(), list(model.parameters()))
    assert fast.report.hits["fold_scale"] == 1
    torch.testing.assert_close(actual, wanted)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`shipped(source)` installs a distribution with the entry point `rules`, from a module of `source`."""

    def ship(source: str) -> None:
        info = tmp_path / "gates-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gates\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[fxbt.rules]\nmine = gates_of_a_test:rules\n")
        (tmp_path / "gates_of_a_test.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "gates_of_a_test", raising=False)
        importlib.invalidate_caches()

    return ship


def test_rules_of_installed_packages(shipped: Callable[[str], None]) -> None:
    shipped(
        "import fxbt, torch\nrules = [fxbt.rule(lambda x: torch.tanh(x) * 3, lambda x: 3 * x.tanh(), name='shipped')]\n"
    )
    assert "shipped" in [rule.name for rule in pipeline.in_order([])]


@pytest.mark.parametrize("source", ["import no_such_module\n", "rules = 3\n", "rules = object\n"])
def test_broken_rules_of_installed_packages_are_named(shipped: Callable[[str], None], source: str) -> None:
    shipped(source)
    with pytest.raises(RuleError, match="mine = gates_of_a_test:rules"):
        pipeline.in_order([])


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_a_long_sum_has_few_readings(limit: int) -> None:
    terms = [torch.randn(2, 3) for _ in range(40)]
    module = make_fx(lambda *terms: functools.reduce(operator.add, terms), tracing_mode="fake")(*terms)
    graph = module.graph
    total = next(node for node in reversed(graph.nodes) if node.op == "call_function")
    cuts = list(sum_cuts(total, limit))
    assert [len(cut.terms) for cut in cuts] == list(range(1, limit + 1))


def test_known_states_note_their_misses_again():
    notes, noted = Notes(), []

    def states():
        notes.do(lambda: noted.append("on the way"))
        yield State()
        notes.do(lambda: noted.append("in the end"))

    known = Remembered(State(), states())
    first, again = (list(known.states(notes)) for _ in range(2))
    assert len(first) == 1 and again[0] is first[0]
    assert noted == 2 * ["on the way", "in the end"]
