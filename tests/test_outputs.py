"""What comes out of a forward and goes in: plain objects, new at every call, and images of other sizes."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

import fxbt
from fxbt.capture import outputs


class Memory:
    """What a decoder returns beside its output."""

    def __init__(self, *states: Tensor):
        self.layers = [Layer(state) for state in states]
        self.kind = Layer
        self.filled = True


class Layer:
    """Nested, with a number that follows from a shape."""

    def __init__(self, state: Tensor):
        self.state = state
        self.dtype = state.dtype
        self.length = state.shape[1]


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {"y": y, "memory": Memory(y.relu(), y + 1)}


class Keeping(Remembering):
    """Returns the same object at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()

    def forward(self, x: Tensor) -> Any:
        return self.linear(x), self.memory


class Twice(Remembering):
    """Returns one object in two places."""

    def forward(self, x: Tensor) -> Any:
        memory = Memory(self.linear(x))
        return memory, memory


class Callback:
    def __call__(self) -> None:
        raise NotImplementedError


class Calling(Remembering):
    """Returns something that is more than data."""

    def forward(self, x: Tensor) -> Any:
        return self.linear(x), Callback()


def test_an_object_made_in_the_forward_is_made_anew_at_every_call() -> None:
    model = Remembering()
    fast: Any = fxbt.optimize(model, example_inputs=(torch.randn(2, 7, 4),))
    for length in (7, 12):
        x = torch.randn(3, length, 4)
        actual, expected = fast(x), model(x)
        assert type(actual["memory"]) is Memory
        assert actual["memory"].kind is Layer and actual["memory"].filled is True
        for got, want in zip(actual["memory"].layers, expected["memory"].layers, strict=True):
            assert type(got) is Layer and got.length == length and got.dtype == want.dtype
            torch.testing.assert_close(got.state, want.state)
        assert fast(x)["memory"] is not actual["memory"]
    assert fast.report.fallbacks == []
    assert len(fast.report.graphs) == 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Keeping(), "Memory that the model keeps"), (Twice(), "holds a Memory"), (Calling(), "holds a Callback")],
    ids=["kept", "in two places", "callable"],
)
def test_other_objects_run_the_original(model: nn.Module, reason: str) -> None:
    x = torch.randn(2, 7, 4)
    with pytest.warns(fxbt.FxbtWarning, match="original forward"):
        fast: Any = fxbt.optimize(model, example_inputs=(x,))
    assert reason in fast.report.fallbacks[0]
    assert type(fast(x)[1]) is type(model(x)[1])


def test_flattening_is_pytrees_own_where_there_are_no_objects() -> None:
    result = {"a": torch.ones(1), "b": [torch.zeros(2), (None, 3)]}
    leaves, spec = outputs.flatten(result)
    assert (leaves, spec) == torch.utils._pytree.tree_flatten(result)


@dataclass
class States(ModelOutput):
    states: Tensor | None = None
    pooled: Tensor | None = None
    layers: tuple[Tensor, ...] | None = None


@dataclass
class Counted(ModelOutput):
    """Its own class adds to it what follows from the values."""

    states: Tensor | None = None
    pooled: Tensor | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.length = len(self.states)


@dataclass(init=False)
class Rounded(ModelOutput):
    states: Tensor | None = None
    pooled: Tensor | None = None

    def __init__(self, states: Tensor, pooled: Tensor | None = None):
        self.states, self.pooled = states.round(), pooled


def _assert_same_record(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for parts in (OrderedDict.items, vars):
        assert str(list(dict(parts(found)).items())) == str(list(dict(parts(expected)).items()))


@pytest.mark.parametrize(
    "example",
    [
        States(torch.ones(2)),
        States(torch.ones(2), layers=(torch.ones(3), torch.zeros(4))),
        States(pooled=torch.ones(2)),
        Counted(torch.ones(2), torch.ones(3)),
        Rounded(torch.ones(2), torch.ones(3)),
        {"states": torch.ones(2)},
        (torch.ones(2), None),
    ],
    ids=["one value", "nested", "not the first field", "more than its base", "another init", "dict", "tuple"],
)
def test_results_are_rebuilt_as_pytree_does(example: Any) -> None:
    values, spec = pytree.tree_flatten(example)
    rebuild = outputs.Rebuild(spec)
    for size in (2, 5, 7):
        values = [torch.rand(size) if isinstance(value, Tensor) else value for value in values]
        found, expected = rebuild(values), pytree.tree_unflatten(values, spec)
        if not isinstance(example, ModelOutput):
            assert str(found) == str(expected)
            continue
        _assert_same_record(found, expected)
        _assert_same_record(pickle.loads(pickle.dumps(found)), expected)
        assert str(found.to_tuple()) == str(expected.to_tuple())


def test_rebuilding_keeps_no_results() -> None:
    values, spec = pytree.tree_flatten(States(torch.ones(2), torch.ones(3)))
    rebuild = outputs.Rebuild(spec)
    dead = weakref.ref(rebuild(values)["states"])
    del values
    gc.collect()
    assert dead() is None
    one, other = rebuild([torch.ones(2), torch.ones(3)]), rebuild([torch.zeros(2), torch.zeros(3)])
    one["extra"] = 1
    assert list(other) == ["states", "pooled"] and list(vars(other)) == ["states", "pooled", "layers"]


def test_the_second_image_size_makes_the_size_free() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for size in (8, 12, 16, 9):
            x = torch.randn(2, 3, size, size)
            torch.testing.assert_close(fast(x), model(x))
    assert len(fast.report.graphs) == 2 and fast.report.fallbacks == []
