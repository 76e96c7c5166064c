"""What forward reads and writes beside its model's attributes: graphs follow it, or leave the call to the original."""

from __future__ import annotations

import builtins
import collections
import contextvars
import cProfile
import dataclasses
import enum
import functools
import gc
import itertools
import os
import random
import sys
import threading
import time
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fxbt
from fxbt.capture.model_state import ModelState
from fxbt.capture.recording import Recording

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
exec("def by_globals(x):\n    return x * globals()['gain']", vars(MODULE))
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
    "a function's code": (
        lambda self, x: helper(self.linear(x)),
        set_attribute(helper, "__code__", other_helper.__code__),
    ),
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
    "globals()": (lambda self, x: MODULE.by_globals(self.linear(x)), set_attribute(MODULE, "gain", 3.0)),
    "a builtin, shadowed": (lambda self, x: self.linear(x) * abs(-2.0), set_attribute(HERE, "abs", lambda x: 3.0)),
    "a builtin, replaced": (
        lambda self, x: self.linear(x) * divmod(5, 2)[0],
        set_attribute(builtins, "divmod", lambda a, b: (7, 7)),
    ),
    "a function of torch": (lambda self, x: F.elu(self.linear(x)), set_attribute(F, "elu", lambda x: x * 3.0)),
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
        lambda self, x: self.linear(x) + torch.ones(4),
        lambda patch: torch.set_default_dtype(torch.float64),
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
    """Whether a graph that was there before serves this call, whose values are the original's."""
    graphs = list(fast._fxbt_dispatcher._graphs)
    before = sum(graph.served for graph in graphs)
    found = fast(*inputs)
    torch.testing.assert_close(found, fxbt.restore(fast)(*inputs), rtol=1e-5, atol=1e-6)
    return sum(graph.served for graph in graphs) > before


@pytest.mark.parametrize("name", READS)
def test_what_forward_reads_is_followed(name, patch):
    forward, change = READS[name]
    fast, x = fxbt.optimize(model_of(forward)), torch.randn(2, 4)
    fast(x)
    assert served(fast, x) and served(fast, torch.randn(3, 4)), fast.report.fallbacks
    old = fast(x)
    change(patch)
    assert not served(fast, x)
    new = fast(x)
    assert new.dtype is not old.dtype or not torch.equal(new, old)
    assert served(fast, x), fast.report.fallbacks
    assert len(fast.report.graphs) == 2


# Classes


def gain_of_class(self, x):
    return self.linear(x) * self.gain


