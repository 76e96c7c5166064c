"""torch.export -> `Captured`: a flat, functional FX graph of ATen ops with dynamic shapes and guards."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec

from ..errors import CaptureError
from ..torch_compat import SIZES_LOG, LazyGraphModule, dynamo_config, export_trace, fx_config, pytree
from . import outputs as forms
from . import own_autograd
from .attempts import Attempt, Axes, attempts, number_indices
from .caches import appended, same_lengths
from .call import Call
from .captured import Captured
from .checkpointing import mark_blocks
from .code_later import code_written_later
from .constant_inputs import Constants, constant, knowing
from .containers import Arguments, Given, named_leaves
from .effects import (
    Buffer,
    Effects,
    buffer_metas,
    check_buffers,
    make_inputs,
    unread,
    written_arguments,
    written_names,
)
from .equal_layers import EqualLayers
from .functional import functional
from .guards import and_values, assumptions, erase_asserts, guards_of
from .isolated import leaving_no_hooks
from .model_state import HOOKS, ModelState, Slot
from .regions import inline_regions
from .size_scalars import Constant, Scalars
from .stand_ins import patched
from .trace_errors import is_user_code
from .twins import subclass
from .unrolled_loops import refused
from .value_branches import Answer, Followed

logger = logging.getLogger("fxbt")
_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, Given)
_LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass
class _Outputs:
    """What the traced forward returned, recorded during the trace."""

    spec: pytree.TreeSpec | None = None
    constants: dict[int, Any] = field(default_factory=dict)  # index among the leaves -> value
    originals: dict[str, Tensor] = field(default_factory=dict)  # the model's buffers
    read: list[Constant] = field(default_factory=list)  # constants whose value is part of the graph
    replaced: set[str] = field(default_factory=set)  # buffers that forward replaces by other tensors
    copied: int = 0  # layers that were not traced


def capture_export(
    model: nn.Module,
    call: Call,
    example: tuple[Tensor, ...],
    run: Callable[..., Any],
    varied: Axes = frozenset(),
    slots: Sequence[Slot] = (),
) -> Captured:
    """The most general graph that torch.export gives for a call of `run`, which acts as the model's forward.

    Raises:
        Exception: the most telling error of all attempts; `capture` turns it into a `CaptureError`.
    """
    errors: list[Exception] = []
    for attempt in attempts(model, call, example, varied, errors):
        try:
            captured = _export(model, call, attempt, run, slots)
            captured.guards(*example)
            return captured
        except CaptureError:
            raise
        except Exception as error:  # the next attempt asks for less
            errors.append(error)
    # The first error is the most telling one, unless it is a guard that the example itself violates.
    raise next((error for error in errors if not isinstance(error, AssertionError)), errors[0])


def _export(model: nn.Module, call: Call, attempt: Attempt, run: Callable[..., Any], slots: Sequence[Slot]) -> Captured:
    outputs = _Outputs(originals=dict(model.named_buffers()))
    tensors = attempt.tensors
    fixed = {i: tensors[i] for i in attempt.fixed}
    # A GraphModule's class belongs to its own graph, and torch.export reads the graph from it.
    kind = nn.Module if isinstance(model, fx.GraphModule) else type(model)
    # Hooks on the model itself run around its forward as usual, graph or not.
    attributes = {**vars(model), **{kind: OrderedDict() for kind in HOOKS}}
    traced = [replace(slot, attributes=attributes) if slot.attributes is vars(model) else slot for slot in slots]
    forward = _flat_forward(call, outputs, run, ModelState(model), fixed, attempt.answers, traced)
    flat = object.__new__(subclass(kind, {"forward": forward}))
    object.__setattr__(flat, "__dict__", attributes)
    numbers = number_indices(call)
    dims = [
        {axis: Dim.AUTO for axis in range(t.ndim) if t.shape[axis] > 1 and attempt.frees(i, axis)}
        if i not in fixed
        else {}
        for i, t in enumerate(tensors)
    ]
    dims = [{0: Dim.AUTO} if i in numbers and tensors[i].ndim else axes for i, axes in enumerate(dims)]
    # Size-oblivious: one graph also serves size one, unless the model asks for it. torch's cache of op results on
    # symbolic sizes costs more than it saves: MiniLM was ready in 4.8 s with it, 3.9 s without (medians of 3).
    with (
        fx_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        dynamo_config.patch(fake_tensor_cache_enabled=False),
        warnings.catch_warnings(),
        _quiet(),
        patched(),
        knowing() if fixed else contextlib.nullcontext(),
    ):
        warnings.simplefilter("ignore")
        with code_written_later(), leaving_no_hooks():
            program = torch.export.export(flat, tensors, strict=False, dynamic_shapes=(tuple(dims),) if dims else None)
        program = functional(program, call.names, call.held)
    effects, metas = _effects(program, outputs, slots, call), buffer_metas(program)
    module = _flat_module(program, model, call, outputs, effects)
    assert outputs.spec is not None
    assumed = assumptions(module)
    guards = guards_of(module, call.names, fixed, assumed)
    if outputs.read:
        guards = and_values(guards, outputs.read)
    check_buffers(model, effects.buffers)
    make_inputs(module, [buffer.name for buffer in effects.buffers], metas)
    return Captured(
        module,
        outputs.spec,
        guards,
        (*tensors, *effects.inputs()),
        assumed,
        fixed,
        outputs.read,
        effects=effects,
        copied=outputs.copied,
        has_objects=bool(call.objects),
        growing=appended(call, effects),
    )


def _effects(program: ExportedProgram, outputs: _Outputs, slots: Sequence[Slot], call: Call) -> Effects:
    """What a program without in-place writes changes in the model and in the call's objects."""
    written = written_names(program)
    if replaced := [name for name in written if name in outputs.replaced]:
        raise CaptureError(f"forward replaces {', '.join(replaced)} by another tensor, and a graph cannot")
    if decides := [constant.name for constant in outputs.read if constant.name in written]:
        raise CaptureError(f"forward branches on the value of {', '.join(decides)}, which it also writes in place")
    arguments = written_arguments(program, call.names)
    if shared := [name for name, place in arguments if place in call.shared]:
        raise CaptureError(f"forward writes in place to its argument {shared[0]}, whose memory another tensor shares")
    return Effects([Buffer(name, outputs.originals[name]) for name in written], list(slots), arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from printing the graph so far when an attempt fails; the error says enough."""

    def is_wanted(record: logging.LogRecord) -> bool:
        return "Unable to find user code" not in str(record.msg)

    log = logging.getLogger(SIZES_LOG)
    log.addFilter(is_wanted)
    try:
        with mock.patch.object(export_trace, "print", lambda *_, **__: None, create=True):
            yield
    finally:
        log.removeFilter(is_wanted)


def _flat_forward(
    call: Call,
    outputs: _Outputs,
    run: Callable[..., Any],
    state: ModelState,
    fixed: dict[int, Tensor],
    answers: tuple[Answer, ...],
    slots: Sequence[Slot],
) -> Callable[..., tuple[Any, ...]]:
    numbers = number_indices(call)

    def forward(self: nn.Module, *tensors: Tensor) -> tuple[Any, ...]:
        _share_batch([tensor for i, tensor in enumerate(tensors) if i not in numbers])
        _share_lengths(tensors, same_lengths(call))
        tensors = tuple(constant(fixed[i]) if i in fixed else tensor for i, tensor in enumerate(tensors))
        args, kwargs = call.rebuild(tensors)
        arguments = Arguments(args, kwargs)
        with (
            refused(tensors),
            own_autograd.refused(tensors, [*self.parameters(), *self.buffers()], is_user_code),
            Constants() if fixed else contextlib.nullcontext(),
            Followed(answers, is_user_code),
            Scalars(self, outputs.originals) as scalars,
            unread(slots) as values_left,
            EqualLayers(self, lambda: len(scalars.read), may_copy=not (fixed or answers or slots)) as equal,
        ):
            buffers = dict(self.named_buffers())
            result = arguments.seen_in(run(self, *args, **kwargs))
            left = values_left()
            equal.check()
        outputs.read, outputs.copied = scalars.read, equal.copied
        outputs.replaced = {name for name, value in self.named_buffers() if value is not buffers.get(name)}
        flat, outputs.spec = forms.flatten(result)
        _check_outputs(result, flat)
        if kept := [type(value).__name__ for value in forms.plain_objects(result) if state.knows(value)]:
            raise CaptureError(
                f"forward returns a {kept[0]} that the model keeps, but a graph would return another object"
            )
        if around := [type(value).__name__ for value in forms.plain_objects(result) if arguments.is_inside(value)]:
            raise CaptureError(f"forward puts an argument into a new {around[0]}, but a graph would put a copy there")
        outputs.constants = {i: leaf for i, leaf in enumerate(flat) if isinstance(leaf, _CONSTANTS)}
        return *(leaf for leaf in flat if not isinstance(leaf, _CONSTANTS)), *left

    return forward


def _share_batch(tensors: Sequence[Tensor]) -> None:
    """Gives inputs of equal batch size one symbol (a guard): sizes derived from two symbols could not be compared."""
    first: dict[int, Any] = {}
    for tensor in tensors:
        if tensor.ndim and isinstance(tensor.shape[0], SymInt):
            batch = first.setdefault(tensor.shape[0].node.hint, tensor.shape[0])
            torch._check(tensor.shape[0] == batch)


def _share_lengths(tensors: Sequence[Tensor], groups: list[list[tuple[int, int]]]) -> None:
    """Gives tensors that grow together one symbol for their length (a guard), because no operation compares them."""
    for (first, axis), *others in groups:
        for other, its_axis in others:
            torch._check(tensors[other].shape[its_axis] == tensors[first].shape[axis])


def _check_outputs(result: Any, flat: list[Any]) -> None:
    known = (*_CONSTANTS, Tensor, SymInt, SymFloat, SymBool)
    unknown = [leaf for leaf in flat if not isinstance(leaf, known)]
    if not unknown:
        return
    places = [place for place, leaf in named_leaves(result, "output") if leaf is unknown[0]]
    kind = type(unknown[0]).__name__
    place = places[0] if places else "an attribute of an output"
    raise CaptureError(
        f"{place} holds a {kind}, which a graph cannot return; return tensors, or tuples, lists or dicts of them"
    )


def _flat_module(
    program: ExportedProgram, model: nn.Module, call: Call, outputs: _Outputs, effects: Effects
) -> fx.GraphModule:
    inline_regions(program.graph_module)
    mark_blocks(program.graph_module)
    graph = program.graph
    attributes: dict[str, Any] = {
        node.target: getattr(program.graph_module, node.target) for node in graph.nodes if node.op == "get_attr"
    }
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = iter(call.names)
    with graph.inserting_after(placeholders[-1] if placeholders else None):
        for node, spec in reversed(list(zip(placeholders, program.graph_signature.input_specs, strict=True))):
            if spec.kind is InputKind.USER_INPUT:
                continue
            if spec.kind not in _LIFTED or spec.target is None:
                raise CaptureError(f"the graph takes {spec.arg}, which is not a tensor")
            attributes[spec.target] = _attribute(model, spec.target, program)
            weight = graph.create_node("get_attr", spec.target)
            weight.meta = node.meta
            node.replace_all_uses_with(weight)
            graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        node.target = re.sub(r"\W+", "_", next(names)).strip("_")
        node._rename(node.target)
    _set_outputs(graph, program.graph_signature.output_specs, outputs.constants, effects)
    module = LazyGraphModule(attributes, graph, class_name=type(model).__name__)
    module.meta["fxbt_asserted"] = erase_asserts(graph)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _attribute(model: nn.Module, path: str, program: ExportedProgram) -> Tensor:
    """The original's own tensor of that name; literals of forward exist only in the program."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, Tensor) else program.constants[path]


def _set_outputs(graph: fx.Graph, specs: list[OutputSpec], constants: dict[int, Any], effects: Effects) -> None:
    """Inserts constants at their places, and moves new values of buffers and arguments to the end."""
    output = graph.output_node()
    of_kind: dict[OutputKind, list[Any]] = {}
    for spec, value in zip(specs, output.args[0], strict=True):  # type: ignore[arg-type]
        of_kind.setdefault(spec.kind, []).append(value)
    returned = of_kind.get(OutputKind.USER_OUTPUT, [])
    count = len(returned) - len(effects.slots)
    values = iter(returned[:count])
    result = [constants[i] if i in constants else next(values) for i in range(count + len(constants))]
    buffers, arguments = (
        of_kind.get(kind, []) for kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    )
    output.args = ((*result, *buffers, *returned[count:], *arguments),)
