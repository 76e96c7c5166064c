"""What a forward returns, as a flat list of values and a spec: containers, and plain objects made inside the forward.

Decoders return their keys and values in an object of their library's. Such an object is its class and its attributes;
`pytree.tree_unflatten(values, spec)` makes a new one for every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Numbers are values, not part of the spec: while tracing, those that follow from shapes are symbols.
_PART_OF_SPEC = (type(None), bool, str, torch.dtype, torch.device, type)
_OWN_WAY_OF_COPYING = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__new__", "__del__", "__slots__")


@dataclass
class _Object:
    """An object on its way into a flat list: attributes by name, the constant ones apart."""

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


def flatten(result: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a forward's result and their spec; objects that are no plain data stay leaves."""
    return pytree.tree_flatten(_packed(result, set()))


def paths(spec: pytree.TreeSpec) -> list[Any]:
    """Where each value of a flat result stands in the result: pytree key paths."""
    numbered = pytree.tree_unflatten(range(spec.num_leaves), spec)
    return [path for path, _ in pytree.tree_flatten_with_path(_packed(_keyed(numbered), set()))[0]]


def _keyed(value: Any) -> Any:
    """The mappings that pytree cannot name the values of (outputs of transformers 4) as dicts."""

    def is_unnamed(part: Any) -> bool:
        known = pytree.SUPPORTED_NODES.get(type(part))
        return isinstance(part, Mapping) and known is not None and known.flatten_with_keys_fn is None

    def named(part: Any) -> Any:
        return {key: _keyed(value) for key, value in part.items()} if is_unnamed(part) else part

    return pytree.tree_map(named, value, is_leaf=is_unnamed)


def _packed(value: Any, seen: set[int]) -> Any:
    def pack(leaf: Any) -> Any:
        # One object in two places would become two.
        if not is_plain_object(leaf) or id(leaf) in seen:
            return leaf
        seen.add(id(leaf))
        constants = {n: v for n, v in vars(leaf).items() if isinstance(v, _PART_OF_SPEC)}
        values = {n: _packed(v, seen) for n, v in vars(leaf).items() if n not in constants}
        return _Object(type(leaf), values, constants)

    return pytree.tree_map(pack, value)


def is_plain_object(value: Any) -> bool:
    """Whether an object is its class and its `__dict__` and nothing else."""
    kind = type(value)
    if isinstance(value, (Tensor, nn.Module, type, torch.SymInt, torch.SymFloat, torch.SymBool)) or callable(value):
        return False
    bases = kind.__mro__[:-1]
    own = any(vars(base).get(name) for base in bases for name in _OWN_WAY_OF_COPYING)
    return hasattr(value, "__dict__") and kind.__module__ != "builtins" and bases[-1].__base__ is object and not own


def plain_objects(result: Any) -> list[Any]:
    """The plain objects in a result, nested ones too."""
    found = []
    for leaf in pytree.tree_leaves(result):
        if is_plain_object(leaf):
            found += [leaf, *plain_objects(list(vars(leaf).values()))]
    return found
