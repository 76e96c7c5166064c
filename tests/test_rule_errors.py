"""Bad rules are clear errors where they are registered, before any model runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt
from fxbt.errors import RuleError


class Untouched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model ran")


def tanh(x: Any) -> Any:
    return torch.tanh(x) * 3


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[str]]] = {
    "unused variable": (lambda x, y: tanh(x), tanh, ["never uses", "'y'"]),
    "another shape": (tanh, lambda x: tanh(x).unsqueeze(0), ["same shape and dtype"]),
    "a reduced shape": (tanh, lambda x: tanh(x).sum(-1), ["same shape and dtype"]),
    "another dtype": (tanh, lambda x: tanh(x).double(), ["torch.float64", "same shape and dtype"]),
    "no tensor": (tanh, lambda x: 3.0, ["returns a float", "expected a tensor"]),
    "two results": (tanh, lambda x: (tanh(x), x), ["2 results", "1 outputs"]),
    "an unbound name": (tanh, lambda x, scale: tanh(x) * scale, ["takes 'scale'", "binds x"]),
    "a lone variable": (lambda x: x, lambda x: x, ["returns x", "at least one op"]),
    "nothing": (lambda x: None, lambda x: x, ["returns None", "at least one op"]),
    "an unknown op": (lambda x: x.frobnicate(), lambda x: x, ["'frobnicate'", "not an ATen op"]),
    "split by sizes": (lambda x: torch.cat(x.split(2, -1)), lambda x: x, ["split by sizes", "chunk"]),
    "unpacked shape": (lambda x: x.reshape(*x.shape), lambda x: x, ["unpack the shape"]),
    "a size as a number": (lambda x: torch.tanh(x) * x.shape[-1], tanh, ["size of x"]),
    "the size of another dim": (lambda x: torch.sum(x, -1) / x.shape[0], lambda x: x.mean(-1), ["size of x"]),
    "a variable exponent": (lambda x, y: torch.tanh(x) ** y, lambda x, y: x, ["exponent y"]),
    "a norm of another order": (lambda x: x.norm(1, -1), lambda x: x.sum(-1), ["norm of order 2"]),
    "a cast to integers": (lambda x: x.to(torch.int64) * 2, lambda x: x, ["torch.int64", "floating"]),
    "a branch on values": (
        lambda x: tanh(x) if x > 0 else x,
        tanh,
        ["cannot branch on the value of gt(x, 0)", "torch.where"],
    ),
    "a size in Python's math": (
        lambda x: torch.tanh(x) / math.sqrt(x.shape[-1]),
        tanh,
        ["has no value in a pattern", "op.number"],
    ),
    "an attribute as a value": (lambda x: x - x.max(-1).values, tanh, ["call the method"]),
    "one element": (lambda x: x[0].tanh(), tanh, ["x.select(dim, index)"]),
    "a composite function": (lambda x: torch.nn.functional.normalize(x), tanh, ["F.normalize", "write out"]),
    "a replacement that raises": (tanh, lambda x: tanh(x).no_such_method(), ["replace fails", "no_such_method"]),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_two_functions(case: str) -> None:
    pattern, replacement, words = FUNCTIONS[case]
    with pytest.raises(RuleError) as error:
        fxbt.rule(pattern, replacement, name="mine")
    assert all(word in str(error.value) for word in ["rule 'mine'", *words]), error.value


def made(**members: Any) -> fxbt.Rule:
    """A rule class of these members, instantiated."""
    defaults = {"name": "mine", "pattern": lambda self, op, x: op.tanh(x) * 3, "replace": lambda self, x: tanh(x)}
    kept = {name: member for name, member in {**defaults, **members}.items() if member is not None}
    return type("Mine", (fxbt.Rule,), kept)()


CLASSES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no name": ({"name": ""}, ["Mine has no name"]),
    "neither pattern nor find": ({"pattern": None}, ["define either pattern"]),
    "both pattern and find": ({"find": lambda self, anchor: None}, ["define either pattern"]),
    "neither replace nor outline": ({"replace": None}, ["define either replace", "outline"]),
    "both replace and outline": ({"outline": "mlp"}, ["define either replace", "outline"]),
    "an unknown outline": ({"replace": None, "outline": "nonsense"}, ["'nonsense'", "fxbt.ops"]),
    "a lone optional term": ({"pattern": lambda self, op, x: op.maybe(op.tanh(x))}, ["at least one op"]),
    "a lone number": ({"pattern": lambda self, op: op.number("n")}, ["at least one op"]),
    "one name for two kinds": (
        {"pattern": lambda self, op, x: op.tanh(x) * op.number("x")},
        ["'x'", "Variable", "NumberVariable"],
    ),
    "two conditions for one name": (
        {"pattern": lambda self, op, x: op.tanh(x * op.number("n", abs)) * op.number("n")},
        ["'n'"],
    ),
    "another dtype": ({"replace": lambda self, x: tanh(x).bfloat16()}, ["torch.bfloat16"]),
    "an unbound name": ({"replace": lambda self, x, w: tanh(x)}, ["takes 'w'"]),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes(case: str) -> None:
    members, words = CLASSES[case]
    with pytest.raises(RuleError) as error:
        fxbt.optimize(Untouched(), rules=[made(**members)])
    assert all(word in str(error.value) for word in words), error.value


def test_names_clash() -> None:
    with pytest.raises(RuleError, match="'mine'.*another rule"):
        fxbt.optimize(Untouched(), rules=[made(), made()])
    with pytest.raises(RuleError, match="'attention'.*built-in"):
        fxbt.optimize(Untouched(), rules=[made(name="attention")])


def test_what_is_no_rule() -> None:
    with pytest.raises(TypeError, match="pass an instance"):
        fxbt.optimize(Untouched(), rules=[type(made())])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="not an fxbt.Rule"):
        fxbt.optimize(Untouched(), rules=[tanh])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="sequence of rules"):
        fxbt.optimize(Untouched(), rules=made())  # type: ignore[arg-type]


def test_a_good_rule_is_none_of_these() -> None:
    fxbt.optimize(Untouched(), rules=[made(), fxbt.rule(tanh, lambda x: 3 * torch.tanh(x), name="other")])
