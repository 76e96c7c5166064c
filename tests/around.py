"""Small modules that do something a graph does not carry: autograd of their own, hooks, globals, wrappers, odd tensors.

Each case is a function under `@around(...)` that returns a module, or a `Case` with how it is called and what changes
before the third call. `played` calls it three times and notes what can be seen; test_around.py compares that.
"""

from __future__ import annotations

import array
import collections
import contextlib
import contextvars
import copy
import dataclasses
import functools
import io
import logging
import os
import pickle
import random
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fxbt

THIS = sys.modules[__name__]
WIDTH, HEADS = 16, 2
SIZES = ((2, 5), (3, 4), (2, 7))  # batch and length of the three calls

GRAPH = "a graph serves it"
SILENT = "the original runs, and README says so once for all such calls"
Expected = str | tuple[str, ...]  # words of which one stands in the reason, if a graph does not serve it

LOG: list[Any] = []  # what the Python of cases does beside tensors; empty at the start of each call
GAIN = 1.0
COUNT = 0
TABLE = {"gain": 1.0, "act": torch.relu}
SETTINGS = types.SimpleNamespace(gain=1.0)
CONTEXT = contextvars.ContextVar("CONTEXT", default=1.0)


class Attention(nn.Module):
    """Attention as most models write it: two matrix products and a softmax."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        # No bias for keys: the softmax does not see it, so that its gradient is rounding alone.
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=i != 1) for i in range(4))
        self.heads = heads

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """What most cases start from: an attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Attention()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.first(x))


class Draw:
    """Makes the inputs of one call: the same numbers each time, with gradients in training."""

    def __init__(self, step: int, training: bool) -> None:
        self.step, self.training = step, training
        self.made: list[Tensor] = []
        self._generator = torch.Generator().manual_seed(step)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.randn(*shape, generator=self._generator).to(dtype)
        if self.training:
            tensor.requires_grad_()
        self.made.append(tensor)
        return tensor

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self(*SIZES[self.step], WIDTH, dtype=dtype)


def one_input(draw: Draw) -> tuple[Any, ...]:
    return (draw.x(),)


def plain_call(net: nn.Module, *args: Any) -> Any:
    return net(*args)


@dataclass
class Case:
    """A module, how it is called, and what happens before the third call.

    `start` and `world` get an ExitStack that takes their changes of the world back; `change` gets the module (the
    optimised one, or its eager copy) and may return another one to go on with.
    """

    model: nn.Module
    inputs: Callable[[Draw], tuple[Any, ...]] = one_input
    call: Callable[..., Any] = plain_call
    start: Callable[[contextlib.ExitStack], Any] | None = None
    world: Callable[[contextlib.ExitStack], Any] | None = None
    change: Callable[[Any], Any] | None = None
    before: Callable[[Any], Any] | None = None  # the first call, after optimize
    inplace: bool = False
    tolerance: float = 1e-4
    graphs: int = 2
    attention: bool = True  # whether a graph is to find it
    copies: bool = True  # whether a deep copy of the module is like it: one of TorchScript's loses its gradients


@dataclass
class Seen:
    """What one call did, as far as anyone can see it."""

    error: type[BaseException] | None = None
    result: Any = None
    inputs: list[Any] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)
    log: list[Any] = field(default_factory=list)
    random: list[Any] = field(default_factory=list)  # what the generators would give next
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Entry:
    name: str
    make: Callable[[], Case]
    infer: Expected | None
    train: Expected | None


CASES: list[Entry] = []


def around(infer: Expected | None = GRAPH, train: Expected | None = GRAPH) -> Callable[..., Any]:
    """Registers a case and what is expected of it at inference and in training (None: not asked)."""

    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> Case:
            result = make()
            return result if isinstance(result, Case) else Case(result)

        CASES.append(Entry(make.__name__, made, infer, train))
        return make

    return register


def played(case: Case, net: Any, training: bool) -> tuple[list[Seen], Any]:
    """What three calls do, and the module that was called last."""
    seen = []
    with contextlib.ExitStack() as stack:
        if case.start is not None:
            case.start(stack)
        net.train(training)
        if case.before is not None:
            net = _after(case.before, net)
        for step in range(len(SIZES)):
            if step == len(SIZES) - 1:
                net = _changed(case, net, stack)
            seen.append(_one_call(case, net, Draw(step, training)))
    return seen, net


def _changed(case: Case, net: Any, stack: contextlib.ExitStack) -> Any:
    if case.world is not None:
        case.world(stack)
    return net if case.change is None else _after(case.change, net)


def _after(change: Callable[[Any], Any], net: Any) -> Any:
    """What a change returns, if that is another whole model: calls in a row return all kinds of things.

    A submodule that an optimised model hands out shares the `__dict__` of the one among its modules.
    """
    changed = change(net)
    is_part = isinstance(changed, nn.Module) and any(vars(changed) is vars(module) for module in net.modules())
    return changed if isinstance(changed, nn.Module) and not is_part else net


def _one_call(case: Case, net: Any, draw: Draw) -> Seen:
    seen = Seen()
    args = case.inputs(draw)
    net.zero_grad()
    LOG.clear()
    torch.manual_seed(draw.step)
    random.seed(draw.step)
    np.random.seed(draw.step)
    with torch.set_grad_enabled(draw.training), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            result = case.call(net, *args)
            seen.result = noted(result, draw.made)
            if draw.training:
                _backward(result)
        except Exception as error:
            seen.error = type(error)
    seen.log = [*LOG, *(str(w.message) for w in warned if str(w.message).startswith("around: "))]
    seen.random = [torch.rand(1), random.random(), float(np.random.rand())]
    seen.inputs = [(t.detach().clone(), t.requires_grad, t.grad) for t in draw.made]
    seen.gradients = {name: p.grad for name, p in net.named_parameters()}
    seen.state = _state(net)
    return seen


def _state(net: nn.Module) -> dict[str, Any]:
    """Parameters, buffers and plain attributes of all modules."""
    plain = {
        f"{path}.{key}": value
        for path, module in net.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and key != "training" and not key.startswith("_")
    }
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {**plain, **{name: tensor.detach().clone() for name, tensor in tensors.items()}}


def _backward(result: Any) -> None:
    floats = [t for t in tensors_of(result) if t.requires_grad]
    if floats:
        sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype)).sum().real for t in floats).backward()


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for item in _items(value).values():
        yield from tensors_of(item)


