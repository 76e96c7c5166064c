"""All private torch names that fxbt uses: whatever moves in torch is fixed here, and nowhere else.

Each comes with the reason why no public name serves. `tests/test_torch_compat.py` fails when torch moves one.
Differences between torch 2.11 and 2.14 are handled here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import sympy
import torch
import torch.fx._symbolic_trace as fx_trace
import torch.fx.experimental._config as fx_config
from torch import SymInt, Tensor

# Versions and kinds of dicts and tensors, as dynamo's guards compare them; about 30 ns each.
from torch._C._dynamo.guards import TensorGuards, dict_version

# The types of aten ops: `torch.ops.aten.add.Tensor` is one, `torch.ops.aten.add` a packet of them.
from torch._ops import OpOverload, OpOverloadPacket

# Tensors of known kind and unknown values, on which torch.export and make_fx compute.
from torch._subclasses import fake_impls, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

# The settings of `torch.set_printoptions`, which no public function returns.
from torch._tensor_str import PRINT_OPTS

# The base class of `torch.autograd.Function`, and the metaclass of both.
from torch.autograd.function import FunctionMeta, _SingleLevelFunction

# A GraphModule that writes its code at its first call: writing it takes longer than most steps on a graph.
from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule

# Symbolic sizes: what is known of them without a guard, and the errors where a guard would be needed.
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    ShapeGuard,
    SLoc,
    StatelessSymbolicContext,
    free_unbacked_symbols,
    guard_or_false,
    statically_known_true,
)

# Recomputes the values of a graph without data.
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

# Flattens arguments and outputs: torch.utils.pytree has no register_dataclass, and not every version has `LeafSpec`.
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# The functions on sizes that sympy itself lacks.
from torch.utils._sympy import functions as size_functions
from torch.utils._sympy.functions import FloorDiv, Max, Min
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges

# Raised through autograd to end a recomputation early; not a failure.
from torch.utils.checkpoint import _StopRecomputationError as StopRecomputation

if TYPE_CHECKING:
    import torch._dynamo.config as dynamo_config
    import torch.export._trace as export_trace
    from torch._decomp import decompositions
    from torch._functorch import predispatch

    EXPORTS_FLAGS: tuple[Any, str]

# What a capture needs, and nothing else: loaded when it is asked for the first time, in some 0.3 s.
_AT_A_CAPTURE = {
    "dynamo_config": "torch._dynamo.config",
    "export_trace": "torch.export._trace",  # torch.export itself loads it at its first call
    # Functions that torch decomposes by Python, which are stood in for while a model is traced.
    "decompositions": "torch._decomp.decompositions",
    # Marks of scopes (autocast, no_grad) that torch.export leaves in a graph.
    "predispatch": "torch._functorch.predispatch",
}


def __getattr__(name: str) -> Any:
    """A name of `_AT_A_CAPTURE`, or the place `EXPORTS_FLAGS` that a trace patches."""
    if name == "EXPORTS_FLAGS":
        return importlib.import_module(_AT_A_CAPTURE["export_trace"]), "_compiling_state_context"
    if name not in _AT_A_CAPTURE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = module = importlib.import_module(_AT_A_CAPTURE[name])
    return module


SIZES_LOG = "torch.fx.experimental.symbolic_shapes"  # torch's logger of guards
FAKES_LOG = "torch._subclasses.fake_tensor"

# Those that map integers to integers; torch 2.11 to 2.14 have them under these names.
SIZE_FUNCTIONS: tuple[type, ...] = tuple(
    getattr(size_functions, name)
    for name in ("FloorDiv", "CleanDiv", "CeilToInt", "FloorToInt", "TruncToInt", "IntTrueDiv", "ToFloat", "Max", "Min")
) + tuple(getattr(size_functions, name) for name in ("Mod", "PythonMod", "ModularIndexing", "PowByNatural", "Where"))

# In-place functions without Python: `F.silu(x, inplace=True)` costs two more Python frames per call.
silu, silu_, gelu_ = torch._C._nn.silu, torch._C._nn.silu_, torch._C._nn.gelu_  # type: ignore[attr-defined]

# Raises later on a device, without waiting for it: torch has no public assertion of a tensor's value in a graph.
assert_async = torch._assert_async

# Writes that autograd does not count: those by which a capture undoes its effects.
preserving_version = torch.autograd._unsafe_preserve_version_counter
set_versions: Callable[[tuple[Tensor, ...], tuple[int, ...]], None] = torch._C._autograd._unsafe_set_version_counter

# Whether autocast is on for any device: `torch.is_autocast_enabled` asks about one.
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

# Processor features: `torch.backends.cpu.get_cpu_capability()` reports neither.
is_avx512_supported: Callable[[], bool] = torch.cpu._is_avx512_supported
is_vnni_supported: Callable[[], bool] = torch.cpu._is_vnni_supported

# What a trace patches, as (owner, name).
RUN_BACKWARD = (torch.autograd, "_engine_run_backward")
_GENERATOR = "_checkpoint_without_reentrant_generator"  # from torch 2.14 on, a shim for other callers
_IMPLEMENTATION = f"{_GENERATOR}_impl"
CHECKPOINT = (
    torch.utils.checkpoint,
    _IMPLEMENTATION if hasattr(torch.utils.checkpoint, _IMPLEMENTATION) else _GENERATOR,
)
IS_COMPILING = (torch.compiler, "_is_compiling_flag")
IS_EXPORTING = (torch.compiler, "_is_exporting_flag")
NEW_PATCHER = (fx_trace, "_new_patcher")
IS_FX_TRACING = (fx_trace, "_is_fx_tracing_flag")  # torch 2.14 has one per thread, under another name
IS_FX_TRACING_OF_ALL_THREADS = hasattr(*IS_FX_TRACING)

# The class whose `apply` a trace replaces. Up to torch 2.13, `Function.apply` is Python that calls the one of its base;
# from 2.14 on it is C.
_APPLIES_IN_PYTHON = isinstance(vars(torch.autograd.Function)["apply"], classmethod)
AppliedFunction: Any = _SingleLevelFunction if _APPLIES_IN_PYTHON else torch.autograd.Function

# Calls modules while torch.export traces, and knows their paths.
ModuleStackTracer: Any = proxy_tensor._ModuleStackTracer

# The number of active `TorchFunctionMode`s; a default device is one.
count_of_function_modes: Callable[[], int] = torch._C._len_torch_function_stack


@contextlib.contextmanager
def unseen_by_modes() -> Iterator[None]:
    """Hides what this block reads of tensors from every `TorchFunctionMode`; each costs about 60 us during a trace."""
    with torch._C.DisableTorchFunction():
        yield


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Hides what this block does from a graph that is being traced."""
    with proxy_tensor.disable_proxy_modes_tracing(), unseen_by_modes():
        yield


