"""Settings every test runs under: no network, one thread (tests run in parallel processes), a fixed seed."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["FXBT_TUNE"] = "0"  # kernels by rule, not by the clock

import pytest
import torch
from torch import fx

import fxbt.kernels.native
import fxbt.lower.program
from fxbt.lower.bindings import called_by

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` compares a text with tests/golden/<name>.txt."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            file.write_text(text + "\n")
        assert text + "\n" == file.read_text(), f"pytest --update-golden writes {file.name} anew"

    return compare


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws while it is imported does not depend on the files before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _grad_mode_is_given_back() -> Iterator[None]:
    torch.set_grad_enabled(True)
    yield
    assert torch.is_grad_enabled(), "the test, or what it called, left gradients disabled"


@pytest.fixture
def torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By rule, linears and attention run on torch's kernels, not on fxbt's own."""
    monkeypatch.setattr(fxbt.kernels.native, "comes_first", lambda: False)


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The targets of the program compiled last, in order."""
    targets: list[object] = []

    def spy(graph: fx.Graph) -> Callable[..., Any]:
        targets[:] = [called_by(node) for node in graph.nodes if node.op == "call_function"]
        return original(graph)

    original = fxbt.lower.program.compile_graph
    monkeypatch.setattr(fxbt.lower.program, "compile_graph", spy)
    return targets
