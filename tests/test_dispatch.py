"""The dispatcher: which calls run a graph, which run the original, and that nobody can tell by the outputs."""

import gc
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import fxbt.runtime.race
from fxbt import pipeline
from fxbt.errors import FxbtWarning
from fxbt.optimize import optimize, restore
from fxbt.runtime.race import Evidence

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Config:
    def __init__(self):
        self.scale = 2.0
        self.steps = [1, 2]
        self.inner = None


class Net(nn.Module):
    """A little model with a config, a list, a buffer and dropout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.randn(4))
        self.config = Config()

    def forward(self, x, bias=None, flag=False):
        y = self.drop(self.norm(self.linear(x)) + self.shift) * self.config.scale * len(self.config.steps)
        y = -y if flag else y
        return y if bias is None else y + bias


def x_of(*shape):
    return torch.randn(*shape, 4)


def ran_original(fast, *args, **kwargs):
    """Runs fast, checks its output against the original's, and says whether the original forward ran for it."""
    forwards = {vars(kind)["forward"].__code__ for kind in type(restore(fast)).__mro__ if "forward" in vars(kind)}
    ran = False

    def see(frame, event, _):
        nonlocal ran
        ran |= event == "call" and frame.f_code in forwards

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        output = fast(*args, **kwargs)
    finally:
        sys.setprofile(before)
    torch.testing.assert_close(output, restore(fast)(*args, **kwargs), rtol=1e-5, atol=1e-6)
    return ran


def captured(model=None, *args):
    fast = optimize((model or Net()).eval())
    fast(*(args or (x_of(2, 3),)))
    assert len(fast.report.graphs) == 1, fast.report.fallbacks
    return fast


def test_the_first_call_captures_and_later_ones_reuse():
    fast = optimize(Net().eval())
    assert ran_original(fast, x_of(2, 3))
    for shape in [(2, 3), (1, 5), (7, 2)]:
        assert not ran_original(fast, x_of(*shape)), shape
    assert not ran_original(fast, x=x_of(3, 3))
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


@pytest.mark.parametrize(
    "other",
    [{"flag": True}, {"bias": torch.ones(4)}, {"x": torch.randn(3, 4)}, {"x": torch.randn(2, 3, 4).bfloat16()}],
    ids=["static value", "another tensor", "rank", "dtype"],
)
def test_another_signature_is_another_graph(other):
    model = Net().eval()
    if other.get("x") is not None and other["x"].dtype is torch.bfloat16:
        model.to(torch.bfloat16)
        other = {"flag": True, **other}
    fast = optimize(model)
    fast(x_of(2, 3).to(model.shift.dtype))
    call = {"x": x_of(2, 3).to(model.shift.dtype), **other}
    assert ran_original(fast, **call) and not ran_original(fast, **call)
    assert len(fast.report.graphs) == 2


def edit_config(model):
    model.config.scale = 3.0


def edit_nested(model):
    model.config.steps.append(3)


def swap_parameter(model):
    model.linear.weight = nn.Parameter(torch.randn(4, 4))


def swap_module(model):
    model.linear = nn.Linear(4, 4)


def swap_buffer(model):
    model.shift = torch.randn(4)


def freeze_part(model):
    model.norm.eps = 0.5


def replace_forward(model):
    model.linear.forward = lambda x: x


def to_double(model):
    model.double()


OTHER_TENSORS = [swap_parameter, swap_buffer]  # the graph goes on with those: test_rebinding.py
EDITS = [edit_config, edit_nested, swap_module, freeze_part, replace_forward]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_model_is_captured_anew(edit):
    fast = captured()
    edit(restore(fast))
    assert ran_original(fast, x_of(2, 3))
    assert not ran_original(fast, x_of(4, 2))
    assert fast.report.made == 2, fast.report.fallbacks


def test_an_edit_taken_back_meets_the_first_graph_again():
    fast = captured()
    fast.config.scale = 5.0
    assert ran_original(fast, x_of(2, 3))
    fast.config.scale = 2.0
    assert not ran_original(fast, x_of(2, 3))
    assert len(fast.report.graphs) == 2


