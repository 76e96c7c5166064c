"""Other tensors of the same kinds in a model's places: the graph goes on with those, and lets go of the old ones."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from ran import log, ran
from torch import nn

import fxbt
import fxbt.lower.cpu.linears
from fxbt.capture.model_state import ModelState
from fxbt.capture.rebinding import rebound

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")
SIZE = 32
X = torch.randn(2, 3, SIZE)


@pytest.fixture(autouse=True)
def packed(torchs_kernels, monkeypatch):
    monkeypatch.setattr(fxbt.lower.cpu.linears, "PACKED_FROM_ELEMENTS", 0)
    monkeypatch.setattr(fxbt.lower.cpu.linears, "is_avx512_supported", lambda: True)
    with torch.no_grad():
        yield


class Config:
    def __init__(self):
        self.scale = 2.0
        self.table = torch.ones(1)


class Net(nn.Module):
    """Weights that are packed and read, a buffer, tensors in a list, in a config and as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.norm = nn.LayerNorm(SIZE)
        self.register_buffer("shift", torch.randn(SIZE))
        self.scales = [torch.ones(1), torch.randn(SIZE)]
        self.plain = torch.randn(SIZE)
        self.config = Config()

    def forward(self, x):
        if not torch.compiler.is_compiling():
            log.info("ran")
        x = self.norm(self.second(F.gelu(self.first(x)))) + self.shift * self.scales[0] + self.scales[1]
        return x * self.config.scale * self.config.table + self.plain


def optimized(model=None, *inputs, **options):
    fast = fxbt.optimize((model or Net()).eval(), inputs or (X,), **options)
    fast(*(inputs or (X,)))
    assert len(fast.report.graphs) == 1, fast.report.fallbacks
    return fast


def served(fast, *inputs):
    """Whether a graph serves a call; checks the numbers."""
    inputs = inputs or (X,)
    ran.clear()
    found = fast(*inputs)
    by_graph = not ran
    torch.testing.assert_close(found, fxbt.restore(fast)(*inputs), rtol=1e-5, atol=1e-5)
    return by_graph


def other_values(model):
    return {name: torch.randn_like(value) for name, value in model.state_dict().items()}


def swap_parameter(model):
    model.first.weight = nn.Parameter(torch.randn(SIZE, SIZE))


def swap_all(model):
    model.load_state_dict(other_values(model), assign=True)


def swap_buffer(model):
    model.shift = torch.randn(SIZE)


def swap_in_list(model):
    model.scales[0] = torch.full((1,), 3.0)
    model.scales[1] = torch.randn(SIZE)


def swap_plain(model):
    model.plain = torch.randn(SIZE)


def swap_in_config(model):
    model.config.table = torch.full((1,), 5.0)


def swap_config(model):
    model.config = copy.deepcopy(model.config)
    model.config.table.fill_(4.0)


def swap_module(model):
    model.second = nn.Linear(SIZE, SIZE).eval()


def swap_list(model):
    model.scales = [torch.full((1,), 2.0), torch.randn(SIZE)]


def there_and_back(model):
    model.double().float()


def exchange(model):
    model.first.weight, model.second.weight = model.second.weight, model.first.weight


def swap_data(model):
    model.first.weight.data = torch.randn(SIZE, SIZE)


