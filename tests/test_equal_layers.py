"""Equal layers are traced once: the graph is that of the whole trace, and what differs is traced by itself."""

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import transformers
from torch import Tensor, nn

import fxbt
from fxbt.capture import equal_layers
from fxbt.capture.call import Binder
from fxbt.capture.capture import capture
from fxbt.capture.equal_layers import graph_difference, one_by_one
from fxbt.capture.export import Captured
from fxbt.errors import CaptureError

X = torch.randn(2, 3, 8)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def captured_twice(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Captured, Captured]:
    """With equal layers traced once, and each by itself."""
    call = Binder(model.forward, None).call(args, kwargs).copied()
    once = capture(model, call)
    with one_by_one():
        whole = capture(model, call)
    assert not whole.copied
    return once, whole


@pytest.mark.parametrize("case", models.CASES, ids=str)
def test_the_graph_is_that_of_the_whole_trace(case: models.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_layers, "LEAST", 2)
    once, whole = captured_twice(case.build(case.implementations[-1]), **case.inputs(3, 7, case.paddings[0]))
    assert graph_difference(once.module.graph, whole.module.graph) is None
    assert str(once.out_spec) == str(whole.out_spec)


class Casting(nn.Module):
    """What a layer gives is cast to the dtype that it has, as Gemma 3n does: the same tensor, by another node."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).to(x.dtype) * 2 for layer in self.layers])


def test_the_output_of_the_layer_that_was_traced_has_another_node_later() -> None:
    once, whole = captured_twice(Casting().eval(), X)
    assert once.copied == 4
    assert graph_difference(once.module.graph, whole.module.graph) is None


def bert(layers: int = 5) -> nn.Module:
    config = transformers.BertConfig(**{**models.ENCODER, "num_hidden_layers": layers})
    return models.enliven(transformers.BertModel(config).eval())


def llama(layers: int = 5, **settings: Any) -> nn.Module:
    sizes = {**models.ENCODER, "num_hidden_layers": layers, "num_key_value_heads": 2, "use_cache": False}
    return models.enliven(transformers.LlamaModel(transformers.LlamaConfig(**sizes, **settings)).eval())


@pytest.mark.parametrize("make", [bert, llama])
def test_a_model_of_equal_layers_is_traced_once_and_serves(make: Callable[[], nn.Module]) -> None:
    model = make()
    inputs = models.tokens(3, 7, "right")
    once, whole = captured_twice(model, **inputs)
    assert once.copied == 4
    assert graph_difference(once.module.graph, whole.module.graph) is None
    fast: Any = fxbt.optimize(model, verify=True)  # which compares both too
    for shape in ((3, 7), (2, 11), (3, 7)):
        inputs = models.tokens(*shape, "none")
        torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks
    assert fast.report.hits["attention"] == 5
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):  # each layer reads its own weights
            parameter.mul_(1 + 0.01 * (place % 7))
    torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    """One linear layer, what else it reads of itself, and what it may be told."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8))
        self.index = index

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.linear(x)) + self.shift
        return y if other is None else y * other


class Net(nn.Module):
    def __init__(self, kind: type[Layer] = Layer, layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(index) for index in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def check(model: nn.Module, copied: int, *args: Any) -> Captured:
    once, whole = captured_twice(model.eval(), *(args or (X,)))
    assert once.copied == copied
    assert graph_difference(once.module.graph, whole.module.graph) is None
    example = [torch.randn_like(tensor) for tensor in once.example]
    torch.testing.assert_close(once.module(*example)[0], model(*example))
    return once


def test_an_index_that_nobody_reads_is_no_difference() -> None:
    check(Net(), 4)
    check(Net(layers=2), 0)  # too few to be worth it


class Indexed(Layer):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x) * (1 + self.index)


class IndexedByName(Layer):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x) * getattr(self, "in" + "dex")


class IndexedByDict(Layer):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x) * vars(self)["index"]


class Scaled(Layer):
    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.scale = 1.0 + index

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x) * self.scale


