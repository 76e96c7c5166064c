"""Gradients that a forward makes itself: right, or refused with the reason; what operations carry stays."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import fxbt
from fxbt.runtime import gradients

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.FxbtWarning")


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x + 1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] - grads[1]


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


scaled = Scaled.apply  # as most code names it, before anything traces


class Net(nn.Module):
    def __init__(self, body: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def with_reason(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.register_hook(lambda g: g * 0.1)
    return net.b(y)


def hook_removed(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.register_hook(lambda g: g * 0.1).remove()
    return net.b(y)


def hook_of_grad_fn(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.grad_fn.register_hook(lambda grads, _: (grads[0] * 3, *grads[1:]))  # type: ignore[union-attr]
    return net.b(y)


def hook_of_many(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    torch.autograd.graph.register_multi_grad_hook((y,), lambda grads: None)
    return net.b(y)


def kept_gradient(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.retain_grad()
    return net.b(y)


def detached_in_place(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return y * y.tanh().detach_()


def other_saved(net: Net, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.half(), lambda t: t.float()):
        return net.b(net.a(x).tanh())


def on_cpu(net: Net, x: Tensor) -> Tensor:
    with save_on_cpu():
        return net.b(net.a(x).tanh())


def own_gradient(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = net.a(x)
        (g,) = torch.autograd.grad(y.tanh().sum(), y, create_graph=True)
    return net.b(g)


def own_backward(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.sum().backward(retain_graph=True)
    return net.b(y)


def argument_requires(net: Net, x: Tensor) -> Tensor:
    return net.b(x.requires_grad_())


def other_data(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y.data = y.data * 2
    return net.b(y)


REFUSED: dict[str, tuple[Callable[[Net, Tensor], Any], str]] = {
    "function": (lambda net, x: net.encoder(scaled(net.a(x), 0.5)), "torch.autograd.Function, Scaled"),
    "two outputs": (lambda net, x: sum(Two.apply(net.a(x))), "torch.autograd.Function, Two"),
    "setup_context": (lambda net, x: net.b(WithSetup.apply(net.a(x))), "torch.autograd.Function, WithSetup"),
    "hook": (with_reason, "registers a hook on the gradient of a value"),
    "hook removed": (hook_removed, "registers a hook on the gradient of a value"),
    "hook of grad_fn": (hook_of_grad_fn, "grad_fn"),
    "hook of many": (hook_of_many, "grad_fn"),
    "retain_grad": (kept_gradient, "keeps the gradient of an intermediate value"),
    "detach_": (detached_in_place, "detaches a value in place"),
    "saved tensors": (other_saved, "how values are saved for the backward"),
    "save_on_cpu": (on_cpu, "how values are saved for the backward (save_on_cpu)"),
    "gradient": (own_gradient, "takes gradients itself"),
    "backward": (own_backward, "takes gradients itself"),
    "argument": (argument_requires, "requires_grad_"),
    "data": (other_data, ".data = ..."),
}


def ste(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.encoder(y + (y.round() - y).detach())


def attention(net: Net, x: Tensor, detach: str) -> Tensor:
    parts = {"q": net.a(x), "k": net.b(x), "v": net.a(x)}
    parts = {name: part.detach() if name in detach else part for name, part in parts.items()}
    scores = parts["q"] @ parts["k"].mT / 8**0.5
    weights = (scores.detach() if "s" in detach else scores).softmax(-1)
    return (weights.detach() if "w" in detach else weights) @ parts["v"]


def no_grad_part(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
        with torch.enable_grad():
            z = net.b(y) * 3
    return net.encoder(net.b(x) * y) + z


def function_without_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = scaled(net.a(x), 2.0)
    return net.b(x) + y


def inner_requires(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    return net.b(y.requires_grad_())


CARRIED: dict[str, Callable[[Net, Tensor], Any]] = {
    "straight through": ste,
    ".data": lambda net, x: net.b(net.a(x)) * net.a(x).data,
    "no_grad": no_grad_part,
    "function under no_grad": function_without_gradients,
    "requires_grad_ inside": inner_requires,
    "detached mean": lambda net, x: net.a(x) - net.a(x).mean(-1, keepdim=True).detach(),
    "detached gate": lambda net, x: net.a(x) * torch.sigmoid(net.a(x).detach()),
    **{f"attention without {part}": lambda net, x, part=part: attention(net, x, part) for part in "qkvsw"},
}


def train_twice(net: nn.Module, xs: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradients of the second of two steps, of a fixed projection of the output."""
    for x in xs:
        net.zero_grad()
        out = net(x)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {name: p.grad for name, p in net.named_parameters()}


def assert_equal_gradients(fast: nn.Module, original: nn.Module, xs: list[Tensor]) -> None:
    found, expected = train_twice(fast, xs), train_twice(original, xs)
    for name, old in expected.items():
        new = found[name]
        assert (new is None) == (old is None), name
        if new is not None and old is not None:
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def inputs(requires_grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 8, generator=generator).requires_grad_(requires_grad) for _ in range(2)]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_graph_does_not_carry_is_refused_with_the_line(kind: str) -> None:
    body, reason = REFUSED[kind]
    torch.manual_seed(0)
    net = Net(body).train()
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    found, expected = train_twice(fast, inputs()), train_twice(original, inputs())
    assert fast.report.latest is None
    assert reason in fast.report.fallbacks[0]
    assert "test_own_autograd.py:" in fast.report.fallbacks[0]
    for name, old in expected.items():
        assert (found[name] is None) == (old is None)
        assert old is None or torch.equal(found[name], old)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CARRIED)
