"""Traces equal layers once: the first layer's part of the graph is copied for the others, with their own weights.

This is sound because of what it requires. Two layers are equal if they have the same classes and equal content, except
for parameters, buffers, and numbers that the trace of the first layer did not read (a layer's own index). A call equals
an earlier one if its tensors are alike (symbolic sizes, strides, dtype, which of them are identical) and everything
else is equal. A layer that differs, or changes anything besides its result, is traced separately.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn

from ..errors import CaptureError
from ..torch_compat import (
    ModuleStackTracer,
    OpOverload,
    count_of_function_modes,
    is_any_autocast_enabled,
    proxy_tensor,
    unseen_by_modes,
    untraced,
)
from .codes import is_torchs
from .layer_likeness import Name, differences, is_plain, leaves_of, modules_of, same_value, tensors_of, values_of
from .model_state import ModelState
from .twins import subclass

LEAST = 3  # the least number of equal layers worth copying
_SIZES = frozenset([torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default])
_PURE = frozenset(["_operator", "math", "torch"])  # modules of functions that compute sizes, and of `getitem`

_DICT = vars(nn.Module)["__dict__"].__get__

_one_by_one: ContextVar[bool] = ContextVar("one_by_one", default=False)

Output = Any


@dataclass
class _Call:
    """A call of a layer during a trace: its leaves in order, and what else its trace may depend on."""

    leaves: list[Any]
    form: Any  # how the leaves are nested
    modes: int  # number of active function modes

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """The call; None if the layer could change something in it, or something is only known by identity."""
        leaves: list[Any] = []
        form = (leaves_of(args, leaves), [(name, leaves_of(value, leaves)) for name, value in kwargs.items()])
        return cls(leaves, form, count_of_function_modes()) if all(map(is_plain, leaves)) else None

    def is_like(self, other: _Call) -> bool:
        """Whether the trace of one call also fits the other call's tensors."""
        if (self.form, self.modes, len(self.leaves)) != (other.form, other.modes, len(other.leaves)):
            return False
        return all(map(same_value, self.leaves, other.leaves))


@dataclass
class _Traced:
    """A layer that was traced, and what it takes to copy its trace for another layer."""

    module: nn.Module
    path: str
    call: _Call
    depth: int  # number of modules around it
    nodes: list[fx.Node]
    outer: list[fx.Node]  # nodes of its tensors: those of the call, then weights
    output: Output
    made_by: dict[int, fx.Node]  # of each tensor in it, by id; a later `x.to(x.dtype)` gives the tensor another node
    read: set[Name]
    calls: dict[str, int] = field(default_factory=dict)  # of modules inside, by their paths from this layer


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """In this block, each layer is traced separately."""
    token = _one_by_one.set(True)
    try:
        yield
    finally:
        _one_by_one.reset(token)


