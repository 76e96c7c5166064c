"""A snapshot of what a model's forward can read besides its arguments: cheap to compare, and restorable."""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_compat import TensorGuards, dict_version, set_versions
from .settings import generators_kept

_PLAIN = frozenset([type(None), bool, int, float, str])
_OPAQUE = (type, types.FunctionType, types.MethodType, types.ModuleType, types.BuiltinFunctionType, partial)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# No forward reads these; those for keyword hooks follow the hooks themselves.
NOT_READ = {
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
    "_non_persistent_buffers_set",
}
# What a library's `generate` notes on a model for its next call; `recording.py` makes sure that no forward reads it.
MEMOS = frozenset(["_previous_max_cache_length"])
_OBJECT_DEPTH = 3  # a config inside a config inside a module; anything deeper is not the model's own state


@dataclass(eq=False)
class Slot:
    """An attribute of a module that each forward sets to another tensor."""

    attributes: dict[str, Any]  # of the module
    key: str
    name: str  # in the model

    @property
    def value(self) -> Any:
        """The attribute's current value; None if there is none."""
        return self.attributes.get(self.key)

    @value.setter
    def value(self, new: Any) -> None:
        self.attributes[self.key] = new


class ModelState:
    """Every `__dict__`, dict, list and set reachable from a model, as they are now, and the tensors in them.

    The values of tensors are not part of it (graphs share the tensors), but their identity, dtype, device, shape and
    strides are. The attributes in `unread` are not part of it either: forward sets them before reading them.
    """

    def __init__(self, model: nn.Module, unread: Sequence[Slot] = ()) -> None:
        self.unread = tuple(unread)
        self._left_out = {(id(slot.attributes), slot.key) for slot in unread}
        self._live: list[Any] = []
        self._places: list[str] = []
        # one-element tensors compare equal by value, so they are compared by identity
        self._single: list[tuple[Any, Any, Tensor]] = []
        self.tensors: list[Tensor] = []
        self._classes: list[type[nn.Module]] = []
        self._seen: set[int] = set()
        self._memos = vars(model) if hasattr(type(model), "generate") else None
        self._visit_object(model, "", 0)
        self._live = [self._without_unread(container) for container in self._live]
        self._copies = [_copy(container) for container in self._live]
        self._kinds = list(map(_kind, self.tensors))
        self._untouched: _Untouched | None = None

    def holds(self, of_tensors: bool = True) -> bool:
        """Whether all is as it was. Never raises: what cannot be compared counts as changed.

        Without `of_tensors`, tensors may be of another kind than they were, if they are the same ones.
        """
        try:
            if self._untouched is not None and self._untouched.holds(of_tensors):
                return True
            return self._equals() and self._note_untouched()
        except Exception:  # a replaced tensor compares elementwise, and another thread may edit a dict
            return False

    def knows(self, value: Any) -> bool:
        """Whether the model keeps this very object."""
        return id(vars(value)) in self._seen

    def covers(self, container: Any) -> bool:
        """Whether changes of this dict, list or set are noticed here."""
        return id(container) in self._seen

    def contents(self) -> list[tuple[str, Any]]:
        """The place of each container, and its content at the snapshot."""
        return list(zip(self._places, self._copies, strict=True))

    def looks_into(self, value: Any) -> bool:
        """Whether the content of this object or container is part of the state."""
        return id(value) in self._seen or id(getattr(value, "__dict__", None)) in self._seen

    def shares_with(self, other: ModelState) -> bool:
        """Whether both models share a module, a tensor, or any other mutable part."""
        mine, its = ({id(part) for part in (*map(_whole, state._live), *state.tensors)} for state in (self, other))
        return not mine.isdisjoint(its)

    def is_of_same_classes(self, other: ModelState) -> bool:
        """Whether both models have modules of the same classes, in the same order."""
        return self._classes == other._classes

    def _equals(self) -> bool:
        return (
            self._live == self._copies
            and list(map(_kind, self.tensors)) == self._kinds
            and all(container[key] is tensor for container, key, tensor in self._single)
        )

    def _note_untouched(self) -> bool:
        if all(tensor.layout is torch.strided and not tensor.is_nested for tensor in self.tensors):
            untouched = _Untouched(self._live, self.tensors, self._single)
            self._untouched = untouched if self._equals() else None  # another thread may have edited it meanwhile
        return True

    def writable(self) -> list[Tensor]:
        """The tensors that forward may write to; not parameters, because a forward that writes those is refused."""
        return [t for t in self.tensors if not isinstance(t, nn.Parameter) and _can_be_copied(t)]

    def replaced(self) -> list[Slot]:
        """The attributes of modules that held a tensor and now hold another one."""
        found = []
        for live, copy, place in zip(self._live, self._copies, self._places, strict=True):
            whole = _whole(live)
            keys = _differing(live, copy) if isinstance(whole, dict) and "_parameters" in whole else []
            names = {key: f"{place}.{key}".removeprefix(".") for key in keys}
            found += [Slot(whole, k, name) for k, name in names.items() if _are_tensors(whole.get(k), copy.get(k))]
        return found

    def changed(self) -> list[str]:
        """The places that differ now, as `path: key, key`."""
        differing = []
        for live, copy, place in zip(self._live, self._copies, self._places, strict=True):
            keys = _differing(live, copy)
            if keys:
                differing.append(f"{place or 'model'}: {', '.join(keys)}")
        return differing

    def put_back(self, slots: Sequence[Slot]) -> None:
        """Restores these attributes."""
        held = {id(_whole(live)): copy for live, copy in zip(self._live, self._copies, strict=True)}
        for slot in slots:
            slot.value = held[id(slot.attributes)][slot.key]

    def restore(self) -> None:
        """Restores every container in place."""
        for live, copy in zip(self._live, self._copies, strict=True):
            if not _differing(live, copy):
                continue
            whole = _whole(live)
            left_out = live.left_out if isinstance(live, _Partly) else ()
            kept = {key: whole[key] for key in left_out if key in whole}
            whole.clear()
            live.extend(copy) if isinstance(live, list) else whole.update({**copy, **kept})

    def _without_unread(self, container: Any) -> Any:
        keys = {slot.key for slot in self.unread if slot.attributes is container}
        keys |= MEMOS if container is self._memos else set()
        return _Partly(container, keys) if keys else container

    def _visit_object(self, value: Any, place: str, depth: int) -> None:
        if isinstance(value, nn.Module) and type(value) not in self._classes:
            self._classes.append(type(value))
        self._visit(vars(value), place, depth)

    def _visit(self, container: Any, place: str, depth: int) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        items = container.items() if isinstance(container, dict) else enumerate(container)
        if not isinstance(container, tuple):
            self._live.append(container)
            self._places.append(place)
        for key, value in list(items):
            self._visit_value(container, key, value, place, depth)

    def _visit_value(self, container: Any, key: Any, value: Any, place: str, depth: int) -> None:
        if type(value) in _PLAIN or key in NOT_READ or (id(container), key) in self._left_out:
            return
        inner = place if key in ("_modules", "_parameters", "_buffers") else f"{place}.{key}".removeprefix(".")
        if isinstance(value, Tensor):
            self._visit_tensor(container, key, value)
        elif isinstance(value, nn.Module):
            self._visit_object(value, inner, 0)
        elif isinstance(value, (dict, list, set, tuple)):
            self._visit(value, inner, depth)
        elif depth < _OBJECT_DEPTH and not isinstance(value, _OPAQUE) and _has_attributes(value):
            self._visit_object(value, inner, depth + 1)

    def _visit_tensor(self, container: Any, key: Any, tensor: Tensor) -> None:
        if id(tensor) not in self._seen:
            self._seen.add(id(tensor))
            self.tensors.append(tensor)
        if tensor.numel() == 1 and isinstance(container, (dict, list)):
            self._single.append((container, key, tensor))


