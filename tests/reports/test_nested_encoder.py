"""pytorch/pytorch#86120, #97111: nn.TransformerEncoder's nested fast path blanks padding, which is no wrong number."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxbt


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()


def padding(*lengths: int) -> Tensor:
    return torch.arange(32)[None] >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("first", [(32, 32, 32), (32, 20, 2), (32, 32, 31)], ids=str)
def test_its_calls_are_served_whatever_the_first_one_is(first: tuple[int, ...]) -> None:
    model = encoder()
    fast = fxbt.optimize(model)
    for lengths in (first, (32, 32, 32), (32, 20, 2), (32, 32, 31), (5, 20, 2)):
        x, mask = torch.randn(3, 32, 32), padding(*lengths)
        found, expected = fast(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # zeros at padding too
    assert fast.report.hits["attention"] == 2 and not fast.report.fallbacks
    assert fast.report.latest.calls["packed"] >= 2
