"""Submodules that are called by themselves: graphs of their own, and nothing else changes."""

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")

WIDTH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x).relu())


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.blocks, self.head = Encoder(), nn.ModuleList([Block()]), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))

    def by_parts(self, x: Tensor) -> Tensor:
        """What `generate` does: parts are called, the whole is not."""
        return self.head(self.encoder(x))


def x(batch: int = 2, length: int = 3) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(batch * 10 + length))


@pytest.fixture(params=[False, True], ids=["twin", "inplace"])
def pair(request: Any) -> tuple[Whole, Any]:
    """A model, and the same optimised; in place, the first is a copy."""
    torch.manual_seed(0)
    model = Whole().eval()
    if request.param:
        return copy.deepcopy(model), fxbt.optimize(model, inplace=True)
    return model, fxbt.optimize(model)


def graphs_of(part: Any) -> list[Any]:
    return list(type(part)._fxbt_dispatcher.graphs)


def served(part: Any) -> int:
    return sum(graph.served for graph in graphs_of(part))


def test_a_part_that_is_called_by_itself_has_graphs(pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    with torch.no_grad():
        for batch, length in ((2, 3), (4, 5), (1, 7)):
            torch.testing.assert_close(fast.by_parts(x(batch, length)), model.by_parts(x(batch, length)))
    assert len(graphs_of(fast.encoder)) == 1 and served(fast.encoder) == 3
    assert list(fast.report.parts) == ["encoder"] and not fast.report.parts["encoder"].fallbacks
    assert not fast.report.graphs and "encoder, called directly" in str(fast.report)
    assert fast.report.parts["encoder"] is fast.encoder.report


def test_the_whole_has_no_graphs_of_parts(pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    for _ in range(3):
        torch.testing.assert_close(fast(x()), model(x()))
    assert served(fast) == 3 and not fast.report.parts and not graphs_of(fast.encoder)


def test_where_the_whole_runs_its_original_so_do_its_parts() -> None:
    class Drawing(Whole):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if random.random() < 2 else 0.0)

    fast: Any = fxbt.optimize(Drawing().eval())
    for _ in range(3):
        torch.testing.assert_close(fast(x()), fxbt.restore(fast)(x()))
    assert fast.report.fallbacks and not fast.report.parts and not graphs_of(fast.encoder)


def test_the_original_has_no_graphs() -> None:
    model = Whole().eval()
    fast: Any = fxbt.optimize(model)
    fast.by_parts(x()), fast.by_parts(x())
    before = served(fast.encoder)
    model.by_parts(x()), model.encoder(x()), dict(fast.named_modules())["encoder"](x())
    assert served(fast.encoder) == before == 2
    assert type(model.encoder) is Encoder and type(model.encoder.first) is Block
    assert not any(hasattr(part, "_fxbt_dispatcher") for part in model.modules())
    assert list(fast.state_dict()) == list(Whole().state_dict())


def test_what_is_handed_out(pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    assert isinstance(fast.encoder, Encoder) and type(fast.encoder).__name__ == "Encoder"
    assert fast.encoder is fast.encoder and fast.encoder.first is fast.encoder.first
    assert type(fast.head) is nn.Linear and type(fast.blocks) is nn.ModuleList and type(fast.blocks[0]) is Block
    assert fast.get_submodule("encoder") is fast.encoder
    assert vars(fast.encoder) is vars(dict(fast.named_modules())["encoder"])
    with pytest.raises(AttributeError, match="decoder"):
        fast.decoder(x())
    assert not hasattr(fast.encoder, "third")


def test_parts_inside_parts() -> None:
    fast: Any = fxbt.optimize(Whole().eval())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast.encoder.first(x()), fxbt.restore(fast).encoder.first(x()))
    assert list(fast.report.parts) == ["encoder.first"] and served(fast.encoder.first) == 3


def test_changed_weights(pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    with torch.no_grad():
        for factor in (1.0, 2.0, -1.0):
            for each in (model, fast):
                each.encoder.first.linear.weight.mul_(factor)
            torch.testing.assert_close(fast.by_parts(x()), model.by_parts(x()))
        state = {name: value + 1 for name, value in model.state_dict().items()}
        model.load_state_dict(state), fast.load_state_dict(state)
        torch.testing.assert_close(fast.by_parts(x()), model.by_parts(x()))
        for each in (model, fast):
            each.encoder.first.linear.weight.data[0] = 3.0
        fxbt.refresh(fast)
        torch.testing.assert_close(fast.by_parts(x()), model.by_parts(x()))
        for each in (model, fast):
            torch.manual_seed(3)
            each.encoder = Encoder().eval()
        torch.testing.assert_close(fast.by_parts(x()), model.by_parts(x()))
    assert isinstance(fast.encoder, Encoder) and not fast.report.fallbacks


def test_training_and_gradients(pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    for is_training in (False, True):
        model.train(is_training), fast.train(is_training)
        for each in (model, fast):
            each.zero_grad()
        for _ in range(2):
            torch.manual_seed(5)
            fast.by_parts(x()).square().sum().backward()
            torch.manual_seed(5)
            model.by_parts(x()).square().sum().backward()
        for new, old in zip(fast.parameters(), model.parameters(), strict=True):
            assert (new.grad is None) == (old.grad is None)
            torch.testing.assert_close(new.grad, old.grad)
    assert len(graphs_of(fast.encoder)) == 2 and not fast.report.parts["encoder"].fallbacks


def test_hooks(pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    seen: list[Tensor] = []
    handle = fast.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for _ in range(3):
            fast.by_parts(x())
        assert len(seen) == 3 and served(fast.encoder) == 3  # around its graph
        handle.remove()
        inner = fast.encoder.first.register_forward_hook(lambda module, args, output: output * 2)
        expected = fast.head(dict(fast.named_modules())["encoder"](x()))
        assert not torch.allclose(expected, fast.head(seen[0]))
        torch.testing.assert_close(fast.by_parts(x()), expected)
        assert "has a hook" in fast.report.parts["encoder"].fallbacks[0]
        inner.remove()
        torch.testing.assert_close(fast.by_parts(x()), model.by_parts(x()))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(duplicate: Callable[[Any], Any], pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    fast.by_parts(x())
    for other in (duplicate(fast), fxbt.optimize(Whole().eval())):
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other.by_parts(x()), model.by_parts(x()))
        assert other.encoder is not fast.encoder and len(graphs_of(other.encoder)) == 1
    part = duplicate(fast.encoder)
    assert type(fxbt.restore(part)) is Encoder and part.first.linear.weight is not fast.encoder.first.linear.weight
    torch.testing.assert_close(part(x()), model.encoder(x()))


def test_a_part_that_is_set_is_the_submodule(pair: tuple[Whole, Any]) -> None:
    _, fast = pair
    fast.encoder = fast.encoder
    fast.encoder.second = fast.encoder.first
    found = dict(fast.named_modules())
    assert type(found["encoder"]) is Encoder and type(found["encoder.first"]) is Block
    other: Any = nn.Sequential(fast.encoder, nn.ReLU()).eval()
    torch.testing.assert_close(other(x()), found["encoder"](x()).relu())
    assert fxbt.restore(fast.encoder) is found["encoder"]


def test_a_part_with_names_of_ours_is_left_alone() -> None:
    class Told(Block):
        def report(self) -> str:
            return "mine"

    class Holding(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.told, self.fast = Told(), fxbt.optimize(Block().eval())

    fast: Any = fxbt.optimize(Holding().eval())
    assert fast.told.report() == "mine" and type(fast.told) is Told
    assert fast.fast is dict(fast.named_modules())["fast"]


def test_a_class_that_cannot_be_subclassed_is_left_alone() -> None:
    class Final(Block):
        def __init_subclass__(cls) -> None:
            raise TypeError("no subclasses")

    fast: Any = fxbt.optimize(nn.Sequential(Final(), nn.ReLU()).eval())
    fast[0](x())
    assert type(fast[0]) is Final

    class Holding(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.final = Final()

    fast = fxbt.optimize(Holding().eval())
    assert type(fast.final) is Final and torch.equal(fast.final(x()), fxbt.restore(fast).final(x()))
    assert not fast.report.fallbacks


def test_torch_compile_sees_the_submodules(pair: tuple[Whole, Any]) -> None:
    model, fast = pair
    fast.by_parts(x())
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x()), model(x()))
    assert not fast.report.fallbacks


def test_saved_graphs_of_parts(tmp_path: Any) -> None:
    model = Whole().eval()
    fast: Any = fxbt.optimize(model)
    fast.by_parts(x())
    assert len(fxbt.save(fast, tmp_path)) == 1
    again: Any = fxbt.load(tmp_path, model)
    again.by_parts(x())
    assert graphs_of(again.encoder)[0].is_stored


def test_a_model_is_gone_with_its_parts() -> None:
    fast: Any = fxbt.optimize(Whole().eval())
    fast.by_parts(x())
    kept = graphs_of(fast.encoder)[0]
    seen = weakref.ref(kept)
    del fast, kept
    gc.collect()
    assert seen() is None


def test_strict_holds_for_parts() -> None:
    class Sparse(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to_dense())

    class Holding(Whole):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Sparse()

    fast: Any = fxbt.optimize(Holding().eval(), strict=True)
    with pytest.raises(fxbt.FallbackError, match="sparse"):
        fast.encoder(x().to_sparse())