def test_a_single_element_parameter_is_told_apart_by_identity():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.scale

    model = Scaled().eval()
    fast = optimize(model)
    fast(torch.ones(2, 3))
    model.scale = nn.Parameter(torch.ones(1))  # equal, but another one: what is written to it must be seen
    fast(torch.ones(2, 3))
    model.scale.fill_(3.0)
    assert fast(torch.ones(2, 3)).eq(3.0).all()


@pytest.mark.parametrize(
    "replace", [lambda data: data.T, lambda data: data.flip(0), lambda data: data[:1].expand(4, 4)]
)
def test_a_parameter_turned_or_replaced_through_data_is_seen(replace):
    fast = captured()
    ran_original(fast, x_of(2, 3))  # from here on, only the counters are asked
    fast.linear.weight.data = replace(fast.linear.weight.data)
    ran_original(fast, x_of(2, 3))


def test_a_single_element_tensor_in_a_list_is_told_apart_by_identity():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = [torch.ones(1)]

        def forward(self, x):
            return x * self.scales[0]

    model = Scaled().eval()
    fast = optimize(model)
    for _ in range(3):
        fast(torch.ones(2, 3))
    model.scales[0] = torch.ones(1)
    fast(torch.ones(2, 3))
    model.scales[0].fill_(3.0)
    assert fast(torch.ones(2, 3)).eq(3.0).all()


def test_edits_are_seen_after_many_calls_alike():
    fast = captured()
    for edit in (*EDITS, *OTHER_TENSORS):
        for _ in range(3):
            fast(x_of(2, 3))
        edit(restore(fast))
        assert ran_original(fast, x_of(2, 3)) == (edit in EDITS), edit.__name__


def test_values_written_in_place_are_seen_by_the_same_graph():
    fast = captured()
    with torch.no_grad():
        fast.linear.weight.mul_(2.0)
        fast.shift.add_(1.0)
    fast.load_state_dict({name: value + 0.5 for name, value in fast.state_dict().items()})
    assert not ran_original(fast, x_of(2, 3))
    assert len(fast.report.graphs) == 1


def test_an_optimizer_step_is_seen():
    fast = optimize(Net().eval())
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.5)
    with torch.enable_grad():
        for _ in range(3):
            optimizer.zero_grad()
            fast(x_of(2, 3)).square().sum().backward()
            assert all(p.grad is not None for p in fast.parameters())
            optimizer.step()
    assert len(fast.report.graphs) == 1
    ran_original(fast, x_of(2, 3))


def test_another_dtype_of_the_same_parameter_objects():
    fast = captured()
    fast.to(torch.float64)
    assert ran_original(fast, x_of(2, 3).double())
    assert not ran_original(fast, x_of(2, 3).double())
    fast.to(torch.float32)  # buffers are new objects now
    fast(x_of(2, 3))
    assert not ran_original(fast, x_of(2, 3))
    assert not fast.report.fallbacks


def test_train_and_eval_have_graphs_of_their_own():
    fast = captured()
    x = x_of(8, 8)
    fast.train()
    first, second = fast(x), fast(x)
    assert not torch.equal(first, second)  # dropout
    assert 0.3 < (fast(torch.randn(64, 64, 4)) - 2 * 2 * fast.shift).abs().gt(0).float().mean() <= 1.0
    fast.eval()
    assert not ran_original(fast, x)
    assert len(fast.report.graphs) == 2, fast.report.fallbacks


def test_training_takes_the_originals_random_numbers_on_the_first_call():
    model = Net().train()
    fast = optimize(model)
    x = x_of(2, 3)
    torch.manual_seed(3)
    expected = model(x), torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(fast(x), expected[0])
    assert torch.equal(torch.rand(2), expected[1])  # capturing drew none


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_modes_have_graphs_of_their_own(mode):
    fast = captured()
    with mode():
        expected = restore(fast)(x := x_of(2, 3))
        fast(x)
        found = fast(x)
    assert found.dtype is expected.dtype and found.requires_grad is expected.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert len(fast.report.graphs) == 2, fast.report.fallbacks


