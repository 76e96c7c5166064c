"""Arguments in containers of any kind, read, changed and returned by a forward: the caller sees what eager does."""

import copy
import types
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt
from fxbt.capture.containers import named_leaves

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Features:
    ids: Tensor
    name: str = "text"
    other: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Frozen:
    ids: Tensor


class Encoded(UserDict[str, Any]):
    """As a tokenizer's BatchEncoding: a mapping with an attribute that no graph can know."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.encodings = [object()]

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["data"][name]
        except KeyError as error:
            raise AttributeError(name) from error


class ReadOnly(Mapping[str, Any]):
    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def ids_of(batch: Any) -> Tensor:
    return batch["ids"] if isinstance(batch, Mapping) else batch.ids


class Net(nn.Module):
    def __init__(self, change: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.change = change

    def forward(self, batch: Any) -> Any:
        x = self.linear(ids_of(batch))
        return x if self.change is None else self.change(batch, x)


def x_of(rows: int = 3) -> Tensor:
    return torch.randn(2, rows, 4)


KINDS = {
    "dict": lambda x: {"ids": x},
    "ordered": lambda x: OrderedDict(ids=x),
    "default": lambda x: defaultdict(list, ids=x),
    "user dict": lambda x: UserDict(ids=x),
    "encoded": lambda x: Encoded({"ids": x}),
    "read only": lambda x: ReadOnly(ids=x, more=[x]),
    "proxy": lambda x: types.MappingProxyType({"ids": x}),
    "dataclass": lambda x: Features(x),
    "frozen": lambda x: Frozen(x),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_serves_calls_with_containers(kind: str) -> None:
    model = Net().eval()
    fast: Any = fxbt.optimize(model)
    for rows in (3, 5, 3):
        x = x_of(rows)
        torch.testing.assert_close(fast(KINDS[kind](x)), model(KINDS[kind](x)))
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


def test_a_tokenizers_batch() -> None:
    transformers = pytest.importorskip("transformers")
    model = Net().eval()
    fast: Any = fxbt.optimize(model)
    for rows in (3, 4):
        batch = transformers.BatchEncoding({"ids": x_of(rows)})
        torch.testing.assert_close(fast(batch), model(batch))
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


def adds(batch: Any, x: Tensor) -> Any:
    batch["out"] = x
    return batch


def replaces(batch: Any, x: Tensor) -> Any:
    del batch["ids"]
    batch["ids"], batch["again"] = x, x
    return {"batch": batch, "x": x}


def appends(batch: Any, x: Tensor) -> Any:
    batch.setdefault("seen", []).append(x)
    return x


def grows(batch: Any, x: Tensor) -> Any:
    batch["list"].append(x)
    return batch["list"], x


def passes_on(batch: Any, x: Tensor) -> Any:
    return batch, x


def sets(batch: Any, x: Tensor) -> Any:
    batch.ids, batch.name = x, "seen"
    return batch


CHANGES = {
    "adds": (adds, KINDS["dict"]),
    "adds to a user dict": (adds, KINDS["user dict"]),
    "adds to an encoded": (adds, KINDS["encoded"]),
    "replaces": (replaces, KINDS["ordered"]),
    "makes a list": (appends, KINDS["dict"]),
    "appends": (grows, lambda x: {"ids": x, "list": [x, 1]}),
    "passes on": (passes_on, KINDS["dict"]),
    "sets attributes": (sets, KINDS["dataclass"]),
}


def tree_of(value: Any) -> list[tuple[str, Any]]:
    named = list(named_leaves(value, ""))
    return [(name, leaf) for name, leaf in named if isinstance(leaf, Tensor | int | str)]


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_does_to_its_arguments_happens(name: str) -> None:
    change, make = CHANGES[name]
    model = Net(change).eval()
    fast: Any = fxbt.optimize(model)
    for rows in (3, 5, 3):
        x = x_of(rows)
        one, other = make(x), make(x)
        found, expected = fast(one), model(other)
        for got, wanted in ((found, expected), (one, other)):
            assert type(got) is type(wanted)
            for (place, new), (same, old) in zip(tree_of(got), tree_of(wanted), strict=True):
                assert place == same
                assert torch.allclose(new, old) if isinstance(new, Tensor) else new == old
        assert (found is one) == (expected is other)
        if isinstance(found, tuple):
            assert (found[0] is one) == (expected[0] is other)
            assert isinstance(one, dict) and (found[0] is one.get("list")) == (expected[0] is other.get("list"))
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


def reads_encodings(batch: Any, x: Tensor) -> Any:
    return x * len(batch.encodings)


def asks_for_encodings(batch: Any, x: Tensor) -> Any:
    return x if isinstance(batch.encodings, list) else -x


@pytest.mark.parametrize("change", [reads_encodings, asks_for_encodings], ids=lambda f: f.__name__)
def test_reading_what_no_graph_can_know_runs_the_original(change: Any) -> None:
    model = Net(change).eval()
    fast: Any = fxbt.optimize(model)
    x = x_of()
    for _ in range(2):
        torch.testing.assert_close(fast(Encoded({"ids": x})), model(Encoded({"ids": x})))
    assert not fast.report.graphs and "forward reads encodings of an argument" in fast.report.fallbacks[0]


def test_a_plain_value_in_a_container_is_part_of_the_signature() -> None:
    def by_name(batch: Any, x: Tensor) -> Any:
        return x if batch.name == "text" else -x

    model = Net(by_name).eval()
    fast: Any = fxbt.optimize(model)
    x = x_of()
    for name in ("text", "image", "text"):
        torch.testing.assert_close(fast(Features(x, name)), model(Features(x, name)))
    assert len(fast.report.graphs) == 2 and not fast.report.fallbacks


def test_the_callers_container_is_left_alone_by_a_capture() -> None:
    model = Net().eval()
    fast: Any = fxbt.optimize(model)
    x = x_of()
    batch = {"ids": x, "inner": [1, {"deep": x}]}
    before = copy.deepcopy(batch)
    fast(batch)
    assert batch["ids"] is x and batch.keys() == before.keys() and batch["inner"][0] == 1
    assert batch["inner"][1]["deep"] is x
