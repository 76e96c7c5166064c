"""`optimize` and `restore`: give a model an optimised `forward`, and take it back."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .capture.twins import share, twin
from .errors import NotOptimizedError
from .submodels import Submodels

if TYPE_CHECKING:  # `import fxbt` loads nothing that only a capture needs
    from .dispatch import Dispatcher
    from .explain.report import Report
    from .match.rule import Rule
    from .options import Options
    from .runtime.warmup import Warmup

Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    rules: Sequence[Rule] = (),
    verify: bool = False,
    tracer: str = "auto",
    padding: str = "drop",
    inplace: bool = False,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    cuda_graphs: bool | str = False,
    max_captures: int = 8,
    strict: bool = False,
    cache: bool = False,
    tune_seconds: float = 2.0,
) -> Model:
    """Returns a model of the same class and with the same weights, whose forward runs optimised graphs.

    A graph is captured at the first call of each kind, or now for `example_inputs`, which are passed as `model(...)`
    takes them: keyword arguments as a mapping, positional ones as a tuple. Outputs keep the original's types, shapes
    and values. If no graph is proven correct for a call, the original forward runs, and `print(fast.report)` says why.

    Submodules that are called directly (`fast.encoder(...)`, or by `fast.generate(...)`) have graphs of their own, with
    the same options except `padding="keep"`; `fast.report.parts` has their reports.

    Args:
        model: any `nn.Module`. A model that is already optimised is optimised again from its original.
        example_inputs: inputs to capture a graph for now, of any batch size and sequence length.
        rules: your own rules; they are tried before the built-in ones.
        verify: compare the values of the graph before and after every rewrite, and undo rewrites that change them.
        tracer: "export" (torch.export; "auto" means the same) or "hf-fx" (the tracer of transformers 4.x).
        padding: "drop" computes on valid tokens only (unpadding) where the graph proves that padding cannot affect
            them (with gradients: on a CPU, once a backward pass has shown that the loss does not read padded
            positions): valid positions are exact; padded positions of outputs are 0 or, if the last axis
            is the tokens (such as the start and end scores of question answering), the lowest finite value, so that no
            argmax or softmax lands there. Calls without padding, and calls that a run-time guard keeps dense, return
            the original's values at padded positions too. "keep" always returns those.
        inplace: change `model` itself instead of creating a second object.
        dtype: `torch.bfloat16` computes linear layers in bfloat16, without gradients, on a CPU with bfloat16
            instructions. It is about 1.5 times as fast as float32; outputs differ by about 5e-3 (the report has the
            figure). The weights themselves do not change.
        quantize: "int8" computes linear layers on int8 weights (one scale per output channel) and int8 activations
            (one scale per token), without gradients, on a CPU with AVX512-VNNI. Outputs differ by a few percent (the
            report has the figure); bfloat16 is more accurate and often as fast. The weights themselves do not change.
        cuda_graphs: True records the kernels of a graph on a CUDA device when inputs of the same shape come a second
            time, and replays them from then on, without gradients. Unpadded calls are recorded per bucket of tokens
            (eight buckets per factor of two). Each graph keeps its 64 most recently used recordings, in at most an
            eighth of the device's memory. "static" saves a copy: the next call overwrites the outputs of this one.
        max_captures: the largest number of graphs kept. A new graph replaces the least recently used one, but only
            after graphs have served some calls since the last replacement. A model that needs a new graph for every
            call therefore runs its original.
        strict: raise `FallbackError` with the reason wherever a call would run the original forward. Exceptions are
            calls that are being traced (`torch.compile`, `torch.func`) and calls of a model inside another optimised
            model. Graphs then serve all calls, even where the original is faster.
        cache: keep captured graphs in the cache folder (`FXBT_CACHE_DIR`, else `~/.cache/fxbt`), so that other
            processes need not capture them again. `fxbt.save` does the same with a folder of your choice.
        tune_seconds: the time for measuring kernels on a CPU, for all shapes of the model together. Kernels of shapes
            that were not measured before, here or on a similar processor, start by a fixed rule. They are measured at
            the end of calls, which takes a twentieth of the calls' time on average, or at once in `fast.warmup(...)`.
            Faster ones then take over; their outputs agree to floating-point rounding. 0 uses the rule only.

    Raises:
        TypeError: `model` is not an `nn.Module`, a rule is not a `Rule`, or `example_inputs` is neither a mapping nor
            a tuple.
        ValueError: `tracer`, `dtype` or `quantize` is unknown or not available here, a parameter is not initialised
            yet, `max_captures` is less than 1, or `tune_seconds` is negative.
        ExampleError: the model itself rejects `example_inputs`.
        FallbackError: with `strict`, `example_inputs` cannot be captured.

    Example:
        >>> fast = fxbt.optimize(model)
        >>> fast(**tokenizer(texts, padding=True, return_tensors="pt"))  # the same ModelOutput
        >>> print(fast.report)
    """
    from .options import Options  # loads everything a capture needs: see `fxbt.preload`

    _check_model(model)
    options = Options(
        rules=rules,
        verify=verify,
        tracer=tracer,
        padding=padding,
        inplace=inplace,
        dtype=dtype,
        quantize=quantize,
        cuda_graphs=cuda_graphs,
        max_captures=max_captures,
        strict=strict,
        cache=cache,
        tune_seconds=tune_seconds,
    )
    return optimized_with(model, options, example_inputs)


def optimized_with(
    model: Model, options: Options, example_inputs: Mapping[str, Any] | Sequence[Any] | None = None
) -> Model:
    """`optimize` with its options as one object; raises what `optimize` raises."""
    _check_model(model)
    args, kwargs = _example_call(example_inputs)
    if dispatcher_of(model) is not None:
        model = restore(model)
    fast = _optimized(model, options)
    if example_inputs is not None:
        fast.warmup(*args, **kwargs)
    return fast


def restore(model: Model) -> Model:
    """Returns the original of an optimised model: the object given to `optimize`, with its own forward.

    Raises:
        NotOptimizedError: the model is not optimised.

    Example:
        >>> fxbt.restore(fxbt.optimize(model)) is model
        True
    """
    dispatcher = dispatcher_of(model)
    if dispatcher is None:
        raise NotOptimizedError(
            f"restore() was given a {type(model).__name__} that is not optimised; pass what optimize() returned"
        )
    if not type(model)._fxbt_options.inplace:  # type: ignore[attr-defined]
        return dispatcher.original  # type: ignore[return-value]
    object.__setattr__(model, "__class__", type(dispatcher.original))
    return model


def refresh(model: nn.Module) -> bool:
    """Makes sure that graphs use the current weights; returns whether any graph used old ones.

    The next call sees every write that PyTorch counts (an optimizer step, `load_state_dict`, `copy_`) without a
    refresh. A write that bypasses the counter (`.data`, numpy, a mapped file) is seen within `report.latest.rounds`
    calls, or immediately with `refresh`.

    Args:
        model: what `optimize` returned, or a module that contains such models.

    Raises:
        NotOptimizedError: neither the model nor any module in it is optimised.

    Example:
        >>> fast.linear.weight.data[0, 0] = 1.0
        >>> fxbt.refresh(fast)
        True
    """
    dispatchers = list(dispatchers_in(model))
    if not dispatchers:
        raise NotOptimizedError(
            f"refresh() was given a {type(model).__name__} with nothing optimised in it; pass what optimize() returned"
        )
    outdated = [dispatcher.refresh() for dispatcher in dispatchers]
    return any(outdated)


class Forward:
    """The attribute `forward` of an optimised model while a wrapper is set on it.

    The optimised model and its original share one `__dict__`, and so one state. A wrapper that a library sets as
    `model.forward` (Accelerate, Trainer) belongs to only one of the two, so this data descriptor keeps it out of the
    `__dict__`. Without a wrapper the class has a plain function instead, which dynamo traces at less cost.
    """

    def __init__(self, function: Callable[..., Any], dispatcher: Dispatcher) -> None:
        self.function = function
        self._dispatcher = dispatcher
        self.wrapper: Any = None
        self._wrapped: Any = None  # the object on which the wrapper was set

    def __get__(self, model: Any, kind: type | None = None) -> Any:
        if model is None:
            return self.function
        if model is self._wrapped:  # dynamo can follow `is`, but not `vars(model) is vars(other)`
            return self.wrapper
        wrapper = self.wrapper if self._dispatcher.stands_for(model) else vars(model).get("forward")
        return MethodType(self.function, model) if wrapper is None else wrapper

    def __set__(self, model: Any, wrapper: Any) -> None:
        is_own = isinstance(wrapper, MethodType) and wrapper.__func__ is self.function and wrapper.__self__ is model
        if self._dispatcher.stands_for(model):
            self.wrapper, self._wrapped = (None, None) if is_own else (wrapper, model)
        else:
            vars(model)["forward"] = wrapper

    def __delete__(self, model: Any) -> None:
        if not self._dispatcher.stands_for(model):
            del vars(model)["forward"]
            return
        if self.wrapper is None:
            raise AttributeError("forward")
        self.wrapper = self._wrapped = None


def _optimized(model: Any, options: Options, is_part: bool = False) -> Any:
    from .dispatch import Dispatcher

    original = share(model, type(model)) if options.inplace else model
    dispatcher = Dispatcher(original, options)
    fast = twin(model, _namespace(type(model), dispatcher, options, is_part))
    if not options.inplace:
        return fast
    object.__setattr__(model, "__class__", type(fast))
    return model


def _namespace(base: Any, dispatcher: Dispatcher, options: Options, is_part: bool) -> dict[str, Any]:
    """The attributes of the optimised class; `is_part` if it is for a submodule that an optimised model returns."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # first: dynamo of torch 2.11 cannot follow what comes next
            return base.forward(self, *args, **kwargs)
        # A copy with a `__dict__` of its own (FSDP's, a data-parallel replica) is another model: no graph belongs to
        # it. A submodule that was given a forward calls this one from there.
        if not dispatcher.stands_for(self) or (is_part and "forward" in vars(self)):
            return base.forward(self, *args, **kwargs)
        return dispatcher(args, kwargs)

    own_forward = Forward(forward, dispatcher)
    # Callers of a submodule may read its values at padding.
    part_options = dataclasses.replace(options, inplace=False, padding="keep")
    submodels = Submodels(lambda part: _optimized(part, part_options, is_part=True), dispatcher.report)

    def get_attribute(self: Any, name: str) -> Any:
        value = base.__getattr__(self, name)
        if torch.compiler.is_dynamo_compiling() or not isinstance(value, nn.Module) or not dispatcher.stands_for(self):
            return value
        return submodels.of(name, value)

    def new(kind: Any, *args: Any, **kwargs: Any) -> Any:
        """`type(fast)(config)` and `type(fast).from_pretrained(...)` make models that are not optimised."""
        return base(*args, **kwargs)

    def warmup(self: Any, *args: Any, tune_seconds: float | None = None, **kwargs: Any) -> Warmup:
        """Captures the graph for calls like this one now; returns what was captured and how long each part took.

        Kernels are measured now: in what is left of the model's `tune_seconds`, or in the seconds given here (0: none).
        The model's buffers and the random state do not change.

        Example:
            >>> print(fast.warmup(**inputs))
            captured (input_ids i64[2, 16], attention_mask i64[2, 16]) in 2.1 s: capture 1.1, run rules 0.1, ...
        """
        from .options import check_seconds

        check_seconds(0 if tune_seconds is None else tune_seconds)
        return dispatcher.warmup(args, kwargs, self.forward, tune_seconds)

    def report(self: Any) -> Report:
        """What was captured, which rules matched where, which calls ran the original forward, and why."""
        return dispatcher.report

    def set_attribute(self: Any, name: str, value: Any) -> None:
        # The forward of a submodule is for the whole model too: it goes to the `__dict__` that they share.
        if name != "forward" or is_part or not dispatcher.stands_for(self):
            base.__setattr__(self, name, submodels.original(value))
            return
        own_forward.__set__(self, value)
        _class_with(dispatcher, self).forward = own_forward if own_forward.wrapper is not None else forward

    def delete_attribute(self: Any, name: str) -> None:
        base.__delattr__(self, name)
        if name == "forward" and not is_part and dispatcher.stands_for(self):
            _class_with(dispatcher, self).forward = forward

    def reduce_ex(self: Any, protocol: int) -> Any:
        return _reoptimize, (dispatcher.original, options, own_forward.wrapper)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        fast = _deepcopied(dispatcher.original, self, options, memo)
        if own_forward.wrapper is not None:
            fast.forward = copy.deepcopy(own_forward.wrapper, memo)
        return fast

    return {
        "_fxbt_dispatcher": dispatcher,
        "_fxbt_options": options,
        "_fxbt_submodels": submodels,
        # If the original has a forward in the shared `__dict__`, the dispatcher falls back to it and says so.
        "forward": own_forward if "forward" in vars(dispatcher.original) else forward,
        "__getattr__": get_attribute,
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
        "warmup": warmup,
        "report": property(report),
        "__new__": new,
        "__call__": base.__call__,  # the current one: a capture in another thread patches nn.Module's
        "_replicate_for_data_parallel": lambda self: base._replicate_for_data_parallel(dispatcher.original),
        "__reduce_ex__": reduce_ex,
        "__deepcopy__": deepcopy,
        "__copy__": lambda self: _reoptimize(copy.copy(dispatcher.original), options, own_forward.wrapper),
    }