def _items(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {}


def noted(value: Any, inputs: list[Tensor]) -> Any:
    """A result as it is now: tensors copied; which of them are one object, or an input, or share an input's memory."""
    order = {id(tensor): i for i, tensor in enumerate(inputs)}

    def note(value: Any) -> Any:
        if isinstance(value, Tensor):
            same = order.setdefault(id(value), len(order))
            shared = [i for i, tensor in enumerate(inputs) if _memory(tensor) == _memory(value) is not None]
            return type(value).__name__, value.requires_grad, same, shared, value.detach().clone()
        items = _items(value)
        kind = type(value).__qualname__
        return (kind, {key: note(item) for key, item in items.items()}) if items else (kind, value)

    return note(value)


def _memory(tensor: Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() or None if tensor.layout is torch.strided else None


def difference(new: Any, old: Any, tolerance: float, place: str = "") -> str | None:
    """Where and how two notes differ; None if they do not."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return _tensor_difference(new, old, tolerance, place)
    if type(new) is not type(old):
        return f"{place} is {_short(new)}, not {_short(old)}"
    if isinstance(new, Seen):
        new, old = vars(new), vars(old)
    if isinstance(new, dict):
        if list(new) != list(old):
            return f"{place} has {list(new)}, not {list(old)}"
        pairs = [(key, new[key], old[key]) for key in new]
    elif isinstance(new, (list, tuple)):
        if len(new) != len(old):
            return f"{place} has {len(new)} items, not {len(old)}"
        pairs = [(i, *pair) for i, pair in enumerate(zip(new, old, strict=True))]
    else:
        return None if _equal(new, old) else f"{place} is {_short(new)}, not {_short(old)}"
    return next((d for key, a, b in pairs if (d := difference(a, b, tolerance, f"{place}.{key}"))), None)


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:80]


def _equal(new: Any, old: Any) -> bool:
    return bool(np.all(new == old)) or (type(new).__eq__ is object.__eq__ and type(new) is type(old))


def _tensor_difference(new: Tensor, old: Tensor, tolerance: float, place: str) -> str | None:
    if new.is_nested and old.is_nested:  # their sizes are no one shape
        new, old = new.to_padded_tensor(0.0), old.to_padded_tensor(0.0)
    kinds = [(t.dtype, tuple(t.shape), t.device, t.layout) for t in (new, old)]
    if kinds[0] != kinds[1]:
        return f"{place} is {kinds[0]}, not {kinds[1]}"
    if old.is_meta:
        return None
    if old.layout is not torch.strided:
        new, old = new.to_dense(), old.to_dense()
    if old.is_quantized:
        new, old = new.dequantize(), old.dequantize()
    largest = float(old.abs().max()) if old.numel() else 0.0
    if torch.allclose(new, old, rtol=tolerance, atol=tolerance * max(largest, 1e-2), equal_nan=True):
        return None
    return f"{place} is off by {float((new - old).abs().max()):.2g} at a size of {largest:.2g}"


# Autograd that is not the ops' own ----------------------------------------------------------------------------------

FUNCTION = ("Function", "autograd", "backward")


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Tell(torch.autograd.Function):
    """Tells the log, at inference too."""

    @staticmethod
    def forward(ctx, x):
        LOG.append(tuple(x.shape))
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        LOG.append("backward")
        return gradient * 2


@around(GRAPH, FUNCTION)
def gradient_reversal():
    class Model(Net):
        def forward(self, x):
            return self.last(Reverse.apply(self.first(x)))

    return Model()


@around(GRAPH, FUNCTION)
def straight_through_function():
    class Model(Net):
        def forward(self, x):
            return self.last(Round.apply(self.first(x) * 3))

    return Model()


@around(("log", "Function", "Tell", "append", "write"), ("Function", "autograd", "log", "append", "write"))
def function_with_side_effects():
    class Model(Net):
        def forward(self, x):
            return self.last(Tell.apply(self.first(x)))

    return Model()


@around(GRAPH, ("Function", "autograd", "detach"))
def straight_through_detach():
    class Model(Net):
        def forward(self, x):
            y = self.first(x) * 3
            return self.last(y + (y.round() - y).detach())

    return Model()


@around((GRAPH, "cannot be captured"), (GRAPH, "cannot be captured", "data"))
def data_of_a_value():
    class Model(Net):
        def forward(self, x):
            y = self.first(x)
            return self.last(y * y.data.sigmoid())

    return Model()


@around(GRAPH, "hook")
def hook_scales_a_gradient():
    class Model(Net):
        def forward(self, x):
            y = self.first(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: gradient * 0.1)
            return self.last(y)

    return Model()


@around(GRAPH, ("hook", "log"))
def hook_writes_a_log():
    class Model(Net):
        def forward(self, x):
            y = self.first(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: LOG.append(tuple(gradient.shape)))
            return self.last(y)

    return Model()


@around(GRAPH, ("hook", "grad_fn"))
def hook_on_a_node_of_autograd():
    class Model(Net):
        def forward(self, x):
            y = self.first(x)
            if y.grad_fn is not None:
                y.grad_fn.register_prehook(lambda gradients: (gradients[0] * 0.5,))
            return self.last(y)

    return Model()


@around(None, ("retain", "attribute", "hook"))
def retained_gradient_of_an_inner_value():
    class Model(Net):
        def forward(self, x):
            self.kept = self.first(x)
            self.kept.retain_grad()
            return self.last(self.kept)

    def call(net, x):
        y = net(x)
        y.square().sum().backward(retain_graph=True)
        return y, net.kept.grad

    return Case(Model(), call=call)


def checkpointed(**options):
    class Model(Net):
        def forward(self, x):
            return self.last(checkpoint(self.first, x, **options))

    return Model


@around(GRAPH, ("checkpoint",))
def checkpoint_inside():
    return checkpointed(use_reentrant=False)()


@around(GRAPH, ("checkpoint", "Function"))
def reentrant_checkpoint_inside():
    return checkpointed(use_reentrant=True)()


@around(GRAPH, GRAPH)
def checkpoint_around_the_model():
    return Case(Net(), call=lambda net, x: checkpoint(net, x, use_reentrant=False))


@around(GRAPH, GRAPH)
def reentrant_checkpoint_around_the_model():
    return Case(Net(), call=lambda net, x: checkpoint(net, x, use_reentrant=True), graphs=3)


@around(GRAPH, ("saved",))
def saved_tensors_hooks_inside():
    class Model(Net):
        def forward(self, x):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2):
                return self.last(self.first(x))

    return Model()


@around(GRAPH, GRAPH)
def saved_tensors_hooks_around_the_model():
    """How many tensors are saved is the graph's own affair; that they go to the disk and come back is not."""

    def call(net, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
            return net(x)

    return Case(Net(), call=call)


def penalty(net, x):
    y = net(x)
    if not y.requires_grad:
        return y
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return gradient.square()


@around(None, ("second", "double", "derivative"))
def gradient_penalty():
    return Case(Net(), call=penalty)


@around(None, ("second", "double", "derivative"))
def gradient_penalty_after_plain_training():
    def call(net, x):
        return penalty(net, x) if len(LOG) or x.shape[1] == SIZES[2][1] else net(x)

    return Case(Net(), call=call)


@around(None, ("second", "double", "derivative", "functorch", "traced"))
def hessian_vector_product():
    def call(net, x):
        return torch.autograd.functional.hvp(lambda y: net(y).square().sum(), x.detach(), torch.ones_like(x))

    return Case(Net(), call=call)


@around(("grad", "cannot be captured"), ("grad", "cannot be captured"))
def gradient_inside_forward():
    """As models of forces do: the derivative of an energy by positions."""

    class Model(Net):
        def forward(self, x):
            with torch.enable_grad():
                place = x.detach().requires_grad_()
                energy = super().forward(place).square().sum()
                return torch.autograd.grad(energy, place, create_graph=self.training)[0]

    return Model()


@around(("grad", "cannot be captured"), ("grad", "cannot be captured"))
def backward_inside_forward():
    class Model(Net):
        def forward(self, x):
            with torch.enable_grad():
                place = x.detach().requires_grad_()
                self.first(place).sum().backward()
            return self.last(place.grad)

    return Model()


@around(GRAPH, GRAPH)
def no_grad_region():
    class Model(Net):
        def forward(self, x):
            with torch.no_grad():
                y = self.first(x)
            return self.last(y) + x

    return Model()


@around(("grad",), GRAPH)
def enable_grad_region():
    class Model(Net):
        def forward(self, x):
            with torch.enable_grad():
                y = self.first(x)
            return self.last(y), y

    return Case(Model(), attention=False)  # the region stays a call of its own


@around(("inference",), ("inference", "gradient"))
def inference_mode_region():
    class Model(Net):
        def forward(self, x):
            with torch.inference_mode():
                scale = self.first(x).sigmoid()
            return self.last(x) * scale.clone()

    return Model()


@around(("requires_grad", "argument"), ("requires_grad", "argument", GRAPH))
def input_is_asked_for_gradients():
    class Model(Net):
        def forward(self, x):
            x.requires_grad_()
            return super().forward(x)

    return Model()


@around(GRAPH, GRAPH)
def frozen_later():
    return Case(Net(), change=lambda net: net.first.requires_grad_(False))


@around(GRAPH, GRAPH)
def unfrozen_later():
    model = Net()
    model.first.requires_grad_(False)
    return Case(model, change=lambda net: net.first.requires_grad_(True))


@around(None, GRAPH)
def input_without_gradients_later():
    return Case(Net(), call=lambda net, x: net(x.detach() if x.shape[1] == 7 else x))


@around(None, GRAPH)
def hooks_on_parameters():
    def change(net):
        net.last.weight.register_hook(lambda gradient: gradient * 0.5)
        net.first.q.weight.register_post_accumulate_grad_hook(lambda p: LOG.append(tuple(p.shape)))

    return Case(Net(), change=change)


@around(None, ("backward", "second", GRAPH))
def backward_twice():
    def call(net, x):
        y = net(x)
        y.sum().backward(retain_graph=True)
        return y

    return Case(Net(), call=call)


@around(None, GRAPH)
def anomaly_detection():
    def call(net, x):
        with torch.autograd.detect_anomaly(check_nan=True):
            return net(x)

    return Case(Net(), call=call)


@torch.library.custom_op("around::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_fake(lambda x: torch.empty_like(x))
doubled.register_autograd(lambda ctx, gradient: gradient * 5)  # not its derivative: whose backward ran shows


@around(GRAPH, GRAPH)
def custom_operator_with_a_backward():
    class Model(Net):
        def forward(self, x):
            return self.last(doubled(self.first(x)))

    return Model()


# Hooks --------------------------------------------------------------------------------------------------------------

HOOK = ("hook",)


def tells(module, args, output):
    LOG.append((type(module).__name__, output))


def triples(module, args, output):
    return output * 3


@around(HOOK, HOOK)
def forward_hook_before():
    model = Net()
    model.first.register_forward_hook(tells)
    return model


@around(HOOK, HOOK)
def forward_hook_later():
    return Case(Net(), change=lambda net: net.first.register_forward_hook(triples))


@around(HOOK, HOOK)
def forward_hook_removed_later():
    model = Net()

    def before(net):
        net.handle_of_hook = net.first.register_forward_hook(triples)

    return Case(model, before=before, change=lambda net: net.handle_of_hook.remove())


@around(HOOK, HOOK)
def forward_pre_hook_with_keywords():
    class Model(Net):
        def forward(self, x):
            return self.last(self.first(x=x))

    def halves(module, args, kwargs):
        return args, {"x": kwargs["x"] / 2}

    return Case(Model(), change=lambda net: net.first.register_forward_pre_hook(halves, with_kwargs=True))


@around(HOOK, HOOK)
def full_backward_hook():
    model = Net()
    model.first.register_full_backward_hook(lambda module, gi, go: (gi[0] * 2,))
    return model


@around(HOOK, HOOK)
def full_backward_hook_later():
    def change(net):
        net.first.q.register_full_backward_hook(lambda module, gi, go: LOG.append(tuple(go[0].shape)))

    return Case(Net(), change=change)


@around(GRAPH, GRAPH)
def hooks_on_the_model_itself():
    def change(net):
        net.register_forward_hook(triples)
        net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        net.register_forward_hook(lambda module, args, output: LOG.append("always"), always_call=True)

    return Case(Net(), change=change)


@around(GRAPH, (GRAPH, "hook"))
def backward_hook_on_the_model_itself():
    def change(net):
        net.register_full_backward_hook(lambda module, gi, go: (gi[0] * 2,))

    return Case(Net(), change=change)


@around(("global", "hook"), ("global", "hook"))
def global_forward_hook_later():
    def world(stack):
        stack.callback(nn.modules.module.register_module_forward_hook(tells).remove)

    return Case(Net(), world=world)


@around(("global", "hook"), ("global", "hook"))
def global_forward_hook_for_a_while():
    handles = []

    def start(stack):
        handles.append(nn.modules.module.register_module_forward_pre_hook(lambda module, args: LOG.append("pre")))
        stack.callback(handles[-1].remove)

    return Case(Net(), start=start, world=lambda stack: handles[-1].remove())


@around(("global", "hook"), ("global", "hook"))
def global_backward_hook_later():
    def world(stack):
        hook = nn.modules.module.register_module_full_backward_hook(lambda module, gi, go: LOG.append("back"))
        stack.callback(hook.remove)

    return Case(Net(), world=world)


# What forward reads beside attributes --------------------------------------------------------------------------------


def times(gain):
    """A class whose forward asks `gain(self)` for a factor."""

    class Model(Net):
        def forward(self, x):
            return super().forward(x) * gain(self)

    return Model


@around()
def module_constant():
    return Case(
        times(lambda self: GAIN)(), world=lambda stack: stack.enter_context(mock.patch.object(THIS, "GAIN", 3.0))
    )


@around()
def class_attribute():
    Model = times(lambda self: self.gain)
    Model.gain = 1.0
    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.object(Model, "gain", 3.0)))


@around()
def attribute_of_a_base_class():
    class Base(Net):
        gain = 1.0

    class Model(Base):
        def forward(self, x):
            return super().forward(x) * self.gain

    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.object(Base, "gain", 3.0)))


