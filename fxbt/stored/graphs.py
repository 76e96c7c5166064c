"""`Captured` <-> JSON data: nodes by index, kinds of values, and what the guards assert.

The structure of the output is not written: it is the structure that the original returned for the current call.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable
from typing import Any

from torch import SymInt, Tensor, fx, nn

from ..capture.attempts import fresh
from ..capture.caches import growing_axes
from ..capture.call import Call
from ..capture.checkpointing import regions_of
from ..capture.containers import Given
from ..capture.effects import Buffer, Effects, check_buffers
from ..capture.export import Captured
from ..capture.guards import and_values, environment_of_inputs, guards_of, sizes_of_inputs
from ..capture.size_scalars import Constant
from ..torch_compat import pytree
from . import expressions
from .errors import Malformed, Unstorable, checked
from .operations import name_of, operation
from .tensors import own_tensor, read_tensor, written_tensor
from .values import KindsReader, KindsWriter, Table, read_argument, written_argument, written_sizes

_OPS = ("placeholder", "get_attr", "call_function", "output")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")  # names in a graph become names in generated Python
_NAMES = ("class", "sizes", "assumed", "fixed", "read", "buffers", "constants", "kinds", "texts", "nodes")


def written_graph(captured: Captured, model: nn.Module) -> dict[str, Any]:
    """A graph as captured, before any rewriting, as JSON data.

    Raises:
        Unstorable: it contains something that has no text in files.

    Example:
        >>> json.dumps(written_graph(captured, model))
    """
    if captured.effects.slots:
        raise Unstorable(f"forward sets its attribute {captured.effects.slots[0].name} to another tensor at each call")
    module, environment = captured.module, environment_of_inputs(captured.module)
    writer, texts, constants = KindsWriter(), Table(), {}
    for name in {str(node.target) for node in module.graph.find_nodes(op="get_attr")}:
        value = _attribute(module, name)
        if own_tensor(model, name) is not value:
            constants[name] = written_tensor(value)
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    nodes = [_written_node(node, places, writer, texts) for node in module.graph.nodes]
    return {
        "class": type(model).__name__,
        "sizes": written_sizes(sizes_of_inputs(module), environment) if environment else [],
        "assumed": [expressions.written(each) for each in captured.assumed],
        "fixed": [[place, written_tensor(tensor.detach())] for place, tensor in captured.fixed.items()],
        "read": [[constant.name, constant.value] for constant in captured.read],
        "buffers": [buffer.name for buffer in captured.effects.buffers],
        "constants": constants,
        "kinds": writer.kinds.entries,
        "texts": texts.entries,
        "nodes": nodes,
    }


def _attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    if not isinstance(value, Tensor):
        raise Unstorable(f"the graph contains another graph, {path}")
    return value


def _written_node(node: fx.Node, places: dict[fx.Node, int], writer: KindsWriter, texts: Table) -> list[Any]:
    if node.op not in _OPS or regions_of(node):
        raise Unstorable(
            f"%{node.name} is a {node.op}{' inside a checkpoint' if regions_of(node) else ''}, which files cannot hold"
        )
    target = name_of(node.target) if node.op == "call_function" else str(node.target)
    stack = [[key, *map(str, entry)] for key, entry in (node.meta.get("nn_module_stack") or {}).items()]
    return [
        node.op,
        node.name,
        target,
        [written_argument(argument, places) for argument in node.args],
        {name: written_argument(argument, places) for name, argument in node.kwargs.items()},
        writer.place(node.meta["val"]) if "val" in node.meta else None,
        texts.place(stack) if stack else None,
        texts.place(node.meta["stack_trace"]) if node.meta.get("stack_trace") else None,
    ]


# Reading


def read_graph(text: Any, model: nn.Module, call: Call, expected: tuple[list[Any], pytree.TreeSpec]) -> Captured:
    """Reads what `written_graph` wrote, as a graph of `model` for a call that returns `expected` (flattened).

    Raises:
        Malformed: it is not one of fxbt's graphs, or another model's.
        AssertionError: the graph is for other sizes than those of the call.
    """
    parts = checked(text, dict)
    if set(parts) != set(_NAMES):
        raise Malformed("the graph does not have the parts that this version writes")
    kinds = KindsReader(parts["kinds"], parts["sizes"], parts["assumed"])
    module = _module(parts, kinds, model)
    buffers = _buffers(parts["buffers"], model)
    placeholders = module.graph.find_nodes(op="placeholder")
    _check_inputs(placeholders, [*call.tensors, *(buffer.tensor for buffer in buffers)])
    _set_given(module, expected[0], len(buffers))
    fixed = {checked(place, int): read_tensor(tensor) for place, tensor in _pairs(parts["fixed"])}
    if any(place not in range(len(call.tensors)) for place in fixed):
        raise Malformed("the graph has other inputs")
    read = [_constant(model, name, value) for name, value in _pairs(parts["read"])]
    guards = guards_of(module, call.names, fixed, kinds.assumed)
    guards = and_values(guards, read) if read else guards
    guards(*call.tensors)
    effects = Effects(buffers)
    example = _example(call, placeholders, guards)
    return Captured(
        module,
        expected[1],
        guards,
        (*example, *effects.inputs()),
        kinds.assumed,
        fixed,
        read,
        effects=effects,
        has_objects=bool(call.objects),
        is_stored=True,
        growing=tuple(sorted({i for i, _ in growing_axes(call)})),
    )


def _pairs(text: Any) -> Iterable[tuple[Any, Any]]:
    pairs = [tuple(checked(pair, list)) for pair in checked(text, list)]
    if any(len(pair) != 2 for pair in pairs):
        raise Malformed("the file has something other than pairs where pairs belong")
    return pairs


def _module(parts: dict[str, Any], kinds: KindsReader, model: nn.Module) -> fx.GraphModule:
    attributes: dict[str, Any] = {
        _path(name): read_tensor(tensor) for name, tensor in checked(parts["constants"], dict).items()
    }
    graph, nodes = fx.Graph(), list[fx.Node]()
    for entry in checked(parts["nodes"], list):
        node = _node(entry, graph, nodes, kinds, checked(parts["texts"], list))
        nodes.append(node)
        if node.op == "get_attr":
            attributes[str(node.target)] = _own(node, attributes, model)
    if not nodes or [node.op for node in nodes].index("output") != len(nodes) - 1:
        raise Malformed("the graph does not end with its output")
    graph.lint()
    return fx.GraphModule(attributes, graph, class_name=_name(parts["class"]))


def _own(node: fx.Node, constants: dict[str, Any], model: nn.Module) -> Tensor:
    """The tensor of a node: a constant from the file, or the model's own of the same kind as before."""
    value = constants.get(str(node.target))
    value = own_tensor(model, str(node.target)) if value is None else value
    if value is None or not _is_alike(value, node.meta.get("val")):
        raise Malformed(f"the model has no {node.target} of the dtype and shape that the graph reads")
    return value