def _class_with(dispatcher: Dispatcher, model: nn.Module) -> Any:
    """The class made for a dispatcher's model; another class (FSDP's) may come before it in the MRO."""
    return next(kind for kind in type(model).__mro__ if vars(kind).get("_fxbt_dispatcher") is dispatcher)


def _reoptimize(original: nn.Module, options: Options, wrapper: Any = None) -> Any:
    fast = _optimized(original, options)
    if wrapper is not None:
        fast.forward = wrapper
    return fast


def _deepcopied(original: Any, fast: Any, options: Options, memo: dict[int, Any]) -> Any:
    """A deep copy of an optimised model. The model's own attributes (such as bound methods) may refer to the model."""
    if hasattr(original, "__deepcopy__"):
        memo[id(fast)] = _reoptimize(copy.deepcopy(original, memo), options)
        return memo[id(fast)]
    model = object.__new__(type(original))
    copied = _optimized(model, options)
    memo[id(fast)], memo[id(original)] = copied, dispatcher_of(copied).original  # type: ignore[union-attr]
    vars(model).update(copy.deepcopy(vars(original), memo))
    return copied


def dispatcher_of(model: Any) -> Dispatcher | None:
    """The dispatcher of an optimised model; None for any other model."""
    dispatcher = getattr(type(model), "_fxbt_dispatcher", None)
    return dispatcher if dispatcher is not None and dispatcher.stands_for(model) else None


def dispatchers_in(model: nn.Module) -> Iterator[Dispatcher]:
    """The dispatchers of all optimised models in a model, and of their submodules that were called directly."""
    for module in model.modules():
        dispatcher = dispatcher_of(module)
        if dispatcher is None:
            continue
        yield dispatcher
        yield from (type(part)._fxbt_dispatcher for part in type(module)._fxbt_submodels.all())  # type: ignore[attr-defined]


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"optimize() was given {given}, expected a torch.nn.Module instance")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("optimize() was given a TorchScript module; pass the nn.Module that it was made from")
    lazy = [name for name, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"parameter {lazy[0]} is not initialised yet; call the model once before optimize()")


def _example_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example is None:
        return (), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise TypeError(
        f"example_inputs is a {type(example).__name__}, expected a dict of keyword arguments or a tuple of positional "
        "ones; pass a single tensor as (tensor,)"
    )