@around()
def closure_cell():
    gain = 1.0

    def gained(self):
        return gain

    def world(stack):
        nonlocal gain
        gain = 3.0
        stack.callback(back)

    def back():
        nonlocal gain
        gain = 1.0

    return Case(times(gained)(), world=world)


@around()
def method_replaced_on_the_class():
    class Model(Net):
        def post(self, y):
            return y

        def forward(self, x):
            return self.post(super().forward(x))

    return Case(
        Model(), world=lambda stack: stack.enter_context(mock.patch.object(Model, "post", lambda self, y: y.relu()))
    )


@around()
def forward_of_a_base_class_replaced():
    class Model(Net):
        def forward(self, x):
            return super().forward(x) + 1

    def other(self, x):
        return self.last(x)

    world = mock.patch.object(Net, "forward", other)  # without any attention
    return Case(Model(), world=lambda stack: stack.enter_context(world), attention=False)


def helper(y, gain=1.0):
    return y * gain


@around()
def function_replaced():
    class Model(Net):
        def forward(self, x):
            return helper(super().forward(x))

    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.object(THIS, "helper", torch.relu)))


@around()
def defaults_of_a_function_replaced():
    class Model(Net):
        def forward(self, x):
            return helper(super().forward(x))

    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.object(helper, "__defaults__", (3.0,))))


@around()
def code_of_a_function_replaced():
    class Model(Net):
        def forward(self, x):
            return helper(super().forward(x))

    def other(y, gain=1.0):
        return y - gain

    def world(stack):
        stack.callback(setattr, helper, "__code__", helper.__code__)
        helper.__code__ = other.__code__

    return Case(Model(), world=world)


@around()
def function_of_torch_replaced():
    class Model(Net):
        def forward(self, x):
            return F.gelu(super().forward(x))

    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.object(F, "gelu", torch.relu)))


@around()
def number_in_a_global_dict():
    return Case(
        times(lambda self: TABLE["gain"])(), world=lambda stack: stack.enter_context(mock.patch.dict(TABLE, gain=3.0))
    )


@around()
def function_in_a_global_dict():
    class Model(Net):
        def forward(self, x):
            return TABLE["act"](super().forward(x))

    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.dict(TABLE, act=torch.tanh)))


@around()
def attribute_of_a_global_object():
    return Case(
        times(lambda self: SETTINGS.gain)(),
        world=lambda stack: stack.enter_context(mock.patch.object(SETTINGS, "gain", 3.0)),
    )


@around(("environ",), ("environ",))
def environment_variable():
    return Case(
        times(lambda self: float(os.environ.get("AROUND_GAIN", "1")))(),
        world=lambda stack: stack.enter_context(mock.patch.dict(os.environ, AROUND_GAIN="3")),
    )


@around(("context", "CONTEXT"), ("context", "CONTEXT"))
def context_variable():
    def world(stack):
        stack.callback(CONTEXT.reset, CONTEXT.set(3.0))

    return Case(times(lambda self: CONTEXT.get())(), world=world)


@around(("default", "dtype", "global"), ("default", "dtype", "global"))
def default_dtype():
    class Model(Net):
        def forward(self, x):
            return super().forward(x) * torch.full((), 2.0)

    def world(stack):
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)

    def call(net, x):
        y = net(x)
        return y, torch.result_type(y, x)

    return Case(Model(), call=call, world=world)


@around()
def partial_whose_keywords_change():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.act = functools.partial(F.leaky_relu, negative_slope=0.1)

        def forward(self, x):
            return self.act(super().forward(x))

    def change(net):
        net.act = functools.partial(F.leaky_relu, negative_slope=0.9)

    return Case(Model(), change=change)


@around()
def lambda_that_reads_a_global():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.act = lambda y: y * GAIN

        def forward(self, x):
            return self.act(super().forward(x))

    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.object(THIS, "GAIN", 3.0)))


@around()
def property_that_reads_a_global():
    Model = times(lambda self: self.gain)
    Model.gain = property(lambda self: GAIN)
    return Case(Model(), world=lambda stack: stack.enter_context(mock.patch.object(THIS, "GAIN", 3.0)))


@around()
def method_set_on_the_object():
    class Model(Net):
        def post(self, y):
            return y

        def forward(self, x):
            return self.post(super().forward(x))

    def change(net):
        net.post = types.MethodType(lambda self, y: y * 3, net)

    return Case(Model(), change=change)


