"""The effects of a graph's call on the model: new values in buffers, other tensors as attributes.

A buffer that forward writes to in place is an input of the graph, and its new value an output. An attribute that each
forward sets to a tensor of its own (as `torch.nn.utils.weight_norm` sets `weight`) is only an output, once a trace has
shown that its old value is not read.
"""

from __future__ import annotations

import contextlib
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError
from ..torch_compat import preserving_version
from .call import Call
from .codes import is_torchs
from .model_state import Slot, versions

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten


@dataclass
class Buffer:
    """A buffer of the model that calls write to; `is_counted`: forward's writes increase its version."""

    name: str
    tensor: Tensor
    is_counted: bool = True


@dataclass
class Effects:
    """The buffers and attributes that calls of a graph change; its last inputs and outputs, in this order.

    Example:
        >>> values = graph(*tensors, *effects.inputs())
        >>> outputs = effects.outputs(values)
        >>> effects.put(values)
    """

    buffers: list[Buffer] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.buffers or self.slots)

    @property
    def names(self) -> list[str]:
        """The names of the buffers and attributes in the model."""
        return [*(buffer.name for buffer in self.buffers), *(slot.name for slot in self.slots)]

    def inputs(self) -> list[Tensor]:
        """Copies of the buffers, because what autograd saves of them must not change with them."""
        return [buffer.tensor.detach().clone() for buffer in self.buffers]

    def current(self) -> list[Any]:
        """The current values of buffers (copied) and attributes, which a graph would return last after the same
        call."""
        return [*self.inputs(), *(slot.value for slot in self.slots)]

    def outputs(self, values: Sequence[Any]) -> Sequence[Any]:
        """The values of a graph that the call returns."""
        return values[: len(values) - len(self.buffers) - len(self.slots)]

    def put(self, values: Sequence[Any]) -> None:
        """Stores the last of a graph's values in the model."""
        new = values[len(self.outputs(values)) :]
        for buffer, value in zip(self.buffers, new[: len(self.buffers)], strict=True):
            _write(buffer, value)
        for slot, value in zip(self.slots, new[len(self.buffers) :], strict=True):
            slot.value = value

    def note(self, tensors: Sequence[Tensor], before: Sequence[Tensor], counted: Sequence[int]) -> None:
        """Learns from a run of the original which of its writes torch counts.

        `before` and `counted` are the values and versions of the model's `tensors` before that run.

        Raises:
            CaptureError: it wrote to tensors other than these buffers.
        """
        known = {id(buffer.tensor): buffer for buffer in self.buffers}
        for tensor, value, old, new in zip(tensors, before, counted, versions(tensors), strict=True):
            if id(tensor) in known:
                known[id(tensor)].is_counted = old != new
            elif old != new or not _equal(tensor, value):
                raise CaptureError(
                    "forward writes in place to a tensor of the model, but its trace does not show the write"
                )

    def check_apart(self, values: Sequence[Any]) -> None:
        """Raises `CaptureError` if forward's results or attributes share memory with the buffers."""
        left = [*values, *(slot.value for slot in self.slots)]
        if self.hold(value for value in left if isinstance(value, Tensor)):
            raise CaptureError(f"forward returns memory that it writes in place to ({', '.join(self.names)})")

    def hold(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of these tensors shares memory with the buffers."""
        memory = {memory_of(buffer.tensor) for buffer in self.buffers}
        return bool(memory) and any(memory_of(tensor) in memory for tensor in tensors)

    def rebind(self, pairs: Mapping[int, Tensor]) -> None:
        """From now on writes to the tensors in `pairs`, which replace others (by their id)."""
        for buffer in self.buffers:
            buffer.tensor = pairs.get(id(buffer.tensor), buffer.tensor)

    @contextlib.contextmanager
    def attributes_kept(self) -> Iterator[None]:
        """Runs a block and then restores the attributes."""
        with kept(self.slots):
            yield


def _write(buffer: Buffer, value: Tensor) -> None:
    with torch.no_grad(), contextlib.ExitStack() as stack:
        if not buffer.is_counted:
            stack.enter_context(preserving_version(buffer.tensor))
        buffer.tensor.copy_(value)


def _equal(tensor: Tensor, value: Tensor) -> bool:
    return torch.equal(tensor, value) or bool((tensor.isnan() & value.isnan()).eq(tensor != value).all())


@contextlib.contextmanager
def kept(slots: Sequence[Slot]) -> Iterator[None]:
    """Runs a block and then restores these attributes."""
    values = [slot.value for slot in slots]
    try:
        yield
    finally:
        for slot, value in zip(slots, values, strict=True):
            slot.value = value


# Buffers


def written_names(program: ExportedProgram) -> list[str]:
    """The buffers that a program without in-place writes has new values of, in the order of its outputs."""
    from torch.export.graph_signature import OutputKind  # a graph from disk needs nothing of torch.export

    specs = program.graph_signature.output_specs
    return [str(spec.target) for spec in specs if spec.kind is OutputKind.BUFFER_MUTATION]


def buffer_metas(program: ExportedProgram) -> dict[str, dict[str, Any]]:
    """The node.meta of each tensor of the model that a program takes, by name."""
    placeholders = program.graph.find_nodes(op="placeholder")
    specs = zip(placeholders, program.graph_signature.input_specs, strict=True)
    return {str(spec.target): node.meta for node, spec in specs if spec.target is not None}


def make_inputs(module: fx.GraphModule, buffers: Sequence[str], metas: Mapping[str, dict[str, Any]]) -> None:
    """Turns the attributes of these names into the graph's last inputs, in this order."""
    graph = module.graph
    last = graph.find_nodes(op="placeholder")[-1:]
    read = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    for name in buffers:
        with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes))):
            given = graph.placeholder(f"buffer_{re.sub(r'[^0-9a-zA-Z]+', '_', name)}")
        given.target, given.meta = given.name, metas[name]
        last = [given]
        if name in read:
            read[name].replace_all_uses_with(given)
            graph.erase_node(read[name])
    module.recompile()


