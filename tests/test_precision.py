"""Linears in bfloat16 and int8: the numbers against float64, what follows the weights, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import ENCODER, VOCAB, huggingface
from tracing import Function

import fxbt
import fxbt.lower.cpu.precision
import fxbt.lower.program
from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.lower.cpu.precision import Bfloat16, Int8, Int8Linear, channel_steps, channel_sums, in_steps
from fxbt.options import Options
from fxbt.pipeline import compile as compile_graph

POINTWISE = torch.ops.mkldnn._linear_pointwise.default

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 kernels for this CPU"
)
needs_int8 = pytest.mark.skipif(
    not fxbt.lower.cpu.precision.can_quantize_here(), reason="this CPU has no AVX512-VNNI, or torch no oneDNN"
)
precisions = pytest.mark.parametrize(
    "options",
    [
        pytest.param({"dtype": torch.bfloat16}, marks=needs_bfloat16, id="bfloat16"),
        pytest.param({"quantize": "int8"}, marks=needs_int8, id="int8"),
    ],
)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return self.second(F.gelu(self.first(x))) + x


def computed_in(precision):
    """Options with a precision that this machine may have no instructions for: the graph is looked at, not run."""
    options = Options()
    object.__setattr__(options, "precision", precision)
    return options


def near(actual, expected):
    """Within 5 % of their size: bfloat16 rounds by 2^-9, int8 by half of 1/127 of a token's and a channel's largest
    value, some 1 % of a result that many products cancel in, and the models here have up to a dozen in a row."""
    assert actual.shape == expected.shape and actual.dtype is expected.dtype
    assert (actual - expected).norm() <= 0.05 * expected.norm()


@precisions
def test_linears_compute_in_the_precision_asked_for(options, lowered):
    model, x = Block().eval(), torch.randn(3, 5, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = fxbt.optimize(model, (x,), **options)
    assert F.linear not in lowered
    for shape in ((1, 32), (2, 5, 32), (2, 1, 300, 32), (32,)):
        x = torch.randn(shape)
        near(fast(x), model(x))
        assert not torch.equal(fast(x), model(x))
    assert all(p.dtype is torch.float32 for p in fast.parameters()) and fast(x).dtype is torch.float32
    assert fast.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())


@precisions
def test_the_report_tells_the_error(options):
    fast = fxbt.optimize(Block().eval(), (torch.randn(3, 5, 32),), **options)
    graph = fast.report.latest
    assert 1e-5 < graph.error < 3e-2
    name = options.get("quantize", "bfloat16")
    assert graph.precision == name and f"linear layers in {name}: outputs differ by up to {graph.error:.1e}" in str(
        fast.report
    )


@precisions
def test_weights_that_change_are_followed(options):
    model, x = Block().eval(), torch.randn(3, 5, 32)
    fast = fxbt.optimize(model, (x,), **options)
    for change in (
        lambda: model.first.weight.neg_(),
        lambda: model.load_state_dict(Block().state_dict()),
        lambda: model.second.weight.data.mul_(2),
    ):
        change()
        near(fast(x), model(x))


@precisions
def test_with_gradients_the_precision_stays(options):
    model, x = Block().eval(), torch.randn(3, 5, 32)
    fast = fxbt.optimize(model, **options)
    with torch.enable_grad():
        fast(x)
        torch.testing.assert_close(fast(x), model(x))
    assert fast.report.latest.precision is None and "outputs differ by" not in str(fast.report)


@precisions
def test_copies_keep_the_precision(options):
    x = torch.randn(3, 5, 32)
    fast = fxbt.optimize(Block().eval(), (x,), **options)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        other(x)
        assert torch.equal(other(x), fast(x)) and other.report.latest.precision == fast.report.latest.precision


@precisions
def test_padded_batches_agree_on_valid_tokens(options):
    model = huggingface("BertModel", **ENCODER)("eager").eval()
    ids = torch.randint(3, VOCAB, (4, 12))
    mask = (torch.arange(12) < torch.tensor([12, 5, 3, 9])[:, None]).long()
    fast = fxbt.optimize(model, {"input_ids": ids, "attention_mask": mask}, **options)
    for length in (12, 9):
        call = {"input_ids": ids[:, :length], "attention_mask": mask[:, :length]}
        valid = call["attention_mask"].bool()
        near(fast(**call).last_hidden_state[valid], model(**call).last_hidden_state[valid])
    assert fast.report.latest.calls["packed"] == 3


def test_other_values_are_refused():
    for options, problem in (
        ({"dtype": torch.float16}, "dtype is torch.float16, expected None"),
        ({"quantize": "int4"}, "quantize is 'int4', expected None or 'int8'"),
        ({"quantize": torch.int8}, "quantize is torch.int8, expected None or 'int8'"),
        (
            {"dtype": torch.bfloat16, "quantize": "int8"},
            "both set the precision of linear layers; pass only one of them",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            fxbt.optimize(Block(), **options)


def test_a_cpu_without_the_instructions_is_refused(monkeypatch):
    monkeypatch.setattr(fxbt.lower.cpu.precision, "is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="needs a CPU with AVX512-VNNI"):
        fxbt.optimize(Block(), quantize="int8")


# What int8 is off by


def quantized(x, weight, bias=None):
    steps = channel_steps(weight)
    levels = in_steps(weight, steps)
    packed = torch.ops.onednn.qlinear_prepack(levels, None)
    return Int8Linear(len(weight))(x, packed, steps, channel_sums(levels, steps), bias)


def bound(x, weight):
    """What rounding both factors to half a step moves a sum of products by, and float32's own rounding of the sum."""
    x, weight = x.double(), weight.double()
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    step, steps = (high - low) / 254, weight.abs().amax(1) / 127
    by_inputs = step / 2 * (weight.abs() + steps[:, None] / 2).sum(1)
    by_weights = x.abs().sum(-1, keepdim=True) * steps / 2
    by_float32 = 1e-6 * (x.abs().sum(-1, keepdim=True) * weight.abs().amax(1) + 1)
    return by_inputs + by_weights + by_float32