@around()
def forward_of_a_part_replaced():
    def change(net):
        net.first.o.forward = lambda x: x * 2

    return Case(Net(), change=change)


@around()
def forward_of_a_class_of_torch_replaced():
    def other(self, x):
        return F.linear(x, self.weight) * 2

    return Case(Net(), world=lambda stack: stack.enter_context(mock.patch.object(nn.Linear, "forward", other)))


class _Holder:
    """An object that is neither a module nor a config: it has slots."""

    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1.0


@around(("gain", "slots", "_Holder"), ("gain", "slots", "_Holder"))
def object_with_slots():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.holder = _Holder()

        def forward(self, x):
            return super().forward(x) * self.holder.gain

    def change(net):
        net.holder.gain = 3.0

    return Case(Model(), change=change)


@around(("array", "numpy"), ("array", "numpy"))
def numpy_array_as_an_attribute():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.scale = np.ones(WIDTH, dtype=np.float32)

        def forward(self, x):
            return super().forward(x) * torch.from_numpy(self.scale)

    def change(net):
        net.scale[:] = 3.0

    return Case(Model(), change=change)


# What forward writes --------------------------------------------------------------------------------------------------

WRITES = ("LOG", "write", "append", "list", "global", "side effect", "Python", "changes")


@around(WRITES, WRITES)
def appends_to_a_global_list():
    class Model(Net):
        def forward(self, x):
            y = self.first(x)
            LOG.append(y)
            return self.last(y)

    return Model()


@around(("COUNT", *WRITES), ("COUNT", *WRITES))
def counts_in_a_global():
    class Model(Net):
        def forward(self, x):
            global COUNT
            COUNT += 1
            return super().forward(x)

    def call(net, x):
        return net(x), COUNT

    return Case(Model(), call=call, start=lambda stack: stack.enter_context(mock.patch.object(THIS, "COUNT", 0)))


@around(("maps", *WRITES), ("maps", *WRITES))
def list_of_the_class():
    class Model(Net):
        maps: list[Any] = []

        def forward(self, x):
            y = self.first(x)
            self.maps.append(y.detach())
            return self.last(y)

    def call(net, x):
        return net(x), list(Model.maps)

    return Case(Model(), call=call, start=lambda stack: Model.maps.clear())


@around(("counter", "attribute", *WRITES), ("counter", "attribute", *WRITES))
def counter_as_an_attribute():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    return Model()


@around()
def attribute_made_at_the_first_call():
    class Model(Net):
        places = None

        def forward(self, x):
            if self.places is None:
                self.places = torch.linspace(0, 1, WIDTH)
            return super().forward(x) + self.places

    return Model()


@around()
def last_output_as_an_attribute():
    class Model(Net):
        def forward(self, x):
            self.seen = self.first(x)
            return self.last(self.seen)

    def call(net, x):
        return net(x), net.seen

    return Case(Model(), call=call)


@around()
def running_mean_in_a_buffer():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x):
            y = self.first(x)
            self.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 1)))
            return self.last(y - self.mean)

    return Model()


@around()
def batch_norm():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x):  # behind the attention, the gradients of its biases would be rounding alone
            return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))

    return Model()


@around(("attribute", "write", "cache"), ("attribute", "write", "cache"))
def cache_of_keys_as_state():
    class Model(Net):
        cache = None

        def forward(self, x):
            y = x if self.cache is None else torch.cat([self.cache, x], 1)
            self.cache = y.detach()
            return super().forward(y)[:, -x.shape[1] :]

    return Case(Model(), inputs=lambda draw: (draw(2, 3 + draw.step, WIDTH),))


class Cache:
    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def update(self, x: Tensor) -> Tensor:
        self.kept = x if self.kept is None else torch.cat([self.kept, x], 1)
        return self.kept


@around(("Cache",), ("Cache",))
def cache_as_an_argument():
    class Model(Net):
        def forward(self, x, cache):
            return super().forward(cache.update(x))

    def call(net, x, cache):
        return net(x, cache), net(x, cache), cache.kept

    return Case(Model(), call=call, inputs=lambda draw: (draw.x(), Cache()))


# Containers -----------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    x: Tensor
    gain: float = 1.0


class Named(NamedTuple):
    x: Tensor
    bias: Tensor | None = None


def taking(forward, **case):
    """A case whose forward is a function of (net, its inputs); `Net.forward` is `base`."""
    model = type("Model", (Net,), {"forward": forward, "__module__": __name__})()
    return Case(model, **case)


def base(self, x):
    return self.last(self.first(x))


@around()
def dict_of_outputs():
    return taking(lambda self, x: {"y": base(self, x), "none": None, "size": 3, "more": (x, [x, x])})


def _changes_its_dict(self, batch):
    batch["y"] = base(self, batch["x"])
    return batch


CONTAINER = ("changes", "container", "dict", "argument")


@around(CONTAINER, CONTAINER)
def dict_changed_and_returned():
    """Sentence-transformers' way: what is given is what is returned."""

    def call(net, batch):
        result = net(batch)
        return result is batch, batch

    return taking(_changes_its_dict, call=call, inputs=lambda draw: ({"x": draw.x()},))


@around(CONTAINER, CONTAINER)
def list_that_forward_appends_to():
    def forward(self, x, kept):
        kept.append(base(self, x))
        return kept[-1] * 2

    def call(net, x):
        kept: list[Tensor] = []
        return net(x, kept), kept

    return taking(forward, call=call)


@around(CONTAINER, CONTAINER)
def dict_that_forward_pops_from():
    def call(net, batch):
        return net(batch), batch

    return taking(lambda self, batch: base(self, batch.pop("x")), call=call, inputs=lambda draw: ({"x": draw.x()},))


MAPPING = ("UserDict", "Mapping", "BatchEncoding", "mappingproxy")


@around()
def user_dict():
    return taking(lambda self, batch: base(self, batch["x"]), inputs=lambda draw: (collections.UserDict(x=draw.x()),))


@around(GRAPH, None)
def batch_encoding():
    from transformers import BatchEncoding

    def forward(self, batch):
        return base(self, F.one_hot(batch.ids % WIDTH, WIDTH).float()) * batch["mask"][..., None]

    def inputs(draw):
        ids = ids_of(draw)
        return (BatchEncoding({"ids": ids, "mask": torch.ones_like(ids)}),)

    return taking(forward, inputs=inputs)


@around(MAPPING, MAPPING)
def mapping_proxy():
    return taking(
        lambda self, batch: base(self, batch["x"]), inputs=lambda draw: (types.MappingProxyType({"x": draw.x()}),)
    )


@around((GRAPH, "UserDict", *CONTAINER), (GRAPH, "UserDict", *CONTAINER))
def user_dict_changed_and_returned():
    def call(net, batch):
        result = net(batch)
        return result is batch, dict(batch)

    return taking(_changes_its_dict, call=call, inputs=lambda draw: (collections.UserDict(x=draw.x()),))


@around()
def dataclass_as_an_argument():
    return taking(lambda self, pair: base(self, pair.x) * pair.gain, inputs=lambda draw: (Pair(draw.x(), 2.0),))


@around((GRAPH, "Pair"), (GRAPH, "Pair"))
def dataclass_as_output():
    return taking(lambda self, x: Pair(base(self, x), 3.0))


@around()
def named_tuples():
    return taking(
        lambda self, named: Named(base(self, named.x), named.bias), inputs=lambda draw: (Named(draw.x(), draw(3)),)
    )


@around()
def ordered_dict():
    return taking(
        lambda self, batch: collections.OrderedDict(b=base(self, batch["x"]), a=None),
        inputs=lambda draw: (collections.OrderedDict(x=draw.x()),),
    )


@around()
def nested_arguments():
    return taking(
        lambda self, first, *, more=None: base(self, first[0][0]) + (0 if more is None else more["b"][1]),
        inputs=lambda draw: (((draw.x(), None), "text"), {"b": [1, draw(WIDTH)]}),
        call=lambda net, first, more: (net(first, more=more), net(first)),
        graphs=3,
    )


@around((GRAPH, "None", "output"), (GRAPH, "None", "output"))
def nothing_as_output():
    return taking(lambda self, x: None if base(self, x) is not None else x, attention=False)  # nothing reads it


