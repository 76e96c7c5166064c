"""What forward reads and writes beside its model's attributes: graphs follow it, or leave the call to the original."""

from __future__ import annotations

import builtins
import collections
import contextvars
import cProfile
import dataclasses
import enum
import functools
import itertools
import os
import random
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fxbt
from fxbt.recording import Recording
from fxbt.state import ModelState

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@dataclasses.dataclass
class Settings:
    gain: float = 2.0
    steps: list[float] = dataclasses.field(default_factory=lambda: [2.0, 3.0])


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 2.0


class Meta(type):
    gain = 2.0


class Configured(metaclass=Meta):
    pass


class Mode(enum.Enum):
    LOUD = 2.0


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Held:
    settings = Settings()


def helper(x, gain=2.0, *, table=None):
    return x * gain * (table or [1.0])[0]


def other_helper(x, gain=2.0, *, table=None):
    return x * gain * 5.0


def make_scaled(gain):
    def scaled(x):
        return x * gain

    def turn(value):
        nonlocal gain
        gain = value

    return scaled, turn


NAME = 2.0
LIST = [2.0]
DICT = {"gain": 2.0, "inner": {"gain": 2.0}}
DEQUE = collections.deque([2.0])
ARRAY = np.array([2.0])
TENSOR = torch.tensor([2.0])
SETTINGS = Settings()
SLOTTED = Slotted()
ACTIVATIONS = {"act": lambda x: x.relu()}
PARTIAL = functools.partial(helper, gain=2.0)
SCALED, TURN = make_scaled(2.0)
CONTEXT = contextvars.ContextVar("gain", default=2.0)
LOCAL = threading.local()
LOCAL.gain = 2.0
MODULE = types.ModuleType("test_surroundings_module")
MODULE.gain = 2.0  # type: ignore[attr-defined]
MODULE.sub = types.ModuleType("test_surroundings_module.sub")  # type: ignore[attr-defined]
MODULE.sub.gain = 2.0
OUTSIDE = nn.Linear(4, 4)


def default_list(x, table=[2.0]):  # noqa: B006
    return x * table[0]


class Helped(Base):
    gain = 2.0

    @property
    def scale(self):
        return 2.0

    @staticmethod
    def static(x):
        return x * 2.0

    @classmethod
    def of_class(cls, x):
        return x * cls.gain

    def method(self, x):
        return x + 1.0


def set_attribute(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value, raising=False)


