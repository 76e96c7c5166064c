"""Calls with an axis of 0 or 1: a trace takes for granted that no size is 0, Python in a forward may not."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxbt

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")

ASKED: dict[str, Callable[[Tensor], bool]] = {
    "length of 0": lambda x: x.shape[1] == 0,
    "elements": lambda x: x.numel() == 0,
    "product": lambda x: x.shape[0] * x.shape[1] == 0,
    "at least one": lambda x: max(x.shape[0], 1) != x.shape[0],
    "one token": lambda x: x.shape[1] == 1,
}


class Asking(nn.Module):
    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum((0, 1)) + (7 if self.ask(x) else 0)


@pytest.mark.parametrize("first", [(2, 5), (0, 5)], ids=["full first", "empty first"])
@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_sizes_of_0_and_1_go_their_own_way(ask: Callable[[Tensor], bool], first: tuple[int, int]) -> None:
    model = Asking(ask).eval()
    eager, fast = copy.deepcopy(model), fxbt.optimize(model)
    with torch.no_grad():
        for size in (first, (0, 5), (2, 0), (2, 1), (3, 4)):
            x = torch.randn(*size, 8)
            torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-4)
    assert fast.report.graphs and fast.report.hits["attention"] >= 1
