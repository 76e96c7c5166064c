"""Python numbers that change from call to call: inputs of one graph, with the original's numbers and dtypes."""

import math

import pytest
import torch
import torch.nn.functional as F
from ran import log, ran
from torch import nn

import fxbt
from fxbt.capture.call import Binder
from fxbt.capture.number_inputs import Number, Numbers, as_tensor

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")
X = torch.randn(2, 7, 32)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(32, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        for i in range(4):
            setattr(self, f"layer_{i}", nn.Linear(32, 32))

    def forward(self, x, t=0, other=None):
        if not torch.compiler.is_compiling():
            log.info("ran")
        return self.function(self, self.linear(x), t)


def follow(fast, *calls):
    """Makes each call; compares with the original in values and dtype, and returns the values that graphs served."""
    served = []
    for (number,) in calls:
        ran.clear()
        found = fast(X, t=number)
        if not ran:
            served.append(number)
        expected = fxbt.restore(fast)(X, t=number)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    return served


def values(*numbers):
    return [(number,) for number in numbers]


INTS = values(3, 5, 0, 1, 2, 1000, 7, 2**40, 3)
FLOATS = values(0.5, 2.25, 0.0, -0.0, -3.5, 1e30, 1e-30, math.inf, 0.1, 0.5)


def sinusoidal(m, y, t):
    """How diffusion models embed a timestep."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(16) / 16)
    angles = t * frequencies
    return y + torch.cat([angles.sin(), angles.cos()])


ANY_INT = {
    "scaled": lambda m, y, t: y * (1 + 0.01 * t),
    "added": lambda m, y, t: y + t,
    "divided": lambda m, y, t: t / (y.abs() + 1),
    "of integers": lambda m, y, t: (y * 100).long() * t,
    "integers divided": lambda m, y, t: (y * 100).long() / (t + 1),
    "in bfloat16": lambda m, y, t: y.bfloat16() * t,
    "in float16": lambda m, y, t: y.half() + 0.001 * t,
    "a new tensor": lambda m, y, t: y + torch.full((32,), t),
    "a new float tensor": lambda m, y, t: y * torch.full((32,), t * 0.5),
    "torch.tensor": lambda m, y, t: y * torch.tensor([t, 2 * t]).sum(),
    "floor": lambda m, y, t: y + t // 3,
    "remainder": lambda m, y, t: y + t % 3,
    "compared with a tensor": lambda m, y, t: torch.where(torch.arange(32) < t, y, -y),
    "returned": lambda m, y, t: (y, t + 1, 0.5 * t),
    "sinusoidal": sinusoidal,
}


@pytest.mark.parametrize("name", ANY_INT)
def test_an_int_that_changes_is_an_input(name):
    fast = fxbt.optimize(Function(ANY_INT[name]).eval())
    served = follow(fast, *INTS)
    assert served == [number for (number,) in INTS[2:]], fast.report.fallbacks
    assert fast.report.made == 2 and list(fast.report.graphs) == ["(x=float32[?, ?, ?], t=any int)"]


ANY_FLOAT = {
    "scaled": lambda m, y, t: y * t,
    "arithmetic": lambda m, y, t: y + (1 - t) * 0.5 + t * t,
    "of integers": lambda m, y, t: (y * 100).long() * t,
    "in bfloat16": lambda m, y, t: y.bfloat16() * t,
    "in float64": lambda m, y, t: y.double() * t,
    "a new tensor": lambda m, y, t: y + torch.full((32,), t),
    "clamped": lambda m, y, t: y.clamp(max=t),
    "filled": lambda m, y, t: y.masked_fill(y > 0, t),
    "leaky": lambda m, y, t: F.leaky_relu(y, t),
    "returned": lambda m, y, t: (y, 2 * t),
}


@pytest.mark.parametrize("name", ANY_FLOAT)
def test_a_float_that_changes_is_an_input(name):
    fast = fxbt.optimize(Function(ANY_FLOAT[name]).eval())
    served = follow(fast, *FLOATS)
    assert len(served) == len(FLOATS) - 2, fast.report.fallbacks
    assert fast.report.made == 2 and list(fast.report.graphs) == ["(x=float32[?, ?, ?], t=any float)"]


def pick_by_name(m, y, t):
    return getattr(m, f"layer_{t % 4}")(y)


def loop(m, y, t):
    for layer in m.layers[: t % 4]:
        y = layer(y)
    return y


def by_type(m, y, t):
    return y * t if isinstance(t, int) else y


def by_table(m, y, t):
    return y * {3: 2.0, 5: 4.0}.get(t, 1.0)


def branch_on_float(m, y, t):
    return y * t if t > 1 else -y


def drop(m, y, t):
    return F.dropout(y, t / 10, training=False)


def square_root(m, y, t):
    return y * math.sqrt(t)


def heads(m, y, t):
    return y.unflatten(-1, (2 ** (t % 4), -1)).softmax(-1).flatten(-2)


CONSTANT = {f.__name__: f for f in (pick_by_name, loop, by_type, by_table, branch_on_float, square_root, heads, drop)}


@pytest.mark.parametrize("name", CONSTANT)
def test_what_decides_in_python_is_right_whatever_becomes_of_it(name):
    fast = fxbt.optimize(Function(CONSTANT[name]).eval(), max_captures=3)
    numbers = values(0.5, 2.5, 1.0, 2.5) if name == "branch_on_float" else values(3, 5, 3, 5, 0, 1, 5, 6, 7)
    served = follow(fast, *numbers, *numbers)
    assert served and len(fast.report.graphs) <= 3


def test_a_number_that_picks_a_module_has_a_graph_for_each_value_and_the_report_says_so():
    fast = fxbt.optimize(Function(lambda m, y, t: m.layers[t](y)).eval(), max_captures=4)
    follow(fast, *values(0, 1, 2, 3, 0, 1, 2))
    (reason,) = fast.report.fallbacks
    assert "; t is a number that changes, and each value needs a graph of its own: pass a tensor" in reason


def test_comparisons_are_guards():
    fast = fxbt.optimize(Function(lambda m, y, t: y * t if t > 10 else y - t).eval())
    assert follow(fast, *values(3, 5, 7, 11, 12, 10, 300, 0)) == [7, 12, 10, 300, 0]
    assert fast.report.made == 3 and len(fast.report.graphs) == 2


def test_equality_is_a_guard():
    fast = fxbt.optimize(Function(lambda m, y, t: y if t == 0 else y * t).eval())
    assert follow(fast, *values(1, 2, 0, 3, 0, 1)) == [3, 0, 1]


def test_a_number_as_a_size():
    fast = fxbt.optimize(Function(lambda m, y, t: y[:, :t].mean(1)).eval())
    assert len(follow(fast, *values(3, 5, 2, 4, 6, 1, 7, 12))) >= 4


def test_negative_ints():
    fast = fxbt.optimize(Function(lambda m, y, t: y * t + t // 2).eval())
    assert follow(fast, *values(-3, -5, -1, -2, 4, 6, 0, -7)) == [-1, -2, 6, 0, -7]
    assert len(fast.report.graphs) == 2 and "t=any int below 0" in str(fast.report)


def test_ints_and_floats_in_one_place():
    fast = fxbt.optimize(Function(lambda m, y, t: y * t).eval())
    served = follow(fast, *values(1, 1.0, 2, 2.0, 3, 3.0, 4, 4.0))
    assert served == [3, 3.0, 4, 4.0]


def test_bools_and_none_stay_constants():
    fast = fxbt.optimize(Function(lambda m, y, t: -y if t else y).eval())
    assert follow(fast, *values(True, False, None, True, False, None)) == [True, False, None]
    assert len(fast.report.graphs) == 3


def test_a_number_that_stays_is_a_constant():
    fast = fxbt.optimize(Function(lambda m, y, t: m.layers[t](y)).eval())
    assert follow(fast, *values(2, 2, 2)) == [2, 2]
    assert list(fast.report.graphs) == ["(x=float32[?, ?, ?], t=2)"]


def test_numbers_in_containers_and_beside_each_other():
    class Model(nn.Module):
        def forward(self, x, options, *, scale):
            if not torch.compiler.is_compiling():
                log.info("ran")
            return x * options["steps"][0] + options["steps"][1] * scale + options["bias"]

    model = Model().eval()
    fast = fxbt.optimize(model)
    for i in range(6):
        ran.clear()
        call = {"options": {"steps": [i, i], "bias": torch.ones(7, 32)}, "scale": i / 2}
        found = fast(X, **call)
        assert bool(ran) == (i < 2), fast.report.fallbacks
        torch.testing.assert_close(found, model.forward(X, **call))
    assert len(fast.report.graphs) == 1


def test_gradients_and_attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)

        def forward(self, x, t):
            return self.layer(x * (1 + 0.01 * t))

    model = Net().eval()
    fast = fxbt.optimize(model)
    for t in range(4):
        torch.testing.assert_close(fast(X, t), model.forward(X, t), rtol=1e-4, atol=1e-5)
    assert fast.report.made == 2 and fast.report.latest.calls == {} and not fast.report.fallbacks
    with torch.enable_grad():
        for t in range(3):
            x, again = (X.clone().requires_grad_() for _ in range(2))
            fast(x, t).square().sum().backward()
            model.forward(again, t).square().sum().backward()
            torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    assert fast.report.made == 3


def test_one_sequence_and_many():
    fast = fxbt.optimize(Function(lambda m, y, t: y.softmax(1) * t).eval())
    model = fxbt.restore(fast)
    for t, shape in enumerate([(1, 1, 32), (1, 5, 32), (4, 1, 32), (3, 2, 32), (1, 1, 32)], start=1):
        x = torch.randn(shape)
        torch.testing.assert_close(fast(x, t), model(x, t))
    assert len(fast.report.graphs) <= 2


def test_inference_mode_and_autocast():
    fast = fxbt.optimize(Function(lambda m, y, t: y * t).eval())
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            for t in range(4):
                torch.testing.assert_close(fast(X, t), fxbt.restore(fast)(X, t), rtol=1e-2, atol=1e-2)
    assert fast.report.made == 3 and not fast.report.fallbacks


# The parts


def test_which_places_vary():
    numbers = Numbers()
    assert [numbers.varies("t", value) for value in (3, 3, 4, 3)] == [False, False, True, True]
    assert [numbers.varies("f", value) for value in (0.0, 0.0, -0.0)] == [False, False, True]
    assert [numbers.varies("n", value) for value in (math.nan, math.nan, 1.0)] == [False, False, True]
    assert [numbers.varies("big", value) for value in (1, 2, 2**63)] == [False, True, False]
    numbers.refuse("t", "it picks a module")
    assert not numbers.varies("t", 5) and numbers.varies("f", 0.5)
    assert numbers.first("f", Number(0, float)) == 0.0


def test_an_attribute_counts_by_what_stands_beside_it():
    numbers = Numbers()
    assert [numbers.varies("length", value, among) for value, among in ((0, "empty"), (5, "full"), (6, "full"))] == [
        False,
        False,
        True,
    ]
    assert not numbers.varies("length", 0, "empty") and numbers.varies("length", 5, "full")


def test_a_call_is_rebuilt_with_its_numbers():
    def forward(x, t, options):
        pass

    binder = Binder(forward, Numbers())
    x = torch.ones(2)
    for t in (1, -2):
        call = binder.call((), {"x": x, "t": t, "options": {"scale": (t / 2, 7)}})
    assert call.names == ["x", "t", "options['scale'][0]"] and call.constants == ("options['scale'][1]",)
    assert str(call) == "(x=float32[?], t=any int below 0, options['scale'][0]=any float, options['scale'][1]=7)"
    args, kwargs = call.rebuild(call.tensors)
    assert args == () and kwargs == {"x": x, "t": -2, "options": {"scale": (-1.0, 7)}}
    _, kwargs = call.rebuild([x, as_tensor(5), as_tensor(2.5)])
    assert kwargs["t"] == -5 and kwargs["options"] == {"scale": (2.5, 7)}


def test_without_numbers_every_value_is_in_the_key():
    binder = Binder(lambda t: t)
    assert len({binder.call((t,), {}).key for t in (1, 2, 1.0, True, -0.0, 0.0)}) == 6
