"""What a forward reads and writes outside its model's attributes: found by name, compared at each call, restored.

A graph preserves what Python did once. From the code that a run executed (`recording.py`), this finds what that code
can reach: globals, attributes of modules and classes, closures, defaults, and the containers and objects in them.
Python's own count of the writes to a dict tells whether anything changed since.
"""

from __future__ import annotations

import array
import builtins
import collections
import contextlib
import contextvars
import ctypes
import functools
import gc
import io
import itertools
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import places
from .codes import Facts, imported, is_model_code, is_torchs
from .model_state import HOOKS, ModelState
from .places import HEAP, PLAIN, Place
from .settings import Settings
from .unchanged import Unchanged

_DEPTH = 4  # a list inside a config inside a dict inside a module; nothing deeper is examined
_LARGE = 1 << 16  # elements of an array; larger ones take too long to compare at every call
_OPAQUE = ("logging", "_thread", "re", "typing", "importlib", "_frozen_importlib")
_POSITIONS: tuple[Any, ...] = (
    *(types.GeneratorType, io.IOBase, enumerate, zip, map, filter, reversed),
    *map(type, map(iter, ([], (), {}, set(), "", range(0)))),
    *(kind for kind in vars(itertools).values() if isinstance(kind, type)),
)
_UNWATCHED = (array.array, memoryview, ctypes._SimpleCData, ctypes.Array, ctypes.Structure)
_ASKED_OF_LOGGERS = ("isEnabledFor", "getEffectiveLevel", "level", "disabled")
_CACHED = type(functools.lru_cache(len))
_OF_MODULES = ("_parameters", "_buffers", "_modules", *HOOKS)


