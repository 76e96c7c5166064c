"""Flattens what a forward returns into values and a spec: containers, and plain objects made inside forward.

Decoders return their keys and values in an object of their library's. Such an object consists of its class and its
attributes; `pytree.tree_unflatten(values, spec)` makes a new one for every call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..torch_compat import pytree
from .containers import Changed, Given, Place, at, fill_all, is_plain_object, is_record, put_back

Values = tuple[list[Any], pytree.TreeSpec]  # a forward's result as its leaves and their spec

# Numbers are values, not part of the spec: during a trace, those that depend on shapes are symbols.
_PART_OF_SPEC = (type(None), bool, str, torch.dtype, torch.device, type)


@dataclass
class _Object:
    """An object while it is flattened: attributes by name, with the constant ones separate."""

    kind: type
    values: dict[str, Any]
    constants: dict[str, Any]


def _values_of(packed: _Object) -> tuple[list[Any], Any]:
    return list(packed.values.values()), (packed.kind, tuple(packed.values), tuple(packed.constants.items()))


def _rebuilt(values: Any, context: Any) -> Any:
    kind, names, constants = context
    new = object.__new__(kind)
    vars(new).update(zip(names, values, strict=True))
    vars(new).update(constants)
    return new


def _named_values_of(packed: _Object) -> tuple[list[tuple[Any, Any]], Any]:
    values, context = _values_of(packed)
    return list(zip(map(pytree.GetAttrKey, packed.values), values, strict=True)), context


pytree.register_pytree_node(_Object, _values_of, _rebuilt, flatten_with_keys_fn=_named_values_of)


def flatten(result: Any) -> Values:
    """The leaves of a forward's result and their spec; objects that are not plain data stay leaves."""
    return pytree.tree_flatten(_packed(result, set()))


class Rebuild:
    """`rebuild(values, args, kwargs)` is a call's result; records like the first one skip their class's checks.

    It also applies forward's changes of container arguments to the call's containers. Transformers' ModelOutput takes
    30 us for its checks, in a small call of 1,800 us.
    """

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self._spec = spec
        self._like: _Record | None = None
        self._step: _Step | None = None

    def __call__(self, values: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if self._like is not None:
            return self._like.of(values)
        if self._step is not None:
            return self._step.done(values, args, kwargs or {})
        result = pytree.tree_unflatten(values, self._spec)
        if isinstance(result, Changed):
            self._step = _Step.like(result, self._spec)
            return put_back(result, args, kwargs or {})
        self._like = _Record.like(result, values)
        return result


@dataclass(frozen=True)
class _Step:
    """A record whose forward only puts values into attributes of the call's containers: a step with a KV cache.

    Leaves are which of the flat values stands there, or a place in the call.
    """

    record: _Record
    leaves: list[int | Given]
    contents: list[tuple[Place, list[tuple[Any, int | Given]]]]

    @classmethod
    def like(cls, changed: Changed, spec: pytree.TreeSpec) -> _Step | None:
        """How to do it for further calls; None where a result or a content is made of more than values."""
        values = list(changed.result.values()) if is_record(changed.result) else []
        record = _Record.like(changed.result, values)
        if record is None:
            return None
        numbered = pytree.tree_unflatten(range(spec.num_leaves), spec)
        leaves = _leaves(changed.result, numbered.result)
        contents = [
            (place, list(_leaves(content, numbered.contents[place]).items()))
            for place, content in changed.contents.items()
        ]
        parts = [*leaves.values(), *(part for _, content in contents for _, part in content)]
        is_flat = all(type(part) in (int, Given) for part in parts)
        return cls(record, list(leaves.values()), contents) if is_flat else None

    def done(self, values: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result, once its containers hold what they are to hold."""

        def value(leaf: int | Given) -> Any:
            return at(leaf.place, args, kwargs) if isinstance(leaf, Given) else values[leaf]

        result = self.record.of([value(leaf) for leaf in self.leaves])
        contents = {place: {name: value(leaf) for name, leaf in content} for place, content in self.contents}
        fill_all(contents, args, kwargs)
        return result


def _leaves(container: Mapping[Any, Any], numbered: Mapping[Any, Any]) -> dict[Any, Any]:
    """Which of a result's flat values each part of a container is; places in the call as they are."""
    return {name: part if type(part) is Given else numbered[name] for name, part in container.items()}


@dataclass(frozen=True)
class _Record:
    """A dict that is also a dataclass: each value is an item and an attribute, all other attributes are None."""

    kind: type
    names: tuple[str, ...]
    attributes: dict[str, None]

    @classmethod
    def like(cls, result: Any, values: Sequence[Any]) -> _Record | None:
        """How to make further such results; None if the class may treat other values differently."""
        if not is_record(result) or list(map(id, result.values())) != list(map(id, values)):
            return None
        if not _is_made_as_its_base(type(result)):
            return None
        attributes = vars(result)
        others = {name: value for name, value in attributes.items() if name not in result}
        has_all = all(attributes.get(name) is value for name, value in result.items())
        if not has_all or any(value is not None for value in others.values()):
            return None
        return cls(type(result), tuple(result), dict.fromkeys(attributes))

    def of(self, values: Sequence[Any]) -> Any:
        new: Any = OrderedDict.__new__(self.kind)
        for name, value in zip(self.names, values, strict=True):
            OrderedDict.__setitem__(new, name, value)
        vars(new).update(self.attributes)
        vars(new).update(new.items())
        return new


def _is_made_as_its_base(kind: Any) -> bool:
    """Whether a record's class inherits its construction from its library's base, the first base that is a dict."""
    base = next(base for base in kind.__mro__ if OrderedDict in base.__bases__)
    ways = ("__new__", "__post_init__", "__setattr__", "__setitem__")
    return kind.__dataclass_params__.init and all(getattr(kind, n, None) is getattr(base, n, None) for n in ways)


def paths(spec: pytree.TreeSpec) -> list[Any]:
    """The place of each value of a flat result in the result, as pytree key paths."""
    numbered = pytree.tree_unflatten(range(spec.num_leaves), spec)
    return [path for path, _ in pytree.tree_flatten_with_path(_packed(_keyed(numbered), set()))[0]]


def _keyed(value: Any) -> Any:
    """Turns mappings whose values pytree cannot name (outputs of transformers 4) into dicts."""

    def is_unnamed(part: Any) -> bool:
        known = pytree.SUPPORTED_NODES.get(type(part))
        return isinstance(part, Mapping) and known is not None and known.flatten_with_keys_fn is None

    def named(part: Any) -> Any:
        return {key: _keyed(value) for key, value in part.items()} if is_unnamed(part) else part

    return pytree.tree_map(named, value, is_leaf=is_unnamed)


def _packed(value: Any, seen: set[int]) -> Any:
    def pack(leaf: Any) -> Any:
        # An object in two places would become two objects.
        if not is_plain_object(leaf) or id(leaf) in seen:
            return leaf
        seen.add(id(leaf))
        constants = {n: v for n, v in vars(leaf).items() if isinstance(v, _PART_OF_SPEC)}
        values = {n: _packed(v, seen) for n, v in vars(leaf).items() if n not in constants}
        return _Object(type(leaf), values, constants)

    return pytree.tree_map(pack, value)


def plain_objects(result: Any) -> list[Any]:
    """The plain objects in a result, including nested ones."""
    found = []
    for leaf in pytree.tree_leaves(result):
        if is_plain_object(leaf):
            found += [leaf, *plain_objects(list(vars(leaf).values()))]
    return found
