"""Graphs from disk: served without a capture where all is as it was, refused with a reason where anything is not."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxbt
import fxbt.making
import fxbt.stored.conditions

SCALE = torch.tensor([2.0, 3.0])
FACTOR = 2.0


class Tower(nn.Module):
    """A small model with a config, a constant of its own, and globals that it reads."""

    def __init__(self, width: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.options = {"act": "gelu", "width": width}
        self.first = nn.Linear(width, 2 * width, bias=bias)
        self.second = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        hidden = self.second(getattr(F, self.options["act"])(self.first(x)))
        hidden = self.norm(hidden + x) * FACTOR + torch.tensor([0.5]) * SCALE.sum()
        if mask is not None:
            hidden = hidden.masked_fill(mask[..., None], 0.0)
        return {"hidden": hidden, "length": x.shape[1], "kind": "tower"}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).relu()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() if (x > 0).all() else x - 1


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        return self.last + 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that were captured."""
    seen: list[str] = []
    original = fxbt.making._captured

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(model).__name__)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(fxbt.making, "_captured", counted)
    return seen


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FXBT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def saved(model: nn.Module, folder: Path, *inputs: Any, **kwargs: Any) -> Path:
    fast = fxbt.optimize(model)
    fast(*inputs, **kwargs)
    assert not fast.report.fallbacks
    (path,) = fxbt.save(fast, folder)
    return path


def is_served(fast: Any, captures: list[str]) -> bool:
    """Whether a graph from disk serves a model's calls, and no other was captured."""
    report = fast.report
    return report.latest is not None and report.latest.is_stored and not captures and not report.fallbacks


def test_a_saved_graph_serves_another_object_of_the_model(tmp_path: Path, captures: list[str]) -> None:
    model = Tower().eval()
    saved(model, tmp_path, torch.randn(2, 5, 8))
    captures.clear()
    fast = fxbt.load(tmp_path, copy.deepcopy(model))
    for shape in ((2, 5, 8), (2, 5, 8), (3, 7, 8), (1, 1, 8)):
        x = torch.randn(shape)
        found, expected = fast(x), model(x)
        torch.testing.assert_close(found["hidden"], expected["hidden"])
        assert (found["length"], found["kind"]) == (shape[1], "tower")
    assert is_served(fast, captures)
    assert "from disk" in str(fast.report)


def test_texts_of_a_graph_from_disk_are_those_of_the_captured_one(tmp_path: Path) -> None:
    model = Tower().eval()
    fast = fxbt.optimize(model)
    fast(torch.randn(2, 5, 8))
    fxbt.save(fast, tmp_path)
    other = fxbt.load(tmp_path, model)
    other(torch.randn(2, 5, 8))
    for name in ("before", "after", "hits"):
        assert getattr(other.report, name) == getattr(fast.report, name)
    assert (
        "test_saving.py"
        in other.report.latest.compiled.module.graph.find_nodes(op="output")[0].prev.meta["stack_trace"]
    )


def test_other_values_of_weights_are_no_reason_to_capture(tmp_path: Path, captures: list[str]) -> None:
    saved(Tower().eval(), tmp_path, torch.randn(2, 5, 8))
    captures.clear()
    torch.manual_seed(7)
    model = Tower().eval()
    fast, x = fxbt.load(tmp_path, model), torch.randn(2, 5, 8)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    model.first.weight.mul_(-2)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert is_served(fast, captures)


def test_a_batch_of_one_is_no_constant(tmp_path: Path, captures: list[str]) -> None:
    model = Tower().eval()
    saved(model, tmp_path, torch.randn(1, 5, 8))
    captures.clear()
    fast = fxbt.load(tmp_path, model)
    for shape in ((1, 5, 8), (4, 3, 8), (1, 2, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert is_served(fast, captures)


def _narrower(model: Tower) -> Tower:
    return Tower(width=6).eval()


def _without_bias(model: Tower) -> Tower:
    return Tower(bias=False).eval()


def _of_another_option(model: Tower) -> Tower:
    model.options["act"] = "relu"
    return model


def _of_another_epsilon(model: Tower) -> Tower:
    model.norm.eps = 0.1
    return model


def _tied(model: Tower) -> Tower:
    model.norm.bias = model.norm.weight
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_narrower, "the model's options differs"),
        (_without_bias, "the model's first._parameters differs"),
        (_of_another_option, "the model's options differs"),
        (_of_another_epsilon, "the model's norm.eps differs"),
        (_tied, "the model's norm._parameters differs"),
    ],
)
def test_another_model_is_refused(
    change: Callable[[Tower], Tower], reason: str, tmp_path: Path, captures: list[str]
) -> None:
    saved(Tower().eval(), tmp_path, torch.randn(2, 5, 8))
    captures.clear()
    model = change(Tower().eval())
    fast = fxbt.load(tmp_path, model)
    x = torch.randn(2, 5, model.norm.normalized_shape[0])
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]
    assert not fast.report.latest.is_stored
    assert any(reason in note for note in fast.report.notes), fast.report.notes
    assert reason in str(fast.report)


