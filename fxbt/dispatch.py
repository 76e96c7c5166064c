"""`Dispatcher`: serves each call of a model with a proven graph, a newly captured one, or the original forward."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import pipeline
from .capture import outputs
from .capture.caches import is_too_short, one_further, quantised, with_growth
from .capture.call import Binder, Call, shown_shapes
from .capture.containers import Arguments, Changed
from .capture.effects import written_buffers
from .capture.isolated import collecting_rarely
from .capture.locks import LOCK
from .capture.model_state import ModelState, foreign_hook, preserved, versions
from .capture.number_inputs import Numbers
from .capture.outputs import Values
from .capture.recording import Recording, is_recording
from .capture.saved_tensors import active_hooks, comes_from_hook, hidden
from .capture.surroundings import Surroundings
from .capture.value_branches import goes_another_way
from .errors import CaptureError, ExampleError, FallbackError, FxbtWarning, NotCapturable, callers_level
from .explain.graph_report import GraphReport
from .explain.report import Report
from .kernels import native, traffic
from .kernels.forks import FORKS
from .making import Maker
from .options import Options
from .progress import part, watched
from .runtime import race
from .runtime.between_calls import BetweenCalls
from .runtime.compare import original_values
from .runtime.compiled import Compiled
from .runtime.failures import Failures
from .runtime.graph_cache import CALLS_PER_CAPTURE, Graphs
from .runtime.guarded_graph import GuardedGraph
from .runtime.warmup import Warmup
from .torch_compat import is_looked_through

logger = logging.getLogger("fxbt")

MOST_FAULTS = 8  # fxbt's own failures in calls of one model; after that many, it serves no more calls
_LACKS_MEMORY = (MemoryError, torch.OutOfMemoryError)
_FOR_THE_CALLER = (FxbtWarning, FallbackError)
_OWN_FORWARD = "the model object has its own attribute `forward`, which takes precedence over the optimised one"
_WITH_GRADIENTS = "an argument is an object (a KV cache) that forward may change, with gradients enabled"


class _ModelError(Exception):
    """An error raised by the original or by the caller's hooks; the caller sees `error` itself."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class _Served:
    """The output of a served call; the output itself may be None."""

    output: Any


