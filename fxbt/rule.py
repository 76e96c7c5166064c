"""What a rewrite rule is: it finds a meaning in the graph and says what to compute instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module whose code made `node` ("" at the top)."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry[0] for entry in stack.values()]
    path = entries[-1] if entries else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']")


def describe(node: fx.Node) -> str:
    """`%softmax f32[s0, 4, s1, s1] at encoder.layer.0` : how messages name a node."""
    value = node.meta.get("val")
    shape = ""
    if isinstance(value, torch.Tensor):
        dims = ", ".join(str(size) for size in value.shape)
        shape = f" {str(value.dtype).removeprefix('torch.')}[{dims}]"
    path = module_path(node)
    return f"%{node.name}{shape}" + (f" at {path}" if path else "")


class Miss(Exception):
    """Why a rule did not fire at a place: the one way for a rule to say no.

    Rules raise it from `find`; the report shows it. `reason` is a sentence, `expected` and `found` say what was
    asked of the graph and what stands there. The text is built only when it is asked for.

    Example::

        raise fxbt.Miss("the weights are scaled along the key axis", node=mul, expected="a factor per query")
    """

    def __init__(self, reason: str, *, node: fx.Node | None = None, expected: str = "", found: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.expected = expected
        self._found = found
        self.rule = ""
        self.where = ""
        self.refused = False  # found, but its rewrite did not hold

    @property
    def found(self) -> str:
        if self._found or self.node is None:
            return self._found
        return describe(self.node)

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        lines = [f"{self.rule or 'rule'}{place}: {self.reason}"]
        if self.expected:
            lines.append(f"  expected  {self.expected}")
        if self.found:
            lines.append(f"  found     {self.found}")
        return "\n".join(lines)


@dataclass
class Match:
    """A place where a rule's meaning was found.

    `inputs` are the graph's values that `Rule.replace` receives as tensors; `outputs` the nodes its results stand
    for; `facts` is the rule's own description, handed to `replace` unchanged. `replaces=False` means: found, and
    already in its best form (counted, not rewritten). `assumes` names constants whose *content* the proof read:
    should one change, the graph is not used any more.

    Example::

        return fxbt.Match(anchor, inputs=(x, gate), outputs=(anchor,), facts={"negated": True})
    """

    anchor: fx.Node
    inputs: tuple[fx.Node, ...] = ()
    outputs: tuple[fx.Node, ...] = ()
    facts: Any = None
    replaces: bool = True
    assumes: tuple[fx.Node, ...] = ()


class Rule:
    """A pattern found by meaning and its replacement.

    Subclasses set `name` (what `report.hits` counts under) and `targets` (the ATen ops a match is anchored at), and
    write `find` and `replace`. Rules hold no state: what `find` learned goes to `replace` in `Match.facts`.

    Example::

        class SiluByHand(fxbt.Rule):
            \"\"\"x * sigmoid(x)  ->  silu(x)\"\"\"
            name = "activation"
            targets = {torch.ops.aten.mul.Tensor}

            def find(self, anchor):
                x, gate = anchor.args
                if gate.target is not torch.ops.aten.sigmoid.default or gate.args[0] is not x:
                    raise fxbt.Miss("not x * sigmoid(x)", node=gate)
                return fxbt.Match(anchor, inputs=(x,), outputs=(anchor,))

            def replace(self, facts, x):
                return torch.nn.functional.silu(x)

        fast = fxbt.optimize(model, rules=[SiluByHand()])
    """

    name: str = ""
    targets: frozenset[Any] | set[Any] = frozenset()

    def anchors(self, graph: fx.Graph) -> Iterator[fx.Node]:
        """The nodes at which `find` is tried, in graph order."""
        return (node for node in graph.nodes if node.op == "call_function" and node.target in self.targets)

    def find(self, anchor: fx.Node) -> Match:
        """The match anchored at `anchor`.

        Raises:
            Miss: this is not the rule's meaning, or it cannot be proven; the reason goes into the report.
        """
        raise NotImplementedError(f"{type(self).__name__} must define find(self, anchor)")

    def replace(self, facts: Any, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What to compute instead, in plain torch: one result for each of `Match.outputs`, of its shape and dtype.

        It is traced on fake tensors, so shapes may be symbolic; it must not branch on values.
        """
        raise NotImplementedError(f"{type(self).__name__} must define replace(self, facts, *inputs)")


@dataclass
class StageRecord:
    """What one rule did to one graph: for the report."""

    name: str
    hits: int = 0
    misses: list[Miss] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0


def check_rules(rules: Iterable[Any]) -> tuple[Rule, ...]:
    """The rules as a tuple.

    Raises:
        TypeError: something in `rules` is no `Rule` instance, or a rule without a name or targets.
    """
    if isinstance(rules, Rule) or not isinstance(rules, Iterable):
        raise TypeError(f"fxbt.optimize: rules must be a sequence of rules, got {rules!r}; write rules=[MyRule()]")
    checked = tuple(rules)
    for rule in checked:
        if isinstance(rule, type) and issubclass(rule, Rule):
            raise TypeError(
                f"fxbt.optimize: rules holds the class {rule.__name__}; pass an instance: {rule.__name__}()"
            )
        if not isinstance(rule, Rule):
            raise TypeError(f"fxbt.optimize: rules holds {rule!r}, which is no fxbt.Rule; subclass fxbt.Rule")
        if not rule.name:
            raise TypeError(f"fxbt.optimize: {type(rule).__name__} has no name; set name = '...' on the class")
    return checked