# What runs the original


class DataDependent(Net):
    def forward(self, x):
        if int(x.sum()) > 0:  # cannot be captured
            return x
        return -x


def test_a_failed_capture_is_remembered_and_said_once():
    fast = optimize(DataDependent().eval())
    with pytest.warns(FxbtWarning, match="runs its original forward") as caught:
        for shape in [(2, 3), (5, 5), (2, 3)]:
            assert ran_original(fast, x_of(*shape))
    assert len([w for w in caught if w.category is FxbtWarning]) == 1
    assert fast._fxbt_dispatcher._graphs.captures == 1
    (reason,) = fast.report.fallbacks
    assert "test_dispatch.py" in reason and "# cannot be captured" in reason


def test_a_failure_is_tried_again_after_an_edit_once():
    class Switch(Net):
        def forward(self, x):
            if self.config.inner and int(x.sum()) > 0:
                return -x
            return super().forward(x)

    fast = optimize(Switch().eval())
    fast.config.inner = 1
    fast(x_of(2, 3))
    assert not fast.report.graphs
    fast.config.inner = None
    fast(x_of(2, 3))
    assert len(fast.report.graphs) == 1 and not ran_original(fast, x_of(2, 3))


def test_an_object_argument_runs_the_original():
    class Loose(Net):
        def forward(self, x, anything=None):
            return super().forward(x)

    fast = optimize(Loose().eval())
    with pytest.warns(FxbtWarning, match=r"argument args\[1\] holds a object"):
        assert ran_original(fast, x_of(2, 3), object())
    assert not fast.report.graphs


def test_hooks_run():
    fast = captured()
    seen = []
    handle = restore(fast).norm.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    assert ran_original(fast, x_of(2, 3)) and len(seen) == 2
    assert "norm (LayerNorm) has a hook" in fast.report.fallbacks[0]
    handle.remove()
    assert not ran_original(fast, x_of(2, 3)) and len(seen) == 2


def test_backward_hooks_and_global_hooks_run():
    fast, seen = captured(), []
    handle = fast.linear.register_full_backward_hook(lambda *_: seen.append("backward"))
    with torch.enable_grad():
        fast(x_of(2, 3).requires_grad_()).sum().backward()
    assert seen == ["backward"]
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append("global"))
    try:
        fast(x_of(2, 3))
    finally:
        handle.remove()
    assert seen.count("global") > 2  # linear, norm, ... and the model itself


def test_hooks_of_the_model_itself_run_once_around_the_graph():
    fast = captured()
    handle = fast.register_forward_hook(lambda module, args, output: output + 1)
    x = x_of(2, 3)
    torch.testing.assert_close(fast(x), restore(fast)(x))
    assert len(fast.report.graphs) == 2 and not fast.report.fallbacks
    assert not ran_original(fast, x)
    handle.remove()


def test_in_place_writes_to_arguments_happen():
    class Writes(Net):
        def forward(self, x):
            return x.add_(1)

    fast = optimize(Writes().eval())
    x = torch.zeros(2, 3)
    for _ in range(3):
        fast(x)
    assert x.eq(3).all()
    assert "writes in place to its argument x" in fast.report.fallbacks[0]


def test_batch_norm_in_training_counts_each_call_once():
    fast = optimize(nn.Sequential(nn.BatchNorm1d(4)).train())
    reference = nn.Sequential(nn.BatchNorm1d(4)).train()
    for _ in range(3):
        x = torch.randn(5, 4)
        torch.testing.assert_close(fast(x), reference(x))
    fast.warmup(torch.randn(5, 4))
    torch.testing.assert_close(fast.state_dict(), reference.state_dict())