@around(("generator",), ("generator",))
def generator_as_an_argument():
    """It can be read once: not by fxbt."""
    return taking(
        lambda self, parts: base(self, torch.cat(list(parts), 1)),
        inputs=lambda draw: ((part for part in (draw.x(), draw.x())),),
    )


@around((GRAPH, "SimpleNamespace"), (GRAPH, "SimpleNamespace"))
def namespace_as_an_argument():
    return taking(lambda self, batch: base(self, batch.x), inputs=lambda draw: (types.SimpleNamespace(x=draw.x()),))


@around((GRAPH, "ndarray"), (GRAPH, "ndarray"))
def numpy_array_as_an_argument():
    return taking(
        lambda self, x, bias: base(self, x) + torch.from_numpy(bias),
        inputs=lambda draw: (draw.x(), np.full(WIDTH, draw.step, dtype=np.float32)),
    )


@around((GRAPH, "returns", "output"), (GRAPH, "returns", "output"))
def settings_returned():
    model = taking(lambda self, x: (base(self, x), self.settings)).model
    model.settings = types.SimpleNamespace(gain=1.0)
    return Case(model, call=lambda net, x: (lambda out: (out[0], out[1] is net.settings))(net(x)))


@around()
def input_returned():
    return taking(lambda self, x: (base(self, x), x))


@around()
def one_value_returned_twice():
    return taking(lambda self, x: (lambda y: (y, y, [y]))(base(self, x)))


@around((GRAPH, "view", "memory"), (GRAPH, "view", "memory"))
def view_of_the_input_returned():
    return taking(lambda self, x: (base(self, x), x[:, 1:], x.transpose(1, 2)))


@around()
def any_number_of_arguments():
    return taking(
        lambda self, *xs: sum(base(self, x) for x in xs),
        inputs=lambda draw: tuple(draw.x() for _ in range(2 if draw.step == 2 else 1)),
    )


@around()
def defaults_of_forward_replaced():
    class Model(Net):
        def forward(self, x, gain=1.0):
            return base(self, x) * gain

    def world(stack):
        stack.enter_context(mock.patch.object(Model.forward, "__defaults__", (3.0,)))

    return Case(Model(), world=world)


# Wrappers, and models that are changed after optimize -----------------------------------------------------------------


def set_wrapper(net):
    inner = net.forward

    @functools.wraps(inner)
    def wrapper(*args, **kwargs):
        LOG.append("wrapper")
        return inner(*args, **kwargs) * 2

    net.forward = wrapper


@around((GRAPH, "forward"), (GRAPH, "forward"))
def forward_wrapped():
    return Case(Net(), before=set_wrapper)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def forward_wrapped_in_place():
    return Case(Net(), before=set_wrapper, inplace=True)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def forward_wrapped_later():
    return Case(Net(), change=set_wrapper)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def forward_wrapped_later_in_place():
    return Case(Net(), change=set_wrapper, inplace=True)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def forward_wrapped_twice_and_unwrapped():
    def before(net):
        set_wrapper(net)
        set_wrapper(net)

    def change(net):
        del net.forward

    return Case(Net(), before=before, change=change)


def cast_forward(net):
    """As Accelerate does for mixed precision: the function of the bound method, under autocast, bound again."""
    inner = net.forward
    net._original_forward = inner
    function = inner.__func__ if hasattr(inner, "__func__") else inner
    cast = torch.autocast("cpu", dtype=torch.bfloat16)(function)
    net.forward = types.MethodType(cast, net) if hasattr(inner, "__func__") else cast


def add_hook(net):
    """As `accelerate.hooks.add_hook_to_module` does."""
    old = net.forward
    net._old_forward = old

    def hooked(module, *args, **kwargs):
        LOG.append("hooked")
        return module._old_forward(*args, **kwargs)

    net.forward = functools.update_wrapper(functools.partial(hooked, net), old)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def accelerate_mixed_precision():
    return Case(Net(), before=cast_forward, tolerance=3e-2)  # bfloat16 has 8 bits


@around((GRAPH, "forward"), (GRAPH, "forward"))
def accelerate_mixed_precision_in_place():
    return Case(Net(), before=cast_forward, tolerance=3e-2, inplace=True)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def accelerate_hook():
    return Case(Net(), before=add_hook)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def accelerate_hook_in_place_removed_later():
    def change(net):
        net.forward = net._old_forward
        del net._old_forward

    return Case(Net(), before=add_hook, change=change, inplace=True)


@around((GRAPH, "forward"), (GRAPH, "forward"))
def accelerate_hook_on_a_part():
    return Case(Net(), change=lambda net: add_hook(net.first))


@around(SILENT, SILENT)
def compiled_around():
    def change(net):
        return torch.compile(net, backend="eager")

    return Case(Net(), change=change)


@around((GRAPH, "compile", "dynamo"), (GRAPH, "compile", "dynamo"))
def compiled_part():
    model = Net()
    model.first = torch.compile(model.first, backend="eager")
    return model


@around(SILENT, SILENT)
def compiled_in_place():
    return Case(Net(), before=lambda net: net.compile(backend="eager"))


@around()
def data_parallel_without_devices():
    return Case(Net(), call=lambda net, x: nn.DataParallel(net)(x))


@around()
def inside_a_sequential():
    return Case(Net(), call=lambda net, x: nn.Sequential(net, nn.ReLU())(x))


@around()
def deep_copied():
    return Case(Net(), change=copy.deepcopy)


@around()
def shallow_copied():
    return Case(Net(), change=copy.copy)


@around()
def pickled():
    return Case(Net(), change=lambda net: pickle.loads(pickle.dumps(net)))


@around()
def saved_whole_and_loaded():
    def change(net):
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return Case(Net(), change=change)


@around()
def weights_loaded():
    return Case(Net(), change=lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}))


@around()
def weights_assigned():
    def change(net):
        net.load_state_dict({k: v.clone() * 2 for k, v in net.state_dict().items()}, assign=True)

    return Case(Net(), change=change)


@around()
def weights_written_through_data():
    def change(net):
        net.first.q.weight.data[3, 5] = 40.0  # one element
        net.last.bias.data.numpy()[7] = 9.0
        if hasattr(net, "report"):
            fxbt.refresh(net)  # the next few calls would see it of themselves: README says within how many

    return Case(Net(), change=change)


@around()
def weights_from_one_vector():
    def change(net):
        vector = nn.utils.parameters_to_vector(net.parameters()).detach()
        nn.utils.vector_to_parameters(vector * 2, net.parameters())

    return Case(Net(), change=change)


@around()
def initialised_again():
    @torch.no_grad()
    def fill(module):
        if isinstance(module, nn.Linear):
            module.weight.copy_(torch.eye(WIDTH))

    return Case(Net(), change=lambda net: net.apply(fill))


@around()
def one_optimiser_step():
    def call(net, x):
        y = net(x)
        if y.requires_grad:
            y.square().sum().backward(retain_graph=True)
            torch.optim.SGD(net.parameters(), lr=0.1).step()
            net.zero_grad()
        return y.detach()

    return Case(Net(), call=call)


@around()
def made_double():
    return Case(Net(), change=lambda net: net.double(), call=lambda net, x: net(x.to(net.last.weight.dtype)))


@around()
def made_bfloat16():
    return Case(
        Net(),
        change=lambda net: net.to(torch.bfloat16),
        call=lambda net, x: net(x.to(net.last.weight.dtype)),
        tolerance=5e-2,  # of bfloat16
    )


@around()
def parametrized_later():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    return Case(Net(), change=lambda net: parametrize.register_parametrization(net.last, "weight", Twice()))


@around()
def parametrization_removed_later():
    return Case(
        Net(),
        before=lambda net: parametrizations.weight_norm(net.last),
        change=lambda net: parametrize.remove_parametrizations(net.last, "weight"),
    )


@around()
def old_weight_norm():
    return Case(Net(), before=lambda net: nn.utils.weight_norm(net.last))


@around()
def spectral_norm():
    model = Net()
    parametrizations.spectral_norm(model.last)
    return model


@around()
def old_spectral_norm():
    return Case(Net(), before=lambda net: (torch.manual_seed(0), nn.utils.spectral_norm(net.last)))


@around((GRAPH, "hook", "attribute"), (GRAPH, "hook", "attribute"))
def pruned_later():
    def change(net):
        prune.l1_unstructured(net.last, "weight", amount=0.5)

    return Case(Net(), change=change)


