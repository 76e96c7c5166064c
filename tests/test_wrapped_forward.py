"""`forward` set on an optimised model or on its original: each keeps its own, and nothing calls itself for ever."""

import copy
import functools
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")

X = torch.randn(2, 5, 8)
BOTH = pytest.mark.parametrize("inplace", [False, True], ids=["twin", "in place"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def optimized(inplace: bool) -> tuple[Any, nn.Module]:
    """An optimised model and a copy of its original that nobody touches."""
    model = Net().eval()
    eager = copy.deepcopy(model)
    return fxbt.optimize(model, inplace=inplace), eager


def served(fast: Any) -> bool:
    return bool(fast.report.graphs) and fast.report.hits["attention"] == 1 and not fast.report.fallbacks


def plain(fast: Any, calls: list[str]) -> None:
    inner = fast.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append("")
        return inner(*args, **kwargs)

    fast.forward = wrapper


def updated(fast: Any, calls: list[str]) -> None:
    """As `accelerate.hooks.add_hook_to_module` does."""
    old = fast._old_forward = fast.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("")
        return module._old_forward(*args, **kwargs)

    fast.forward = functools.update_wrapper(functools.partial(new_forward, fast), old)


def rebound(fast: Any, calls: list[str]) -> None:
    """As `Accelerator.prepare` does for mixed precision: the function under the method is wrapped, and bound anew."""
    fast._original_forward = fast.forward
    function = fast.forward.__func__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append("")
        return function(self, *args, **kwargs)

    fast.forward = MethodType(counted, fast)


def by_class(fast: Any, calls: list[str]) -> None:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append("")
        return type(fast).forward(fast, *args, **kwargs)

    fast.forward = wrapper


WRAPPERS = [plain, updated, rebound, by_class]


@BOTH
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_a_wrapper_is_called_once_around_the_graph(wrap: Any, grad: bool, inplace: bool) -> None:
    fast, eager = optimized(inplace)
    calls: list[str] = []
    wrap(fast, calls)
    with torch.set_grad_enabled(grad):
        for count in (1, 2, 3):
            torch.testing.assert_close(fast(X), eager(X))
            assert len(calls) == count
    assert served(fast)


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_the_original_keeps_its_own_forward(wrap: Any) -> None:
    fast, eager = optimized(inplace=False)
    calls: list[str] = []
    wrap(fast, calls)
    original = fxbt.restore(fast)
    torch.testing.assert_close(original(X), eager(X))
    assert not calls and "forward" not in vars(original) and original.forward.__func__ is Net.forward


@BOTH
def test_restoring_leaves_the_wrapper_behind(inplace: bool) -> None:
    fast, eager = optimized(inplace)
    calls: list[str] = []
    plain(fast, calls)
    original = fxbt.restore(fast)
    torch.testing.assert_close(original(X), eager(X))
    assert not calls


@BOTH
def test_wrappers_of_wrappers_and_back(inplace: bool) -> None:
    fast, eager = optimized(inplace)
    own, calls = fast.forward, []
    for _ in range(3):
        plain(fast, calls)
    torch.testing.assert_close(fast(X), eager(X))
    assert len(calls) == 3
    fast.forward = own
    torch.testing.assert_close(fast(X), eager(X))
    assert len(calls) == 3 and served(fast)
    plain(fast, calls)
    del fast.forward
    torch.testing.assert_close(fast(X), eager(X))
    assert len(calls) == 3
    with pytest.raises(AttributeError):
        del fast.forward


def test_a_forward_set_on_the_original_runs_in_both() -> None:
    fast, eager = optimized(inplace=False)
    original = fxbt.restore(fast)
    torch.testing.assert_close(fast(X), eager(X))
    original.forward = lambda x: 2 * eager(x)  # type: ignore[method-assign]
    torch.testing.assert_close(fast(X), 2 * eager(X))
    del original.forward
    torch.testing.assert_close(fast(X), eager(X))


@BOTH
def test_warmup_goes_through_the_wrapper(inplace: bool) -> None:
    fast, _ = optimized(inplace)
    calls: list[str] = []
    plain(fast, calls)
    fast.warmup(X)
    assert len(calls) == 1 and served(fast)


@BOTH
def test_hooks_run_once_around_a_wrapper(inplace: bool) -> None:
    fast, eager = optimized(inplace)
    calls: list[str] = []
    plain(fast, calls)
    seen: list[Any] = []
    fast.register_forward_hook(lambda module, args, output: seen.append(module))
    torch.testing.assert_close(fast(X), eager(X))
    assert len(seen) == len(calls) == 1


@BOTH
def test_copies_take_their_wrapper_along(inplace: bool) -> None:
    fast, eager = optimized(inplace)
    calls: list[str] = []
    rebound(fast, calls)
    other = copy.deepcopy(fast)
    torch.testing.assert_close(other(X), eager(X))
    assert len(calls) == 1 and other.forward.__self__ is other
    other.layer.linear1.weight.data.zero_()
    assert not torch.allclose(other(X), fast(X))


def doubled(self: Any, x: Tensor) -> Tensor:
    return 2 * type(self).forward(self, x)


@BOTH
def test_a_pickle_takes_its_wrapper_along(inplace: bool) -> None:
    fast, eager = optimized(inplace)
    assert torch.allclose(pickle.loads(pickle.dumps(fast))(X), eager(X))
    fast.forward = functools.partial(torch.add, X)
    again = pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(again(X), 2 * X)


def test_replicas_and_new_instances_have_forwards_of_their_own() -> None:
    fast, eager = optimized(inplace=False)
    calls: list[str] = []
    plain(fast, calls)
    other = type(fast)().eval()
    assert type(other) is Net and not hasattr(other, "report")
    replica = fast._replicate_for_data_parallel()
    assert isinstance(replica, Net)
    torch.testing.assert_close(Net.forward(fast, X), eager(X))
    assert not calls


@BOTH
def test_autocast_as_accelerate_sets_it(inplace: bool) -> None:
    fast, eager = optimized(inplace)
    for model in (fast, eager):
        function = model.forward.__func__  # type: ignore[attr-defined]
        model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(function), model)  # type: ignore[method-assign]
    for _ in range(3):
        found, expected = fast(X.requires_grad_()), eager(X)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert not torch.is_autocast_enabled("cpu")
    assert served(fast), fast.report.fallbacks


@BOTH
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
def test_dynamo_goes_through_a_wrapper_once(wrap: Any, fullgraph: bool, inplace: bool) -> None:
    """It inlines what `model.forward` gives, and asks for it again where wrappers change."""
    if fullgraph and wrap is by_class:
        pytest.skip("dynamo takes the descriptor itself for `type(model).forward`, and says that it cannot call it")

    def doubling(model: Any) -> None:
        inner = model.forward
        model.forward = lambda *args, **kwargs: 2 * inner(*args, **kwargs)

    torch._dynamo.reset()
    fast, eager = optimized(inplace)
    own = fast.forward
    with torch.no_grad():
        compiled = torch.compile(fast, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(X), eager(X))
        wrap(fast, [])
        doubling(fast)
        torch.testing.assert_close(compiled(X), 2 * eager(X))
        doubling(fast)
        again = torch.compile(fast, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(again(X), 4 * eager(X))
        torch.testing.assert_close(fast(X), 4 * eager(X))
        fast.forward = own
        torch.testing.assert_close(again(X), eager(X))
        torch.testing.assert_close(compiled(X), eager(X))
    assert served(fast)
