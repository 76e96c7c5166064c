"""torch's private names stand in one file; each test here fails when torch moves what it is about."""

import ast
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

from fxbt import torch_compat

ROOT = Path(torch_compat.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "torch_compat.py"]
FILES += sorted((ROOT.parent / "patterns").glob("*.py"))
DOCUMENTED = {"_check"}  # https://docs.pytorch.org/docs/stable/generated/torch._check.html


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_no_other_file_names_anything_private_of_torch(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported_by(node):
            assert not re.match(r"torch\b.*\._", name), f"line {node.lineno} imports {name}"  # type: ignore[attr-defined]
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        parts = text.split(".")
        private = [part for part in parts[1:] if re.match("_(?!_)", part) and part not in DOCUMENTED]
        assert parts[0] != "torch" or not private, f"line {node.lineno} reads {text}"  # type: ignore[attr-defined]


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


@pytest.mark.parametrize(
    "place",
    ["RUN_BACKWARD", "CHECKPOINT", "IS_COMPILING", "IS_EXPORTING", "EXPORTS_FLAGS", "NEW_PATCHER"],
)
def test_what_a_trace_patches_is_there(place: str) -> None:
    owner, name = getattr(torch_compat, place)
    assert hasattr(owner, name), f"{owner.__name__}.{name}"


def test_versions_of_dicts_count_writes() -> None:
    holder = {"a": 1}
    before = torch_compat.dict_version(holder)
    assert torch_compat.dict_version(holder) == before
    holder["a"] = 2
    assert torch_compat.dict_version(holder) != before


def test_a_call_is_looked_through_by_modes_transforms_and_tracers() -> None:
    class Mode(torch_compat.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return function(*args, **(kwargs or {}))

    found = []

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append(torch_compat.is_looked_through())
        return x.sin().sum()

    x = torch.randn(3)
    look(x)
    with Mode():
        look(x)
    torch.func.grad(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    look(x)
    assert found == [False, True, True, True, True, False]
    assert not torch_compat.is_under_functorch()


def test_hooks_on_saved_tensors_are_seen() -> None:
    assert torch_compat.saved_tensors_hooks_now() == ()
    with torch.autograd.graph.save_on_cpu():
        assert len(torch_compat.saved_tensors_hooks_now()) == 2


def test_a_storage_knows_who_shares_it() -> None:
    x = torch.randn(4)
    alone = torch_compat.storage_uses(x.untyped_storage())
    view = x[1:]
    assert torch_compat.storage_uses(view.untyped_storage()) == alone + 1


def test_autocast_of_any_device_is_seen() -> None:
    assert not torch_compat.is_any_autocast_enabled()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_compat.is_any_autocast_enabled()


def test_the_processor_is_known() -> None:
    answers = [getattr(torch_compat, f"is_{name}_supported")() for name in ("avx512", "vnni")]
    assert all(isinstance(answer, bool) for answer in answers)


def test_activations_in_place() -> None:
    x = torch.randn(5)
    assert torch.equal(torch_compat.silu(x), F.silu(x))
    assert torch.equal(torch_compat.silu_(x.clone()), F.silu(x))
    assert torch.equal(torch_compat.gelu_(x.clone(), approximate="tanh"), F.gelu(x, approximate="tanh"))
    assert torch.equal(torch_compat.past_python(torch.ops.aten.relu.default)(x), F.relu(x))


def test_an_assertion_of_a_value_is_raised() -> None:
    torch_compat.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not so"):
        torch_compat.assert_async(torch.tensor(False), "not so")


def test_a_checkpoint_ends_its_recomputation_by_that_exception() -> None:
    raised = []

    def run(x: torch.Tensor) -> torch.Tensor:
        try:
            return x.sin().cos().exp()
        except torch_compat.StopRecomputation as stop:
            raised.append(stop)
            raise

    checkpoint.checkpoint(run, torch.randn(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert raised


def symbolic() -> tuple[torch.Tensor, torch_compat.ShapeEnv]:
    """A fake tensor whose first size is a symbol, and the environment that knows it."""
    environment = torch_compat.ShapeEnv()
    mode = torch_compat.FakeTensorMode(shape_env=environment)
    return mode.from_tensor(torch.randn(6, 4)), environment


def test_guards_are_refused_or_ignored_and_otherwise_made() -> None:
    x, environment = symbolic()
    with torch_compat.without_new_guards(environment):
        assert x.shape[0] == x.shape[0]
        with pytest.raises(torch_compat.NeedsGuard):
            bool(x.shape[0] > 5)
        with torch_compat.guards_ignored(environment):
            assert x.shape[0] > 3
        with pytest.raises(torch_compat.NeedsGuard):
            bool(x.shape[0] > 4)
    assert not environment.guards
    assert x.shape[0] > 4
    assert len(environment.guards) == 1


def test_a_function_of_ones_own_is_applied_by_the_class_that_a_trace_watches() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    assert torch_compat.AppliedFunction in torch.autograd.Function.__mro__
    seen = []

    def watched(cls: Any, *args: Any) -> Any:
        seen.append(cls)
        return super(torch_compat.AppliedFunction, cls).apply(*args)

    with mock.patch.object(torch_compat.AppliedFunction, "apply", classmethod(watched)):
        Double.apply(torch.randn(3))
    assert seen == [Double]


def test_a_function_is_watched_under_a_name_of_ones_own() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    seen, double = [], Double.apply
    with torch_compat.watching_functions(seen.append):
        double(torch.randn(3))
        Double.apply(torch.randn(3))
    Double.apply(torch.randn(3))
    assert seen == [Double, Double]


def test_what_a_checkpoint_is_told_is_known_by_name() -> None:
    told = []

    def generator(*args: Any, **kwargs: Any) -> Any:
        told.append(torch_compat.checkpoint_settings(*args, **kwargs))
        yield

    with mock.patch.object(*torch_compat.CHECKPOINT, generator):
        checkpoint.checkpoint(torch.sin, torch.randn(3), use_reentrant=False, preserve_rng_state=False)
    names = ("context_fn", "preserve_rng_state", "determinism_check", "early_stop")
    assert [told[0][name] for name in names] == [checkpoint.noop_context_fn, False, "default", True]


def test_a_batch_of_one_is_no_other_attention() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch_compat.attention_of_any_batch(x, x, x, mask)

    sizes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})
    inputs = (torch.randn(3, 2, 5, 4), torch.zeros(3, 1, 1, 1))
    with torch_compat.fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(Attention(), inputs, strict=False, dynamic_shapes=sizes)
    environment = program.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0].node.shape_env
    assert not any("Ne(" in str(guard.expr) for guard in environment.guards), environment.guards


def test_a_slice_ends_where_its_tensor_does() -> None:
    x, _ = symbolic()
    length = x.shape[0]
    assert torch_compat.place_in_slice(4, 2) == 2
    assert torch_compat.place_in_slice(4, 9) == 4
    with torch_compat.fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        assert str(torch_compat.place_in_slice(4, length)) == f"Min(4, {length})"


def test_what_modules_are_traced_with_is_patched_by_name() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    assert isinstance(traced, torch.fx.GraphModule)
    for name in ("CURRENT_PATCHER", "_Patcher", "_PatchedFnSetAttr"):
        assert hasattr(torch_compat.fx_trace, name), name


def test_a_tracer_of_modules_is_patched_by_name() -> None:
    assert callable(torch_compat.ModuleStackTracer.call_module)
    for name in ("get_proxy_slot", "track_tensor_tree", "disable_proxy_modes_tracing"):
        assert hasattr(torch_compat.proxy_tensor, name), name


def test_a_lazy_graph_module_computes_what_its_graph_says() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x.exp() + 1).graph
    module = torch_compat.LazyGraphModule({}, graph)
    x = torch.randn(3)
    assert torch.equal(module(x), x.exp() + 1)
    assert "exp" in module.code


def test_reads_of_tensors_go_unseen_by_modes_in_a_block() -> None:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(3)
    with Mode():
        with torch_compat.unseen_by_modes():
            x.sin()
        assert not seen
        x.sin()
    assert seen
