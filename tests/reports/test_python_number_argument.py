"""kijai/ComfyUI-MochiWrapper#44, pytorch/pytorch#177936: a Python number that changes at every call was captured for
each value, up to the limit, and the original ran for ever after."""

import torch
from torch import nn

import fxbt


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x, t):
        return self.layer(x * (1 + 0.01 * t))


def test_a_timestep_is_one_graph():
    model = Net().eval()
    fast, x = fxbt.optimize(model), torch.randn(2, 7, 32)
    with torch.no_grad():
        for t in range(12):
            torch.testing.assert_close(fast(x, t), model(x, t), rtol=1e-4, atol=1e-5)
    assert fast.report.made == 2 and len(fast.report.graphs) == 1 and not fast.report.fallbacks
