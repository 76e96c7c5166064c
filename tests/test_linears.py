"""The CPU kernels of linears: which ops they replace, and that the numbers stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tracing import NATIVE, Function, agree, by_native, names, program

import fxbt.kernels.autotune
import fxbt.lower.cpu.linears
from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.graph.record import StageRecord
from fxbt.lower.cpu.precision import Bfloat16, Int8
from fxbt.lower.derived_weights import Weights
from fxbt.lower.program import Program
from fxbt.pipeline import compile as compile_graph

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def kernels_of_rows(monkeypatch):
    """The kernel for each of linears.ROWS: packed, and an activation fused in, unless a test says otherwise."""
    rows = ["fused"] * len(fxbt.lower.cpu.linears.ROWS)

    def choose(tuner, contest):
        if "packed" not in contest.names:
            return (contest.by_rule,) * len(contest.sizes)
        return tuple(name if name in contest.names else "packed" for name in rows)

    monkeypatch.setattr(fxbt.kernels.autotune.Tuner, "choose", choose)
    with torch.no_grad():
        yield rows


W, B = torch.randn(8, 6), torch.randn(8)


@pytest.mark.parametrize(
    "activation",
    [F.gelu, lambda y: F.gelu(y, approximate="tanh"), F.relu, F.silu],
    ids=["gelu", "tanh", "relu", "silu"],
)
@pytest.mark.parametrize("kernel", ["F.linear", "packed", "fused", NATIVE])
def test_an_activation_joins_its_linear(activation, kernel, kernels_of_rows, lowered):
    kernels_of_rows[:] = [kernel] * len(kernels_of_rows)
    model, run = program(lambda x, w, b: activation(F.linear(x, w, b)), torch.randn(3, 5, 6), w=W, b=B)
    assert names(lowered) == [{"fused": "onednn", "native": "native"}.get(kernel, "followed")]
    agree(model, run, 5 * torch.randn(2, 9, 6))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kernel", ["packed", NATIVE])
def test_a_residual_joins_its_linear(turned, kernel, kernels_of_rows, lowered):
    def function(x, r, w, b):
        y = F.linear(x, w, b)
        return r + y if turned else y + r

    kernels_of_rows[:] = [kernel] * len(kernels_of_rows)
    model, run = program(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W, b=B)
    assert names(lowered) == [{"packed": "onednn"}.get(kernel, kernel)]
    agree(model, run, torch.randn(2, 9, 6), torch.randn(2, 9, 8))
    agree(model, run, torch.randn(2, 9, 12)[..., ::2], torch.randn(9, 2, 8).transpose(0, 1))
    agree(model, run, torch.randn(2, 0, 6), torch.randn(2, 0, 8))


KERNELS = ["packed", NATIVE, "by rows"]
GAMMA, BETA = torch.randn(8), torch.randn(8)


@pytest.fixture(params=KERNELS)
def kernel(request, kernels_of_rows):
    kernels_of_rows[:] = [request.param] * 6 if request.param != "by rows" else ["F.linear"] * 3 + ["packed"] * 3
    return {"packed": "normed", "native": "native", "by rows": "linear_by_rows"}[request.param]


@pytest.mark.parametrize("affine", [(), ("gamma",), ("gamma", "beta")])
def test_a_layer_norm_joins_its_linear(affine, kernel, lowered):
    weights = {"gamma": GAMMA, "beta": BETA}
    model, run = program(
        lambda x, r, w, *affine: F.layer_norm(F.linear(x, w) + r, (8,), *affine, eps=1e-3),
        *(torch.randn(3, 5, 6), torch.randn(3, 5, 8)),
        w=W,
        **{name: weights[name] for name in affine},
    )
    assert names(lowered) == [kernel]
    for shape in ((2, 9), (1, 1), (2, 0), (1, 300)):
        agree(model, run, torch.randn(*shape, 6), torch.randn(*shape, 8))


def test_a_sum_that_is_read_besides_its_norm_is_kept(kernel, lowered):
    def function(x, r, w, gamma, beta):
        total = r + F.linear(x, w)
        return total.tanh() + F.layer_norm(total, (8,), gamma, beta) * total

    model, run = program(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W, gamma=GAMMA, beta=BETA)
    assert names(lowered) == [kernel, "getitem", "getitem", "tanh", "mul", "add"]
    agree(model, run, torch.randn(2, 9, 6), torch.randn(2, 9, 8))


def test_a_norm_follows_an_activation_too(kernel, lowered):
    function = lambda x, w, gamma: F.layer_norm(F.gelu(F.linear(x, w)), (8,), gamma)  # noqa: E731
    model, run = program(function, torch.randn(3, 5, 6), w=W, gamma=GAMMA)
    assert names(lowered) == [kernel]
    agree(model, run, torch.randn(2, 9, 6))
    model.gamma.mul_(2)
    agree(model, run, torch.randn(2, 9, 6))


def test_two_norms_of_one_sum(kernel, lowered):
    def function(x, w, gamma, beta):
        y = F.linear(x, w)
        return F.layer_norm(y, (8,), gamma) + F.layer_norm(y, (8,), beta)

    model, run = program(function, torch.randn(3, 5, 6), w=W, gamma=GAMMA, beta=BETA)
    assert names(lowered) == [kernel, "getitem", "getitem", "layer_norm", "add"]
    agree(model, run, torch.randn(2, 9, 6))


def test_layers_may_share_a_norm(kernel, lowered):
    def function(x, w, back, gamma):
        for _ in range(3):
            x = F.linear(F.layer_norm(F.linear(x, w), (8,), gamma), back)
        return x

    model, run = program(function, torch.randn(3, 5, 6), w=W, back=torch.randn(6, 8), gamma=GAMMA)
    assert names(lowered) == ["chain"] if kernel == "native" else names(lowered).count(kernel) >= 3
    assert "layer_norm" not in names(lowered)
    agree(model, run, torch.randn(2, 9, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w: F.layer_norm(F.linear(x, w), (5, 8)),
        lambda x, r, w: F.layer_norm(F.linear(x, w), (8,), r[0, 0], r[0, 1]),
        lambda x, r, w: F.layer_norm(F.linear(x, w)[..., :4], (4,)),
        lambda x, r, w: F.group_norm(F.linear(x, w), 1),
    ],
    ids=["two dims", "by inputs", "of a part", "group"],
)
def test_other_norms_stay(function, kernel, lowered):
    model, run = program(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W)
    assert kernel != "normed" or "normed" not in names(lowered)
    assert len(lowered) > 1
    agree(model, run, torch.randn(4, 5, 6), torch.randn(4, 5, 8))


@pytest.mark.parametrize("precision", [None, Bfloat16, Int8])
def test_a_bias_that_is_not_contiguous_is_not_taken_for_one(precision, kernel, lowered):
    """oneDNN 3.11 reads 8 numbers behind the address of this bias."""
    model = Function(lambda x, w, b: F.linear(x, w, b.expand(8)), w=W, b=B[:1].clone()).eval()
    run = Program(capture(model, make_call(model, torch.randn(3, 5, 6))).module, {}, Weights(), precision)
    assert lowered == [F.linear]
    agree(model, run, torch.randn(2, 9, 6))


@pytest.mark.parametrize("kernel_name", ["packed", NATIVE])
def test_nor_is_one_that_a_call_gives(kernel_name, kernels_of_rows):
    kernels_of_rows[:] = [kernel_name] * 6
    model, run = program(lambda x, b, w: F.linear(x, w, b), torch.randn(3, 5, 6), torch.randn(8), w=W)
    for bias in (torch.randn(8), torch.randn(16)[::2], torch.randn(1).expand(8)):
        agree(model, run, torch.randn(2, 9, 6), bias)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, r, w: F.linear(x, w) + r[:, :1],
        lambda x, r, w: torch.add(F.linear(x, w), r, alpha=2),
        lambda x, r, w: F.linear(x, w) + F.linear(x, w).sum() + r.double(),
        lambda x, r, w: F.linear(x, w) + 3,
    ],
    ids=["broadcast", "scaled", "another dtype", "number"],
)
def test_other_sums_stay(function, lowered):
    model, run = program(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W)
    assert "onednn" in names(lowered) and len(lowered) > 1
    agree(model, run, torch.randn(2, 9, 6), torch.randn(2, 9, 8))


def test_a_linear_that_is_used_twice_keeps_its_result(lowered):
    def function(x, w):
        y = F.linear(x, w)
        return F.gelu(y) + y

    model, run = program(function, torch.randn(3, 5, 6), w=W)
    assert aten.gelu.default not in lowered and F.gelu in lowered
    agree(model, run, torch.randn(2, 4, 6))


def epilogues_of(function, *tensors, **weights):
    """The record of what was fused into linears, empty where the report has none; the model and its program."""
    model = Function(function, **weights).eval()
    compiled = compile_graph(capture(model, make_call(model, *tensors)), ())
    records = [stage for stage in compiled.stages if stage.name == "epilogues"]
    assert len(records) <= 1
    return records[0] if records else StageRecord("epilogues"), model, compiled.run


def test_the_report_counts_what_is_fused_in():
    def function(x, w, back, gamma):
        inner = F.gelu(F.linear(x, w))
        return F.layer_norm(F.linear(inner, back) + x, (6,), gamma)

    weights = {"w": W, "back": torch.randn(6, 8), "gamma": torch.randn(6)}
    record, model, run = epilogues_of(function, torch.randn(3, 5, 6), **weights)
    assert (record.hits, record.misses) == (2, [])
    for _ in range(3):
        agree(model, run, torch.randn(2, 9, 6))
        model.gamma.mul_(2)


def test_what_is_left_to_torch_is_no_hit(kernels_of_rows):
    kernels_of_rows[:] = ["F.linear"] * 6
    record, _, _ = epilogues_of(lambda x, r, w: F.linear(x, w) + r, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W)
    assert record.hits == 0


NEAR_MISSES = {
    "read twice": (
        lambda x, r, w: (F.linear(x, w) + r) * F.linear(x, w),
        "a value inside the pattern is used elsewhere too",
        0,
    ),
    "an activation of what is read twice": (
        lambda x, r, w: F.gelu(F.linear(x, w)) * F.linear(x, w),
        "a value inside the pattern is used elsewhere too",
        0,
    ),
    "broadcast": (lambda x, r, w: F.linear(x, w) + r[:, :1], "the other addend has another shape", 0),
    "of another dtype": (
        lambda x, r, w: F.linear(x, w) + r.double(),
        "an intermediate value is in torch.float32, coarser than the result's",
        0,
    ),
    "a coarser residual": (lambda x, r, w: F.linear(x, w) + r.bfloat16(), "the other addend is in torch.bfloat16", 0),
    "to itself": (lambda x, r, w: F.linear(x, w) + F.linear(x, w), "a linear is added to itself", 0),
    "over two dims": (
        lambda x, r, w: F.layer_norm(F.linear(x, w) + r, (5, 8)),
        "the norm is not over exactly the last dim",
        1,
    ),
    "by inputs": (lambda x, r, w: F.layer_norm(F.linear(x, w), (8,), r[0, 0]), "gamma is computed from the inputs", 0),
    "by a computed weight": (lambda x, r, w: F.layer_norm(F.linear(x, w), (8,), w[:, 0] * 2), "gamma is computed", 0),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
@pytest.mark.parametrize("kernel_name", ["packed", NATIVE])
def test_what_is_not_fused_in_says_why(case, kernel_name, kernels_of_rows):
    kernels_of_rows[:] = [kernel_name] * 6
    function, reason, hits = NEAR_MISSES[case]
    record, model, run = epilogues_of(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W)
    assert record.hits == hits
    assert any(reason in str(miss) for miss in record.misses), record.misses
    for _ in range(2):
        agree(model, run, torch.randn(3, 5, 6), torch.randn(3, 5, 8))


CASTS = {
    "rounded": lambda x, r, w: F.gelu(F.linear(x, w).bfloat16().float()),
    "in double precision": lambda x, r, w: F.gelu(F.linear(x, w).double()).float(),
    "to itself, rounded": lambda x, r, w: F.linear(x, w) + F.linear(x, w).bfloat16(),
    "a norm of what is rounded": lambda x, r, w: F.layer_norm((F.linear(x, w) + r).bfloat16().float(), (8,)),
    "a rounded sum": lambda x, r, w: F.layer_norm((F.linear(x, w).double() + r).float(), (8,)),
}


@pytest.mark.parametrize("case", CASTS)
def test_casts_are_not_looked_through(case, kernel):
    record, model, run = epilogues_of(CASTS[case], torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W)
    assert record.hits == (case == "a norm of what is rounded")  # the sum before it
    x, r = torch.randn(2, 9, 6), torch.randn(2, 9, 8)
    torch.testing.assert_close(run(x, r)[0], model(x, r), rtol=2e-2, atol=2e-2)  # rounding of sums may fall elsewhere


def test_the_sum_of_two_linears_joins_one_of_them(kernel, lowered):
    function = lambda x, r, w, v: F.layer_norm(F.linear(x, w) + F.linear(r, v), (8,))  # noqa: E731
    weights = {"w": W, "v": torch.randn(8, 8)}
    record, model, run = epilogues_of(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), **weights)
    assert record.hits == 1 and "layer_norm" not in names(lowered) and "add" not in names(lowered)
    agree(model, run, torch.randn(2, 9, 6), torch.randn(2, 9, 8))


def test_of_two_linears_the_one_on_a_weight_has_the_sum(kernel, lowered):
    function = lambda x, r, w: F.linear(x, r[0, :, :6]) + F.linear(x, w)  # noqa: E731
    given = torch.randn(3, 5, 6), torch.randn(2, 8, 8)
    record, model, run = epilogues_of(function, *given, w=W)
    assert record.hits == 1 and "add" not in names(lowered)
    agree(model, run, *given)


def test_a_number_that_follows_from_sizes_is_no_residual(kernel):
    record, model, run = epilogues_of(lambda x, w: F.linear(x, w) + x.shape[1], torch.randn(3, 5, 6), w=W)
    assert record.hits == 0
    agree(model, run, torch.randn(2, 9, 6))


@pytest.mark.parametrize("precision", [None, Bfloat16, Int8])
def test_a_linear_of_weights_alone_is_computed_once(precision, lowered):
    if precision is Bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 kernels for this CPU")
    model = Function(lambda x, table, w: x + F.gelu(F.linear(table, w)), table=torch.randn(5, 6), w=W).eval()
    captured = capture(model, make_call(model, torch.randn(3, 5, 8)))
    run = Program(captured.module, {}, Weights(), precision)
    assert lowered == [torch.add]
    agree(model, run, torch.randn(2, 5, 8))


def test_addmm_is_packed_too(lowered):
    function = lambda x, w, b: torch.addmm(b, x, w)  # noqa: E731
    model, run = program(function, torch.randn(5, 6), w=torch.randn(6, 8), b=B)
    assert names(lowered) == ["onednn"]
    agree(model, run, torch.randn(11, 6))
    model.w.mul_(2)
    agree(model, run, torch.randn(11, 6))


def test_a_flattened_linear_takes_its_input_as_it_is(lowered):
    def function(x, r, w, b, scale):
        x = x * scale  # the input's last axis is dynamic, this one's is not
        return torch.addmm(b, x.view(-1, 6), w).view(x.shape[0], x.shape[1], 8) + r

    more = {"w": torch.randn(6, 8), "b": B, "scale": torch.ones(6)}
    model, run = program(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), **more)
    assert names(lowered) == ["mul", "onednn"]
    agree(model, run, torch.randn(2, 7, 6), torch.randn(2, 7, 8))


@pytest.mark.parametrize("shape", [(5, 3, 8), (3, 20, 2), (-1, 8)])
def test_a_flattened_linear_of_another_form_stays(shape, lowered):
    function = lambda x, w: F.linear(x.view(-1, 6), w).view(shape) * 2  # noqa: E731
    x = torch.randn(3, 5, 6)
    model, run = program(function, x, w=W)
    agree(model, run, torch.randn(3, 5, 6))


@pytest.mark.parametrize("others_from", [1, 3, 5])
@pytest.mark.parametrize(
    ("few", "many"),
    [
        ("F.linear", "fused"),
        ("fused", "packed"),
        ("packed", "F.linear"),
        pytest.param("native", "fused", marks=by_native),
        pytest.param("native", "F.linear", marks=by_native),
    ],
)
@pytest.mark.parametrize("activation", [None, F.gelu, F.relu, F.silu])
def test_the_rows_decide_where_the_measurements_differ(few, many, others_from, activation, kernels_of_rows, lowered):
    kernels_of_rows[:] = [few] * others_from + [many] * (len(kernels_of_rows) - others_from)
    after = activation or (lambda y: y)
    model, run = program(lambda x, w, b: after(F.linear(x, w, b)), torch.randn(3, 5, 6), w=W, b=B)
    is_one_kernel = activation is None and {few, many} == {"fused", "packed"}
    assert names(lowered) == ["onednn" if is_one_kernel else "linear_by_rows"]
    for rows in (0, 1, 2, 3, 8, 9, 33, 200, 600):
        agree(model, run, torch.randn(1, rows, 6))


@pytest.mark.parametrize("few", ["F.linear", "packed", NATIVE])
def test_a_residual_joins_its_linear_whatever_the_rows(few, kernels_of_rows, lowered):
    kernels_of_rows[:] = [few] * 2 + ["F.linear"] + ["packed"] * 3
    model, run = program(lambda x, r, w: F.linear(x, w) + r, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W)
    assert names(lowered) == ["linear_by_rows"]
    for rows in (0, 1, 3, 9, 33):
        x, residual = torch.randn(1, rows, 6), torch.randn(1, rows, 8)
        agree(model, run, x, residual.clone())
        given = residual.clone()
        run(x, given)
        assert torch.equal(given, residual)  # the sum is written in place, but not there


@pytest.mark.parametrize("kernel", ["F.linear", "packed"])
def test_an_activation_that_is_slow_when_fused_in_is_written_in_place(kernel, kernels_of_rows, lowered):
    kernels_of_rows[:] = [kernel] * len(kernels_of_rows)
    model, run = program(lambda x, w: F.gelu(F.linear(x, w)) + 1, torch.randn(3, 5, 6), w=W)
    assert names(lowered) == ["followed", "add"]
    x = torch.randn(2, 9, 6)
    agree(model, run, x)
    agree(model, run, x)


def test_without_a_kernel_that_needs_it_nothing_is_packed(kernels_of_rows):
    kernels_of_rows[:] = ["F.linear"] * len(kernels_of_rows)
    model = Function(lambda x, w: F.gelu(F.linear(x, w)), w=W).eval()
    weights = Weights()
    run = Program(capture(model, make_call(model, torch.randn(3, 6))).module, {}, weights)
    agree(model, run, torch.randn(7, 6))
    assert weights.nbytes() == 0


def test_a_linear_without_inputs_stays(lowered):
    model, run = program(lambda x, w, b: F.linear(x[:, :0], w, b) * 2, torch.randn(3, 6), w=torch.randn(8, 0), b=B)
    assert "onednn" not in names(lowered)
    agree(model, run, torch.randn(5, 6))


def test_two_programs_share_what_they_derive():
    model = Function(lambda x, a, b: F.linear(x, torch.cat([a, b])), a=torch.randn(4, 6), b=torch.randn(4, 6)).eval()
    captured = capture(model, make_call(model, torch.randn(3, 6)))
    weights = Weights()
    one, two = (Program(captured.module, {}, weights) for _ in range(2))
    x = torch.randn(5, 6)
    assert one._places == two._places
    for _ in range(2):
        agree(model, one, x)
        agree(model, two, x)
        model.a.mul_(2)
    alone = Weights()
    Program(captured.module, {}, alone)
    assert weights.nbytes() == alone.nbytes() > 0
