"""The compiled kernels of linears and attention: their numbers, and what happens where they cannot be had."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tracing import by_native

import fxbt
from fxbt.kernels import cache, native, packed, toolchain

TORCHS = {
    "": lambda y: y,
    "relu": F.relu,
    "gelu none": F.gelu,
    "gelu tanh": lambda y: F.gelu(y, approximate="tanh"),
    "swish": F.silu,
}


@pytest.fixture(scope="module", params=["this processor's tiles", "tiles of AVX-512"])
def library(request, tmp_path_factory):
    """The kernel as it is here, and cut as for AVX-512, which compilers can do with shorter vectors too."""
    if native.library() is None:
        pytest.skip(f"no native kernel: {native.obstacle()}")
    if request.param == "this processor's tiles":
        return native.library()
    capability = torch.backends.cpu.get_cpu_capability()
    flags = (*toolchain.OF_CAPABILITY[capability], "-D__AVX512F__", "-O1")  # -O3 takes half a minute for them
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXBT_CACHE_DIR", str(tmp_path_factory.mktemp("tiles")))
        patch.setitem(toolchain.OF_CAPABILITY, capability, flags)
        native.compile_ahead.cache_clear()
        made = native._made()
    native.compile_ahead.cache_clear()
    assert made.path != native.library().path
    return made


def test_they_are_to_be_had_where_a_compiler_and_the_instructions_are():
    """Otherwise the tests of the kernels would be skipped where native.c is broken."""
    if torch.backends.cpu.get_cpu_capability() not in toolchain.OF_CAPABILITY:
        pytest.skip(f"torch runs {torch.backends.cpu.get_cpu_capability()} code here")
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler")
    if os.environ.get("FXBT_NATIVE") == "0":
        pytest.skip("FXBT_NATIVE=0")
    assert native.obstacle() is None


def compare(library, x, weight, bias=None, residual=None, activation=""):
    n, k = weight.shape
    y = library.linear(n, k, activation)(x, library.pack(weight), bias, residual)
    exact = TORCHS[activation](F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    exact = exact if residual is None else exact + residual
    assert y.dtype is torch.float32 and y.shape == exact.shape
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 11, 12, 13, 16, 25, 100, 517, 1030])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 3), (17, 1600), (32, 1536), (47, 768), (100, 7), (3, 4000)])
def test_the_product_is_torchs(library, rows, n, k):
    weight = torch.randn(n, k) / k**0.5
    compare(library, torch.randn(rows, k), weight)
    compare(library, torch.randn(rows, k), weight, torch.randn(n))
    compare(library, torch.randn(rows, k), weight, torch.randn(n), torch.randn(rows, n))


def test_long_sums_are_as_exact_as_torchs(library):
    """Some 2.6e-7 both; added one by one, 3072 products would be off by 7e-7."""
    x, weight = torch.randn(128, 3072), torch.randn(256, 3072) / 3072**0.5
    y = library.linear(256, 3072)(x, library.pack(weight), None, None)
    assert (y - F.linear(x.double(), weight.double())).square().mean().sqrt() < 3e-7


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_activations_are_torchs(library, activation):
    for rows, n, k in ((3, 40, 8), (50, 33, 1600)):
        compare(library, 8 * torch.randn(rows, k), torch.randn(n, k) / k**0.5, torch.randn(n), None, activation)


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_activations_are_as_exact_as_float32_allows_from_end_to_end(library, activation):
    x = torch.cat([torch.linspace(-100, 100, 40001), torch.linspace(-1, 1, 10001)])[:, None]
    y = library.linear(1, 1, activation)(x, library.pack(torch.ones(1, 1)), None, None)
    torch.testing.assert_close(y.double(), TORCHS[activation](x.double()), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("keeps_sum", [False, True])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 3), (7, 33, 1600), (16, 64, 8), (300, 20, 40)])
def test_a_layer_norm_is_torchs(library, rows, n, k, keeps_sum):
    weight, x = torch.randn(n, k), torch.randn(rows, k)
    linear, packed = library.linear(n, k, "relu", 1e-3, keeps_sum), library.pack(weight)
    for gamma, beta in ((None, None), (torch.randn(n), None), (None, torch.randn(n)), (torch.randn(n), torch.randn(n))):
        found = linear(x, packed, None, None, gamma, beta)
        total = F.linear(x.double(), weight.double()).relu()
        normalized = F.layer_norm(total, (n,), *(w.double() if w is not None else None for w in (gamma, beta)), 1e-3)
        results = zip(found, (total, normalized), strict=True) if keeps_sum else [(found, normalized)]
        for result, exact in results:
            torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=2e-5)


def test_a_layer_norm_of_large_numbers_close_together_keeps_their_difference(library):
    x = 1000 + torch.randn(5, 40)
    y = library.linear(40, 40, "", 1e-5)(x, library.pack(torch.eye(40)), None, None, None, None)
    torch.testing.assert_close(y.double(), F.layer_norm(x.double(), (40,)), rtol=0, atol=3e-4)  # torch's is off by 1e-4


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_what_is_not_finite_is_as_in_torch(library, activation):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 200.0, -200.0, 3e38, -3e38])[:, None]
    weight = torch.ones(20, 1)
    y = library.linear(20, 1, activation)(x, library.pack(weight), None, None)
    expected = TORCHS[activation](F.linear(x, weight).double())  # torch's gelu of inf is NaN in float32 on AVX-512
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_nothing_is_written_beside_the_result_and_a_row_does_not_see_the_others(library):
    x, weight = torch.randn(40, 30), torch.randn(21, 30)
    linear, packed = library.linear(21, 30), library.pack(weight)
    whole = linear(x, packed, None, None)
    for rows in (1, 3, 17):
        torch.testing.assert_close(linear(x[:rows], packed, None, None), whole[:rows], rtol=0, atol=0)
    x[5] = float("nan")
    assert linear(x, packed, None, None).isnan().any(1).nonzero().tolist() == [[5]]


def test_shapes_and_strides_are_those_of_linear(library):
    weight, bias = torch.randn(24, 10), torch.randn(24)
    compare(library, torch.randn(10), weight, bias)
    compare(library, torch.randn(2, 3, 4, 10), weight, bias)
    compare(library, torch.randn(2, 0, 10), weight, bias)
    compare(library, torch.randn(5, 20)[:, ::2], weight, bias)
    compare(library, torch.randn(10, 5).t(), weight, bias, torch.randn(24, 5).t())
    compare(library, torch.randn(1, 10).expand(7, 10), weight, bias, torch.randn(1, 24).expand(7, 24))
    compare(library, torch.randn(3, 10), weight, torch.randn(1).expand(24))
    compare(library, torch.randn(3, 10), weight, torch.randn(48)[::2])


def test_shapes_that_do_not_fit_are_an_error(library):
    linear, packed = library.linear(24, 10), library.pack(torch.randn(24, 10))
    with pytest.raises(ValueError, match="W is"):
        linear(torch.randn(5, 9), packed, None, None)
    with pytest.raises(ValueError, match="W is"):
        linear(torch.randn(5, 10), packed, None, torch.randn(4, 24))


def test_any_number_of_threads_gives_the_same(library, monkeypatch):
    x, weight = torch.randn(700, 64), torch.randn(50, 64)
    linear, packed = library.linear(50, 64), library.pack(weight)
    one = linear(x, packed, None, None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert torch.equal(linear(x, packed, None, None), one)


def test_threads_of_python_run_it_side_by_side(library):
    linear = library.linear(50, 64)
    right = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(50, 64, generator=generator)
        packed = library.pack(weight)
        for _ in range(50):
            x = torch.randn(33, 64, generator=generator)
            right.append(torch.allclose(linear(x, packed, None, None), F.linear(x, weight), atol=1e-4))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(right) == 200 and all(right)


# --- attention --------------------------------------------------------------------------------------------------


def operands(*shape):
    """Query, key and value of one shape, (batch, heads, seq, head_dim), as views like those of a merged projection."""
    batch, heads, length, dim = shape
    return torch.randn(batch, length, 3 * heads, dim).transpose(1, 2).split(heads, 1)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 5, 8), (1, 2, 200, 32), (3, 2, 33, 20), (1, 2, 70, 65)], ids=str
)
def test_attention_is_torchs(library, shape, is_causal):
    query, key, value = operands(*shape)
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=is_causal)
    torch.testing.assert_close(
        library.attention(query, key, value, None, is_causal).double(), exact, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("counts", [[1], [3, 0, 5], [0, 0], [16, 16, 1, 40], [130]], ids=str)
def test_packed_sequences_see_themselves_alone(library, counts, is_causal):
    mask = torch.arange(max(counts, default=0))[None] < torch.tensor(counts)[:, None]
    where = packed.Tokens.of(mask)
    query, key, value = operands(1, 3, sum(counts), 8)
    found = library.attention(query, key, value, None, is_causal, None, where.bounds, where.longest)
    assert found.shape == query.shape
    torch.testing.assert_close(found, packed.attention(query, key, value, where, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
def test_key_heads_can_be_fewer_and_values_wider(library, is_causal):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, *shape, generator=generator) for shape in ((6, 9, 8), (2, 11, 8), (2, 11, 21)))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
    found = library.attention(query, key, value, None, is_causal)
    torch.testing.assert_close(found, expected)
    strided = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    torch.testing.assert_close(library.attention(*strided, None, is_causal), expected)


def test_a_query_that_is_not_finite_stays_in_its_row(library):
    query, key, value = operands(1, 2, 20, 8)
    query = query.clone()
    query[0, 0, 3] = float("nan")
    bias = torch.zeros(1, 1, 20, 20)
    bias[..., 5, :] = -torch.inf
    found = library.attention(query, key, value, bias)
    assert found.isnan().any(-1).nonzero().tolist() == [[0, 0, 3]]
    assert (found[:, :, 5] == 0).all()
    torch.testing.assert_close(found[:, 1], F.scaled_dot_product_attention(query, key, value, bias)[:, 1])


def test_attention_by_few_or_many_threads_is_the_same(library, monkeypatch):
    query, key, value = operands(1, 2, 300, 8)
    whole = library.attention(query, key, value, None, True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    torch.testing.assert_close(library.attention(query, key, value, None, True), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shapes", "bias"),
    [
        (((1, 2, 5, 4), (1, 2, 5, 3), (1, 2, 5, 4)), None),
        (((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 6, 4)), None),
        (((2, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), None),
        (((1, 3, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), None),
        (((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), (1, 1, 5, 4)),
    ],
)
def test_shapes_of_attention_that_do_not_fit_are_an_error(library, shapes, bias):
    query, key, value = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError):
        library.attention(query, key, value, None if bias is None else torch.zeros(bias))


# --- where it cannot be had -------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a new process with an empty cache."""
    monkeypatch.setenv("FXBT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_made_private", [])
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    native._library.cache_clear()
    native.compile_ahead.cache_clear()


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@by_native
def test_it_is_compiled_once(fresh, monkeypatch):
    path = native.library().path
    assert path.parent == fresh / "cache" and path.with_suffix(".sha256").exists()
    files = set(path.parent.iterdir())
    forget()
    monkeypatch.setattr(toolchain, "_run", None)  # a second compilation would fail
    assert native.library() is not None
    assert set(path.parent.iterdir()) == files and len(files) == 2


