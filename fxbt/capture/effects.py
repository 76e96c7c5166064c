"""The effects of a graph's call: new values in buffers and in tensors of its arguments, other tensors as attributes.

A buffer that forward writes to in place is an input of the graph, and its new value an output. An attribute that each
forward sets to a tensor of its own (as `torch.nn.utils.weight_norm` sets `weight`) is only an output, once a trace has
shown that its old value is not read. A tensor in an object among the arguments (the keys of a static cache) that
forward writes to is an input as ever, and its new value an output.
"""

from __future__ import annotations

import contextlib
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError
from ..torch_compat import preserving_version
from .call import Call
from .codes import is_torchs
from .memory import memory_of
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


class Argument(NamedTuple):
    """A tensor in an object among a call's arguments that calls write to: where it is, and its index in the call."""

    name: str
    place: int


@dataclass(frozen=True)
class Written:
    """What a run of the original wrote to in place: buffers of the model by name, and tensors in arguments."""

    buffers: list[tuple[str, Tensor]]
    arguments: list[str]

    def unseen(self, effects: Effects) -> list[str]:
        """Those whose new values are no effects of a graph."""
        known, names = {id(buffer.tensor) for buffer in effects.buffers}, {each.name for each in effects.arguments}
        buffers = [name for name, tensor in self.buffers if id(tensor) not in known]
        return [*buffers, *(name for name in self.arguments if name not in names)]


class Watched:
    """The tensors of a model and of a call before a run of the original, to learn which of them it writes to."""

    def __init__(self, tensors: Sequence[Tensor], call: Call) -> None:
        self.live = call.tensors
        self._names, self._held = call.names, call.held
        self._tensors = [*tensors, *call.tensors]
        self._before = versions(self._tensors)

    def written(self, model: nn.Module) -> Written:
        """What the original wrote to in place since.

        Raises:
            CaptureError: it wrote to another tensor, or to a buffer that cannot be given a new value.
        """
        pairs = zip(self._tensors, self._before, versions(self._tensors), strict=True)
        written = {id(tensor): tensor for tensor, old, new in pairs if old != new}
        arguments = [(n, t) for i, (n, t) in enumerate(zip(self._names, self.live, strict=True)) if i in self._held]
        of_objects = {id(tensor): name for name, tensor in arguments if id(tensor) in written}
        others = [tensor for key, tensor in written.items() if key not in of_objects]
        return Written(self._buffers(model, others), list(of_objects.values()))

    def _buffers(self, model: nn.Module, written: list[Tensor]) -> list[tuple[str, Tensor]]:
        buffers = {id(tensor): name for name, tensor in model.named_buffers()}
        arguments = {memory_of(t): f"its argument {name}" for t, name in zip(self.live, self._names, strict=True)}
        parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        others = [t for t in written if id(t) not in buffers or memory_of(t) in arguments]
        if others:
            named = [arguments.get(memory_of(t), parameters.get(id(t), "a tensor")) for t in others]
            raise CaptureError(f"forward writes in place to {', '.join(named)}, and a graph cannot")
        check_buffers(model, [Buffer(buffers[id(tensor)], tensor) for tensor in written])
        return [(buffers[id(tensor)], tensor) for tensor in written]


