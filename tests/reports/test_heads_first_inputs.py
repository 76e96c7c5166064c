"""pytorch#111190, #119760: attention of q, k, v given as (batch, heads, seq, dim) was found for one length only."""

import math

import pytest
import torch
from torch import Tensor, nn

import fxbt

SCALES = {
    "power": lambda scores, q: scores * q.shape[-1] ** -0.5,
    "root": lambda scores, q: scores / math.sqrt(q.shape[-1]),
    "no root": lambda scores, q: scores / q.size(-1),
}
SHAPES = {
    "one length": [(2, 4, 9, 16), (2, 4, 9, 16)],
    "other lengths": [(2, 4, 9, 16), (2, 4, 12, 16), (2, 4, 30, 16), (2, 4, 9, 16)],
    "other batches and heads": [(2, 4, 9, 16), (1, 4, 9, 16), (3, 2, 9, 16)],
    "other head_dims": [(2, 4, 9, 16), (2, 4, 9, 8), (2, 4, 9, 24)],
    "without heads": [(6, 9, 16), (6, 12, 16), (3, 12, 8)],
}


class Core(nn.Module):
    def __init__(self, scale: str):
        super().__init__()
        self.scale = scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SCALES[self.scale](q @ k.transpose(-1, -2), q).softmax(-1) @ v


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_every_graph_has_the_attention(shapes, scale):
    model = Core(scale).eval()
    fast = fxbt.optimize(model)
    with torch.no_grad():
        for shape in SHAPES[shapes]:
            q, k, v = (torch.randn(*shape[:-2], shape[-2] + more, shape[-1]) for more in (0, 2, 2))
            torch.testing.assert_close(fast(q, k, v), model(q, k, v))
    assert [graph.hits["attention"] for graph in fast.report.graphs.values()] == [1] * len(fast.report.graphs)
    assert fast.report.graphs
    assert not fast.report.fallbacks


def test_sizes_that_never_change_stay_numbers():
    fast = fxbt.optimize(Core("power").eval())
    with torch.no_grad():
        for length in (9, 12):
            fast(*(torch.randn(2, 4, length, 16) for _ in range(3)))
    assert fast.report.graphs
    attentions = [node for node in fast.report.latest.module.graph.nodes if fxbt.op_of(node) == "attention"]
    assert [node.kwargs["scale"] for node in attentions] == [0.25]