class Adapter(nn.Module):
    """A low-rank addition to a linear layer, as PEFT injects it."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.linspace(-1, 1, rank * layer.in_features).view(rank, -1))
        self.b = nn.Parameter(torch.linspace(-1, 1, rank * layer.out_features).view(-1, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


def inject(net):
    net.first.q = Adapter(net.first.q)
    net.first.v = Adapter(net.first.v)


@around()
def adapters_injected_later():
    return Case(Net(), change=inject)


@around()
def part_replaced():
    def change(net):
        net.last = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU())
        nn.init.ones_(net.last[0].weight)
        nn.init.zeros_(net.last[0].bias)

    return Case(Net(), change=change)


@around()
def layer_dropped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Net() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def change(net):
        del net.layers[1]

    return Case(Model(), change=change)


@around(GRAPH, None)
def trained_for_one_call():
    def call(net, x):
        net.train()
        with torch.enable_grad():
            net(x).sum().backward()
        gradient = net.last.weight.grad.clone()
        net.eval()
        return net(x), gradient

    return Case(Net(), call=call, graphs=3)


@around(None, GRAPH)
def a_part_in_eval_mode():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.last(self.drop(self.first(x)))

    return Case(Model(), before=lambda net: net.drop.eval())


@around(GRAPH, None)
def fused_batch_norm():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.norm.running_var.fill_(4.0)

        def forward(self, x):
            return self.norm(super().forward(x).flatten(0, 1))

    def change(net):
        net.last = torch.nn.utils.fusion.fuse_linear_bn_eval(net.last, net.norm)
        net.norm = nn.Identity()

    return Case(Model(), change=change)


@around(SILENT, SILENT)
def functional_call_with_other_weights():
    def call(net, x):
        weights = {name: p.detach() * 2 for name, p in net.named_parameters()}
        return net(x), torch.func.functional_call(net, weights, (x,)), net(x)

    return Case(Net(), call=call, graphs=4)


@around(SILENT, SILENT)
def functional_vmap():
    return Case(Net(), call=lambda net, x: torch.func.vmap(net)(torch.stack([x, x + 1])))


@around(SILENT, SILENT)
def functional_gradient():
    def call(net, x):
        return torch.func.grad(lambda y: net(y).sum())(x.detach())

    return Case(Net(), call=call)


@around(SILENT, SILENT)
def functional_jvp():
    def call(net, x):
        return torch.func.jvp(net, (x.detach(),), (torch.ones_like(x),))

    return Case(Net(), call=call)


@around(SILENT, SILENT)
def forward_mode_duals():
    def call(net, x):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(net(dual)).tangent

    return Case(Net(), call=call)


@around(SILENT, None)
def per_sample_gradients():
    def call(net, x):
        weights = {name: p.detach() for name, p in net.named_parameters()}

        def loss(weights, one):
            return torch.func.functional_call(net, weights, (one[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)

    return Case(Net(), call=call)


@around(SILENT, None)
def jit_traced():
    def call(net, x):
        return torch.jit.trace(net, (x,), check_trace=False)(x)

    return Case(Net(), call=call)


@around(SILENT, None)
def exported():
    def call(net, x):
        return net(x), torch.export.export(net, (x,)).module()(x)

    return Case(Net(), call=call, graphs=3)


@around(SILENT, None)
def symbolically_traced():
    class Model(Net):
        """Written so that torch.fx can trace it."""

    def call(net, x):
        return net(x), torch.fx.symbolic_trace(net)(x)

    return Case(Model(), call=call)


@around(SILENT, None)
def under_a_dispatch_mode():
    """A mode that counts ops sees the original's."""
    from torch.utils.flop_counter import FlopCounterMode

    def call(net, x):
        net(x)
        with FlopCounterMode(display=False) as counter:
            y = net(x)
        return y, counter.get_total_flops()

    return Case(Net(), call=call)


@around()
def restored_and_optimised_again():
    def change(net):
        return fxbt.optimize(fxbt.restore(net)) if hasattr(net, "report") else net

    return Case(Net(), change=change)


class Recursive(Net):
    """Calls itself, through the attribute that its user set to the whole model."""

    def forward(self, x, depth=1):
        y = self.last(self.first(x))
        return self.whole[0](y, depth - 1) if depth else y


@around((GRAPH, "itself", "recurs"), (GRAPH, "itself", "recurs"))
def model_that_calls_itself():
    def before(net):
        net.whole = [net]

    return Case(Recursive(), before=before)


@around((GRAPH, "optimised model"), (GRAPH, "optimised model"))
def optimised_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = fxbt.optimize(Net())
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x):
            return self.head(self.body(x))

    return Model()


@around()
def sharing_its_parts_with_another_model():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.again = self.first

        def forward(self, x):
            return self.last(self.again(self.first(x)))

    return Model()


# Devices, dtypes, odd tensors -----------------------------------------------------------------------------------------

META = ("meta",)


@around(META, META)
def meta_model():
    return Case(Net().to("meta"), call=lambda net, x: net(x.to("meta")))


@around(META, META)
def made_meta_later():
    def call(net, x):
        return net(x.to(net.last.weight.device))

    return Case(Net(), call=call, change=lambda net: net.to("meta"))


@around((GRAPH, "meta"), (GRAPH, "meta"))
def meta_buffer_that_nothing_reads():
    model = Net()
    model.register_buffer("unused", torch.empty(3, device="meta"))
    return model


@around()
def double_precision():
    return Case(Net().double(), inputs=lambda draw: (draw.x(torch.float64),))


@around()
def bfloat16():
    return Case(Net().bfloat16(), inputs=lambda draw: (draw.x(torch.bfloat16),), tolerance=5e-2)  # of bfloat16


@around()
def autocast_around():
    def call(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x)

    return Case(Net(), call=call, tolerance=3e-2)  # bfloat16 has 8 bits


@around()
def autocast_at_the_third_call():
    def call(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.shape[1] == 7):
            return net(x)

    return Case(Net(), call=call, tolerance=3e-2)  # bfloat16 has 8 bits


@around((GRAPH, "autocast"), (GRAPH, "autocast"))
def autocast_inside():
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
        return self.last(y.float())

    # bfloat16 has 8 bits; the region stays a call of its own, which no rule looks into
    return taking(forward, tolerance=3e-2, attention=False)


@around((GRAPH, "autocast"), (GRAPH, "autocast"))
def autocast_switched_off_inside():
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = self.first(x.float())
        return self.last(y)

    def call(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x)

    # bfloat16 has 8 bits; the region stays a call of its own, which no rule looks into
    return taking(forward, call=call, tolerance=3e-2, attention=False)


def ids_of(draw: Draw) -> Tensor:
    return (torch.arange(SIZES[draw.step][1]).expand(2, -1) + draw.step) % 11


class Embedded(Net):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)

    def forward(self, ids):
        return super().forward(self.words(ids))


@around()
def ids_alone():
    return Case(Embedded(), inputs=lambda draw: (ids_of(draw),))


@around()
def ids_of_another_integer_type_later():
    return Case(Embedded(), inputs=lambda draw: (ids_of(draw).to(torch.int32 if draw.step == 2 else torch.int64),))


@around((GRAPH, "complex"), (GRAPH, "complex"))
def complex_numbers():
    def forward(self, x):
        return torch.view_as_real(torch.view_as_complex(base(self, x).unflatten(-1, (-1, 2))) * 1j).flatten(-2)

    return taking(forward)


@around((GRAPH, "complex"), (GRAPH, "complex"))
def complex_argument():
    return taking(
        lambda self, x, turn: base(self, x) * (turn * turn.conj()).real,
        inputs=lambda draw: (draw.x(), torch.complex(draw(WIDTH), draw(WIDTH)).detach()),
    )


@around(("sparse",), ("sparse",))
def sparse_argument():
    return taking(
        lambda self, x, adjacency: base(self, x) + torch.sparse.mm(adjacency, x.flatten(0, 1)).view(x.shape),
        inputs=lambda draw: (lambda x: (x, torch.eye(x.shape[0] * x.shape[1]).to_sparse()))(draw.x()),
    )


@around((GRAPH, "sparse"), (GRAPH, "sparse"))
def sparse_buffer():
    model = taking(lambda self, x: base(self, x) + torch.sparse.mm(self.mixing, x[0].T).T).model
    model.register_buffer("mixing", torch.eye(WIDTH).to_sparse())
    return model