@needs_int8
@pytest.mark.parametrize("shift", [-4.0, 0.0, 4.0, 1e6], ids=["negative", "both", "positive", "far from 0"])
@pytest.mark.parametrize("n, k", [(1, 1), (5, 7), (64, 384), (33, 3072)])
def test_int8_is_off_by_no_more_than_its_steps(n, k, shift):
    weight, bias = torch.randn(n, k) * torch.rand(n, 1), torch.randn(n)
    for rows in (1, 3, 40):
        x = torch.randn(rows, k) * torch.rand(rows, 1) + shift
        error = (quantized(x, weight, bias).double() - F.linear(x.double(), weight.double(), bias.double())).abs()
        assert (error <= bound(x, weight)).all()


@needs_int8
def test_a_token_does_not_depend_on_those_beside_it():
    weight, x = torch.randn(64, 384), torch.randn(40, 384)
    alone = torch.cat([quantized(row[None], weight) for row in x])
    x[7] *= 1e4
    alone[7] = quantized(x[7:8], weight)[0]
    assert torch.equal(quantized(x, weight), alone)


@needs_int8
def test_the_longest_sum_does_not_overflow():
    k = fxbt.lower.cpu.precision.LONGEST_SUM
    x = torch.ones(2, k)
    x[:, 0] = -1  # all others are at the highest level
    for weight in (torch.ones(3, k), -torch.ones(3, k)):
        exact = F.linear(x.double(), weight.double())
        torch.testing.assert_close(quantized(x, weight).double(), exact, rtol=1e-5, atol=0)


@needs_int8
def test_int8_takes_every_input():
    weight, bias = torch.randn(8, 6), torch.randn(8)
    inputs = [torch.randn(2, 9, 12)[..., ::2], torch.randn(9, 2, 6).transpose(0, 1), torch.randn(6), torch.ones(3, 6)]
    inputs += [torch.zeros(3, 6), 1e-35 * torch.randn(3, 6), 1e-9 * torch.randn(3, 6), torch.empty(2, 0, 6)]
    for x in inputs:
        before, exact = x.clone(), F.linear(x, weight, bias)
        assert quantized(x, weight, bias).shape == exact.shape and torch.equal(x, before)
        assert ((quantized(x, weight, bias) - exact).abs() <= bound(x, weight)).all()
    tiny = 1e-9 * torch.randn(4, 6)  # far below the smallest step that torch's own choice of steps takes
    error = (quantized(1e9 * tiny, weight) * 1e-9 - quantized(tiny, weight)).abs()
    assert (error <= 2e-9 * bound(1e9 * tiny, weight)).all()
    weight[3] = 0
    assert torch.equal(quantized(inputs[0], weight, bias)[..., 3], bias[3].expand(2, 9))


@needs_int8
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(value):
    weight, x = torch.randn(8, 6), torch.randn(4, 6)
    exact = quantized(x, weight)
    x[1, 2] = value
    result = quantized(x, weight)
    assert not result[1].isfinite().any()
    assert torch.equal(result[[0, 2, 3]], exact[[0, 2, 3]])
    weight[3, 1] = value
    assert not quantized(torch.randn(4, 6), weight)[:, 3].isfinite().any()


@needs_int8
def test_every_linear_is_quantized(lowered):
    compile_graph(capture(model := Block().eval(), make_call(model, torch.randn(3, 5, 32))), (), computed_in(Int8))
    assert [type(target) for target in lowered].count(Int8Linear) == 2 and F.linear not in lowered


@needs_int8
def test_a_weight_used_twice_is_quantized_once():
    model = Function(lambda x, w: F.linear(F.linear(x, w), w), w=torch.randn(6, 6)).eval()
    compiled = compile_graph(capture(model, make_call(model, torch.randn(3, 6))), (), computed_in(Int8))
    assert compiled.derived_bytes == 6 * 6 + 2 * 6 * 4  # the weight in bytes; steps and sums of its channels in float32


@needs_int8
def test_sums_that_could_overflow_stay(monkeypatch, lowered):
    monkeypatch.setattr(fxbt.lower.cpu.precision, "LONGEST_SUM", 5)
    model = Function(lambda x, w: F.linear(x, w), w=torch.randn(8, 6)).eval()
    compile_graph(capture(model, make_call(model, torch.randn(3, 6))), (), computed_in(Int8))
    assert lowered == [F.linear]


@needs_bfloat16
def test_a_bfloat16_linear_takes_the_one_before_as_it_is(lowered):
    compile_graph(capture(model := Block().eval(), make_call(model, torch.randn(3, 5, 32))), (), computed_in(Bfloat16))
    assert lowered.count(POINTWISE) == 2
    assert lowered.count(torch.Tensor.to) == 2  # into the first and out of the second
