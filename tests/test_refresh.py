"""Writes to weights that PyTorch does not count: seen within a known number of calls, or at once by `fxbt.refresh`."""

import mmap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxbt
import fxbt.lower.cpu.linears
from fxbt.lower import patrol
from fxbt.lower.patrol import Patrol

SIZE = 96
X = torch.randn(2, SIZE)


@pytest.fixture(autouse=True)
def packed(torchs_kernels, monkeypatch):
    """Linears read packed copies of their weights, and a patrol takes many rounds."""
    monkeypatch.setattr(fxbt.lower.cpu.linears, "PACKED_FROM_ELEMENTS", 0)
    monkeypatch.setattr(fxbt.lower.cpu.linears, "is_avx512_supported", lambda: True)
    monkeypatch.setattr(patrol, "SMALLEST_PART", 2048)
    with torch.no_grad():
        yield


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def optimized(model=None, **options):
    fast = fxbt.optimize((model or Net()).eval(), (X,), **options)
    assert len(fast.report.graphs) == 1, fast.report.fallbacks
    assert 20 < fast.report.latest.rounds <= patrol.ROUNDS
    return fast


def is_right(fast):
    found, expected = fast(X), fxbt.restore(fast)(X)
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def unsampled(weight):
    """An element that the samples do not have: the write is seen by nothing else."""
    return weight.shape[0] // 2 + 1, 7


def write_data(weight):
    weight.data[unsampled(weight)] = 50.0


def write_numpy(weight):
    weight.detach().numpy()[unsampled(weight)] = 50.0


def write_storage(weight):
    row, column = unsampled(weight)
    weight.untyped_storage()[4 * (row * weight.shape[1] + column) + 3] = 0x42


def swap_two(weight):
    """The same elements, two of them in each other's place."""
    a, b = unsampled(weight), (unsampled(weight)[0], 8)
    weight.data[a] = 30.0
    values = weight.data[a].clone(), weight.data[b].clone()
    weight.data[b], weight.data[a] = values


def flip_signs(weight):
    row, column = unsampled(weight)
    weight.data[row, column : column + 2] *= -30


def write_last(weight):
    weight.data[-1, -1] = 50.0


WRITES = [write_data, write_numpy, write_storage, swap_two, flip_signs, write_last]


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_every_write_is_seen_within_so_many_calls(write, name):
    fast = optimized()
    assert is_right(fast)
    write(getattr(fast, name).weight)
    for _ in range(fast.report.latest.rounds):
        fast(X)
    assert is_right(fast)
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_refresh_sees_it_at_once(write):
    fast = optimized()
    write(fast.second.weight)
    assert fxbt.refresh(fast) is True
    assert is_right(fast)
    assert fxbt.refresh(fast) is False


def test_a_bias_is_read_as_it_is():
    fast = optimized()
    fast.first.bias.data[3] = 9.0
    assert is_right(fast)


def test_weights_that_numpy_owns():
    array = np.random.default_rng(0).normal(size=(SIZE, SIZE)).astype(np.float32)
    model = Net()
    model.first.weight = nn.Parameter(torch.from_numpy(array))
    fast = optimized(model)
    array[unsampled(array)] = 50.0
    assert fxbt.refresh(fast) and is_right(fast)


def test_weights_in_a_mapped_file(tmp_path):
    path = tmp_path / "weights"
    np.random.default_rng(0).normal(size=SIZE * SIZE).astype(np.float32).tofile(path)
    model = Net()
    model.first.weight = nn.Parameter(torch.from_file(str(path), shared=True, size=SIZE * SIZE).view(SIZE, SIZE))
    fast = optimized(model)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[4 * (SIZE * 50 + 7) : 4 * (SIZE * 50 + 8)] = np.float32(50.0).tobytes()
    for _ in range(fast.report.latest.rounds):
        fast(X)
    assert is_right(fast)


def test_refresh_goes_into_a_module_and_needs_something_optimised():
    inside = nn.Sequential(optimized(), nn.ReLU())
    write_data(inside[0].first.weight)
    assert fxbt.refresh(inside) and is_right(inside[0])
    with pytest.raises(fxbt.NotOptimizedError, match="refresh\\(\\) was given a Linear with nothing optimised"):
        fxbt.refresh(nn.Linear(2, 2))


def test_refresh_before_any_capture_and_with_gradients_has_nothing_to_do():
    fast = fxbt.optimize(Net())
    assert fxbt.refresh(fast) is False
    with torch.enable_grad():
        fast(X)
    assert fast.report.latest.rounds == 0 and fxbt.refresh(fast) is False


def test_counted_writes_are_seen_at_once():
    fast = optimized()
    fast.first.weight.mul_(2.0)
    assert is_right(fast)


def weights_of(dtype):
    if dtype.is_floating_point:
        return torch.randn(64, 129).to(dtype)
    return torch.randint(0, 2, (64, 129)).to(dtype)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_patrol_sees_every_single_element(dtype):
    weight = weights_of(dtype)
    watching = Patrol([weight.flatten()[:0], weight, torch.zeros((), dtype=dtype)])
    assert watching.holds() and all(watching.next_holds() for _ in range(3 * watching.rounds))
    flat = weight.view(-1)
    for place in (0, 1, 777, flat.numel() - 1):
        kept = flat[place].clone()
        flat[place] = ~kept if dtype is torch.bool else kept + 1
        assert not watching.holds()
        assert [watching.next_holds() for _ in range(watching.rounds)].count(False) == 1
        flat[place] = kept
        assert watching.holds()


def test_a_patrol_sees_swaps_anywhere():
    weight = torch.randn(4096)
    watching = Patrol([weight])
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        a, b = torch.randint(4096, (2,), generator=generator).tolist()
        values = weight[a].item(), weight[b].item()
        weight[a], weight[b] = values[1], values[0]
        assert watching.holds() == (a == b)
        weight[a], weight[b] = values
    assert watching.holds()


def test_a_patrol_has_a_bounded_number_of_rounds():
    assert Patrol([]).rounds == 0 and Patrol([]).next_holds()
    assert Patrol([torch.zeros(5_000_000)]).rounds <= patrol.ROUNDS