def past_python(op: OpOverload) -> Callable[..., Any]:
    """An aten op without the Python frame in front of it."""
    return op._op


def storage_uses(storage: torch.UntypedStorage) -> int:
    """The number of tensors that share a storage."""
    return torch._C._storage_Use_Count(storage._cdata)


def saved_tensors_hooks_now() -> tuple[Any, ...]:
    """The pack and unpack hooks of the innermost `torch.autograd.graph.saved_tensors_hooks`; () if there is none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) or ()


def is_under_functorch() -> bool:
    """Whether a function transform (`torch.func.grad`, `vmap`, ...) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_looked_through() -> bool:
    """Whether someone sees each operation as it runs.

    These are compilers, tracers, modes, transforms, forward gradients, and the recording of a CUDA graph.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or count_of_function_modes()
        or is_under_functorch()
        or torch.autograd.forward_ad._current_level >= 0
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def function_apply() -> Callable[..., Any]:
    """What `Function.apply` currently calls, as a function of the class and its arguments.

    Example:
        >>> function_apply()(MyFunction, x)  # MyFunction.apply(x)
    """
    stand_in = vars(AppliedFunction).get("apply")
    return stand_in.__func__ if isinstance(stand_in, classmethod) else _apply


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return super(AppliedFunction, cls).apply(*args, **kwargs)


@contextlib.contextmanager
def watching_functions(watch: Callable[[type], None]) -> Iterator[None]:
    """Calls `watch(cls)` wherever a `torch.autograd.Function` is applied in this block, by any thread.

    A model may have stored `MyFunction.apply` under another name. From torch 2.14 on, that is C code, which first asks
    the class for its `_backward_cls`.
    """
    apply = function_apply()

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        watch(cls)
        return apply(cls, *args, **kwargs)

    def attribute(cls: type, name: str) -> Any:
        if name == "_backward_cls":
            watch(cls)
        return type.__getattribute__(cls, name)

    with (
        mock.patch.object(AppliedFunction, "apply", classmethod(applied))
        if _APPLIES_IN_PYTHON
        else mock.patch.object(FunctionMeta, "__getattribute__", attribute)
    ):
        yield


_CHECKPOINT_SIGNATURE = inspect.signature(getattr(*CHECKPOINT))


def checkpoint_settings(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of `CHECKPOINT` by name: `context_fn`, `preserve_rng_state`, `determinism_check`, `early_stop`."""
    bound = _CHECKPOINT_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


