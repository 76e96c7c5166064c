"""Signs of life: what a warm-up says of itself, the line on a terminal, and calls that may not fall back."""

import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt
from fxbt import dispatch, pipeline, progress

X = torch.randn(2, 3, 8)


class Net(nn.Module):
    """One encoder layer; it asks a value of its input, and goes another way by it, where `asks`."""

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.asks = asks

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        return object() if self.asks else x


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_a_warm_up_says_what_it_did_and_how_long_each_part_took() -> None:
    fast: Any = fxbt.optimize(Net().eval())
    done = fast.warmup(X)
    assert isinstance(done, fxbt.Warmup)
    assert done.captured == tuple(fast.report.graphs) and len(done.captured) == 1
    assert not done.fallbacks
    assert {"run the original", "capture", "run rules", "lower whole", "drop padded tokens"} <= set(done.seconds)
    assert done.total == pytest.approx(sum(done.seconds.values())) and min(done.seconds.values()) >= 0
    assert done.seconds["capture"] < fast.report.latest.capture_seconds + 1e-3  # nothing counts twice
    assert str(done).startswith(f"captured {done.captured[0]} in ")
    again = fast.warmup(X)
    assert not again.captured and not again.fallbacks and "captured nothing new" in str(again)


@pytest.mark.filterwarnings("ignore::fxbt.FxbtWarning")
def test_a_warm_up_that_finds_no_graph_says_why() -> None:
    done = fxbt.optimize(Net(asks=True).eval()).warmup(X)
    assert not done.captured
    assert "cannot be captured" in done.fallbacks[0] and "runs the original" in str(done)


def watched_line(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    """What a first call writes to a stream as stderr, where captures take long."""
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.01)
    monkeypatch.setattr("sys.stderr", stream)
    fast: Any = fxbt.optimize(Net().eval())
    fast(X)
    assert len(fast.report.graphs) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "fxbt-progress"]
    return stream.getvalue()


def test_a_long_capture_shows_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = watched_line(monkeypatch, Terminal())
    assert "fxbt: Net: capture" in text
    assert "\n" not in text.rstrip("\n")


def test_elsewhere_or_where_it_is_turned_off_nothing_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not watched_line(monkeypatch, io.StringIO())
    monkeypatch.setenv("FXBT_PROGRESS", "0")
    assert not watched_line(monkeypatch, Terminal())


def test_a_short_capture_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 600.0)
    fxbt.optimize(Net().eval())(X)
    assert not stream.getvalue()


def test_the_line_names_the_module_whose_forward_runs() -> None:
    model = nn.Sequential(nn.Identity(), Watched())
    with progress.watched(model) as watch, progress.part("capture"):
        model[1].watch = watch
        model[1].paths = {id(model[1]): "1"}
        model(X)
    assert model[1].text == "Sequential: capture 1"


class Watched(nn.Module):
    watch: Any
    paths: Any

    def forward(self, x: Tensor) -> Tensor:
        self.text = progress.text_of(self.watch, self.paths)
        return x


def test_parts_count_for_themselves_alone_and_nothing_is_watched_afterwards() -> None:
    with progress.watched(nn.Identity()) as watch:
        with pytest.raises(ValueError), progress.part("outer"), progress.part("inner", "detail"):
            assert watch.now == ("inner", "detail")
            raise ValueError
        with progress.watched(nn.Identity()) as other:
            assert other is watch
        assert watch.now[0] == "other"
    assert set(watch.seconds) == {"other", "outer", "inner"}
    with progress.part("alone"):
        pass
    assert "alone" not in watch.seconds


def test_strict_raises_with_the_reason_at_every_such_call() -> None:
    fast: Any = fxbt.optimize(Net(asks=True).eval(), strict=True)
    for _ in range(2):
        with pytest.raises(fxbt.FallbackError, match="Net would run its original forward: .*cannot be captured"):
            fast(X)
    with pytest.raises(fxbt.FallbackError, match="cannot be captured"):
        fast.warmup(X)
    with pytest.raises(fxbt.FallbackError, match="cannot be captured"):
        fxbt.optimize(Net(asks=True).eval(), (X,), strict=True)


def test_strict_serves_what_has_a_graph_and_leaves_the_models_own_errors() -> None:
    model = Net().eval()
    fast: Any = fxbt.optimize(model, strict=True)
    for x in (X, torch.randn(3, 5, 8), X):
        torch.testing.assert_close(fast(x), model(x))
    assert fast.report.latest.races is None and not fast.report.fallbacks
    with pytest.raises(RuntimeError) as raised:
        fast(torch.randn(2, 3, 7))
    assert not isinstance(raised.value, fxbt.FallbackError)
    fast.forward = lambda x: x + 1  # a wrapper is the caller's own
    torch.testing.assert_close(fast(X), X + 1)


def test_strict_raises_where_the_limit_of_graphs_is_reached_or_fxbt_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: Any = fxbt.optimize(Net().eval(), strict=True, max_captures=1)
    fast(X)
    with pytest.raises(fxbt.FallbackError, match="max_captures"):
        fast(X[0])

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError("injected")

    monkeypatch.setattr(pipeline, "compile", failing)
    with pytest.raises(fxbt.FallbackError, match="injected"):
        fxbt.optimize(Net().eval(), strict=True)(X)
    monkeypatch.setattr(dispatch.Dispatcher, "_find", failing)
    broken: Any = fxbt.optimize(Net().eval(), strict=True)
    for _ in range(dispatch.MOST_FAULTS + 1):
        with pytest.raises(fxbt.FallbackError, match="fxbt itself failed"):
            broken(X)


def test_a_strict_part_of_another_optimised_model_leaves_that_one_alone() -> None:
    model = nn.Sequential(fxbt.optimize(Net().eval(), strict=True), nn.Identity()).eval()
    fast: Any = fxbt.optimize(model)
    for _ in range(2):
        torch.testing.assert_close(fast(X), fxbt.restore(model[0])(X))
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks
