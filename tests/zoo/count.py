"""How many attentions an original computes, counted at its own calls and without fxbt.

A softmax is an attention's if its result, through anything but a layer with weights, comes to a product of two
activations: a router's softmax or a classifier's does not. Over a single key it is one whatever the scores, and no
attention: a shrunk image has a stage of one patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from models import SOFTMAXES, WHOLE_ATTENTIONS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {
    *(torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, torch.mul, torch.Tensor.mul, torch.Tensor.__mul__),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm, torch.Tensor.baddbmm),
}
LAYERS = {F.linear, F.layer_norm, F.embedding, F.conv1d, F.conv2d, F.rms_norm, F.group_norm, torch.addmm}


class Counter(TorchFunctionMode):
    """Follows every softmax's result to the first product of its last axis with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.softmaxes = 0
        self.whole = 0
        self.used: set[int] = set()
        self._from: dict[int, set[int]] = {}
        self._alive: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in WHOLE_ATTENTIONS:
            self.whole += 1
            return result
        if func in SOFTMAXES and _over_one_key(result, args, kwargs):
            return result
        if func in SOFTMAXES:
            self._note(result, {self.softmaxes})
            self.softmaxes += 1
            return result
        if func in LAYERS or "__get__" in str(getattr(func, "__name__", "")):
            return result
        operands = list(_tensors((args, tuple(kwargs.values()))))
        sources = set().union(*(self._from.get(id(t), set()) for t in operands)) if operands else set()
        if not sources:
            return result
        if func in PRODUCTS and _contracts(func, operands, result):
            self.used |= sources
            return result
        self._note(result, sources)
        return result

    def _note(self, result: Any, sources: set[int]) -> None:
        for tensor in _tensors(result):
            self._from[id(tensor)] = sources
            self._alive.append(tensor)


def _over_one_key(result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    return isinstance(dim, int) and result.shape[dim] == 1


def _contracts(func: Any, operands: list[Tensor], result: Any) -> bool:
    activations = [t for t in operands if not isinstance(t, nn.Parameter)]
    elementwise = "mul" in func.__name__ and "matmul" not in func.__name__
    return len(activations) > 1 and not elementwise and result.dim() > 2


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def attentions(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """(attentions, other softmaxes) of one forward."""
    counter = Counter()
    with torch.no_grad(), counter:
        model(**inputs)
    return counter.whole + len(counter.used), counter.softmaxes - len(counter.used)