def _is_alike(value: Tensor, kind: Any) -> bool:
    same_rank = isinstance(kind, Tensor) and kind.ndim == value.ndim
    if not same_rank or (kind.dtype, kind.device) != (value.dtype, value.device):
        return False
    return all(isinstance(size, SymInt) or size == now for size, now in zip(kind.shape, value.shape, strict=True))


def _name(text: Any) -> str:
    if not _NAME.fullmatch(checked(text, str)) or keyword.iskeyword(text):
        raise Malformed(f"the file has a name {text[:80]!r} that fxbt never writes")
    return str(text)


def _path(text: Any) -> str:
    """The name of a tensor: parts separated by dots, which may be numbers (`layers.0.weight`)."""
    parts = checked(text, str).split(".")
    if not all(part.isascii() and (_NAME.fullmatch(part) or part.isdigit()) for part in parts):
        raise Malformed(f"the file has a name {text[:80]!r} that fxbt never writes")
    return str(text)


def _node(entry: Any, graph: fx.Graph, nodes: list[fx.Node], kinds: KindsReader, texts: list[Any]) -> fx.Node:
    if type(entry) is not list or len(entry) != 8 or entry[0] not in _OPS:
        raise Malformed("the file has something other than a node where a node belongs")
    op, name, target, args, kwargs, kind, stack, trace = entry
    arguments = tuple([read_argument(argument, nodes) for argument in checked(args, list)])
    named = {_name(key): read_argument(value, nodes) for key, value in checked(kwargs, dict).items()}
    node = graph.create_node(op, _target(op, target), arguments, named, _name(name))
    if node.name != name:
        raise Malformed(f"two nodes have the name {name}")
    if kind is not None:
        node.meta["val"] = kinds.value(kind)
    if stack is not None:
        node.meta["nn_module_stack"] = _stack(_entry(texts, stack))
    if trace is not None:
        node.meta["stack_trace"] = checked(_entry(texts, trace), str)
    return node