class _Partly:
    """A live dict without some of its keys."""

    def __init__(self, whole: dict[str, Any], left_out: set[str]) -> None:
        self.whole = whole
        self.left_out = left_out

    def now(self) -> dict[str, Any]:
        return {key: value for key, value in self.whole.items() if key not in self.left_out}

    def __eq__(self, other: object) -> bool:
        return self.now() == other

    __hash__ = None  # type: ignore[assignment]


def _whole(container: Any) -> Any:
    return container.whole if isinstance(container, _Partly) else container


def _are_tensors(*values: Any) -> bool:
    return all(type(value) is Tensor for value in values)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_nested:  # their sizes do not form one shape
        return tensor.dtype, tensor.device, tensor.layout, id(tensor)
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return tensor.dtype, tensor.device, tensor.shape, strides


def _copy(container: Any) -> Any:
    """A plain copy with the same items; a container's own `copy` may do anything."""
    if isinstance(container, _Partly):
        return container.now()
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _has_attributes(value: Any) -> bool:
    try:
        return isinstance(vars(value), dict)
    except Exception:  # it has none, or an object answers for its `__dict__` itself, so its content is invisible
        return False


class _Untouched:
    """Checks that nothing was written to containers and tensors since: some ns for each, where comparing takes 100.

    Most of a model's dicts are empty and stay empty; Python counts the writes to the others.
    """

    def __init__(self, containers: list[Any], tensors: list[Tensor], single: list[tuple[Any, Any, Tensor]]) -> None:
        self._counted = [c for c in containers if type(c) is dict and c]
        self._version = self._version_now()
        self._empty = [c for c in containers if not c]
        self._rest = [c for c in containers if c and type(c) is not dict]
        self._copies = [_copy(c) for c in self._rest]
        self._single = [item for item in single if type(item[0]) is not dict]
        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        self._tensors = tensors
        self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def _version_now(self) -> int:
        """Versions only grow, so their sum is equal only if each is; a list of them would be slow with a cold cache."""
        return sum(map(dict_version, self._counted))

    def holds(self, of_tensors: bool = True) -> bool:
        return (
            self._version_now() == self._version
            and not any(self._empty)
            and self._rest == self._copies
            and all(container[key] is tensor for container, key, tensor in self._single)
            and (not of_tensors or self._guards.check(*self._tensors))
        )


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The in-place write counters; inference tensors have none."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Runs a block and then restores the random states and the values of the model's buffers.

    The buffers' versions are restored, too: what the caller's autograd saved of a buffer stays valid.
    """
    state = ModelState(model)
    tensors = state.writable()
    kept = [(t, t.detach().clone(), version) for t, version in zip(tensors, versions(tensors), strict=True)]
    devices = {t.device for t in state.tensors if t.device.type == "cuda"}
    try:
        with generators_kept(list(devices)):
            yield
    finally:
        with torch.no_grad():
            for tensor, value, version in kept:
                # Compared by value, because batch norm does not count its writes; NaN is copied needlessly.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                if versions([tensor]) != [version]:
                    set_versions((tensor,), (version,))


def _can_be_copied(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read and written back: FSDP frees the memory of tensors it has not gathered."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    if tensor.is_quantized:
        return False
    storage = tensor.untyped_storage()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    return storage.nbytes() >= needed


def foreign_hook(model: nn.Module) -> str | None:
    """A hook that a graph would not call, as a reason against graphs; None if there is none.

    Hooks that the model's own library puts on its modules are part of forward and captured with it. Hooks on the model
    itself run around `forward` as usual.
    """
    everywhere = torch.nn.modules.module
    if any(getattr(everywhere, f"_global{kind}") for kind in HOOKS):
        return "global module hooks are registered (torch.nn.modules.module.register_module_*_hook)"
    packages: dict[str, set[str]] = {}  # of each module's class and those above it
    for path, module in model.named_modules():
        above = packages.get(path.rpartition(".")[0], set()) if path else set()
        packages[path] = above | ({own} if (own := _package(inspect.getsourcefile(type(module)))) else set())
        if path and (hook := _foreign_hook_of(module, packages[path])):
            return f"{path} ({type(module).__name__}) has a hook, {hook}, which a graph would not call; remove it"
    return None


def _foreign_hook_of(module: nn.Module, own: set[str]) -> str | None:
    for kind in HOOKS:
        for hook in getattr(module, kind).values():
            if "backward" in kind or _shards(hook) or _package(_source(hook)) not in own:
                return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)
    return None


def _shards(hook: Any) -> bool:
    """Whether a hook gathers weights from other processes: torch's own, but not part of any forward."""
    return str(getattr(_function_of(hook), "__module__", None)).startswith("torch.distributed")


def _function_of(hook: Any) -> Any:
    return inspect.unwrap(hook.func if isinstance(hook, partial) else hook)


def _source(hook: Any) -> str | None:
    function = _function_of(hook)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return code.co_filename if code else None


def _package(path: str | None) -> str | None:
    """`transformers` for .../site-packages/transformers/models/x.py; None for code that is not installed."""
    found = re.findall(r"[\\/](?:site|dist)-packages[\\/](\w+)", path or "")
    return found[-1] if found else None


def _differing(live: Any, copy: Any) -> list[str]:
    live = live.now() if isinstance(live, _Partly) else live
    if isinstance(live, list):
        live, copy = dict(enumerate(live)), dict(enumerate(copy))
    if isinstance(live, set):
        return sorted(map(str, live ^ copy))
    absent = object()
    return [str(key) for key in {**copy, **live} if not same(live.get(key, absent), copy.get(key, absent))]


def same(new: Any, old: Any) -> bool:
    """Whether two values are equal; tensors only if identical, and incomparable values never."""
    if new is old:
        return True
    try:
        return not isinstance(new, Tensor) and bool(new == old)
    except Exception:  # arrays compare elementwise
        return False
