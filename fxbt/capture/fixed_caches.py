"""KV caches of a fixed size, which forward writes to in place: what one run of the original shows of them.

A static cache's keys have room for all tokens from the start; a call writes the rows of its tokens, and counts them in
a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call, named_arguments

Writes = dict[str, tuple[Tensor, Tensor]]  # by name: a tensor's values before and after forward wrote to it

_BATCH, _ROWS = 0, 2  # axes of keys, values and masks


def writes_of(call: Call, after: Call, live: Sequence[Tensor]) -> Writes:
    """The tensors of a call's objects that forward wrote to.

    Args:
        call: the call before, with its objects' tensors in memory of their own.
        after: the call with what forward left in the caller's objects.
        live: the caller's tensors, which `call` has copies of.
    """
    now = dict(zip(after.names, after.tensors, strict=True))
    found: Writes = {}
    for place, (name, before, own) in enumerate(zip(call.names, call.tensors, live, strict=True)):
        if place in call.held and now.get(name) is own and not torch.equal(before, own):
            found[name] = before, own
    return found


def row_axes(call: Call, writes: Writes) -> dict[str, int]:
    """The axis of each tensor along which only some places were written: that of its rows.

    So is that of a tensor that is the same attribute of another object (the keys of a cross-attention's layers).
    """
    by_attribute: dict[str, int] = {}
    for name, (before, now) in writes.items():
        shares = {axis: _share_changed(before != now, axis) for axis in range(_ROWS, now.ndim)}
        axis = min(shares, key=lambda axis: shares[axis], default=None)
        if axis is not None and shares[axis] < 1:
            by_attribute[attribute_of(name)] = axis
    held = [(name, t.ndim) for i, (name, t) in enumerate(zip(call.names, call.tensors, strict=True)) if i in call.held]
    axes = [(name, by_attribute.get(attribute_of(name), ndim), ndim) for name, ndim in held]
    return {name: axis for name, axis, ndim in axes if axis < ndim}


def _share_changed(changed: Tensor, axis: int) -> float:
    return changed.movedim(axis, 0).flatten(1).any(1).float().mean().item()


def lengths(call: Call, after: Call, writes: Writes) -> set[str]:
    """The places of numbers beside written tensors that are the sizes of keys there, in the batch and in rows.

    Another generation has others. A first call makes the keys: of these, any size counts.
    """
    axes, known = row_axes(call, writes), set(call.names)
    sizes: dict[str, set[int]] = {}
    for name, tensor in _of_objects(after, {*axes, *writes}):
        of_rows = {tensor.shape[axis] for axis in (_BATCH, axes.get(name, _BATCH))}
        sizes.setdefault(_object(name), set()).update(of_rows if name in known else tensor.shape)
    numbers = [(place, before) for place, before, now in _numbers(call, after) if before == now]
    return {place for place, number in numbers if number in sizes.get(_object(place), ())}


def varying_axes(call: Call, after: Call, writes: Writes) -> set[tuple[str, int]]:
    """The axes, as (name, axis), that differ between generations: of written rows, and of masks with as many."""
    axes = row_axes(call, writes)
    counts = {tensor.shape[axes.get(name, _ROWS)] for name, tensor in _of_objects(after, {*axes, *writes})}
    counts |= {tokens_added(call, after, writes)}
    counts -= {1}  # a trace takes an axis of size one for a constant
    others = [pair for place, pair in enumerate(zip(call.names, call.tensors, strict=True)) if place not in call.held]
    of_masks = {(n, axis) for n, t in others for axis in range(_ROWS, t.ndim) if t.shape[axis] in counts}
    return of_masks | set(axes.items())


def tokens_added(call: Call, after: Call, writes: Writes) -> int:
    """By how much a count of tokens grew, in a written tensor or a number beside it; 0 if none did."""
    counts = [(before, now) for before, now in writes.values() if now.ndim == 0 and not now.is_floating_point()]
    objects = set(map(_object, writes))
    added = [int(now) - int(before) for before, now in counts]
    added += [now - before for place, before, now in _numbers(call, after) if _object(place) in objects]
    return next((count for count in added if count > 0), 0)


def _numbers(call: Call, after: Call) -> list[tuple[str, int, int]]:
    """The ints in a call by place, each with its value before and after."""
    before, now = (dict(named_arguments(each.args, each.kwargs)) for each in (call, after))
    return [(place, n, now[place]) for place, n in before.items() if type(n) is type(now.get(place)) is int]


def _of_objects(after: Call, names: set[str]) -> list[tuple[str, Tensor]]:
    """The keys and values, by name, of the objects with tensors of these names."""
    objects = set(map(_object, names))
    named = zip(after.names, after.tensors, strict=True)
    return [(name, tensor) for name, tensor in named if _object(name) in objects and tensor.ndim > _ROWS]


def _object(name: str) -> str:
    return name.rpartition(".")[0]


def attribute_of(name: str) -> str:
    """The attribute that the tensor at a place is: the `keys` of `past_key_values.layers[0].keys`."""
    return name.rpartition(".")[2]
