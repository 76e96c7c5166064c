"""The engine that runs rules: matches replaced, refusals with their reason, provenance, numeric verification."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import compare
from torch import Tensor, nn
from tracing import Function, captured, nodes

import fxbt
from fxbt import Match, Miss, Rule
from fxbt.graph.record import RULE
from fxbt.options import Options
from fxbt.pipeline import compile as compile_graph

aten = torch.ops.aten
X = torch.randn(3, 5)
CAPTURED = torch.ones(1)


def silu_by_hand(x):
    return x * torch.sigmoid(x)


class Silu(Rule):
    """x * sigmoid(x)  ->  silu(x)"""

    name = "silu_by_hand"
    targets = frozenset({aten.mul.Tensor})

    def find(self, anchor):
        x, gate = anchor.args
        if not isinstance(gate, torch.fx.Node) or gate.target is not aten.sigmoid.default or gate.args[0] is not x:
            raise Miss("not x * sigmoid(x)", node=anchor, expected="a sigmoid of the other factor")
        return Match(anchor, inputs=(x,), outputs=(anchor,))

    def replace(self, facts, x):
        return F.silu(x)


def compiled(function, rule, *tensors, verify=False, **weights):
    found = captured(function, *tensors, **weights)
    with torch.no_grad():
        return compile_graph(found, (rule,), Options(verify=verify, padding="keep"))


def variant(**methods):
    return type("Variant", (Silu,), methods)()


def test_a_match_is_replaced_with_provenance():
    result = compiled(lambda x: silu_by_hand(silu_by_hand(x) + 1), Silu(), X)
    assert result.hits == {"silu_by_hand": 2}
    assert not nodes(result.module, aten.sigmoid.default)
    silus = nodes(result.module, aten.silu.default)
    assert [node.meta[RULE] for node in silus] == ["silu_by_hand"] * 2
    torch.testing.assert_close(result.run(X)[0], silu_by_hand(silu_by_hand(X) + 1))


def test_a_miss_says_where_and_why():
    result = compiled(lambda x: x * torch.tanh(x), Silu(), X)
    (miss,) = result.misses
    assert (miss.rule, miss.reason) == ("silu_by_hand", "not x * sigmoid(x)")
    assert miss.expected == "a sigmoid of the other factor"
    assert "%mul" in miss.found and "f32[" in str(miss)


@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (lambda self, facts, x: F.silu(x)[:1], "another shape"),
        (lambda self, facts, x: F.silu(x).double(), "another shape, dtype"),
        (lambda self, facts, x: (F.silu(x), x), "returns 2 results for 1 outputs"),
        (lambda self, facts, x: F.silu(x) + CAPTURED, "uses a tensor from outside"),
        (lambda self, facts, x: x.silo(), "replace raises AttributeError"),
        (lambda self, facts, x: F.silu(x) if x.shape[0] > 7 else F.silu(x) * 1, "needs a shape guard"),
    ],
)
def test_replacements_that_do_not_fit_are_refused(replace, reason):
    result = compiled(silu_by_hand, variant(replace=replace), X)
    assert result.hits == {"silu_by_hand": 0}
    assert reason in result.refusals[0]
    assert torch.equal(result.run(X)[0], silu_by_hand(X))


def test_verification_refuses_wrong_numbers():
    wrong = variant(replace=lambda self, facts, x: F.silu(x) * 1.001)
    proven = variant(replace=lambda self, facts, x: F.silu(x) * 1.001, proven=True)
    assert compiled(silu_by_hand, proven, X).hits == {"silu_by_hand": 1}, "a rule that proves is taken at its word"
    result = compiled(silu_by_hand, proven, X, verify=True)
    assert result.hits == {"silu_by_hand": 0}
    result = compiled(silu_by_hand, wrong, X)
    assert result.hits == {"silu_by_hand": 0}
    assert "changes the values" in result.refusals[0] and "a difference of" in result.refusals[0]
    assert torch.equal(result.run(X)[0], silu_by_hand(X))


def test_verification_keeps_right_numbers_of_later_rewrites_too():
    result = compiled(lambda x: silu_by_hand(silu_by_hand(x)), Silu(), X, verify=True)
    assert (result.hits, result.refusals) == ({"silu_by_hand": 2}, [])


def test_verification_refuses_what_it_cannot_compare():
    random = variant(replace=lambda self, facts, x: F.dropout(F.silu(x), 0.5, training=True))
    result = compiled(silu_by_hand, random, X, verify=True)
    assert "draws random numbers" in result.refusals[0]


def test_a_used_interior_value_stays():
    result = compiled(lambda x: (x * (gate := torch.sigmoid(x)), gate), Silu(), X)
    outputs = result.run(X)
    torch.testing.assert_close(outputs, (silu_by_hand(X), torch.sigmoid(X)))


def test_an_input_after_the_first_output_is_refused():
    class Both(Silu):
        def find(self, anchor):
            first, second = nodes(anchor.graph.owning_module, aten.mul.Tensor)
            if anchor is second:
                raise Miss("one is enough")
            return Match(anchor, inputs=(first.args[0], second.args[1]), outputs=(first,))

        def replace(self, facts, x, gate):
            return F.silu(x)

    result = compiled(lambda x: silu_by_hand(x) * torch.sigmoid(x + 1), Both(), X)
    assert "computed after its first output" in result.refusals[0]


def test_user_rules_run_in_optimize():
    model = Function(silu_by_hand).eval()
    fast = fxbt.optimize(model, (X,), rules=[Silu()])
    assert fast.report.hits["silu_by_hand"] == 1
    torch.testing.assert_close(fast(X), model(X))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Silu], r"pass an instance: Silu\(\)"),
        ([print], "is not an fxbt.Rule"),
        (Silu(), r"write rules=\[MyRule\(\)\]"),
    ],
)
def test_things_that_are_no_rules_are_refused_at_once(rules, message):
    with pytest.raises(TypeError, match=message):
        fxbt.optimize(Function(silu_by_hand), rules=rules)


class Parts(nn.Module):
    """Attention within parts whose lengths are values: SDPA asks whether they are zero."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        parts = x.split(lengths.tolist(), dim=1)
        return torch.cat([(part @ part.mT / 2).softmax(-1) @ part for part in parts], 1)


def test_attention_over_lengths_that_are_values() -> None:
    model, x = Parts().eval(), torch.randn(2, 9, 4)
    with torch.no_grad():
        fast = fxbt.optimize(model, {"x": x, "lengths": torch.tensor([4, 5])}, padding="keep")
        for lengths in ([3, 6], [8, 1], [9, 0]):
            compare(fast(x, torch.tensor(lengths)), model(x, torch.tensor(lengths)))
    assert fast.report.hits["attention"] == 2, fast.report.why("attention")
    assert len(fast.report.graphs) == 1 and fast.report.fallbacks == []
