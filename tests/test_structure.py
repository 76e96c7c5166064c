"""The house: who may import whom, and what every public name and file has to carry."""

import ast
import graphlib
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fxbt

ROOT = Path(__file__).parent.parent
# A room imports only from rooms above it; files without a room are the last ones.
ROOMS = [
    "errors",
    "progress",
    "torch_compat",
    "kernels",
    "graph",
    "analysis",
    "capture",
    "stored",
    "match",
    "rewrite",
    "padding",
    "lower",
    "runtime",
    "explain",
    "options",
    "pipeline",
    "making",
    "dispatch",
    "submodels",
    "optimize",
    "saving",
    "loading",
    "testing",
]
CORE = sorted((ROOT / "fxbt").rglob("*.py"))
PATTERNS = sorted((ROOT / "patterns").glob("*.py"))
PUBLIC = [name for name in sorted(fxbt.__all__) if callable(getattr(fxbt, name))]
PUBLIC_CLASSES = [name for name in PUBLIC if inspect.isclass(getattr(fxbt, name))]
ALLOWED_IN_PATTERNS = {"torch", "sympy", "fxbt"}
MOST_LINES = 500


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(tree: ast.Module, package: str = "fxbt") -> list[str]:
    """Every imported name in full, for type checking too: `from .rule import Rule` in fxbt.match is
    fxbt.match.rule.Rule."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            assert node.level <= len(parents), f"line {node.lineno} reaches out of fxbt"
            above = ".".join(parents[: len(parents) + 1 - node.level])
            module = f"{above}.{node.module or ''}".strip(".") if node.level else node.module
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def place_of(path: Path) -> list[str]:
    """`["match", "rule"]` for fxbt/match/rule.py."""
    return list(path.relative_to(ROOT / "fxbt").with_suffix("").parts)


def imported_by(path: Path) -> list[list[str]]:
    """What a file of fxbt imports from fxbt, as places."""
    names = imports_of(tree_of(path), ".".join(["fxbt", *place_of(path)[:-1]]))
    return [name.split(".")[1:] for name in names if name.split(".")[0] == "fxbt"]


def test_rooms_and_files_agree() -> None:
    found = {place_of(path)[0] for path in CORE} - {"__init__"}
    assert found <= set(ROOMS), f"without a place in ROOMS: {sorted(found - set(ROOMS))}"
    assert set(ROOMS) <= found, f"rooms without a file: {sorted(set(ROOMS) - found)}"


@pytest.mark.parametrize("path", [path for path in CORE if place_of(path) != ["__init__"]], ids=name_of)
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = place_of(path)[0]
    below = {name[0] for name in imported_by(path)} - set(ROOMS[: ROOMS.index(room) + 1])
    below -= {"patterns"} if room == "pipeline" else set()  # default_rules() alone knows the built-in rules
    assert not below, f"{name_of(path)} imports {sorted(below)}, which do not stand above {room}"


def test_files_of_a_room_import_one_way() -> None:
    files = {tuple(place_of(path)): path for path in CORE if place_of(path)[-1] != "__init__"}
    graph = {
        place: {found for name in imported_by(path) for found in (tuple(name), tuple(name[:-1])) if found in files}
        for place, path in files.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is a circle


@pytest.mark.parametrize("path", PATTERNS, ids=name_of)
def test_rules_use_only_the_public_face(path: Path) -> None:
    for name in imports_of(tree_of(path), package="fxbt.patterns"):
        top, *rest = name.split(".")
        known = top in ALLOWED_IN_PATTERNS or top in sys.stdlib_module_names
        assert known, f"{path.name} imports {name}"
        private = top == "fxbt" and rest and rest[0] not in {*fxbt.__all__, "patterns"}
        assert not private, f"{path.name} imports {name}, which is not in fxbt.__all__"


@pytest.mark.parametrize("path", PATTERNS, ids=name_of)
def test_rules_are_formulas(path: Path) -> None:
    """A rule walks no graph: no node's arguments or users, no worklist. That is for fxbt/analysis and fxbt/match."""
    for node in ast.walk(tree_of(path)):
        assert not isinstance(node, ast.While), f"{path.name}:{node.lineno} loops until something is done"
        is_reading = isinstance(node, ast.FunctionDef) and node.name == "find"
        assert not is_reading, f"{path.name}:{getattr(node, 'lineno', 0)} finds its meaning by itself: write a pattern"
        is_walk = isinstance(node, ast.Attribute) and node.attr in {"args", "kwargs", "users", "all_input_nodes"}
        assert not is_walk, f"{path.name}:{getattr(node, 'lineno', 0)} reads a graph op by op"


