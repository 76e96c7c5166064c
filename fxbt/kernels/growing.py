"""Keys and values that grow at their end: appended in place to a buffer with room, if nobody can notice.

`torch.cat` copies a whole cache for each token. Here, a growing tensor is a view of a buffer twice its length, and the
next token is written behind it: the next view is longer, on the same memory. A caller that still holds the last view
could see writes through the other, so this is done only for a tensor that nothing but its cache refers to, and whose
memory no other tensor shares. All others get new memory, as from `torch.cat`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_compat import storage_uses

LEAST_ROOM = 64  # rows

_here = threading.local()


@dataclass(frozen=True)
class _Room:
    """The buffer whose beginning a tensor is, and the tensor's form when it was made."""

    buffer: Tensor
    form: tuple[object, ...]
    owner: object = None  # the `owner` of the caller's block


class _Key(weakref.ref[Tensor]):
    """A weak reference to a tensor that knows the tensor's id."""

    __slots__ = ("key",)
    key: int


_ROOMS: dict[int, tuple[_Key, _Room]] = {}  # by the id of the tensor that is the used part of a buffer


def _forget(reference: weakref.ref[Tensor]) -> None:
    assert isinstance(reference, _Key)
    found = _ROOMS.get(reference.key)
    if found is not None and found[0] is reference:
        del _ROOMS[reference.key]


def _note(tensor: Tensor, buffer: Tensor) -> None:
    reference = _Key(tensor, _forget)
    reference.key = id(tensor)
    _ROOMS[id(tensor)] = reference, _Room(buffer, _form(tensor), getattr(_here, "owner", None))


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _references() -> int:
    """The result of `sys.getrefcount` in `owned` for a tensor that a call and one object hold."""
    held = torch.empty(1)
    return _count((held, held), 1) - 1  # the name `held` stands for the object


def _count(tensors: Sequence[Tensor], place: int) -> int:
    return sys.getrefcount(tensors[place])


def _held_by(room: _Room) -> int:
    return sys.getrefcount(room.buffer)


def _uses() -> tuple[int, int]:
    """The numbers of uses of a buffer's memory and of the buffer while only one view of it exists."""
    view = torch.empty(2)[:1]
    room = _Room(view._base, ())  # type: ignore[arg-type]
    return storage_uses(view.untyped_storage()), _held_by(room)


_HELD_ONCE = _references()
_SHARED_ONCE, _HELD_BY_ROOM = _uses()


def bytes_held(owner: object) -> int:
    """The bytes of all buffers in use that were made or lengthened in blocks of this owner."""
    return sum(room.buffer.nbytes for _, room in list(_ROOMS.values()) if room.owner is owner)


@contextlib.contextmanager
def owned(tensors: Sequence[Tensor], places: Sequence[int], owner: object = None) -> Iterator[None]:
    """Runs a block whose calls of `append` may lengthen in place the tensors at `places` that a single object holds.

    Example:
        >>> with owned(call.tensors, (2, 3)):
        ...     values = program(*call.tensors)
    """
    _here.alone = {id(tensors[place]): _count(tensors, place) <= _HELD_ONCE for place in places}
    _here.owner = owner
    try:
        yield
    finally:
        _here.alone = _here.owner = None


def append(past: Tensor, new: Tensor, dim: int) -> Tensor:
    """`torch.cat([past, new], dim)` with the same values; shapes (..., length, ...) and (..., count, ...)."""
    alone = getattr(_here, "alone", None)
    is_plain = past.dtype is new.dtype and past.ndim == new.ndim and past.device == new.device
    if not alone or id(past) not in alone or not is_plain:
        return torch.cat([past, new], dim)
    length, count = past.shape[dim], new.shape[dim]
    buffer = _room_behind(past, length + count, dim) if alone[id(past)] else None
    if buffer is None:
        buffer = _buffer(past, length + count, dim)
        buffer.narrow(dim, 0, length).copy_(past)
    buffer.narrow(dim, length, count).copy_(new)
    longer = buffer.narrow(dim, 0, length + count)
    _note(longer, buffer)
    return longer


def _buffer(past: Tensor, length: int, dim: int) -> Tensor:
    shape = list(past.shape)
    shape[dim] = length + max(length, LEAST_ROOM)
    return past.new_empty(shape)


def _room_behind(past: Tensor, length: int, dim: int) -> Tensor | None:
    """The buffer whose used part is `past`, if it is long enough and nothing else shows it; this call then owns it."""
    found = _ROOMS.pop(id(past), None)
    if found is None or found[0]() is not past:
        return None
    room = found[1]
    fits = room.buffer.shape[dim] >= length and room.form == _form(past)
    is_alone = storage_uses(past.untyped_storage()) <= _SHARED_ONCE and _held_by(room) <= _HELD_BY_ROOM
    is_writable = room.buffer.is_inference() == torch.is_inference_mode_enabled()
    return room.buffer if fits and is_alone and is_writable else None
