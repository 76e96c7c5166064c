"""The name of a rule on a node is for those who read graphs: without it, or with another, nothing is decided anew."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxbt
from fxbt.graph import record
from fxbt.kernels.differentiable import attention_with_gradient
from fxbt.rewrite import splice


class Returning(nn.Module):
    """Attention of (batch, seq, 4 heads, 16), returned as the model lays it out: heads outside of positions."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
        return (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v


def inputs(length: int) -> list[Tensor]:
    return [torch.randn(2, length, 4, 16, requires_grad=True) for _ in range(3)]


def targets(fast: nn.Module) -> list[object]:
    return [node.target for node in fast.report.latest.module.graph.nodes]


@pytest.mark.parametrize("label", [record.RULE, "a key that nobody reads"])
def test_a_label_decides_nothing(label: str, monkeypatch: pytest.MonkeyPatch, lowered: list[object]) -> None:
    monkeypatch.setattr(splice, "RULE", label)
    model = Returning().eval()
    fast = fxbt.optimize(model)
    for length in (5, 5, 7):
        given = inputs(length)
        found, expected = fast(*given), model(*given)
        assert found.stride() == expected.stride()
        for result in (found, expected):
            (first,) = torch.autograd.grad(result.pow(2).sum(), given[0], create_graph=True)
            first.square().sum().backward()
            given.append(given[1].grad.clone())
            given[1].grad = None
        torch.testing.assert_close(*given[3:], rtol=1e-4, atol=1e-4)
    assert attention_with_gradient in lowered
    assert torch.ops.aten.contiguous.default in targets(fast)
    assert fast.report.hits["attention"] == 1
    assert not fast.report.fallbacks


def test_what_the_model_itself_computes_so_is_its_own(lowered: list[object]) -> None:
    class Own(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    fast = fxbt.optimize(Own().eval())
    fast(*inputs(5))
    assert lowered == [nn.functional.scaled_dot_product_attention]


def test_the_label_has_one_name() -> None:
    files = [path for path in Path(fxbt.__file__).parent.rglob("*.py") if f'"{record.RULE}"' in path.read_text()]
    assert [path.name for path in files] == ["record.py"]