def test_other_code_is_refused(tmp_path: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Tower().eval(), tmp_path, torch.randn(2, 5, 8))
    captures.clear()

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        return {"hidden": self.norm(self.second(self.first(x))), "length": x.shape[1], "kind": "tower"}

    forward.__qualname__ = "Tower.forward"
    monkeypatch.setattr(Tower, "forward", forward)
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    fast = fxbt.load(tmp_path, model)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]
    assert "the code of" in str(fast.report.notes)


@pytest.mark.parametrize("value", [3.0, 2])
def test_another_global_is_refused(
    value: Any, tmp_path: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(Tower().eval(), tmp_path, torch.randn(2, 5, 8))
    captures.clear()
    monkeypatch.setitem(globals(), "FACTOR", value)
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    fast = fxbt.load(tmp_path, model)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]
    assert f"{__name__} differs" in str(fast.report.notes)


def test_other_values_of_a_global_tensor_are_refused(
    tmp_path: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(Tower().eval(), tmp_path, torch.randn(2, 5, 8))
    captures.clear()
    monkeypatch.setitem(globals(), "SCALE", torch.tensor([4.0, 3.0]))
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    fast = fxbt.load(tmp_path, model)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]


@pytest.mark.parametrize("name", ["torch", "transformers", "fxbt", "machine", "Python"])
def test_another_version_is_refused(
    name: str, tmp_path: Path, captures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fxbt.stored.conditions.versions
    saved(Tower().eval(), tmp_path, torch.randn(2, 5, 8))
    captures.clear()
    monkeypatch.setattr(fxbt.stored.conditions, "versions", lambda model: {**original(model), name: "0.0"})
    fast = fxbt.load(tmp_path, Tower().eval())
    fast(torch.randn(2, 5, 8))
    assert captures == ["Tower"]
    assert re.search(rf"{name} (was .* and is 0\.0|is new)", str(fast.report.notes)), fast.report.notes


def test_calls_of_another_kind_are_captured(tmp_path: Path, captures: list[str]) -> None:
    model = Tower().eval()
    saved(model, tmp_path, torch.randn(2, 5, 8))
    captures.clear()
    fast, x, mask = fxbt.load(tmp_path, model), torch.randn(2, 5, 8), torch.rand(2, 5) > 0.5
    torch.testing.assert_close(fast(x, mask)["hidden"], model(x, mask)["hidden"])
    assert captures == ["Tower"]
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]
    assert not fast.report.fallbacks


def test_gradients_and_training_have_graphs_of_their_own(tmp_path: Path, captures: list[str]) -> None:
    model = Tower()
    with torch.enable_grad():
        fast = fxbt.optimize(model)
        for is_training in (True, False):
            model.train(is_training)
            fast(torch.randn(2, 5, 8))
        assert len(fxbt.save(fast, tmp_path)) == 2
        captures.clear()
        other, x = fxbt.load(tmp_path, copy.deepcopy(model)), torch.randn(3, 4, 8)
        for is_training in (True, False):
            model.train(is_training), other.train(is_training)
            for each in (model, other):
                each.zero_grad()
                each(x)["hidden"].square().sum().backward()
            for expected, found in zip(model.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(found.grad, expected.grad)
    assert len(other.report.graphs) == 2
    assert is_served(other, captures)


def test_buffers_that_calls_write_are_the_models_own(tmp_path: Path, captures: list[str]) -> None:
    saved(Normed().train(), tmp_path, torch.randn(3, 4))
    captures.clear()
    model, x = Normed().train(), torch.randn(5, 4)
    expected = copy.deepcopy(model)
    fast = fxbt.load(tmp_path, model)
    for _ in range(3):
        torch.testing.assert_close(fast(x), expected(x))
    for found, wanted in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, wanted)
    assert is_served(fast, captures)


def test_a_call_that_goes_another_way_runs_the_original(tmp_path: Path, captures: list[str]) -> None:
    saved(Branching(), tmp_path, torch.rand(4) + 1)
    captures.clear()
    fast = fxbt.load(tmp_path, Branching())
    for x in (torch.rand(4) + 1, torch.rand(4) - 2):
        torch.testing.assert_close(fast(x), Branching()(x))
    assert fast.report.latest.is_stored
    assert "another way" in str(fast.report.fallbacks)


