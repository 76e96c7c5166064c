"""Original model + `Call` -> `Captured`: a flat, functional FX graph of ATen ops with dynamic shapes and guards."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import math
import re
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import CaptureError, line_at
from ..torch_compat import (
    SIZES_LOG,
    GuardOnDataDependentSymNode,
    PythonPrinter,
    ShapeEnv,
    dynamo_config,
    export_trace,
    fake_tensor,
    free_unbacked_symbols,
    fx_config,
    pytree,
)
from . import outputs as forms
from . import own_autograd
from .call import Call
from .checkpointing import mark_blocks
from .codes import is_model_code
from .constant_inputs import Constants, constant, knowing
from .containers import Arguments, Given, named_leaves
from .effects import Buffer, Effects, buffer_metas, check_buffers, make_inputs, unread, written_names
from .functional import functional
from .model_state import HOOKS, ModelState, Slot, preserved
from .regions import inline_regions
from .settings import numpy_unmoved
from .size_scalars import Constant, Scalars
from .stand_ins import patched
from .surroundings import Surroundings
from .unrolled_loops import refused
from .value_branches import Answer, Followed, Noted

logger = logging.getLogger("fxbt")
aten = torch.ops.aten

Axes = frozenset[tuple[int, int]]  # of inputs: (which input, which axis)

TRACERS = ("auto", "export", "hf-fx")

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, Given)
_ASSERTS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
_LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_VALUES_READ = (GuardOnDataDependentSymNode, fake_tensor.DataDependentOutputException)
_VALUES_NEEDED = (
    "the model's Python goes by a number that only the values of tensors give, and a graph knows their shapes alone; "
    "compute it with tensor operations (torch.where instead of if), or pass it as a number"
)
_ASKING_LOOP = "a loop asks the values of tensors at every step whether to go on; a graph has a fixed number of steps"
_MANY_SIZES = 256  # of a call, at most, are compared at every call


@dataclass
class Captured:
    """A captured graph. Its placeholders are the call's tensors in order; its output is a flat tuple of values.

    Those of its `effects` on the model come after both.
    """

    module: fx.GraphModule
    out_spec: pytree.TreeSpec
    guards: Callable[..., None]  # guards(*tensors) raises AssertionError naming the condition that does not hold
    example: tuple[Tensor, ...]  # of all placeholders
    read: list[Constant] = field(default_factory=list)  # tensors of the model whose values the guards compare
    seconds: float = 0.0
    effects: Effects = field(default_factory=Effects)


@dataclass
class _Outputs:
    """What the traced forward returned, noted while it was traced."""

    spec: pytree.TreeSpec | None = None
    constants: dict[int, Any] = field(default_factory=dict)  # position among the leaves -> value
    originals: dict[str, Tensor] = field(default_factory=dict)  # the model's buffers
    read: list[Constant] = field(default_factory=list)  # those whose value is part of the graph
    replaced: set[str] = field(default_factory=set)  # those in whose places other tensors stand after it


def capture(
    model: nn.Module,
    call: Call,
    tracer: str = "auto",
    *,
    rehearse: bool = True,
    varied: Axes = frozenset(),
    around: Surroundings | None = None,
) -> Captured:
    """Captures `model` as `call` calls it, under the caller's grad mode and autocast and the model's training flags.

    `rehearse` runs the model beforehand, for models that make tensors at their first call, and to see whether it
    changes its attributes at every call; a caller that just saw a call change nothing can save that.
    `varied` are axes past the second of inputs of four dims and more, as (input, axis), that are dynamic too. For all
    of them that would take minutes for some vision models (window attention), and hide what a head's size is.
    The model's attributes, and its surroundings (`around`), are left as they were before tracing, whatever happens.
    Raises `CaptureError` with the reason and the line of the model's code where it stopped.

    Example:
        >>> captured = capture(model, make_call(model, input_ids=ids, attention_mask=mask))
        >>> outputs = captured.module(ids, mask)
    """
    start = time.perf_counter()
    _refuse_scripted(model)
    kept = contextlib.nullcontext() if around is None else around.kept()
    with _plain_modes(), preserved(model), numpy_unmoved(), kept:
        example = tuple(_fresh(tensor) for tensor in call.tensors)
        slots = _rehearse(model, call, example, around) if rehearse else []
        state = ModelState(model)
        try:
            captured = _capture(model, call, example, tracer, varied, slots)
        except CaptureError:
            raise
        except Exception as error:
            raise _capture_error(error) from error
        finally:
            state.restore()
    captured.seconds = time.perf_counter() - start
    return captured


def _refuse_scripted(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"{path or 'the model'} is a TorchScript module, which has no Python to trace")


def twin(model: nn.Module, namespace: dict[str, Any]) -> Any:
    """An object of a subclass of the model's class that shares the model's `__dict__`: one state, two classes."""
    return share(model, _subclass(type(model), namespace))


def _subclass(base: Any, namespace: dict[str, Any]) -> Any:
    # Libraries keep registries by class name: transformers finds by it what outputs a model can record.
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base)(base.__name__, (base,), {**names, **namespace})


def share(model: nn.Module, kind: type) -> Any:
    """An object of class `kind` whose `__dict__` is the model's."""
    other: Any = object.__new__(kind)
    object.__setattr__(other, "__dict__", model.__dict__)
    return other


