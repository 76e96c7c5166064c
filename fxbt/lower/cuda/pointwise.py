"""Pointwise fusion on CUDA: one kernel for each run of elementwise ops, norms and layouts between products.

A rotary embedding is a dozen small kernels, each of which reads and writes all queries; RMS norm with its casts, SwiGLU
and a residual with its norm are three to five. torch's Inductor makes one Triton kernel of each. Equal regions, as in
equal layers, are compiled once, for all sizes.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from ...graph.opsets import CASTS
from ...torch_compat import OpOverload, compile_by_inductor
from ..codegen import compile_graph
from .graphs import is_recording

logger = logging.getLogger("fxbt")
aten = torch.ops.aten

NORMS = {aten.layer_norm.default, aten.rms_norm.default}
LAYOUTS = {
    *(aten.reshape.default, aten.view.default, aten.unflatten.int, aten.flatten.using_ints),
    *(aten.transpose.int, aten.permute.default, aten.t.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor),
}
JOINS = {aten.cat.default, aten.stack.default}
PRODUCTS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default}
LEAST_PLACES = 2  # a region that occurs only once per call belongs to no layer, and compiling it costs seconds, too
LEAST_KERNELS = 2  # that one kernel replaces

# Up to this many bytes in its largest input, an unrecorded region runs step by step: calling a compiled kernel took 60
# us on an H200's host, and each step about 5 us, so smaller regions wait for the host anyway.
SMALL = 2**23
MOST_VARIANTS = 4  # of a region, for inputs of other strides

Program = Callable[..., Any]
Compiler = Callable[[fx.GraphModule, Sequence[Tensor]], Program]


class FusedRegion:
    """A part of a graph as one function, compiled at its first call; runs uncompiled if the compiler fails.

    Attributes:
        steps: what it computes, for the report.
        failure: why it is not compiled; None if nothing failed.
    """

    __name__ = "fused_region"  # fx needs a name

    def __init__(self, module: fx.GraphModule, compiler: Compiler) -> None:
        self.steps = ", ".join(_name(node) for node in module.graph.nodes if _is_kernel(node))
        self.failure: str | None = None
        self._module = module
        self._compiler = compiler
        self._is_one = not isinstance(_returned(module.graph), tuple | list)
        self._plain = compile_graph(module.graph)
        self._variants: list[Program] = []
        self._lock = threading.Lock()

    @property
    def state(self) -> str:
        """Whether it is compiled, for the report."""
        if self.failure is not None:
            return f"not compiled: {self.failure}"
        return "compiled" if self._variants else "not called yet"

    def __call__(self, *tensors: Tensor) -> Any:
        if not is_recording() and max(tensor.nbytes for tensor in tensors) <= SMALL:
            return self._plain(*tensors)
        for run in self._variants:
            try:
                outputs = run(*tensors)
            except AssertionError:  # compiled for other strides; nothing has run yet
                continue
            return outputs[0] if self._is_one else outputs
        return self._first(tensors)

    def _first(self, tensors: Sequence[Tensor]) -> Any:
        """The result for inputs with strides not seen before."""
        with self._lock:
            if self.failure is None and len(self._variants) < MOST_VARIANTS:
                try:
                    self._variants.append(self._compiler(copy.deepcopy(self._module), tensors))
                except Exception as error:  # for example without Triton; the program works without it
                    self.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    logger.info("the steps %s are not compiled: %s", self.steps, self.failure)
        return self._plain(*tensors)


_KNOWN: OrderedDict[Hashable, FusedRegion] = OrderedDict()  # by what they compute, for all programs of the process
MOST_KNOWN = 256


def fuse_pointwise(graph: fx.Graph, compiler: Compiler = compile_by_inductor) -> tuple[fx.Graph, list[FusedRegion]]:
    """The graph with one call for each region that occurs at least twice in it, and these regions.

    Placeholders do not change. Regions keep the values except for rounding between their steps, which is float32 in a
    compiled kernel.

    Args:
        graph: a graph whose nodes have their values, without get_attr nodes.
    """
    module = fx.GraphModule(nn.Module(), graph)
    partitioner = CapabilityBasedPartitioner(module, _Supported(graph), allows_single_node_partition=False)
    parts = [_without_outer_layouts(part.nodes) for part in partitioner.propose_partitions()]
    parts = [part for part in parts if sum(map(_is_kernel, part)) >= LEAST_KERNELS]
    keys = [_key(part, [], []) for part in parts]
    counts = Counter(keys)
    chosen = [part for part, key in zip(parts, keys, strict=True) if counts[key] >= LEAST_PLACES]
    if not chosen:
        return graph, []
    fused = fuse_by_partitions(module, [dict.fromkeys(part) for part in chosen], prefix="region_")
    found: dict[FusedRegion, None] = {}
    for node in fused.graph.find_nodes(op="call_module"):
        target: Any = node.target
        region = _known(fused.get_submodule(target), compiler)
        node.op, node.target = "call_function", region
        found[region] = None
    return fused.graph, list(found)


def _known(part: Any, compiler: Compiler) -> FusedRegion:
    """The region that computes this part of a graph."""
    nodes = [node for node in part.graph.nodes if node.op == "call_function"]
    key = (_key(nodes, part.graph.find_nodes(op="placeholder"), _returned(part.graph)), compiler)
    if key not in _KNOWN:
        _KNOWN[key] = FusedRegion(part, compiler)
    _KNOWN.move_to_end(key)
    if len(_KNOWN) > MOST_KNOWN:
        _KNOWN.popitem(last=False)
    return _KNOWN[key]


class _Supported(OperatorSupportBase):
    """Supports nodes after a product: those before all products, such as rotary angles, are computed once per call."""

    def __init__(self, graph: fx.Graph) -> None:
        self._behind: set[fx.Node] = set()
        for node in graph.nodes:
            if node.target in PRODUCTS or not self._behind.isdisjoint(node.all_input_nodes):
                self._behind.add(node)

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or not isinstance(node.target, OpOverload):
            return False
        if node not in self._behind:
            return False
        if any(not isinstance(source.meta.get("val"), Tensor) for source in node.all_input_nodes):
            return False  # sizes are numbers, which a region does not accept
        return node.target in LAYOUTS or _is_kernel(node)


def _is_kernel(node: fx.Node) -> bool:
    """Whether a node computes or moves values."""
    target = node.target
    if not isinstance(target, OpOverload):
        return False
    return target in CASTS or target in NORMS or target in JOINS or torch.Tag.pointwise in target.tags


def _without_outer_layouts(region: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes in order, without views at both ends: these cost nothing, and would be copied."""
    nodes = sorted(region)
    for backwards in (True, False):
        for node in reversed(nodes) if backwards else list(nodes):
            inner = set(nodes)
            around = set(node.users) if backwards else set(node.all_input_nodes)
            if node.target in LAYOUTS and not around & inner:
                nodes = [other for other in nodes if other is not node]
    return nodes


def _key(nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], outputs: Any) -> Hashable:
    """A key that is equal for parts that compute the same from values of the same kinds, whatever their symbolic
    sizes."""
    names: dict[fx.Node, str] = {}
    symbols: dict[Any, str] = {}

    def size(value: Any) -> str:
        if not isinstance(value, torch.SymInt):
            return str(value)
        expression = value.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            symbols.setdefault(symbol, f"n{len(symbols)}")
        return str(expression.subs(symbols))

    def name(source: fx.Node) -> str:
        if source not in names:
            value = source.meta["val"]
            names[source] = f"x{len(names)} {[*map(size, value.shape)]} {value.dtype} {value.device}"
        return names[source]

    lines = [name(source) for source in inputs]
    for node in nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), name)
        lines.append(f"{node.target} {arguments}")
        names[node] = f"y{len(lines)}"
    return (*lines, str(fx.node.map_arg(outputs, name)))


def _returned(graph: fx.Graph) -> Any:
    (output,) = graph.find_nodes(op="output")
    return output.args[0]


def _name(node: fx.Node) -> str:
    packet: Any = node.target
    return str(packet).split(".")[1]
