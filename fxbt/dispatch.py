"""`Dispatcher`: picks a proven graph for each call of a model, captures new ones, else runs the original forward."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import native, outputs, pipeline, race, tune
from .branches import GOES_ANOTHER_WAY
from .capture import capture
from .errors import CaptureError, ExampleError, FxbtWarning, NotCapturable, RuleError
from .forks import FORKS
from .isolated import isolated
from .locks import LOCK
from .precision import Precision
from .report import Report
from .rule import Rule
from .signature import Binder, Call
from .state import ModelState, foreign_hook, preserved, versions
from .verify import difference

OBJECTS_PER_COLLECTION = 100_000  # while a call is captured; Python's own number is 700
_STATES_PER_FAILURE = 2  # a failed call is tried once more after an edit of the model, no more than that


@dataclass
class _Graph:
    """A compiled graph and all that must hold for it to stand for a call of its key."""

    run: Callable[..., tuple[Any, ...]]
    guards: Callable[..., None]
    state: ModelState
    rebuild: outputs.Rebuild
    image_sizes: list[tuple[int, ...]]
    races: race.Races | None  # against the original, by the size of calls; None where it serves all that it may
    uncounted: Callable[..., tuple[Any, ...]]  # `run`, for a call of fxbt's own
    served: int = 0
    refused: int = 0  # calls that go another way, which only running the graph shows

    def applies(self, tensors: Sequence[Tensor]) -> bool:
        try:
            self.guards(*tensors)
        except Exception:  # an assertion, or a size it cannot compute with: not proven either way
            return False
        return self.state.holds()


class Dispatcher:
    """Stands between an optimised model and its original; called as `dispatcher(args, kwargs)`.

    A graph runs only if the call's key, its shape guards and the model's state are those it was captured with.
    Everything else runs the original forward; `report` says why.
    """

    max_captures = 8

    def __init__(
        self,
        original: nn.Module,
        rules: Sequence[Rule] = (),
        verify: bool = False,
        tracer: str = "auto",
        padding: str = "drop",
        precision: type[Precision] | None = None,
        keep_original: bool = True,
        cuda_graphs: bool = False,
    ):
        self.original = original
        self._precision = precision
        self._keep_original = keep_original
        self._cuda_graphs = cuda_graphs
        self.report = Report()
        self._rules = tuple(rules)
        self._verify = verify
        self._tracer = tracer
        self._padding = padding
        self._binder = Binder(original.forward)
        self._graphs: dict[Hashable, list[_Graph]] = {}
        self._failed: dict[Hashable, list[ModelState]] = {}
        self._captures = 0
        self._warned = False

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_traced():
            return self._run_original(args, kwargs)
        try:
            call = self._binder.call(args, kwargs)
        except NotCapturable as obstacle:
            if not obstacle.silent:
                self.fall_back(str(obstacle))
            return self._run_original(args, kwargs)
        graph = self._find(call)
        if graph is not None:
            return self._run_graph(graph, call, args, kwargs)
        return self._first_call(call, args, kwargs)

    def warmup(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Captures the graph for such a call ahead. Raises `ExampleError` if the model itself rejects the call."""
        try:
            call = self._binder.call(args, kwargs)
        except NotCapturable as obstacle:
            self.fall_back(str(obstacle))
            return
        try:
            with preserved(self.original):
                self(args, kwargs)
        except Exception as error:
            name = type(self.original).__name__
            raise ExampleError(
                f"{name} itself fails on the example inputs {_shapes(call)}: {type(error).__name__}: {error}; "
                f"pass inputs that {name}.forward accepts"
            ) from error

    def fall_back(self, reason: str) -> None:
        """Notes why the original runs; the first time for a model, says so."""
        self.report.add_fallback(reason)
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{type(self.original).__name__} runs its original forward, not an optimised one: {reason} "
            "(said once; print(model.report) lists all reasons)",
            FxbtWarning,
            stacklevel=2,
        )

    def _key(self, call: Call) -> Hashable:
        return (self.original.training, call.key)

    def _find(self, call: Call) -> _Graph | None:
        for graph in self._graphs.get(self._key(call), ()):
            if graph.applies(call.tensors):
                return graph
        return None

    def _run_original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with LOCK.running(self.original):
            return self.original.forward(*args, **kwargs)

    def _run_graph(self, graph: _Graph, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if FORKS.is_unsaid:
            FORKS.say()
        if graph.races is not None and self._original_is_faster(graph, graph.races.of(_elements(call.tensors)), call):
            return self._run_original(args, kwargs)
        try:
            output = graph.rebuild(graph.run(*call.tensors))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            graph.served += 1
            return output
        output = self._run_original(args, kwargs)  # if the call is wrong, the model's own error is the one to see
        if GOES_ANOTHER_WAY in problem:
            self._refused(graph, call, problem)
            return output
        self._drop(graph, call)
        self._remember_failure(call)
        self.fall_back(f"the graph for {call} failed where the original does not ({problem})")
        return output

    def _original_is_faster(self, graph: _Graph, contest: race.Race, call: Call) -> bool:
        """Whether the original serves calls of this size; looks at it now and then."""
        if contest.is_due():
            with LOCK.running(self.original):
                self._look(graph, contest, call, race.LOOK_SECONDS)
        return contest.evidence is not None

    def _look(self, graph: _Graph, contest: race.Race, call: Call, seconds: float) -> None:
        before = contest.evidence
        contest.look(
            lambda: graph.uncounted(*call.tensors), lambda: self.original.forward(*call.args, **call.kwargs), seconds
        )
        if contest.evidence is not None and before is None:
            self.fall_back(f"calls like {_shapes(call)} run faster without a graph: {contest.evidence}")

    def _refused(self, graph: _Graph, call: Call, problem: str) -> None:
        """Keeps a graph that does not go a call's way for those that do, as long as they are the most."""
        graph.refused += 1
        if graph.refused > graph.served:
            self._drop(graph, call)  # the next such call is captured
        self.fall_back(f"the graph for {call} was not used: {problem.removeprefix('RuntimeError: ')}")

    def _drop(self, graph: _Graph, call: Call) -> None:
        self._graphs[self._key(call)] = [g for g in self._graphs[self._key(call)] if g is not graph]

    def _first_call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Inside the first call of a model that this one is a part of: that one is captured whole.
        if LOCK.captures_here() or self._has_failed(call):
            return self._run_original(args, kwargs)
        if self._captures >= self.max_captures:
            self.fall_back(f"{self.max_captures} graphs were captured, which is the limit (max_captures)")
            return self._run_original(args, kwargs)
        if LOCK.runs_here():
            self.fall_back("called from within the original forward of another optimised model")
            return self._run_original(args, kwargs)
        with LOCK.capturing(self.original, is_alone=self._tracer == "hf-fx"):
            graph = self._find(call)  # another thread may have captured it meanwhile
            if graph is None and not self._has_failed(call):
                return self._run_and_capture(call, args, kwargs)
        return self(args, kwargs)

    def _run_and_capture(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the original for the caller, then captures the call. The caller sees the model's own errors only."""
        state = ModelState(self.original)
        watched = [*state.tensors, *call.tensors]
        before = versions(watched)
        output = self.original.forward(*args, **kwargs)
        if hook := foreign_hook(self.original):
            self.fall_back(hook)
            return output
        self._captures += 1
        try:
            self._refuse_writes(watched, before, call)
            with preserved(self.original), _collecting_rarely(), isolated():
                self._capture(call, output, rehearse=not state.holds())
        except CaptureError as error:
            self._remember_failure(call)
            self.fall_back(f"{call} cannot be captured: {error}")
        return output

    def _refuse_writes(self, watched: list[Tensor], before: list[int], call: Call) -> None:
        written = [tensor for tensor, old, new in zip(watched, before, versions(watched), strict=True) if old != new]
        if not written:
            return
        names = {id(t): name for name, t in (*self.original.named_buffers(), *self.original.named_parameters())}
        names.update({id(t): f"its argument {name}" for t, name in zip(call.tensors, call.names, strict=True)})
        raise CaptureError(f"forward writes in place to {', '.join(names.get(id(t), 'a tensor') for t in written)}")

    def _capture(self, call: Call, output: Any, rehearse: bool) -> None:
        FORKS.uses_threads = True
        if not torch.is_grad_enabled() and all(tensor.device.type == "cpu" for tensor in call.tensors):
            native.compile_ahead()
        another_size = any(g.image_sizes != _image_sizes(call.tensors) for g in self._graphs.get(self._key(call), ()))
        captured = capture(self.original, call, self._tracer, rehearse=rehearse, any_image_size=another_size)
        try:
            compiled = pipeline.compile(
                captured,
                self._rules,
                verify=self._verify,
                padding=self._padding,
                precision=self._precision,
                cuda_graphs=self._cuda_graphs,
            )
            problem = None if compiled.stochastic else self._compare(compiled, captured.out_spec, call, output)
        except RuleError as error:
            raise CaptureError(str(error)) from error
        except Exception as error:  # a fault of fxbt's own must not reach a model that runs well without it
            raise CaptureError(f"fxbt itself failed on the graph ({type(error).__name__}: {error})") from error
        if problem is not None:
            raise CaptureError(f"the graph's outputs are not the original's: {problem}")
        if compiled.weights is not None and not self._keep_original:
            compiled.spilled = compiled.weights.spill()
        graph = _Graph(
            compiled.run,
            captured.guards,
            ModelState(self.original),
            outputs.Rebuild(captured.out_spec),
            _image_sizes(call.tensors),
            self._races(compiled),
            compiled.unpadding.uncounted if compiled.unpadding else compiled.run,
        )
        key = self._key(call)
        signature = f"{call}{' training' if self.original.training else ''}"
        self.report.add_graph(signature, captured, compiled, graph.races)
        if graph.races is not None:
            self._look(graph, graph.races.of(_elements(call.tensors)), call, race.CAPTURE_SECONDS)
        self._graphs[key] = [*self._graphs.get(key, ()), graph]  # a new list: readers take no lock

    def _compare(self, compiled: pipeline.Compiled, spec: pytree.TreeSpec, call: Call, output: Any) -> str | None:
        """What differs between the graph's outputs and the original's on the same call; None if nothing does."""
        expected, original_spec = outputs.flatten(output)
        if spec != original_spec:
            return f"their structure is {spec}, not {original_spec}"
        is_precise = compiled.precision is None
        dense = compiled.run if compiled.unpadding is None else compiled.dense
        found = dense(*call.tensors)
        if problem := _values_difference(found, expected, is_precise):
            return problem
        if not is_precise:
            pairs = zip(found, expected, strict=True)
            compiled.error = max((difference(new, old) for new, old in pairs if isinstance(old, Tensor)), default=0.0)
        if compiled.unpadding is None:
            return None
        expected = compiled.unpadding.as_returned(expected, call.tensors)
        return _values_difference(compiled.unpadding.uncounted(*call.tensors), expected, is_precise)

    def _races(self, compiled: pipeline.Compiled) -> race.Races | None:
        """Where graph and original may be timed: without gradients, random numbers and weights that lie in a file."""
        may_not = torch.is_grad_enabled() or compiled.stochastic or not self._keep_original
        return race.Races() if tune.is_enabled() and not may_not else None

    def _remember_failure(self, call: Call) -> None:
        self._failed.setdefault(self._key(call), []).append(ModelState(self.original))

    def _has_failed(self, call: Call) -> bool:
        states = self._failed.get(self._key(call), ())
        return len(states) >= _STATES_PER_FAILURE or any(state.holds() for state in states)


@contextlib.contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Tracing makes many objects and little garbage: looking for it would take 0.5 of MiniLM's 4.5 seconds."""
    first, *others = gc.get_threshold()
    gc.set_threshold(first and max(first, OBJECTS_PER_COLLECTION), *others)  # 0 is never
    try:
        yield
    finally:
        gc.set_threshold(first, *others)


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _image_sizes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[2:]) for tensor in tensors if tensor.ndim > 3]


