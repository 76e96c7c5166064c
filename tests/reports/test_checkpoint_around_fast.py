"""pytorch/pytorch#144637, Comfy-Org/ComfyUI#15845: checkpoint ends a recomputation by an exception of its own."""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxbt


def test_layers_optimised_one_by_one_inside_checkpoint() -> None:
    layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2))
    expected = copy.deepcopy(layers)
    fast = [fxbt.optimize(layer) for layer in layers.train()]
    target = torch.randn(2, 7, 32)
    for _ in range(3):
        x = torch.randn(2, 7, 32)
        for modules, parameters in ((fast, layers), (expected.train(), expected)):
            parameters.zero_grad()
            value = x.clone().requires_grad_()
            for module in modules:
                value = checkpoint(module, value, use_reentrant=False)
            (value * target).sum().backward()
        for found, wanted in zip(layers.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    assert all(layer.report.hits["attention"] == 1 and not layer.report.fallbacks for layer in fast)
