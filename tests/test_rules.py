"""The built-in rules below attention: every spelling they must catch, near misses with their reasons, numbers."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxbt
from fxbt.patterns import MLP, Activation, LayerNorm, ResidualNorm, RMSNorm, Rotary
from fxbt.testing import assert_rewrites, assert_untouched

WIDTH = 8
EPS = 1e-5


class Apply(nn.Module):
    """function(linear(x), weight, bias): something to compute before, so that x is no input."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x), self.weight, self.bias)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor]:
    return (torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype),)


def rms_norm_as_function(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


RMS_NORMS = {
    "mean of squares": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "sum over N": lambda x, w, b: w * (x * torch.rsqrt((x**2).sum(-1, keepdim=True) / WIDTH + EPS)),
    "norm": lambda x, w, b: w * x / torch.sqrt(x.norm(dim=-1, keepdim=True) ** 2 / WIDTH + EPS),
    "x * x": lambda x, w, b: x * (x * x).mean(-1, keepdim=True).add(EPS).rsqrt() * w,
    "division by sqrt": lambda x, w, b: w * (x / torch.sqrt(torch.mean(x * x, dim=2, keepdim=True) + EPS)),
    "fp32 upcast": lambda x, w, b: w * rms_norm_as_function(x.float(), 1.0, EPS).to(x.dtype),
    "power of -0.5": lambda x, w, b: x * (x.square().mean(-1, keepdim=True) + EPS).pow(-0.5) * w,
    "mean, then unsqueeze": lambda x, w, b: x * torch.rsqrt((x * x).mean(-1).unsqueeze(-1) + EPS) * w,
}
LAYER_NORMS = {
    "mean of squares": lambda x, w, b: (
        (x - x.mean(-1, keepdim=True))
        / torch.sqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + EPS)
        * w
        + b
    ),
    "var": lambda x, w, b: w * (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS) + b,
    "no bias": lambda x, w, b: w * (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS),
    "neither": lambda x, w, b: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + EPS),
    "sum over N": lambda x, w, b: (
        b + w * (x - x.sum(-1, True) / WIDTH) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    ),
}
ACTIVATIONS = {
    "erf gelu": lambda x, w, b: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "erf gelu, scaled last": lambda x, w, b: (x * (1 + torch.erf(x * 0.7071067811865475))) / 2,
    "tanh gelu": lambda x, w, b: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "tanh gelu, factored": lambda x, w, b: 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "tanh gelu, distributed": lambda x, w, b: 0.5 * x + 0.5 * x * torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x)),
    "quick gelu": lambda x, w, b: x * torch.sigmoid(1.702 * x),
    "silu": lambda x, w, b: x * torch.sigmoid(x),
    "silu by exp": lambda x, w, b: x / (1 + torch.exp(-x)),
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", RMS_NORMS)
def test_rms_norm(spelling: str, dtype: torch.dtype) -> None:
    report = assert_rewrites(RMSNorm(), Apply(RMS_NORMS[spelling]).eval().to(dtype), inputs(dtype), times=1)
    assert "rms_norm(" in report.after


@pytest.mark.parametrize("spelling", list(RMS_NORMS)[:6])
def test_one_rms_norm_written_as_a_torch_function_fires_on_every_spelling(spelling: str) -> None:
    rule = fxbt.rule(
        rms_norm_as_function,
        lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
        name="my_rms_norm",
        where=lambda m: isinstance(m.eps, float) and m.w.dim() == 1,
    )
    assert_rewrites(rule, Apply(RMS_NORMS[spelling]).eval(), inputs(), (torch.randn(1, 9, WIDTH),), times=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", LAYER_NORMS)
def test_layer_norm(spelling: str, dtype: torch.dtype) -> None:
    report = assert_rewrites(LayerNorm(), Apply(LAYER_NORMS[spelling]).eval().to(dtype), inputs(dtype), times=1)
    assert "layer_norm(" in report.after


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_activation(spelling: str, dtype: torch.dtype) -> None:
    assert_rewrites(Activation(), Apply(ACTIVATIONS[spelling]).eval().to(dtype), inputs(dtype), times=1)


NOT_NORMS = {
    "the mean of another axis": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w,
    "a sum": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * w,
    "the mean of cubes": lambda x, w, b: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * w,
    "the mean of another value": lambda x, w, b: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS) * w,
    "no epsilon": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * w,
    "epsilon outside the root": lambda x, w, b: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * w,
    "an epsilon of the weights": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + w[:1]) * w,
    "the biased variance": lambda x, w, b: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
    "times the root": lambda x, w, b: x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
}
NOT_ACTIVATIONS = {
    "gelu with another constant": lambda x, w, b: x * 0.5 * (1 + torch.erf(x / 1.4)),
    "tanh gelu with another cube": lambda x, w, b: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.0447 * x**3))),
    "silu of another value": lambda x, w, b: x * torch.sigmoid(x + 1e-3),
    "gated by another value": lambda x, w, b: x * torch.sigmoid(x * w),
    "a step in it": lambda x, w, b: x * torch.sigmoid(x) + torch.floor(x * 1e-9),
}


