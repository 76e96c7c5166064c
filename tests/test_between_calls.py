"""Kernels that are measured between calls: never in the first one, within a budget, on a quiet machine, swapped whole.

Clocks are simulated, and so is what is measured: `Fastest` says of real contests that another kernel than the rule's
wins. All else is real.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import Host
from models import ENCODER, compare, tokens
from padding_models import Case
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

import fxbt
import fxbt.kernels.cache
import fxbt.making
from fxbt.kernels import autotune, machine, native, shipped, traffic
from fxbt.kernels.clock import Clock
from fxbt.kernels.turns import Paced
from fxbt.lower.cpu import attention, linears
from fxbt.lower.cpu.epilogue import Activation
from fxbt.optimize import dispatcher_of
from fxbt.runtime import between_calls

STEPS = 3  # of a measurement, each of them a slice
MANY = 200  # calls, more than all that is measured takes


class Ticking(Clock):
    """A quiet machine where a second goes by whenever somebody looks; `taken_each` processors are lost meanwhile."""

    def __init__(self, taken_each: int = 0) -> None:
        self.time, self.lost, self.taken_each = 0.0, 0, taken_each

    def now(self) -> float:
        self.time += 1.0
        return self.time

    def taken(self) -> int:
        self.lost += self.taken_each
        return self.lost


class Fastest:
    """Stands in for measuring: `name` wins wherever it takes part, after so many steps; notes what was measured."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.begun: list[str] = []
        self.done: list[str] = []
        self.is_quiet = True

    def __call__(self, contest: Any, clock: Clock) -> Any:
        self.begun.append(contest.key)
        for _ in range(STEPS):
            yield
        self.done.append(contest.key)
        if not self.is_quiet:
            return None
        return {name: [1.0 if name == self.name else 2.0] * len(contest.sizes) for name in contest.names}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXBT_TUNE", "1")
    monkeypatch.setenv("FXBT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fxbt.kernels.cache, "_made_private", [])
    monkeypatch.setattr(shipped, "FILE", tmp_path / "none.json")
    monkeypatch.setattr(fxbt.runtime.race.Race, "look", lambda *_: None)
    monkeypatch.setattr(between_calls, "SHARE", 1000.0)  # a slice in each call
    with torch.no_grad():
        yield tmp_path


@pytest.fixture
def fastest(monkeypatch, torchs_kernels):
    """Measuring finds plain products and `F.linear` faster than what the rule takes."""
    monkeypatch.setattr(linears, "_by_rule", lambda elements, kernels: "packed")
    found = Fastest("F.linear")
    monkeypatch.setattr(autotune, "measure", found)
    return found


def optimized(model: nn.Module, clock: Clock | None = None, **options: Any) -> Any:
    """An optimised model, whose measuring goes by a simulated clock, with time for all of it."""
    fast = fxbt.optimize(model, **{"tune_seconds": 10**6, **options})
    dispatcher: Any = dispatcher_of(fast)
    dispatcher._between._clock = dispatcher._maker.measurements._clock = clock or Ticking()
    return fast


def measurements_of(fast: Any) -> autotune.Measurements:
    dispatcher: Any = dispatcher_of(fast)
    return dispatcher._maker.measurements


def encoder() -> Any:
    return Case("BertModel", ENCODER).model()


def until_measured(fast: Any, **inputs: Any) -> None:
    """Calls until nothing waits, and once more, when other kernels take over."""
    for _ in range(MANY):
        fast(**inputs)
        if not measurements_of(fast).are_waiting:
            break
    assert not measurements_of(fast).are_waiting
    fast(**inputs)


def agree(fast: Any, model: nn.Module, padded: str = "none", batch: int = 2, length: int = 7) -> None:
    inputs = tokens(batch, length, padded)
    compare(fast(**inputs), model(**inputs), dropped=[inputs["attention_mask"].bool()])


def grounds(fast: Any) -> set[str]:
    """On what the choices of the latest graph rest."""
    report = fast.report.latest
    return {"by rule" if "by rule" in text else "measured" for key, text in report.kernels.items() if key != "native"}


# --- when ---------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_in_the_first_call_and_all_in_later_ones(fastest):
    model = encoder()
    fast = optimized(model)
    agree(fast, model)
    assert not fastest.begun and measurements_of(fast).spent == 0
    assert grounds(fast) == {"by rule"} and "to be measured between calls" in str(fast.report)
    assert "by rule; measuring took 0.00 of 1e+06 s" in fast.report.latest.tuning
    until_measured(fast, **tokens(2, 7, "none"))
    assert len(fastest.done) == len(set(fastest.done)) == len(fastest.begun) > 3
    assert grounds(fast) == {"measured"} and "by rule" not in fast.report.latest.tuning
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks and not fast.report.notes


def test_a_call_of_a_kernel_at_a_time(fastest):
    fast = optimized(encoder())
    fast(**tokens(2, 7, "none"))
    seen = []
    for _ in range(2 * STEPS):
        before = len(fastest.begun), len(fastest.done)
        fast(**tokens(2, 7, "none"))
        seen.append((len(fastest.begun) - before[0], len(fastest.done) - before[1]))
    assert max(begun for begun, _ in seen) == max(done for _, done in seen) == 1


class Slow:
    """Measurements whose slices take longer than they should."""

    are_waiting = True

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.slices = clock, seconds, 0

    def work(self, seconds: float) -> None:
        self.slices += 1
        self.clock.time += self.seconds


@pytest.mark.parametrize("slice_seconds", [0.02, 0.1])
@pytest.mark.parametrize("call_seconds", [0.001, 0.05, 2.0])
def test_calls_pay_for_slices(call_seconds, slice_seconds, monkeypatch):
    monkeypatch.setattr(between_calls, "SHARE", 0.05)
    clock = Host(0)
    measurements = Slow(clock, slice_seconds)
    between = between_calls.BetweenCalls(measurements, clock)
    for count in range(1, 5000):
        begun = between.begin()
        clock.time += call_seconds
        between.end(begun)
        assert measurements.slices <= count
        assert measurements.slices * slice_seconds <= 0.05 * count * call_seconds + slice_seconds
    assert measurements.slices > (0 if call_seconds < 0.05 else 100)


def test_what_fails_in_a_slice_is_not_seen_by_the_caller(fastest, monkeypatch):
    def work(self, seconds):
        raise RuntimeError("of the disk")

    monkeypatch.setattr(autotune.Measurements, "work", work)
    model = encoder()
    fast = optimized(model)
    for _ in range(3):
        agree(fast, model)
    assert not fast.report.fallbacks


def test_what_is_measured_is_kept_and_the_next_model_begins_with_it(fastest, cache):
    model, inputs = encoder(), tokens(2, 7, "none")
    until_measured(optimized(model), **inputs)
    assert (cache / autotune.file_name()).exists()
    begun = list(fastest.begun)
    fast = optimized(model)
    agree(fast, model)
    assert grounds(fast) == {"measured"} and fastest.begun == begun and not measurements_of(fast).are_waiting


def test_a_warmup_measures_at_once(fastest):
    model = encoder()
    fast = optimized(model)
    done = fast.warmup(**tokens(2, 7, "none"))
    assert grounds(fast) == {"measured"} and "measure kernels" in done.seconds
    assert fastest.done == fastest.begun and not measurements_of(fast).are_waiting
    agree(fast, model)


def test_a_warmup_measures_what_waits_since_an_ordinary_call(fastest):
    model = encoder()
    fast = optimized(model)
    agree(fast, model)
    assert grounds(fast) == {"by rule"}
    fast.warmup(**tokens(2, 7, "none"))
    assert grounds(fast) == {"measured"} and len(fast.report.graphs) == 1
    agree(fast, model)
    agree(fast, model, "right", 3, 9)


def test_in_no_call_of_another_thread(fastest):
    fast = optimized(encoder())
    traffic.BUSY.add(0)
    try:
        for _ in range(MANY // 2):
            fast(**tokens(2, 7, "none"))
    finally:
        traffic.BUSY.discard(0)
    assert not fastest.begun and grounds(fast) == {"by rule"}
    until_measured(fast, **tokens(2, 7, "none"))
    assert grounds(fast) == {"measured"}


def test_a_call_that_begins_beside_a_measurement_ends_its_slice_and_voids_it():
    def steps(clock):
        before = clock.taken()
        yield
        found.append(clock.taken() - before)
        yield
        found.append(clock.taken() - before)

    found: list[int] = []
    paced = Paced(steps, Ticking())
    assert not paced.go_on(100.0, is_alone=lambda: False) and found == []
    assert paced.go_on(100.0, is_alone=lambda: True)
    assert found[0] > 10**5 and found[1] == found[0]


def test_the_time_between_slices_is_none_of_a_measurement():
    def steps(clock):
        start = clock.now()
        yield
        yield
        times.append(clock.now() - start)

    times: list[float] = []
    clock = Ticking()
    paced = Paced(steps, clock)
    for _ in range(2):
        assert not paced.go_on(0.5, is_alone=lambda: True)
        clock.time += 1000.0
    assert paced.go_on(0.5, is_alone=lambda: True) and times[0] < 20


def test_grad_mode_and_autocast_are_the_callers_again_after_a_slice():
    def steps(clock):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        yield

    seen: list[tuple[bool, ...]] = []
    with torch.autocast("cpu"), torch.inference_mode():
        Paced(steps, Ticking()).go_on(0.5, is_alone=lambda: True)
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert seen == [(False, False, False)]


# --- how much -----------------------------------------------------------------------------------------------------


def test_the_budget_is_for_all_graphs_of_a_model(fastest):
    fast = optimized(encoder(), tune_seconds=30)
    for _ in range(MANY):
        fast(**tokens(2, 7, "none"))
    measurements = measurements_of(fast)
    assert 0 < len(fastest.done) < len(fast.report.latest.kernels) and not measurements.are_waiting
    assert 30 <= measurements.spent < 45  # the slice that began last, by a clock that ticks at each look
    assert autotune.SPENT in str(fast.report)
    assert "measured" in fast.report.latest.tuning and "by rule" in fast.report.latest.tuning
    begun = len(fastest.begun)
    fast(**tokens(2, 7, "none"), output_hidden_states=True)
    assert grounds(fast) == {"by rule", "measured"} and len(fastest.begun) == begun


def test_a_warmup_may_have_a_budget_of_its_own(fastest):
    model = encoder()
    fast = optimized(model, tune_seconds=1)
    for _ in range(MANY):
        fast(**tokens(2, 7, "none"))
    assert grounds(fast) == {"by rule"}
    fast.warmup(**tokens(2, 7, "none"), tune_seconds=0)
    assert grounds(fast) == {"by rule"}
    fast.warmup(**tokens(2, 7, "none"), tune_seconds=10**6)
    assert grounds(fast) == {"measured"}
    agree(fast, model)


@pytest.mark.parametrize("how", ["FXBT_TUNE=0", "tune_seconds=0"])
def test_by_rule_only(how, fastest, monkeypatch):
    model = encoder()
    until_measured(optimized(model), **tokens(2, 7, "none"))
    begun = list(fastest.begun)
    if how == "FXBT_TUNE=0":
        monkeypatch.setenv("FXBT_TUNE", "0")
    fast = optimized(model, tune_seconds=0 if how == "tune_seconds=0" else 10**6)
    fast.warmup(**tokens(2, 7, "none"))
    for _ in range(MANY // 2):
        fast(**tokens(2, 7, "none"))
    assert grounds(fast) == {"by rule"} and fastest.begun == begun
    assert all(text.endswith("(by rule, not measured)") for text in fast.report.latest.kernels.values())
    agree(fast, model)


@pytest.mark.parametrize("wrong", [-1, float("inf"), float("nan"), True, "1", None])
def test_what_are_no_seconds_is_an_error(wrong):
    with pytest.raises(ValueError, match="tune_seconds is"):
        fxbt.optimize(nn.Linear(4, 4), tune_seconds=wrong)
    if wrong is not None:
        with pytest.raises(ValueError, match="tune_seconds is"):
            fxbt.optimize(nn.Linear(4, 4)).warmup(torch.randn(2, 4), tune_seconds=wrong)


def test_the_seconds_without_the_option_are_those_of_the_options():
    assert measurements_of(fxbt.optimize(nn.Linear(4, 4))).seconds == autotune.TUNE_SECONDS


# --- a busy machine -----------------------------------------------------------------------------------------------


def test_behind_a_call_that_lost_its_processor_nothing_is_measured(fastest):
    clock = Ticking(taken_each=1000)
    fast = optimized(encoder(), clock)
    for _ in range(MANY // 2):
        fast(**tokens(2, 7, "none"))
    assert not fastest.begun and measurements_of(fast).spent == 0
    clock.taken_each = 0
    until_measured(fast, **tokens(2, 7, "none"))
    assert grounds(fast) == {"measured"}


def test_what_was_disturbed_twice_stays_by_rule_and_the_report_says_so(fastest, cache):
    fastest.is_quiet = False
    model = encoder()
    fast = optimized(model)
    until_measured(fast, **tokens(2, 7, "none"))
    assert len(fastest.done) == autotune.TRIES * len(set(fastest.done))
    assert grounds(fast) == {"by rule"} and autotune.DISTURBED in str(fast.report)
    assert not (cache / autotune.file_name()).exists()
    fastest.is_quiet = True
    fast.warmup(**tokens(2, 7, "none"))
    assert grounds(fast) == {"measured"}
    agree(fast, model)


def test_a_kernel_that_fails_while_it_is_measured_costs_no_call(monkeypatch, torchs_kernels):
    def measure(contest, clock):
        yield
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(autotune, "measure", measure)
    model = encoder()
    fast = optimized(model)
    until_measured(fast, **tokens(2, 7, "none"))
    agree(fast, model)
    assert "measuring failed: RuntimeError: no such instruction" in str(fast.report) and not fast.report.fallbacks


# --- the swap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["drop", "keep"])
def test_other_kernels_serve_with_the_same_numbers(padding, fastest):
    model = encoder()
    fast = optimized(model, padding=padding)
    calls = [tokens(*shape, padded) for shape in ((2, 7), (3, 12)) for padded in ("right", "none")]
    before = [fast(**inputs) for inputs in calls]
    served = dict(fast.report.latest.calls)
    serves = fast._fxbt_dispatcher._graphs.__iter__().__next__().run
    until_measured(fast, **calls[1])
    (graph,) = fast._fxbt_dispatcher._graphs
    assert graph.run is not serves and grounds(fast) == {"measured"}
    for inputs, expected in zip(calls, before, strict=True):
        output = fast(**inputs)
        compare(output, expected)
        compare(output, model(**inputs), dropped=[inputs["attention_mask"].bool()])
    if padding == "drop":
        assert fast.report.latest.calls["packed"] == served["packed"] + 2  # it counts on
    assert len(fast.report.graphs) == 1 and not fast.report.fallbacks and not fast.report.notes


def test_changed_weights_are_seen_before_and_after(fastest):
    model = encoder()
    fast = optimized(model)
    agree(fast, model)
    model.encoder.layer[0].attention.self.query.weight.mul_(1.5)
    agree(fast, model)
    until_measured(fast, **tokens(2, 7, "none"))
    for parameter in model.parameters():
        parameter.mul_(1.1)
    agree(fast, model)
    agree(fast, model, "right", 3, 9)
    assert grounds(fast) == {"measured"} and len(fast.report.graphs) == 1


def test_other_tensors_in_the_places_of_weights_leave_the_kernels_as_they_are(fastest):
    model = encoder()
    fast = optimized(model)
    agree(fast, model)
    other = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(other, assign=True)
    agree(fast, model)
    until_measured(fast, **tokens(2, 7, "none"))
    agree(fast, model)
    assert len(fast.report.graphs) == 1 and grounds(fast) == {"by rule"}


def test_kernels_with_other_numbers_are_refused_and_the_report_says_so(monkeypatch, torchs_kernels):
    kernels_of = linears.linear_kernels

    def with_a_wrong_one(*args: Any) -> dict[str, linears.Kernel]:
        kernels = kernels_of(*args)
        plain = kernels["F.linear"].run
        return {**kernels, "wrong": linears.Kernel(lambda *operands: plain(*operands) * 1.01)}

    monkeypatch.setattr(linears, "linear_kernels", with_a_wrong_one)
    monkeypatch.setattr(autotune, "measure", Fastest("wrong"))
    model = encoder()
    fast = optimized(model)
    agree(fast, model)
    until_measured(fast, **tokens(2, 7, "none"))
    agree(fast, model)
    agree(fast, model, "right")
    (note,) = fast.report.notes
    assert note.startswith(
        "the kernels that were measured to be faster are not used: where a sequence ends in padding, "
    )
    assert (
        "differs by up to" in note
        and "by rule, measured since then" in str(fast.report)
        and note in str(fast.report)
        and len(fast.report.graphs) == 1
        and not fast.report.fallbacks
    )


def test_calls_in_other_threads_are_right_throughout(fastest):
    model = encoder()
    fast = optimized(model)
    agree(fast, model)
    expected = {shape: model(**tokens(*shape, "right")) for shape in ((2, 7), (3, 12), (1, 5))}
    errors: list[BaseException] = []

    def call(shape: tuple[int, int]) -> None:
        inputs = tokens(*shape, "right")
        with torch.no_grad():
            for _ in range(MANY):
                try:
                    compare(fast(**inputs), expected[shape], dropped=[inputs["attention_mask"].bool()])
                except BaseException as error:
                    errors.append(error)
                    return

    threads = [threading.Thread(target=call, args=(shape,)) for shape in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert len(fastest.done) == len(set(fastest.done))  # never two at once
    until_measured(fast, **tokens(2, 7, "right"))
    assert grounds(fast) == {"measured"} and not fast.report.fallbacks


def test_two_models_measure_a_shape_once(fastest):
    models = [encoder(), encoder()]
    fasts = [optimized(model) for model in models]
    for _ in range(MANY):
        for fast in fasts:
            fast(**tokens(2, 7, "none"))
    for fast, model in zip(fasts, models, strict=True):
        until_measured(fast, **tokens(2, 7, "none"))
        agree(fast, model)
        assert grounds(fast) == {"measured"}
    assert len(fastest.done) == len(set(fastest.done))


GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=256, bos_token_id=0, eos_token_id=49, pad_token_id=49
)


def test_what_is_generated_is_the_same_while_kernels_change(fastest):
    model = GPT2LMHeadModel(GPT2).eval()
    fast = optimized(model)
    start = torch.randint(1, 40, (2, 5))
    how = {"max_new_tokens": 120, "min_new_tokens": 120, "do_sample": False}
    assert torch.equal(fast.generate(start, **how), model.generate(start, **how))
    assert fastest.done and not fast.report.fallbacks
    assert torch.equal(fast.generate(start, **how), model.generate(start, **how))
    assert "measured" in grounds(fast)


def test_a_callers_cache_is_left_as_the_original_leaves_it(fastest):
    model = GPT2LMHeadModel(GPT2).eval()
    fast = optimized(model)
    caches = DynamicCache(config=GPT2), DynamicCache(config=GPT2)
    for _ in range(40):
        ids = torch.randint(1, 40, (1, 1))
        ours, theirs = (
            run(ids, past_key_values=past, use_cache=True) for run, past in zip((fast, model), caches, strict=True)
        )
        compare(ours.logits, theirs.logits)
    assert fastest.done and caches[0].get_seq_length() == caches[1].get_seq_length() == 40
    compare(caches[0].layers[1].keys, caches[1].layers[1].keys)


class Counts(nn.Module):
    """Changes a buffer in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.linear(x) * self.count


@pytest.mark.parametrize("why", ["effects", "random numbers", "gradients"])
def test_graphs_that_cannot_be_lowered_again_are_measured_in_a_warmup_only(why, fastest):
    model = Counts() if why == "effects" else nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    model.train(why == "random numbers")
    fast = optimized(model)
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(why == "gradients"):
        for _ in range(MANY // 4):
            fast(x)
        assert not fastest.begun and not measurements_of(fast).are_waiting
        assert len(fast.report.graphs) == 1 and not fast.report.fallbacks
        if why != "gradients":
            assert "fast.warmup(...) measures it" in fast.report.latest.kernels["linear 8x8 float32"]


# --- forks --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
@pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning", "ignore::DeprecationWarning")
def test_a_child_goes_on_though_it_was_forked_in_the_middle_of_a_measurement(fastest):
    model = encoder()
    fast = optimized(model)
    while not fastest.begun:
        fast(**tokens(2, 7, "none"))
    assert measurements_of(fast)._at_work is not None

    def child(sender: Any) -> None:
        with torch.no_grad():
            until_measured(fast, **tokens(2, 7, "none"))
            agree(fast, model)
        sender.send((grounds(fast), fastest.begun.count(fastest.begun[0])))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    locked = threading.Event()
    over = threading.Event()

    def hold() -> None:  # another thread measures while this one forks
        with autotune._ONE_AT_A_TIME:
            traffic.BUSY.add(threading.get_ident())
            locked.set()
            over.wait()
        traffic.BUSY.discard(threading.get_ident())

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    process = context.Process(target=child, args=(sender,), daemon=True)
    process.start()
    over.set()
    holder.join()
    assert receiver.poll(100)
    assert receiver.recv() == ({"measured"}, 2)  # from its beginning
    process.join()
    until_measured(fast, **tokens(2, 7, "none"))
    assert grounds(fast) == {"measured"}


# --- the table that comes with the package ------------------------------------------------------------------------

HERE: dict[str, Any] = {
    "cpu": "Zilog family 80",
    "capability": "AVX2",
    "threads": 1,
    "torch": ["2.0", "99.0"],
    "from": "a test",
}
LINEAR = linears.linears(24, 16)


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Ships a table to this machine, which takes itself for another."""
    monkeypatch.setattr(machine, "cpu_family", lambda: "Zilog family 80")
    monkeypatch.setattr(machine, "capability", lambda: "AVX2")
    shipped._machines.cache_clear()
    times = {name: [2.0] * len(LINEAR.sizes) for name in (*LINEAR.names, "of another version")}
    times["packed"] = [1.0] * len(LINEAR.sizes)

    def write(data: Any = None, version: int = autotune.FORMAT, **changes: Any) -> Path:
        entry = {**HERE, "microseconds": {LINEAR.key: times}, **changes}
        path = tmp_path / "shipped.json"
        path.write_text(json.dumps({"format": version, "machines": [entry]}) if data is None else data)
        monkeypatch.setattr(shipped, "FILE", path)
        return path

    yield write
    shipped._machines.cache_clear()


def told(contest: Any = LINEAR) -> str:
    tuner = autotune.Tuner()
    tuner.choose(contest)
    return tuner.answers[contest.key]


def test_the_choices_for_a_known_processor_are_there_at_once(ship, fastest):
    ship()
    fast = optimized(nn.Linear(16, 24).eval())
    x = torch.randn(3, 16)
    compare(fast(x), fast._fxbt_dispatcher.original(x))
    assert fast.report.latest.tuning == "1 shipped; measuring took 0.00 of 1e+06 s"
    assert "1: packed" in fast.report.latest.kernels[LINEAR.key] and "(shipped)" in str(fast.report)
    assert not measurements_of(fast).are_waiting and not fastest.begun


def test_what_was_measured_here_comes_before_it(ship, fastest, cache):
    until_measured(optimized(nn.Linear(16, 24).eval()), input=torch.randn(3, 16))
    ship()
    assert "F.linear" in told() and "shipped" not in told()


@pytest.mark.parametrize(
    "changes",
    [
        {"cpu": "Zilog family 8"},
        {"capability": "AVX512"},
        {"threads": 64},
        {"torch": ["1.0", "2.0"]},
        {"torch": ["99.0", "99.1"]},
        {"microseconds": {}},
        {"microseconds": {LINEAR.key: {"packed": [1.0]}}},
        {"microseconds": {LINEAR.key: {name: [-1.0] * len(LINEAR.sizes) for name in LINEAR.names}}},
        {"microseconds": {LINEAR.key: {name: ["1"] * len(LINEAR.sizes) for name in LINEAR.names}}},
        {"microseconds": {LINEAR.key: None}},
    ],
    ids=str,
)
def test_another_processor_or_shape_starts_by_rule(changes, ship, caplog):
    ship(**changes)
    assert "by rule" in told() and not caplog.records


@pytest.mark.parametrize(
    "data",
    ["", "{", "[]", "null", "\\x00", '{"format": 0, "machines": []}', '{"machines": []}', '{"format": %d}'],
)
def test_a_broken_or_foreign_table_is_said_once_and_not_used(data, ship, caplog):
    path = ship(data.replace("%d", str(autotune.FORMAT)))
    assert "by rule" in told() and "by rule" in told()
    (record,) = caplog.records
    assert "the table of kernels that came with the package is not used" in record.message
    assert str(path) in record.message


@pytest.mark.parametrize(
    "changes",
    [{"cpu": 1}, {"threads": True}, {"threads": "2"}, {"torch": ["2"]}, {"torch": [2, 3]}, {"microseconds": []}],
    ids=str,
)
def test_so_is_one_with_a_machine_that_is_none(changes, ship, caplog):
    ship(**changes)
    assert "by rule" in told() and len(caplog.records) == 1


def test_without_tuning_it_is_not_read(ship, monkeypatch):
    ship()
    monkeypatch.setenv("FXBT_TUNE", "0")
    assert "by rule" in told()


SHIPPED = Path(fxbt.__file__).parent / "kernels" / "shipped.json"
GELU = Activation("gelu", "none", torch._C._nn.gelu_)


def test_the_table_in_the_package_is_of_the_contests_there_are():
    entries = shipped._machines(SHIPPED, autotune.FORMAT)
    assert entries and len({str({**entry, "microseconds": 0}) for entry in entries}) == len(entries)
    contests = [linears.linears(384, 384), linears.linears(1536, 384, GELU), attention.attentions(12, 32, True)]
    for entry in entries:
        for contest in contests:
            times = autotune._valid(contest, entry["microseconds"][contest.key])
            assert times is not None or native.library() is None, contest.key
