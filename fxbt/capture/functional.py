"""Removes in-place writes from an exported program; refuses writes that show in parameters and in most arguments.

Most writes are to a value that nothing else holds, as in `scores = query @ key.mT; scores += bias`; they become the op
that returns a new value. For all others, torch functionalises the program, which takes as long as the export itself;
new values of the model's buffers, and of tensors in objects among the arguments, then become outputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..errors import CaptureError
from ..graph.canonical import drop_inactive_dropout
from ..graph.node import argument, writes
from ..torch_compat import OpOverload, predispatch, pytree
from .checkpointing import regions_of
from .regions import inline_regions

aten = torch.ops.aten

_CONVERSIONS = tuple(getattr(aten.to, name) for name in ("device", "dtype", "dtype_layout", "other"))
# Ops that write to their running statistics, and the argument that says so.
_STATISTICS = {
    aten.batch_norm.default: "training",
    aten.native_batch_norm.default: "training",
    aten.cudnn_batch_norm.default: "training",
    aten.instance_norm.default: "use_input_stats",
}


def functional(program: ExportedProgram, names: list[str], held: frozenset[int] = frozenset()) -> ExportedProgram:
    """The program without in-place writes; what it writes to buffers, and to inputs in `held`, are its first outputs.

    Raises:
        CaptureError: it writes to the model's parameters, to other arguments (called `names`), to a value that shows in
            another one through an op that does not declare it, or to a buffer inside a checkpoint, which writes again
            in the backward.
    """
    for node in program.graph.nodes:
        if node.target is aten.detach_.default and node.args[0].target is aten.lift_fresh_copy.default:
            node.replace_all_uses_with(node.args[0])  # the trace of torch.tensor(...); no reason to functionalise
            program.graph.erase_node(node)
        elif node.target is aten.copy_.default and _is_unconverted(node.args[1], node.args[0]):
            node.replace_all_uses_with(node.args[0])  # the trace of `self.x = self.x.to(dtype)` without a conversion
            program.graph.erase_node(node)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    for graph in graphs:
        _return_instead(graph)
    nodes = [node for graph in graphs for node in graph.nodes]
    if any(writes(node) or _writes_statistics(node) or _is_of_vmap(node) for node in nodes):
        is_checkpointed = any(map(regions_of, nodes))
        inline_regions(program.graph_module, may_write=True)
        program = program.run_decompositions({})
        if is_checkpointed and (mutated := list(program.graph_signature.buffers_to_mutate.values())):
            raise CaptureError(
                f"forward writes in place to {', '.join(mutated)} and uses checkpoints, which may repeat the write"
            )
        if left := [str(node.target) for node in program.graph.nodes if _writes_statistics(node)]:
            raise CaptureError(
                f"forward writes in place to the statistics of {left[0].removeprefix('aten.')}, and a graph cannot"
            )
    signature = program.graph_signature
    if mutated := list(signature.parameters_to_mutate.values()):
        raise CaptureError(f"forward writes in place to {', '.join(mutated)}, and a graph cannot")
    places = {str(name): place for place, name in enumerate(signature.user_inputs)}
    mutated_inputs = [places[name] for name in signature.user_inputs_to_mutate.values()]
    if mutated := [names[place] for place in mutated_inputs if place not in held]:
        raise CaptureError(f"forward writes in place to its argument {', '.join(mutated)}, and a graph cannot")
    return program


def _return_instead(graph: fx.Graph) -> None:
    """Replaces ops that write to a value nothing else holds by ops that return a new one, read by all later nodes."""
    for node in graph.nodes:
        written = node.args[0] if writes(node) else None
        if not isinstance(written, fx.Node):
            continue
        holders = _holders(written, node, _may_share)
        if seen := [holder for holder in holders - {written} if _is_seen(holder, node)]:
            _check_declared(written, node, seen)
        elif _is_made_here(written) and (pure := _pure(node.target)) and _returns_alike(node, pure):
            node.target = pure
            written.replace_all_uses_with(node, delete_user_cb=node.__lt__)


def _holders(written: fx.Node, write: fx.Node, may_share: Callable[[fx.Node, fx.Node], bool]) -> set[fx.Node]:
    """The nodes before `write` that hold the memory it writes to."""
    holders = {written}
    waiting = [written]
    while waiting:
        node = waiting.pop()
        near = [other for other in node.all_input_nodes if may_share(node, other)]
        near += [user for user in node.users if user < write and may_share(user, node)]
        waiting += [other for other in near if other not in holders]
        holders.update(near)
    return holders


def _is_seen(holder: fx.Node, write: fx.Node) -> bool:
    """Whether a write shows in another holder of the memory: it is read later, or is not the graph's own."""
    return not _is_made_here(holder) or any(not user < write for user in holder.users)


