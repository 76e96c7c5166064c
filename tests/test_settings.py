"""Generators and settings of the process: put back after a trace, watched if a forward asks, refused if it sets."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxbt
from fxbt.capture.settings import Settings, generators_kept, numpy_unmoved

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")


class Doing(nn.Module):
    """A linear layer, then anything."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        result = self.then(y)
        return result if isinstance(result, Tensor) else y


def generators() -> tuple[Any, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_capturing_moves_no_generator_further_than_the_original(grad: bool) -> None:
    fast = fxbt.optimize(Doing(lambda y: y).train(grad))
    with torch.set_grad_enabled(grad):
        before = generators()
        fast(torch.ones(2, 4))
        assert generators() == before and fast.report.graphs
        fast.warmup(torch.ones(3, 4))
        assert generators() == before


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: np.random.seed(3), lambda: random.seed(3)], ids=range(4)
)
def test_a_forward_that_is_refused_moves_them_once(draw: Callable[[], Any]) -> None:
    fast, x = fxbt.optimize(Doing(lambda y: draw())), torch.ones(2, 4)
    random.seed(0)
    np.random.seed(0)
    draw()
    expected = generators()
    random.seed(0)
    np.random.seed(0)
    fast(x)
    assert generators() == expected and not fast.report.graphs


def test_a_warmup_leaves_the_generators_of_python_and_numpy() -> None:
    fast = fxbt.optimize(Doing(lambda y: y * (random.random() + np.random.rand())))
    before = generators()
    fast.warmup(torch.ones(2, 4))
    assert generators() == before


def test_a_seed_that_numpy_has_already_is_seen_in_the_trace() -> None:
    """The first run leaves the generator where it found it: nothing to see there."""
    np.random.seed(3)
    fast, x = fxbt.optimize(Doing(lambda y: np.random.seed(3))), torch.ones(2, 4)
    fast(x)
    assert not fast.report.graphs and "numpy" in fast.report.fallbacks[0]
    np.random.seed(5)
    fast(x)
    found = np.random.rand()
    np.random.seed(3)
    assert found == np.random.rand()


def test_blocks_that_keep_and_that_must_not_move() -> None:
    before = generators()
    with generators_kept([]):
        random.random()
        np.random.rand()
        torch.rand(1)
        assert generators() != before
    assert generators() == before
    with generators_kept([]), numpy_unmoved():
        torch.rand(1)
    with generators_kept([]), pytest.raises(fxbt.errors.CaptureError, match="numpy's random numbers"), numpy_unmoved():
        np.random.rand()


def with_filter() -> None:
    warnings.filterwarnings("ignore", message=f"no such {len(warnings.filters)}")


SETTERS: dict[str, Callable[[], Any]] = {
    "set_num_threads": lambda: torch.set_num_threads(torch.get_num_threads()),
    "use_deterministic_algorithms": lambda: torch.use_deterministic_algorithms(False),
    "set_default_dtype": lambda: torch.set_default_dtype(torch.float32),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("highest"),
    "enable_flash_sdp": lambda: torch.backends.cuda.enable_flash_sdp(True),
    "set_printoptions": lambda: torch.set_printoptions(precision=4),
    "torch.random.manual_seed": lambda: torch.cuda.manual_seed(3),
    "torch.Generator.manual_seed": lambda: torch.default_generator.manual_seed(3),
    "torch.random.initial_seed": torch.initial_seed,
    "warnings.filters": with_filter,
}


@pytest.mark.parametrize("name", SETTERS)
def test_what_sets_something_is_refused_also_where_it_is_so_already(name: str) -> None:
    fast, x = fxbt.optimize(Doing(lambda y: SETTERS[name]()).eval()), torch.randn(2, 4)
    with warnings.catch_warnings(), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), fast.linear(x))
    assert not fast.report.graphs and name in fast.report.fallbacks[0]


def in_a_block(y: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        return y * 2


def test_blocks_that_set_and_take_back_are_served() -> None:
    fast, x = fxbt.optimize(Doing(in_a_block).eval()), torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), 2 * fast.linear(x))
    assert fast.report.graphs and not fast.report.fallbacks


def test_a_setting_that_is_asked_for_is_watched() -> None:
    fast, x = fxbt.optimize(Doing(lambda y: y * torch.get_num_threads()).eval()), torch.randn(2, 4)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            for count in (1, 1, 2, 2, 1):
                torch.set_num_threads(count)
                torch.testing.assert_close(fast(x), count * fast.linear(x))
    finally:
        torch.set_num_threads(threads)
    assert fast.report.graphs and not fast.report.fallbacks


def test_settings_tell_what_changed() -> None:
    settings, precision = Settings(), torch.get_float32_matmul_precision()
    assert settings.holds() and not settings.changed()
    torch.set_float32_matmul_precision("high")
    try:
        assert settings.changed() == ["torch.get_float32_matmul_precision()"] and not settings.holds()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert settings.holds()