@around(("nested",), ("nested",))
def nested_argument():
    def inputs(draw):
        return (draw.x(), torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]))

    return taking(lambda self, x, parts: (base(self, x), parts.to_padded_tensor(0.0)), inputs=inputs)


@around((GRAPH, "nested"), (GRAPH, "nested"))
def nested_buffer():
    parts = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    return Case(Net(), before=lambda net: net.register_buffer("parts", parts))


@around((GRAPH, "quantized"), (GRAPH, "quantized"))
def quantized_buffer():
    model = taking(lambda self, x: base(self, x) + self.shift.dequantize()).model
    model.register_buffer("shift", torch.quantize_per_tensor(torch.linspace(0, 1, WIDTH), 0.1, 0, torch.qint8))
    return model


@around((GRAPH, "quantized"), None)
def quantized_part():
    model = torch.ao.quantization.quantize_dynamic(Net().eval(), {"last"}, dtype=torch.qint8)
    return Case(model, tolerance=2e-2)  # inputs are brought to 8 bits: a rounding the other way shows


class Mine(Tensor):
    """A subclass that says which functions were called on it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("softmax", "add"):
            LOG.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


@around(("Mine",), ("Mine",))
def subclass_as_an_argument():
    return Case(Net(), call=lambda net, x: net(x.as_subclass(Mine)))


@around(("Mine", "subclass", "LOG"), ("Mine", "subclass", "LOG"))
def subclass_as_a_buffer():
    def before(net):
        net.register_buffer("shift", torch.ones(WIDTH).as_subclass(Mine))

    return taking(lambda self, x: base(self, x) + self.shift, before=before)


class Scaled(Tensor):
    """A subclass whose arithmetic is its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * GAIN if function.__name__ == "add" else result


@around((GRAPH, "fake tensor"), (GRAPH, "fake tensor"))
def subclass_that_computes_in_its_own_way():
    def before(net):
        net.register_buffer("shift", torch.ones(WIDTH).as_subclass(Scaled))

    def world(stack):
        stack.enter_context(mock.patch.object(THIS, "GAIN", 3.0))

    def forward(self, x):
        return (base(self, x) + self.shift).as_subclass(Tensor)

    return taking(forward, before=before, world=world)


@around()
def inference_tensor_as_an_argument():
    def inputs(draw):
        with torch.inference_mode():
            return (torch.linspace(-1, 1, 2 * 5 * WIDTH).view(2, 5, WIDTH) * (draw.step + 1),)

    return Case(Net(), inputs=inputs, call=lambda net, x: net(x.clone()) if torch.is_grad_enabled() else net(x))


@around(GRAPH, None)
def inference_mode_and_back():
    def call(net, x):
        with torch.inference_mode():
            first = net(x)
        return net(x), net(x), first.clone().requires_grad

    return Case(Net(), call=call, graphs=3)


@around()
def non_contiguous_inputs():
    return Case(
        Net(),
        inputs=lambda draw: (draw(*SIZES[draw.step][::-1], WIDTH),),
        call=lambda net, x: net(x.transpose(0, 1)),
    )


@around()
def expanded_inputs():
    return Case(
        Net(), inputs=lambda draw: (draw(1, 1, WIDTH),), call=lambda net, x: net(x.expand(2, 4 + x.shape[0], -1))
    )


@around()
def backward_strides_and_offsets():
    return Case(Net(), call=lambda net, x: net(torch.cat([x, x], -1)[:, 1:, WIDTH // 2 : WIDTH // 2 + WIDTH]))


@around()
def batch_of_nothing_later():
    return Case(Net(), inputs=lambda draw: (draw(0 if draw.step == 2 else 2, 5, WIDTH),))


@around((GRAPH, "cannot be captured", "empty"), (GRAPH, "cannot be captured", "empty"))
def batch_of_nothing_first():
    return Case(Net(), inputs=lambda draw: (draw(2 if draw.step == 2 else 0, 5, WIDTH),))


@around()
def one_tensor_passed_twice():
    return taking(lambda self, x, y: base(self, x) + y, call=lambda net, x: (net(x, x), net(x, x.clone())), graphs=3)


@around((GRAPH, "argument"), (GRAPH, "argument"))
def a_tensor_and_a_view_of_it():
    def forward(self, x, part):
        return base(self, x) + part

    return taking(forward, call=lambda net, x: net(x, x[:, :1]))


@around(("argument", "writes in place"), ("argument", "writes in place"))
def input_written_in_place():
    def forward(self, x):
        x.mul_(2)
        return base(self, x)

    def call(net, x):
        copied = x.clone()
        return net(copied), copied

    return taking(forward, call=call)


@around(("argument", "writes in place", "memory"), ("argument", "writes in place", "memory"))
def input_written_in_place_and_seen_through_another():
    def forward(self, x, part):
        part.add_(1.0)
        return base(self, x)

    def call(net, x):
        copied = x.clone()
        return net(copied, copied[:, :1]), copied

    return taking(forward, call=call)


@around((GRAPH, "gain", "attribute"), (GRAPH, "gain", "attribute"))
def attribute_of_an_input():
    def call(net, x):
        x.gain = 1.0 if x.shape[1] != 7 else 3.0
        return net(x)

    return taking(lambda self, x: base(self, x) * getattr(x, "gain", 1.0), call=call)


@around()
def parameter_of_the_model_as_an_argument():
    return Case(Net(), call=lambda net, x: net(net.last.weight[None]) + net(x).sum())


@around()
def number_as_an_argument():
    return taking(
        lambda self, x, t: base(self, x) * (1 + 0.1 * t),
        call=lambda net, x: [net(x, t) for t in range(4 * x.shape[1])],
    )


@around()
def number_as_a_zero_dim_tensor():
    return taking(lambda self, x, t: base(self, x) * t, inputs=lambda draw: (draw.x(), torch.tensor(draw.step + 1.0)))


@around((GRAPH, "conj"), (GRAPH, "conj"))
def conjugate_view_as_an_argument():
    return taking(
        lambda self, x, turn: base(self, x) * turn.imag,
        inputs=lambda draw: (draw.x(), torch.complex(torch.ones(WIDTH), torch.ones(WIDTH) * 2).conj()),
    )


class _Awkward:
    """An attribute that cannot be copied, compared or asked for its own attributes."""

    def copy(self):
        raise RuntimeError("no copies")

    def __eq__(self, other):
        raise RuntimeError("not comparable")

    __hash__ = object.__hash__

    def __getattribute__(self, name):
        if name == "__dict__":
            raise RuntimeError("no attributes")
        return object.__getattribute__(self, name)

    def __deepcopy__(self, memo):
        return self


class _AwkwardDict(dict):
    def copy(self):
        raise RuntimeError("no copies")

    def __deepcopy__(self, memo):
        return self


@around((GRAPH, "_Awkward"), (GRAPH, "_Awkward"))
def attribute_that_raises():
    model = Net()
    model.odd = _Awkward()
    return model


@around((GRAPH, "_Awkward"), (GRAPH, "_Awkward"))
def dict_that_cannot_be_copied():
    model = Net()
    model.odd = _AwkwardDict(a=1)
    return model


@around((GRAPH, "script", "Script"), (GRAPH, "script", "Script"))
def script_module_inside():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.head = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, 4), nn.GELU()))

        def forward(self, x):
            return self.head(super().forward(x))

    return Case(Model(), copies=False)


# Exceptions -----------------------------------------------------------------------------------------------------------


class MyError(Exception):
    pass


@around()
def wrong_shape_later():
    return Case(Net(), inputs=lambda draw: (draw(2, 5, WIDTH + (draw.step == 2)),))


@around((GRAPH, "cannot be captured"), (GRAPH, "cannot be captured"))
def wrong_shape_first():
    return Case(Net(), inputs=lambda draw: (draw(2, 5, WIDTH + (draw.step == 0)),))


@around()
def index_out_of_range_later():
    return Case(Embedded(), inputs=lambda draw: (ids_of(draw) + 100 * (draw.step == 2),))


@around()
def missing_argument_later():
    return Case(Net(), call=lambda net, x: net() if x.shape[1] == 7 else net(x))


@around()
def unknown_keyword_later():
    return Case(Net(), call=lambda net, x: net(x, unknown=1) if x.shape[1] == 7 else net(x))


@around()
def own_error_for_a_length():
    def forward(self, x):
        if x.shape[1] > 6:
            raise MyError("too long")
        return base(self, x)

    return taking(forward)