def check_buffers(model: nn.Module, buffers: Sequence[Buffer]) -> None:
    """Raises `CaptureError` for a buffer that cannot be given a new value as forward's own write does."""
    shared = [tensor for _, tensor in _named_tensors(model)]
    for buffer in buffers:
        if type(buffer.tensor) is not Tensor or buffer.tensor.layout is not torch.strided:
            raise CaptureError(f"forward writes in place to {buffer.name}, a {type(buffer.tensor).__name__}")
        if buffer.tensor.requires_grad:
            raise CaptureError(f"forward writes in place to {buffer.name} a value that requires a gradient")
        if buffer.tensor.is_inference():
            raise CaptureError(f"forward writes in place to {buffer.name}, which was made in inference mode")
        if sum(memory_of(tensor) == memory_of(buffer.tensor) for tensor in shared) > 1:
            raise CaptureError(f"forward writes in place to {buffer.name}, whose memory another tensor shares")


def written_buffers(
    model: nn.Module, watched: Sequence[Tensor], before: Sequence[int], call: Call
) -> list[tuple[str, Tensor]]:
    """The buffers, by name, that the original wrote to in place since `watched` had the versions `before`.

    Raises:
        CaptureError: it wrote to another tensor, or to a buffer that cannot be given a new value.
    """
    written = [tensor for tensor, old, new in zip(watched, before, versions(watched), strict=True) if old != new]
    buffers = {id(tensor): name for name, tensor in model.named_buffers()}
    arguments = {memory_of(t): f"its argument {name}" for t, name in zip(call.tensors, call.names, strict=True)}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    others = [t for t in written if id(t) not in buffers or memory_of(t) in arguments]
    if others:
        named = [arguments.get(memory_of(t), parameters.get(id(t), "a tensor")) for t in others]
        raise CaptureError(f"forward writes in place to {', '.join(named)}, and a graph cannot")
    check_buffers(model, [Buffer(buffers[id(tensor)], tensor) for tensor in written])
    return [(buffers[id(tensor)], tensor) for tensor in written]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        attributes = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
        yield from ((f"{path}.{name}", value) for name, value in attributes)


def memory_of(tensor: Tensor) -> int | None:
    """The id of a tensor's memory; None if there is none to compare."""
    is_plain = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if is_plain else None


# Attributes


@contextlib.contextmanager
def unread(slots: Sequence[Slot]) -> Iterator[Callable[[], list[Tensor]]]:
    """Runs a traced forward that must set these attributes before reading them; yields a function for their values.

    Raises:
        CaptureError: at the first read of an old value, in whatever way.
    """
    stand_ins = [_Unread(slot.name) for slot in slots]

    def values() -> list[Tensor]:
        found = [slot.value for slot in slots]
        for slot, value, stand_in in zip(slots, found, stand_ins, strict=True):
            if _is_read(stand_in):
                raise CaptureError(_reads(slot.name))
            if not isinstance(value, Tensor):
                raise CaptureError(f"forward sets its attribute {slot.name} only in some calls")
        return found

    with kept(slots):
        for slot, stand_in in zip(slots, stand_ins, strict=True):
            slot.value = stand_in
        yield values


def _reads(name: str) -> str:
    return f"forward reads the value that an earlier call left in its attribute {name}, and a graph cannot"


class _Unread:
    """Replaces an old value: any use of it is refused, and recorded in case the model catches the error."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "is_read", False)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__" and _is_torchs_export(sys._getframe(1).f_code.co_filename):
            return _Unread
        return _refuse(self)


def _refuse(self: Any, *_: Any) -> Any:
    object.__setattr__(self, "is_read", True)
    raise CaptureError(_reads(object.__getattribute__(self, "name")))


def _is_read(stand_in: _Unread) -> bool:
    return bool(object.__getattribute__(stand_in, "is_read"))


def _is_torchs_export(file: str) -> bool:
    """Export itself looks at the classes of a module's attributes."""
    return is_torchs(file) and "export" in file


_SPECIAL = [name for name in dir(operator) if name.startswith("__") and callable(getattr(operator, name))]
_SPECIAL = [name for name in _SPECIAL if name not in dir(object)]
_SPECIAL += ["__bool__", "__len__", "__iter__", "__float__", "__int__", "__eq__", "__hash__", "__setattr__", "__repr__"]
_SPECIAL += [f"__r{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "matmul", "pow", "and", "or")]
for _name in _SPECIAL:
    setattr(_Unread, _name, _refuse)