def _capture(
    model: nn.Module, call: Call, example: tuple[Tensor, ...], tracer: str, varied: Axes, slots: list[Slot]
) -> Captured:
    if tracer == "hf-fx":
        if slots:
            raise CaptureError(f"forward changes attributes of the model ({slots[0].name}); a graph would not")
        return _capture_hf_fx(model, call, example)
    return _capture_export(model, call, example, type(model).forward, varied, slots)


def _capture_export(
    model: nn.Module,
    call: Call,
    example: tuple[Tensor, ...],
    run: Callable[..., Any],
    varied: Axes = frozenset(),
    slots: Sequence[Slot] = (),
) -> Captured:
    errors: list[Exception] = []
    for attempt in _attempts(model, call, example, varied, errors):
        try:
            captured = _export(model, call, attempt, run, slots)
            captured.guards(*example)
            return captured
        except CaptureError:
            raise
        except Exception as error:  # the next attempt asks for less
            errors.append(error)
    # The first error tells most, if it is no guard that the example itself does not fulfil.
    raise next((error for error in errors if not isinstance(error, AssertionError)), errors[0])


@dataclass(frozen=True)
class _Attempt:
    """An example, and how general a graph is asked for."""

    tensors: tuple[Tensor, ...]
    free_rank: int  # up to which rank inputs are dynamic in all dims rather than the first two
    varied: Axes = frozenset()  # further axes that are dynamic
    answers: tuple[Answer, ...] = ()  # to Python's questions for values, which the graph asserts
    fixed: frozenset[int] = frozenset()  # inputs whose values are constants of the graph, with a guard

    def frees(self, place: int, axis: int) -> bool:
        """Whether an axis of an input is dynamic."""
        return self.tensors[place].ndim <= self.free_rank or axis < 2 or (place, axis) in self.varied


def _attempts(
    model: nn.Module, call: Call, example: tuple[Tensor, ...], varied: Axes, errors: list[Exception]
) -> Iterator[_Attempt]:
    """What to try, most general first; `errors` are those of the attempts so far."""
    larger = [example]
    # An axis of size one is taken for a constant, so that it is made larger where the model agrees. Beside a cache it
    # is one token's step, whose graph needs no mask.
    inputs = [i for i in range(len(example)) if i not in _indices(call)]
    for axes in ((0,),) if call.past else ((0,), (0, 1)):
        enlarged = _enlarge(example, axes, inputs)
        is_new = enlarged is not None and all(_shapes(enlarged) != _shapes(tensors) for tensors in larger)
        if enlarged is not None and is_new and _accepts(model, call, enlarged):
            larger.insert(0, enlarged)
    for tensors in larger:
        if varied or any(tensor.ndim == 3 for tensor in tensors):
            yield _Attempt(tensors, 3, varied)
        yield _Attempt(tensors, 2)
    if not _reads_values(errors[0]):
        return
    for tensors in larger:
        with Noted(_is_user_code) as noted:
            _run(model, call, tensors)
        loop = noted.loop()
        answers = () if loop else tuple(noted.answers)
        if answers:
            errors.clear()  # those questions are answered now
            yield _Attempt(tensors, 2, answers=answers)
    sizes = frozenset(i for i, tensor in enumerate(example) if _may_hold_sizes(tensor))
    if sizes:
        yield _Attempt(example, 3, varied, answers, sizes)
    if loop:
        raise CaptureError(_ASKING_LOOP, line_at(*loop))