def test_the_models_own_error_is_what_the_caller_sees():
    fast = captured()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
            fast(torch.randn(2, 3, 5))
        assert caught.value.__cause__ is None
    with pytest.raises(TypeError, match="unexpected keyword"):
        fast(x_of(2, 3), nonsense=torch.ones(1))
    assert not ran_original(fast, x_of(2, 3)) and not fast.report.fallbacks


def with_run(monkeypatch, run):
    compile_ = pipeline.compile

    def changed(*args, **kwargs):
        compiled = compile_(*args, **kwargs)
        inner = compiled.run
        compiled.run = lambda *tensors: run(inner, *tensors)
        return compiled

    monkeypatch.setattr(pipeline, "compile", changed)


def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    with_run(monkeypatch, lambda inner, *tensors: tuple(value + 0.1 for value in inner(*tensors)))
    fast = optimize(Net().eval())
    fast(x_of(2, 3))
    assert ran_original(fast, x_of(2, 3)) and not fast.report.graphs
    assert (
        "the graph's outputs differ from the original's: output 0 differs by up to 1.0e-01" in fast.report.fallbacks[0]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y.double(), "dtype, shape"),
        (lambda y: y[:1], "dtype, shape"),
        (lambda y: y * float("nan"), "differs by"),
        (lambda y: 3, "is a int, not a tensor"),
    ],
)
def test_differences_are_found(monkeypatch, change, words):
    with_run(monkeypatch, lambda inner, *tensors: tuple(change(value) for value in inner(*tensors)))
    fast = optimize(Net().eval())
    fast(x_of(2, 3))
    assert words in fast.report.fallbacks[0]


def test_a_graph_that_fails_later_is_disabled(monkeypatch):
    def run(inner, *tensors):
        if tensors[0].shape[0] == 5:
            raise ValueError("no fives")
        return inner(*tensors)

    with_run(monkeypatch, run)
    fast = optimize(Net().eval())
    fast(x_of(2, 3))
    assert not ran_original(fast, x_of(2, 3))
    assert ran_original(fast, x_of(5, 3))
    assert ran_original(fast, x_of(2, 3))  # not trusted again
    assert "failed where the original does not (ValueError: no fives)" in fast.report.fallbacks[0]


def test_a_fault_of_the_compiler_does_not_reach_the_caller(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr(pipeline, "compile", broken)
    fast = optimize(Net().eval())
    assert ran_original(fast, x_of(2, 3)) and ran_original(fast, x_of(2, 3))
    assert "fxbt itself failed on the graph (KeyError" in fast.report.fallbacks[0]


@pytest.mark.parametrize("threshold", [700, 10**6, 0])
def test_while_a_call_is_captured_python_collects_rarely_if_at_all(threshold, monkeypatch):
    seen = []

    def broken(*args, **kwargs):
        seen.append(gc.get_threshold())
        raise KeyError("bug")

    monkeypatch.setattr(pipeline, "compile", broken)
    before = gc.get_threshold()
    try:
        gc.set_threshold(threshold, 7, 8)
        optimize(Net().eval())(x_of(2, 3))
        after = gc.get_threshold()
    finally:
        gc.set_threshold(*before)
    assert after == (threshold, 7, 8)
    assert seen == [({700: 100_000, 10**6: 10**6, 0: 0}[threshold], 7, 8)]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_a_process_has_frozen_stays_frozen_and_nothing_else(is_frozen):
    if is_frozen:
        gc.freeze()
    try:
        fast = optimize(Net().eval())
        fast(x_of(2, 3))
        assert len(fast.report.graphs) == 1
        assert bool(gc.get_freeze_count()) is is_frozen
    finally:
        gc.unfreeze()


# Tracing through an optimised model


def test_tracers_see_the_original():
    fast = captured()
    x = x_of(2, 3)
    program = torch.export.export(fast, (x,))
    torch.testing.assert_close(program.module()(x), fast(x))
    traced = torch.jit.trace(restore(fast), (x,), check_trace=False)
    torch.testing.assert_close(torch.jit.trace(fast, (x,), check_trace=False)(x), traced(x))
    torch.testing.assert_close(torch.func.vmap(fast)(x), restore(fast)(x))
    with torch.device("cpu"):
        assert ran_original(fast, x)
    _, tangent = torch.func.jvp(fast, (x,), (torch.ones_like(x),))
    assert tangent.shape == x.shape
    assert not fast.report.fallbacks and len(fast.report.graphs) == 1


def test_torch_compile_of_an_optimised_model():
    fast = captured()
    x = x_of(2, 3)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), fast(x))


