"""`import fxbt` loads what a capture needs when it is needed, or ahead in a thread."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fxbt

SOURCE = Path(fxbt.__file__)


def run(code: str) -> str:
    """What a fresh interpreter, in which every warning is an error, prints for `code`."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_an_import_loads_nothing_but_torch_and_itself() -> None:
    loaded = run("import sys, torch; had = set(sys.modules); import fxbt; print(*sorted(set(sys.modules) - had))")
    others = [name for name in loaded.split() if name.split(".")[0] not in {"fxbt", *sys.stdlib_module_names}]
    assert not others
    assert "fxbt.pipeline" not in loaded.split()


def test_preload_loads_what_a_capture_needs() -> None:
    code = "import sys, torch, fxbt; fxbt.preload().join(); print(*[name in sys.modules for name in {}])"
    assert run(code.format(["torch.export._trace", "fxbt.dispatch", "fxbt.pipeline", "fxbt.patterns"])) == (
        "True True True True\n"
    )


def test_preload_may_run_while_a_model_is_made_and_called() -> None:
    output = run(
        "import torch, fxbt; fxbt.preload(); model = torch.nn.Linear(3, 2)\n"
        "with torch.no_grad(): fast = fxbt.optimize(model); x = torch.ones(4, 3); print(torch.equal(fast(x), model(x)))"
    )
    assert output == "True\n"


@pytest.mark.parametrize("name", fxbt.__all__)
def test_a_public_name_is_the_one_that_its_file_defines(name: str) -> None:
    home, named = declared()[name]
    module = importlib.import_module(f"fxbt{home}")
    expected = importlib.import_module(f"fxbt{home}.{named}") if not hasattr(module, named) else getattr(module, named)
    assert getattr(fxbt, name) is expected


def declared() -> dict[str, tuple[str, str]]:
    """Where type checkers are told that a name is from: (".match.rule", "Rule")."""
    imports = [
        node for node in ast.walk(ast.parse(SOURCE.read_text())) if isinstance(node, ast.ImportFrom) and node.level
    ]
    return {
        alias.asname or alias.name: (f".{node.module}" if node.module else "", alias.name)
        for node in imports
        for alias in node.names
    }


def test_an_unknown_name_is_an_attribute_error_and_dir_shows_all() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        fxbt.optimise  # type: ignore[attr-defined]  # noqa: B018
    assert set(fxbt.__all__) <= set(dir(fxbt))
