"""Tries a pattern and its replacement on small fake tensors, before any model runs."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import string
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import RuleError
from ..torch_compat import FAKES_LOG, FakeTensorMode
from .language import equation_of

# Shapes that most formulas over activations and weights accept: ops broadcast, matmuls are square.
VALUES = ((2, 4, 4), (2, 2, 4, 4), (4, 4))
WEIGHTS = ((4, 4), (4,))
DIFFERENT_WEIGHTS = 3  # a matrix, its bias and a scale may each have another shape
NUMBER = 0.5


class _TorchOp:
    """`op` on tensors: runs the pattern as a torch function."""

    def __init__(self, weight_shapes: tuple[tuple[int, ...], ...], value_shape: tuple[int, ...]):
        self._weight_shapes, self._value_shape = itertools.cycle(weight_shapes), value_shape
        self.made: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        for home in (torch, F, torch.ops.aten):
            if hasattr(home, name):
                return getattr(home, name)
        return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)

    def either(self, *options: Any) -> Any:
        return options[0]

    def maybe(self, term: Any) -> Any:
        return term

    def computed_from(self, source: Any) -> Any:
        return source

    def pointwise(self, function: Any, x: Any, name: str = "") -> Any:
        functions = function if isinstance(function, dict) else {"": function}
        first, compute = next(iter(functions.items()))
        if name:
            self.made[name] = first
        return compute(x)

    def contract(self, equation: str, lhs: Any, rhs: Any) -> Any:
        made = equation_of(equation)
        names = [name for name in dict.fromkeys((*made.lhs, *made.rhs)) if name != "..."]
        letters = {"...": "...", **dict(zip(names, string.ascii_letters, strict=False))}
        spelled = ["".join(letters[name] for name in spec) for spec in (made.lhs, made.rhs, made.result)]
        return torch.einsum(f"{spelled[0]},{spelled[1]}->{spelled[2]}", lhs, rhs)

    def softmax(self, x: Any, dim: Any = -1, *, over: str = "", sink: Any = None) -> Any:
        return torch.softmax(x, -1 if over else dim)

    def steps(self, x: Any, name: str) -> Any:
        self.made[name] = []
        return x

    def number(self, name: str, where: Any = None) -> Any:
        return self.made.setdefault(name, NUMBER)

    def weight(self, name: str, where: Any = None) -> Any:
        if name not in self.made:
            self.made[name] = torch.empty(next(self._weight_shapes))
        return self.made[name]

    def any(self, name: str) -> Any:
        return self.made.setdefault(name, torch.empty(self._value_shape))

    def attention(self, query: Any, key: Any, value: Any, attn_mask: Any = None) -> Any:
        return F.scaled_dot_product_attention(query, key, value, attn_mask)

    def linear(self, x: Any, weight: Any = None, bias: Any = None) -> Any:
        return x if weight is None else F.linear(x, weight, bias)

    def layer_norm(self, x: Any, **options: Any) -> Any:
        return F.layer_norm(x, x.shape[-1:], **options)

    def rms_norm(self, x: Any, **options: Any) -> Any:
        return F.rms_norm(x, x.shape[-1:], **options)

    def activation(self, x: Any) -> Any:
        return x

    normalize = activation

    def mlp(self, x: Any) -> Any:
        return x

    def rotary(self, x: Any, cos: Any, sin: Any) -> Any:
        return x * cos * sin

    def residual_norm(self, x: Any, branch: Any) -> Any:
        return x + branch


def check_results(pattern: Callable[..., Any], replace: Callable[..., Any], plain: bool, called: str) -> None:
    """Raises RuleError if a replacement returns another shape or dtype than its pattern, or always fails.

    One set of shapes on which both agree is enough. A formula that accepts none of the shapes tried here is checked at
    every match instead.
    """
    problem: Exception | None = None
    for wanted, given in _trials(pattern, plain):
        try:
            names = [name for name in inspect.signature(replace).parameters if name in given]
            _compare(wanted, replace(**{name: given[name] for name in names}), called)
            return
        except RuleError as error:
            problem = error
        except Exception as error:
            problem = problem or error
    if isinstance(problem, RuleError):
        raise problem
    if problem is not None:
        raise RuleError(f"{called}: replace fails on shapes that its pattern accepts: {problem}") from problem


def _trials(pattern: Callable[..., Any], plain: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(results, values by name) of the pattern for each set of shapes that it accepts."""
    names = list(inspect.signature(pattern).parameters)[0 if plain else 1 :]
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        for value_shape, *weight_shapes in itertools.product(VALUES, *[WEIGHTS] * DIFFERENT_WEIGHTS):
            for kinds in itertools.product((value_shape, weight_shapes[0], None), repeat=len(names)):
                op = _TorchOp(tuple(weight_shapes), value_shape)
                values = {n: NUMBER if s is None else torch.empty(s) for n, s in zip(names, kinds, strict=True)}
                try:
                    results = pattern(*values.values()) if plain else pattern(op, *values.values())
                except Exception:
                    continue  # the formula does not accept these shapes
                yield results, {**values, **op.made}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch, which logs each failing shape as an error; failing shapes are expected here."""
    log = logging.getLogger(FAKES_LOG)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _compare(wanted: Any, results: Any, called: str) -> None:
    wanted, results = (each if isinstance(each, tuple) else (each,) for each in (wanted, results))
    if len(wanted) != len(results):
        raise RuleError(f"{called}: replace returns {len(results)} results, but the pattern has {len(wanted)} outputs")
    for old, new in zip(wanted, results, strict=True):
        if not isinstance(new, torch.Tensor):
            raise RuleError(f"{called}: replace returns a {type(new).__name__}, expected a tensor")
        if isinstance(old, torch.Tensor) and (old.shape != new.shape or old.dtype != new.dtype):
            raise RuleError(
                f"{called}: replace returns {new.dtype}{list(new.shape)} where the pattern returns "
                f"{old.dtype}{list(old.shape)}; both must have the same shape and dtype"
            )