@by_native
def test_it_is_compiled_while_a_model_is_traced(fresh, monkeypatch):
    native.compile_ahead().result()
    monkeypatch.setattr(toolchain, "_run", None)
    assert native.library() is not None


@by_native
def test_a_model_on_the_cpu_without_gradients_has_it_compiled(fresh):
    model, x = fxbt.optimize(torch.nn.ReLU()), torch.zeros(2, 3)  # a graph that asks for no kernels
    model(x)
    assert not native.compile_ahead.cache_info().currsize
    with torch.no_grad():
        model(x)
    native.compile_ahead().result()
    assert list((fresh / "cache").iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> bytes:
    """What the compiler makes here."""
    flags = toolchain.flags_for(torch.backends.cpu.get_cpu_capability())
    return toolchain.compiled(toolchain.compiler(), flags, tmp_path_factory.mktemp("built"))


@pytest.fixture
def prebuilt(fresh, built, monkeypatch) -> Path:
    """The file of the kernels in a package that was built with them."""
    path = fresh / toolchain.name_of(*toolchain.flags_for(torch.backends.cpu.get_cpu_capability()))
    path.write_bytes(built)
    path.with_suffix(".sha256").write_text(toolchain.digest_of(built))
    monkeypatch.setattr(native, "PREBUILT", fresh)
    return path


def half_written(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:5000])


