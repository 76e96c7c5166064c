"""`Maker`: a call becomes a graph for calls like it: captured or read, compiled, and compared with the original."""

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
from .capture.model_state import ModelState
from .capture.number_inputs import Numbers
from .capture.surroundings import Surroundings
from .errors import CaptureError, RuleError
from .kernels import autotune
from .match.rule import Rule
from .options import Options
from .runtime import race
from .runtime.cache_use import CacheUse
from .runtime.compare import Comparison
from .runtime.compiled import Compiled
from .runtime.graph_cache import Graphs
from .runtime.guarded_graph import GuardedGraph, check_pinned, pinned_numbers, varied_axes
from .stored.shelf import Label, Shelf, Text
from .torch_compat import pytree

Values = tuple[list[Any], pytree.TreeSpec]
_NESTED = (
    "forward computes on nested tensors, after which padding is 0, and a graph could not drop padding ({why}); "
    "nn.TransformerEncoder(..., enable_nested_tensor=False) does not"
)


class Maker:
    """Makes the graphs of one model; `known` are those that there are, `note` takes what becomes of stored ones.

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
        """A graph for calls of a key; one of another process, if there is one that rests on the same.

        Args:
            expected: what the original returned for the call.
            written: the buffers that it wrote to.
            rehearse: whether its first run may have changed the model, or what is around it.

        Raises:
            CaptureError: there can be no such graph, or it does not compute what the original does.
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
            raise CaptureError(f"forward writes in place to {', '.join(unseen)}; a graph would not")
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
        """A captured graph, compiled, whose numbers are the original's on the call."""
        try:
            compiled = pipeline.compile(captured, self._rules, self._options)
            if around.nests and compiled.unpadding is None:
                why = next((str(miss) for miss in compiled.misses if miss.rule == "padding"), 'padding="keep"')
                raise CaptureError(_NESTED.format(why=why))
            problem = Comparison(self._original, captured, compiled).all(call, expected, self._numbers)
        except RuleError as error:
            raise CaptureError(str(error)) from error
        except CaptureError:
            raise
        except Exception as error:  # a fault of fxbt's own must not reach a model that runs well without it
            raise CaptureError(f"fxbt itself failed on the graph ({type(error).__name__}: {error})") from error
        if problem is not None:
            raise CaptureError(f"the graph's outputs are not the original's: {problem}")
        if compiled.weights is not None and not self._options.keep_original:
            compiled.spilled = compiled.weights.spill()
        return compiled

    def _races(self, compiled: Compiled, effects: Effects) -> race.Races | None:
        """Where graph and original may be timed: without gradients, random numbers and weights that lie in a file.

        And without effects, which a call has once, and where the original may serve.
        """
        options = self._options
        may_not = torch.is_grad_enabled() or compiled.stochastic or not options.keep_original or options.strict
        return race.Races() if autotune.is_enabled() and not (may_not or effects) else None
