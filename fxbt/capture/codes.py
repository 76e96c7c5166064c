"""Python code objects: what they name, whose code they are, and which functions have them."""

from __future__ import annotations

import dis
import gc
import itertools
import operator
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

_STDLIB = sysconfig.get_paths()["stdlib"]
_TORCH = str(Path(torch.__file__).parent)
_FXBT = str(Path(__file__).parents[1])
_GLOBAL = ("LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")


def is_torchs(filename: str) -> bool:
    """Whether a file is torch's own."""
    return filename.startswith(_TORCH)


def is_model_code(filename: str) -> bool:
    """Whether a file belongs to the model or its library, not to Python, torch or fxbt."""
    if filename.startswith("<frozen") or (filename.startswith(_STDLIB) and "site-packages" not in filename):
        return False
    return not filename.startswith((_TORCH, _FXBT))


class Facts:
    """What a code object names.

    `chains` are globals with the attributes read directly from them; `names` are all attributes, on whatever object,
    including those that `getattr` may ask for.
    """

    def __init__(self, code: types.CodeType) -> None:
        self.imports: set[str] = set()
        self.chains: list[tuple[str, ...]] = []
        self.writes_closure = False
        texts = {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}
        self.names = {part for name in code.co_names for part in name.split(".")} | texts
        follows = False
        for operation, argument in _operations(code):
            follows = self._add(code, operation, argument, follows)

    def _add(self, code: types.CodeType, operation: str, argument: int, follows: bool) -> bool:
        """Returns whether an attribute operation that follows would act on this operation's value."""
        if operation in _GLOBAL:
            self.chains.append((code.co_names[argument >> (operation == "LOAD_GLOBAL")],))
            return True
        if operation in _ATTRIBUTE and follows:
            name = code.co_names[argument >> (operation == "LOAD_ATTR" and sys.version_info >= (3, 12))]
            self.chains[-1] = (*self.chains[-1], name)
            return True
        if operation == "IMPORT_NAME":
            self.imports.add(code.co_names[argument])
        if operation in ("STORE_DEREF", "DELETE_DEREF"):
            self.writes_closure |= code._varname_from_oparg(argument) in code.co_freevars  # type: ignore[attr-defined]
        return False


def _operations(code: types.CodeType) -> Iterator[tuple[str, int]]:
    """`dis.get_instructions` without its texts, which take ten times as long."""
    bytecode, high = code.co_code, 0
    for i in range(0, len(bytecode), 2):
        operation = bytecode[i]
        argument = bytecode[i + 1] | high
        high = argument << 8 if operation == dis.EXTENDED_ARG else 0
        if operation and operation != dis.EXTENDED_ARG:  # zeros are the interpreter's caches
            yield dis.opname[operation], argument


def imported(name: str, package: str) -> list[types.ModuleType]:
    """The modules that `import name`, `from name import` or `from ..name import` in a package can mean."""
    parents = [package.rsplit(".", i)[0] for i in range(package.count(".") + 1)] if package else []
    paths = [name, name.partition(".")[0], *(f"{parent}.{name}".removesuffix(".") for parent in parents)]
    found = [sys.modules.get(path) for path in paths]
    return [module for module in found if isinstance(module, types.ModuleType)]


def functions_of(codes: Iterable[types.CodeType]) -> list[types.FunctionType]:
    """The living functions with one of these codes.

    Left out are Python's own, and functions that another one of the codes creates anew whenever it runs.
    """
    wanted = {id(code): code for code in codes if is_model_code(code.co_filename) or is_torchs(code.co_filename)}
    made = {id(inner) for code in wanted.values() for inner in code.co_consts if isinstance(inner, types.CodeType)}
    wanted = {key: code for key, code in wanted.items() if key not in made}
    objects = gc.get_objects()  # a million of them: all but the functions are passed over without a line of Python each
    functions = itertools.compress(objects, map(operator.is_, map(type, objects), itertools.repeat(types.FunctionType)))
    return [function for function in functions if id(function.__code__) in wanted]
