"""Matches other tensors of the same kinds in a model's places, so that graphs can continue with them.

`load_state_dict(assign=True)`, a new `nn.Parameter`, another module of the same class, `model.to()` there and back:
only the weight objects of the model change. A graph holds for any values of its weights, so it also holds for these
tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .model_state import NOT_READ, ModelState, same

Pairs = dict[int, Tensor]  # the id of a tensor -> the one now in all its places

_PLAIN = (type(None), bool, int, float, str)


def rebound(old: ModelState, model: nn.Module) -> tuple[ModelState, Pairs] | None:
    """The state of a model in which other tensors of the same kinds replaced those in `old`, and which replaced which.

    Plain values that differ (`training`, a number in a config) are expected as in `old`: the returned state holds once
    they have their old values again. None if anything else differs.

    Example:
        >>> state = ModelState(model)
        >>> model.load_state_dict(checkpoint, assign=True)
        >>> state, pairs = rebound(state, model)
    """
    new = ModelState(model, old.unread)
    if not old.is_of_same_classes(new):
        return None
    comparison = _Comparison(old, new)
    return (new, comparison.pairs) if comparison.is_alike() else None


class _Comparison:
    def __init__(self, old: ModelState, new: ModelState) -> None:
        self.pairs: Pairs = {}
        self._old, self._new = old, new
        self._sources: dict[int, int] = {}  # from new tensors to old

    def is_alike(self) -> bool:
        old, new = self._old.contents(), self._new.contents()
        if [place for place, _ in old] != [place for place, _ in new]:
            return False
        return all(self._are_alike(before, now) for (_, before), (_, now) in zip(old, new, strict=True))

    def _are_alike(self, old: Any, new: Any) -> bool:
        """Whether two containers are equal except for tensors; the new one's plain values are set to the old ones."""
        if type(old) is not type(new):
            return False
        if isinstance(old, set):
            return bool(old == new)
        before, now = (c if isinstance(c, dict) else dict(enumerate(c)) for c in (old, new))
        if list(before) != list(now):
            return False
        for key, value in before.items():
            if key in NOT_READ or self._stands_for(value, now[key]):
                continue
            if not (isinstance(value, _PLAIN) and isinstance(now[key], _PLAIN)):
                return False
            new[key] = value
        return True

    def _stands_for(self, old: Any, new: Any) -> bool:
        if isinstance(old, Tensor) or isinstance(new, Tensor):
            return self._pair(old, new)
        if type(old) is not type(new):
            return False
        if isinstance(old, tuple):
            return len(old) == len(new) and all(map(self._stands_for, old, new))
        if self._old.looks_into(old) and self._new.looks_into(new):
            return True  # its content is compared separately
        return same(new, old)

    def _pair(self, old: Any, new: Any) -> bool:
        """Pairs two tensors one to one, in all their places."""
        if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
            return False
        if self.pairs.setdefault(id(old), new) is not new or self._sources.setdefault(id(new), id(old)) != id(old):
            return False
        return old is new or _kind(old) == _kind(new) is not None


def _kind(tensor: Tensor) -> tuple[Any, ...] | None:
    """Everything Python can see of a tensor except its values; None for a tensor that may be more than its values."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor._backward_hooks:
        return None
    attributes = {name: value for name, value in vars(tensor).items() if not name.startswith("_")}
    memory = tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return type(tensor), *memory, tensor.requires_grad, tensor.is_leaf, tensor.is_inference(), attributes
