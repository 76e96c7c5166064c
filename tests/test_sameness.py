"""Equal layers share one trace of their replacement, and only they do."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxbt
from fxbt.analysis.axes import Atom
from fxbt.match.rule import Match
from fxbt.rewrite import splice
from fxbt.rewrite.trace_key import match_key

MODE = FakeTensorMode()


@dataclass
class Facts:
    value: Any
    other: Any = None


def match(facts: Any, shape: tuple[int, ...] = (2, 3), same_input: bool = False, **options: Any) -> Match:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    out = graph.call_function(torch.add, (x, y))
    with MODE:
        for node in (x, y, out):
            node.meta["val"] = torch.empty(shape, **options)
    facts = facts(x, y, out) if callable(facts) else facts
    return Match(out, inputs=(x, x if same_input else y), outputs=(out,), facts=facts)


def pair(first: Any, second: Any) -> list[Any]:
    return [first, second]


ATOM = Atom(3)
EQUAL = {
    "nothing": pair(None, None),
    "numbers": pair(Facts(0.5, [1, True]), Facts(0.5, [1, True])),
    "places": pair(lambda x, y, out: Facts({x: 0}, (y, out)), lambda x, y, out: Facts({x: 0}, (y, out))),
    "atoms": pair(Facts(ATOM, ATOM), Facts(*[Atom(3)] * 2)),
}
DIFFERENT = {
    "number": pair(Facts(0.5), Facts(0.25)),
    "type": pair(Facts(1), Facts(True)),
    "sign of zero": pair(Facts(0.0), Facts(-0.0)),
    "order": pair([1, 2], [2, 1]),
    "place": pair(lambda x, y, out: Facts(x), lambda x, y, out: Facts(y)),
    "which of two": pair(Facts(ATOM, ATOM), Facts(Atom(3), Atom(3))),
    "function": pair([F.relu], [F.silu]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_facts(name: str) -> None:
    first, second = (match_key(match(facts)) for facts in EQUAL[name])
    assert first is not None and first == second


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_facts(name: str) -> None:
    first, second = (match_key(match(facts)) for facts in DIFFERENT[name])
    assert first is not None and second is not None and first != second


@pytest.mark.parametrize(
    "change",
    [{"shape": (2, 4)}, {"dtype": torch.float16}, {"requires_grad": True}, {"same_input": True}],
    ids=lambda change: next(iter(change)),
)
def test_inputs_of_another_type(change: dict[str, Any]) -> None:
    assert match_key(match(None)) != match_key(match(None, **change))


@pytest.mark.parametrize(
    "facts",
    [{1, 2}, object(), functools.partial(max, 1), torch.ones(2), fx.Graph().placeholder("elsewhere")],
    ids=["set", "object", "partial", "tensor", "foreign node"],
)
def test_what_cannot_be_compared_is_traced_each_time(facts: Any) -> None:
    assert match_key(match([facts])) is None


class Silu(fxbt.Rule):
    name = "silu_by_hand"
    targets = frozenset({torch.ops.aten.mul.Tensor})

    def find(self, anchor: fx.Node) -> Match:
        gate: Any = anchor.args[1]
        return Match(anchor, inputs=(gate.args[0],), outputs=(anchor,))

    def replace(self, facts: None, x: Tensor) -> Tensor:
        return F.silu(x)


class Layers(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(4):
            x = x * torch.sigmoid(x)
        return x.sum(-1) + (y * torch.sigmoid(y)).sum(-1)


def test_layers_are_traced_once_and_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    trace = splice._trace
    monkeypatch.setattr(splice, "_trace", lambda rule, match: traced.append(match) or trace(rule, match))
    model, x, y = Layers(), torch.randn(2, 3), torch.randn(2, 5)
    with torch.no_grad():
        fast = fxbt.optimize(model, (x, y), rules=[Silu()])
        assert torch.allclose(fast(x, y), model(x, y), atol=1e-6)
    assert fast.report.hits["silu_by_hand"] == 5
    assert len(traced) == 2, "one for the shape of x, one for that of y"