def test_an_optimised_part_inside_an_optimised_whole():
    part = Net().eval()
    whole = optimize(nn.Sequential(optimize(part), nn.Linear(4, 4)).eval())
    x = x_of(2, 3)
    expected = restore(whole)[1](part(x))
    for _ in range(3):
        torch.testing.assert_close(whole(x), expected)
    assert len(whole.report.graphs) == 1


# Threads


def in_threads(count, work):
    errors = []

    def guarded(i):
        try:
            with torch.no_grad():
                work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=250)  # captures wait for each other; pytest itself ends a test after 300
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]


def test_eight_threads_from_the_first_call_on():
    fast = optimize(Net().eval())
    inputs = [x_of(i + 1, 3) for i in range(8)]
    expected = [restore(fast)(x) for x in inputs]

    def work(i):
        for _ in range(10):
            torch.testing.assert_close(fast(inputs[i]), expected[i], rtol=1e-5, atol=1e-6)

    with warnings.catch_warnings():
        warnings.simplefilter("error", FxbtWarning)
        in_threads(8, work)
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks


def test_threads_of_many_signatures_and_models_capture_while_others_run():
    failing, shared = optimize(DataDependent().eval()), optimize(Net().eval())
    x = x_of(2, 3)
    wanted = {flag: restore(shared)(x, flag=flag) for flag in (False, True)}

    def work(i):
        for step in range(6):
            flag = bool((i + step) % 2)
            torch.testing.assert_close(shared(x, flag=flag), wanted[flag], rtol=1e-5, atol=1e-6)
            assert torch.equal(failing(x.abs()), x.abs())
            own = Net().eval()
            torch.testing.assert_close(optimize(own)(x), own.forward(x))

    in_threads(4, work)
    assert len(shared.report.graphs) == 2


class Verdicts:
    """Stands in for `race.Race.look`: says of calls of so many elements that the original is faster, by their size."""

    def __init__(self, monkeypatch, faster):
        self.looked = []
        monkeypatch.setenv("FXBT_TUNE", "1")
        monkeypatch.setattr(fxbt.kernels.autotune.Measurements, "is_on", False)
        verdicts = self

        def look(race, graph, original, seconds=0.0):
            output = original()
            assert torch.equal(graph()[0], output)
            verdicts.looked.append(output.numel())
            race._finish(Evidence(12, 12, 2e-3, 1e-3) if faster(output.numel()) else None)

        monkeypatch.setattr(fxbt.runtime.race.Race, "look", look)


def test_the_original_serves_where_it_is_faster_and_the_graph_stays_in_the_report(torchs_kernels, monkeypatch):
    verdicts = Verdicts(monkeypatch, lambda elements: True)
    fast = optimize(Net().eval())
    with pytest.warns(FxbtWarning, match="run faster without a graph"):
        fast(x_of(2))
    assert ran_original(fast, x_of(3)) and verdicts.looked == [8]
    assert fast.report.latest.hits and "linear" in fast.report.after
    assert fast.report.latest.lost == {"8 to 15 elements": "12 of 12 pairs, 2 ms against 1 ms"}
    assert "8 to 15 elements  12 of 12 pairs, 2 ms against 1 ms" in str(fast.report)
    reason = "calls like (x torch.float32[2, 4]) run faster without a graph: 12 of 12 pairs, 2 ms against 1 ms"
    assert fast.report.fallbacks == [reason] and fast._fxbt_dispatcher._graphs.captures == 1


