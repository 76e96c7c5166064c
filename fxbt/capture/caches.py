"""KV caches among a call's arguments: one run of the original shows how they change from call to call.

A cache is an object of any class whose attributes are tensors and numbers of the call (`containers.py`). The original's
own call shows which axes grow, so that the first graph for such calls serves all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NotCapturable
from .call import Binder, Call
from .effects import Effects
from .fixed_caches import Writes, attribute_of, lengths, tokens_added, varying_axes, writes_of

Growing = frozenset[tuple[str, int]]  # (name of a tensor, axis)


def with_growth(
    call: Call, binder: Binder, args: tuple[Any, ...], kwargs: dict[str, Any], live: Sequence[Tensor]
) -> Call:
    """`call` after it was served, with what `args` and `kwargs` show about their objects: which axes grow, which
    numbers count.

    Numbers that forward counts up become inputs of the returned call, and axes of tensors that it made longer are
    `growing`. A tensor that is the same attribute of another object (the keys of a cross-attention's layers, which grow
    from one generation to the next) counts as growing in the same axes. So do axes that differ between caches of a
    fixed size. `live` are the caller's tensors, which `call` has copies of.

    Example:
        >>> with_growth(call, binder, args, kwargs, live).growing
        frozenset({('past_key_values.layers[0].keys', 2), ('past_key_values.layers[0].values', 2)})
    """
    if not call.objects:
        return call
    try:
        after = binder.call(args, kwargs)  # first, because it shows which numbers vary
    except NotCapturable:  # the next call with them says why
        return call
    writes = writes_of(call, after, live)
    if writes:
        binder.expect_others(lengths(call, after, writes))
    return _grown(binder.call(call.args, call.kwargs).with_lessons_of(call), after, writes)


def _grown(call: Call, after: Call, writes: Writes) -> Call:
    now = dict(zip(after.names, after.tensors, strict=True))
    before = {name: tensor for name, tensor in zip(call.names, call.tensors, strict=True) if "." in name}
    axes: dict[str, set[int]] = {}
    for name, tensor in before.items():
        if name in now:
            axes.setdefault(attribute_of(name), set()).update(_longer(tensor, now[name]))
    grown = [(n, axis) for n, t in before.items() for axis in axes.get(attribute_of(n), ()) if axis < t.ndim]
    varying = varying_axes(call, after, writes) if writes else ()
    return replace(call, growing=frozenset([*grown, *varying]), new_tokens=_new_tokens(call, after, writes))


def _new_tokens(call: Call, after: Call, writes: Writes) -> int | None:
    """The index of the tensor with as many sequences, and tokens each, as were added to the first cache."""
    held = {name: after.tensors[i] for i, name in enumerate(after.names) if i in after.past}
    if not held:
        return None
    name, now = next(iter(held.items()))
    before = dict(zip(call.names, call.tensors, strict=True)).get(name)
    old = (0,) * now.ndim if before is None or before.ndim != now.ndim else before.shape
    counts = {size - earlier for size, earlier in zip(now.shape[1:], old[1:], strict=True)} - {0}
    counts = {tokens_added(call, after, writes)} if writes else counts
    others = [i for i, t in enumerate(call.tensors) if i not in call.held and t.ndim > 1 and t.shape[0] == now.shape[0]]
    return next((i for i in others if call.tensors[i].shape[1] in counts), None)


def _longer(before: Tensor, after: Tensor) -> list[int]:
    if before.ndim != after.ndim:
        return []
    return [axis for axis in range(before.ndim) if after.shape[axis] > before.shape[axis]]


def quantised(binder: Binder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why no graph may serve calls that leave these arguments: an object in them stores 8-bit values.

    If a graph's last bit differs from the original's, such a value may differ by a whole step, a few percent.
    """
    after = binder.call(args, kwargs)
    for name, tensor in zip(after.names, after.tensors, strict=True):
        if "." in name and tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool:
            return f"argument {name} stores values in {str(tensor.dtype).removeprefix('torch.')}, a quantised cache"
    return None


def is_too_short(call: Call) -> bool:
    """Whether a growing axis has size one, which a trace would take for a constant."""
    named = dict(zip(call.names, call.tensors, strict=True))
    return any(named[name].shape[axis] == 1 for name, axis in call.growing)


def one_further(call: Call, binder: Binder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The same call with the caches that it left in `args` and `kwargs`, in memory of its own.

    These are long enough for a trace; only a run shows whether the model accepts them. None for another kind of call.
    """
    after = binder.call(args, kwargs)
    if after.key != call.key or is_too_short(replace(after, growing=call.growing)):
        return None
    tensors = tuple(tensor.detach().clone() for tensor in after.tensors)
    args, kwargs = after.rebuild(tensors)
    further = binder.call(args, kwargs)
    return further.with_lessons_of(call) if further.key == call.key else None


def same_lengths(call: Call) -> list[list[tuple[int, int]]]:
    """Groups of growing axes (tensor index, axis) of one object that have the same size, such as its keys and
    values."""
    index = {name: i for i, name in enumerate(call.names)}
    groups: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for name, axis in sorted(call.growing):
        i = index[name]
        groups.setdefault((name.rpartition(".")[0], call.tensors[i].shape[axis]), []).append((i, axis))
    return [group for group in groups.values() if len(group) > 1]


def appended(call: Call, effects: Effects) -> tuple[int, ...]:
    """The tensors of a call's objects that forward replaces by longer ones: none that it writes to in place."""
    written = {place for _, place in effects.arguments}
    return tuple(sorted({place for place, _ in growing_axes(call)} & call.held - written))


def growing_axes(call: Call) -> frozenset[tuple[int, int]]:
    """The growing axes as (tensor index, axis)."""
    index = {name: i for i, name in enumerate(call.names)}
    return frozenset((index[name], axis) for name, axis in call.growing)