def _target(op: str, text: Any) -> Any:
    if op == "call_function":
        return operation(text)
    if op == "get_attr":
        return _path(text)
    return _name(text)


def _entry(texts: list[Any], place: Any) -> Any:
    if not 0 <= checked(place, int) < len(texts):
        raise Malformed(f"the file has no text {place}")
    return texts[place]


def _stack(text: Any) -> dict[str, tuple[str, str]]:
    levels = [tuple(checked(level, list)) for level in checked(text, list)]
    if any(len(level) != 3 or not all(type(part) is str for part in level) for level in levels):
        raise Malformed("the file has something other than module paths where these belong")
    return {key: (path, kind) for key, path, kind in levels}


def _buffers(names: Any, model: nn.Module) -> list[Buffer]:
    known = dict(model.named_buffers())
    if any(type(name) is not str or name not in known for name in checked(names, list)):
        raise Malformed("the model has no such buffers")
    buffers = [Buffer(name, known[name]) for name in names]
    check_buffers(model, buffers)
    return buffers


def _constant(model: nn.Module, name: Any, value: Any) -> Constant:
    tensor = own_tensor(model, checked(name, str))
    if tensor is None or tensor.numel() != 1:
        raise Malformed(f"the model has no one-element tensor {name[:80]}")
    return Constant(name, tensor, checked(value, int))


def _check_inputs(placeholders: list[fx.Node], tensors: list[Tensor]) -> None:
    kinds = [node.meta.get("val") for node in placeholders]  # the guards check their sizes
    expected = [(tensor.dtype, tensor.device, tensor.ndim) for tensor in tensors]
    if [(kind.dtype, kind.device, kind.ndim) if isinstance(kind, Tensor) else None for kind in kinds] != expected:
        raise Malformed("the graph has other inputs")


def _set_given(module: fx.GraphModule, expected: list[Any], more: int) -> None:
    """Inserts the arguments that forward returns; the last `more` values belong to buffers."""
    output = module.graph.output_node()
    values = output.args[0] if len(output.args) == 1 else None
    if not isinstance(values, tuple) or len(values) != len(expected) + more:
        raise Malformed("the graph returns another number of values")
    pairs = list(zip(values, expected, strict=False))
    if any((type(value) is Given) is not (type(old) is Given) for value, old in pairs):
        raise Malformed("the graph returns other arguments")
    output.args = ((*(old if type(value) is Given else value for value, old in pairs), *values[len(expected) :]),)
    module.recompile()


def _example(call: Call, placeholders: list[fx.Node], guards: Any) -> tuple[Tensor, ...]:
    """The call's tensors, with dynamic axes of size one enlarged, as for a trace."""
    example = tuple(fresh(tensor) for tensor in call.tensors)
    larger = [_enlarged(tensor, node.meta["val"].shape) for tensor, node in zip(example, placeholders, strict=False)]
    try:
        guards(*larger)
    except AssertionError:  # keep the call's own sizes
        return example
    return tuple(larger)


def _enlarged(tensor: Tensor, sizes: Any) -> Tensor:
    result = tensor.detach()
    for axis, size in enumerate(sizes):
        if result.shape[axis] == 1 and isinstance(size, SymInt) and axis < 2:
            result = result.repeat_interleave(2, dim=axis)
    return fresh(result, tensor.requires_grad)
