"""Wrappers in any order: what libraries and users put around and into a model, before and after `optimize`.

The same wrappers in the same order around the same model without fxbt give what is expected: outputs, gradients and
what hooks were told.
"""

import copy
import functools
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from around import WIDTH, Adapter, Net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxbt

pytestmark = pytest.mark.filterwarnings("ignore")

LOG: list[str] = []


class Checkpointed(nn.Module):
    """Recomputes the module it holds in backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def unwrapped(net: nn.Module) -> nn.Module:
    """The model itself, under modules that hold it whole."""
    for name in ("module", "inner", "_orig_mod"):
        if name in net._modules:
            return unwrapped(net._modules[name])
    return net


def adapters(net: nn.Module) -> nn.Module:
    body = unwrapped(net)
    body.last = Adapter(body.last)
    return net


def cast_forward(net: nn.Module) -> nn.Module:
    """As Accelerate's mixed precision."""
    inner = net.forward
    net._original_forward = inner
    if hasattr(inner, "__func__"):
        net.forward = types.MethodType(torch.autocast("cpu", dtype=torch.bfloat16)(inner.__func__), net)
    else:
        net.forward = torch.autocast("cpu", dtype=torch.bfloat16)(inner)
    return net


def wrapped_forward(net: nn.Module) -> nn.Module:
    inner = net.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        LOG.append("wrapper")
        return inner(*args, **kwargs) * 2

    net.forward = forward
    return net


def hooks(net: nn.Module) -> nn.Module:
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.register_forward_hook(tells)
    return net


def tells(module: nn.Module, args: Any, output: Any) -> Any:
    LOG.append("hook")
    return output * 3


def hook_on_a_part(net: nn.Module) -> nn.Module:
    unwrapped(net).first.register_forward_hook(tells)
    return net


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")


def distributed(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "adapters": adapters,
    "cast forward": cast_forward,
    "wrapped forward": wrapped_forward,
    "hooks": hooks,
    "hook on a part": hook_on_a_part,
    "checkpoint": Checkpointed,
    "compile": compiled,
    "ddp": distributed,
    "copy": copy.copy,
}
# Copies and pickles of models whose forward was set on the object, and of process groups, fail or share state without
# fxbt too: these two are drawn with the others that can be copied.
COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
}
COPIED_WITH = ("adapters", "copy")
OPTIMIZE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "optimize": fxbt.optimize,
    "optimize in place": functools.partial(fxbt.optimize, inplace=True),
}


def again(net: nn.Module) -> nn.Module:
    """Restores and optimises anew, where it is the optimised model itself that is held."""
    is_optimized = isinstance(getattr(net, "report", None), fxbt.explain.report.Report)
    return fxbt.optimize(fxbt.restore(net)) if is_optimized else net


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def orders() -> st.SearchStrategy[list[str]]:
    """2 to 4 wrappers in some order, `optimize` among them."""
    wrapping = st.lists(st.sampled_from(sorted(WRAPPERS)), min_size=1, max_size=3, unique=True)
    copying = st.lists(st.sampled_from([*COPIED_WITH, *COPIES]), min_size=1, max_size=3, unique=True)
    optimizing = st.sampled_from([*OPTIMIZE, "optimize again"])

    def with_optimize(drawn: tuple[list[str], str, int]) -> list[str]:
        names, optimize, place = drawn
        place %= len(names) + 1
        return [*names[:place], *(optimize.split(" again") if "again" in optimize else [optimize]), *names[place:]]

    return st.tuples(st.one_of(wrapping, copying), optimizing, st.integers(0, 3)).map(with_optimize)


def applied(names: list[str], net: nn.Module, with_fxbt: bool) -> nn.Module:
    for name in names:
        if name in OPTIMIZE or name == "":
            net = (OPTIMIZE[name] if name else again)(net) if with_fxbt else net
        else:
            net = {**WRAPPERS, **COPIES}[name](net)
    return net


def seen(net: nn.Module) -> list[Any]:
    """Outputs, gradients and the log of two calls at inference and two in training."""
    found: list[Any] = []
    for step in range(4):
        LOG.clear()
        x = torch.linspace(-1, 1, 2 * (4 + step) * WIDTH).view(2, 4 + step, WIDTH)
        net.zero_grad()
        with torch.set_grad_enabled(step > 1):
            y = net(x)
        if step > 1:
            y.float().square().mean().backward()
            found.append({name: p.grad for name, p in net.named_parameters()})
        found += [y.detach(), list(LOG)]
    return found


def same(new: Any, old: Any) -> None:
    # bfloat16 has 8 bits: where forward runs under autocast, two orders of rounding are off by 2 % of the largest.
    if isinstance(old, torch.Tensor):
        assert new.dtype is old.dtype and new.shape == old.shape
        torch.testing.assert_close(new.float(), old.float(), rtol=0, atol=4e-2 * max(float(old.abs().max()), 1e-3))
    elif isinstance(old, dict):
        assert list(new) == list(old)
        for name in old:
            same(new[name], old[name])
    elif isinstance(old, list) and old and not isinstance(old[0], str):
        for pair in zip(new, old, strict=True):
            same(*pair)
    else:
        assert new == old


@settings(max_examples=15, deadline=None, derandomize=True)
@given(orders())
def test_any_order_of_wrappers(names: list[str]) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Net().eval()
    eager = applied(names, copy.deepcopy(model), with_fxbt=False)
    expected = seen(eager)
    fast = applied(names, model, with_fxbt=True)
    try:
        same(seen(fast), expected)
    finally:
        torch.set_autocast_enabled("cpu", False)  # a crash inside autocast must not show in the orders after it


SINGLE = [[optimize, name] for name in (*WRAPPERS, *COPIES) for optimize in OPTIMIZE]


@pytest.mark.parametrize("names", SINGLE, ids=", ".join)
def test_one_wrapper_after_optimize(names: list[str]) -> None:
    test_any_order_of_wrappers.hypothesis.inner_test(names)