class NeedsGuard(RuntimeError):
    """An operation asked for a guard on sizes where none is allowed."""


@contextlib.contextmanager
def without_new_guards(shape_env: ShapeEnv) -> Iterator[None]:
    """Refuses guards on sizes in this block (`ShapeEnv.error_on_new_guards` is newer than torch 2.11).

    Raises:
        NeedsGuard: a guard was asked for.
    """

    def refuse(expression: Any, value: Any) -> None:
        raise NeedsGuard(f"a guard would be needed: {expression} must be {value}")

    with _frozen(shape_env, refuse):
        yield


@contextlib.contextmanager
def guards_ignored(shape_env: ShapeEnv) -> Iterator[None]:
    """Makes no guards in this block and refuses none, even inside `without_new_guards`."""
    with _frozen(shape_env, lambda expression, value: None), shape_env.suppress_guards():
        yield


@contextlib.contextmanager
def _frozen(shape_env: ShapeEnv, check: Callable[[Any, Any], None]) -> Iterator[None]:
    environment: Any = shape_env
    frozen, before = environment.frozen, vars(environment).get("_check_frozen")
    environment.frozen, environment._check_frozen = True, check
    try:
        yield
    finally:
        environment.frozen = frozen
        del environment._check_frozen
        vars(environment).update({"_check_frozen": before} if before else {})