class EqualLayers:
    """While active, torch.export traces a model's equal layers once, in this thread.

    Args:
        read: how many tensor values the trace has read; a layer that reads some is not copied.
        may_copy: False traces each layer separately; needed if the trace uses values noted in an earlier run.

    Example:
        >>> with EqualLayers(model, lambda: len(scalars.read)) as equal:
        ...     model(ids)
        >>> equal.copied  # layers
        11
    """

    def __init__(self, model: nn.Module, read: Callable[[], int], may_copy: bool = True) -> None:
        self.copied = 0
        self._may_copy = may_copy and not _one_by_one.get()
        self._read = read
        self._thread = threading.get_ident()
        self._is_inside = False
        with unseen_by_modes():
            self._state = ModelState(model if self._may_copy else nn.Module())
        self._group: dict[int, list[nn.Module]] = {}
        self._known: dict[int, list[_Traced]] = {}
        for container in model.modules():
            self._add(list(container) if isinstance(container, (nn.ModuleList, nn.Sequential)) else [])
        self._patch = mock.patch.object(ModuleStackTracer, "call_module", self._calls())

    def __enter__(self) -> EqualLayers:
        self._patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.stop()

    def check(self) -> None:
        """To be called when all is traced.

        Raises:
            CaptureError: layers were copied, and a tensor of the model is of another kind by now.
        """
        with unseen_by_modes():
            if self.copied and not self._state.holds():
                raise CaptureError("forward changes the model's tensors between layers that are equal")

    def _holds(self) -> bool:
        """Whether the model is as it was: a number that a loop leaves for its layers, say, would change it.

        The tensors of equal layers are compared with each other; all of them once, at the end, as each takes 20 us.
        """
        return self._may_copy and self._state.holds(of_tensors=False)

    def _add(self, layers: list[nn.Module]) -> None:
        for layer in layers:
            alike = [other for other in layers if type(other) is type(layer)]
            if len(alike) >= LEAST:
                self._group[id(layer)] = alike

    def _calls(self) -> Callable[..., Any]:
        by_torch = ModuleStackTracer.call_module

        def call_module(tracer: Any, module: Any, forward: Any, args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != self._thread or not self._may_be_equal(tracer, module):
                return by_torch(tracer, module, forward, args, kwargs)

            def once(*args: Any, **kwargs: Any) -> Any:
                return self._once(tracer, module, forward, args, kwargs)

            return by_torch(tracer, module, once, args, kwargs)

        return call_module

    def _may_be_equal(self, tracer: Any, module: nn.Module) -> bool:
        if self._is_inside or id(module) not in self._group or tracer.enable_attr_proxy or not self._may_copy:
            return False
        return not (torch.is_grad_enabled() or is_any_autocast_enabled())

    def _once(self, tracer: Any, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Output:
        call, path = _Call.of(args, kwargs), tracer.path_of_module(module)
        is_again = any(other.startswith(f"{path}.") for other in tracer.num_calls)
        with unseen_by_modes():
            may_be_equal = call is not None and not is_again and self._holds()
            traced, nodes = self._equal_of(tracer, module, call) if may_be_equal and call else (None, {})
        if call is None or not may_be_equal:
            return self._inside(forward, args, kwargs)
        if traced is None:
            return self._trace(tracer, module, forward, args, kwargs, call, path)
        self.copied += 1
        return _copy(tracer, traced, call, path, nodes)

    def _equal_of(self, tracer: Any, module: nn.Module, call: _Call) -> tuple[_Traced | None, dict[fx.Node, fx.Node]]:
        """A trace of an equal layer with an equal call, and the nodes of this call that replace its outer nodes."""
        for traced in self._known_like(module):
            found = differences(traced.module, module)
            is_same_layer = found is not None and not found & traced.read
            if is_same_layer and traced.call.is_like(call) and (nodes := _stand_ins(tracer, traced, module, call)):
                return traced, nodes
        return None, {}

    def _known_like(self, module: nn.Module) -> list[_Traced]:
        return self._known.setdefault(id(self._group[id(module)][0]), [])

    def _inside(self, forward: Any, args: Any, kwargs: Any) -> Output:
        self._is_inside = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._is_inside = False

    def _trace(
        self, tracer: Any, module: nn.Module, forward: Any, args: Any, kwargs: Any, call: _Call, path: str
    ) -> Output:
        """Traces a layer and returns its output; keeps the trace if it can be copied."""
        with unseen_by_modes():
            others = [differences(module, other) for other in self._group[id(module)] if other is not module]
            names = {name for found in others for name in found or ()}
            outer, values = _outer_of(tracer, module, call), values_of(module)
        last, read_before = next(iter(reversed(tracer.graph.nodes)), None), self._read()
        with _reads(module, names) as read:
            output = self._inside(forward, args, kwargs)
        nodes = _nodes_behind(last, tracer.graph)
        with unseen_by_modes():
            is_pure = self._read() == read_before and values_of(module) == values and self._holds()
            can_be_copied = outer is not None and is_pure and _can_be_copied(nodes, outer)
            made_by = _made_by(tracer, output, call, nodes) if can_be_copied else None
        if outer is None or made_by is None:
            return output
        traced = _Traced(module, path, call, len(tracer.module_stack), nodes, outer, output, made_by, read)
        counts = tracer.num_calls.items()
        traced.calls = {other[len(path) :]: count for other, count in counts if other.startswith(f"{path}.")}
        self._known_like(module).append(traced)
        return output


@contextlib.contextmanager
def _reads(module: nn.Module, names: set[Name]) -> Iterator[set[Name]]:
    """Notes which of these attributes of modules are read in a block."""
    read: set[Name] = set()
    modules = modules_of(module)
    kinds: dict[str, type] = {}
    for path in {path for path, _ in names}:
        watched = {name: _watched(path, name, read) for place, name in names if place == path}
        watched["__dict__"] = _watched_dict(names, read)
        kinds[path] = type(modules[path])
        object.__setattr__(modules[path], "__class__", subclass(kinds[path], watched))
    try:
        yield read
    finally:
        for path, kind in kinds.items():
            object.__setattr__(modules[path], "__class__", kind)


def _watched(path: str, name: str, read: set[Name]) -> property:
    def get(self: nn.Module) -> Any:
        read.add((path, name))
        return _DICT(self)[name]

    def put(self: nn.Module, value: Any) -> None:
        read.add((path, name))
        _DICT(self)[name] = value

    return property(get, put)


def _watched_dict(names: set[Name], read: set[Name]) -> property:
    """A module's `__dict__`: any reader of it except torch's own modules may read each attribute."""

    def get(self: nn.Module) -> dict[str, Any]:
        if not is_torchs(sys._getframe(1).f_code.co_filename):
            read.update(names)
        return _DICT(self)

    return property(get)


def _outer_of(tracer: Any, module: nn.Module, call: _Call) -> list[fx.Node] | None:
    """The nodes of a call's tensors and of the layer's own; None if one has no node."""
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    nodes = [_node_of(tracer, tensor) for tensor in [*tensors, *tensors_of(module)]]
    return None if None in nodes else nodes  # type: ignore[return-value]


def _node_of(tracer: Any, tensor: Tensor) -> fx.Node | None:
    found = proxy_tensor.get_proxy_slot(tensor, tracer, None)
    return None if found is None else found.proxy.node


def _stand_ins(tracer: Any, traced: _Traced, module: nn.Module, call: _Call) -> dict[fx.Node, fx.Node] | None:
    """The node of another call for each outer node of a traced layer; None if they do not match one to one."""
    new = _outer_of(tracer, module, call)
    if new is None:
        return None
    pairs, back = dict(zip(traced.outer, new, strict=True)), dict(zip(new, traced.outer, strict=True))
    is_one_to_one = all(pairs[old] is node and back[node] is old for old, node in zip(traced.outer, new, strict=True))
    return pairs if is_one_to_one else None


def _nodes_behind(last: fx.Node | None, graph: fx.Graph) -> list[fx.Node]:
    return list(itertools.takewhile(lambda node: node is not last, reversed(graph.nodes)))[::-1]


def _can_be_copied(nodes: Sequence[fx.Node], outer: Sequence[fx.Node]) -> bool:
    """Whether the nodes compute only from the call's tensors, the layer's and sizes, and write nothing."""
    known = {*nodes, *outer}
    computing = [node for node in nodes if node.target not in _SIZES]
    return all(_is_pure(node) and all(n in known or _is_size(n) for n in node.all_input_nodes) for node in computing)


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return getattr(node.target, "__module__", None) in _PURE and "val" in node.meta


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (SymInt, SymFloat, SymBool))


def _made_by(tracer: Any, output: Output, call: _Call, nodes: Sequence[fx.Node]) -> dict[int, fx.Node] | None:
    """The node of each tensor of an output that is not the call's; None if one is not made here in its own memory."""
    leaves: list[Any] = []
    leaves_of(output, leaves)
    given, made = {id(leaf) for leaf in call.leaves}, set(nodes)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) not in given]
    found = {id(tensor): node for tensor in tensors if (node := _node_of(tracer, tensor)) in made}
    are_made = all(id(tensor) in found and tensor.storage_offset() == 0 for tensor in tensors)
    are_plain = all(map(is_plain, leaves)) and not any(isinstance(leaf, SymInt) for leaf in leaves)
    return found if are_made and are_plain else None