CLASSES = {
    "an attribute of the class": (gain_of_class, set_attribute(Helped, "gain", 3.0)),
    "a property": (
        lambda self, x: self.linear(x) * self.scale,
        set_attribute(Helped, "scale", property(lambda _: 3.0)),
    ),
    "a static method": (
        lambda self, x: self.static(self.linear(x)),
        set_attribute(Helped, "static", staticmethod(lambda x: x * 3.0)),
    ),
    "a class method": (
        lambda self, x: self.of_class(self.linear(x)),
        set_attribute(Helped, "of_class", classmethod(lambda cls, x: x * 3.0)),
    ),
    "a method": (lambda self, x: self.method(self.linear(x)), set_attribute(Helped, "method", lambda self, x: x * 3.0)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_classes_have_is_followed(name, patch):
    forward, change = CLASSES[name]
    fast, x = fxbt.optimize(model_of(forward, Helped)), torch.randn(2, 4)
    fast(x)
    assert served(fast, x)
    old = fast(x)
    change(patch)
    assert not served(fast, x) and not torch.equal(fast(x), old)
    assert served(fast, x), fast.report.fallbacks


def test_an_attribute_added_to_a_class_in_between_shadows_the_bases_one():
    model = model_of(gain_of_class, type("Between", (Helped,), {"__module__": __name__}))
    fast, x = fxbt.optimize(model), torch.randn(2, 4)
    fast(x)
    assert served(fast, x)
    type(model).__mro__[1].gain = 5.0
    assert not served(fast, x) and served(fast, x)


def test_another_class_of_a_submodule_is_seen():
    class Louder(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    fast, x = fxbt.optimize(model_of(lambda self, x: self.linear(x))), torch.randn(2, 4)
    fast(x)
    assert served(fast, x)
    fast.linear.__class__ = Louder
    assert not served(fast, x) and served(fast, x)


def test_what_is_changed_back_meets_the_first_graph(patch):
    fast, x = fxbt.optimize(model_of(lambda self, x: self.linear(x) * NAME)), torch.randn(2, 4)
    for value in (2.0, 3.0):
        patch.setattr(HERE, "NAME", value)
        assert not served(fast, x) and served(fast, x)
    patch.setattr(HERE, "NAME", float("2"))  # another object of the same value
    assert served(fast, x) and len(fast.report.graphs) == 2


def test_a_failed_capture_is_tried_again_when_a_constant_changes(patch):
    fast = fxbt.optimize(model_of(lambda self, x: x if NAME == 2.0 and int(x.sum()) > 10**6 else self.linear(x)))
    x = torch.randn(2, 4)
    assert not served(fast, x) and not served(fast, x) and fast._fxbt_dispatcher._graphs.captures == 1
    patch.setattr(HERE, "NAME", 3.0)
    assert not served(fast, x) and served(fast, x)


def test_what_forward_does_not_read_may_change(patch):
    fast, x = fxbt.optimize(model_of(lambda self, x: self.linear(x) * NAME)), torch.randn(2, 4)
    fast(x)
    for step in range(5):
        patch.setattr(HERE, "x", step, raising=False)  # a global of the name of a local
        patch.setattr(HERE, "linear", step, raising=False)  # or of an attribute
        patch.setattr(HERE, "MODULE", step)
        assert served(fast, x)


# Writes

MAPS: list[Any] = []
COUNTS: dict[str, int] = {"calls": 0}
SEEN: set[Any] = set()
STEP = 0
LAST: Any = None


class Cached(Base):
    cache: dict[Any, Any] = {}
    calls = 0


def appends(self, x):
    MAPS.append(x)
    return self.linear(x)


def counts_in_a_dict(self, x):
    COUNTS["calls"] += 1
    return self.linear(x)


def counts_in_a_global(self, x):
    global STEP
    STEP += 1
    return self.linear(x)


def keeps_the_last(self, x):
    global LAST
    LAST = self.linear(x)
    return LAST


def counts_in_the_class(self, x):
    Cached.calls += 1
    return self.linear(x)


def counts_only_eagerly(self, x):
    if not torch.compiler.is_compiling():
        Cached.calls += 1
    return self.linear(x)


def grows_a_cache_of_the_class(self, x):
    self.cache[len(self.cache)] = x
    return self.linear(x)


def adds_to_a_set(self, x):
    SEEN.add(len(SEEN))
    return self.linear(x)


def make_counting():
    count = 0

    def counting(x):
        nonlocal count
        count += 1
        return x

    return counting, lambda: count


COUNTING, COUNT = make_counting()


def counts_in_a_closure(self, x):
    return COUNTING(self.linear(x))


def collecting(x, found=[]):  # noqa: B006
    found.append(x)
    return x


def collects_in_a_default(self, x):
    return collecting(self.linear(x))


def writes_to_a_tensor(self, x):
    TENSOR.add_(1.0)
    return self.linear(x)


def writes_to_an_attribute_of_a_module(self, x):
    MODULE.calls = getattr(MODULE, "calls", 0) + 1
    return self.linear(x)


WRITES: dict[Callable[..., Any], tuple[str, Callable[[], Any]]] = {
    appends: ("test_surroundings.MAPS", lambda: len(MAPS)),
    counts_in_a_dict: ("test_surroundings.COUNTS['calls']", lambda: COUNTS["calls"]),
    counts_in_a_global: ("test_surroundings.STEP", lambda: STEP),
    counts_in_the_class: ("Cached.calls", lambda: Cached.calls),
    counts_only_eagerly: ("Cached.calls", lambda: Cached.calls),
    grows_a_cache_of_the_class: ("Cached.cache[", lambda: len(Cached.cache)),
    adds_to_a_set: ("test_surroundings.SEEN", lambda: len(SEEN)),
    counts_in_a_closure: ("count of make_counting.<locals>.counting", COUNT),
    collects_in_a_default: ("a default of collecting", lambda: len(collecting.__defaults__[0])),  # type: ignore[index]
    writes_to_a_tensor: ("test_surroundings.TENSOR", lambda: float(TENSOR)),
    writes_to_an_attribute_of_a_module: ("module.calls", lambda: getattr(MODULE, "calls", 0)),
}


@pytest.mark.parametrize("forward", WRITES, ids=lambda forward: forward.__name__)
def test_what_forward_writes_is_written_once_a_call(forward, patch):
    place, measure = WRITES[forward]
    model = model_of(forward, Cached)
    fast, x = fxbt.optimize(model), torch.randn(2, 4)
    for i in range(4):
        before = measure()
        torch.testing.assert_close(fast(x), model.linear(x))
        assert measure() == before + 1, i
    assert not fast.report.graphs
    assert "forward writes to " in fast.report.fallbacks[0] and place in fast.report.fallbacks[0]
    assert not any(
        isinstance(value, FakeTensor) for value in (*MAPS, *Cached.cache.values(), *collecting.__defaults__[0])
    )


def test_a_value_kept_in_a_global_is_the_callers_own(patch):
    fast, x = fxbt.optimize(model_of(keeps_the_last)), torch.randn(2, 4)
    for _ in range(3):
        x = torch.randn(2, 4)
        assert fast(x) is LAST
    assert "test_surroundings.LAST" in fast.report.fallbacks[0]


def test_a_cache_that_the_first_call_fills_is_no_write(patch):
    table: dict[str, Any] = {}

    def forward(self, x):
        if "mask" not in table:
            table["mask"] = torch.full((4,), 2.0)
        return self.linear(x) * table["mask"]

    fast, x = fxbt.optimize(model_of(forward)), torch.randn(2, 4)
    assert not served(fast, x) and served(fast, x) and served(fast, torch.randn(3, 4)), fast.report.fallbacks
    table["mask"] = torch.full((4,), 3.0)
    assert not served(fast, x) and served(fast, x)


def test_a_cache_by_type_that_only_the_trace_adds_to_is_no_write(patch):
    """As einops keeps one of backends."""
    known: dict[type, float] = {}

    def forward(self, x):
        if type(x) not in known:
            known[type(x)] = 2.0
        return self.linear(x) * known[type(x)]

    fast, x = fxbt.optimize(model_of(forward)), torch.randn(2, 4)
    assert not served(fast, x) and served(fast, x), fast.report.fallbacks
    assert list(known) == [torch.Tensor]


def test_prints_warnings_logs_and_lru_caches_are_no_writes(capsys):
    @functools.lru_cache
    def doubled(value):
        return 2 * value

    def forward(self, x):
        print("called")
        warnings.warn("once", stacklevel=1)
        return self.linear(x) * doubled(2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast, x = fxbt.optimize(model_of(forward)), torch.randn(2, 4)
        assert not served(fast, x) and served(fast, x), fast.report.fallbacks
    assert "called" in capsys.readouterr().out


# What cannot be watched

COUNTER = itertools.count()
RANDOM = random.Random(0)


def values():
    while True:
        yield 2.0


GENERATOR = values()
GENERATOR_OF_NUMPY = np.random.default_rng(0)
UNWATCHABLE = {
    "a counter": (
        lambda self, x: self.linear(x) * next(COUNTER),
        "test_surroundings.COUNTER, a count, which changes with each use",
    ),
    "a generator": (
        lambda self, x: self.linear(x) * next(GENERATOR),
        "GENERATOR, a generator, which changes with each use",
    ),
    "the clock": (lambda self, x: self.linear(x) * time.time(), "forward uses time.time"),
    "random numbers": (lambda self, x: self.linear(x) * random.random(), "forward uses Random.random"),
    "random integers": (lambda self, x: self.linear(x) * random.randint(1, 9), "forward uses random.randint"),
    "random numbers of its own": (lambda self, x: self.linear(x) * RANDOM.random(), "forward uses Random.random"),
    "random numbers of numpy": (lambda self, x: self.linear(x) * float(np.random.rand()), "numpy's random numbers"),
    "a generator of numpy's": (lambda self, x: self.linear(x) * GENERATOR_OF_NUMPY.random(), "GENERATOR_OF_NUMPY"),
    "a large array": (lambda self, x: self.linear(x) * len(LARGE), "LARGE, a ndarray, which is too large"),
}
LARGE = np.zeros(1 << 17)


@pytest.mark.parametrize("name", UNWATCHABLE)
def test_what_cannot_be_watched_is_refused(name):
    forward, reason = UNWATCHABLE[name]
    fast, x = fxbt.optimize(model_of(forward)), torch.randn(2, 4)
    for _ in range(3):
        fast(x)
    assert not fast.report.graphs and fast._fxbt_dispatcher._graphs.captures == 1
    assert reason in fast.report.fallbacks[0]


# Hooks of other scopes

everywhere = torch.nn.modules.module


@pytest.mark.parametrize(
    "register",
    [
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_global_hooks_are_called_while_they_are_registered(register):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    fast, x = fxbt.optimize(model), torch.randn(2, 4)

    def calls(one):
        seen = []
        handle = register(lambda module, *_: seen.append(type(module).__name__))
        try:
            with torch.enable_grad():
                one(x).sum().backward()
        finally:
            handle.remove()
        return [name for name in seen if name != "Sequential"]

    with torch.enable_grad():
        fast(x), fast(x)
    assert calls(fast) == calls(model) and len(calls(fast)) == 3
    assert "global module hooks are registered" in fast.report.fallbacks[0]
    with torch.enable_grad():
        assert served(fast, x) and len(fast.report.graphs) == 1


# The profiler


def test_another_profiler_of_python_sees_the_call():
    seen = []
    fast, x = fxbt.optimize(model_of(lambda self, x: helper(self.linear(x)))), torch.randn(2, 4)

    def see(frame, event, argument):
        seen.append((frame.f_code.co_name, event))

    sys.setprofile(see)
    try:
        fast(x)
        assert sys.getprofile() is see
    finally:
        sys.setprofile(None)
    assert ("helper", "call") in seen and ("helper", "return") in seen
    assert served(fast, x)


def test_cprofile_goes_on_after_the_first_call():
    fast, x = fxbt.optimize(model_of(lambda self, x: helper(self.linear(x)))), torch.randn(2, 4)
    profile = cProfile.Profile()
    profile.enable()
    fast(x)
    assert sys.getprofile() is profile
    fast(x)
    profile.disable()
    assert sys.getprofile() is None and served(fast, x)


def test_a_model_that_raises_leaves_no_profiler_behind():
    fast = fxbt.optimize(model_of(lambda self, x: self.linear(x)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fast(torch.randn(2, 5))
    assert sys.getprofile() is None
    assert not served(fast, torch.randn(2, 4)) and served(fast, torch.randn(2, 4))


class Odd:
    @property
    def __dict__(self):
        raise RuntimeError("no dict")


def test_objects_that_cannot_be_looked_at_never_reach_the_caller():
    odd = Odd()
    fast, x = fxbt.optimize(model_of(lambda self, x: self.linear(x) if odd else x)), torch.randn(2, 4)
    for _ in range(2):
        torch.testing.assert_close(fast(x), fast.linear(x))
    assert "fxbt cannot find out what forward reads (RuntimeError: no dict)" in fast.report.fallbacks[0]


def test_what_ran_is_known():
    model, x = model_of(lambda self, x: helper(self.linear(x))), torch.randn(2, 4)
    with Recording(model, ModelState(model)) as recording:
        model(x)
    assert recording.ran(helper) and recording.ran(nn.Linear.forward) and recording.ran(F.linear) is False
    assert not recording.ran(other_helper)


def test_a_part_that_is_served_by_a_graph_is_looked_into_when_the_whole_is_captured(patch):
    part, x = fxbt.optimize(model_of(lambda self, x: self.linear(x) * NAME)), torch.randn(2, 4)
    part(x), part(x)
    whole = fxbt.optimize(nn.Sequential(part))
    whole(x)
    assert served(whole, x)
    patch.setattr(HERE, "NAME", 7.0)
    assert not served(whole, x) and served(whole, x)


def test_callbacks_of_the_garbage_collector_are_no_part_of_forward():
    """Hypothesis has one that reads the clock and adds up: it came in the middle of a forward, now and then."""
    seen = []

    def callback(phase, info):
        seen.append((phase, time.perf_counter()))

    gc.callbacks.append(callback)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with torch.no_grad():
            fast = fxbt.optimize(model)
            fast(torch.randn(2, 4))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert seen and not fast.report.fallbacks and len(fast.report.graphs) == 1


activations = types.ModuleType("activations")
activations.relu = torch.relu  # type: ignore[attr-defined]


class Computed(nn.Module):
    """Looks a function up under a name that stands nowhere in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.parts = nn.Linear(4, 4), ["re", "lu"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(activations, "".join(self.parts))(self.linear(x))


def test_a_function_that_is_looked_up_under_a_computed_name_is_watched(monkeypatch):
    model = Computed().eval()
    fast = fxbt.optimize(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
        assert len(fast.report.graphs) == 1 and not fast.report.fallbacks
        monkeypatch.setattr(activations, "relu", lambda x: x - 1)
        for _ in range(2):
            torch.testing.assert_close(fast(x), model.linear(x) - 1)


class Instances(OrderedDict):  # type: ignore[type-arg]
    """Gives out an instance of what it holds, as `ACT2FN` of transformers."""

    def __getitem__(self, name: str) -> nn.Module:
        return super().__getitem__(name)()


LIKE_ACT2FN = Instances(silu=nn.SiLU)


class Activated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LIKE_ACT2FN["silu"](x)


def test_a_dict_that_gives_out_others_is_watched_and_restored_by_what_it_holds() -> None:
    fast = fxbt.optimize(Activated().eval())
    for _ in range(3):
        x = torch.randn(3, 4)
        torch.testing.assert_close(fast(x), torch.nn.functional.silu(x))
    assert not fast.report.fallbacks and fast.report.latest is not None
    assert dict.get(LIKE_ACT2FN, "silu") is nn.SiLU