def _is_traced() -> bool:
    """Whether someone looks through this call at its operations, so that it must be the original's own."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _values_difference(found: Sequence[Any], expected: Sequence[Any], is_precise: bool) -> str | None:
    for i, (new, old) in enumerate(zip(found, expected, strict=True)):
        if problem := _value_difference(new, old, is_precise):
            return f"output {i} {problem}"
    return None


def _value_difference(new: Any, old: Any, is_precise: bool) -> str | None:
    if not isinstance(old, Tensor):
        return None if type(new) is type(old) and new == old else f"is {new!r}, not {old!r}"
    if not isinstance(new, Tensor):
        return f"is a {type(new).__name__}, not a tensor"
    kinds = [(t.dtype, tuple(t.shape), t.device, t.requires_grad) for t in (new, old)]
    if kinds[0] != kinds[1]:
        return f"is {kinds[0]}, not {kinds[1]} (dtype, shape, device, requires_grad)"
    if not old.is_floating_point():
        return None if torch.equal(new, old) else "differs in its (not floating-point) values"
    # A row of scores masked with -inf throughout is NaN in eager attention only: NaN may become a number.
    new, old = (t.detach()[~old.isnan()].double() for t in (new, old))
    magnitude = old[old.isfinite()].abs().max().item() if old.isfinite().any() else 0.0
    is_precise = is_precise and kinds[0][0] in (torch.float32, torch.float64)
    tolerance = (1e-3 if is_precise and not torch._C._is_any_autocast_enabled() else 0.1) * max(magnitude, 1e-6)
    if torch.allclose(new, old, rtol=0.0, atol=tolerance):
        return None
    return f"is off by up to {(new - old).abs().max().item():.1e} at a magnitude of {magnitude:.1e}"


def _shapes(call: Call) -> str:
    shown = [f"{name} {t.dtype}{list(t.shape)}" for name, t in zip(call.names, call.tensors, strict=True)]
    return f"({', '.join(shown)})"