@dataclass
class Effects:
    """The buffers and attributes that calls of a graph change; its last inputs and outputs, in this order. The very
    last outputs are the new values of tensors in arguments.

    Example:
        >>> values = graph(*tensors, *effects.inputs())
        >>> outputs = effects.outputs(values)
        >>> effects.put(values, tensors)
    """

    buffers: list[Buffer] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    arguments: list[Argument] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.buffers or self.slots or self.arguments)

    @property
    def names(self) -> list[str]:
        """The names of the buffers and attributes in the model, and the places of the arguments."""
        written = [*(buffer.name for buffer in self.buffers), *(slot.name for slot in self.slots)]
        return [*written, *(argument.name for argument in self.arguments)]

    def inputs(self) -> list[Tensor]:
        """Copies of the buffers, because what autograd saves of them must not change with them."""
        return [buffer.tensor.detach().clone() for buffer in self.buffers]

    def current(self, tensors: Sequence[Tensor] = ()) -> list[Any]:
        """The current values of buffers (copied), attributes and the call's `tensors`, which a graph would return last
        after the same call."""
        slots = [slot.value for slot in self.slots]
        return [*self.inputs(), *slots, *(tensors[argument.place] for argument in self.arguments)]

    def outputs(self, values: Sequence[Any]) -> Sequence[Any]:
        """The values of a graph that the call returns."""
        return values[: len(values) - len(self.buffers) - len(self.slots) - len(self.arguments)]

    def apart(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A call's tensors for a run that nobody is to see: those that it writes to in memory of their own."""
        apart = list(tensors)
        for _, place in self.arguments:
            apart[place] = tensors[place].detach().clone()
        return apart

    def returned(self, values: Sequence[Any], tensors: Sequence[Tensor]) -> Sequence[Any]:
        """`outputs(values)`, none of them in memory of the call's `tensors` that is written to."""
        outputs = self.outputs(values)
        written = {memory_of(tensors[place]) for _, place in self.arguments}
        if not written:
            return outputs
        return [v.clone() if isinstance(v, Tensor) and memory_of(v) in written else v for v in outputs]

    def put(self, values: Sequence[Any], tensors: Sequence[Tensor] = ()) -> None:
        """Stores the last of a graph's values in the model and in the call's `tensors`."""
        new = iter(values[len(self.outputs(values)) :])
        for buffer in self.buffers:
            _write(buffer, next(new))
        for slot in self.slots:
            slot.value = next(new)
        self._put_into(tensors, new)

    def _put_into(self, tensors: Sequence[Tensor], new: Iterator[Tensor]) -> None:
        pairs = [(tensors[place], next(new)) for _, place in self.arguments]
        left = [(tensor, value) for tensor, value in pairs if value is not tensor]  # others are written to already
        written = {memory_of(tensor) for tensor, _ in pairs}
        # A value may be what another of the tensors held.
        left = [(tensor, value.clone() if memory_of(value) in written else value) for tensor, value in left]
        for tensor, value in left:
            tensor.copy_(value)

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

    def check_apart(self, values: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """Raises `CaptureError` if forward's results or attributes share memory with the buffers, or with the call's
        tensors that it writes to."""
        left = [*values, *(slot.value for slot in self.slots)]
        written = {memory_of(tensors[place]) for _, place in self.arguments}
        found = [memory_of(value) for value in left if isinstance(value, Tensor)]
        if not written.union(memory_of(buffer.tensor) for buffer in self.buffers).isdisjoint(found):
            raise CaptureError(f"forward returns memory that it writes in place to ({', '.join(self.names[:3])})")

    def check_others(self, before: Call, after: Sequence[Tensor]) -> None:
        """Raises `CaptureError` if a run changed other tensors of a call's objects than these arguments."""
        others = before.held.difference(place for _, place in self.arguments)
        for name in [before.names[i] for i in others if not _equal(before.tensors[i], after[i])][:1]:
            raise CaptureError(f"forward writes in place to its argument {name}, but its trace does not show the write")

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one of a call's tensors shares memory with the buffers, or with another one that is written to."""
        if not (self.buffers or self.arguments):
            return False
        memory = list(map(memory_of, tensors))
        own = {memory_of(buffer.tensor) for buffer in self.buffers}
        written = {memory[place] for _, place in self.arguments}
        is_shared = len(written) < len(self.arguments) or sum(each in written for each in memory) > len(written)
        return is_shared or not own.isdisjoint(memory)

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


def written_arguments(program: ExportedProgram, names: Sequence[str]) -> list[Argument]:
    """The inputs, called `names`, that a program without in-place writes has new values of, in the order of outputs."""
    from torch.export.graph_signature import OutputKind

    places = {name: place for place, name in enumerate(program.graph_signature.user_inputs)}
    specs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_INPUT_MUTATION]
    return [Argument(names[place], place) for place in (places[str(spec.target)] for spec in specs)]


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


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
    for path, module in model.named_modules():
        attributes = [(name, value) for name, value in vars(module).items() if isinstance(value, Tensor)]
        yield from ((f"{path}.{name}", value) for name, value in attributes)


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