def set_item(owner: Any, key: Any, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def change(patch: pytest.MonkeyPatch) -> None:
        owner[key] = value

    return change


HERE = sys.modules[__name__]
F_softmax = F.softmax
# What forward computes with x (batch, 4), and what is changed after the capture: name -> (forward, change).
READS: dict[str, tuple[Callable[..., Any], Callable[[pytest.MonkeyPatch], Any]]] = {
    "a number of the module": (lambda self, x: self.linear(x) * NAME, set_attribute(HERE, "NAME", 3.0)),
    "an element of a list": (lambda self, x: self.linear(x) * LIST[0], set_item(LIST, 0, 3.0)),
    "an item of a dict": (lambda self, x: self.linear(x) * DICT["gain"], set_item(DICT, "gain", 3.0)),
    "an item of an inner dict": (
        lambda self, x: self.linear(x) * DICT["inner"]["gain"],
        lambda patch: DICT["inner"].update(gain=3.0),
    ),
    "an element of a deque": (lambda self, x: self.linear(x) * DEQUE[0], set_item(DEQUE, 0, 3.0)),
    "an array": (lambda self, x: self.linear(x) * float(ARRAY[0]), set_item(ARRAY, 0, 3.0)),
    "a tensor": (lambda self, x: self.linear(x) * TENSOR, lambda patch: TENSOR.mul_(2.0)),
    "a tensor through data": (lambda self, x: self.linear(x) * TENSOR, lambda patch: TENSOR.data.numpy().fill(7.0)),
    "a dataclass": (lambda self, x: self.linear(x) * SETTINGS.gain, set_attribute(SETTINGS, "gain", 3.0)),
    "a list of a dataclass": (lambda self, x: self.linear(x) * SETTINGS.steps[1], set_item(SETTINGS.steps, 1, 9.0)),
    "a slot": (lambda self, x: self.linear(x) * SLOTTED.gain, set_attribute(SLOTTED, "gain", 3.0)),
    "a metaclass": (lambda self, x: self.linear(x) * Configured.gain, set_attribute(Meta, "gain", 3.0)),
    "what a class has shadows its metaclass": (
        lambda self, x: self.linear(x) * Configured.gain,
        set_attribute(Configured, "gain", 4.0),
    ),
    "an object held by a class": (
        lambda self, x: self.linear(x) * Held.settings.gain,
        set_attribute(Held.settings, "gain", 5.0),
    ),
    "a default": (lambda self, x: helper(self.linear(x)), set_attribute(helper, "__defaults__", (3.0,))),
    "a keyword default": (lambda self, x: helper(self.linear(x)), set_item(helper.__kwdefaults__, "table", [4.0])),
    "a default that is a list": (
        lambda self, x: default_list(self.linear(x)),
        set_item(default_list.__defaults__[0], 0, 4.0),  # type: ignore[index]
    ),
    "a function's code": (lambda self, x: helper(self.linear(x)), set_attribute(helper, "__code__", other_helper.__code__)),
    "a function": (lambda self, x: helper(self.linear(x)), set_attribute(HERE, "helper", other_helper)),
    "an activation": (lambda self, x: ACTIVATIONS["act"](self.linear(x)), set_item(ACTIVATIONS, "act", torch.sigmoid)),
    "keywords of a partial": (lambda self, x: PARTIAL(self.linear(x)), set_item(PARTIAL.keywords, "gain", 3.0)),
    "a closure": (lambda self, x: SCALED(self.linear(x)), lambda patch: TURN(3.0)),
    "a context variable": (lambda self, x: self.linear(x) * CONTEXT.get(), lambda patch: CONTEXT.set(3.0)),
    "an object of the thread": (lambda self, x: self.linear(x) * LOCAL.gain, set_attribute(LOCAL, "gain", 3.0)),
    "the environment": (
        lambda self, x: self.linear(x) * float(os.environ.get("FXBT_TEST_GAIN", "2")),
        lambda patch: patch.setenv("FXBT_TEST_GAIN", "3"),
    ),
    "the environment through getenv": (
        lambda self, x: self.linear(x) * float(os.getenv("FXBT_TEST_GAIN", "2")),
        lambda patch: patch.setenv("FXBT_TEST_GAIN", "3"),
    ),
    "another module": (lambda self, x: self.linear(x) * MODULE.gain, set_attribute(MODULE, "gain", 3.0)),
    "a module of a module": (lambda self, x: self.linear(x) * MODULE.sub.gain, set_attribute(MODULE.sub, "gain", 3.0)),
    "getattr of a module": (
        lambda self, x: self.linear(x) * getattr(MODULE, "gain", 1.0),
        set_attribute(MODULE, "gain", 6.0),
    ),
    "globals()": (lambda self, x: self.linear(x) * globals()["NAME"], set_attribute(HERE, "NAME", 3.0)),
    "a builtin, shadowed": (lambda self, x: self.linear(x) * abs(-2.0), set_attribute(HERE, "abs", lambda x: 3.0)),
    "a builtin, replaced": (
        lambda self, x: self.linear(x) * divmod(5, 2)[0],
        set_attribute(builtins, "divmod", lambda a, b: (7, 7)),
    ),
    "a function of torch": (
        lambda self, x: F.softmax(self.linear(x), -1),
        set_attribute(F, "softmax", lambda x, dim: 2 * F_softmax(x, dim)),
    ),
    "torch's own module": (
        lambda self, x: self.linear(x),
        set_attribute(nn.Linear, "forward", lambda self, x: x * 3.0),
    ),
    "torch's own function inside its module": (
        lambda self, x: self.linear(x),
        set_attribute(F, "linear", lambda x, weight, bias: x * 4.0),
    ),
    "a method of tensors": (
        lambda self, x: self.linear(x).relu(),
        set_attribute(torch.Tensor, "relu", lambda self: self * 3.0),
    ),
    "the default dtype": (
        lambda self, x: (self.linear(x) + torch.ones(4)).double(),
        lambda patch: (patch.setattr(HERE, "NAME", 2.0), torch.set_default_dtype(torch.float64)),
    ),
    "weights outside the model": (
        lambda self, x: OUTSIDE(self.linear(x)),
        lambda patch: OUTSIDE.weight.data.mul_(3.0),
    ),
    "other weights outside the model": (
        lambda self, x: OUTSIDE(self.linear(x)),
        lambda patch: patch.setattr(OUTSIDE, "bias", nn.Parameter(torch.randn(4))),
    ),
    "an enum": (lambda self, x: self.linear(x) * Mode.LOUD.value, lambda patch: setattr(Mode.LOUD, "_value_", 3.0)),
}


def restored(patch: pytest.MonkeyPatch) -> None:
    """The module's constants, as they stand at its top."""
    for name, value in (("gain", 2.0), ("inner", {"gain": 2.0})):
        DICT[name] = value
    LIST[0] = DEQUE[0] = ARRAY[0] = TENSOR[0] = PARTIAL.keywords["gain"] = 2.0
    SETTINGS.steps[1], helper.__kwdefaults__["table"], default_list.__defaults__[0][0] = 3.0, None, 2.0
    ACTIVATIONS["act"], Mode.LOUD._value_ = torch.relu, 2.0
    TURN(2.0)
    CONTEXT.set(2.0)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def patch(monkeypatch):
    restored(monkeypatch)
    yield monkeypatch
    monkeypatch.undo()
    restored(monkeypatch)


def model_of(forward: Callable[..., Any], base: type = Base) -> nn.Module:
    return type("Model", (base,), {"forward": forward, "__module__": __name__})().eval()


def served(fast: Any, *inputs: torch.Tensor) -> bool:
    """Whether a graph serves this call, whose values are the original's."""
    before = sum(graph.served for graphs in fast._fxbt_dispatcher._graphs.values() for graph in graphs)
    found = fast(*inputs)
    torch.testing.assert_close(found, fxbt.restore(fast)(*inputs), rtol=1e-5, atol=1e-6)
    return sum(graph.served for graphs in fast._fxbt_dispatcher._graphs.values() for graph in graphs) > before


@pytest.mark.parametrize("name", READS)
def test_what_forward_reads_is_followed(name, patch):
    forward, change = READS[name]
    fast, x = fxbt.optimize(model_of(forward)), torch.randn(2, 4)
    fast(x)
    assert served(fast, x) and served(fast, torch.randn(3, 4)), fast.report.fallbacks
    old = fast(x)
    change(patch)
    assert not served(fast, x)
    assert not torch.equal(fast(x).float(), old.float())
    assert served(fast, x), fast.report.fallbacks
    assert len(fast.report.graphs) == 2
