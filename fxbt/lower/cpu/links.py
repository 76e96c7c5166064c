"""A node that calls a kernel of our own -> `Link`: its operands and results, and which of them follow each other.

It reads what lowering has put into the graph, whatever block that comes from.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...kernels import native
from ...torch_compat import statically_known_true
from .attention import AttendProjection
from .heads import Heads
from .linears import UP_TO, LinearByRows

EVERY_PLACE = frozenset(range(len(UP_TO) + 1))


@dataclass(frozen=True, eq=False)
class Link:
    """One kernel of a chain: the nodes of its operands and of its results.

    `x` of an attention is its projection; `results` are the kernel's and, if it gives two, those that pick from it.
    """

    kernel: native.Linear | Heads
    x: fx.Node
    y: fx.Node
    results: tuple[fx.Node, ...]
    packed: fx.Node | None = None
    bias: fx.Node | None = None
    residual: fx.Node | None = None
    gamma: fx.Node | None = None
    beta: fx.Node | None = None
    normed: fx.Node | None = None
    mask: fx.Node | None = None
    tokens: fx.Node | None = None
    scale: float | None = None
    is_causal: bool = False
    places: frozenset[int] = EVERY_PLACE  # of the numbers of rows for which the kernel is the fastest

    @classmethod
    def of(cls, node: fx.Node) -> Link | None:
        """A node as a link; None if it is none of our own kernels."""
        if isinstance(node.target, LinearByRows):
            return cls._of_linear_by_rows(node, node.target)
        if isinstance(node.target, native.Linear):
            return cls._of_linear(node, node.target, *node.args)
        if isinstance(node.target, AttendProjection):
            return cls._of_attention(node, node.target, *node.args)
        return None

    @classmethod
    def _of_linear_by_rows(cls, node: fx.Node, target: LinearByRows) -> Link | None:
        places = {place: run for place, run in enumerate(target.runs) if isinstance(run, native.Linear)}
        if not places:
            return None
        place, run = places.popitem()
        forms: Any = node.args[1]
        packed = forms[target.forms[place]]
        return cls._of_linear(node, run, node.args[0], packed, *node.args[2:], places=frozenset({place, *places}))

    @classmethod
    def _of_linear(cls, node: fx.Node, kernel: native.Linear, *operands: Any, places: Any = EVERY_PLACE) -> Link | None:
        x, packed, bias, residual, gamma, beta = (*operands, None, None)[:6]
        options = {"packed": packed, "bias": bias, "residual": residual, "places": places}
        if kernel.epsilon is None:
            return cls(kernel, x, node, (node,), **options)
        options |= {"gamma": gamma, "beta": beta}
        if not kernel.keeps_sum:
            return cls(kernel, x, node, (node,), normed=node, **options)
        picked = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        if len(picked) != len(node.users) or picked.keys() != {0, 1}:
            return None
        return cls(kernel, x, picked[0], (node, *picked.values()), normed=picked[1], **options)

    @classmethod
    def _of_attention(
        cls, node: fx.Node, kernel: AttendProjection, x: Any, seen: Any, is_causal: Any, scale: Any
    ) -> Link | None:
        if isinstance(scale, fx.Node) or isinstance(is_causal, fx.Node):
            return None
        mask, tokens = (None, seen) if kernel.is_packed else (seen, None)
        return cls(kernel.heads, x, node, (node,), mask=mask, tokens=tokens, scale=scale, is_causal=is_causal)

    @property
    def k(self) -> int:
        """How many floats a row of x has."""
        return int(self.x.meta["val"].shape[-1]) if isinstance(self.kernel, Heads) else self.kernel.k

    @property
    def n(self) -> int:
        """And one of the result."""
        return self.kernel.counts[0] * self.kernel.head_dim if isinstance(self.kernel, Heads) else self.kernel.n

    def follows(self, links: Sequence[Link]) -> bool:
        """Whether it has the rows of these, and sequences in the same places."""
        rows, others = (link.y.meta["val"].shape[:-1] for link in (self, links[0]))
        if len(rows) != len(others) or not all(map(statically_known_true, map(operator.eq, rows, others))):
            return False
        return len({link.tokens for link in (*links, self) if isinstance(link.kernel, Heads)}) < 2


def runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """The kernels that follow each other with nothing in between, two at least."""
    found: list[list[fx.Node]] = []
    links: list[Link] = []
    for node in graph.nodes:
        if links and node in links[-1].results:
            continue
        link = Link.of(node)
        if link and links and link.follows(links):
            links.append(link)
            found[-1].append(node)
            continue
        links = [link] if link else []
        found.append([node] if link else [])
    return [nodes for nodes in found if len(nodes) > 1]
