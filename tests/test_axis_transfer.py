"""Where marked axes stand in an op's result, and which ops compute along them: the engine by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from tracing import graph_of

from fxbt import Miss
from fxbt.analysis.axes import Atom, Axes, sizes_of
from fxbt.analysis.axis_transfer import AxisTransfer, Flow

SHAPE = (3, 4, 6)  # marked are the first two
Function = Callable[..., Any]


def carried(function: Function) -> tuple[Flow, tuple[Atom, ...]]:
    """The flow of the last op on an input (batch, tokens, features), and the marks: batch and tokens."""
    graph = graph_of(function, torch.randn(SHAPE)).graph
    source = next(iter(graph.nodes))
    batch, tokens, features = (Atom(size) for size in sizes_of(source))
    transfer = AxisTransfer("places", [batch, tokens])
    known: dict[fx.Node, Axes] = {source: ((batch,), (tokens,), (features,))}
    flow = Flow({}, known[source])
    for node in graph.nodes:
        given = {operand: known[operand] for operand in node.all_input_nodes if operand in known}
        if node.op == "call_function" and given and node.target is not torch.ops.aten.sym_size.int:
            flow = transfer.carry(node, given)
            known[node] = flow.axes
    return flow, (batch, tokens)


APART: dict[str, tuple[Function, dict[int, int]]] = {  # where the first and the second mark stand in the result
    "pointwise": (lambda x: x.sin(), {-3: 0, -2: 1}),
    "beside more dims": (lambda x: x + torch.ones(2, 1, 1, 1), {-3: 0, -2: 1}),
    "a sum over features": (lambda x: x.sum(-1), {-2: 0, -1: 1}),
    "a sum that keeps dims": (lambda x: x.sum(-1, keepdim=True), {-3: 0, -2: 1}),
    "one feature": (lambda x: x.select(2, 0), {-2: 0, -1: 1}),
    "turned": (lambda x: x.transpose(0, 2), {-1: 0, -2: 1}),
    "a dim more": (lambda x: x.unsqueeze(1), {-4: 0, -2: 1}),
    "stacked": (lambda x: torch.stack([x, x], 1), {-4: 0, -2: 1}),
    "a linear": (lambda x: F.linear(x, torch.ones(5, 6)), {-3: 0, -2: 1}),
    "a linear to one number": (lambda x: F.linear(x, torch.ones(6)), {-2: 0, -1: 1}),
    "a product": (lambda x: torch.matmul(x, torch.ones(6, 5)), {-3: 0, -2: 1}),
    "features repeated": (lambda x: x.repeat(2, 1, 1, 3), {-3: 0, -2: 1}),
    "features padded": (lambda x: F.pad(x, (1, 2)), {-3: 0, -2: 1}),
    "features pooled": (lambda x: F.avg_pool1d(x, 2), {-3: 0, -2: 1}),
    "features selected": (lambda x: x.index_select(2, torch.tensor([3, 1])), {-3: 0, -2: 1}),
    "features indexed": (lambda x: x[:, :, torch.tensor([3, 1])], {-3: 0, -2: 1}),
}
ALONG: dict[str, tuple[Function, str]] = {
    "a sum over tokens": (lambda x: x.sum(1), "mixes"),
    "a sum over all": (lambda x: x.sum(), "mixes"),
    "softmax": (lambda x: x.softmax(0), "mixes"),
    "joined": (lambda x: torch.cat([x, torch.ones(3, 1, 6)], 1), "mixes"),
    "tokens repeated": (lambda x: x.repeat(1, 2, 1), "mixes"),
    "tokens padded": (lambda x: F.pad(x, (0, 0, 1, 0)), "mixes"),
    "tokens pooled": (lambda x: F.avg_pool2d(x, 2), "mixes"),
    "triangle": (lambda x: x.triu(), "mixes"),
    "a linear": (lambda x: F.linear(x.mT, torch.ones(5, 4)), "sums"),
    "channels": (lambda x: F.conv1d(x, torch.ones(5, 4, 1)), "convolution"),
    "a group norm": (lambda x: F.group_norm(x, 2), "mixes"),
    "tokens gathered": (lambda x: x.gather(1, torch.zeros(3, 4, 6, dtype=torch.long)), "given as data"),
    "tokens indexed": (lambda x: x[:, torch.tensor([0, 1])], "given as data"),
}


@pytest.mark.parametrize("name", APART)
def test_marks_stand_where_the_op_puts_them(name: str) -> None:
    flow, marks = carried(APART[name][0])
    found = {dim - len(flow.axes): label for dim, label in enumerate(flow.axes) if set(label) & set(marks)}
    assert found == {dim: (marks[which],) for dim, which in APART[name][1].items()} and not flow.mixes


@pytest.mark.parametrize("name", ALONG)
def test_ops_along_marks_say_so(name: str) -> None:
    function, words = ALONG[name]
    flow, _ = carried(function)
    assert words in flow.mixes and not flow.axes


def test_a_type_or_a_shape_alone_carries_no_marks() -> None:
    assert carried(lambda x: torch.ones(2).type_as(x))[0] == Flow({})


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.roll(1, 0), "not known to keep places apart"),
        (lambda x: torch.addmm(torch.ones(12, 5), x.flatten(0, 1), torch.ones(6, 5)), "differs from row to row"),
        (lambda x: F.linear(x.flatten(0, 1), x.flatten(0, 1)), "not known to keep places apart"),
        (lambda x: x.flatten(0, 1) + x.transpose(0, 1).flatten(0, 1), "combines different axes"),
    ],
    ids=["rolled", "an addend for each row", "its own weights", "merged in another order"],
)
def test_what_is_not_known_is_refused(function: Function, reason: str) -> None:
    with pytest.raises(Miss, match=reason):
        carried(function)
