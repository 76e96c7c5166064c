"""How many attentions an original computes, counted at its own calls and without fxbt.

A softmax is an attention's if its scores are made of a product of two activations, query and key, and its result comes
to another one, with the value; through anything but a layer with weights. So a router's and a classifier's are none,
nor are weights that a layer gives (of hyper-connections, of a token learner, of an additive attention's tanh).
Over a single key it is one whatever the scores, and no attention: a shrunk image has a stage of one patch.
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
    """Follows products of activations to the softmaxes, and these to the first product of their last axis."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.softmaxes = 0
        self.whole = 0
        self.used: set[int] = set()
        self._of_products: set[int] = set()
        self._from: dict[int, set[int]] = {}
        self._products: set[int] = set()  # by their memory: what is written into it is one too
        self._alive: list[Any] = []

    @property
    def attentions(self) -> int:
        return self.whole + len(self.used & self._of_products)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in WHOLE_ATTENTIONS:
            self.whole += 1
            return result
        operands = list(_tensors((args, tuple(kwargs.values()))))
        if func in SOFTMAXES and not _over_one_key(result, args, kwargs):
            self._note_softmax(operands, result)
        elif func not in SOFTMAXES | LAYERS:
            self._follow_products(func, operands, result)
            self._follow_weights(func, operands, result)
        return result

    def _note_softmax(self, operands: list[Tensor], result: Any) -> None:
        if any(_memory(operand) in self._products for operand in operands):
            self._of_products.add(self.softmaxes)
        self._note(result, {self.softmaxes})
        self.softmaxes += 1

    def _follow_products(self, func: Any, operands: list[Tensor], result: Any) -> None:
        is_product = func in PRODUCTS and self._are_activations(operands)
        if is_product or any(_memory(operand) in self._products for operand in operands):
            written = operands[:1] if func is Tensor.__setitem__ else _tensors(result)
            self._products.update(map(_memory, written))
            self._alive.extend(operands)  # else their memory becomes another tensor's
            self._alive.append(result)

    def _follow_weights(self, func: Any, operands: list[Tensor], result: Any) -> None:
        if "__get__" in str(getattr(func, "__name__", "")):
            return
        sources = set().union(*(self._from.get(id(t), set()) for t in operands)) if operands else set()
        if sources and func in PRODUCTS and self._are_activations(operands) and _contracts(func, result):
            self.used |= sources
        elif sources:
            self._note(result, sources)

    def _are_activations(self, operands: list[Tensor]) -> bool:
        return len([tensor for tensor in operands if _memory(tensor) not in self._weights]) > 1

    def _note(self, result: Any, sources: set[int]) -> None:
        for tensor in _tensors(result):
            self._from[id(tensor)] = sources
            self._alive.append(tensor)


def _memory(tensor: Tensor) -> int:
    """Where a tensor is, with all its views; in vmap, which shows no memory, the object itself."""
    return id(tensor) if torch._C._functorch.is_batchedtensor(tensor) else tensor.untyped_storage().data_ptr()


def _over_one_key(result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    return isinstance(dim, int) and result.shape[dim] == 1


def _contracts(func: Any, result: Any) -> bool:
    elementwise = "mul" in func.__name__ and "matmul" not in func.__name__
    return not elementwise and result.dim() > 2


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def attentions(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, int]:
    """(attentions, other softmaxes) of one forward."""
    counter = Counter(model)
    with torch.no_grad(), counter:
        model(**inputs)
    return counter.attentions, counter.softmaxes + counter.whole - counter.attentions
