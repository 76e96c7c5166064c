"""Masks evaluated at symbolic positions: which ones are causal, and which only look it."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from sympy.core.function import AppliedUndef
from tracing import graph_of, nodes, returned

from fxbt import masks
from fxbt.analysis.rounding import converted
from fxbt.graph.canonical import canonicalize

SEQ = 6
TRIL = torch.ones(16, 16, dtype=torch.long).tril()


def attends(function, *, keep=True, weights=None):
    """Whether the mask that `function` makes for a (batch, seq) input is proven to be key <= query."""
    module = canonicalize(graph_of(function, torch.zeros(2, SEQ), **(weights or {})))
    node = returned(module)
    index = masks.index_symbols(node.meta["val"].dim())
    constants = masks.read_constants(node)
    try:
        value = masks.evaluate(node, index, constants)
    except (masks.Opaque, TypeError):
        return False
    truth = masks.truth(value) if node.meta["val"].dtype is torch.bool else masks.zero_else_below(value, -1e9)
    truth = truth if keep else masks.negate(truth)
    return truth is not None and masks.is_causal(truth, index[-2], index[-1])


def positions(x):
    position = torch.arange(x.shape[1])
    return position[:, None], position[None, :]


def compare(test):
    return lambda x: test(*positions(x))


def additive(x):
    query, key = positions(x)
    return torch.where(key <= query, 0.0, torch.finfo(torch.float32).min)


def upper_triangle(x):
    return torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)


def compare_in_rows(x):
    query, key = positions(x)
    return key <= query


CAUSAL = {
    "key <= query": compare(lambda query, key: key <= query),
    "query >= key": compare(lambda query, key: query >= key),
    "key < query + 1": compare(lambda query, key: key < query + 1),
    "key - query <= 0": compare(lambda query, key: key - query <= 0),
    "not key > query": compare(lambda query, key: ~(key > query)),
    "and true": compare(lambda query, key: (key <= query) & (key >= 0)),
    "shifted both": compare(lambda query, key: key + 3 <= query + 3),
    "tril of ones": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "four dims": lambda x: (positions(x)[1] <= positions(x)[0])[None, None].expand(x.shape[0], 1, -1, -1),
    "additive": additive,
    "cast to bfloat16": lambda x: additive(x).bfloat16(),
    "gathered": lambda x: torch.arange(x.shape[1])[positions(x)[1]] <= positions(x)[0],
    "reshaped there and back": lambda x: compare_in_rows(x).reshape(-1).reshape(1, x.shape[1], x.shape[1]),
    "additive from one minus": lambda x: (1.0 - (positions(x)[1] <= positions(x)[0]).float()) * -3e38,
}
NOT_CAUSAL = {
    "one ahead": compare(lambda query, key: key <= query + 1),
    "strict": compare(lambda query, key: key < query),
    "anti": compare(lambda query, key: key >= query),
    "window": compare(lambda query, key: (key <= query) & (key > query - 4)),
    "wide window": compare(lambda query, key: (key <= query) & (key > query - 4096)),
    "or": compare(lambda query, key: (key <= query) | (key < 2)),
    "everything": compare(lambda query, key: key >= 0),
    "nothing": compare(lambda query, key: key < 0),
    "blocks": compare(lambda query, key: key // 2 <= query // 2),
    "even keys": compare(lambda query, key: (key <= query) & (key * 2 <= query)),
    "with padding": lambda x: (positions(x)[1] <= positions(x)[0]) & (x > 0)[:, None, :],
    "soft": lambda x: torch.where(positions(x)[1] <= positions(x)[0], 0.0, -1.0),
    "offset": lambda x: torch.where(positions(x)[1] <= positions(x)[0], 1.0, -3e38),
    "rounded positions": compare(lambda query, key: (key * 0.5).long() <= (query * 0.5).long()),
    "half positions": compare(lambda query, key: key.half() <= query.half()),
    "not a number": lambda x: (1.0 - (positions(x)[1] <= positions(x)[0]).float()) * -math.inf,
    "wrapped around": lambda x: torch.arange(x.shape[1])[positions(x)[1] - 2] <= positions(x)[0],
    "reshaped to another row": lambda x: compare_in_rows(x).reshape(-1, 2).reshape(2, -1)[:, : x.shape[1]],
    "first diagonal": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(1),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name):
    assert attends(CAUSAL[name])


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_not_causal(name):
    assert not attends(NOT_CAUSAL[name])


def test_swapped_axes_are_not_causal():
    assert not attends(lambda x: (positions(x)[1] <= positions(x)[0]).T)


def test_a_buffer_is_read_by_its_content():
    def from_buffer(x, triangle):
        return triangle[: x.shape[1], : x.shape[1]] == 0

    assert attends(from_buffer, keep=False, weights={"triangle": TRIL})
    almost = TRIL.clone()
    almost[9, 3] = 0
    assert not attends(from_buffer, keep=False, weights={"triangle": almost})


def test_data_stays_a_function_of_its_position():
    def padding(x):
        return (x > 0)[:, None, :] & torch.ones(1, 3, 1, dtype=torch.bool)

    node = returned(canonicalize(graph_of(padding, torch.ones(2, 5))))
    assert str(masks.evaluate(node, masks.index_symbols(3), {})) == "args_0(i0, i2) > 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.long, torch.uint8, torch.bool])
@pytest.mark.parametrize("rank", [0, 2])
def test_data_may_be_zero_whatever_its_type(dtype: torch.dtype, rank: int) -> None:
    """A float is no integer in general, but it can be 0."""
    data = torch.ones((2, 5)[:rank], dtype=dtype)
    node = returned(canonicalize(graph_of(lambda x: x == 0, data)))
    value = masks.evaluate(node, masks.index_symbols(rank), {})
    assert value not in (sympy.true, sympy.false) and value.atoms(sympy.Symbol)


@pytest.mark.parametrize("function", [lambda x: x - 1, lambda x: -x])
def test_arithmetic_that_wraps_around_is_not_read(function) -> None:
    node = returned(canonicalize(graph_of(function, torch.ones(2, 5, dtype=torch.uint8))))
    with pytest.raises(masks.Opaque, match="arithmetic in torch.uint8"):
        masks.evaluate(node, masks.index_symbols(2), {})


def test_booleans_in_arithmetic_are_0_and_1() -> None:
    node = returned(canonicalize(graph_of(lambda x: (x > 0) * -1e9 + 1, torch.ones(2, 5))))
    value = masks.evaluate(node, masks.index_symbols(2), {})
    (data,) = value.atoms(AppliedUndef)
    assert [float(value.subs(data, number)) for number in (3, -3)] == [-1e9 + 1, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_data_in_half_precision_is_rounded_once_it_is_known(dtype: torch.dtype) -> None:
    module = canonicalize(graph_of(lambda x: x.to(dtype).float(), torch.ones(2, 5, dtype=torch.long)))
    value = masks.evaluate(returned(module), masks.index_symbols(2), {})
    (data,) = value.atoms(AppliedUndef)
    for number in (0, 1, 2049, -70001):
        assert value.subs(data, number) == converted(number, dtype)


def test_an_unknown_op_is_data_not_a_guess():
    module = canonicalize(graph_of(lambda x: torch.roll(positions(x)[1] <= positions(x)[0], 1, 0), torch.ones(2, 5)))
    assert nodes(module, torch.ops.aten.roll.default)
    assert not attends(lambda x: torch.roll(positions(x)[1] <= positions(x)[0], 1, 0))
