"""Each canonical step on a five-line graph; the whole on random models: idempotent and number-preserving."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import CASES_BY_NAME
from torch.utils import _pytree as pytree
from tracing import captured, graph_of, nodes

from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.explain import show
from fxbt.graph.canonical import canonicalize

aten = torch.ops.aten
X = torch.randn(3, 4, 6)


def targets(function, *tensors, **weights):
    module = canonicalize(graph_of(function, *tensors, **weights))
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: F.dropout(x, 0.5, training=False) * 2, [aten.mul.Tensor]),
        (lambda x: F.dropout(x, 0.0, training=True) * 2, [aten.mul.Tensor]),
        (lambda x: x.to(torch.float32) * 2, [aten.mul.Tensor]),
        (lambda x: x.transpose(1, 2).contiguous() * 2, [aten.transpose.int, aten.mul.Tensor]),
        (lambda x: x.clone() * 2, [aten.mul.Tensor]),
        (lambda x: x[:, :, :] * 2, [aten.mul.Tensor]),
        (lambda x: x.expand(-1, -1, -1) * 2, [aten.mul.Tensor]),
        (lambda x: x.view(x.shape) * 2, [aten.mul.Tensor]),
        (lambda x: (x * 1) * 2, [aten.mul.Tensor]),
        (lambda x: x * torch.tensor(2.0), [aten.mul.Tensor]),
        (lambda x: (x * 2) + (x * 2), [aten.mul.Tensor, aten.add.Tensor]),
        (lambda x: x.new_zeros(2, 3) + 1, [aten.full.default, aten.add.Tensor]),
    ],
)
def test_steps_drop_what_changes_nothing(function, left):
    assert targets(function, X) == left


@pytest.mark.parametrize(
    ("function", "sizes", "dim"),
    [
        (lambda x: x.split(4, -1), [4, 2], -1),
        (lambda x: x.split((1, 5), 2), [1, 5], 2),
        (lambda x: x.chunk(3, 2), [2, 2, 2], 2),
        (lambda x: x.chunk(4, -1), [2, 2, 2], -1),
        (lambda x: x.split(2, 1), None, 1),
        (lambda x: x.chunk(2, 0), None, 0),
    ],
)
def test_splits_are_written_by_their_sizes_where_these_are_known(function, sizes, dim):
    module = canonicalize(graph_of(lambda x, w: [part * 2 for part in function(F.linear(x, w))], X, w=torch.ones(6, 6)))
    found = [node.args[1:] for node in nodes(module, aten.split_with_sizes.default)]
    assert found == ([] if sizes is None else [(sizes, dim)])


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: F.dropout(x, 0.5, training=True) * 2, aten.dropout.default),
        (lambda x: x.to(torch.float64) * 2, aten.to.dtype),
        (lambda x: x.transpose(1, 2).contiguous(), aten.contiguous.default),
        (lambda x: x[:, 1:] * 2, aten.slice.Tensor),
        (lambda x: x.clone().transpose(0, 1), aten.clone.default),
        (lambda x: x.transpose(0, 1).contiguous().flatten(0, 1), aten.contiguous.default),
        (lambda x: x + 0, aten.add.Tensor),
    ],
)
def test_steps_keep_what_does_not(function, kept):
    assert kept in targets(function, X)


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (lambda x: ((i := x.long()) + 1).double() + (i + 1.0), 2 + 1),
        (lambda x: x * 0.0 + x * -0.0, 2 + 1),
        (lambda x: F.dropout(x, 0.5, True) + F.dropout(x, 0.5, True), 2 + 1),
        (lambda x: (x * 2, x * 2), 2),
        (lambda x: (x * 2) + (x * 2) + (x * 3), 4),
    ],
)
def test_only_equal_pure_inner_expressions_are_shared(function, operations):
    arithmetic = {aten.add.Tensor, aten.mul.Tensor, aten.dropout.default}
    assert sum(target in arithmetic for target in targets(function, X)) == operations


def test_view_becomes_reshape():
    assert targets(lambda x: x.view(x.shape[0], -1) * 2, X)[-2:] == [aten.reshape.default, aten.mul.Tensor]


def test_a_shape_is_read_without_its_tensor():
    def shaped(x):
        like = x.exp().view(x.shape[0], -1)
        return (x * 2).reshape_as(like) + (x * 3).view_as(like)

    module = canonicalize(graph_of(shaped, X))
    assert not nodes(module, aten.reshape_as.default) and not nodes(module, aten.view_as.default)
    assert not nodes(module, aten.exp.default)
    torch.testing.assert_close(module(X)[0], shaped(X))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x @ w.T,
        lambda x, w: torch.matmul(x, w.permute(1, 0)),
        lambda x, w: x @ w.transpose(-1, -2),
        lambda x, w: x @ w.mT,
        lambda x, w: x @ w.swapaxes(0, 1),
        lambda x, w: x @ w,
    ],
)
def test_a_product_with_a_weight_is_a_linear(function):
    weight = torch.randn(6, 6)
    module = canonicalize(graph_of(lambda x, w: function(x, w) * 2, X, w=weight))
    assert nodes(module, aten.linear.default) and not nodes(module, aten.matmul.default)
    torch.testing.assert_close(module(X)[0], function(X, weight) * 2)


def test_a_scalar_parameter_is_no_number():
    module = canonicalize(graph_of(lambda x, scale: x * scale, X, scale=torch.tensor(2.0)))
    assert nodes(module, aten.mul.Tensor)[0].args[1].op == "get_attr"


@pytest.mark.parametrize("function", [lambda x: torch.tensor(2.0) * x, lambda x: torch.tensor(2.0) - x])
def test_scalars_on_the_left(function):
    torch.testing.assert_close(canonicalize(graph_of(function, X))(X)[0], function(X))


def test_fill_constants_become_numbers():
    def masked(x):
        bottom = torch.tensor(-1e9)
        x = torch.where(x > 0, x, bottom)
        return torch.max(x.masked_fill(x > 1, bottom), torch.tensor(-3e38))

    found = targets(masked, X)
    assert {aten.where.ScalarOther, aten.masked_fill.Scalar, aten.clamp_min.default} <= set(found)


@pytest.mark.parametrize("compare", [torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge])
def test_comparing_with_a_scalar_constant(compare):
    overload = getattr(aten, compare.__name__).Scalar
    assert overload in targets(lambda x: compare(x, torch.tensor(0.5)), X)
    assert overload in targets(lambda x: compare(x > 0, torch.tensor(False)), X)
    assert overload not in targets(lambda x: compare(x, torch.tensor([0.5])), X)


def test_comparing_with_a_constant_in_more_precision():
    """Among tensors of no dims the wider type wins, and a number has none."""
    assert aten.eq.Tensor in targets(lambda x: x.sum() == torch.tensor(0.1, dtype=torch.float64), X)


def test_equal_comparisons_with_constants_are_shared():
    found = targets(lambda x: x.masked_fill(x > torch.tensor(1), 2.0) + (x > torch.tensor(1)), X)
    assert found.count(aten.gt.Scalar) == 1


@pytest.mark.parametrize(
    ("function", "is_softmax"),
    [
        (lambda x: (e := (x - x.amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True), True),
        (lambda x: (e := (x - x.max(1, keepdim=True)[0]).exp()) / e.sum(1, keepdim=True), True),
        (lambda x: (e := (x - x.amax(-1, keepdim=True)).exp()) / e.sum(1, keepdim=True), True),
        (lambda x: (e := (x - x.amax(1, keepdim=True)).exp()) / e.sum(-1, keepdim=True), True),
        (lambda x: (e := x.exp()) / e.sum(-1, keepdim=True), True),
        (lambda x: (e := (x - x.amin(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True), True),
        (lambda x: (e := (x - x.amax(-1, keepdim=True)).exp()) / (e.sum(-1, keepdim=True) + 1), False),
    ],
)
def test_softmax_by_hand(function, is_softmax):
    """Exponentials over their own sum are the softmax of what they are of, whatever was taken from it before."""
    assert (aten.softmax.int in targets(function, X)) == is_softmax
    torch.testing.assert_close(canonicalize(graph_of(function, X))(X)[0], function(X))


def test_images_keep_their_layout_before_a_convolution():
    kernel = torch.ones(4, 4, 1, 1)

    def images(x):
        channels_first = x.unsqueeze(0).permute(0, 3, 1, 2).contiguous()
        return torch.nn.functional.group_norm(torch.conv2d(channels_first, kernel), 2)

    found = targets(images, torch.randn(2, 3, 4))
    assert aten.contiguous.default in found or aten.clone.default in found


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        (lambda x: torch.softmax(((y := x / 32) - y.amax(-1).unsqueeze(-1)) * 32, -1), True),
        (lambda x: torch.softmax(((y := x / 32) - y.amax(-1, keepdim=True)) * 16, -1), False),
        (lambda x: torch.softmax(((y := x / 32) - y.amax(1, keepdim=True)) * 32, -1), False),
        (lambda x: torch.softmax((x / 32 - (x / 16).amax(-1, keepdim=True)) * 32, -1), False),
        (lambda x: torch.softmax(((y := x / 0.1) - y.amax(-1, keepdim=True)) * 0.1, -1), False),
    ],
)
def test_relaxed_softmax(function, plain):
    graph = graph_of(function, X)
    expected = graph(X)[0]
    torch.testing.assert_close(canonicalize(graph)(X)[0], expected)
    assert (aten.amax.default not in {node.target for node in graph.graph.nodes}) == plain


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_canonical_form_is_idempotent_and_preserves_numbers(name):
    case = CASES_BY_NAME[name]
    model, inputs = case.build("eager"), case.inputs(*case.shapes[0], case.paddings[0])
    with torch.no_grad():
        call = make_call(model, **inputs)
        found = capture(model, call)
        expected = found.module(*call.tensors)
        once = show.text(canonicalize(found.module))
        assert once == show.text(canonicalize(found.module))
        for new, old in zip(found.module(*call.tensors), expected, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)


def test_softmax_by_hand_preserves_numbers_and_strides():
    def by_hand(x):
        shifted = x / math.sqrt(2) - (x / math.sqrt(2)).amax(-1, keepdim=True)
        weights = shifted.exp()
        return (weights / weights.sum(-1, keepdim=True)).transpose(1, 2).contiguous()

    module = captured(by_hand, X).module
    expected = module(X)[0]
    (actual,) = pytree.tree_leaves(canonicalize(module)(X))
    torch.testing.assert_close(actual, expected)
    assert actual.stride() == expected.stride()
