"""Caches that grow in memory with room: no copy for each token, and no value that `torch.cat` would not show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxbt.kernels.growing import LEAST_ROOM, append, owned


class Layer:
    """One object that holds a tensor, as a cache's layer does."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def step(self, new: Tensor) -> None:
        """As a graph's call does it: the call holds the tensor, and so does the layer."""
        call = (self.keys, new)
        with owned(call, (0,)):
            longer = append(*call, 1)
        self.keys = longer


def rows(count: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, count, 3)


def grown(steps: int = 3) -> Layer:
    layer = Layer(rows(4))
    for _ in range(steps):
        layer.step(rows(1))
    return layer


def test_the_next_row_goes_into_the_room_behind() -> None:
    layer = grown()
    place, expected = layer.keys.data_ptr(), layer.keys.clone()
    for count in (1, 1, 3):
        new = rows(count)
        layer.step(new)
        expected = torch.cat([expected, new], 1)
        assert layer.keys.data_ptr() == place and torch.equal(layer.keys, expected)


def test_a_full_buffer_is_followed_by_one_twice_as_long() -> None:
    layer, expected = Layer(first := rows(4)), first.clone()
    places = set()
    for _ in range(3 * LEAST_ROOM):
        new = rows(1)
        layer.step(new)
        expected = torch.cat([expected, new], 1)
        places.add(layer.keys.data_ptr())
    assert torch.equal(layer.keys, expected) and len(places) <= 3


# Who can see a write to one in another: each keeps something of a layer's tensor.
KEPT: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda keys: keys,
    "a view": lambda keys: keys[:, :2],
    "a detached one": lambda keys: keys.detach(),
    "another layer": Layer,
    "numpy": lambda keys: keys.numpy(),
    "its base": lambda keys: keys._base,
    "a list": lambda keys: [keys],
}


@pytest.mark.parametrize("name", KEPT)
def test_whoever_keeps_a_part_of_it_has_it_alone(name: str) -> None:
    layer = grown()
    kept = KEPT[name](layer.keys)
    place, before = layer.keys.data_ptr(), layer.keys.clone()
    layer.step(new := rows(1))
    assert layer.keys.data_ptr() != place
    layer.keys.zero_()
    shown = {"another layer": lambda: kept.keys, "a list": lambda: kept[0]}.get(name, lambda: torch.as_tensor(kept))()
    count = min(shown.shape[1], before.shape[1])
    assert torch.equal(shown[:, :count], before[:, :count])
    layer.step(new)
    assert not layer.keys[:, :-1].any() and torch.equal(layer.keys[:, -1:], new)


def test_two_ways_on_from_one_tensor() -> None:
    layer = grown()
    ways = [Layer(layer.keys), Layer(layer.keys)]
    start = layer.keys.clone()
    del layer
    expected = [start, start]
    for _ in range(5):
        for i, way in enumerate(ways):
            way.step(new := rows(1))
            expected[i] = torch.cat([expected[i], new], 1)
    assert torch.equal(ways[0].keys, expected[0]) and torch.equal(ways[1].keys, expected[1])
    assert ways[0].keys.data_ptr() != ways[1].keys.data_ptr()


def test_a_tensor_that_is_not_what_it_was() -> None:
    layer = grown()
    layer.keys.transpose_(0, 2).transpose_(0, 2)
    layer.keys.mul_(2)
    before = layer.keys.clone()
    layer.step(new := rows(1))
    assert torch.equal(layer.keys, torch.cat([before, new], 1))
    layer.keys.resize_(2, 4, 3)
    before = layer.keys.clone()
    layer.step(new)
    assert torch.equal(layer.keys, torch.cat([before, new], 1))
    layer.keys.data = torch.ones(2, 2, 3)
    layer.step(new)
    assert torch.equal(layer.keys, torch.cat([torch.ones(2, 2, 3), new], 1))


def test_in_and_out_of_inference_mode() -> None:
    layer = grown()
    expected = layer.keys.clone()
    for mode in (True, True, False, False):
        with torch.inference_mode(mode):
            new = rows(1)
            layer.step(new)
            expected = torch.cat([expected, new], 1)
            assert torch.equal(layer.keys, expected)


def test_outside_of_a_graphs_call_it_is_cat() -> None:
    layer = grown()
    longer = append(layer.keys, rows(1), 1)
    assert longer._base is None and longer.is_contiguous()
    with owned((layer.keys,), (0,)):
        mixed = append(layer.keys, rows(1).double(), 1)
    assert mixed.dtype is torch.float64
    with pytest.raises(RuntimeError), owned((layer.keys,), (0,)):
        append(layer.keys, rows(1, batch=3), 1)
    assert append(layer.keys, rows(1), 1)._base is None