def move_around(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.first.bias.mul_(3.0)


ALIKE = [swap_parameter, swap_all, swap_buffer, swap_in_list, swap_plain, swap_in_config, swap_config, swap_module]
ALIKE += [swap_list, there_and_back, exchange, swap_data, move_around]


@pytest.mark.parametrize("edit", ALIKE, ids=lambda edit: edit.__name__)
def test_the_graph_goes_on_with_others_of_the_same_kind(edit):
    fast = optimized()
    for _ in range(2):
        edit(fxbt.restore(fast))
        for _ in range(2):
            assert served(fast), fast.report.fallbacks
    fxbt.restore(fast).first.weight.mul_(1.5)  # what is written to the new ones shows
    fxbt.restore(fast).plain.mul_(1.5)
    assert served(fast)
    assert fast.report.made == 1


def another_value(model):
    model.config = copy.deepcopy(model.config)
    model.config.scale = 3.0


def tie(model):
    model.second.weight = model.first.weight


def another_dtype(model):
    model.shift = model.shift.double()


def another_shape(model):
    model.shift = torch.randn(1, SIZE)


def other_strides(model):
    model.first.weight = nn.Parameter(torch.randn(SIZE, SIZE).t())


def frozen(model):
    model.first.weight = nn.Parameter(torch.randn(SIZE, SIZE), requires_grad=False)


def no_parameter(model):
    del model.first.weight
    model.first.weight = torch.randn(SIZE, SIZE)


def marked(model):
    model.first.weight = nn.Parameter(torch.randn(SIZE, SIZE))
    model.first.weight.note = "forward may read this"


class Subclass(torch.Tensor):
    pass


def subclass(model):
    model.plain = torch.randn(SIZE).as_subclass(Subclass)


class OtherLinear(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


def another_class(model):
    model.second = OtherLinear(SIZE, SIZE).eval()


def longer_list(model):
    model.scales = [*model.scales, torch.ones(1)]


def none_at_all(model):
    model.first.bias = None


UNLIKE = [another_value, tie, another_dtype, another_shape, other_strides, frozen, no_parameter, marked, subclass]
UNLIKE += [another_class, longer_list, none_at_all]


@pytest.mark.parametrize("edit", UNLIKE, ids=lambda edit: edit.__name__)
def test_others_of_another_kind_are_not_the_graphs(edit):
    fast = optimized()
    edit(fxbt.restore(fast))
    assert not served(fast)
    served(fast)
    assert fast.report.made == 2 or fast.report.fallbacks


def test_old_weights_are_freed_after_a_swap():
    fast = optimized()
    model = fxbt.restore(fast)
    for _ in range(3):
        old = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
        swap_all(model)
        assert served(fast)
        gc.collect()
        assert [ref() is None for ref in old] == [True] * len(old)
    assert fast.report.made == 1


def test_old_weights_are_freed_where_a_graph_cannot_go_on():
    fast = optimized()
    old = weakref.ref(fast.second.weight)
    another_class(fxbt.restore(fast))
    served(fast)
    gc.collect()
    assert served(fast) and len(fast.report.graphs) == 1 and old() is None


def test_old_weights_are_freed_after_failures():
    class Fails(Net):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 and float(x.mean().item()) < 9 else -x

    model = Fails().eval()
    fast = fxbt.optimize(model)
    for _ in range(3):
        fast(X)
    assert not fast.report.graphs
    old = [weakref.ref(parameter) for parameter in model.parameters()]
    swap_all(model)
    fast(X)
    captures = fast._fxbt_dispatcher._graphs.captures
    gc.collect()
    assert captures == 1 and all(ref() is None for ref in old)


def test_checkpoints_swapped_back_and_forth_share_a_graph():
    fast = optimized()
    model = fxbt.restore(fast)
    checkpoints = [other_values(model) for _ in range(3)]
    for turn in range(9):
        model.load_state_dict(checkpoints[turn % 3], assign=True)
        assert served(fast)
    assert fast.report.made == 1 and not fast.report.fallbacks


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(11, SIZE)
            self.head = nn.Linear(SIZE, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            if not torch.compiler.is_compiling():
                log.info("ran")
            return self.head(self.table(ids))

    ids = torch.tensor([[1, 2, 3]])
    fast = optimized(Tied(), ids)
    model = fxbt.restore(fast)
    model.table.weight = model.head.weight = nn.Parameter(torch.randn(11, SIZE))
    assert served(fast, ids)
    model.head.weight = nn.Parameter(torch.randn(11, SIZE))  # two now
    assert not served(fast, ids) and served(fast, ids)


def test_graphs_of_other_modes_follow():
    fast = optimized()
    model = fxbt.restore(fast)
    fast.train()
    fast(X)
    assert fast.report.made == 2 and len(fast.report.graphs) == 2
    swap_all(model)
    assert served(fast)
    fast.eval()
    assert served(fast)
    with torch.enable_grad():
        fast(X)
        swap_all(model)
        assert served(fast)
        fast(X).sum().backward()
    assert model.first.weight.grad is not None and fast.report.made == 3


def test_an_edit_taken_back_after_a_swap_meets_the_first_graph():
    fast = optimized()
    fast.config.scale = 5.0
    assert not served(fast)
    swap_all(fxbt.restore(fast))
    assert served(fast)
    fast.config.scale = 2.0
    assert served(fast) and fast.report.made == 2


def test_content_that_a_proof_read_must_be_the_same():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tril(torch.ones(8, 8, dtype=torch.bool)))

        def forward(self, q, k, v):
            if not torch.compiler.is_compiling():
                log.info("ran")
            length = q.shape[-2]
            scores = q @ k.mT * 0.25
            scores = scores.masked_fill(~self.mask[:length, :length], float("-inf"))
            return scores.softmax(-1) @ v

    qkv = [torch.randn(2, 4, 8, 16) for _ in range(3)]
    fast = optimized(Causal(), *qkv)
    assert fast.report.hits["attention"] == 1
    model = fxbt.restore(fast)
    model.mask = torch.tril(torch.ones(8, 8, dtype=torch.bool))
    assert served(fast, *qkv) and fast.report.made == 1
    model.mask = torch.ones(8, 8, dtype=torch.bool)
    served(fast, *qkv)
    assert served(fast, *qkv)


def test_in_place_optimized_and_copies():
    fast = optimized(inplace=True)
    fast.load_state_dict(other_values(fast), assign=True)
    ran.clear()
    found = fast(X)
    assert not ran
    torch.testing.assert_close(found, fxbt.restore(fast)(X), rtol=1e-5, atol=1e-5)


# The comparison alone


def pairs_of(edit, model=None):
    model = model or Net()
    state = ModelState(model)
    edit(model)
    found = rebound(state, model)
    return None if found is None else (found[0].holds(), {id(tensor) for tensor in found[1].values()})


def test_what_stands_for_what():
    model = Net()
    old = dict(model.named_parameters())
    state = ModelState(model)
    swap_all(model)
    _, pairs = rebound(state, model)
    new = dict(model.named_parameters())
    assert all(pairs[id(old[name])] is new[name] for name in old)


def test_plain_values_are_waited_for():
    model = Net().eval()
    state = ModelState(model)
    model.train()
    swap_parameter(model)
    found, _ = rebound(state, model)
    assert not found.holds()
    model.eval()
    assert found.holds()


def test_values_that_cannot_be_compared_are_no_crash():
    class Odd:
        __slots__ = ()

        def __eq__(self, other):
            raise RuntimeError("no")

        __hash__ = None

    model = Net()
    model.odd = Odd()
    assert pairs_of(swap_parameter, model) is not None
    state = ModelState(model)
    model.odd = Odd()
    assert rebound(state, model) is None


def test_a_class_whose_forward_was_replaced_is_another_one(monkeypatch):
    fast = optimized()
    swap_parameter(fxbt.restore(fast))
    monkeypatch.setattr(Net, "forward", lambda self, x: 2 * self.first(x))
    assert torch.equal(fast(X), 2 * fast.first(X))
    torch.testing.assert_close(fast(X), 2 * fast.first(X))
    assert fast.report.made == 2