def test_importing_a_rule_file_has_no_effect() -> None:
    """Rule files hold definitions and constants: no call stands alone at the top of a module."""
    for path in PATTERNS:
        calls = [node for node in tree_of(path).body if isinstance(node, ast.Expr) and not is_text(node.value)]
        assert not calls, f"{path.name}:{calls[0].lineno} runs something on import"


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", CORE + PATTERNS, ids=name_of)
def test_no_file_is_too_long_to_know(path: Path) -> None:
    length = len(path.read_text().splitlines())
    assert length <= MOST_LINES, f"{name_of(path)} has {length} lines: what is in it that is a subject of its own?"


@pytest.mark.parametrize("path", CORE + PATTERNS, ids=name_of)
def test_no_table_of_architectures(path: Path) -> None:
    assert "model_type" not in path.read_text()


@pytest.mark.parametrize("path", [path for path in CORE + PATTERNS if path.stem != "__init__"], ids=name_of)
def test_files_begin_with_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), f"{path.name} has no docstring"


@pytest.mark.parametrize("path", CORE + PATTERNS, ids=name_of)
def test_no_silent_except(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} catches everything"
            assert not all(isinstance(line, ast.Pass) for line in node.body), f"{path.name}:{node.lineno} is silent"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(fxbt, name)) or ""
    assert re.search(r"\bExample|>>> ", text), f"fxbt.{name} has no example"


@pytest.mark.parametrize("name", PUBLIC_CLASSES)
def test_public_methods_have_a_docstring(name: str) -> None:
    for member, function in vars(getattr(fxbt, name)).items():
        if inspect.isfunction(function) and not member.startswith("_"):
            assert inspect.getdoc(function), f"fxbt.{name}.{member} has no docstring"


def documented(path: Path) -> Iterator[tuple[str, str]]:
    """(name, docstring) of each public function, class, method and property that a file defines.

    A method's docstring may be its base class's. `fxbt.Rule` says what `pattern` and `replace` of all rules are.
    """
    package = ["fxbt", *place_of(path)] if path in CORE else ["fxbt", "patterns", path.stem]
    module = importlib.import_module(".".join(package).removesuffix(".__init__"))
    for name, member in vars(module).items():
        if name.startswith("_") or getattr(member, "__module__", None) != module.__name__ or not callable(member):
            continue
        if not inspect.isclass(member) and not inspect.isfunction(member):
            continue
        yield name, inspect.getdoc(member) or ""
        for inner, value in vars(member).items() if inspect.isclass(member) else ():
            is_function = inspect.isfunction(value) and value.__name__ == inner  # no lambda, as a default of a field is
            is_documented = isinstance(value, property | classmethod | staticmethod) or is_function
            is_of_a_rule = issubclass(member, fxbt.Rule) and inner in {"pattern", "replace"}
            if is_documented and not inner.startswith("_") and not is_of_a_rule:
                yield f"{name}.{inner}", inspect.getdoc(getattr(member, inner)) or ""


@pytest.mark.parametrize("path", CORE + PATTERNS, ids=name_of)
def test_public_names_of_all_files_have_a_docstring(path: Path) -> None:
    missing = [name for name, text in documented(path) if not text]
    assert not missing, f"{name_of(path)}: no docstring of {', '.join(missing)}"


def raises_itself(function: Any) -> bool:
    """Whether a function's own body has a `raise`; an abstract one, or one of a function inside, does not count."""
    (tree,) = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function))).body
    waiting: list[ast.AST] = list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" not in ast.unparse(node.exc):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)
    return False


def functions_of(name: str) -> Iterator[tuple[str, Any]]:
    """A public function; of a public class its public methods."""
    value = getattr(fxbt, name)
    for inner, member in vars(value).items() if inspect.isclass(value) else [("", value)]:
        if inspect.isfunction(member) and not inner.startswith("_"):
            yield f"fxbt.{name}.{inner}".removesuffix("."), member


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_say_what_they_raise(name: str) -> None:
    for full_name, function in functions_of(name):
        says_so = "Raises" in (inspect.getdoc(function) or "")
        assert says_so or not raises_itself(function), f"{full_name} raises, and its docstring does not say what"


def test_blocks_name_the_shapes_they_take() -> None:
    """(batch, seq, hidden), say, for every function of `fxbt.ops` that takes tensors."""
    for name, text in documented(ROOT / "fxbt" / "graph" / "blocks.py"):
        takes_tensors = "Tensor" in str(inspect.signature(getattr(fxbt.ops, name)).parameters)
        assert not takes_tensors or re.search(r"\(batch, \w+", text), f"fxbt.ops.{name} takes tensors of which shape?"


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fxbt").rglob("__init__.py")]
    assert sorted(listed) == sorted([*found, "fxbt.patterns"])
