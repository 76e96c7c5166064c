"""pytorch/pytorch#86261, #47887: a TorchScript submodule inside an ordinary model must not make calls fail."""

import pytest
import torch
from torch import nn

import fxbt


def test_a_scripted_part_runs_the_original_and_says_so() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(16, 32), nn.GELU()))
    model = nn.Sequential(scripted, nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
    fast = fxbt.optimize(model)
    with torch.no_grad(), pytest.warns(fxbt.FxbtWarning, match="0 is a TorchScript module"):
        for _ in range(2):
            x = torch.randn(2, 7, 16)
            torch.testing.assert_close(fast(x), model(x))
    assert not fast.report.graphs
