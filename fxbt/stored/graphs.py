"""`Captured` <-> JSON data: nodes by index, kinds of values, and what the guards assert.

The structure of the output is not written: it is the structure that the original returned for the current call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import SymInt, Tensor, fx, nn

from ..capture.attempts import fresh
from ..capture.caches import appended
from ..capture.call import Call
from ..capture.captured import Captured
from ..capture.containers import Given
from ..capture.effects import Argument, Buffer, Effects, check_buffers
from ..capture.guards import and_values, environment_of_inputs, guards_of, sizes_of_inputs
from ..capture.outputs import Values
from ..capture.size_scalars import Constant
from ..graph.record import Entry, Snapshot
from ..torch_compat import LazyGraphModule
from . import expressions
from .errors import Malformed, Unstorable, checked
from .nodes import LENGTH, NodesReader, name_in, path_in, tensor_of, written_constants, written_node
from .tensors import own_tensor, read_tensor, written_tensor
from .values import KindsReader, KindsWriter, Table, written_sizes

_NAMES = ("class", "sizes", "assumed", "fixed", "read", "buffers", "written", "constants", "kinds", "texts", "nodes")


class Drawing:
    """A graph as captured, which can still be written when rules have rewritten it: most graphs never are.

    What later changes of the model would change is written when this is made.

    Raises:
        Unstorable: it contains something that has no text in files.

    Example:
        >>> drawing = Drawing(captured, model)
        >>> compiled = pipeline.compile(captured, rules)
        >>> json.dumps(drawing.written())
    """

    def __init__(self, captured: Captured, model: nn.Module) -> None:
        effects = captured.effects
        if effects.slots:
            raise Unstorable(f"forward sets its attribute {effects.slots[0].name} to another tensor at each call")
        self._module, self._assumed = captured.module, captured.assumed
        self._before = Snapshot(captured.module.graph)
        self._as_it_is = {
            "class": type(model).__name__,
            "fixed": [[place, written_tensor(tensor.detach())] for place, tensor in captured.fixed.items()],
            "read": [[constant.name, constant.value] for constant in captured.read],
            "buffers": [buffer.name for buffer in effects.buffers],
            "written": [place for _, place in effects.arguments],
            "constants": written_constants(captured.module, model),
        }

    def written(self) -> dict[str, Any]:
        """The graph as JSON data.

        Raises:
            Unstorable: it contains something that has no text in files.
        """
        environment, writer, texts = environment_of_inputs(self._module), KindsWriter(), Table()
        places = {entry.node: place for place, entry in enumerate(self._before.entries)}
        nodes = [_written_node(entry, places, writer, texts) for entry in self._before.entries]
        return {
            **self._as_it_is,
            "sizes": written_sizes(sizes_of_inputs(self._module), environment) if environment else [],
            "assumed": [expressions.written(each) for each in self._assumed],
            "kinds": writer.kinds.entries,
            "texts": texts.entries,
            "nodes": nodes,
        }


def _written_node(entry: Entry, places: dict[fx.Node, int], writer: KindsWriter, texts: Table) -> list[Any]:
    node = entry.node
    stack = [[key, *map(str, level)] for key, level in (node.meta.get("nn_module_stack") or {}).items()]
    return [
        *written_node(entry, places, writer),
        texts.place(stack) if stack else None,
        texts.place(node.meta["stack_trace"]) if node.meta.get("stack_trace") else None,
    ]


# Reading


def read_graph(text: Any, model: nn.Module, call: Call, expected: Values, is_whole: bool = True) -> Captured:
    """Reads what `Drawing.written` gave, as a graph of `model` for a call that returns `expected` (flattened).

    Without `is_whole`, the module of the result has the inputs only.

    Raises:
        Malformed: it is not one of fxbt's graphs, or another model's.
        AssertionError: the graph is for other sizes than those of the call.
    """
    parts = checked(text, dict)
    if set(parts) != set(_NAMES):
        raise Malformed("the graph does not have the parts that this version writes")
    kinds = KindsReader(parts["kinds"], parts["sizes"], parts["assumed"], [])
    module = (_module if is_whole else _inputs)(parts, kinds, model)
    effects = Effects(_buffers(parts["buffers"], model), arguments=_arguments(parts["written"], call))
    placeholders = module.graph.find_nodes(op="placeholder")
    _check_inputs(placeholders, [*call.tensors, *(buffer.tensor for buffer in effects.buffers)])
    if is_whole:
        _set_given(module, expected[0], len(effects.buffers) + len(effects.arguments))
    fixed = {checked(place, int): read_tensor(tensor) for place, tensor in _pairs(parts["fixed"])}
    if any(place not in range(len(call.tensors)) for place in fixed):
        raise Malformed("the graph has other inputs")
    read = [_constant(model, name, value) for name, value in _pairs(parts["read"])]
    guards = guards_of(module, call.names, fixed, kinds.assumed)
    guards = and_values(guards, read) if read else guards
    guards(*call.tensors)
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
        growing=appended(call, effects),
    )


def _pairs(text: Any) -> Iterable[tuple[Any, Any]]:
    pairs = [tuple(checked(pair, list)) for pair in checked(text, list)]
    if any(len(pair) != 2 for pair in pairs):
        raise Malformed("the file has something other than pairs where pairs belong")
    return pairs


def _module(parts: dict[str, Any], kinds: KindsReader, model: nn.Module) -> fx.GraphModule:
    attributes: dict[str, Any] = {
        path_in(name): read_tensor(tensor) for name, tensor in checked(parts["constants"], dict).items()
    }
    reader, texts = NodesReader(kinds), checked(parts["texts"], list)
    for entry in checked(parts["nodes"], list):
        node = _node(entry, reader, texts)
        if node.op == "get_attr":
            attributes[str(node.target)] = tensor_of(node, attributes, model)
    return LazyGraphModule(attributes, reader.done(), class_name=name_in(parts["class"]))


def _inputs(parts: dict[str, Any], kinds: KindsReader, model: nn.Module) -> fx.GraphModule:
    """The inputs of a graph alone: all that its guards are about."""
    reader = NodesReader(kinds)
    for entry in checked(parts["nodes"], list):
        if type(entry) is list and entry[:1] == ["placeholder"]:
            reader.add(entry[:LENGTH])
    reader.graph.output(())
    return LazyGraphModule({}, reader.graph, class_name=name_in(parts["class"]))


def _node(entry: Any, reader: NodesReader, texts: list[Any]) -> fx.Node:
    if type(entry) is not list or len(entry) != LENGTH + 2:
        raise Malformed("the file has something other than a node where a node belongs")
    *rest, stack, trace = entry
    node = reader.add(rest)
    if stack is not None:
        node.meta["nn_module_stack"] = _stack(_entry(texts, stack))
    if trace is not None:
        node.meta["stack_trace"] = checked(_entry(texts, trace), str)
    return node


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


def _arguments(places: Any, call: Call) -> list[Argument]:
    found = [checked(place, int) for place in checked(places, list)]
    if len(set(found)) < len(found) or not call.held - call.shared >= set(found):
        raise Malformed("the call has no such objects with tensors of their own")
    return [Argument(call.names[place], place) for place in found]


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
    """Inserts the arguments that forward returns; the last `more` values belong to buffers and arguments."""
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
