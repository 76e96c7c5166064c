"""pytorch/pytorch#116350, pytorch/pytorch#117974, huggingface/diffusers#5678, learnables/learn2learn#429.

torch's flash attention has no second derivative, which the eager attention it replaces has.
"""

import copy

import pytest
import torch
from torch import nn

import fxbt

transformers = pytest.importorskip("transformers")


def test_a_gradient_penalty_of_an_eager_bert() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model = transformers.BertModel(config).train()
    original = copy.deepcopy(model)
    fast = fxbt.optimize(model)

    def penalty(net: nn.Module, x: torch.Tensor) -> None:
        net.zero_grad()
        (g,) = torch.autograd.grad(net(inputs_embeds=x).last_hidden_state.pow(3).sum(), x, create_graph=True)
        g.square().sum().backward()

    for _ in range(2):
        x = torch.randn(2, 7, 16)
        penalty(fast, x.clone().requires_grad_())
        penalty(original, x.clone().requires_grad_())
    for p, q in zip(model.parameters(), original.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * float(q.grad.abs().max()) + 1e-4)
    assert fast.report.hits["attention"] == 1
    assert not fast.report.fallbacks