class Surroundings:
    """What code can reach outside a model's attributes, as it is now.

    `obstacle` names something reached that cannot be compared; None if everything can be watched. `tensors` are the
    tensors reached.

    Example:
        >>> around = Surroundings(model, ModelState(model))
        >>> around.reach(forward.__code__, forward.__globals__)
        >>> around.ready().holds()
        True
    """

    def __init__(self, model: nn.Module, state: ModelState) -> None:
        self.obstacle: str | None = None
        self.tensors: list[Tensor] = []
        self.settings: Settings | None = None  # of the process, if code reads some
        self.codes: list[types.CodeType] = []  # code of the model and its library that ran
        self.nests = False  # whether code makes, or would make, nested tensors of unpadded values
        self._state = state
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # keeps objects alive whose ids are in `_seen`
        self._names: dict[int, places.Names] = {}
        self._counted: list[Place] = []  # places with a dict, whose writes Python counts
        self._others: list[Place] = []
        self._functions: list[Any] = []
        self._cells: list[Place] = []
        self._read: set[str] = set()  # every attribute named by some code of the model
        # the other attributes, by name
        self._pending: dict[str, list[tuple[Any, str, int]]] = collections.defaultdict(list)
        self._is_machinery = False
        self._modules = list(model.modules())
        self._own = set(map(id, self._modules))
        for name, module in model.named_modules():
            self._visit_own(module, name)
        self.reach_class(Tensor)
        self._quick: Unchanged | None = None

    def reach(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        """Adds everything that this code names in its globals."""
        if code.co_filename in (os.__file__, "<frozen os>"):
            self._visit_environment()
        if not is_model_code(code.co_filename) and not is_torchs(code.co_filename):
            return
        facts = Facts(code)
        with self._as_machinery(is_torchs(code.co_filename)):
            self._now_read(set() if self._is_machinery else facts.names)
            chains = set(facts.chains)
            if ("globals",) in chains and not self._is_machinery:
                chains |= {(name,) for name in namespace}
            computes_names = ("getattr",) in chains and not self._is_machinery
            for chain in chains:
                end = self._reach_chain(chain, namespace)
                for name in list(end) if computes_names else ():  # getattr may ask for any of them
                    self._watch(end, name)
                self._reach_module(namespace.get(chain[0]), facts)
            for name in facts.imports:
                for module in imported(name, str(namespace.get("__package__") or "")):
                    self._reach_module(module, facts)

    def reach_class(self, kind: type) -> None:
        """Adds the attributes of a class and its bases, which an object's own attributes override."""
        for base in kind.__mro__:
            is_models = _is_models_class(base)
            if id(base) in self._seen or not (is_models or _is_torchs(base)):
                continue
            self._mark(base)
            with self._as_machinery(not is_models):
                self._add(self._counted, places.Class(base, base.__name__))
            for name, value in list(vars(base).items()) if is_models else ():
                self._later(name, value, f"{base.__name__}.{name}", 0)
        if type(kind) is not type and _is_models_class(type(kind)):
            self.reach_class(type(kind))

    def reach_function(self, function: Any) -> None:
        """Adds a function's code, defaults, closure and attributes."""
        if id(function) in self._seen:
            return
        self._mark(function)
        name = function.__qualname__
        with self._as_machinery(is_torchs(function.__code__.co_filename)):
            self._functions.append(function)
            self._add(self._others, places.Function(function, f"the function {name}"))
            for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
                self._visit_cell(cell, f"{variable} of {name}")
            for value in () if self._is_machinery else (function.__defaults__, function.__kwdefaults__):
                self._visit(value, f"a default of {name}", 1)
            if vars(function).keys() - {"__wrapped__"} and not self._is_machinery:
                self._visit_dict(vars(function), name, 1)

    def holds(self, during_a_trace: bool = False) -> bool:
        """Whether everything is as it was. Never raises: what cannot be compared counts as changed.

        During another thread's trace, which replaces some of torch's functions, those are ignored.
        """
        try:
            return self._quick is not None and self._quick.holds(during_a_trace)
        except Exception:  # any object may be read here
            return False

    def ready(self) -> Surroundings:
        """Call this when everything is reached: comparisons start from this moment."""
        # only needed for the search; it would keep weights alive that are replaced later
        self._state = ModelState(nn.Module())
        places = self._counted, self._others
        self._quick = Unchanged(*places, self._functions, self._cells, self._modules, self.settings)
        return self

    def changed(self) -> list[str]:
        """The places of the model and its libraries that differ now, by name."""
        return [
            name for place in self._all() if not place.is_machinery and not place.holds() for name in place.changed()
        ]

    def settle(self) -> None:
        """Restores the places of the model and its libraries, and accepts torch's own as they are."""
        for place in self._all():
            if not place.holds():
                place.renew() if place.is_machinery else place.restore()
        self.ready()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Runs a block and then restores the surroundings."""
        copies = [(tensor, tensor.detach().clone()) for tensor in self.tensors if tensor.layout is torch.strided]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in copies:
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
            self.settle()

    def contents(self) -> int:
        """How many places are containers, objects and tensors, whose content can change under the same name."""
        kinds = (places.Names, places.Class, places.Function, places.Cell)
        return sum(not isinstance(place, kinds) for place in self._all())

    @property
    def read(self) -> frozenset[str]:
        """Every attribute named by some code of the model."""
        return frozenset(self._read)

    def places(self) -> Iterator[Place]:
        """All places that are compared, with their content at the snapshot."""
        return self._all()

    def _all(self) -> Iterator[Place]:
        return itertools.chain(self._counted, self._others, self._cells)

    # Finding

    @contextlib.contextmanager
    def _as_machinery(self, value: bool) -> Iterator[None]:
        before, self._is_machinery = self._is_machinery, value
        try:
            yield
        finally:
            self._is_machinery = before

    def _mark(self, value: Any) -> None:
        self._seen.add(id(value))
        self._alive.append(value)

    def _add(self, among: list[Place], place: Place) -> None:
        place.is_machinery = self._is_machinery
        among.append(place)

    def _watch(self, namespace: dict[str, Any], name: str) -> None:
        place = self._names.get(id(namespace))
        if place is None:
            place = self._names[id(namespace)] = places.Names(namespace, str(namespace.get("__name__", "?")))
            is_models = is_model_code(str(namespace.get("__file__") or "<input>"))
            with self._as_machinery(not is_models):
                self._add(self._counted, place)
        value = place.watch(name)
        if value is os.environ:
            self._visit_environment()
        elif not self._is_machinery and not place.is_machinery:
            self._visit(value, f"{place.name}.{name}", 0)
        elif isinstance(value, (dict, list, set)) and value is not sys.modules:
            self._visit(value, f"{place.name}.{name}", _DEPTH)

    def _reach_chain(self, chain: tuple[str, ...], namespace: dict[str, Any]) -> dict[str, Any]:
        """Follows `a.b.c` while a and b are modules; looks for missing globals in builtins.

        Returns:
            The names of the module that it ends in; {} if it ends in something else.
        """
        if chain[0] not in namespace:
            self._watch(vars(builtins), chain[0])
        for name in chain:
            self._watch(namespace, name)
            value = namespace.get(name)
            if not isinstance(value, types.ModuleType):
                return {}
            namespace = vars(value)
        return namespace

    def _reach_module(self, module: Any, facts: Facts) -> None:
        """Watches the attributes of a module that code names in any way, and those of modules among them."""
        left, done = [module], set()
        while left:
            module = left.pop()
            if not isinstance(module, types.ModuleType) or id(module) in done:
                continue
            done.add(id(module))
            for name in facts.names & vars(module).keys():
                self._watch(vars(module), name)
                left.append(vars(module)[name])

    def _now_read(self, names: set[str]) -> None:
        for name in names - self._read:
            self._read.add(name)
            for value, place, depth in self._pending.pop(name, ()):
                self._visit(value, place, depth)

    def _later(self, name: str, value: Any, place: str, depth: int) -> None:
        """Visits an attribute as soon as some code names it."""
        if isinstance(value, PLAIN):
            return
        if name in self._read:
            self._visit(value, place, depth)
        else:
            self._pending[name].append((value, place, depth))

    def _visit_own(self, module: nn.Module, name: str) -> None:
        """Visits what `ModelState` does not: classes, and objects without a dict."""
        self.reach_class(type(module))
        for key, value in list(vars(module).items()):
            if key in _OF_MODULES or isinstance(value, (*PLAIN, Tensor, nn.Module)):
                continue
            self._later(key, value, f"{name}.{key}".removeprefix("."), 0)

    def _visit(self, value: Any, place: str, depth: int) -> None:
        if isinstance(value, PLAIN) or id(value) in self._seen or depth > _DEPTH or id(value) in self._own:
            return
        if isinstance(value, Tensor):
            self._visit_tensor(value, place)
        elif isinstance(value, (types.ModuleType, types.FunctionType, types.BuiltinFunctionType)):
            return
        elif isinstance(value, type):
            self.reach_class(value)
        elif isinstance(value, (*_POSITIONS, *_UNWATCHED)):
            self._refuse(value, place)
        elif isinstance(value, logging.Logger):
            self._visit_logger(value, place, depth)
        elif isinstance(value, weakref.ReferenceType):
            self._visit(value(), place, depth)
        elif isinstance(value, _CACHED):
            self._visit_cached(value, place, depth)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            self._visit(getattr(value, "__self__", None), place, depth)
        elif isinstance(value, functools.partial):
            self._visit_each([value.func, *value.args, *value.keywords.values()], place, depth)
            self._mark(value)
            self._visit_dict(value.keywords, place, depth)
        elif isinstance(value, (tuple, frozenset)):
            self._mark(value)
            self._visit_each(value, place, depth)
        elif isinstance(value, (list, set, collections.deque, bytearray)):
            self._visit_items(value, place, depth)
        elif isinstance(value, dict):
            self._visit_dict(value, place, depth)
            self._visit_kind(value)
        elif isinstance(value, types.MappingProxyType):
            self._visit_each(gc.get_referents(value), place, depth)
        elif isinstance(value, (contextvars.ContextVar, threading.local)):
            self._mark(value)
            self._add(self._others, places.Local(value, place))
        elif _is_array(value):
            self._visit_array(value, place)
        else:
            self._visit_object(value, place, depth)

    def _visit_each(self, values: Any, place: str, depth: int) -> None:
        is_set = isinstance(values, (set, frozenset))  # code asks for the classes in a set, not for their attributes
        for value in list(values):
            if not (is_set and isinstance(value, type)):
                self._visit(value, place, depth + 1)

    def _visit_items(self, value: Any, place: str, depth: int) -> None:
        self._mark(value)
        if not self._state.covers(value):
            self._add(self._others, places.Items(value, place))
        self._visit_each(value, place, depth)

    def _visit_dict(self, value: dict[Any, Any], place: str, depth: int) -> None:
        if id(value) in self._seen:
            return
        self._mark(value)
        if not self._state.covers(value):
            self._add(self._counted, places.Dict(value, place))
        for key, inner in list(dict.items(value)):
            self._visit(inner, f"{place}[{key!r}]", depth + 1)

    def _visit_object(self, value: Any, place: str, depth: int) -> None:
        kind = type(value)
        if kind.__module__.startswith("numpy.random"):
            self._refuse(value, place)
            return
        if kind.__module__.partition(".")[0] in _OPAQUE or (_is_torchs(kind) and not isinstance(value, nn.Module)):
            return
        self._mark(value)
        self._visit_kind(value)
        if slots := places.slots_of(kind):
            self._add(self._others, places.Slots(value, place, slots))
            for name in slots:
                self._visit(getattr(value, name, None), f"{place}.{name}", depth + 1)
        namespace = getattr(value, "__dict__", None)
        if type(namespace) is not dict or id(namespace) in self._seen:
            return
        self._mark(namespace)
        if not self._state.covers(namespace):
            self._add(self._counted, places.Dict(namespace, place, "."))
        is_pythons = kind.__module__.partition(".")[0] in sys.stdlib_module_names  # its code's names are not known
        for name, inner in list(namespace.items()):
            if is_pythons or (isinstance(value, nn.Module) and name in _OF_MODULES):
                self._visit(inner, place, depth)
            else:
                self._later(name, inner, f"{place}.{name}", depth + 1)

    def _visit_cached(self, value: Any, place: str, depth: int) -> None:
        """A function with cached results: one that did not run now may run later."""
        self._mark(value)
        function = value.__wrapped__
        if isinstance(function, types.FunctionType):
            self.reach_function(function)
            self.reach(function.__code__, function.__globals__)
        else:
            self._visit(function, place, depth)

    def _visit_logger(self, value: logging.Logger, place: str, depth: int) -> None:
        """The level of a logger, if code asks for it."""
        if self._read.isdisjoint(_ASKED_OF_LOGGERS):
            for name in _ASKED_OF_LOGGERS:
                self._pending[name].append((value, place, depth))
            return
        self._mark(value)
        self._add(self._others, places.Level(value, place))

    def _visit_environment(self) -> None:
        self._visit_dict(vars(os.environ)["_data"], "os.environ", 0)

    def _visit_kind(self, value: Any) -> None:
        if _is_models_class(type(value)) or isinstance(value, nn.Module):
            self.reach_class(type(value))

    def _visit_cell(self, cell: Any, place: str) -> None:
        if id(cell) in self._seen:
            return
        self._mark(cell)
        self._add(self._cells, places.Cell(cell, place))
        if not self._is_machinery:
            self._visit(places.contents(cell), place, 1)

    def _visit_tensor(self, value: Tensor, place: str) -> None:
        if any(value is own for own in self._state.tensors):
            return
        self._mark(value)
        self.tensors.append(value)
        self._add(self._others, places.Values(value, place))

    def _visit_array(self, value: Any, place: str) -> None:
        self._mark(value)
        if value.size > _LARGE:
            self._refuse(value, place)
        else:
            self._add(self._others, places.Array(value, place))

    def _refuse(self, value: Any, place: str) -> None:
        why = "is too large to compare at each call" if _is_array(value) else "changes with each use"
        why = "cannot be compared at each call" if isinstance(value, _UNWATCHED) else why
        self.obstacle = self.obstacle or f"forward reads {place}, a {type(value).__name__}, which {why}"


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_torchs(kind: type) -> bool:
    return bool(kind.__flags__ & HEAP) and kind.__module__.partition(".")[0] == "torch"


def _is_models_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if not kind.__flags__ & HEAP or (file is None and kind.__module__ in sys.stdlib_module_names):
        return False
    return is_model_code(file) if isinstance(file, str) else True