def test_what_operations_say_is_in_the_graph(kind: str) -> None:
    torch.manual_seed(0)
    net = Net(CARRIED[kind]).train()
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    assert_equal_gradients(fast, original, inputs())
    assert fast.report.latest is not None
    assert not fast.report.fallbacks


@pytest.mark.parametrize("kind", ["function", "two outputs", "save_on_cpu", "detach_"])
def test_without_gradients_nothing_of_that_matters(kind: str) -> None:
    net = Net(REFUSED[kind][0]).eval()
    fast = fxbt.optimize(net)
    with torch.no_grad():
        for x in inputs():
            torch.testing.assert_close(fast(x), net.forward(x))
    assert fast.report.latest is not None
    assert not fast.report.fallbacks


def test_a_frozen_model_is_refused_too_as_it_may_be_thawed() -> None:
    net = Net(REFUSED["function"][0]).train().requires_grad_(False)
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    fast(inputs()[0])
    net.requires_grad_(True)
    original.requires_grad_(True)
    assert_equal_gradients(fast, original, inputs())
    assert fast.report.latest is None


def test_hooks_on_parameters_fire_once_a_step() -> None:
    fired: list[str] = []
    net = Net(lambda net, x: net.encoder(net.a(x))).train()
    fast = fxbt.optimize(net)
    net.a.weight.register_hook(lambda g: fired.append("hook"))
    net.a.bias.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    node = net.a.weight.expand_as(net.a.weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    node.register_hook(lambda *_: fired.append("as DDP does"))
    for x in inputs():
        fast(x).sum().backward()
    assert sorted(fired) == ["accumulated", "accumulated", "as DDP does", "as DDP does", "hook", "hook"]
    assert fast.report.latest is not None


def test_a_call_leaves_no_gradients_behind() -> None:
    net = Net(lambda net, x: net.encoder(net.a(x))).train()
    fast = fxbt.optimize(net)
    (x, _) = inputs(requires_grad=True)
    fast(x)
    assert fast.report.latest is not None
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("frozen", ["a", "encoder", "all but b"])
def test_partly_frozen_models(frozen: str) -> None:
    torch.manual_seed(0)
    net = Net(lambda net, x: net.b(net.encoder(net.a(x)))).train()
    for name, p in net.named_parameters():
        p.requires_grad_(not (name.startswith(frozen) or (frozen == "all but b" and not name.startswith("b"))))
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    assert_equal_gradients(fast, original, inputs())
    assert fast.report.hits["attention"] == 1
    net.requires_grad_(True)
    original.requires_grad_(True)
    assert_equal_gradients(fast, original, inputs())


def test_retained_graphs_and_accumulated_gradients() -> None:
    torch.manual_seed(0)
    net = Net(lambda net, x: net.b(net.encoder(net.a(x)))).train()
    original = copy.deepcopy(net)
    fast = fxbt.optimize(net)
    for model in (fast, original):
        for x in inputs():
            loss = model(x).square().sum()
            loss.backward(retain_graph=True)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for p, q in zip(net.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert fast.report.hits["attention"] == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_other_gradients_than_the_originals_refuse_the_graph(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours that changes derivatives alone, put in on purpose; also where dropout hides the outputs."""

    def spoiled(run: Callable[..., Any], *rest: Any) -> str | None:
        def detached(*tensors: Tensor) -> list[Tensor]:
            return [out + 0.5 * (out.detach() - out) for out in run(*tensors)]

        return gradients.gradient_difference(detached, *rest)

    monkeypatch.setattr("fxbt.runtime.compare.gradient_difference", spoiled)
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True).train()
    fast = fxbt.optimize(net)
    fast(inputs()[0])
    assert fast.report.latest is None
    assert "the gradient of" in fast.report.fallbacks[0]


def test_dropout_is_compared_at_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(run: Callable[..., Any], *rest: Any) -> str | None:
        return gradients.gradient_difference(lambda *tensors: [out * 1.01 for out in run(*tensors)], *rest)

    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True).train()
    fast = fxbt.optimize(net)
    fast(inputs()[0])
    assert fast.report.hits["attention"] == 1  # the numbers agree without what dropout draws
    monkeypatch.setattr("fxbt.runtime.compare.gradient_difference", spoiled)
    fast = fxbt.optimize(net)
    fast(inputs()[0])
    assert "without dropout" in fast.report.fallbacks[0]


def test_the_seed_goes_on_as_without_a_check() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).train()
    original = copy.deepcopy(net)
    torch.manual_seed(0)
    original(inputs()[0])
    expected = torch.rand(1)
    torch.manual_seed(0)
    fxbt.optimize(net)(inputs()[0])
    assert torch.equal(torch.rand(1), expected)


def test_a_capture_does_not_call_the_callers_hooks_with_its_own_values() -> None:
    packed: list[type] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(type(tensor))
        return tensor

    net = Net(lambda net, x: net.encoder(net.a(x))).train()
    fast = fxbt.optimize(net)
    original = copy.deepcopy(net)
    with saved_tensors_hooks(pack, lambda t: t):
        original(inputs()[0])
        expected, packed[:] = list(packed), []
        fast(inputs()[0])
    assert packed == expected
    assert fast.report.latest is not None


def test_a_trace_sees_no_function_of_another_thread() -> None:
    """While one model is traced, other threads apply their functions as ever."""
    import threading

    from fxbt.capture.own_autograd import refused

    x = torch.ones(2, requires_grad=True)
    found: list[Tensor] = []

    def other() -> None:
        scaled(x, 3.0).sum().backward()
        found.append(x.grad)  # type: ignore[arg-type]

    with refused((), (), lambda file: True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert torch.equal(found[0], torch.full((2,), 3.0))
