"""`fxbt.OneOf`: several rules with one name, one stage and one count."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxbt
from fxbt.pipeline import default_rules

aten = torch.ops.aten


class Doubling(fxbt.Rule):
    """x + x -> 2 x"""

    name = "doubling"
    proven = True
    targets = frozenset({aten.add.Tensor})

    def find(self, anchor: fx.Node) -> fxbt.Match:
        first, second = anchor.args
        if first is not second:
            raise fxbt.Miss("two different tensors are added", node=anchor)
        return fxbt.Match(anchor, (first,), (anchor,))

    def replace(self, facts: None, x: Tensor) -> Tensor:
        return x * 2.0


class Squaring(Doubling):
    """x * x -> x^2"""

    name = "squaring"
    targets = frozenset({aten.mul.Tensor})

    def find(self, anchor: fx.Node) -> fxbt.Match:
        first, second = anchor.args
        if first is not second:
            raise fxbt.Miss("not a product of this kind", node=anchor, total=1)
        return fxbt.Match(anchor, (first,), (anchor,))

    def replace(self, facts: None, x: Tensor) -> Tensor:
        return x.square()


class Scaled(Squaring):
    """A sum is doubled anew: what one rule makes is offered to the others."""

    name = "scaled"

    def find(self, anchor: fx.Node) -> fxbt.Match:
        if anchor.args[1] != 2.0:
            raise fxbt.Miss("the factor is not 2", node=anchor)
        return fxbt.Match(anchor, (anchor.args[0],), (anchor,))

    def replace(self, facts: None, x: Tensor) -> Tensor:
        return F.relu(x) - F.relu(-x) + x


class Model(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.sin()
        return y + y, y * y, y * x


def test_each_place_gets_the_rule_that_matches_there() -> None:
    fast = fxbt.optimize(Model(), rules=[fxbt.OneOf("twice", Doubling(), Squaring())])
    for shape in ((3, 4), (5, 2)):
        x = torch.randn(*shape)
        torch.testing.assert_close(fast(x), Model()(x))
    assert fast.report.hits["twice"] == 2
    assert not fast.report.fallbacks


def test_what_one_makes_is_offered_to_the_others() -> None:
    fast = fxbt.optimize(Model(), rules=[fxbt.OneOf("twice", Doubling(), Scaled())])
    x = torch.randn(3, 4)
    torch.testing.assert_close(fast(x), Model()(x))
    targets = [node.target for node in fast.report.latest.module.graph.nodes]
    assert targets.count(aten.relu.default) == 2


def test_the_reason_is_of_the_first_rule_that_gives_one() -> None:
    rule = fxbt.OneOf("twice", Squaring(), Scaled())
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = graph.call_function(aten.mul.Tensor, (x, y))
    with pytest.raises(fxbt.Miss, match="the factor is not 2"):
        rule.find(product)


class OfAPattern(fxbt.Rule):
    name = "of_a_pattern"

    def pattern(self, op, x):  # type: ignore[no-untyped-def]
        return op.tanh(x)

    def replace(self, x: Tensor) -> Tensor:
        return x.tanh()


class Loose(Doubling):
    tolerance = 1e-2


@pytest.mark.parametrize("other", [OfAPattern, Loose])
def test_rules_that_cannot_be_one(other: type[fxbt.Rule]) -> None:
    with pytest.raises(fxbt.RuleError, match="twice"):
        fxbt.OneOf("twice", Doubling(), other())


def test_the_built_in_attention_is_several_rules() -> None:
    (attention,) = [rule for rule in default_rules() if rule.name == "attention"]
    assert isinstance(attention, fxbt.OneOf)
    assert len(attention.rules) == 4
