"""What a program derives from weights and keeps: merged projections, packed linears, and when they are out of date.

Every value of a graph that is computed from weights alone becomes a function of the weights, run once and again when
a weight has changed. Packed linears are such values too: a weight reordered for oneDNN's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .canonical import argument, attribute, is_pure, reaches_output

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn

# Rows of x that a weight is packed for. On AVX-512 this layout was 1.2 to 1.7 times as fast as F.linear for 16 to
# 2048 rows, and as fast for one.
PACKED_FOR_ROWS = 128


@dataclass
class Derived:
    """Values computed from weights, with the state of the weights they were computed from."""

    stamp: list[Any]
    # live views: they keep the old storages alive, so that no new one can stand at their address unseen
    samples: list[torch.Tensor]
    sampled: torch.Tensor
    values: tuple[torch.Tensor, ...]

    @classmethod
    def compute(cls, derive: Callable[..., tuple[torch.Tensor, ...]], weights: list[torch.Tensor]) -> Derived:
        """The values as the weights are now; the stamp is read first, so that a change meanwhile is seen next time."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            stamp = _stamp(weights)
            samples = [_sample(weight.detach()) for weight in weights]
            return cls(stamp, samples, torch.cat(samples), derive(*weights))

    def holds(self, weights: list[torch.Tensor]) -> bool:
        """Whether the weights are as they were: by what torch counts, and, past `.data` (uncounted), by a sample."""
        return self.stamp == _stamp(weights) and torch.equal(torch.cat(self.samples), self.sampled)

    def nbytes(self) -> int:
        """The memory of the values that are no views of weights."""
        own = {sample.untyped_storage().data_ptr() for sample in self.samples}
        return sum(_nbytes(value) for value in self.values if _address(value) not in own)


def _stamp(sources: list[torch.Tensor]) -> list[Any]:
    """What changes when a weight is written (version), swapped (address) or cast (dtype)."""
    return [(source._version, source.data_ptr(), source.dtype) for source in sources]


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A view of some elements of a weight: one in each row and column at least, all of a vector."""
    return weight.view(-1)[:: weight.shape[-1] + 1 if weight.dim() > 1 else 1]


def _can_be_watched(weight: torch.Tensor) -> bool:
    """On an accelerator, looking at a sample would wait for the device; merging anew there costs next to nothing."""
    return weight.device.type == "cpu" and weight.is_contiguous() and not weight.is_inference()


def _nbytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


def _address(value: torch.Tensor) -> int | None:
    """Where the storage of a value stands; packed weights have none to look at."""
    return value.untyped_storage().data_ptr() if value.layout is torch.strided else None


def weight_only(module: fx.GraphModule, graph: fx.Graph) -> list[fx.Node]:
    """The nodes computed from weights alone whose values other nodes use, after linears took packed weights."""
    constant = {node for node in graph.nodes if node.op == "get_attr" and _can_be_watched(attribute(module, node))}
    for node in list(graph.nodes):
        inputs = node.all_input_nodes
        from_weights = bool(inputs) and all(source in constant for source in inputs)
        is_tensor = node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
        if is_tensor and from_weights and is_pure(node) and not reaches_output(node):
            constant.add(node)
    constant |= _pack_linears(graph, constant)
    calls = [node for node in graph.nodes if node in constant and node.op == "call_function"]
    return [node for node in calls if any(user not in constant for user in node.users)]


def _pack_linears(graph: fx.Graph, constant: set[fx.Node]) -> set[fx.Node]:
    """Give linears on float32 weights oneDNN's packed kernel; returns the nodes that pack a weight."""
    packed: dict[fx.Node, fx.Node] = {}
    if not _packing_pays():
        return set()
    for node in list(graph.nodes):
        if node.target is not aten.linear.default or node.args[1] not in constant or not _can_be_packed(node):
            continue
        x, weight = node.args[:2]
        bias = argument(node, "bias")
        if weight not in packed:
            with graph.inserting_after(weight):
                packed[weight] = graph.call_function(mkldnn._reorder_linear_weight.default, (weight, PACKED_FOR_ROWS))
        node.target = mkldnn._linear_pointwise.default
        node.args = (x, packed[weight], bias, "none", [], "")
        node.kwargs = {}
    return set(packed.values())


def _packing_pays() -> bool:
    """Where it was measured to: with AVX-512, outside autocast (which would not see the packed op)."""
    has_kernel = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_kernel and torch.cpu._is_avx512_supported() and not torch.is_autocast_enabled("cpu")


def _can_be_packed(linear: fx.Node) -> bool:
    x, weight = (linear.args[place].meta["val"] for place in (0, 1))  # type: ignore[union-attr]
    return x.dtype is weight.dtype is torch.float32 and weight.dim() == 2


def hoist(
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
    return compile_graph(apart), [attribute(module, node) for node in weights]


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found, waiting = set(nodes), list(nodes)
    while waiting:
        sources = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(sources)
        waiting.extend(sources)
    return found


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a plain Python function."""
    graph.lint()
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<fxbt program>", "exec"), namespace)
    forward = namespace["forward"]
    return lambda *arguments: forward(None, *arguments)
