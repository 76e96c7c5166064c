"""`optimize` and `restore`: the same model with another `forward`, and back."""

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

if TYPE_CHECKING:  # `import fxbt` loads none of what a capture needs
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
    keep_original: bool = True,
    cuda_graphs: bool | str = False,
    max_captures: int = 8,
    strict: bool = False,
    cache: bool = False,
) -> Model:
    """A model of the same class that shares everything with `model` but computes its forward by optimised graphs.

    Graphs are captured at the first call of each kind, or ahead: `example_inputs` are keyword arguments (a mapping) or
    positional ones (a tuple) as for `model(...)`. Outputs are the original's in type, shapes and numbers; a call that
    no graph is proven for runs the original forward, and `print(fast.report)` says why.

    Submodules that are called by themselves (`fast.encoder(...)`, or `fast.generate(...)` calling it) have graphs of
    their own, with the same options but `padding="keep"`; `fast.report.parts` has their reports.

    Args:
        model: any `nn.Module`; one that is optimised already is optimised anew from its original.
        example_inputs: inputs to capture for now, in any batch size and length.
        rules: your own rules, tried before the built-in ones.
        verify: compare the numbers of every rewrite with the graph before it, and refuse those that differ.
        tracer: "export" (torch.export; "auto" is the same) or "hf-fx" (the tracer of transformers 4.x).
        padding: "drop" computes on valid tokens alone where the graph proves that padding cannot show (without
            gradients): valid positions are exact; padded positions of outputs are 0, or, where the last axis
            is the tokens (scores of positions, as of a question-answering head), the lowest finite value, so that
            no argmax or softmax lands there. Calls without padding and those that a run-time guard keeps dense return
            the original's values at padding too. "keep" always does.
        inplace: change `model` itself rather than make a second object beside it.
        dtype: `torch.bfloat16` computes linear layers in it on a CPU with instructions for it, without gradients: some
            1.5 times as fast as float32, off by some 5e-3, which the report tells. The weights stay as they are.
        quantize: "int8" computes linear layers on int8 weights (one scale for each output channel) and inputs that are
            brought to 8 bits token by token, on a CPU with AVX512-VNNI, without gradients. Off by some percent, which
            the report tells: bfloat16 is nearer and, on a CPU that has it, often as fast. The weights stay as they are.

        keep_original: False frees the memory of weights that graphs read packed copies of only: their values go to a
            temporary file (in `TMPDIR`) when a graph is captured, and the same parameters are mapped onto it. They
            stay tensors like any others (`state_dict`, training, calls that run the original), read from the disk when
            they are asked for; those that change live in memory again. The report has the bytes.
        cuda_graphs: record the kernels of a graph on a CUDA device when inputs of one shape come a second time, and
            launch them in one go from then on, without gradients. Calls that drop padding are recorded for each bucket
            of tokens (eight to a factor of two). The 64 recordings of a graph that were used last are kept, in at most
            an eighth of the device's memory. "static" saves a copy: a call's outputs are overwritten by the next call.
        max_captures: how many graphs are kept at once. The one that was used least recently makes place for another,
            if graphs served some calls since the last time: a model whose every call needs a graph of its own runs its
            original.
        strict: raise `FallbackError` with the reason where a call would run the original forward otherwise. Left as
            they are: calls that someone traces (`torch.compile`, `torch.func`), and those of a model that is a part of
            another optimised one. Which of the two is faster is not asked then: graphs serve all calls.
        cache: keep captured graphs in the cache folder (`FXBT_CACHE_DIR`, else `~/.cache/fxbt`), so that another
            process need not capture them. See `fxbt.save`, which does so in a folder of your own.

    Raises:
        TypeError: `model` is no `nn.Module`, a rule is no `Rule` instance, or `example_inputs` is no mapping or tuple.
        ValueError: the tracer, dtype or quantization is unknown or not available here, a parameter is not initialised
            yet, `max_captures` is less than 1, or `keep_original=False` would free no memory (not on Linux, or `TMPDIR`
            is in memory).
        ExampleError: the model itself rejects `example_inputs`.
        FallbackError: `strict`, and `example_inputs` cannot be captured.

    Example:
        >>> fast = fxbt.optimize(model)
        >>> fast(**tokenizer(texts, padding=True, return_tensors="pt"))  # the same ModelOutput
        >>> print(fast.report)
    """
    from .options import Options  # loads what a capture needs: see `fxbt.preload`

    _check_model(model)
    options = Options(
        rules=rules,
        verify=verify,
        tracer=tracer,
        padding=padding,
        inplace=inplace,
        dtype=dtype,
        quantize=quantize,
        keep_original=keep_original,
        cuda_graphs=cuda_graphs,
        max_captures=max_captures,
        strict=strict,
        cache=cache,
    )
    return optimized_with(model, options, example_inputs)


