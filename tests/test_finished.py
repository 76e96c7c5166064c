"""What a graph became, from disk: programs are made of it with nothing proven anew, or it is not used."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_stored import JUNK, mutants
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import fxbt
from fxbt import pipeline
from fxbt.graph.lowerings import LOWERINGS, Lowering
from fxbt.stored.errors import Malformed
from fxbt.stored.modules import ModulesReader

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}


class Causal(nn.Module):
    """An attention under padding and a table that says which keys a query sees."""

    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixed = nn.Embedding(50, 16), nn.Linear(16, 48)
        self.register_buffer("causal", torch.ones(12, 12, dtype=torch.bool).tril())

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        length = ids.shape[1]
        parts = self.mixed(self.embedding(ids)).chunk(3, -1)
        query, key, value = (part.view(*ids.shape, 2, 8).transpose(1, 2) for part in parts)
        seen = mask[:, None, None, :].bool() & self.causal[:length, :length]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)


class Returning(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.exp()


@pytest.fixture(autouse=True)
def _without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each graph that went through all steps."""
    seen: list[str] = []
    original = pipeline.compile

    def counted(captured: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(captured.module.__class__.__name__)
        return original(captured, *args, **kwargs)

    monkeypatch.setattr(pipeline, "compile", counted)
    return seen


def inputs(batch: int = 3, length: int = 7, padded: bool = True) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[0, length - 3 :] = 0
    return torch.randint(0, 50, (batch, length)), mask


def saved(model: nn.Module, folder: Path, *example: Tensor, **options: Any) -> Any:
    fast = fxbt.optimize(model, **options)
    fast(*example)
    assert not fast.report.fallbacks
    fxbt.save(fast, folder)
    return fast


def lines_of(folder: Path) -> list[str]:
    (path,) = folder.glob("graph-*")
    return path.read_text().splitlines()


def assert_serves(fast: Any, model: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> None:
    """Whether a graph from disk serves these calls, with the original's values at valid tokens."""
    for ids, mask in calls:
        found, expected = fast(ids, mask), model(ids, mask)
        found, expected = (value if isinstance(value, Tensor) else value[0] for value in (found, expected))
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    assert fast.report.latest.is_stored
    assert not fast.report.fallbacks


CALLS = [(3, 7, True), (3, 7, False), (3, 7, True), (2, 5, True), (1, 4, False), (2, 11, True)]


def bert() -> nn.Module:
    return BertModel(BertConfig(**SIZES), add_pooling_layer=False).eval()


@pytest.mark.parametrize("make", [bert, Causal])
def test_programs_are_made_with_nothing_proven_anew(make: Callable[[], Any], tmp_path: Path, compiled: Any) -> None:
    saved(make().eval(), tmp_path, *inputs())
    assert len(lines_of(tmp_path)) == 3
    compiled.clear()
    model = make().eval()  # other weights
    fast = fxbt.load(tmp_path, model)
    assert_serves(fast, model, [inputs(*call) for call in CALLS])
    assert not compiled
    assert not fast.report.notes
    calls = fast.report.latest.calls
    assert not calls or (calls["packed"], calls["dense"]) == (4, 2)
    assert bool(calls) is (make is bert)


def test_weights_that_change_are_seen(tmp_path: Path, compiled: Any) -> None:
    model = Causal().eval()
    saved(model, tmp_path, *inputs())
    compiled.clear()
    fast = fxbt.load(tmp_path, model)
    assert_serves(fast, model, [inputs()])
    model.mixed.weight.mul_(2)
    assert_serves(fast, model, [inputs(), inputs(padded=False)])
    fast.load_state_dict(Causal().state_dict())
    assert_serves(fast, model, [inputs()])
    model.mixed.weight = nn.Parameter(torch.randn(48, 16))
    assert_serves(fast, model, [inputs()])
    assert not compiled


def test_who_asks_what_was_done_is_told_all(tmp_path: Path, compiled: Any) -> None:
    model = bert()
    first = saved(model, tmp_path, *inputs()).report
    compiled.clear()
    other = fxbt.load(tmp_path, model)
    other(*inputs())
    assert not compiled
    second = other.report
    for name in ("before", "after", "hits"):
        assert getattr(second, name) == getattr(first, name), name
    assert second.diff() == first.diff()
    assert list(map(str, second.misses)) == list(map(str, first.misses))
    assert second.latest.peak_bytes == first.latest.peak_bytes
    assert second.latest.parts.hits == first.latest.parts.hits == 1
    assert second.why("attention") == first.why("attention")
    assert "from disk" in str(second)
    assert len(compiled) == 1
    assert_serves(other, model, [inputs(), inputs(2, 5)])


def test_what_is_told_is_of_the_weights_as_they_are(tmp_path: Path) -> None:
    model = Causal().eval()
    saved(model, tmp_path, *inputs())
    fast = fxbt.load(tmp_path, model)
    assert_serves(fast, model, [inputs()])
    model.mixed.weight = nn.Parameter(torch.randn(48, 16))
    assert_serves(fast, model, [inputs()])
    with torch.enable_grad():
        assert fast.report.hits["attention"] == 1
        assert fast.report.latest.peak_bytes
    model.mixed.weight = nn.Parameter(torch.randn(48, 16))
    assert_serves(fast, model, [inputs()])


def test_a_constant_that_a_proof_read_is_compared(tmp_path: Path, compiled: Any) -> None:
    saved(Causal().eval(), tmp_path, *inputs())
    compiled.clear()
    model = Causal().eval()
    model.causal.fill_(True)
    model.causal[2, 1] = False
    fast = fxbt.load(tmp_path, model)
    assert_serves(fast, model, [inputs(), inputs(padded=False), inputs(2, 9)])
    assert len(compiled) == 1  # the captured graph was proven anew


def test_a_constant_that_changes_later_ends_the_graph(tmp_path: Path) -> None:
    model = Causal().eval()
    saved(model, tmp_path, *inputs())
    fast = fxbt.load(tmp_path, model)
    assert_serves(fast, model, [inputs()])
    model.causal[:, 0] = False
    for call in CALLS:
        ids, mask = inputs(*call)
        rows = mask.bool() & model.causal[: ids.shape[1], : ids.shape[1]].any(1)
        torch.testing.assert_close(fast(ids, mask)[rows], model(ids, mask)[rows])


class Doubled(fxbt.Rule):
    """x + x  ->  2 x"""

    name = "doubled"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.exp(x) + 1.0

    def replace(self, x: Tensor) -> Tensor:
        return torch.exp(x) + 1.0


@pytest.mark.parametrize("options", [{"padding": "keep"}, {"verify": True}, {"rules": [Doubled()]}], ids=" ".join)
def test_other_options_prove_anew(options: dict[str, Any], tmp_path: Path, compiled: Any) -> None:
    model = Causal().eval()
    saved(model, tmp_path, *inputs())
    compiled.clear()
    fast = fxbt.load(tmp_path, model, **options)
    assert_serves(fast, model, [inputs(), inputs(2, 5)])
    assert len(compiled) == 1


@pytest.mark.parametrize("options", [{"verify": True}, {"rules": [Doubled()]}], ids=" ".join)
def test_what_own_options_made_is_for_nobody_else(options: dict[str, Any], tmp_path: Path) -> None:
    saved(Causal().eval(), tmp_path, *inputs(), **options)
    assert len(lines_of(tmp_path)) == 2


def test_lowerings_of_ones_own_are_lowered_anew(tmp_path: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Causal().eval()
    saved(model, tmp_path, *inputs())
    compiled.clear()
    monkeypatch.setitem(LOWERINGS, "mlp", [Lowering(torch.relu, "cpu")])
    assert_serves(fxbt.load(tmp_path, model), model, [inputs()])
    assert len(compiled) == 1


def test_gradients_have_nothing_finished(tmp_path: Path, compiled: Any) -> None:
    model = Causal().eval()
    with torch.enable_grad():
        saved(model, tmp_path, *inputs())
        assert len(lines_of(tmp_path)) == 2
        fast = fxbt.load(tmp_path, model)
        ids, mask = inputs()
        fast(ids, mask).sum().backward()
    assert model.mixed.weight.grad is not None
    assert fast.report.latest.is_stored
    assert not fast.report.fallbacks


def test_an_argument_that_is_returned_is_the_calls_own(tmp_path: Path) -> None:
    model = Returning()
    fast = fxbt.optimize(model)
    fast(torch.randn(3))
    fxbt.save(fast, tmp_path)
    other = fxbt.load(tmp_path, model)
    for x in (torch.randn(3), torch.randn(4)):
        found = other(x)
        assert found[0] is x
        torch.testing.assert_close(found[1], x.exp())
    assert not other.report.fallbacks


# Files that nobody of fxbt wrote


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model, folder = Causal().eval(), tmp_path_factory.mktemp("graphs")
    with torch.no_grad():
        saved(model, folder, *inputs())
    return model, folder


def with_finished(written: tuple[nn.Module, Path], folder: Path, finished: str) -> Any:
    """The model, loaded with another text of what its graph became."""
    model, original = written
    (path,) = original.glob("graph-*")
    head, graph, _ = path.read_text().splitlines()
    (folder / path.name).write_text(f"{head}\n{graph}\n{finished}\n")
    return fxbt.load(folder, model)


def test_whatever_is_changed_is_refused_or_harmless(written: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """The value that the first call gets is right each time: what is not refused when it is read, it compares."""
    model, folder = written
    for mutant in mutants(lines_of(folder)[2], 20):
        other = with_finished(written, tmp_path, json.dumps(mutant))
        ids, mask = inputs()
        torch.testing.assert_close(other(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])
        assert not other.report.fallbacks


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{", "{}", "[" * 100_000, '{"padding":"drop"}', "gASVDgAAAAAAAACMBXBvc2l4lC4="],
    ids=str,
)
def test_texts_that_are_no_graphs(text: str, written: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = written
    other = with_finished(written, tmp_path, text)
    ids, mask = inputs()
    torch.testing.assert_close(other(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])
    assert not other.report.fallbacks
    assert text == "" or not other.report.latest.is_stored


@pytest.mark.parametrize("part", ["modules", "dense", "assumes", "batch", "unpadded", "unmasked", "digests"])
@pytest.mark.parametrize("junk", [3, "text", [[]], {"a": 1}, [None], -1, 2**80, True], ids=str)
def test_each_part_has_its_kind(part: str, junk: Any, written: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = written
    parts = json.loads(lines_of(folder)[2])
    other = with_finished(written, tmp_path, json.dumps({**parts, part: junk}))
    ids, mask = inputs()
    torch.testing.assert_close(other(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])
    assert not other.report.fallbacks
    is_another_graph = part == "dense" and junk == 3  # a number of a graph that there is, but not the whole one
    assert not other.report.latest.is_stored or is_another_graph or part == "digests"


def test_a_graph_that_computes_something_else_is_refused(written: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = written
    parts = json.loads(lines_of(folder)[2])
    attentions = [node for graph in parts["modules"]["graphs"] for node in graph if "attention" in node[2]]
    assert attentions
    for node in attentions:
        node[4]["scale"] = ["float", (0.9).hex()]
    other = with_finished(written, tmp_path, json.dumps(parts))
    ids, mask = inputs()
    torch.testing.assert_close(other(ids, mask)[mask.bool()], model(ids, mask)[mask.bool()])
    assert "differ from the original's" in str(other.report.notes)
    assert not other.report.latest.is_stored
    assert not other.report.fallbacks


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: str(junk)[:20])
@pytest.mark.parametrize("part", ["sizes", "counts", "kinds", "constants", "graphs"])
def test_parts_of_modules_are_checked(part: str, junk: Any, written: tuple[nn.Module, Path]) -> None:
    model, folder = written
    modules = {**json.loads(lines_of(folder)[2])["modules"], part: junk}
    if junk == ({} if part == "constants" else [] if part == "counts" else None):
        return  # as it may be
    with pytest.raises((Malformed, TypeError, ValueError, IndexError, KeyError, AttributeError)):
        ModulesReader(modules, model).module(0)
