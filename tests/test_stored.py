"""Files of graphs that nobody of fxbt wrote: refused with a reason, and nothing in them runs."""

import copy
import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import fxbt
from fxbt import pipeline
from fxbt.capture.call import Call, make_call
from fxbt.capture.capture import capture
from fxbt.stored import expressions
from fxbt.stored.descriptions import Descriptions, code_digest
from fxbt.stored.errors import Malformed, Unstorable
from fxbt.stored.files import MOST_BYTES
from fxbt.stored.graphs import Drawing, read_graph
from fxbt.stored.operations import name_of, operation
from fxbt.stored.tensors import own_tensor, read_tensor, written_tensor
from fxbt.torch_compat import pytree

RAN: list[str] = []


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(6.0).reshape(6, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        length = x.shape[1]
        scores = self.linear(x) + self.table[:length] + torch.tensor([1.0, 2.0, 3.0, 4.0])
        return scores.softmax(-1)[:, : (length + 1) // 2], length


@pytest.fixture(autouse=True)
def _without_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Layer().eval()


@pytest.fixture(scope="module")
def text(model: nn.Module) -> str:
    with torch.no_grad():
        captured = capture(model, make_call(model, torch.randn(2, 5, 4)))
    return json.dumps(Drawing(captured, model).written())


def read(text: Any, model: nn.Module) -> tuple[Any, Call]:
    call = make_call(model, torch.randn(2, 5, 4))
    expected = pytree.tree_flatten(model(*call.args, **call.kwargs))
    return read_graph(text, model, call, expected), call


def test_a_graph_comes_back_as_it_was(model: nn.Module, text: str) -> None:
    captured, call = read(json.loads(text), model)
    assert json.dumps(Drawing(captured, model).written()) == text
    for length in (5, 1, 6):
        x = torch.randn(3, length, 4)
        captured.guards(x)
        found, expected = captured.module(x), model(x)
        torch.testing.assert_close(found[0], expected[0])
        assert found[1] == length
    for shape in ((2, 7, 4), (2, 5, 5), (0, 5, 4)):
        with pytest.raises(AssertionError):
            captured.guards(torch.randn(shape))


class Spelled(nn.Module):
    """What canonicalisation writes in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.contiguous() * 1).view(x.shape[0], -1).chunk(2, -1)[0].softmax(-1)


def test_a_graph_is_written_as_it_was_captured_when_rules_have_rewritten_it() -> None:
    model = Spelled()
    captured = capture(model, make_call(model, torch.randn(2, 4, 6)))
    before, count = json.dumps(Drawing(captured, model).written()), len(captured.module.graph.nodes)
    drawing = Drawing(captured, model)
    pipeline.compile(captured, pipeline.default_rules())
    assert len(captured.module.graph.nodes) < count
    assert json.dumps(drawing.written()) == before


def test_values_of_a_graph_keep_their_symbols(model: nn.Module, text: str) -> None:
    captured, _ = read(json.loads(text), model)
    sizes = {str(size) for node in captured.module.graph.nodes for size in getattr(node.meta.get("val"), "shape", ())}
    assert any(size.startswith("s") for size in sizes)
    fakes = [node.meta["val"] for node in captured.module.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert len(set(map(id, fakes))) == len(fakes)


PLACES = ["nodes", "kinds", "sizes", "assumed", "constants", "texts", "buffers", "fixed", "read", "class"]
JUNK: list[Any] = [
    *(None, True, -1, 2**80, 1e308, "", "x" * 100_000, "__class__", "../../etc/passwd", "x); import os; (", [], {}),
    *([["node", 0]], ["node", 10**6], ["Pow", "s0", 10**9], ["float", "0x1p99999"], ["device", "cuda:99999"]),
    *(
        ["tensor", "torch.float32", "cpu", False, [2**62, 2**62], [1, 1]],
        ["Mul", *["s0"] * 500],
        ["dtype", "torch.load"],
    ),
]


def mutants(text: str, count: int) -> Iterator[Any]:
    """Graphs with one part replaced by something else, dropped, or put twice."""
    chance = random.Random(0)
    for _ in range(count):
        whole = json.loads(text)
        here: Any = whole
        while True:
            key = chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
            inner = here[key]
            if isinstance(inner, (list, dict)) and inner and chance.random() < 0.85:
                here = inner
                continue
            break
        way = chance.random()
        if way < 0.7:
            here[key] = copy.deepcopy(chance.choice(JUNK))
        elif way < 0.85:
            del here[key]
        elif isinstance(here, list):
            here.insert(key, copy.deepcopy(inner))
        yield whole


def test_whatever_is_changed_in_a_file_is_refused_or_harmless(model: nn.Module, text: str, tmp_path: Path) -> None:
    """The value that a call gets is right each time: what is not refused when it is read, the first call compares."""
    fast = fxbt.optimize(model)
    x = torch.randn(2, 5, 4)
    fast(x)
    (path,) = fxbt.save(fast, tmp_path)
    head, graph, _ = path.read_text().splitlines()
    for mutant in mutants(graph, 40):
        path.write_text(f"{head}\n{json.dumps(mutant)}\n")
        other = fxbt.load(tmp_path, model)
        found = other(x)
        torch.testing.assert_close(found[0], model(x)[0])
        assert found[1] == 5
        assert not other.report.fallbacks


def test_parts_of_another_kind_are_malformed(model: nn.Module, text: str) -> None:
    refused = 0
    for mutant in mutants(text, 400):
        try:
            read(mutant, model)
        except Malformed:
            refused += 1
        except (AssertionError, KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            refused += 1  # `shelf` makes a `Malformed` of each
    assert refused > 200


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("junk", [None, 3, "text", [[]], {"a": 1}, ["a"]], ids=str)
def test_each_part_has_its_kind(place: str, junk: Any, model: nn.Module, text: str) -> None:
    if place == "texts" and isinstance(junk, list):
        junk = []  # a list of any texts, which nodes name by their numbers
    if place == "class" and junk == "text":
        junk = "a text"
    with pytest.raises((Malformed, TypeError, ValueError)):
        read({**json.loads(text), place: junk}, model)


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "builtins.eval", "torch.load", "operator.attrgetter", "operator.methodcaller", "torch.sym_ite"),
        *(
            "aten.from_file.default",
            "aten.add_.Tensor",
            "aten.set_.source_Tensor",
            "aten.resize_.default",
            "aten.mm.out",
        ),
        *("aten.__class__.default", "aten._dir.default", "aten.relu.__init__", "aten.relu", "aten.relu.default.x"),
        *("prim.device.default", "fxbt.__loader__.default", "aten.nothing.default", "", "operator.setitem"),
    ],
)
def test_operations_that_no_file_may_name(name: str) -> None:
    with pytest.raises(Malformed):
        operation(name)


def test_operations_have_names() -> None:
    for name in ("aten.relu.default", "aten.add.Tensor", "operator.getitem", "torch.sym_max", "aten.__and__.Tensor"):
        assert name_of(operation(name)) == name
    for target in (torch.ops.aten.relu_.default, print, torch.relu, torch.ops.aten.relu):
        with pytest.raises(Unstorable):
            name_of(target)


@pytest.mark.parametrize("name", ["x): pass\nimport os", "lambda", "a b", "1st", "é", "a" * 300, "x.y"])
def test_names_cannot_be_code(name: str, model: nn.Module, text: str) -> None:
    parts = json.loads(text)
    parts["nodes"][0][1] = parts["nodes"][0][2] = name
    with pytest.raises(Malformed):
        read(parts, model)


@pytest.mark.parametrize("path", ["linear.__class__", "../linear", "linear.forward", "linear.weight; x", "", "linear"])
def test_only_tensors_of_the_model_are_read(path: str, model: nn.Module, text: str) -> None:
    parts = json.loads(text)
    weight = next(node for node in parts["nodes"] if node[2] == "linear.weight")
    weight[2] = path
    with pytest.raises(Malformed):
        read(parts, model)
    assert own_tensor(model, path) is None


def test_expressions_come_back() -> None:
    s0, s1 = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))
    symbols = {"s0": s0, "s1": s1}
    for expression in (
        s0 * 2 + s1**2,
        sympy.Eq(s0, s1),
        sympy.Or(s0 < 3, sympy.Ne(s1, 1)),
        sympy.Integer(4),
        sympy.true,
    ):
        assert expressions.read(json.loads(json.dumps(expressions.written(expression))), symbols) == expression
    for foreign in (sympy.sin(s0), sympy.Symbol("x"), sympy.Rational(1, 3)):
        with pytest.raises(Unstorable):
            expressions.written(foreign)


@pytest.mark.parametrize(
    "junk",
    [
        *(["Pow", 9, 10**9], ["Pow", "s0"], ["Lambda", "s0"], ["Add", *["s0"] * 100], "s9", 2**70, None, [], 1.5),
        *(["exec", "1"], [["Add"]], ["Pow", ["Pow", 9, 8], ["Pow", 9, 8]], ["Mul", *[2**62] * 60]),
    ],
    ids=str,
)
def test_expressions_that_no_trace_makes(junk: Any) -> None:
    with pytest.raises(Malformed):
        expressions.read(junk, {"s0": sympy.Symbol("s0", integer=True, positive=True)})


def test_expressions_are_not_nested_without_end() -> None:
    deep: Any = "s0"
    for _ in range(200):
        deep = ["Add", deep, 1]
    with pytest.raises(Malformed):
        expressions.read(deep, {"s0": sympy.Symbol("s0", integer=True, positive=True)})


def test_constants_come_back() -> None:
    for value in (torch.randn(2, 3), torch.tensor(True), torch.arange(4), torch.zeros(0, 2), torch.randn(2).bfloat16()):
        found = read_tensor(json.loads(json.dumps(written_tensor(value))))
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
    for value in (torch.zeros(1 << 20), nn.Parameter(torch.zeros(2)), torch.zeros(2, device="meta")):
        with pytest.raises(Unstorable):
            written_tensor(value)


@pytest.mark.parametrize(
    "junk",
    [
        *(
            ["torch.float32", [2**60], "AAAA"],
            ["torch.float32", [-1], "AAAA"],
            ["torch.float32", [1], "!"],
            [1, [1], ""],
        ),
        *(["torch.float32", [1], "AAAAAA=="], ["torch.save", [1], "AAAAAA=="], ["torch.float32", 1, "AAAAAA=="], "x")[
            1:
        ],
    ],
    ids=str,
)
def test_constants_of_another_size(junk: Any) -> None:
    with pytest.raises((Malformed, TypeError)):
        read_tensor(junk)


# Files


class _Runs:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return RAN.append, ("a pickle ran",)


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Runs()))


def _zip(path: Path) -> None:
    torch.save({"x": _Runs()}, path)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def _without_graph(path: Path) -> None:
    path.write_bytes(path.read_bytes().partition(b"\n")[0])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(MOST_BYTES + 1)


def _nested(path: Path) -> None:
    head = path.read_bytes().partition(b"\n")[0]
    path.write_bytes(head + b"\n" + b"[" * 1_000_000)


def _nested_head(path: Path) -> None:
    path.write_bytes(b'{"a":' * 500_000)


def _symlink(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _another_format(path: Path) -> None:
    path.write_text(path.read_text().replace('{"format":1', '{"format":2', 1))


def _no_conditions(path: Path) -> None:
    path.write_text('{"format":1}\n' + path.read_text().partition("\n")[2])


def _odd_conditions(path: Path) -> None:
    graph = path.read_text().partition("\n")[2]
    path.write_text('{"format":1,"versions":[],"model":3,"ran":{"a":{}},"reached":null}\n' + graph)


def _not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00" + path.read_bytes())


CHANGES = [
    *(_pickled, _zip, _truncated, _without_graph, _empty, _huge, _nested, _nested_head, _symlink, _folder, _pipe),
    *(_another_format, _no_conditions, _odd_conditions, _not_utf8),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_cache", [False, True], ids=["folder", "cache"])
def test_files_that_are_no_graphs(
    change: Callable[[Path], None], is_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module
) -> None:
    monkeypatch.setenv("FXBT_CACHE_DIR", str(tmp_path))
    fast = fxbt.optimize(model, cache=is_cache)
    x = torch.randn(2, 5, 4)
    fast(x)
    (path,) = tmp_path.glob("graph-*") if is_cache else fxbt.save(fast, tmp_path)
    change(path)
    other = fxbt.optimize(model, cache=True) if is_cache else fxbt.load(tmp_path, model)
    torch.testing.assert_close(other(x)[0], model(x)[0])
    assert other.report.latest is not None
    assert not other.report.latest.is_stored
    assert not other.report.fallbacks
    assert other.report.notes or is_cache
    assert not RAN


def test_names_of_files_lead_nowhere(tmp_path: Path, model: nn.Module) -> None:
    fast = fxbt.optimize(model)
    fast(torch.randn(2, 5, 4))
    (path,) = fxbt.save(fast, tmp_path)
    path.rename(path.with_name(path.name.replace(".json", ".pkl")))
    other = fxbt.load(tmp_path, model)
    other(torch.randn(2, 5, 4))
    assert not other.report.latest.is_stored


# Descriptions


def test_descriptions_tell_values_apart() -> None:
    values = [1, True, 1.0, "1", None, (1,), [1], {1}, {1: 1}, -0.0, 0.0, b"1", torch.float32, torch.tensor([1])]
    values += [
        torch.tensor([1.0]),
        torch.tensor([[1]]),
        int,
        Layer,
        len,
        lambda: 1,
        lambda: 2,
        sympy,
        nn.Linear.forward,
    ]
    texts = [Descriptions().of(value) for value in values]
    assert len(set(texts)) == len(texts)


def test_descriptions_are_of_what_closures_hold() -> None:
    def scaled(factor: float) -> Callable[[float], float]:
        return lambda x: x * factor

    assert Descriptions().of(scaled(1.0)) == Descriptions().of(scaled(1.0))
    assert Descriptions().of(scaled(1.0)) != Descriptions().of(scaled(2.0))


def test_descriptions_end() -> None:
    circle: list[Any] = []
    circle.append(circle)
    holder = type("Holder", (), {})()
    holder.self = holder
    assert Descriptions().of(circle)
    assert Descriptions().of(holder)


def test_code_is_told_by_what_it_does() -> None:
    first, moved, other = {}, {}, {}  # type: ignore[var-annotated]
    exec("def f(x): return x in {1, 2, 'a', 'b'}", first)
    exec("\n\ndef f(x): return x in {1, 2, 'a', 'b'}", moved)
    exec("def f(x): return x in {1, 2, 'a', 'c'}", other)
    digests = [code_digest(each["f"].__code__) for each in (first, moved, other)]
    assert digests[0] == digests[1] != digests[2]
