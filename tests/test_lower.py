"""The lowered program: weights bound once, derived weights that follow their sources, constants it relies on."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from tracing import Function

import fxbt
import fxbt.kernels.autotune
from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.graph.blocks import BUILT_IN
from fxbt.lower.steps import AT_INFERENCE, WITH_GRADIENTS, Draft, Step, lower
from fxbt.pipeline import compile as compile_graph


def merged(x, q, k):
    return F.linear(x, torch.cat([q, k]))


def setting(grad=False):
    model = Function(merged, q=torch.randn(4, 6), k=torch.randn(2, 6)).eval()
    x = torch.randn(3, 6)
    with torch.set_grad_enabled(grad):
        return model, x, compile_graph(capture(model, make_call(model, x)), ())


def change_in_place(model):
    with torch.no_grad():
        model.q.mul_(2)


def step_optimizer(model):
    model.q.grad = torch.ones_like(model.q)
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def load(model):
    model.load_state_dict({name: torch.randn_like(weight) for name, weight in model.state_dict().items()})


def swap_data(model):
    model.q.data = torch.randn(4, 6)


def write_through_data(model):
    model.q.data.normal_()


def write_a_row_through_data(model):
    model.k.data[1] = 7.0


@pytest.mark.parametrize(
    "change", [change_in_place, step_optimizer, load, swap_data, write_through_data, write_a_row_through_data]
)
def test_derived_weights_follow_every_change(change, torchs_kernels):
    model, x, compiled = setting()
    assert compiled.derived_bytes == 6 * 6 * 4
    with torch.no_grad():
        torch.testing.assert_close(compiled.run(x)[0], model(x))
        change(model)
        torch.testing.assert_close(compiled.run(x)[0], model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_watched_weights_stay_as_free_as_they_were(dtype):
    """Looking at a weight's memory as numpy does would forbid resizing it."""
    model = Function(lambda x, w, v: x @ (w + v), w=torch.randn(6, 6), v=torch.ones(6, 6)).to(dtype).eval()
    with torch.no_grad():
        x = torch.randn(2, 6).to(dtype)
        compiled = compile_graph(capture(model, make_call(model, x)), ())
        compiled.run(x)
        model.w.data[0, 0] = math.nan  # not equal to itself, and no change the next time
        torch.testing.assert_close(compiled.run(x)[0], model(x), equal_nan=True)
    assert compiled.derived_bytes == 36 * x.element_size()
    assert all(weight.untyped_storage().resizable() for weight in model.parameters())


def test_casting_the_model_is_followed():
    model, x, _ = setting()
    fast = fxbt.optimize(model, (x,))
    model.to(torch.float64)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x.double()), model(x.double()))


@pytest.fixture
def always_packed(torchs_kernels, monkeypatch):
    """Packs every linear, however small: which ones pay is for test_tune.py."""
    monkeypatch.setattr(fxbt.lower.cpu.linears, "PACKED_FROM_ELEMENTS", 0)
    monkeypatch.setattr(fxbt.lower.cpu.linears, "is_avx512_supported", lambda: True)