def test_what_has_no_text_is_not_saved(tmp_path: Path, cache: Path) -> None:
    fast = fxbt.optimize(Remembering(), cache=True)
    fast(torch.randn(2))
    assert not fast.report.fallbacks
    assert "sets its attribute last" in str(fast.report.notes)
    with pytest.raises(ValueError, match="sets its attribute last"):
        fxbt.save(fast, tmp_path)
    assert not list(tmp_path.glob("graph-*"))


def test_large_tensors_beside_the_weights_are_not_compared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxbt.stored.tensors, "MOST_COMPARED", 4)
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    fast = fxbt.optimize(model, cache=True)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert not fast.report.fallbacks
    assert "too large to compare" in str(fast.report.notes)
    assert not list(cache.glob("graph-*"))


def test_a_graph_is_saved_for_the_model_as_it_was(tmp_path: Path, captures: list[str]) -> None:
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    fast = fxbt.optimize(model)
    fast(x)
    model.norm.eps = 0.5
    fxbt.save(fast, tmp_path)
    captures.clear()
    other = fxbt.load(tmp_path, copy.deepcopy(model))
    torch.testing.assert_close(other(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]
    model.norm.eps = 1e-5
    torch.testing.assert_close(fxbt.load(tmp_path, model)(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]


def test_misuse_is_told(tmp_path: Path) -> None:
    with pytest.raises(fxbt.NotOptimizedError, match="not optimised"):
        fxbt.save(Tower(), tmp_path)
    with pytest.raises(ValueError, match="call the model first"):
        fxbt.save(fxbt.optimize(Tower()), tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        fxbt.load(tmp_path / "none", Tower())
    with pytest.raises(TypeError):
        fxbt.load(tmp_path, Tower(), padded="drop")


def test_options_hold_for_loaded_models(tmp_path: Path, captures: list[str]) -> None:
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    saved(model, tmp_path, x)
    captures.clear()
    fast = fxbt.load(tmp_path, model, padding="keep", example_inputs=(x,))
    assert is_served(fast, captures)
    assert "padding" not in fast.report.hits


# The cache


def test_the_cache_is_filled_and_read(cache: Path, captures: list[str]) -> None:
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    fxbt.optimize(model, cache=True)(x)
    assert captures == ["Tower"]
    (path,) = cache.glob("graph-*.json")
    assert path.stat().st_mode & 0o777 == 0o600
    captures.clear()
    fast = fxbt.optimize(model, cache=True)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert is_served(fast, captures)
    assert list(cache.glob("graph-*")) == [path]


def test_the_cache_is_asked_for(cache: Path) -> None:
    fxbt.optimize(Tower().eval())(torch.randn(2, 5, 8))
    assert not list(cache.glob("graph-*"))


def test_another_model_of_the_class_has_a_file_of_its_own(cache: Path, captures: list[str]) -> None:
    for width in (8, 6, 8, 6):
        fast = fxbt.optimize(Tower(width).eval(), cache=True)
        fast(torch.randn(2, 5, width))
        assert not fast.report.fallbacks
    assert captures == ["Tower", "Tower"]
    assert len(list(cache.glob("graph-*.json"))) == 2


def test_the_cache_keeps_few_graphs_of_a_kind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxbt.stored.files, "KEPT", 2)
    for width in (4, 6, 8):
        fxbt.optimize(Tower(width).eval(), cache=True)(torch.randn(2, 5, width))
    assert len(list(cache.glob("graph-*.json"))) == 2


def test_copies_and_pickles_read_the_cache(cache: Path, captures: list[str]) -> None:
    fast, x = fxbt.optimize(Tower().eval(), cache=True), torch.randn(2, 5, 8)
    expected = fast(x)["hidden"]
    captures.clear()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(other(x)["hidden"], expected)
        assert is_served(other, captures)


def test_a_graph_that_computes_something_else_is_refused(cache: Path, captures: list[str]) -> None:
    """The first call compares: a file whose numbers were tampered with serves no call."""
    model, x = Tower().eval(), torch.randn(2, 5, 8)
    fxbt.optimize(model, cache=True)(x)
    (path,) = cache.glob("graph-*.json")
    path.write_text(path.read_text().replace("aten.gelu.default", "aten.relu.default"))
    captures.clear()
    fast = fxbt.optimize(model, cache=True)
    torch.testing.assert_close(fast(x)["hidden"], model(x)["hidden"])
    assert captures == ["Tower"]
    assert "differ from the original's" in str(fast.report.notes)


def test_generation_reads_both_of_its_graphs(cache: Path, captures: list[str]) -> None:
    """The graph of the prompt, and that of a step, whose cache of keys and values is an argument that it changes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, pad_token_id=0, eos_token_id=None)).eval()
    ids = torch.randint(3, 50, (2, 7))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    expected = model.generate(ids, max_new_tokens=9, **options)
    for count in (2, 0):
        captures.clear()
        fast = fxbt.optimize(model, cache=True)
        for tokens in (9, 5):
            assert torch.equal(fast.generate(ids, max_new_tokens=tokens, **options), expected[:, : 7 + tokens])
        assert len(captures) == count
        assert not fast.report.fallbacks
        assert not fast.report.notes
        assert [graph.is_stored for graph in fast.report.graphs.values()] == 2 * [count == 0]


PROGRAM = """
import json, multiprocessing, pickle, sys
import torch
import fxbt, fxbt.making
from transformers import BertConfig, BertModel

torch.set_num_threads(1)
seen = []
original = fxbt.making._captured
fxbt.making._captured = lambda *args, **kwargs: (seen.append(1), original(*args, **kwargs))[1]
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)


def made(seed):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**sizes)).eval()


