"""`Maker`: makes a graph from a call: captures or loads it, compiles it, and compares it with the original."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import pipeline
from .capture.caches import growing_axes
from .capture.call import Call
from .capture.capture import capture
from .capture.effects import Effects
from .capture.export import Captured
from .capture.locks import LOCK
from .capture.model_state import ModelState, preserved
from .capture.number_inputs import Numbers
from .capture.surroundings import Surroundings
from .errors import CaptureError, RuleError
from .kernels import autotune
from .kernels.autotune import Measurements
from .match.rule import Rule
from .options import Options
from .progress import part
from .runtime import race
from .runtime.cache_use import CacheUse
from .runtime.compare import Comparison, original_values
from .runtime.compiled import Compiled
from .runtime.graph_cache import Graphs
from .runtime.guarded_graph import GuardedGraph, check_pinned, pinned_numbers, varied_axes
from .stored.shelf import Label, Shelf, Text
from .torch_compat import pytree

Values = tuple[list[Any], pytree.TreeSpec]
_NESTED = (
    "forward computes on nested tensors, which turn padding into 0, and the graph could not drop padding ({why}); "
    "pass enable_nested_tensor=False to nn.TransformerEncoder"
)


class Maker:
    """Makes the graphs of one model. `known` holds the existing graphs; `note` receives notes about stored ones
    and about kernels.

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
        self._numbers = numbers
        self._known = known
        self._note = note
        self.measurements = Measurements(options.tune_seconds)  # of the model's kernels
        self._shelf = Shelf(original, options.graphs, options.cache, note)

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
        stored = self._shelf.take(label, call, expected)
        if stored is not None:
            try:
                return self._made(
                    stored, call, expected, around, written, others, Text.of(stored, self._original, label)
                )
            except CaptureError as error:
                self._shelf.refuse(error)
        known = [graph.shapes for graph in others]
        varied = varied_axes([tensor.shape for tensor in call.tensors], known) | growing_axes(call)
        how: dict[str, Any] = {"rehearse": rehearse, "varied": varied, "around": around, "verify": self._options.verify}
        captured = capture(self._original, call, self._options.tracer, **how)
        text = Text.of(captured, self._original, label)
        graph = self._made(captured, call, expected, around, written, others, text)
        self._shelf.keep(text)
        return graph

    def _made(
        self,
        captured: Captured,
        call: Call,
        expected: Values,
        around: Surroundings,
        written: list[tuple[str, Tensor]],
        others: Sequence[GuardedGraph],
        text: Text,
    ) -> GuardedGraph:
        effects, known_to_graph = captured.effects, {id(buffer.tensor) for buffer in captured.effects.buffers}
        if unseen := [name for name, tensor in written if id(tensor) not in known_to_graph]:
            raise CaptureError(f"forward writes in place to {', '.join(unseen)}, and the captured graph does not")
        pinned = pinned_numbers(captured, call)
        check_pinned(pinned, call, others)
        compiled = self._compiled(captured, call, expected, around)
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

    def _compiled(self, captured: Captured, call: Call, expected: Values, around: Surroundings) -> Compiled:
        """Compiles a captured graph and checks its values against the original's on the call."""
        try:
            compiled = pipeline.compile(captured, self._rules, self._options, self.measurements)
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
        if compiled.weights is not None and not self._options.keep_original:
            compiled.spilled = compiled.weights.spill()
        return compiled

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

        That needs a call without gradients, random numbers or effects, weights in memory, and no `strict`.
        """
        options = self._options
        may_not = torch.is_grad_enabled() or compiled.stochastic or not options.keep_original or options.strict
        return race.Races() if autotune.is_enabled() and not (may_not or effects) else None