packed_here = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@packed_here
@pytest.mark.parametrize("shape", [(16, 6), (2, 3, 6), (6,), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("strided", [False, True])
def test_packed_linears_take_every_input(shape, strided, always_packed):
    model = Function(lambda x, w, b: F.linear(x, w, b), w=torch.randn(5, 6), b=torch.randn(5)).eval()
    with torch.no_grad():
        compiled = compile_graph(capture(model, make_call(model, torch.randn([2] * (len(shape) - 1) + [6]))), ())
        assert compiled.derived_bytes == 5 * 6 * 4
        x = torch.randn(*shape[:-1], 12)[..., ::2] if strided else torch.randn(shape)
        torch.testing.assert_close(compiled.run(x)[0], model(x))


@packed_here
def test_a_weight_used_twice_is_packed_once(always_packed):
    model = Function(lambda x, w: F.linear(F.linear(x, w), w), w=torch.randn(6, 6)).eval()
    with torch.no_grad():
        compiled = compile_graph(capture(model, make_call(model, torch.randn(3, 6))), ())
    assert compiled.derived_bytes == 6 * 6 * 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (x @ w, F.dropout(w, 0.5, training=True)),
        lambda x, w: x @ F.dropout(w, 0.5, training=True),
        lambda x, w: x @ torch.rand_like(w),
    ],
)
def test_random_values_are_drawn_anew(function):
    x = torch.ones(3, 6)
    model = Function(function, w=torch.ones(6, 6)).eval()
    with torch.no_grad():
        compiled = compile_graph(capture(model, make_call(model, x)), ())
        assert not torch.equal(compiled.run(x)[-1], compiled.run(x)[-1])


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.unsqueeze(0), lambda w: w.split(3)[0], lambda w: w.t()])
def test_what_the_caller_gets_is_not_kept(view):
    x = torch.ones(3, 6)
    model = Function(lambda x, w: (x @ w, view(w * 2)), w=torch.ones(6, 6)).eval()
    with torch.no_grad():
        compiled = compile_graph(capture(model, make_call(model, x)), ())
        compiled.run(x)[1].zero_()
        torch.testing.assert_close(compiled.run(x)[1], model(x)[1])


def test_double_precision_is_not_packed(always_packed):
    model = Function(lambda x, w: F.linear(x, w), w=torch.randn(6, 6)).eval().double()
    with torch.no_grad():
        compiled = compile_graph(capture(model, make_call(model, torch.randn(3, 6).double())), ())
    assert compiled.derived_bytes == 0


def test_with_gradients_weights_are_derived_in_the_graph():
    model, x, compiled = setting(grad=True)
    assert compiled.derived_bytes == 0
    compiled.run(x)[0].sum().backward()
    actual = model.q.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(actual, model.q.grad)


def test_the_program_does_not_change_the_graph_it_was_made_from():
    _, x, compiled = setting()
    with torch.no_grad():
        torch.testing.assert_close(compiled.module(x)[0], compiled.run(x)[0])
    assert any(node.op == "get_attr" for node in compiled.module.graph.nodes)


def test_threads_see_whole_sets_of_derived_weights():
    model, x, compiled = setting()
    with torch.no_grad():
        first = model(x)
        model.q.neg_()
        second = model(x)
    wrong = []

    def reader():
        with torch.no_grad():
            for _ in range(200):
                (out,) = compiled.run(x)
                if not (torch.allclose(out, first) or torch.allclose(out, second)):
                    wrong.append(out)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Causal(torch.nn.Module):
    """Attention under a triangle that stands in a buffer."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.register_buffer("triangle", torch.ones(16, 16).tril())

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, dim=-1)
        seq = x.shape[1]
        scores = (q @ k.mT * 0.5).masked_fill(self.triangle[:seq, :seq] == 0, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_constant_the_proof_read_is_watched():
    model, x = Causal().eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = fxbt.optimize(model, (x,))
        assert "True" in next(line for line in fast.report.after.splitlines() if "sdpa" in line)
        torch.testing.assert_close(fast(x), model(x))
        model.triangle[3, 0] = 0
        with pytest.warns(fxbt.FxbtWarning, match="changed after the graph was proven on its content"):
            torch.testing.assert_close(fast(x), model(x))
        torch.testing.assert_close(fast(x), model(x))


def test_each_built_in_block_has_a_step_that_computes_it():
    named = {name for step in AT_INFERENCE for name in step.computes.split(", ")}
    assert BUILT_IN | {"attention", "qkv"} <= named
    assert all(step.run.__doc__ for step in (*AT_INFERENCE, *WITH_GRADIENTS))


def test_steps_of_other_devices_are_left_out():
    ran = []
    steps = [Step(device, lambda draft, device=device: ran.append(device), device) for device in ("", "cpu", "cuda")]
    model = Function(lambda x, w: x @ w, w=torch.ones(6, 6)).eval()
    module = capture(model, make_call(model, torch.ones(3, 6))).module
    lower(Draft(module, module.graph), steps)
    assert ran == ["", "cpu"]