@pytest.mark.parametrize("rule", [RMSNorm(), LayerNorm()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("spelling", NOT_NORMS)
def test_not_a_norm(spelling: str, rule: fxbt.Rule) -> None:
    assert_untouched(rule, Apply(NOT_NORMS[spelling]).eval(), inputs())


def test_a_scale_per_position_is_no_norm_weight() -> None:
    model = Apply(lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * x.new_ones(5, 1))
    report = assert_rewrites(RMSNorm(), model.eval(), inputs(), times=1)
    assert "full(" in report.after, "the norm without weight is replaced, the scale stays outside"


@pytest.mark.parametrize("spelling", list(NOT_ACTIVATIONS)[:4])
def test_not_an_activation(spelling: str) -> None:
    assert_untouched(Activation(), Apply(NOT_ACTIVATIONS[spelling]).eval(), inputs())


def test_an_activation_beside_a_step_is_still_found() -> None:
    assert_rewrites(Activation(), Apply(NOT_ACTIVATIONS["a step in it"]).eval(), inputs(), times=1)


def test_a_value_inside_that_is_used_elsewhere_refuses() -> None:
    def leaking(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x * inverse * w, inverse

    reason = "a value inside the pattern is used elsewhere too"
    assert_untouched(RMSNorm(), Apply(leaking).eval(), inputs(), reason=reason)

    def leaking_gelu(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        curve = torch.erf(x / math.sqrt(2))
        return x * 0.5 * (1 + curve), curve

    reason = "a value inside gelu is used elsewhere too"
    assert_untouched(Activation(), Apply(leaking_gelu).eval(), inputs(), reason=reason)


def test_what_rounds_on_the_way_stays() -> None:
    def rounding(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).bfloat16().float() + EPS) * w

    reason = "an intermediate value is in torch.bfloat16, coarser than the result's torch.float32"
    assert_untouched(RMSNorm(), Apply(rounding).eval(), inputs(), reason=reason)


# --- fused blocks -----------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], gated: bool, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 16, bias=bias), nn.Linear(16, WIDTH, bias=bias)
        self.gate = nn.Linear(WIDTH, 16, bias=bias) if gated else None
        self.activation, self.dropout = activation, nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        return self.down(self.dropout(self.activation(hidden) if self.gate is None else hidden))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu, ACTIVATIONS["quick gelu"], ACTIVATIONS["tanh gelu"]])
def test_mlp(activation: Callable[..., Tensor], gated: bool) -> None:
    call = activation if activation in (F.gelu, F.relu, F.silu) else lambda x: activation(x, None, None)
    assert_rewrites(MLP(), FeedForward(call, gated, bias=not gated).eval(), inputs(), times=1)


def test_not_an_mlp() -> None:
    assert_untouched(MLP(), FeedForward(lambda x: x.softmax(-1), gated=False).eval(), inputs())
    assert_untouched(MLP(), FeedForward(lambda x: F.layer_norm(x, x.shape[-1:]), gated=False).eval(), inputs())


def test_an_mlp_in_training_keeps_its_dropout() -> None:
    model = FeedForward(F.gelu, gated=False).train()
    fast = fxbt.optimize(model)
    (x,) = inputs()
    fast(x)
    assert fast.report.hits["mlp"] == 1
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), expected), "the node is the nodes that it stands for"


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def half_split_by_slices(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin + cos * x


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = torch.stack((-x[:, :, 1::2], x[:, :, ::2]), dim=-1).flatten(-2)
    return (x * cos) + (rotated * sin)


def wrong_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([second, -first], -1) * sin


def wrong_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 2:], x[..., :2]), dim=-1) * sin


@pytest.mark.parametrize("rotate", [half_split, half_split_by_slices, interleaved])
def test_rotary(rotate: Callable[..., Tensor]) -> None:
    assert_rewrites(Rotary(), Apply(lambda x, w, b: rotate(x, w.cos(), w.sin())).eval(), inputs(), times=1)


@pytest.mark.parametrize("rotate", [wrong_sign, wrong_half])
def test_not_rotary(rotate: Callable[..., Tensor]) -> None:
    assert_untouched(Rotary(), Apply(lambda x, w, b: rotate(x, w.cos(), w.sin())).eval(), inputs())


def test_residual_norm() -> None:
    model = Apply(lambda x, w, b: F.layer_norm(x + torch.tanh(x), (WIDTH,), w, b)).eval()
    assert_rewrites(ResidualNorm(), model, inputs(), times=1)


def test_a_residual_sum_that_is_used_elsewhere_is_no_residual_norm() -> None:
    def pre_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total = x + torch.tanh(x)
        return torch.exp(total) * F.layer_norm(total, (WIDTH,), w, b)

    assert_untouched(
        ResidualNorm(), Apply(pre_norm).eval(), inputs(), reason="a value inside the block is used outside it"
    )


class Scaled(nn.Module):
    """Nearly an RMS norm: the sum of squares is divided by another number than theirs."""

    def __init__(self, count: int):
        super().__init__()
        self.count, self.weight = count, nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / self.count + 1e-6) * self.weight


@pytest.mark.parametrize("count", [8, 32])
def test_a_near_miss_counts_no_more_ops_than_the_pattern_has(count: int) -> None:
    fast = fxbt.optimize(Scaled(count).eval())
    with torch.no_grad():
        fast(torch.randn(2, 5, 16))
    counted = [(miss.matched, miss.total) for miss in fast.report.misses if miss.total]
    assert counted
    assert all(matched <= total for matched, total in counted)