def _copy(tracer: Any, traced: _Traced, call: _Call, path: str, nodes: dict[fx.Node, fx.Node]) -> Output:
    """The output of a call whose nodes are copied from an equal call's; `nodes` maps the outer ones."""
    stack = {key: (place, _name_of(kind)) for key, (place, kind) in tracer.module_stack.items()}
    for node in traced.nodes:
        if node.target in _SIZES:  # sizes of like tensors are known already
            continue
        nodes[node] = tracer.graph.node_copy(node, lambda n: nodes.get(n, n))
        inner = list(node.meta["nn_module_stack"].items())[traced.depth :]
        start = len(traced.path)
        moved = {path + key[start:]: (path + place[start:], kind) for key, (place, kind) in inner}
        nodes[node].meta["nn_module_stack"] = {**stack, **moved}
    tracer.num_calls.update({path + place: count for place, count in traced.calls.items()})
    made = {id(old): new for old, new in zip(traced.call.leaves, call.leaves, strict=True) if isinstance(old, Tensor)}
    return _output(tracer, traced.output, made, {tensor: nodes[node] for tensor, node in traced.made_by.items()})


def _name_of(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind


def _output(tracer: Any, output: Output, made: dict[int, Tensor], nodes: dict[int, fx.Node]) -> Output:
    if isinstance(output, tuple):
        return tuple(_output(tracer, value, made, nodes) for value in output)
    if not isinstance(output, Tensor):
        return output
    if id(output) not in made:
        with untraced():
            made[id(output)] = output.new_empty_strided(output.size(), output.stride())
        proxy = fx.Proxy(nodes[id(output)], tracer)  # its node has the values of the one that it is a copy of
        with unseen_by_modes():
            proxy_tensor.track_tensor(made[id(output)], proxy, constant=None, tracer=tracer)
    return made[id(output)]


def graph_difference(one: fx.Graph, other: fx.Graph) -> str | None:
    """The first node that differs between two graphs, apart from names; None if none does."""
    pairs: dict[fx.Node, fx.Node] = {}
    if len(one.nodes) != len(other.nodes):
        return f"{len(one.nodes)} nodes, expected {len(other.nodes)}"
    for left, right in zip(one.nodes, other.nodes, strict=True):
        pairs[left] = right
        moved = fx.node.map_arg((left.args, left.kwargs), lambda node: pairs[node])
        stacks = [list(node.meta.get("nn_module_stack", {}).items()) for node in (left, right)]
        are_same = left.op == right.op and left.target == right.target and moved == (right.args, right.kwargs)
        if not are_same or stacks[0] != stacks[1] or not _same_meta(left.meta.get("val"), right.meta.get("val")):
            return f"{left.format_node()} and {right.format_node()}"
    return None


def _same_meta(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same_meta, one, other))
    if isinstance(one, Tensor):
        return (one.dtype, one.device, str(one.shape), str(one.stride())) == (
            other.dtype,
            other.device,
            str(other.shape),
            str(other.stride()),
        )
    return str(one) == str(other)
