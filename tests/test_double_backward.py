"""Second derivatives through optimised models, where eager attention has them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import fxbt
from fxbt.kernels.differentiable import attention_with_gradient

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.FxbtWarning")


def eager(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, scale: float | None = None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1) @ v


def operands(heads: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, 7, 8, generator=generator, dtype=dtype).requires_grad_() for h in (4, heads, heads)]


def second(call: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The gradients of the squared gradient of a projection."""
    out = call(*inputs)
    projection = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = [t for t in inputs if t.requires_grad]
    first = torch.autograd.grad((out * projection).sum(), wanted, create_graph=True)
    penalty = sum((g.square().sum() for g in first), torch.zeros(()))
    return [*first, *torch.autograd.grad(penalty, wanted)]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "grouped heads": {"enable_gqa": True},
}


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_differentiable_twice(kind: str, dtype: torch.dtype) -> None:
    options = VARIANTS[kind]
    given = {name: value for name, value in options.items() if name != "enable_gqa"}
    inputs = operands(2 if "enable_gqa" in options else 4, dtype)
    found = second(lambda *qkv: attention_with_gradient(*qkv, **options), inputs)
    expected = second(lambda *qkv: eager(*qkv, **given), inputs)
    for new, old in zip(found, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def test_third_derivatives_and_one_tensor_in_two_places() -> None:
    def cubed(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(call(x, x, x).pow(2).sum(), x, create_graph=True)
        (then,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(then.pow(2).sum(), x)[0]

    (x, *_) = operands(dtype=torch.float64)
    torch.testing.assert_close(cubed(attention_with_gradient, x), cubed(eager, x))


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2), (1, 2)])
def test_only_some_operands_require_gradients(wanted: tuple[int, ...]) -> None:
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(operands())]
    for new, old in zip(second(attention_with_gradient, inputs), second(eager, inputs), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def test_around_it_saved_tensor_hooks_and_checkpoints() -> None:
    inputs = operands()
    expected = second(eager, inputs)
    with save_on_cpu():
        saved = second(attention_with_gradient, inputs)
    again = second(lambda *qkv: checkpoint(attention_with_gradient, *qkv, use_reentrant=False), inputs)
    for new, other, old in zip(saved, again, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other, old, rtol=1e-4, atol=1e-5)


def test_under_autocast() -> None:
    inputs = operands()
    expected = second(eager, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = second(lambda *qkv: attention_with_gradient(*qkv).float(), inputs)
    for new, old in zip(found, expected, strict=True):
        assert float((new - old).detach().norm() / old.detach().norm()) < 0.1  # eight bits


def test_an_ordinary_backward_is_the_kernels_own() -> None:
    inputs = operands()
    out = attention_with_gradient(*inputs)
    plain = torch.nn.functional.scaled_dot_product_attention(*inputs)
    assert torch.equal(out, plain)
    for new, old in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(plain.sum(), inputs), strict=True):
        assert torch.equal(new, old)


class Written(nn.Module):
    """A layer with attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (2, 4)).transpose(1, 2) for linear in self.qkv)
        weights = (q @ k.mT / 2.0).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def pair() -> tuple[nn.Module, Any, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(Written(), Written()).train()
    return net, fxbt.optimize(net), copy.deepcopy(net)


def test_gradient_penalty() -> None:
    net, fast, original = pair()
    for i in range(2):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i))
        for model in (fast, original):
            model.zero_grad()
            given = x.clone().requires_grad_()
            (g,) = torch.autograd.grad(model(given).pow(3).sum(), given, create_graph=True)
            g.square().sum().backward()
        for p, q in zip(net.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    assert fast.report.hits["attention"] == 2
    assert not fast.report.fallbacks


def test_hessian_vector_product() -> None:
    net, fast, original = pair()
    x = torch.randn(2, 5, 8)

    def product(model: nn.Module) -> list[Tensor]:
        parameters = list(model.parameters())
        first = torch.autograd.grad(model(x).pow(2).sum(), parameters, create_graph=True)
        return list(torch.autograd.grad(sum((g.sum() for g in first), torch.zeros(())), parameters))

    for _ in range(2):
        for new, old in zip(product(fast), product(original), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-3)
    assert fast.report.hits["attention"] == 2


def test_an_inner_step_as_of_maml() -> None:
    """The loss after a step of descent on the inputs, differentiated through the step."""
    net, fast, original = pair()
    start = torch.randn(2, 5, 8)
    for _ in range(2):
        for model in (fast, original):
            model.zero_grad()
            x = start.clone().requires_grad_()
            (g,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
            model(x - 0.1 * g).square().mean().backward()
        for p, q in zip(net.parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    assert fast.report.hits["attention"] == 2
    assert not fast.report.fallbacks


def test_functions_of_torch_func_run_the_original() -> None:
    _, fast, original = pair()
    x = torch.randn(1, 2, 8)
    fast(x)
    torch.testing.assert_close(
        torch.func.hessian(lambda t: fast(t).square().sum())(x),
        torch.func.hessian(lambda t: original(t).square().sum())(x),
    )
    torch.testing.assert_close(
        torch.func.jvp(fast, (x,), (torch.ones_like(x),))[1],
        torch.func.jvp(original, (x,), (torch.ones_like(x),))[1],
    )