@functools.cache
def _varlen_attn() -> tuple[Any, bool]:
    """torch's function, whose module takes 50 ms to load, and whether it takes groups of heads: from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **options: Any
) -> Any:
    """`torch.nn.attention.varlen.varlen_attn`, with fewer key heads than query heads also on torch 2.11.

    Its kernel supports that without the argument (on an H200, equal to keys repeated for each query head).

    Shapes: query (tokens, heads, head_dim), key and value (tokens, key_heads, head_dim); the result has query's shape.
    """
    attend, takes_groups = _varlen_attn()
    if takes_groups:
        options["enable_gqa"] = enable_gqa
    return attend(query, key, value, *args, **options)


_attention = torch._C._nn.scaled_dot_product_attention  # kept, because the public name may be replaced
ATTENTION_ASKS_FOR_ONE = torch.__version__ < "2.13"  # its choice of a kernel guards on a mask batch of 1


def attention_of_any_batch(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    """`F.scaled_dot_product_attention` in a trace where `ATTENTION_ASKS_FOR_ONE`: a batch of one gets the same graph.

    The sizes that kernels need to be equal are asserted here, so the guards of the kernel choice are not needed: the
    graph contains the op itself, which chooses again at each call.

    Shapes: query (..., queries, width), key (..., keys, width), value (..., keys, columns) and a mask that broadcasts
        to (..., queries, keys); the result is (..., queries, columns).
    """
    pairs = [] if attn_mask is None else _equal_sizes(query, key, value, attn_mask)
    if not pairs or any(_hint(one) != _hint(other) for one, other in pairs):
        return _attention(query, key, value, attn_mask, *args, **options)
    for one, other in pairs:
        torch._check(one == other)
    symbol = next(size for pair in pairs for size in pair if isinstance(size, SymInt))
    with symbol.node.shape_env.suppress_guards():
        return _attention(query, key, value, attn_mask, *args, **options)


def _equal_sizes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> list[tuple[int | SymInt, int | SymInt]]:
    """The pairs of sizes, at least one of them symbolic, that are equal in an attention without broadcast operands."""
    scores = (*query.shape[:-1], key.shape[-2])
    pairs = [
        *(pair for pair in zip(reversed(mask.shape), reversed(scores), strict=False) if not _is_one(pair[0])),
        *zip(key.shape[:-2], query.shape[:-2], strict=False),
        *zip(value.shape[:-1], key.shape[:-1], strict=False),
        (key.shape[-1], query.shape[-1]),
    ]
    return [pair for pair in pairs if any(isinstance(size, SymInt) for size in pair)]


def _is_one(size: int | SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _hint(size: int | SymInt) -> int | None:
    return size.node.hint if isinstance(size, SymInt) else size


SLICES_ARE_UNKNOWN = torch.__version__ < "2.12"  # the length of `x[:n]`, if n may exceed the size
_place_in_slice = fake_impls._compute_slice_index  # kept, because the name may be replaced


def place_in_slice(size: int | SymInt, index: int | SymInt) -> int | SymInt | None:
    """Where a slice of `size` elements begins or ends at `index`, as in torch 2.12; None if unknown.

    Where `SLICES_ARE_UNKNOWN`, `positions[:, :length]` would have a length that no input gives.
    """
    if (known := _place_in_slice(size, index)) is not None:
        return known
    if guard_or_false(index >= 0):
        return torch.sym_min(index, size)
    return torch.sym_max(index + size, 0) if guard_or_false(index < 0) else None


def compile_by_inductor(graph_module: torch.fx.GraphModule, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """Compiles a graph of tensors with torch's Inductor into one function that returns a tuple.

    It accepts all sizes of the dims that are symbolic in the graph's values. `torch.compile` would check guards in each
    call (about 30 us), and compile again for a size of 1; this function asserts sizes and strides instead.

    Args:
        tensors: an example of its inputs; it is compiled for their strides.
    """
    from torch._dynamo.source import ConstantSource
    from torch._inductor import standalone_compile  # loads Triton: only where something is compiled

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False, specialize_zero_one=False))
    inputs: list[Any] = []
    for node, tensor in zip(graph_module.graph.find_nodes(op="placeholder"), tensors, strict=True):
        sizes = [DimDynamic.DYNAMIC if isinstance(s, SymInt) else DimDynamic.STATIC for s in node.meta["val"].shape]
        context: Any = StatelessSymbolicContext(sizes, constraint_sizes=[None] * len(sizes))
        source = ConstantSource(f"input_{len(inputs)}")
        inputs.append(mode.from_tensor(tensor, source=source, symbolic_context=context))
        node.meta["val"] = inputs[-1]
    (output,) = graph_module.graph.find_nodes(op="output")
    if isinstance(output.args[0], torch.fx.Node):
        output.args = ((output.args[0],),)
    graph_module.recompile()
    FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*inputs)
    for node in graph_module.graph.nodes:
        node.meta["example_value"] = node.meta.get("val")  # Inductor looks here for the sizes
    compiled: Callable[..., Any] = standalone_compile(graph_module, inputs, dynamic_shapes="from_graph")
    return compiled


def environment_of(
    sizes: Mapping[sympy.Symbol, tuple[int | None, int, int | None]], facts: Sequence[sympy.Basic]
) -> tuple[ShapeEnv, dict[sympy.Symbol, torch.SymInt]]:
    """A shape environment as a trace leaves it, and each size in it.

    torch's own `add_backed_var_to_val` and similar functions have another name in each version.

    Args:
        sizes: a symbol's value in the example (None: no input tells it), the least that it can be and the most (None:
            anything).
        facts: what guards say about them.
    """
    from torch._dynamo.source import ConstantSource  # where a size comes from

    environment: Any = ShapeEnv()
    values = environment.backed_var_to_val if hasattr(environment, "backed_var_to_val") else environment.var_to_val
    made = {}
    for symbol, (hint, lower, upper) in sizes.items():
        environment.var_to_range[symbol] = ValueRanges(lower, int_oo if upper is None else upper)
        if hint is not None:
            values[symbol] = sympy.Integer(hint)
            environment.var_to_sources[symbol] = [ConstantSource(symbol.name)]
        made[symbol] = environment.create_symintnode(symbol, hint=hint)
    environment.guards += [ShapeGuard(fact, SLoc("stored", None), False) for fact in facts]
    return environment, made


@contextlib.contextmanager
def frames_unread() -> Iterator[None]:
    """Where torch asks for the user's line of code in this block, for its logs, no file is passed over.

    To know which are, it loads torch.export and the partitioners of autograd, in 0.3 s.
    """
    with mock.patch.object(symbolic_shapes, "uninteresting_files", frozenset):
        yield


def fake_like(value: Tensor, mode: FakeTensorMode, device: torch.device) -> FakeTensor:
    """A fake tensor like a meta tensor: 7 us, where a factory on symbolic sizes takes 500."""
    return FakeTensor(mode, value, device)