class Windowed(Layer):
    """A window that the example is too short to show."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.window = 100 + index

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        places = torch.arange(x.shape[1])
        near = places[:, None] - places < self.window
        return super().forward(x + near.to(x.dtype).mean(-1)[:, None])


class Writing(Layer):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y.add_(1.0)


class WithLiteral(Layer):
    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x) + torch.tensor(2.0)


@pytest.mark.parametrize("kind", [Indexed, IndexedByName, IndexedByDict, Scaled, Windowed, Writing, WithLiteral])
def test_layers_that_differ_or_write_are_traced_by_themselves(kind: type[Layer]) -> None:
    check(Net(kind), 0)


def test_layers_in_groups() -> None:
    model = Net()
    model.layers[2].linear = nn.Linear(8, 8, bias=False)
    check(model, 3)
    model = Net().eval()
    model.layers[1].train()
    once, _ = captured_twice(model, X)
    assert once.copied == 3  # a flag that nothing reads, but no index
    model = Net()
    for layer in list(model.layers)[:2]:
        layer.linear = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    check(model, 3)  # one of the first two, two of the others


def test_hooks_methods_and_classes_make_a_difference() -> None:
    model = Net()
    model.layers[1].linear.register_forward_hook(lambda module, args, output: output * 2)
    check(model, 3)
    model = Net()
    model.layers[3].linear.forward = lambda x: x * 3
    check(model, 3)


class Tied(nn.Module):
    """Equal layers, of which one has its two weights in one."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [[nn.Linear(8, 8, bias=False) for _ in range(2)] for _ in range(5)]
        self.layers = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)
        self.layers[0][1].weight = self.layers[0][0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_tied_weights_are_a_difference() -> None:
    check(Tied(), 3)


class Residual(Net):
    """The first layer is told one tensor twice, the others two."""

    def forward(self, x: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, first)
        return x


def test_calls_are_equal_only_if_the_same_tensors_are_the_same() -> None:
    check(Residual(), 3)


class Narrowing(Net):
    """The sequence is shorter from the third layer on, which reads it by other strides than the fourth."""

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x[:, :1] if place == 2 else x)
        return x


def test_other_sizes_are_another_call() -> None:
    model = Narrowing()
    once, whole = captured_twice(model.eval(), X)
    assert once.copied == 2 and graph_difference(once.module.graph, whole.module.graph) is None


class Told(Layer):
    def forward(self, x: Tensor, other: Any = None) -> Tensor:
        return super().forward(x) * (other["step"] if isinstance(other, dict) else other)


class Telling(nn.Module):
    """Layers are told something by a loop: an argument, or what is in a box that all of them hold."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Told(index) for index in range(5))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        box: dict[str, int] = {}
        for step, layer in enumerate(self.layers):
            box["step"] = step + 2
            x = layer(x, box if self.how == "box" else box["step"])
        return x


@pytest.mark.parametrize("how", ["box", "number"])
def test_what_a_loop_tells_its_layers_counts(how: str) -> None:
    check(Telling(how), 0)


class Box:
    step = 0


class Boxed(Layer):
    box: Any

    def forward(self, x: Tensor, other: Any = None) -> Tensor:
        return super().forward(x) * self.box.step


class Leaving(nn.Module):
    """The loop leaves its step in an object that all layers hold, and clears it in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Boxed(index) for index in range(5))
        self.box = Box()
        self.box.step = 0
        for layer in self.layers:
            layer.box = self.box

    def forward(self, x: Tensor) -> Tensor:
        for step, layer in enumerate(self.layers):
            self.box.step = step + 2
            x = layer(x)
        self.box.step = 0
        return x


def test_what_a_loop_leaves_in_the_model_counts() -> None:
    check(Leaving(), 0)


def test_classes_are_as_they_were_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    kinds = [type(module) for module in model.modules()]
    check(model, 4)
    assert [type(module) for module in model.modules()] == kinds

    def failing(*_: Any) -> Any:
        raise OSError("injected")

    monkeypatch.setattr(equal_layers, "_nodes_behind", failing)
    with pytest.raises(CaptureError):
        captured_twice(model, X)
    assert [type(module) for module in model.modules()] == kinds
    assert model.layers[3].index == 3


def test_verify_refuses_a_graph_that_is_not_the_whole_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_layers, "differences", lambda one, other: set())
    model = Net(Scaled).eval()
    fast: Any = fxbt.optimize(model, verify=True)
    with pytest.warns(fxbt.FxbtWarning, match="layers that look equal gave different traces"):
        torch.testing.assert_close(fast(X), model(X))
    assert not fast.report.graphs


def test_with_gradients_each_layer_is_traced() -> None:
    with torch.enable_grad():
        once, whole = captured_twice(Net().eval(), X)
        assert not once.copied and graph_difference(once.module.graph, whole.module.graph) is None
