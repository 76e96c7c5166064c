"""`Maker`: makes a graph from a call: captures or loads it, compiles it, and compares it with the original."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import pipeline
from .capture.caches import growing_axes
from .capture.call import Call
from .capture.captured import Captured
from .capture.effects import Effects
from .capture.isolated import isolated
from .capture.locks import LOCK
from .capture.model_state import ModelState, preserved
from .capture.number_inputs import Numbers
from .capture.outputs import Values
from .capture.surroundings import Surroundings
from .errors import CaptureError, RuleError
from .kernels import autotune
from .kernels.autotune import Measurements
from .match.rule import Rule
from .options import Options
from .progress import part
from .runtime import finished, race
from .runtime.cache_use import CacheUse
from .runtime.compare import Comparison, original_values
from .runtime.compiled import Compiled, History
from .runtime.graph_cache import Graphs
from .runtime.guarded_graph import GuardedGraph, check_pinned, pinned_numbers, varied_axes
from .stored.shelf import Label, Shelf, Stored, Text
from .torch_compat import frames_unread, is_any_autocast_enabled

logger = logging.getLogger("fxbt")

_NESTED = (
    "forward computes on nested tensors, which turn padding into 0, and the graph could not drop padding ({why}); "
    "pass enable_nested_tensor=False to nn.TransformerEncoder"
)


class Maker:
    """Makes the graphs of one model. `known` holds the existing graphs; `note` receives notes about stored ones
    and about kernels. `user_rules` are the names of the rules that are not built in.

    Example:
        >>> maker = Maker(model, options, rules, Numbers(), graphs, report.add_note)
        >>> graph = maker.graph(key, call, expected, around, written, rehearse=False)
    """

    def __init__(
        self,
        original: nn.Module,
        options: Options,
        rules: Sequence[Rule],
        numbers: Numbers,
        known: Graphs[GuardedGraph],
        note: Callable[[str], None],
    ) -> None:
        self._original = original
        self._options = options
        self._rules = rules
        self.user_rules = {rule.name for rule in rules} - {rule.name for rule in pipeline.default_rules()}
        self._numbers = numbers
        self._known = known
        self._note = note
        self.measurements = Measurements(options.tune_seconds)  # of the model's kernels
        self._shelf = Shelf(original, options.graphs, options.cache, note, self._finished)

    def graph(
        self,
        key: Hashable,
        call: Call,
        expected: Values,
        around: Surroundings,
        written: list[tuple[str, Tensor]],
        rehearse: bool,
    ) -> GuardedGraph:
        """A graph for calls of a key; loaded if another process stored one under the same conditions.

        Args:
            expected: what the original returned for the call.
            written: the buffers that the original wrote to.
            rehearse: whether the original's first run may have changed the model or its surroundings.

        Raises:
            CaptureError: there can be no such graph, or it does not compute what the original computes.
        """
        others = self._known.of(key)
        label = Label.of(self._original, (key, sorted(call.growing)), around)
        with frames_unread():
            stored = self._stored(label, call, expected, around, written, others)
        if stored is not None:
            return stored
        known = [graph.shapes for graph in others]
        varied = varied_axes([tensor.shape for tensor in call.tensors], known) | growing_axes(call)
        captured = _captured(self._original, call, self._options, rehearse=rehearse, varied=varied, around=around)
        new = Stored(captured, Text.of(captured, self._original, label))
        graph = self._made(new, call, expected, around, written, others)
        self._shelf.keep(graph.text)
        return graph

    def _stored(
        self,
        label: Label,
        call: Call,
        expected: Values,
        around: Surroundings,
        written: list[tuple[str, Tensor]],
        others: Sequence[GuardedGraph],
    ) -> GuardedGraph | None:
        """The graph of another process, where there is one that serves."""
        stored = self._shelf.take(label, call, expected)
        if stored is None:
            return None
        try:
            return self._made(stored, call, expected, around, written, others)
        except CaptureError as error:
            self._shelf.refuse(error)
            return None

    def _made(
        self,
        stored: Stored,
        call: Call,
        expected: Values,
        around: Surroundings,
        written: list[tuple[str, Tensor]],
        others: Sequence[GuardedGraph],
    ) -> GuardedGraph:
        captured = stored.captured
        effects, known_to_graph = captured.effects, {id(buffer.tensor) for buffer in captured.effects.buffers}
        if unseen := [name for name, tensor in written if id(tensor) not in known_to_graph]:
            raise CaptureError(f"forward writes in place to {', '.join(unseen)}, and the captured graph does not")
        pinned = pinned_numbers(captured, call)
        check_pinned(pinned, call, others)
        compiled = self._compiled(stored, call, expected, around)
        text = stored.text if captured.is_stored else replace(stored.text, finish=self._finish(compiled))
        return GuardedGraph(
            captured,
            compiled,
            ModelState(self._original, effects.slots),
            around,
            self._races(compiled, effects),
            [tensor.shape for tensor in call.tensors],
            numbers=frozenset(call.numbers),
            pinned=pinned,
            constants=frozenset(call.constants),
            text=text,
            use=CacheUse.of(call),
        )

    def _finished(self, text: Any) -> finished.Finished | None:
        """What a graph became in another process, where that is what it would become here."""
        return finished.read(text, self._options.padding, self._original) if self._rewrites_as_others_do() else None

    def _finish(self, compiled: Compiled) -> Callable[[], str]:
        """What makes the text of what a graph became; "" where that is nothing for others."""
        graphs, padding, model = compiled.finished, self._options.padding, self._original
        if graphs is None or not self._rewrites_as_others_do():
            return str
        return lambda: _text_of(graphs, padding, model)

    def _rewrites_as_others_do(self) -> bool:
        """Whether graphs become what they do in any process: by the built-in rules, without gradients or autocast."""
        return not (self.user_rules or self._options.verify or torch.is_grad_enabled() or is_any_autocast_enabled())

    def _compiled(self, stored: Stored, call: Call, expected: Values, around: Surroundings) -> Compiled:
        """A graph, compiled, whose numbers are the original's on the call."""
        captured = stored.captured
        try:
            compiled = self._programs(stored, call, expected)
            if around.nests and compiled.unpadding is None:
                why = next((str(miss) for miss in compiled.misses if miss.rule == "padding"), 'padding="keep"')
                raise CaptureError(_NESTED.format(why=why))
            problem = Comparison(self._original, captured, compiled).all(call, expected, self._numbers)
        except RuleError as error:
            raise CaptureError(str(error)) from error
        except CaptureError:
            raise
        except Exception as error:  # fxbt's own failure must not reach a model that runs well without it
            raise CaptureError(f"fxbt itself failed on the graph ({type(error).__name__}: {error})") from error
        if problem is not None:
            raise CaptureError(f"the graph's outputs differ from the original's: {problem}")
        return compiled

    def _programs(self, stored: Stored, call: Call, expected: Values) -> Compiled:
        if stored.finished is None:
            with isolated():
                return pipeline.compile(stored.captured, self._rules, self._options, self.measurements)
        returned = [None if isinstance(value, Tensor) else value for value in expected[0]], expected[1]

        def tell() -> History:
            may_wait = not (LOCK.captures_here() or LOCK.runs_here())
            alone = LOCK.capturing(self._original) if may_wait else contextlib.nullcontext()
            with alone, isolated(), torch.inference_mode(False), torch.no_grad():
                captured = stored.whole(self._original, call, returned)
                return pipeline.compile(captured, self._rules, self._options, self.measurements).history

        return pipeline.resume(stored.captured, stored.finished, self._options, self.measurements, tell)

    def take_other_kernels(self, graph: GuardedGraph, call: Call) -> None:
        """Lets a graph serve by other kernels, if they were measured to be faster, and nobody waits for a capture."""
        if not LOCK.is_free or not graph.compiled.has_news():
            return
        with LOCK.capturing(self._original), preserved(self._original), part("take measured kernels"):
            if graph.compiled.again is not None:  # no other thread has put other tensors into it
                self._take(graph, graph.compiled.again, call.copied())

    def _take(self, graph: GuardedGraph, again: Callable[[], Compiled], call: Call) -> None:
        """Compiles a graph by what is known of kernels now; it serves if its numbers are the original's on a call."""
        try:
            compiled = again()
            expected = original_values(self._original, call, call.tensors)
            problem = Comparison(self._original, graph.captured, compiled).outputs(call, expected)
        except Exception as error:  # those that serve go on
            problem = f"{type(error).__name__}: {error}"
        if problem is None:
            graph.take(compiled)
        else:
            self._note(f"the kernels that were measured to be faster are not used: {problem}")
            graph.compiled.again = None

    def _races(self, compiled: Compiled, effects: Effects) -> race.Races | None:
        """Where graph and original may be timed against each other; None where the original must not be timed.

        That needs a call without gradients, random numbers or effects, and no `strict`.
        """
        may_not = torch.is_grad_enabled() or compiled.stochastic or self._options.strict
        return race.Races() if autotune.is_enabled() and not (may_not or effects) else None


def _captured(model: nn.Module, call: Call, options: Options, **how: Any) -> Captured:
    from .capture.capture import capture  # with it comes torch.export, which no graph of another process needs

    with isolated():
        return capture(model, call, options.tracer, verify=options.verify, **how)


def _text_of(graphs: finished.Finished, padding: str, model: nn.Module) -> str:
    try:
        return json.dumps(finished.written(graphs, padding, model), separators=(",", ":"))
    except Exception as error:  # of fxbt's own: other processes prove it anew
        logger.debug("what a graph became has no text", exc_info=error)
        return ""