VALUES = ("values of tensors", "goes another way", "a number that depends on the values")


@around((GRAPH, *VALUES), (GRAPH, *VALUES))
def own_error_for_a_value():
    def forward(self, x):
        if x.detach().abs().max() > 50:
            raise MyError("too large")
        return base(self, x)

    return taking(forward, call=lambda net, x: net(x * (100 if x.shape[1] == 7 else 1)))


@around((GRAPH, *VALUES), (GRAPH, *VALUES))
def assertion_about_values():
    def forward(self, x):
        assert x.isfinite().all(), "not finite"
        return base(self, x)

    return taking(forward, call=lambda net, x: net(x / (0 if x.shape[1] == 7 else 1)))


@around(("COUNT", *WRITES), ("COUNT", *WRITES))
def raises_at_the_third_call():
    def forward(self, x):
        global COUNT
        COUNT += 1
        if COUNT == 3:
            raise MyError("three")
        return base(self, x)

    return taking(forward, start=lambda stack: stack.enter_context(mock.patch.object(THIS, "COUNT", 0)))


@around((GRAPH, "catch", "except"), (GRAPH, "catch", "except"))
def error_caught_inside():
    def forward(self, x):
        try:
            y = base(self, x)[:, 5]
        except IndexError:
            y = base(self, x)[:, 0]
        return y

    return taking(forward)


# Randomness -----------------------------------------------------------------------------------------------------------

RANDOM = ("random",)


@around((GRAPH, *RANDOM), (GRAPH, *RANDOM))
def noise_of_torch():
    return taking(lambda self, x: base(self, x) + torch.rand(WIDTH))


@around(RANDOM, RANDOM)
def noise_of_python():
    return taking(lambda self, x: base(self, x) * random.random())


@around(RANDOM, RANDOM)
def noise_of_numpy():
    return taking(lambda self, x: base(self, x) * float(np.random.rand()))


@around(("generator", "Generator"), ("generator", "Generator"))
def noise_of_a_generator():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.source = torch.Generator().manual_seed(3)

        def forward(self, x):
            return super().forward(x) + torch.rand(WIDTH, generator=self.source)

    return Model()


@around(("random", *WRITES), ("random", *WRITES))
def layers_dropped_at_random():
    """LayerDrop: Python decides which layers run."""

    def forward(self, x):
        return self.last(x if torch.rand([]) < 0.5 else self.first(x))

    return taking(forward)


@around(("random", *WRITES), ("random", *WRITES))
def layers_dropped_by_python():
    """Two outcomes: that two draws are alike proves nothing."""

    def forward(self, x):
        return self.last(self.first(x) if random.random() < 0.7 else x)

    return taking(forward)


@around((*RANDOM, "seed"), (*RANDOM, "seed"))
def seed_set_inside():
    def forward(self, x):
        torch.manual_seed(5)
        return base(self, x) + torch.rand(WIDTH)

    return taking(forward)


@around((*RANDOM, "Generator"), (*RANDOM, "Generator"))
def generator_seeded_inside():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.source = torch.Generator()

        def forward(self, x):
            self.source.manual_seed(7)
            return super().forward(x) + torch.rand(WIDTH, generator=self.source)

    return Model()


@around(RANDOM, RANDOM)
def generators_put_back_inside():
    def forward(self, x):
        with torch.random.fork_rng(devices=[]):
            return base(self, x) + torch.rand(WIDTH)

    return taking(forward)


@around(RANDOM, RANDOM)
def generator_put_back_by_hand():
    def forward(self, x):
        state = torch.get_rng_state()
        y = base(self, x) + torch.rand(WIDTH)
        torch.set_rng_state(state)
        return y

    return taking(forward)


@around(RANDOM, RANDOM)
def seed_that_is_read():
    return taking(lambda self, x: base(self, x) * (torch.initial_seed() + 1))


@around((*RANDOM, "seed"), (*RANDOM, "seed"))
def seeds_of_python_and_numpy():
    def forward(self, x):
        random.seed(3)
        np.random.seed(3)
        return base(self, x)

    return taking(forward)


# Settings of the process ----------------------------------------------------------------------------------------------


@around(("set_num_threads",), ("set_num_threads",))
def threads_set_inside():
    def forward(self, x):
        torch.set_num_threads(1)
        return base(self, x)

    return taking(forward)


@around(("deterministic",), ("deterministic",))
def determinism_set_inside():
    def forward(self, x):
        torch.use_deterministic_algorithms(False)
        return base(self, x)

    return taking(forward)


@around()
def determinism_that_is_read():
    def world(stack):
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)

    return taking(
        lambda self, x: base(self, x) * (2 if torch.are_deterministic_algorithms_enabled() else 1), world=world
    )


@around(("dtype",), ("dtype",))
def default_dtype_set_inside():
    def forward(self, x):
        torch.set_default_dtype(torch.float32)
        return base(self, x)

    return taking(forward)


@around((GRAPH, "is_grad_enabled"), ("is_grad_enabled",))
def gradients_switched_off_for_good():
    def forward(self, x):
        torch.set_grad_enabled(False)
        return base(self, x)

    return taking(forward)


@around()
def kernels_of_attention_chosen_inside():
    def forward(self, x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return base(self, x)

    return taking(forward)


@around(("open",), ("open",))
def file_read_by_its_path(tmp="/proc/self/stat"):
    return taking(lambda self, x: base(self, x) * len(Path(tmp).read_text()) ** 0)


@around(("exists",), ("exists",))
def file_that_is_there_or_not():
    return taking(lambda self, x: base(self, x) * (2 if os.path.exists("/proc/self/stat") else 1))


# What else Python can hold --------------------------------------------------------------------------------------------


class Others:
    gain = 1.0


OTHERS = Others()
CHAIN = collections.ChainMap({}, {"gain": 1.0})
NUMBERS = array.array("d", [1.0])
ALL = weakref.WeakSet()  # type: ignore[var-annotated]
READY = threading.Event()
LOGGER = logging.getLogger("around")


@functools.cache
def cached_gain(factor):
    return GAIN * factor


def gained(change: Callable[[], Any], back: Callable[[], Any]) -> Callable[[contextlib.ExitStack], None]:
    """A change of the world, and how it is taken back."""

    def world(stack: contextlib.ExitStack) -> None:
        stack.callback(back)
        change()

    return world


@around()
def object_behind_a_weak_reference():
    class Model(Net):
        def __init__(self):
            super().__init__()
            self.settings = weakref.ref(OTHERS)

        def forward(self, x):
            return super().forward(x) * self.settings().gain

    return Case(Model(), world=gained(lambda: setattr(OTHERS, "gain", 3.0), lambda: setattr(OTHERS, "gain", 1.0)))


@around()
def function_whose_results_are_kept():
    def change():
        globals()["GAIN"] = 3.0
        cached_gain.cache_clear()

    def back():
        globals()["GAIN"] = 1.0
        cached_gain.cache_clear()

    def start(stack):
        cached_gain(2.0)  # so that its code does not run in the first calls

    return taking(lambda self, x: base(self, x) * cached_gain(2.0), start=start, world=gained(change, back))


@around()
def map_of_maps():
    world = gained(lambda: CHAIN.maps[1].update(gain=3.0), lambda: CHAIN.maps[1].update(gain=1.0))
    return taking(lambda self, x: base(self, x) * CHAIN["gain"], world=world)


@around()
def set_of_weak_references():
    world = gained(lambda: ALL.add(Net), ALL.clear)
    return taking(lambda self, x: base(self, x) * (1 + len(ALL)), world=world)


@around()
def event_between_threads():
    return taking(lambda self, x: base(self, x) * (2 if READY.is_set() else 1), world=gained(READY.set, READY.clear))


@around()
def level_of_a_logger():
    world = gained(lambda: LOGGER.setLevel(logging.DEBUG), lambda: LOGGER.setLevel(logging.NOTSET))
    return taking(lambda self, x: base(self, x) * (2 if LOGGER.isEnabledFor(logging.DEBUG) else 1), world=world)


@around(("array",), ("array",))
def numbers_in_an_array_of_python():
    world = gained(lambda: NUMBERS.__setitem__(0, 3.0), lambda: NUMBERS.__setitem__(0, 1.0))
    return taking(lambda self, x: base(self, x) * NUMBERS[0], world=world)
