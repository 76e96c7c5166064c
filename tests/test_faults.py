"""Whatever fails in fxbt before, during or after a call: the caller gets the original's result, or its own error."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxbt
from fxbt import dispatch, making, pipeline

X = torch.randn(2, 3, 8)


class Fault(RuntimeError):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"out": self.layer(x, src_key_padding_mask=mask)}


def failing(*args: Any, **kwargs: Any) -> Any:
    raise Fault("injected")


# Where a fault is injected: a name in fxbt and the calls that meet it ("first" captures, "later" is served by a graph).
STAGES = {
    "traced": (dispatch, "is_looked_through"),
    "binder": (dispatch.Binder, "call"),
    "key": (dispatch.Dispatcher, "_key"),
    "label": (making.Label, "of"),
    "text": (making.Text, "of"),
    "shelf": (making.Shelf, "take"),
    "find": (dispatch.Dispatcher, "_find"),
    "run graph": (dispatch.Dispatcher, "_run_graph"),
    "first call": (dispatch.Dispatcher, "_first_call"),
    "model state": (dispatch, "ModelState"),
    "watched": (dispatch, "Watched"),
    "written": (dispatch.Watched, "written"),
    "hooks": (dispatch, "foreign_hook"),
    "preserved": (dispatch, "preserved"),
    "arguments": (dispatch, "Arguments"),
    "capture": (making, "_captured"),
    "compile": (pipeline, "compile"),
    "canonicalize": (pipeline, "canonicalize"),
    "rules": (pipeline, "run_stage"),
    "lowering": (pipeline, "Program"),
    "padding": (pipeline, "drop_padding"),
    "parts": (pipeline, "batch_of"),
    "snapshot": (pipeline, "Snapshot"),
    "compare": (making.Comparison, "all"),
    "remember": (dispatch.Failures, "remember"),
    "report": (dispatch.Report, "add_graph"),
    "fallbacks": (dispatch.Report, "add_fallback"),
    "rebuild": (dispatch.outputs.Rebuild, "__call__"),
    "flatten": (dispatch.outputs, "flatten"),
    "unpadding": (pipeline.Unpadding, "_decide"),
    "program": (pipeline.Program, "__call__"),
    "hidden hooks": (dispatch, "hidden"),
}


def outcome(call: Callable[[], dict[str, Tensor]]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()["out"]


@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_anywhere_gives_the_originals_result(
    stage: str, grad: bool, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net().eval()
    fast: Any = fxbt.optimize(model)
    with torch.set_grad_enabled(grad):
        if when == "later":
            outcome(lambda: fast(X))
        owner, name = STAGES[stage]
        monkeypatch.setattr(owner, name, failing)
        for x in (X, torch.randn(3, 5, 8)):
            expected = model(x)["out"]
            found = outcome(lambda x=x: fast(x))
            torch.testing.assert_close(found, expected)
            assert found.requires_grad == expected.requires_grad
        with pytest.raises((RuntimeError, AssertionError), match="embed"):
            outcome(lambda: fast(torch.randn(2, 3, 7)))
    monkeypatch.undo()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(outcome(lambda: fast(X)), model(X)["out"])
    assert torch.is_grad_enabled()


def test_faults_are_told_and_end_after_some(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: Any = fxbt.optimize(Net().eval())
    monkeypatch.setattr(dispatch, "ModelState", failing)
    with pytest.warns(fxbt.FxbtWarning, match=re.escape("fxbt itself failed, not the model (Fault: injected)")):
        fast(X)
    asked = []
    monkeypatch.setattr(dispatch, "ModelState", lambda model: asked.append(model) or failing())
    for _ in range(2 * dispatch.MOST_FAULTS):
        outcome(lambda: fast(X))
    assert len(asked) == dispatch.MOST_FAULTS - 1
    assert any("no further calls use fxbt" in reason for reason in fast.report.fallbacks)


def test_warnings_as_errors_are_the_users_wish() -> None:
    fast: Any = fxbt.optimize(Net().eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxbt.FxbtWarning)
        with pytest.raises(fxbt.FxbtWarning, match="holds a object"):
            fast(X, mask=object())


def test_the_warning_points_to_the_callers_line() -> None:
    fast: Any = fxbt.optimize(Net().eval())
    with pytest.warns(fxbt.FxbtWarning) as caught, pytest.raises(Exception, match="."):
        fast(X, mask=object())
    assert caught[0].filename == __file__


def test_a_users_interrupt_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    fast: Any = fxbt.optimize(Net().eval())
    monkeypatch.setattr(making, "_captured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fast(X)
    monkeypatch.undo()
    torch.testing.assert_close(fast(X)["out"], fxbt.restore(fast)(X)["out"])
    assert len(fast.report.graphs) == 1


def test_a_graph_without_enough_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*args: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    fast: Any = fxbt.optimize(Net().eval())
    with torch.no_grad():
        fast(X)
        monkeypatch.setattr(pipeline.Program, "__call__", lacking)
        torch.testing.assert_close(outcome(lambda: fast(X)), fxbt.restore(fast)(X)["out"])
        monkeypatch.undo()
        calls = len(fast.report.fallbacks)
        fast(X)
    assert calls == len(fast.report.fallbacks) == 1 and len(fast.report.graphs) == 1


class Stopped(Exception):
    pass


@pytest.mark.parametrize("raised", [Stopped, ValueError])
def test_what_a_saved_tensor_hook_raises_is_the_callers(raised: type[Exception]) -> None:
    fast: Any = fxbt.optimize(Net().eval())
    fast(X)

    def stop(tensor: Tensor) -> Tensor:
        raise raised("enough")

    with torch.autograd.graph.saved_tensors_hooks(stop, lambda tensor: tensor), pytest.raises(raised, match="enough"):
        fast(X)
    assert not fast.report.fallbacks
    fast(X)
    assert len(fast.report.graphs) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])
def test_checkpointing_around_the_model(dropout: float, reentrant: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True).train()
    fast: Any = fxbt.optimize(layer)
    for _ in range(3):
        x = torch.randn(2, 3, 8, requires_grad=True)
        layer.zero_grad()
        out = checkpoint(fast, x, use_reentrant=reentrant)
        (out * out.detach()).sum().backward()  # the recomputation must draw what the first run drew
        assert x.grad is not None and x.grad.isfinite().all()
        if not dropout:
            wanted = x.detach().requires_grad_()
            expected = layer(wanted)
            (expected * expected.detach()).sum().backward()
            torch.testing.assert_close(x.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    assert len(fast.report.graphs) >= 1 and not fast.report.fallbacks


def test_offloading_saved_tensors_around_the_model() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train()
    fast: Any = fxbt.optimize(layer)
    for _ in range(2):
        x = torch.randn(2, 3, 8, requires_grad=True)
        with torch.autograd.graph.save_on_cpu():
            out = fast(x)
        (found,) = torch.autograd.grad(out.sum(), x)
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


# Models whose parts cannot be looked at


class Raising(dict[str, int]):
    def copy(self) -> Any:
        raise Fault("no copies")


class NoAttributes:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise Fault("nothing to see")


def with_part(make: Callable[[], Any], buffer: bool = False) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        model = Net().eval()
        if buffer:
            model.register_buffer("part", make())
        else:
            model.part = make()
        return model

    return built


def freed() -> Tensor:
    tensor = torch.zeros(1 << 10)
    tensor.untyped_storage().resize_(0)
    return tensor


def scripted() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(8, 8)), Net()).eval()


ODD = {
    "copy raises": (with_part(lambda: Raising(a=1)), True),
    "attributes raise": (with_part(NoAttributes), True),
    "sparse buffer": (with_part(lambda: torch.eye(3).to_sparse(), buffer=True), True),
    "csr buffer": (with_part(lambda: torch.eye(3).to_sparse_csr(), buffer=True), True),
    "meta buffer": (with_part(lambda: torch.empty(3, device="meta"), buffer=True), True),
    "nested buffer": (
        with_part(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), buffer=True),
        False,
    ),
    "jagged": (
        with_part(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)),
        True,
    ),
    "quantized buffer": (with_part(lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), True), False),
    "freed storage": (with_part(freed), True),
    "empty": (with_part(lambda: torch.empty(0, 3)), True),
    "script module": (scripted, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_odd_parts_do_not_matter(name: str) -> None:
    make, is_served = ODD[name]
    model = make()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for x in (X, torch.randn(3, 5, 8), X):
            torch.testing.assert_close(fast(x)["out"], model(x)["out"])
    if is_served:
        assert len(fast.report.graphs) == 1 and not fast.report.fallbacks
    else:
        assert not fast.report.graphs and "cannot be captured" in fast.report.fallbacks[0]


@pytest.mark.filterwarnings("ignore")
def test_a_model_on_the_meta_device() -> None:
    model = Net().to("meta").eval()
    fast: Any = fxbt.optimize(model)
    for _ in range(2):
        assert fast(X.to("meta"))["out"].is_meta and model(X.to("meta"))["out"].shape == X.shape
    assert not fast.report.graphs and "meta tensor" in fast.report.fallbacks[0]


def test_a_rule_of_the_users_that_changes_the_numbers_says_so_at_once() -> None:
    wrong = fxbt.rule(lambda x: torch.tanh(x), lambda x: torch.sin(x), name="wrong")

    class Tanh(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    fast: Any = fxbt.optimize(Tanh(), rules=[wrong])
    with pytest.warns(fxbt.FxbtWarning, match="rewrite by the rule 'wrong' was refused.*changes the values"):
        fast(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fast(X), torch.tanh(X))
