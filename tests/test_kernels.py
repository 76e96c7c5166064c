"""The CPU kernels of a lowered program: which ops they replace, and that the numbers stay."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from tracing import Function

import fxbt.kernels
import fxbt.tune
from fxbt.capture import capture
from fxbt.lower import Program
from fxbt.pipeline import compile as compile_graph
from fxbt.precision import Bfloat16, Int8
from fxbt.signature import make_call
from fxbt.weights import Weights

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
POINTWISE, BINARY = mkldnn._linear_pointwise.default, mkldnn._linear_pointwise.binary

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def rows_packed(monkeypatch):
    """For which of kernels.ROWS weights are packed: all, unless a test says otherwise."""
    rows = [1] * len(fxbt.kernels.ROWS)
    monkeypatch.setattr(
        fxbt.tune.Tuner,
        "choose",
        lambda self, contest: tuple(rows) if "packed" in contest.names else (0,) * len(contest.sizes),
    )
    with torch.no_grad():
        yield rows


@pytest.fixture
def lowered(monkeypatch):
    """The targets of the program compiled last, in order."""
    targets: list[object] = []

    def spy(graph):
        targets[:] = [node.target for node in graph.nodes if node.op == "call_function"]
        return original(graph)

    original = fxbt.lower.compile_graph
    monkeypatch.setattr(fxbt.lower, "compile_graph", spy)
    return targets


def program(function, x, *more, **weights):
    model = Function(function, **weights).eval()
    compiled = compile_graph(capture(model, make_call(model, x, *more)), ())
    return model, compiled.run


def agree(model, run, *inputs):
    torch.testing.assert_close(run(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-5)


W, B = torch.randn(8, 6), torch.randn(8)


@pytest.mark.parametrize(
    "activation",
    [F.gelu, lambda y: F.gelu(y, approximate="tanh"), F.relu, F.silu],
    ids=["gelu", "tanh", "relu", "silu"],
)
def test_an_activation_joins_its_linear(activation, lowered):
    model, run = program(lambda x, w, b: activation(F.linear(x, w, b)), torch.randn(3, 5, 6), w=W, b=B)
    assert lowered == [POINTWISE]
    agree(model, run, 5 * torch.randn(2, 9, 6))


@pytest.mark.parametrize("turned", [False, True])
def test_a_residual_joins_its_linear(turned, lowered):
    def function(x, r, w, b):
        y = F.linear(x, w, b)
        return r + y if turned else y + r

    model, run = program(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), w=W, b=B)
    assert lowered == [BINARY]
    agree(model, run, torch.randn(2, 9, 6), torch.randn(2, 9, 8))
    agree(model, run, torch.randn(2, 9, 12)[..., ::2], torch.randn(9, 2, 8).transpose(0, 1))
    agree(model, run, torch.randn(2, 0, 6), torch.randn(2, 0, 8))


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
    assert BINARY not in lowered and POINTWISE in lowered
    agree(model, run, torch.randn(2, 9, 6), torch.randn(2, 9, 8))


def test_a_linear_that_is_used_twice_keeps_its_result(lowered):
    def function(x, w):
        y = F.linear(x, w)
        return F.gelu(y) + y

    model, run = program(function, torch.randn(3, 5, 6), w=W)
    assert aten.gelu.default not in lowered and F.gelu in lowered
    agree(model, run, torch.randn(2, 4, 6))


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
    assert lowered == [POINTWISE]
    agree(model, run, torch.randn(11, 6))
    model.w.mul_(2)
    agree(model, run, torch.randn(11, 6))


def test_a_flattened_linear_takes_its_input_as_it_is(lowered):
    def function(x, r, w, b, scale):
        x = x * scale  # the input's last axis is dynamic, this one's is not
        return torch.addmm(b, x.view(-1, 6), w).view(x.shape[0], x.shape[1], 8) + r

    more = {"w": torch.randn(6, 8), "b": B, "scale": torch.ones(6)}
    model, run = program(function, torch.randn(3, 5, 6), torch.randn(3, 5, 8), **more)
    assert lowered == [torch.mul, BINARY]
    agree(model, run, torch.randn(2, 7, 6), torch.randn(2, 7, 8))


@pytest.mark.parametrize("shape", [(5, 3, 8), (3, 20, 2), (-1, 8)])
def test_a_flattened_linear_of_another_form_stays(shape, lowered):
    function = lambda x, w: F.linear(x.view(-1, 6), w).view(shape) * 2  # noqa: E731
    x = torch.randn(3, 5, 6)
    model, run = program(function, x, w=W)
    agree(model, run, torch.randn(3, 5, 6))


@pytest.mark.parametrize("packed_from", [0, 1, 3, 5])
@pytest.mark.parametrize("activation", [None, F.gelu, F.relu])
def test_the_rows_decide_where_the_measurements_differ(packed_from, activation, rows_packed, lowered):
    rows_packed[:packed_from] = [0] * packed_from
    after = activation or (lambda y: y)
    model, run = program(lambda x, w, b: after(F.linear(x, w, b)), torch.randn(3, 5, 6), w=W, b=B)
    assert (POINTWISE in lowered) == (packed_from == 0)
    for rows in (0, 1, 2, 3, 8, 9, 33, 200, 300):
        agree(model, run, torch.randn(1, rows, 6))


class Embeddings(torch.nn.Module):
    """Words, positions and token types as BERT adds them up."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.types = (torch.nn.Embedding(count, 6) for count in (9, 16, 2))
        self.register_buffer("position_ids", torch.arange(16)[None])
        self.register_buffer("type_ids", torch.tensor([[0, 1] * 8]))

    def forward(self, ids):
        positions = self.position_ids[:, : ids.shape[1]]
        types = torch.gather(self.type_ids, 1, positions).expand(ids.shape[0], ids.shape[1])
        return self.words(ids) + self.types(types) + self.positions(positions)


def test_positions_and_token_types_are_looked_up_once(lowered):
    model = Embeddings()
    compiled = compile_graph(capture(model, make_call(model, torch.ones(2, 5, dtype=torch.long))), ())
    assert lowered.count(torch.embedding) == 1 and torch.gather not in lowered
    for batch, length in ((3, 7), (1, 16), (2, 5)):
        agree(model, compiled.run, torch.randint(9, (batch, length)))
    with torch.no_grad():
        model.positions.weight[2] += 1.0
        model.type_ids[0, 1] = 0
    agree(model, compiled.run, torch.randint(9, (3, 7)))


def test_what_is_gathered_along_another_axis_is_gathered_as_it_was(lowered):
    def function(x, table, index):
        return torch.gather(table, 0, index[:, : x.shape[1]]) + x

    x = torch.randn(2, 3)
    index = torch.tensor([[0, 1, 2, 0, 1]] * 2)
    model, run = program(function, x, table=torch.randn(4, 3), index=index)
    assert torch.gather in lowered
    agree(model, run, x)


def test_masks_of_several_attentions_are_made_once(lowered):
    def function(x, mask):
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, mask)
        return x

    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[0, 0, 2] = False  # a row that is blocked everywhere
    model, run = program(function, torch.randn(2, 4, 5, 8), mask)
    assert lowered.count(fxbt.kernels.additive) == 1
    agree(model, run, torch.randn(2, 4, 5, 8), mask)


def heads(x, w, sizes=(8, 8, 8), width=4, used=None):
    parts = F.linear(x, w).split(sizes, -1)
    q, k, v = (part.view(x.shape[0], x.shape[1], -1, width).transpose(1, 2) for part in parts)
    return q * 2, k + 1, v if used is None else used(v)


@pytest.mark.parametrize("sizes", [(8, 8, 8), (16, 4, 4)])
def test_heads_are_split_once(sizes, lowered):
    model, run = program(lambda x, w: heads(x, w, sizes)[0], torch.randn(2, 5, 6), w=torch.randn(24, 6))
    model, run = program(
        lambda x, w: sum(map(torch.sum, heads(x, w, sizes))), torch.randn(2, 5, 6), w=torch.randn(24, 6)
    )
    assert lowered.count(torch.Tensor.unflatten) == 1 and lowered.count(torch.transpose) == 1
    assert torch.reshape not in lowered
    agree(model, run, torch.randn(3, 7, 6))


def test_heads_are_split_once_however_they_are_viewed(lowered):
    def function(x, w):
        q, k, v = F.linear(x, w).split((8, 8, 8), -1)
        parts = (q.unflatten(-1, (2, 4)).transpose(1, 2), k.view(*k.shape[:2], -1, 4).permute(0, 2, 1, 3))
        return sum(part.sin().sum(2) for part in (*parts, v.reshape(*v.shape[:2], 2, 4).transpose(2, 1)))

    model, run = program(function, torch.randn(2, 5, 6), w=torch.randn(24, 6))
    assert lowered.count(torch.transpose) == 1 and torch.permute not in lowered
    agree(model, run, torch.randn(3, 7, 6))


def test_a_view_across_batch_and_length_is_no_view_of_heads(lowered):
    def function(x, w):
        q, k = F.linear(x, w).split((8, 8), -1)
        return sum(part.reshape(5, -1, 2, 4).transpose(1, 2).sin() for part in (q, k))

    model, run = program(function, torch.randn(2, 5, 6), w=torch.randn(16, 6))
    assert torch.Tensor.unflatten not in lowered
    agree(model, run, torch.randn(3, 5, 6))


def test_parts_of_other_forms_are_split_as_they_were(lowered):
    def function(x, w):
        q, k, v = F.linear(x, w).split((8, 8, 8), -1)
        return q.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).sum() + (k * v).sum()

    model, run = program(function, torch.randn(2, 5, 6), w=torch.randn(24, 6))
    assert lowered.count(operator.getitem) == 3
    agree(model, run, torch.randn(3, 7, 6))


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