def test_it_does_for_calls_of_that_size_alone(torchs_kernels, monkeypatch):
    verdicts = Verdicts(monkeypatch, lambda elements: 128 <= elements < 256)
    fast = optimize(Net().eval())
    fast(x_of(2))
    assert not ran_original(fast, x_of(2)) and verdicts.looked == [8]
    assert ran_original(fast, x_of(40)) and ran_original(fast, x_of(41)) and verdicts.looked == [8, 160]
    for rows in (3, 31, 64, 400):
        fast(x_of(rows))  # the first call of a size is looked at
        assert not ran_original(fast, x_of(rows)), rows
    assert fast.report.latest.lost == {"128 to 255 elements": "12 of 12 pairs, 2 ms against 1 ms"}


def test_it_is_looked_at_again_and_a_wrong_verdict_heals(torchs_kernels, monkeypatch):
    wrong = [True]
    verdicts = Verdicts(monkeypatch, lambda elements: wrong.pop() if wrong else False)
    fast = optimize(Net().eval())
    fast(x_of(2))
    for _ in range(fxbt.runtime.race.LOOK_AGAIN - 1):  # the call that was captured counts too
        assert ran_original(fast, x_of(2))
        assert fast.report.latest.lost
    fast(x_of(2))
    assert not ran_original(fast, x_of(2)) and len(verdicts.looked) == 2
    assert not fast.report.latest.lost and "the original serves" not in str(fast.report)


def test_a_look_at_a_call_that_fails_is_not_seen(torchs_kernels, monkeypatch):
    monkeypatch.setenv("FXBT_TUNE", "1")
    monkeypatch.setattr(fxbt.kernels.autotune.Measurements, "is_on", False)
    model = Branching()
    fast = fxbt.optimize(model)
    x, some, none = torch.randn(2, 5, 4), torch.ones(2, 5) > 0, torch.zeros(2, 5) > 0
    fast(x, some)
    monkeypatch.setattr(fxbt.runtime.race.Race, "is_due", lambda race: True)
    for mask in (some, none, some):
        assert torch.equal(fast(x, mask), model(x, mask))
    assert len(fast.report.graphs) == 1


@pytest.mark.parametrize("reason", ["switched off", "gradients", "random numbers"])
def test_where_nothing_may_be_timed_the_graph_serves_all_sizes(reason, monkeypatch):
    monkeypatch.setenv("FXBT_TUNE", "0" if reason == "switched off" else "1")
    monkeypatch.setattr(fxbt.runtime.race.Race, "look", lambda *_: pytest.fail("measured"))
    fast = optimize(Net().train(reason == "random numbers"))
    with torch.set_grad_enabled(reason == "gradients"):
        for rows in (2, 40, 3):
            fast(x_of(rows))
    assert len(fast.report.graphs) == 1 and fast._fxbt_dispatcher._graphs.captures == 1
    assert not fast.report.fallbacks, fast.report.fallbacks


class Branching(nn.Module):
    """Doubles where anything is masked."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("ready", torch.tensor(True))

    def forward(self, x, mask):
        x = self.linear(x)
        if mask.any():
            x = x * 2
        return x + 1 if self.ready.item() else x


def test_calls_that_go_another_way_run_the_original_and_then_a_graph_of_their_own(torchs_kernels: None) -> None:
    model = Branching()
    fast = fxbt.optimize(model)
    x, some, none = torch.randn(2, 5, 4), torch.ones(2, 5) > 0, torch.zeros(2, 5) > 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxbt.FxbtWarning)
        for mask in (some, some, some, none, some, none, none, none, none, some):
            assert torch.equal(fast(x, mask), model(x, mask))
        assert len(fast.report.graphs) == 2
        assert "was not used: the call goes another way than the captured one at" in fast.report.fallbacks[0]
        model.ready.fill_(False)
        for mask in (some, none, none, some):
            assert torch.equal(fast(x, mask), model(x, mask))