def _shapes(tensors: tuple[Tensor, ...]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _may_hold_sizes(tensor: Tensor) -> bool:
    """Whether this looks like sizes of images or lengths of sounds: few integers, at most three for each item."""
    is_table = tensor.ndim == 1 or (tensor.ndim == 2 and tensor.shape[1] <= 3)
    return is_table and 0 < tensor.numel() <= _MANY_SIZES and not (tensor.is_floating_point() or tensor.is_complex())


def _reads_values(error: Exception) -> bool:
    """Whether it was Python's looking at values of tensors that a trace failed on."""
    return any(isinstance(cause, _VALUES_READ) for cause in _causes(error))


def _indices(call: Call) -> set[int]:
    """Which of a call's tensors stand for numbers."""
    return {number.index for number in call.numbers.values()}


def _enlarge(example: tuple[Tensor, ...], axes: tuple[int, ...], inputs: list[int]) -> tuple[Tensor, ...] | None:
    enlarged = list(example)
    for axis in axes:
        # Beyond the batch, only the axis of 2-D inputs (tokens) is known to be a length and no feature.
        having = [i for i in inputs if (enlarged[i].ndim > axis if axis == 0 else enlarged[i].ndim == 2)]
        if not having or any(enlarged[i].shape[axis] != 1 for i in having):
            continue
        for i in having:
            enlarged[i] = _fresh(enlarged[i].repeat_interleave(2, dim=axis), example[i].requires_grad)
    changed = any(new is not old for new, old in zip(enlarged, example, strict=True))
    return tuple(enlarged) if changed else None


def _accepts(model: nn.Module, call: Call, tensors: tuple[Tensor, ...]) -> bool:
    try:
        _run(model, call, tensors)
    except Exception:  # whatever it is, this example is not for this model
        return False
    return True


def _rehearse(model: nn.Module, call: Call, example: tuple[Tensor, ...], around: Surroundings | None) -> list[Slot]:
    """Runs the model until it is at rest; returns the attributes that it sets to another tensor each time.

    They hold what they held. What is beside the model's attributes, the call before this one has seen already, so that
    the first run must leave it alone.
    """
    first = ModelState(model)
    try:
        _run(model, call, _anew(example))
        if around is not None and (written := around.changed()):
            raise CaptureError(f"forward writes to {', '.join(written[:3])} beside its attributes; a graph would not")
        slots = [] if first.holds() else _slots(model, call, example)
    except Exception:
        first.restore()
        raise
    first.put_back(slots)
    return slots


def _slots(model: nn.Module, call: Call, example: tuple[Tensor, ...]) -> list[Slot]:
    """The attributes that the second run and those after it set to another tensor; nothing else may change then."""
    second = ModelState(model)
    _run(model, call, _anew(example))
    if second.holds():
        return []
    third = ModelState(model, slots := second.replaced())
    _run(model, call, _anew(example))
    if third.holds():
        return slots
    changed = "; ".join(third.changed()[:3])
    raise CaptureError(f"forward changes attributes of the model ({changed}); a graph would not")


def _anew(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same in other tensors, as each call has its own: a model that keeps its input keeps another one each time."""
    return tuple(map(_fresh, example))


def _run(model: nn.Module, call: Call, tensors: Sequence[Tensor]) -> Any:
    args, kwargs = call.rebuild(tensors)
    return model.forward(*args, **kwargs)


def _export(
    model: nn.Module, call: Call, attempt: _Attempt, run: Callable[..., Any], slots: Sequence[Slot]
) -> Captured:
    outputs = _Outputs(originals=dict(model.named_buffers()))
    tensors = attempt.tensors
    fixed = {i: tensors[i] for i in attempt.fixed}
    # A GraphModule's class is made for its own graph, and torch.export asks such modules for it.
    kind = nn.Module if isinstance(model, fx.GraphModule) else type(model)
    # Hooks on the model itself are called around its forward as ever, graph or not.
    attributes = {**vars(model), **{kind: OrderedDict() for kind in HOOKS}}
    traced = [replace(slot, attributes=attributes) if slot.attributes is vars(model) else slot for slot in slots]
    forward = _flat_forward(call, outputs, run, ModelState(model), fixed, attempt.answers, traced)
    flat = object.__new__(_subclass(kind, {"forward": forward}))
    object.__setattr__(flat, "__dict__", attributes)
    numbers = _indices(call)
    dims = [
        {axis: Dim.AUTO for axis in range(t.ndim) if t.shape[axis] > 1 and attempt.frees(i, axis)}
        if i not in fixed
        else {}
        for i, t in enumerate(tensors)
    ]
    dims = [{0: Dim.AUTO} if i in numbers and tensors[i].ndim else axes for i, axes in enumerate(dims)]
    # Size-oblivious: one graph serves size one too, wherever the model does not ask for it. torch's cache of what ops
    # give on symbolic sizes costs more than it saves: MiniLM was ready in 4.8 s with it, 3.9 s without (medians of 3).
    with (
        fx_config.patch(backed_size_oblivious=True),  # type: ignore[attr-defined]
        dynamo_config.patch(fake_tensor_cache_enabled=False),
        warnings.catch_warnings(),
        _quiet(),
        patched(),
        knowing() if fixed else contextlib.nullcontext(),
    ):
        warnings.simplefilter("ignore")
        program = torch.export.export(flat, tensors, strict=False, dynamic_shapes=(tuple(dims),) if dims else None)
        program = functional(program, call.names)
    effects, metas = _effects(program, outputs, slots), buffer_metas(program)
    module = _flat_module(program, model, call, outputs, effects)
    assert outputs.spec is not None
    guards = _guards(module, call.names, fixed)
    if outputs.read:
        guards = _also(guards, outputs.read)
    check_buffers(model, effects.buffers)
    make_inputs(module, [buffer.name for buffer in effects.buffers], metas)
    return Captured(module, outputs.spec, guards, (*tensors, *effects.inputs()), outputs.read, effects=effects)


def _effects(program: ExportedProgram, outputs: _Outputs, slots: Sequence[Slot]) -> Effects:
    """What a program without in-place writes changes in the model."""
    written = written_names(program)
    if replaced := [name for name in written if name in outputs.replaced]:
        raise CaptureError(f"forward puts another tensor in the place of {', '.join(replaced)}; a graph would not")
    if decides := [constant.name for constant in outputs.read if constant.name in written]:
        raise CaptureError(f"forward goes by the value of {', '.join(decides)}, which it writes in place to")
    return Effects([Buffer(name, outputs.originals[name]) for name in written], list(slots))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch from printing the graph so far where an attempt fails; the error says what there is to say."""

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
    numbers = _indices(call)

    def forward(self: nn.Module, *tensors: Tensor) -> tuple[Any, ...]:
        _share_batch([tensor for i, tensor in enumerate(tensors) if i not in numbers])
        tensors = tuple(constant(fixed[i]) if i in fixed else tensor for i, tensor in enumerate(tensors))
        args, kwargs = call.rebuild(tensors)
        arguments = Arguments(args, kwargs)
        with (
            refused(tensors),
            own_autograd.refused(tensors, [*self.parameters(), *self.buffers()], _is_user_code),
            Constants() if fixed else contextlib.nullcontext(),
            Followed(answers, _is_user_code),
            Scalars(self, outputs.originals) as scalars,
            unread(slots) as values_left,
        ):
            buffers = dict(self.named_buffers())
            result = arguments.seen_in(run(self, *args, **kwargs))
            left = values_left()
        outputs.read = scalars.read
        outputs.replaced = {name for name, value in self.named_buffers() if value is not buffers.get(name)}
        flat, outputs.spec = forms.flatten(result)
        _check_outputs(result, flat)
        if kept := [type(value).__name__ for value in forms.plain_objects(result) if state.knows(value)]:
            raise CaptureError(f"forward returns a {kept[0]} that the model keeps; a graph would return another")
        if around := [type(value).__name__ for value in forms.plain_objects(result) if arguments.is_inside(value)]:
            raise CaptureError(f"forward puts an argument into a new {around[0]}; a graph would put a copy there")
        outputs.constants = {i: leaf for i, leaf in enumerate(flat) if isinstance(leaf, _CONSTANTS)}
        return *(leaf for leaf in flat if not isinstance(leaf, _CONSTANTS)), *left

    return forward


def _share_batch(tensors: Sequence[Tensor]) -> None:
    """Inputs of one batch size have it as one symbol (a guard): sizes derived from two could not be compared."""
    first: dict[int, Any] = {}
    for tensor in tensors:
        if tensor.ndim and isinstance(tensor.shape[0], SymInt):
            batch = first.setdefault(tensor.shape[0].node.hint, tensor.shape[0])
            torch._check(tensor.shape[0] == batch)


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
                raise CaptureError(f"the graph takes {spec.arg}, which is no tensor")
            attributes[spec.target] = _attribute(model, spec.target, program)
            weight = graph.create_node("get_attr", spec.target)
            weight.meta = node.meta
            node.replace_all_uses_with(weight)
            graph.erase_node(node)
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        node.target = re.sub(r"\W+", "_", next(names)).strip("_")
        node._rename(node.target)
    _set_outputs(graph, outputs.constants, effects)
    module = fx.GraphModule(attributes, graph, class_name=type(model).__name__)
    module.meta["fxbt_asserted"] = _erase_asserts(graph)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _attribute(model: nn.Module, path: str, program: ExportedProgram) -> Tensor:
    """The original's own tensor object of that name; literals of the forward are found in the program only."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name, None)
    return value if isinstance(value, Tensor) else program.constants[path]


def _set_outputs(graph: fx.Graph, constants: dict[int, Any], effects: Effects) -> None:
    """Puts constants in their places, and what goes to buffers, which comes first, behind what forward returns."""
    output = graph.output_node()
    returned: Any = output.args[0]
    written, returned = returned[: len(effects.buffers)], returned[len(effects.buffers) :]
    count = len(returned) - len(effects.slots)
    values = iter(returned[:count])
    result = [constants[i] if i in constants else next(values) for i in range(count + len(constants))]
    output.args = ((*result, *written, *returned[count:]),)


def _erase_asserts(graph: fx.Graph) -> list[sympy.Basic]:
    """Erases assertions. Those about input shapes are returned (they become guards); dtypes are in the call's key.

    Those about sizes that follow from values stay in the graph: a call for which they fail runs the original.
    """
    conditions = []
    for node in [node for node in graph.nodes if node.target in _ASSERTS]:
        if node.target is aten._assert_scalar.default:
            value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else node.args[0]
            if isinstance(value, SymBool) and free_unbacked_symbols(value):
                continue
            if isinstance(value, SymBool):
                conditions.append(value.node.expr)
        graph.erase_node(node)
    return conditions


# Guards


def _guards(module: fx.GraphModule, names: list[str], fixed: dict[int, Tensor]) -> Callable[..., None]:
    """A function of the call's tensors that asserts all that was assumed of their shapes and values while tracing."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    conditions: list[tuple[str, str]] = []  # python over t0, t1, ...; what to say
    size_of: dict[sympy.Symbol, tuple[str, str]] = {}
    environment: ShapeEnv | None = None
    unsettled: list[tuple[str, str, sympy.Basic]] = []
    for i, (node, name) in enumerate(zip(placeholders, names, strict=True)):
        for axis, size in enumerate(node.meta["val"].shape):
            code, text = f"t{i}.shape[{axis}]", f"{name}.shape[{axis}]"
            if not isinstance(size, SymInt):
                conditions.append((f"{code} == {size}", f"{text} == {size}"))
                continue
            environment, expression = size.node.shape_env, size.node.expr
            if isinstance(expression, sympy.Symbol) and expression not in size_of:
                size_of[expression] = (code, text)
            else:
                unsettled.append((code, text, expression))

    def printed(expression: sympy.Basic) -> tuple[str, str]:
        if expression.free_symbols - size_of.keys():
            raise CaptureError(f"shapes depend on the values of tensors ({expression})")
        written = [_print(expression, {s: size_of[s][way] for s in expression.free_symbols}) for way in (0, 1)]
        return written[0], written[1]

    for code, text in size_of.values():
        conditions.append((f"{code} >= 1", f"{text} >= 1"))  # a trace takes for granted that no size is 0
    for code, text, expression in unsettled:
        conditions.append((f"{code} == {printed(expression)[0]}", f"{text} == {printed(expression)[1]}"))
    for expression in _assumptions(module, environment, set(size_of)):
        conditions.append(printed(expression))
    for i, tensor in fixed.items():
        conditions.append((f"t{i}.tolist() == {tensor.tolist()}", f"{names[i]} == {tensor.tolist()}"))
    return _assertions(len(names), conditions)


def _assumptions(module: fx.GraphModule, environment: ShapeEnv | None, sizes: set[sympy.Symbol]) -> list[sympy.Basic]:
    """Everything the trace took for true about the sizes of inputs."""
    found = [*module.meta.pop("fxbt_asserted"), *_unsqueezed(module)]
    if environment is None:
        return found
    found += [environment.replace(guard.expr) for guard in environment.guards]
    for symbol in sizes:
        bounds = environment.var_to_range[symbol]
        found += [symbol >= bounds.lower] if bounds.lower > 0 else []
        found += [symbol <= bounds.upper] if bounds.upper < torch.iinfo(torch.int64).max // 2 else []
    return [e for e in dict.fromkeys(found) if e is not sympy.true]


def _unsqueezed(module: fx.GraphModule) -> list[sympy.Basic]:
    """A squeeze of a dynamic axis was traced as keeping it, without any guard that says so."""
    kept = []
    for node in module.graph.nodes:
        if node.target not in _SQUEEZES:
            continue
        shape = node.args[0].meta["val"].shape
        dims = node.args[1] if len(node.args) > 1 else range(len(shape))
        for dim in [dims] if isinstance(dims, int) else dims:
            if isinstance(shape[dim], SymInt):
                kept.append(sympy.Ne(shape[dim].node.expr, 1))
    return kept


def _print(expression: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    text = PythonPrinter().doprint(expression)
    for symbol, name in names.items():
        text = re.sub(rf"\b{symbol}\b", name, text)
    return text


def _assertions(count: int, conditions: list[tuple[str, str]]) -> Callable[..., None]:
    lines = [f"    if not ({code}): raise AssertionError({text!r})" for code, text in dict.fromkeys(conditions)]
    source = "\n".join([f"def guards({', '.join(f't{i}' for i in range(count))}):", "    pass", *lines])
    namespace: dict[str, Any] = {"math": math}
    exec(source, namespace)  # sizes compare at full speed, without a graph in between
    return namespace["guards"]


def _also(guards: Callable[..., None], constants: list[Constant]) -> Callable[..., None]:
    """These guards, and that tensors of the model have the values that they had."""

    def both(*tensors: Tensor) -> None:
        guards(*tensors)
        for read in constants:
            if not read.holds():
                raise AssertionError(f"{read.name} == {read.value}")

    return both


# transformers' own fx tracer (4.x)


def hf_fx_missing() -> str | None:
    """Why tracer="hf-fx" cannot be used here; None where it can."""
    try:
        from transformers.utils import fx as _  # noqa: F401
    except ImportError:
        if importlib.util.find_spec("transformers") is None:
            return 'tracer="hf-fx" needs transformers 4.x, which is not installed; use tracer="export"'
        version = importlib.metadata.version("transformers")
        return f'tracer="hf-fx" needs transformers.utils.fx, which transformers {version} does not have (4.x did); \
use tracer="export"'
    return None


def _capture_hf_fx(model: nn.Module, call: Call, example: tuple[Tensor, ...]) -> Captured:
    from transformers.utils.fx import HFTracer, get_concrete_args

    inputs = dict(zip(call.names, example, strict=True))
    if call.args or not inputs.keys() <= call.kwargs.keys():
        raise CaptureError('HFTracer takes tensors as keyword arguments only; use tracer="export"')
    fixed = {name: value for name, value in call.kwargs.items() if name not in inputs}
    _, spec = pytree.tree_flatten(_run(model, call, example))
    graph = HFTracer().trace(
        model, concrete_args={**get_concrete_args(model, list(inputs)), **fixed}, dummy_inputs=inputs
    )
    traced = fx.GraphModule(model, graph)
    traced_forward = type(traced).forward

    def run(self: nn.Module, **kwargs: Any) -> Any:
        flat = pytree.tree_leaves(traced_forward(self, **{name: kwargs[name] for name in inputs}))
        return pytree.tree_unflatten(flat, spec)

    captured = _capture_export(traced, call, example, run)
    if not _agrees_on_larger(captured, model, call, example):
        captured.guards = _only_these_shapes(example, call.names)  # HFTracer burns sizes in without saying so
    return captured


def _agrees_on_larger(captured: Captured, model: nn.Module, call: Call, example: tuple[Tensor, ...]) -> bool:
    larger = [t.repeat_interleave(2, 0) if t.ndim else t for t in example]
    larger = [t.repeat_interleave(2, 1) if t.ndim == 2 else t for t in larger]
    try:
        captured.guards(*larger)
        expected = pytree.tree_leaves(_run(model, call, larger))
        return all(map(_close, captured.module(*larger), expected))
    except Exception:  # not proven on another shape is not proven
        return False


def _close(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    return found.shape == expected.shape and torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=1e-4)


def _only_these_shapes(example: tuple[Tensor, ...], names: list[str]) -> Callable[..., None]:
    sizes = [
        (f"t{i}.shape == {tuple(t.shape)}", f"{name}.shape == {tuple(t.shape)}")
        for i, (t, name) in enumerate(zip(example, names, strict=True))
    ]
    return _assertions(len(names), sizes)


# Examples and errors


@contextlib.contextmanager
def _plain_modes() -> Iterator[None]:
    """Leaves inference mode, whose tensors cannot be traced, and keeps the caller's grad mode."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def _fresh(tensor: Tensor, requires_grad: bool | None = None) -> Tensor:
    wanted = tensor.requires_grad if requires_grad is None else requires_grad
    return tensor.detach().clone().requires_grad_(wanted)


def _capture_error(error: Exception) -> CaptureError:
    for cause in _causes(error):
        if isinstance(cause, CaptureError):
            return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if _reads_values(error):
        return CaptureError(f"{_VALUES_NEEDED} (torch: {_shortened(first)})", where(error))
    return CaptureError(f"{type(error).__name__}: {first}", where(error))


def _shortened(text: str, most: int = 200) -> str:
    """torch's first sentence, which has the expression."""
    text = re.sub(r" \((unhinted|Size-like symbols):.*", "", text)
    return text if len(text) <= most else f"{text[:most]} ..."


def where(error: BaseException) -> str:
    """The innermost line of the error's tracebacks that is neither torch's, nor Python's, nor fxbt's own."""
    for cause in reversed(list(_causes(error))):
        frames = traceback.extract_tb(cause.__traceback__)
        user = [frame for frame in frames if _is_user_code(frame.filename)]
        if user:
            return line_at(user[-1].filename, user[-1].lineno or 0)
    return ""


def _is_user_code(filename: str) -> bool:
    """Whether lines of this file can be shown to the user."""
    return not filename.startswith("<") and is_model_code(filename)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
