"""`optimize(max_captures=...)`: the graph used least recently makes place, and nobody captures for ever."""

import gc
import weakref

import pytest
import torch
from ran import log, ran
from torch import nn

import fxbt
from fxbt.runtime import graph_cache
from fxbt.runtime.graph_cache import CALLS_PER_CAPTURE, PATIENCE, Graphs

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        if not torch.compiler.is_compiling():
            log.info("ran")
        return self.linear(x).relu()


@pytest.fixture(autouse=True)
def _no_grad():
    ran.clear()
    with torch.no_grad():
        yield


def call(fast, rank, times=1):
    """Calls with a tensor of that rank; whether the original ran for the last."""
    for _ in range(times):
        ran.clear()
        x = torch.randn(*[2] * (rank - 1), 4)
        found = fast(x)
        was_original = bool(ran)
        torch.testing.assert_close(found, fxbt.restore(fast)(x))
    return was_original


def ranks(fast):
    return [name.count("?") for name in fast.report.graphs]


def test_the_least_recently_used_graph_makes_place():
    fast = fxbt.optimize(Net().eval(), max_captures=2)
    call(fast, 1)
    call(fast, 2)
    call(fast, 1, CALLS_PER_CAPTURE)  # the second is the older one now
    assert call(fast, 3) and not call(fast, 3)
    assert ranks(fast) == [1, 3] and not fast.report.fallbacks
    assert "graphs (1 more were captured and replaced)" in str(fast.report)
    assert not call(fast, 1)


def test_a_dropped_graph_is_freed_with_its_weights():
    fast = fxbt.optimize(Net().eval(), max_captures=1)
    call(fast, 1)
    dead = weakref.ref(next(iter(fast._fxbt_dispatcher._graphs)).compiled)
    call(fast, 1, CALLS_PER_CAPTURE)
    call(fast, 2)
    gc.collect()
    assert ranks(fast) == [2] and dead() is None


def test_past_the_limit_a_capture_is_earned():
    fast = fxbt.optimize(Net().eval(), max_captures=2)
    for rank in (1, 2, 3, 4, 3, 4):
        call(fast, rank)
    assert ranks(fast) == [1, 2]
    (reason,) = fast.report.fallbacks
    assert reason.startswith("2 graphs were captured, which is the limit (max_captures)")
    assert not call(fast, 1, CALLS_PER_CAPTURE) and call(fast, 3) and not call(fast, 3)


def test_a_model_whose_every_call_is_new_captures_ever_less_often(monkeypatch):
    monkeypatch.setattr(graph_cache, "PATIENCE", 4)

    class Takes(Net):
        def forward(self, x, word):
            return super().forward(x)

    fast = fxbt.optimize(Takes().eval(), max_captures=2)
    x = torch.randn(2, 4)
    for number in range(60):
        fast(x, str(number))
    # two are free, then one after 4 calls, 8, 16
    assert fast.report.made == 5 and len(fast.report.graphs) == 2


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, None, "8"])
def test_the_limit_is_a_positive_number(wrong):
    with pytest.raises(ValueError, match="max_captures is"):
        fxbt.optimize(Net(), max_captures=wrong)


def test_copies_have_the_limit_too():
    import copy

    fast = copy.deepcopy(fxbt.optimize(Net().eval(), max_captures=3))
    assert fast._fxbt_dispatcher._graphs.most == 3


# The book-keeping alone


class Kept:
    def __init__(self, name):
        self.name, self.used = name, 0

    def applies(self, tensors):
        return self.name in tensors


def filled(most, *names):
    kept = Graphs(most)
    for name in names:
        kept.note_capture()
        kept.add("key", Kept(name))
    return kept


def test_the_order_of_use_decides():
    kept = filled(3, "a", "b", "c")
    for name in "bac":
        assert kept.find("key", name).name == name
    assert [graph.name for graph in kept.add("other key", Kept("d"))] == ["b"]
    assert sorted(graph.name for graph in kept) == ["a", "c", "d"] and len(kept) == 3
    assert kept.find("key", "b") is None and kept.find("other key", "d") is not None


def test_free_captures_and_earned_ones():
    kept = filled(2, "a")
    assert kept.may_capture()
    kept.note_capture()
    assert not kept.may_capture()
    for _ in range(CALLS_PER_CAPTURE):
        kept.find("key", "a")
    assert kept.may_capture()
    kept.note_capture()
    assert not kept.may_capture()


def test_patience_doubles_until_graphs_serve():
    kept = filled(1, "a")
    for expected in (PATIENCE, 2 * PATIENCE, 4 * PATIENCE):
        refused = 0
        while not kept.may_capture():
            refused += 1
        assert refused == expected
        kept.note_capture()
    for _ in range(CALLS_PER_CAPTURE):
        kept.find("key", "a")
    kept.note_capture()
    assert [kept.may_capture() for _ in range(PATIENCE + 1)].index(True) == PATIENCE


def test_dropping_one_that_is_not_there_is_nothing():
    kept = filled(2, "a")
    kept.drop(Kept("a"))
    assert len(kept) == 1