def _is_made_here(holder: fx.Node) -> bool:
    return isinstance(holder.target, OpOverload) or holder.target is operator.getitem


def _check_declared(written: fx.Node, write: fx.Node, seen: list[fx.Node]) -> None:
    """Refuses a write that shows through an op that does not declare a view; torch would not follow it."""
    if not set(seen) <= _holders(written, write, _is_declared_view):
        op = str(write.target).removeprefix("aten.")
        raise CaptureError(f"forward writes in place ({op}) to memory that another value shares, and a graph cannot")


def _may_share(result: fx.Node, source: fx.Node) -> bool:
    """Whether a node's result may share memory with one of its inputs, at the sizes of some call."""
    if _is_declared_view(result, source):
        return True
    if drop_inactive_dropout(result) is source:
        return True  # although it was traced as a copy
    return not _memory(result).isdisjoint(_memory(source))


def _is_declared_view(result: fx.Node, source: fx.Node) -> bool:
    return not isinstance(result.target, OpOverload) or _returns_view(result.target)


def _returns_view(op: OpOverload) -> bool:
    return any(returned.alias_info is not None for returned in op._schema.returns)


def _pure(op: OpOverload) -> OpOverload | None:
    """The op that returns what `op` writes to its first argument: `add.Tensor` for `add_.Tensor`; None if none does."""
    packet = getattr(getattr(torch.ops, op.namespace), op._opname.removesuffix("_"), None)
    pure = getattr(packet, op._overloadname, None)
    if pure is None or pure._schema.is_mutable or _returns_view(pure):
        return None
    arguments, its = ([(a.name, str(a.type)) for a in each._schema.arguments] for each in (op, pure))
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None]
    return pure if arguments == its and written == [0] else None


def _memory(node: fx.Node) -> set[int]:
    """The ids of the memory of a node's tensors; sparse ones share the id 0."""
    tensors = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return {tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0 for tensor in tensors}


def _returns_alike(write: fx.Node, pure: OpOverload) -> bool:
    """Whether the op returns the dtype, sizes and strides of the tensor written to."""
    values: Any = fx.map_arg((write.args, write.kwargs), lambda node: node.meta["val"])
    args, kwargs = values
    written = args[0]
    with written.fake_mode:
        returned = pure(*args, **kwargs)
    return _form(returned) == _form(written)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, *map(str, (*tensor.shape, *tensor.stride()))


def _is_unconverted(value: Any, tensor: fx.Node) -> bool:
    """Whether `value` is `tensor` after conversions to the dtype and device that it already has."""
    while value is not tensor:
        if not isinstance(value, fx.Node) or value.target not in _CONVERSIONS or argument(value, "copy"):
            return False
        converted, value = value.meta["val"], value.all_input_nodes[0]
        kept = value.meta["val"]
        if (converted.dtype, converted.device, converted.stride()) != (kept.dtype, kept.device, kept.stride()):
            return False
    return True


def _writes_statistics(node: fx.Node) -> bool:
    """Whether a node is a norm in training that updates its statistics, which its schema does not say."""
    switch = _STATISTICS.get(node.target) if isinstance(node.target, OpOverload) else None
    return switch is not None and bool(argument(node, switch)) and argument(node, "running_mean") is not None


def _is_of_vmap(node: fx.Node) -> bool:
    """Whether a node opens or closes a batch axis of `vmap`, which is meaningless outside a running one."""
    return getattr(node.target, "__module__", None) == predispatch.__name__