def optimized_with(
    model: Model, options: Options, example_inputs: Mapping[str, Any] | Sequence[Any] | None = None
) -> Model:
    """`optimize` with these options, as one object.

    Raises what `optimize` does.
    """
    _check_model(model)
    args, kwargs = _example_call(example_inputs)
    if dispatcher_of(model) is not None:
        model = restore(model)
    fast = _optimized(model, options)
    if example_inputs is not None:
        fast.warmup(*args, **kwargs)
    return fast


def restore(model: Model) -> Model:
    """The original of an optimised model: the object that `optimize` was given, with its own forward.

    Raises `NotOptimizedError` (a ValueError) for a model that is not optimised.

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
    """Makes sure that graphs compute with the weights as they are now; returns whether any did not.

    A write that PyTorch counts (an optimizer step, `load_state_dict`, `copy_`) is seen at the next call without it. One
    past the counter (`.data`, numpy, a mapped file) is seen within `report.latest.rounds` calls, or here at once.

    Args:
        model: what `optimize` returned, or a module with such ones inside.

    Raises:
        NotOptimizedError: neither the model nor a module inside it is optimised.

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
    """The attribute `forward` of an optimised model: its dispatcher's, or what somebody put in its place.

    The optimised model and its original share one `__dict__`, so that both have one state. A wrapper that libraries set
    as `model.forward` (Accelerate, Trainer) belongs to one of them: as a data descriptor this keeps it out of there.
    It stands in the class only while there is a wrapper, as dynamo takes a plain function there at less cost.
    """

    def __init__(self, function: Callable[..., Any], dispatcher: Dispatcher) -> None:
        self.function = function
        self._dispatcher = dispatcher
        self.wrapper: Any = None
        self._wrapped: Any = None  # the object that the wrapper was set on

    def __get__(self, model: Any, kind: type | None = None) -> Any:
        if model is None:
            return self.function
        if model is self._wrapped:  # all that dynamo can follow: it has no `vars(model) is vars(other)`
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


def _optimized(model: Any, options: Options) -> Any:
    from .dispatch import Dispatcher

    original = share(model, type(model)) if options.inplace else model
    dispatcher = Dispatcher(original, options)
    fast = twin(model, _namespace(type(model), dispatcher, options))
    if not options.inplace:
        return fast
    object.__setattr__(model, "__class__", type(fast))
    return model


