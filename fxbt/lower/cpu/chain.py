"""Joins consecutive kernels of our own into one call, whose inner values share a planned block of memory.

A call from Python takes about 8 us, and memory that was just freed elsewhere is in no cache: with this, MiniLM's 30
kernels take 0.85 of the time at 16 tokens (benchmarks/chain.py). Nothing is searched for here: a `Link` is what
lowering has put into the graph, with its operands.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.node import copy_of
from ...kernels import native
from ...kernels.autotune import Tuner
from ...kernels.packed import Tokens
from ...kernels.turns import bucket_of
from ...torch_compat import statically_known_true
from ..codegen import compile_graph
from .attention import AttendProjection, Mask
from .heads import Heads
from .linears import UP_TO, LinearByRows

LARGEST_BLOCK = 16 * 2**20  # bytes; with more rows, calls cost nothing, and glibc takes larger blocks from the system
NONE = -1  # the absent operand; the first address given is 0
EVERY_PLACE = frozenset(range(len(UP_TO) + 1))


def chained(graph: fx.Graph, tuner: Tuner) -> fx.Graph:
    """The graph with consecutive kernels of our own on the same rows as one node; a copy if there are any."""
    library, found = native.library(), runs(graph)
    if library is None or not found:
        return graph
    copy, copies = copy_of(graph)
    for nodes in found:
        _join(copy, library, [link for node in nodes if (link := Link.of(copies[node]))])
    counts = Counter(map(len, found))
    told = (f"one call for {kernels} in a row" + (f", x {n}" if n > 1 else "") for kernels, n in counts.items())
    tuner.notes.setdefault("native", "; ".join(told))
    return copy


def _join(graph: fx.Graph, library: native.Library, links: list[Link]) -> None:
    nodes = [node for link in links for node in sorted(link.results)]
    inside = set(nodes)
    plan = Plan(links, inside)
    read = [source for node in nodes for source in node.all_input_nodes if source not in inside]
    given = list(dict.fromkeys([*plan.tensors, *plan.masks, *plan.tokens, *read]))
    with graph.inserting_before(nodes[0]):
        chain = graph.call_function(Chain(library, plan, _program(nodes, given, plan.outputs)), tuple(given))
    results = [chain]
    if len(plan.outputs) > 1:
        with graph.inserting_after(chain):
            results = [graph.call_function(operator.getitem, (chain, i)) for i in range(len(plan.outputs))]
    for output, result in zip(plan.outputs, results, strict=True):
        result.meta = dict(output.meta)
        output.replace_all_uses_with(result)
    for node in reversed(nodes):
        graph.erase_node(node)


def _program(nodes: list[fx.Node], given: list[fx.Node], outputs: list[fx.Node]) -> Callable[..., Any]:
    """The nodes one by one, as a function of their inputs; returns the single output, or a tuple."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in given}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[output] for output in outputs)
    graph.output(results if len(results) > 1 else results[0])
    return compile_graph(graph)


@dataclass(frozen=True, eq=False)
class Link:
    """One kernel of a chain: the nodes of its operands and of its results.

    An attention's `x` is its projection. `results` are the kernel and, if it returns two values, the nodes that pick
    them.
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
        """A node as a link; None if it is not one of our own kernels."""
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
        """The number of floats in a row of x."""
        return int(self.x.meta["val"].shape[-1]) if isinstance(self.kernel, Heads) else self.kernel.k

    @property
    def n(self) -> int:
        """The number of floats in a row of the result."""
        return self.kernel.counts[0] * self.kernel.head_dim if isinstance(self.kernel, Heads) else self.kernel.n

    def follows(self, links: Sequence[Link]) -> bool:
        """Whether it has the same rows as these links, and the same sequences."""
        rows, others = (link.y.meta["val"].shape[:-1] for link in (self, links[0]))
        if len(rows) != len(others) or not all(map(statically_known_true, map(operator.eq, rows, others))):
            return False
        return len({link.tokens for link in (*links, self) if isinstance(link.kernel, Heads)}) < 2


def runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Runs of at least two consecutive kernels."""
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