def changed(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[-1] ^= 1
    library.write_bytes(data)


def without_digest(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


def with_another_digest(library: Path) -> None:
    library.with_suffix(".sha256").write_text("0" * 64)


def writable_by_others(library: Path) -> None:
    library.chmod(0o666)


def with_a_digest_that_others_write(library: Path) -> None:
    library.with_suffix(".sha256").chmod(0o664)


def a_symlink(library: Path) -> None:
    library.rename(library.with_name("elsewhere"))
    library.symlink_to(library.with_name("elsewhere"))


def a_pipe(library: Path) -> None:
    library.unlink()
    os.mkfifo(library)


@by_native
@pytest.mark.parametrize(
    "harm",
    [
        *(half_written, changed, without_digest, with_another_digest),
        *(writable_by_others, with_a_digest_that_others_write, a_symlink, a_pipe),
    ],
)
def test_what_is_not_as_it_was_compiled_is_not_loaded_but_made_anew(harm, fresh, built, monkeypatch):
    monkeypatch.setattr(toolchain, "compiled", lambda *args: built)
    good, is_new = native._found_or_compiled()  # not loaded: a process has what it once loaded from a path
    assert is_new and native._found_or_compiled() == (good, False)
    harm(good)
    assert native._found_or_compiled() == (good, True)
    assert good.read_bytes() == built and not good.is_symlink()
    assert native._found_or_compiled() == (good, False)
    assert native.library() is not None


@by_native
def test_a_whole_file_that_is_no_library_is_made_anew(fresh, built, monkeypatch):
    """Its digest is right: a compiler that failed without saying so, or a file from another system."""
    monkeypatch.setattr(toolchain, "compiled", lambda *args: built)
    path, _ = native._found_or_compiled()
    path.write_text("not a library")
    path.with_suffix(".sha256").write_text(toolchain.digest_of(b"not a library"))
    assert native._found_or_compiled() == (path, False)
    assert native.library() is not None
    assert path.read_bytes().startswith(b"\x7fELF")


@by_native
def test_what_is_built_into_the_package_needs_no_compiler(prebuilt, fresh, monkeypatch):
    monkeypatch.setattr(toolchain, "compiled", None)
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert native.library().path == prebuilt
    assert not (fresh / "cache").exists()


@by_native
@pytest.mark.parametrize("harm", [half_written, changed, without_digest, with_another_digest])
def test_what_is_built_in_but_not_whole_is_compiled_here(harm, prebuilt, built, fresh, monkeypatch, caplog):
    monkeypatch.setattr(toolchain, "compiled", lambda *args: built)
    harm(prebuilt)
    assert native.library().path.parent == fresh / "cache"
    assert ("reinstall fxbt" in caplog.text) == (harm is not without_digest)


@by_native
def test_what_is_built_from_another_source_is_not_taken(prebuilt, built, fresh, monkeypatch):
    monkeypatch.setattr(toolchain, "compiled", lambda *args: built)
    other = fresh / "native.c"
    other.write_text(toolchain.SOURCE.read_text() + "// another")
    monkeypatch.setattr(toolchain, "SOURCE", other)
    assert native.library().path.parent == fresh / "cache"


@by_native
def test_a_compiler_that_fails_runs_once(fresh, monkeypatch):
    calls = fresh / "calls"
    monkeypatch.setenv("CC", compiler(fresh, f"echo called >> {calls}; exit 1"))
    native.compile_ahead()
    assert native.library() is None and native.obstacle() is not None
    assert calls.read_text() == "called\n"


@by_native
@pytest.mark.parametrize(
    ("right", "other"),
    [
        ("sums[i][1] += factor * right", "sums[i][1] += factor * left"),
        ("all(1)) / (1 + e)", "all(1)) / (2 + e)"),
        ("return sum == 0 ? 0 : 1 / sum", "return sum"),
    ],
    ids=["product", "activation", "softmax"],
)
def test_a_kernel_that_is_off_is_not_taken(right, other, fresh, monkeypatch):
    source = toolchain.SOURCE.read_text()
    wrong = source.replace(right, other)
    assert wrong != source
    monkeypatch.setattr(toolchain, "SOURCE", fresh / "native.c")
    toolchain.SOURCE.write_text(wrong)
    assert native.library() is None
    assert native.obstacle().startswith("the compiled kernels give values that differ by")


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in toolchain.OF_CAPABILITY, reason="another reason comes first here"
)
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no such flag >&2; exit 1", "failed: no such flag"),
        ("sleep 5", "took longer than"),
        ('while [ "$1" != -o ]; do shift; done; echo nothing > "$2"', "cannot be loaded"),
    ],
)
def test_a_compiler_that_does_not_work_is_told(script, reason, fresh, monkeypatch):
    monkeypatch.setenv("CC", compiler(fresh, script))
    monkeypatch.setattr(toolchain, "COMPILE_SECONDS", 1)
    assert native.library() is None
    assert reason in native.obstacle()