class Dispatcher:
    """Stands between an optimised model and its original; called as `dispatcher(args, kwargs)`.

    A graph runs only if the call's key, its shape guards and the model's state match those of its capture. Every other
    call runs the original forward; `report` says why.
    """

    def __init__(self, original: nn.Module, options: Options) -> None:
        self.original = original
        self.report = Report()
        self._options = options
        self._numbers = Numbers()
        self._binder = Binder(original.forward, None if options.tracer == "hf-fx" else self._numbers)
        self._graphs: Graphs[GuardedGraph] = Graphs(options.max_captures)
        self._reports: WeakKeyDictionary[GuardedGraph, GraphReport] = WeakKeyDictionary()
        self._failures = Failures(original)
        rules = pipeline.in_order(options.rules)
        self._maker = Maker(original, options, rules, self._numbers, self._graphs, self.report.add_note)
        self._between = BetweenCalls(self._maker.measurements)
        self._unlike: ModelState | None = None  # a state for which no graph could be rebound
        self._faults, self._warned = 0, False
        self._told: set[str] = set()  # names of rules whose refusal was warned about

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the call's output. Whatever fails in fxbt, output and errors are those of the original.

        Raises:
            FxbtWarning: the caller's filters turn warnings into errors, and this call runs the original.
            FallbackError: the option `strict` is set, and this call would run the original.
        """
        return traffic.counted(self._call, args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        error: Exception | None = None
        try:
            served = self._serve(args, kwargs)
        except _ModelError as raised:
            served, error = None, raised.error
        except _FOR_THE_CALLER:
            raise
        except Exception as fault:  # a failure of fxbt itself: the model runs well without it
            served = None
            self._note_fault(fault)
        if error is not None:
            raise error
        return self._run_original(args, kwargs) if served is None else served.output

    def stands_for(self, model: nn.Module) -> bool:
        """Whether `model` is the original or its optimised twin: they share one `__dict__`."""
        return vars(model) is vars(self.original)

    def _serve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Served | None:
        """The output by a graph, or by the original if that ran already; None if the original is still to run."""
        if (self._faults >= MOST_FAULTS and not self._options.strict) or is_looked_through() or is_recording():
            return None
        if "forward" in vars(self.original):
            self.fall_back(_OWN_FORWARD)
            return None
        try:
            call = self._binder.call(args, kwargs)
        except NotCapturable as obstacle:
            if not obstacle.silent:
                self.fall_back(str(obstacle))
            return None
        if call.objects and (torch.is_grad_enabled() or active_hooks()):
            self.fall_back(_WITH_GRADIENTS)
            return None
        graph = self._find(call)
        if graph is not None:
            return self._run_graph(graph, call, args, kwargs)
        return self._first_call(call, args, kwargs)

    def _note_fault(self, fault: Exception) -> None:
        self._faults += 1
        logger.debug("fxbt itself failed in a call", exc_info=fault)
        ends = "; no further calls use fxbt" if self._faults == MOST_FAULTS else ""
        try:
            self.fall_back(f"fxbt itself failed, not the model ({type(fault).__name__}: {fault}){ends}")
        except _FOR_THE_CALLER:
            raise
        except Exception as another:  # not even that can be noted
            logger.debug("fxbt could not note its own failure", exc_info=another)

    def warmup(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        forward: Callable[..., Any],
        tune_seconds: float | None = None,
    ) -> Warmup:
        """Captures the graph for such a call of the model's `forward` now, and measures its kernels.

        Raises:
            ExampleError: the model itself rejects the call.
            FallbackError: the option `strict` is set, and the call would run the original.
        """
        graphs, fallbacks = set(self.report.graphs), set(self.report.fallbacks)
        try:
            measurements = self._maker.measurements
            with watched(self.original) as watch, preserved(self.original), measurements.at_once(tune_seconds):
                measurements.finish()
                forward(*args, **kwargs)
        except _FOR_THE_CALLER:
            raise
        except Exception as error:
            name = type(self.original).__name__
            shapes = shown_shapes(args, kwargs)
            raise ExampleError(
                f"{name} itself fails on the example inputs {shapes}: {type(error).__name__}: {error}; "
                f"pass inputs that {name}.forward accepts"
            ) from error
        captured = [signature for signature in self.report.graphs if signature not in graphs]
        found = [reason for reason in self.report.fallbacks if reason not in fallbacks]
        return Warmup(tuple(captured), tuple(found), watch.seconds)

    def refresh(self) -> bool:
        """Recomputes what graphs derived from weights; returns whether any of it was out of date."""
        graphs = [graph.compiled.weights for graph in self._graphs if graph.compiled.weights]
        outdated = [weights.refresh() for weights in graphs]  # refresh all of them, so no generator
        return any(outdated)

    @property
    def graphs(self) -> Graphs[GuardedGraph]:
        """The graphs that are kept now."""
        return self._graphs

    def fall_back(self, reason: str) -> None:
        """Records why the original runs, and warns the first time for a model; raises the reason with `strict`."""
        self.report.add_fallback(reason)
        if self._options.strict:
            raise FallbackError(f"{type(self.original).__name__} would run its original forward: {reason}")
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{type(self.original).__name__} runs its original forward, not an optimised one: {reason} "
            "(warned once; print(model.report) lists all reasons)",
            FxbtWarning,
            stacklevel=callers_level(),
        )

    def _key(self, call: Call) -> Hashable:
        return (self.original.training, call.key)

    def _find(self, call: Call) -> GuardedGraph | None:
        return self._graphs.find(self._key(call), call.tensors)

    def _may_rebind(self, call: Call) -> bool:
        return bool(self._graphs.of(self._key(call))) and not (self._unlike and self._unlike.holds())

    def _rebound(self, call: Call) -> GuardedGraph | None:
        """The graph for a call after other tensors of the same kinds were put into the model."""
        if not self._may_rebind(call):
            return None
        rebound = [graph for graph in self._graphs if graph.rebind(self.original)]
        self._unlike = None if rebound else ModelState(self.original)
        return self._find(call)

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with LOCK.running(self.original):
            return self.original.forward(*args, **kwargs)

    def _original_output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's output, run inside code that also guards fxbt's own failures. Its errors become
        `_ModelError`s."""
        try:
            with part("run the original"):
                return self._run_original(args, kwargs)
        except Exception as error:
            raise _ModelError(error) from error

    def _run_graph(
        self, graph: GuardedGraph, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Served | None:
        if FORKS.is_unsaid:
            FORKS.say()
        if graph.compiled.is_behind:
            self._maker.take_other_kernels(graph, call)
        if graph.races is not None and self._original_is_faster(graph, graph.races.of(_elements(call.tensors)), call):
            return None
        if graph.effects and active_hooks():  # a hook may stop a recomputation halfway, with half of the writes done
            self.fall_back(
                f"forward changes {graph.effects.names[0]} in the model while hooks on saved tensors are active"
            )
            return None
        begun = self._between.begin() if graph.served else None  # a first call has waited long enough
        try:
            output = graph.output(call)
        except Exception as error:
            if comes_from_hook(error):
                raise _ModelError(error) from error
            problem = error
        else:
            graph.count(call)
            self._between.end(begun)
            return _Served(output)
        output = self._original_output(args, kwargs)  # if the call is wrong, the user sees the model's own error
        if goes_another_way(problem):
            self._refused(graph, call, problem)
            return _Served(output)
        if not isinstance(problem, _LACKS_MEMORY):  # a smaller call may have enough memory
            self._graphs.drop(graph)
            self._failures.remember(self._key(call), graph.around, str(problem))
        self.fall_back(f"the graph for {call} failed where the original does not ({type(problem).__name__}: {problem})")
        return _Served(output)

    def _original_is_faster(self, graph: GuardedGraph, contest: race.Race, call: Call) -> bool:
        """Whether the original serves calls of this size; times both from time to time."""
        if contest.is_due():
            with LOCK.running(self.original):
                self._look(graph, contest, call.copied(), race.LOOK_SECONDS)
        return contest.evidence is not None

    def _look(self, graph: GuardedGraph, contest: race.Race, call: Call, seconds: float) -> None:
        before = contest.evidence

        def run_original() -> Any:
            args, kwargs = call.rebuild(call.tensors)  # forward may write to the containers it is given
            return self.original.forward(*args, **kwargs)

        contest.look(lambda: graph.uncounted(*call.tensors), run_original, seconds)
        if contest.evidence is not None and before is None:
            shapes = shown_shapes(call.args, call.kwargs)
            self.fall_back(f"calls like {shapes} run faster without a graph: {contest.evidence}")

    def _refused(self, graph: GuardedGraph, call: Call, problem: Exception) -> None:
        """Drops a graph once it has refused more calls than it served."""
        graph.refused += 1
        if graph.refused > graph.served:
            self._graphs.drop(graph)  # the next such call captures a new graph
        self.fall_back(f"the graph for {call} was not used: {problem}")

    def _first_call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Served | None:
        # Inside the first call of a larger model, that model is captured as a whole.
        if LOCK.captures_here() or self._has_failed(call):
            return None
        if LOCK.runs_here():
            if not self._options.strict:  # the outer model reports it
                self.fall_back("called from within the original forward of another optimised model")
            return None
        if not self._may_rebind(call) and not self._may_capture():
            return None
        served = None
        with LOCK.capturing(self.original, is_alone=self._options.tracer == "hf-fx"):
            graph = self._find(call) or self._rebound(call)  # another thread may have captured it meanwhile
            if graph is None and not self._has_failed(call) and self._may_capture():
                with watched(self.original):
                    served = self._run_and_capture(call, args, kwargs)
        if served is not None:
            return served
        if graph is None and call.numbers:  # the numbers may have become constants
            call = self._binder.call(args, kwargs)
        graph = graph or self._find(call)
        return self._run_graph(graph, call, args, kwargs) if graph else None

    def _has_failed(self, call: Call) -> bool:
        has_failed = self._failures.have(self._key(call))
        if has_failed and self._options.strict:
            self.fall_back(self._failures.reasons[self._key(call)])
        return has_failed

    def _may_capture(self) -> bool:
        if self._graphs.may_capture():
            return True
        many = [
            f"; {place} is a number that changes, and each value needs a graph of its own: pass a tensor"
            for place in self._numbers.refused
        ]
        self.fall_back(
            f"{self._graphs.most} graphs were captured, which is the limit (max_captures): a new one replaces the "
            f"least recently used one only after graphs have served {CALLS_PER_CAPTURE} calls{''.join(many)}"
        )
        return False

    def _run_and_capture(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Served | None:
        """Runs the original, then captures the call. The caller sees the model's own errors only.

        Returns the original's output if there is no graph. Also returns it if the original draws random numbers or
        changes the model or the arguments, because its effects have happened already. Returns None under hooks on saved
        tensors: those must see a single way of computing.
        """
        if hook := foreign_hook(self.original):
            self.fall_back(hook)
            return _Served(self._original_output(args, kwargs))
        is_watched = bool(active_hooks())
        drawn = torch.random.fork_rng(devices=_cuda_devices(call)) if is_watched else contextlib.nullcontext()
        with hidden(), drawn, preserved(self.original) if is_watched else contextlib.nullcontext():
            state = ModelState(self.original)
            watched = [*state.tensors, *call.tensors]
            before = versions(watched)
            given, call = Arguments(call.args, call.kwargs), call.copied()
            with Recording(self.original, state) as recording:
                output = self._original_output(args, kwargs)
            if hook := foreign_hook(self.original):
                self.fall_back(hook)
                if is_watched:
                    state.restore()
                return None if is_watched else _Served(output)
            graph = None
            try:
                seen, around = given.seen_in(output), recording.surroundings()
                around = (call.objects and quantised(self._binder, args, kwargs)) or around
                rehearse = recording.wrote or not state.holds()
                call = with_growth(call, self._binder, args, kwargs)
                traced: tuple[Call, Values] | None = (call, outputs.flatten(seen))
                if is_too_short(call):
                    traced = None if rehearse else self._one_further(call, args, kwargs)
                if traced is not None:
                    self._graphs.note_capture()
                    call, expected = traced
                    graph = self._try_capture(call, expected, around, rehearse, (watched, before))
            except _FOR_THE_CALLER:
                raise
            except Exception as fault:  # a failure of fxbt itself; the original has already run
                self._note_fault(fault)
            if is_watched and graph is None:
                state.restore()  # the original runs again
        changes = graph is not None and (graph.compiled.stochastic or graph.effects or isinstance(seen, Changed))
        is_graphs = is_watched or (graph is not None and not changes)
        return None if is_graphs else _Served(output)

    def _one_further(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Values] | None:
        """A call with a cache that is long enough to be traced, and the original's values for it.

        An encoder-decoder's first step has a cache of one token; the cache of the next step exists already.
        """
        further = one_further(call, self._binder, args, kwargs)
        if further is None:
            return None
        try:
            with preserved(self.original):
                return further, original_values(self.original, further, further.tensors)
        except Exception as error:  # other arguments have the cache's old length: wait for the next call
            logger.debug("no graph for the first step with a cache", exc_info=error)
            return None

    def _try_capture(
        self,
        call: Call,
        expected: Values,
        around: Surroundings | str,
        rehearse: bool,
        versions_before: tuple[list[Tensor], list[int]],
    ) -> GuardedGraph | None:
        """The graph for a call; None if there can be none, with the reason in the report."""
        try:
            written = written_buffers(self.original, *versions_before, call)
            if isinstance(around, str):
                raise CaptureError(around)
            with preserved(self.original), collecting_rarely():
                return self._capture(call, expected, around, written, rehearse=rehearse)
        except CaptureError as error:
            # try again with the numbers as constants, except those that a cache counts up at each call
            if places := [p for p, number in call.numbers.items() if not (call.past and number.among is not None)]:
                call = self._with_constants(call, places, error)
                return self._try_capture(call, expected, around, rehearse, versions_before)
            reason = f"{call} cannot be captured: {error}"
            self._failures.remember(self._key(call), None if isinstance(around, str) else around, reason)
            self.fall_back(reason)
            return None

    def _with_constants(self, call: Call, places: Sequence[str], error: CaptureError) -> Call:
        """The same call with the numbers at these places as constants in the key; all later calls do the same."""
        for place in places:
            self._numbers.refuse(place, str(error))
        self._drop_all([graph for graph in self._graphs if not graph.numbers.isdisjoint(places)])
        same = self._binder.call(call.args, call.kwargs)
        return replace(same, growing=call.growing, new_tokens=call.new_tokens)

    def _capture(
        self,
        call: Call,
        expected: Values,
        around: Surroundings,
        written: list[tuple[str, Tensor]],
        rehearse: bool,
    ) -> GuardedGraph:
        FORKS.uses_threads = True
        if not torch.is_grad_enabled() and all(tensor.device.type == "cpu" for tensor in call.tensors):
            native.compile_ahead()
        graph = self._maker.graph(self._key(call), call, expected, around, written, rehearse)
        self._keep(graph, call)
        if graph.races is not None:
            self._look(graph, graph.races.of(_elements(call.tensors)), call, race.CAPTURE_SECONDS)
        self._tell_refusals(graph.compiled)
        return graph

    def _keep(self, graph: GuardedGraph, call: Call) -> None:
        signature = f"{call}{' training' if self.original.training else ''}"
        made = graph.captured, graph.compiled, graph.races
        self._reports[graph] = self.report.add_graph(signature, *made, graph.is_stored, graph.use)
        tensors = set(map(id, (ModelState(self.original) if graph.effects.slots else graph.state).tensors))
        # Drop graphs that read tensors the model no longer has, or that have a constant where calls now have an input.
        self._drop_all([g for g in self._graphs if not tensors.issuperset(map(id, g.state.tensors))])
        self._drop_all([g for g in self._graphs if g.constants & graph.numbers])
        self._drop_all(self._graphs.add(self._key(call), graph))

    def _drop_all(self, graphs: Sequence[GuardedGraph]) -> None:
        """Forgets graphs that no call will use again, also in the report."""
        for graph in graphs:
            self._graphs.drop(graph)
            if graph in self._reports:
                self.report.drop_graph(self._reports.pop(graph))

    def _tell_refusals(self, compiled: Compiled) -> None:
        """Warns once per user's rule if a rewrite was refused because it changed the values."""
        user_rules = self._maker.user_rules
        for miss in compiled.misses if user_rules else ():  # of a graph from disk, asking takes its time
            if not miss.refused or miss.rule not in user_rules or miss.rule in self._told:
                continue
            self._told.add(miss.rule)
            warnings.warn(
                f"a rewrite by the rule {miss.rule!r} was refused: {miss} (warned once per rule)",
                FxbtWarning,
                stacklevel=callers_level(),
            )


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _cuda_devices(call: Call) -> list[torch.device]:
    return list({tensor.device for tensor in call.tensors if tensor.device.type == "cuda"})
