"""The examples run as a newcomer runs them, from a shell, and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tests run beside each other
    arguments = [sys.executable, *command]
    return subprocess.run(arguments, cwd=cwd, env=one_thread, capture_output=True, text=True, timeout=600)


def test_embed_sentences() -> None:
    done = run("examples/embed_sentences.py")
    assert done.returncode == 0, done.stderr
    difference = re.search(r"Largest difference of the embeddings: (\S+)", done.stdout)
    assert difference and float(difference[1]) < 1e-5
    assert re.search(r"^attention +6 ", done.stdout, re.MULTILINE)
    assert re.search(r"^qkv +6 ", done.stdout, re.MULTILINE)
    assert "the original forward ran" not in done.stdout
    assert re.search(r"^ *-%softmax", done.stdout, re.MULTILINE)
    assert re.search(r"^ *\+%\w+ = sdpa", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("example", "compared", "hits"),
    [("custom_module", 3, {"attention": 3, "qkv": 3}), ("lowering_swiglu", 2, {"swiglu": 2, "lowering": 2})],
)
def test_a_model_of_ones_own(example: str, compared: int, hits: dict[str, int]) -> None:
    done = run(f"examples/{example}.py")
    assert done.returncode == 0, done.stderr
    differences = [float(value) for value in re.findall(r"largest difference (\S+)", done.stdout)]
    assert len(differences) == compared
    assert max(differences) < 1e-5
    for rule, count in hits.items():
        assert re.search(rf"^{rule} +{count} ", done.stdout, re.MULTILINE), rule


def test_graphs_are_saved_and_loaded(tmp_path: Path) -> None:
    for is_first in (True, False):
        done = run("examples/saved_graphs.py", str(tmp_path))
        assert done.returncode == 0, done.stderr
        difference = re.search(r"largest difference (\S+)", done.stdout)
        assert difference and float(difference[1]) < 1e-5
        assert ("Wrote graph-" in done.stdout) is is_first
        assert ("from disk" in done.stdout) is not is_first
        assert "the original forward ran" not in done.stdout


RULES = {
    "rule_tanh_gelu": (r"^-.*= tanh\(", r"^\+.*= gelu\(%x, approximate=tanh\)"),
    "rule_gated_attention": (r"^-.*= softmax\(", r"^\+.*= sdpa\("),  # theirs, then the built-in rule's
    "rule_lora": (r"^-.*= linear\(%linear_1, b\)", r"^\+.*= add\(weight, "),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_in_thirty_lines(name: str) -> None:
    lines = (ROOT / f"examples/{name}.py").read_text().splitlines()
    assert len(lines) <= 30
    done = run(f"examples/{name}.py")
    assert done.returncode == 0, done.stderr
    for expected in RULES[name]:
        assert re.search(expected, done.stdout, re.MULTILINE), done.stdout


def test_rules_are_installed_inside_fxbt_only(tmp_path: Path) -> None:
    assert run("-c", "import fxbt.patterns", cwd=tmp_path).returncode == 0
    assert "No module named 'patterns'" in run("-c", "import patterns", cwd=tmp_path).stderr


def test_importing_it_warns_of_nothing() -> None:
    done = run("-W", "error", "-c", "import fxbt, sys; print(fxbt.__version__)")
    assert done.returncode == 0 and done.stderr == "" and re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout), done.stderr