def test_without_a_compiler_torchs_kernels_stay(fresh, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native.library() is None
    assert native.obstacle() == "no C compiler: neither cc nor gcc was found, and CC is not set"


def test_another_processor_keeps_torchs_kernels(fresh, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert native.library() is None
    assert native.obstacle() == "the kernels need a CPU with AVX2 or AVX-512, but torch reports DEFAULT"


def test_it_can_be_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("FXBT_NATIVE", "0")
    assert (native.library(), native.obstacle()) == (None, "FXBT_NATIVE=0")


@by_native
def test_without_a_cache_it_is_compiled_into_a_private_folder(fresh, caplog):
    (fresh / "cache").write_text("a file stands in the folder's place")
    assert native.library().path.parent.name.startswith("fxbt-")
    assert "it is not a folder" in caplog.text and "FXBT_CACHE_DIR" in caplog.text


def test_where_nothing_can_be_written_it_is_told(fresh, monkeypatch):
    (fresh / "cache").write_text("a file stands in the folder's place")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(fresh / "cache"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("CC", "cc")
    assert native.library() is None
    assert native.obstacle().startswith("the compiled kernels cannot be saved: ")


@by_native
def test_a_folder_that_lets_nothing_run_is_told(fresh, monkeypatch):
    facts = types.SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: facts)
    monkeypatch.setenv("CC", compiler(fresh, 'while [ "$1" != -o ]; do shift; done; echo nothing > "$2"'))
    assert native.library() is None
    assert "is mounted noexec; set FXBT_CACHE_DIR to another folder" in native.obstacle()