class Plan:
    """The place of each value of a chain: given from outside, a separate result, or an offset in each row's block.

    `tensors`, `masks` and `tokens` are the nodes from outside, `outputs` those read there; `inputs` has the number of
    floats per row for each tensor that is not a weight. `steps` is what native.c reads.
    """

    def __init__(self, links: list[Link], inside: set[fx.Node]):
        values = {value: width for link in links for value, width in ((link.x, link.k), (link.residual, link.n))}
        weights = [weight for link in links for weight in (link.packed, link.bias, link.gamma, link.beta)]
        given = dict.fromkeys(value for value in (*values, *weights) if value is not None and value not in inside)
        self.tensors = list(given)
        self.inputs = {place: values[value] for place, value in enumerate(self.tensors) if value in values}
        self.masks = list(dict.fromkeys(link.mask for link in links if link.mask is not None))
        self.tokens = list(dict.fromkeys(link.tokens for link in links if link.tokens is not None))
        results = {value: link.n for link in links for value in (link.y, link.normed) if value is not None}
        self.outputs = [value for value in results if any(user not in inside for user in value.users)]
        self.widths = [results[output] for output in self.outputs]
        self.heads = {link.kernel.counts[0] for link in links if isinstance(link.kernel, Heads)}
        self.places = frozenset.intersection(*(link.places for link in links))
        addresses = [*self.tensors, *self.outputs]
        self._operands = {value: -2 - place for place, value in enumerate(addresses)}
        self._operands |= {mask: -2 - len(addresses) - 5 * place for place, mask in enumerate(self.masks)}
        self.row = self._lay_out(links, results)
        self.steps = b"".join(map(self._step, links))

    def _lay_out(self, links: list[Link], results: dict[fx.Node, int]) -> int:
        """Plans the memory of inner values in the block, reusing that of values not read again; returns the floats per
        row."""
        last_read = {value: place for place, link in enumerate(links) for value in (link.x, link.residual)}
        taken: dict[fx.Node, tuple[int, int]] = {}
        row = 0
        for place, link in enumerate(links):
            for value in dict.fromkeys((link.y, link.normed)):
                if value is None or value in self._operands:
                    continue
                start = _first_gap(sorted(taken.values()), results[value])
                taken[value] = (start, start + results[value])
                row = max(row, taken[value][1])
                self._operands[value] = start
            taken = {value: at for value, at in taken.items() if last_read.get(value, -1) > place}
        return row

    def _step(self, link: Link) -> bytes:
        def at(value: fx.Node | None) -> int:
            return NONE if value is None else self._operands[value]

        is_attention = isinstance(link.kernel, Heads)
        bias = link.mask if is_attention else link.bias
        values = (link.x, link.packed, bias, link.residual, link.y, link.gamma, link.beta, link.normed)
        return native.STEP.pack(is_attention, *map(at, values), link.k, link.n, *_numbers(link))


def _first_gap(taken: list[tuple[int, int]], width: int) -> int:
    start = 0
    for begin, end in taken:
        if begin - start >= width:
            break
        start = end
    return start


def _numbers(link: Link) -> tuple[float, ...]:
    """The last fields of `native.STEP`."""
    kernel = link.kernel
    if isinstance(kernel, native.Linear):
        return (*(0,) * 6, kernel.epsilon or 0, kernel.activation)
    query_heads, key_heads, _ = kernel.counts
    starts = (start * kernel.head_dim for start in kernel.starts)
    scale = native.scale_of(link.scale, kernel.head_dim)
    return (query_heads, query_heads // key_heads, kernel.head_dim, *starts, scale, link.is_causal)


class Chain:
    """The kernels of a plan in one call, or `one_by_one`, which may read other forms of weights.

    It is called with the plan's tensors, masks and tokens, and then with what else `one_by_one` needs.
    """

    def __init__(self, library: native.Library, plan: Plan, one_by_one: Callable[..., Any]):
        self._run, self._plan, self._one_by_one = library.chain, plan, one_by_one
        self._first = next(iter(plan.inputs))
        self._ends = (len(plan.tensors), len(plan.tensors) + len(plan.masks))
        self.__name__ = "chain"  # fx names nodes after it

    def __call__(self, *given: Any) -> Any:
        plan, x = self._plan, given[self._first]
        tensors, masks = given[: self._ends[0]], given[slice(*self._ends)]
        leading = x.shape[:-1]
        rows = leading.numel()
        if not self._can_run(rows, leading, tensors, masks):
            return self._one_by_one(*given)
        outputs = [x.new_empty((*leading, width)) for width in plan.widths]
        addresses = [0, *map(Tensor.data_ptr, tensors), *map(Tensor.data_ptr, outputs)]
        for mask in masks:
            addresses += _address_and_strides(mask)
        tokens = given[self._ends[1]] if plan.tokens else None
        bounds, sequences = _sequences(tokens, leading) if plan.heads else (None, (1, rows))
        self._run(plan.steps, addresses, x.new_empty(rows * plan.row), bounds, (rows, *sequences))
        return outputs[0] if len(outputs) == 1 else outputs

    def _can_run(self, rows: int, leading: torch.Size, tensors: tuple[Tensor, ...], masks: tuple[Mask, ...]) -> bool:
        """Whether there are few rows, the kernels are the fastest for them, and all memory is laid out as they read
        it."""
        plan = self._plan
        is_small = 0 < rows * plan.row * torch.float32.itemsize <= LARGEST_BLOCK
        if not is_small or bucket_of(rows, UP_TO) not in plan.places:
            return False
        if not all(map(Tensor.is_contiguous, tensors)):
            return False
        if any(tensors[place].numel() != rows * width for place, width in plan.inputs.items()):
            return False
        return all(self._fits(mask.bias, leading) for mask in masks)

    def _fits(self, bias: Tensor | None, leading: torch.Size) -> bool:
        if bias is None:
            return False
        batch, tokens = leading
        return all(native.is_bias_of(bias, (batch, heads, tokens, tokens)) for heads in self._plan.heads)


def _sequences(tokens: Tokens | None, leading: Sequence[int]) -> tuple[Tensor | None, Sequence[int]]:
    """Where packed sequences begin, how many there are, and of at most how many tokens."""
    return (None, leading) if tokens is None else (tokens.bounds, (len(tokens.bounds) - 1, tokens.longest))


def _address_and_strides(mask: Mask) -> list[int]:
    bias: Any = mask.bias
    return [bias.data_ptr(), *native.strides_of(bias)]