def _namespace(base: Any, dispatcher: Dispatcher, options: Options) -> dict[str, Any]:
    """What the optimised class has of its own."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Copies of this object's `__dict__` (FSDP's, data-parallel replicas) are other models: no graph is theirs.
        if torch.compiler.is_dynamo_compiling() or not dispatcher.stands_for(self):
            return base.forward(self, *args, **kwargs)
        return dispatcher(args, kwargs)

    own_forward = Forward(forward, dispatcher)
    part_options = dataclasses.replace(options, inplace=False, padding="keep")  # others may read what is at padding
    submodels = Submodels(lambda part: _optimized(part, part_options), dispatcher.report)

    def get_attribute(self: Any, name: str) -> Any:
        value = base.__getattr__(self, name)
        if torch.compiler.is_dynamo_compiling() or not isinstance(value, nn.Module) or not dispatcher.stands_for(self):
            return value
        return submodels.of(name, value)

    def new(kind: Any, *args: Any, **kwargs: Any) -> Any:
        """`type(fast)(config)` and `type(fast).from_pretrained(...)` make models that nobody optimised."""
        return base(*args, **kwargs)

    def warmup(self: Any, *args: Any, **kwargs: Any) -> Warmup:
        """Captures the graph for calls like this one ahead, and says what it did and how long each part took.

        The model's buffers and random state stay as they are.

        Example:
            >>> print(fast.warmup(**inputs))
            captured (input_ids i64[2, 16], attention_mask i64[2, 16]) in 2.1 s: capture 1.1, run rules 0.1, ...
        """
        return dispatcher.warmup(args, kwargs, self.forward)

    def report(self: Any) -> Report:
        """What was captured, which rules fired where, and which calls run the original forward and why."""
        return dispatcher.report

    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name != "forward" or not dispatcher.stands_for(self):
            base.__setattr__(self, name, submodels.original(value))
            return
        own_forward.__set__(self, value)
        _class_with(dispatcher, self).forward = own_forward if own_forward.wrapper is not None else forward

    def delete_attribute(self: Any, name: str) -> None:
        base.__delattr__(self, name)
        if name == "forward" and dispatcher.stands_for(self):
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
        # An original with a forward of its own in the `__dict__` that they share: the dispatcher says that it runs.
        "forward": own_forward if "forward" in vars(dispatcher.original) else forward,
        "__getattr__": get_attribute,
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
        "warmup": warmup,
        "report": property(report),
        "__new__": new,
        "__call__": base.__call__,  # as it is now: a capture in another thread patches nn.Module's
        "_replicate_for_data_parallel": lambda self: base._replicate_for_data_parallel(dispatcher.original),
        "__reduce_ex__": reduce_ex,
        "__deepcopy__": deepcopy,
        "__copy__": lambda self: _reoptimize(copy.copy(dispatcher.original), options, own_forward.wrapper),
    }


def _class_with(dispatcher: Dispatcher, model: nn.Module) -> Any:
    """The class that was made for a dispatcher's model, which others (FSDP's) may stand before."""
    return next(kind for kind in type(model).__mro__ if vars(kind).get("_fxbt_dispatcher") is dispatcher)


def _reoptimize(original: nn.Module, options: Options, wrapper: Any = None) -> Any:
    fast = _optimized(original, options)
    if wrapper is not None:
        fast.forward = wrapper
    return fast


def _deepcopied(original: Any, fast: Any, options: Options, memo: dict[int, Any]) -> Any:
    """A deep copy of an optimised model, which the model's own attributes (methods bound to it) may refer to."""
    if hasattr(original, "__deepcopy__"):
        memo[id(fast)] = _reoptimize(copy.deepcopy(original, memo), options)
        return memo[id(fast)]
    model = object.__new__(type(original))
    copied = _optimized(model, options)
    memo[id(fast)], memo[id(original)] = copied, dispatcher_of(copied).original  # type: ignore[union-attr]
    vars(model).update(copy.deepcopy(vars(original), memo))
    return copied


def dispatcher_of(model: Any) -> Dispatcher | None:
    """What serves the calls of an optimised model; None for others."""
    dispatcher = getattr(type(model), "_fxbt_dispatcher", None)
    return dispatcher if dispatcher is not None and dispatcher.stands_for(model) else None


def dispatchers_in(model: nn.Module) -> Iterator[Dispatcher]:
    """Those of all that is optimised in a model, with those of its submodules that were called by themselves."""
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
        "ones; a single tensor goes as (tensor,)"
    )
