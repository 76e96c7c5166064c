"""From the rewritten graph to a callable: weights bound once, what only depends on weights computed once.

Weights become plain arguments (no attribute chain per call), ATen ops that have a direct torch binding are called
through it (about 1 us instead of 5), and without gradients every value computed from weights alone (a merged QKV
weight, say) is kept and refreshed when a source changes.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

aten = torch.ops.aten

# The direct binding of an op, where it takes the op's arguments as they stand.
BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: F.linear,
    aten.layer_norm.default: torch.layer_norm,
    aten.embedding.default: torch.embedding,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.gelu.default: F.gelu,
    aten.silu.default: torch._C._nn.silu,
    aten.softmax.int: torch.softmax,
    aten.matmul.default: torch.matmul,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.tanh.default: torch.tanh,
    aten.relu.default: torch.relu,
    aten.rsqrt.default: torch.rsqrt,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.expand.default: torch.Tensor.expand,
    aten.select.int: torch.select,
    aten.cat.default: torch.cat,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.where.self: torch.where,
    aten.where.ScalarOther: torch.where,
    aten.sym_size.int: torch.Tensor.size,
}


def _attention_with_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """SDPA for training: torch 2.13's CPU flash kernel has wrong gradients in rows that a mask blocks entirely."""
    if attn_mask is None or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, **options)[0]


@dataclass
class _Derived:
    """Values computed from weights, with the state of the weights they were computed from."""

    stamp: list[Any]
    samples: list[
        torch.Tensor
    ]  # live views; they keep the old storages alive, so no new one can stand at their address
    sampled: torch.Tensor
    values: tuple[torch.Tensor, ...]

    def holds(self, sources: list[torch.Tensor]) -> bool:
        """Whether the weights are as they were: by what torch counts, and, past `.data` (uncounted), by a sample."""
        return self.stamp == _stamp(sources) and torch.equal(torch.cat(self.samples), self.sampled)


class Program:
    """A rewritten graph as a thread-safe callable: `program(*tensors) -> tuple of outputs`.

    `derived_bytes` is the memory of values derived from weights and kept.
    """

    def __init__(self, module: fx.GraphModule, assumes: Sequence[str], keep_derived: bool):
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        watched = {name: operator.attrgetter(name)(module) for name in assumes}
        self._watched = [(live, live.clone(), name) for name, live in watched.items()]
        derived = _weight_only(module, graph) if keep_derived else []
        self._derive, self._sources = _hoist(module, graph, derived)
        self._weights = _bind_weights(module, graph)
        for node in graph.nodes:
            node.target = _binding(node) if node.op == "call_function" else node.target
        self._run = _compile(graph)
        self._lock = threading.Lock()
        self._derived = self._refresh() if derived else None

    @property
    def derived_bytes(self) -> int:
        own = {source.untyped_storage().data_ptr() for source in self._sources}
        values = self._derived.values if self._derived else ()
        return sum(value.nbytes for value in values if value.untyped_storage().data_ptr() not in own)

    def __call__(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        for live, assumed, name in self._watched:
            if not torch.equal(live, assumed):
                raise RuntimeError(f"{name} changed after the graph was proven on its content")
        if self._derived is None:
            return self._run(*tensors, *self._weights)
        derived = self._derived
        if not derived.holds(self._sources):
            derived = self._derived = self._refresh()
        return self._run(*tensors, *derived.values, *self._weights)

    def _refresh(self) -> _Derived:
        """Compute the derived values anew; the stamp is read first, so that a change meanwhile is seen next time."""
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            stamp = _stamp(self._sources)
            samples = [_sample(source.detach()) for source in self._sources]
            return _Derived(stamp, samples, torch.cat(samples), self._derive(*self._sources))


def _binding(node: fx.Node) -> Any:
    is_attention = node.target is aten.scaled_dot_product_attention.default
    if is_attention and "fxbt_rule" in node.meta and torch.is_grad_enabled():
        return _attention_with_gradient
    return BINDINGS.get(node.target, node.target)


def _stamp(sources: list[torch.Tensor]) -> list[Any]:
    """What changes when a weight is written (version), swapped (address) or cast (dtype)."""
    return [(source._version, source.data_ptr(), source.dtype) for source in sources]


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A view of some elements of a weight: one in each row and column at least, all of a vector."""
    return weight.view(-1)[:: weight.shape[-1] + 1 if weight.dim() > 1 else 1]


def _can_be_watched(weight: torch.Tensor) -> bool:
    """On an accelerator, looking at a sample would wait for the device; merging anew there costs next to nothing."""
    return weight.device.type == "cpu" and weight.is_contiguous() and not weight.is_inference()


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def _weight_only(module: fx.GraphModule, graph: fx.Graph) -> list[fx.Node]:
    """The nodes computed from weights alone whose values other nodes use."""
    constant: set[fx.Node] = set()
    weights = {node for node in graph.nodes if node.op == "get_attr" and _can_be_watched(_attribute(module, node))}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        from_weights = bool(inputs) and all(source in weights or source in constant for source in inputs)
        if node.op == "call_function" and from_weights and isinstance(node.meta.get("val"), torch.Tensor):
            constant.add(node)
    return [node for node in graph.nodes if node in constant and any(user not in constant for user in node.users)]


def _hoist(
    module: fx.GraphModule, graph: fx.Graph, derived: list[fx.Node]
) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """Move `derived` and what they are computed from into a function of the weights; they become placeholders."""
    apart = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    needed = _ancestors(derived)
    weights = [node for node in graph.nodes if node in needed and node.op == "get_attr"]
    for node in weights:
        copies[node] = apart.placeholder(node.name)
    for node in graph.nodes:
        if node in needed and node.op == "call_function":
            copies[node] = apart.node_copy(node, copies.__getitem__)
    apart.output(tuple(copies[node] for node in derived))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in derived:
        with graph.inserting_after(last[0]) if last else graph.inserting_before():
            stand_in = graph.placeholder(f"derived_{node.name}")
        node.replace_all_uses_with(stand_in)
        last = [stand_in]
    graph.eliminate_dead_code()
    return _compile(apart), [_attribute(module, node) for node in weights]


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found, waiting = set(nodes), list(nodes)
    while waiting:
        sources = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(sources)
        waiting.extend(sources)
    return found


def _bind_weights(module: fx.GraphModule, graph: fx.Graph) -> list[torch.Tensor]:
    """Turn get_attr nodes into trailing placeholders; returns the tensors that go there."""
    weights: list[torch.Tensor] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        weights.append(_attribute(module, node))
        with graph.inserting_after(last[0]) if last else graph.inserting_before():
            argument = graph.placeholder(f"weight_{node.name}")
        node.replace_all_uses_with(argument)
        graph.erase_node(node)
        last = [argument]
    return weights


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a plain Python function."""
    graph.lint()
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<fxbt program>", "exec"), namespace)
    forward = namespace["forward"]
    return lambda *arguments: forward(None, *arguments)
