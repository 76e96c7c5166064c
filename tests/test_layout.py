"""Values are returned as the model lays them out in memory, whatever the rewrites made of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxbt


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (batch, seq, heads, head_dim), contiguous as (batch, heads, seq, head_dim)."""
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


KINDS = {
    "as it is": lambda a, q, k: a,
    "transposed": lambda a, q, k: a.transpose(1, 2),
    "twice": lambda a, q, k: (a, a),
    "raw and reshaped": lambda a, q, k: (a, a.transpose(1, 2).flatten(2), a.view(a.shape[0], -1)),
    "in a dict, beside views of inputs": lambda a, q, k: {"a": a, "q": q, "k": k.transpose(1, 2), "first": k[:, 0]},
    "channels last": lambda a, q, k: a.contiguous(memory_format=torch.channels_last),
    "expanded": lambda a, q, k: a[:, :1].expand(-1, 3, -1, -1),
    "one head": lambda a, q, k: a[:, 0],
    "sliced": lambda a, q, k: a[:, :, 1:],
    "with one more dim": lambda a, q, k: a.unsqueeze(1),
    "heads apart": lambda a, q, k: a.unbind(1),
    "in halves": lambda a, q, k: a.split(8, -1),
    "scaled": lambda a, q, k: a * 2 + 1,
    "with a residual": lambda a, q, k: a + q.transpose(1, 2),
    "activated and transposed": lambda a, q, k: F.gelu(a).transpose(-1, -2),
    "joined": lambda a, q, k: torch.cat([a, q.transpose(1, 2)], 2),
    "where": lambda a, q, k: torch.where(q.transpose(1, 2) > 0, a, 0.0),
    "flipped": lambda a, q, k: a.flip(1),
    "sorted": lambda a, q, k: a.sort(-1)[0],
    "wider": lambda a, q, k: a.double(),
    "as complex numbers": lambda a, q, k: torch.view_as_complex(a.unflatten(-1, (-1, 2))),
}


class Returning(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return KINDS[self.kind](attended(q, k, v), q, k)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_returned_lies_as_in_the_model(kind):
    model = Returning(kind).eval()
    fast = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in ((2, 5), (2, 5), (3, 7)):
            inputs = [torch.randn(batch, length, 4, 16) for _ in range(3)]
            found, expected = pytree.tree_leaves(fast(*inputs)), pytree.tree_leaves(model(*inputs))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32's, also of what is wider
            assert [x.stride() for x in found] == [x.stride() for x in expected]
    assert fast.report.hits["attention"] >= 1
    assert not fast.report.fallbacks


def test_gradients_pass_through_the_layout():
    model = Returning("transposed").eval()
    fast = fxbt.optimize(model)
    for length in (5, 5, 6):
        inputs = [torch.randn(2, length, 4, 16, requires_grad=True) for _ in range(3)]
        found, expected = fast(*inputs), model(*inputs)
        assert found.stride() == expected.stride()
        gradients = [torch.autograd.grad(x.sin().sum(), inputs) for x in (found, expected)]
        torch.testing.assert_close(*gradients)
    assert fast.report.hits["attention"] >= 1


def test_nothing_is_copied_where_no_caller_sees_it():
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(64, 8)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.out(attended(q, k, v).transpose(1, 2).flatten(2))

    fast = fxbt.optimize(Inside().eval())
    with torch.no_grad():
        fast(*(torch.randn(2, 5, 4, 16) for _ in range(3)))
    assert fast.report.hits["attention"] == 1
    targets = [node.target for node in fast.report.latest.module.graph.nodes]
    assert torch.ops.aten.contiguous.default not in targets