def inputs(length):
    ids = torch.arange(3 * length).reshape(3, length) % 50
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(fast, length):
    with torch.no_grad():
        return fast(**inputs(length))[0][inputs(length)["attention_mask"].bool()]


def told(fast, errors):
    report = fast.report
    return {
        "captures": len(seen),
        "is_stored": report.latest is not None and report.latest.is_stored,
        "graphs": len(report.graphs),
        "error": max(errors),
        "hits": report.hits,
        "told": report.fallbacks + report.notes,
    }


def serve(seed):
    model = made(seed)
    fast = fxbt.optimize(model, cache=True)
    return told(fast, [(outputs(fast, 7) - outputs(model, 7)).abs().max().item() for _ in range(2)])


def act(calls, answers):
    models = [pickle.loads(each) for each in calls.get()]
    for length in iter(calls.get, None):
        answers.put([outputs(fast, length).tolist() for fast in models])
    for fast in models:
        answers.put(told(fast, [0.0]))


def ask_an_actor(seed):
    model = made(seed)
    fast = fxbt.optimize(model, cache=True)
    unused = pickle.dumps(fast)
    outputs(fast, 7)
    context = multiprocessing.get_context("spawn")
    calls, answers = context.Queue(), context.Queue()
    actor = context.Process(target=act, args=(calls, answers), daemon=True)
    actor.start()
    calls.put([unused, pickle.dumps(fast)])
    errors = []
    for length in (7, 11, 7, 5):
        calls.put(length)
        found = torch.tensor(answers.get(timeout=200))
        errors.append((found - outputs(model, length)).abs().max().item())
    calls.put(None)
    first, second = (answers.get(timeout=200) for _ in range(2))
    actor.join()
    stored, told = first["is_stored"] and second["is_stored"], first["told"] + second["told"]
    return {**second, "is_stored": stored, "told": told, "error": max(errors)}


if __name__ == "__main__":
    if sys.argv[1] == "here":
        result = serve(int(sys.argv[2]))
    elif sys.argv[1] == "actor":
        result = ask_an_actor(int(sys.argv[2]))
    else:
        if sys.argv[1] == "fork":
            seen.clear()
        with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
            result = pool.apply(serve, (int(sys.argv[2]),))
    print(json.dumps(result))
"""


def start(folder: Path, way: str, seed: int) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "FXBT_CACHE_DIR": str(folder / "cache"), "FXBT_TUNE": "0"}
    command = [sys.executable, str(program), way, str(seed)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert result["error"] < 1e-5
    assert result["hits"]["attention"] == 2
    return result


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    result = result_of(process)
    assert not result["told"]
    return result


def test_processes_share_the_cache(tmp_path: Path) -> None:
    """Two that start at once on an empty cache, then a fresh one, one that was spawned, and one that was forked."""
    first = [answer(process) for process in [start(tmp_path, "here", seed) for seed in (0, 1)]]
    assert all(result["captures"] == 1 for result in first if not result["is_stored"])
    assert len(list((tmp_path / "cache").glob("graph-*.json"))) == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))
    for way in ("here", "spawn", "fork"):
        result = answer(start(tmp_path, way, 2))
        assert (result["captures"], result["is_stored"], result["graphs"]) == (0, True, 1), way


def test_actors_share_the_cache(tmp_path: Path) -> None:
    """An actor, as Ray has them, is a process of its own that gets models as bytes, and then call after call.

    Its models were never made there: transformers' code runs another way then (it knows from a model's `__init__` what
    its outputs are), which is another graph. The first actor captures that, once for both of its models.
    """
    assert answer(start(tmp_path, "here", 0))["captures"] == 1
    assert result_of(start(tmp_path, "actor", 1))["captures"] <= 1
    result = answer(start(tmp_path, "actor", 2))
    assert (result["captures"], result["is_stored"], result["graphs"]) == (0, True, 1)
