"""Our own float32 CPU kernels for linears and attention (native.c), compiled by the machine's C compiler.

torch's kernels for linears spend 10 us per call around a product and reach only half of the processor's speed below
some hundred rows; its kernel for attention multiplies blocks that are too small. Wheels contain the compiled file; a
file compiled here is kept on disk (`cache`), each with its digest. If there is neither such a file nor a compiler
(`toolchain`), or the result is wrong, `library()` is None and torch's kernels stay; `obstacle()` says why.
`FXBT_NATIVE=0` also disables them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cache, toolchain
from .toolchain import NoKernel

logger = logging.getLogger("fxbt")

PREBUILT = Path(__file__).parent  # the place of the kernels in a wheel
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # in the order of native.c, by their names in oneDNN
    "": torch.clone,
    "relu": F.relu,
    "gelu none": F.gelu,
    "gelu tanh": functools.partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
}

# Argument types of the functions in native.c.
LINEAR = struct.Struct("@8P3qf2i")
ATTENTION = struct.Struct("@6P23qf2i")
STEP = struct.Struct("@17qfi")
CHAIN = struct.Struct("@2P5q")


class Linear:
    """A linear on a weight [n, k]: (x, packed, bias, residual) -> activation(x W^T + bias + residual).

    x is (..., k), bias (n) or None, residual (..., n) or None; the activation is an index into `ACTIVATIONS`. With an
    `epsilon`, it returns the layer norm of the result, using two more arguments, gamma (n) or None and beta (n) or
    None; with `keeps_sum`, both the result and its norm. All tensors are float32 on the CPU.
    """

    def __init__(
        self, call: Callable[[bytes], None], n: int, k: int, activation: int, epsilon: float | None, keeps_sum: bool
    ):
        self._call = call
        self.n, self.k, self.activation, self.epsilon, self.keeps_sum = n, k, activation, epsilon, keeps_sum
        self.__name__ = "native"  # fx names nodes after it

    def __call__(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Any:
        n, k = self.n, self.k
        x, bias, residual, gamma, beta = map(_dense, (x, bias, residual, gamma, beta))
        y = x.new_empty((*x.shape[:-1], n)) if residual is None else torch.empty_like(residual)
        if x.shape[-1] != k or x.numel() * n != y.numel() * k:  # otherwise the kernel would read past the end
            raise ValueError(f"x {tuple(x.shape)} W^T + {tuple(y.shape)}, where W is {(n, k)}")
        normed = None if self.epsilon is None else torch.empty_like(y) if self.keeps_sum else y
        self._call(
            LINEAR.pack(
                *(x.data_ptr(), packed.data_ptr(), _address(bias), _address(residual), y.data_ptr()),
                *(_address(gamma), _address(beta), _address(normed)),
                *(y.numel() // n, n, k, self.epsilon or 0, self.activation, torch.get_num_threads()),
            )
        )
        return (y, normed) if self.keeps_sum else y


class Library:
    """The compiled kernels in the file `path`."""

    def __init__(self, path: Path):
        try:
            # OpenMP is not linked in: the symbols that torch has loaded are used, so that threads are shared
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoKernel(f"the compiled kernels cannot be loaded: {error}{_noexec_hint(path)}") from error
        self.path = path
        self._linear, self._attention, self._chain = library.fxbt_linear, library.fxbt_attention, library.fxbt_chain
        self._linear.restype = None
        self._linear.argtypes = self._attention.argtypes = [ctypes.c_char_p]
        self._chain.argtypes = [ctypes.c_char_p] * 3
        self._panel: int = library.fxbt_panel()
        self._depth: int = library.fxbt_depth()

    def pack(self, weight: Tensor) -> Tensor:
        """A weight [n, k] as the kernel reads it: per part of its columns, panels of rows, the last one zero-padded."""
        panels = F.pad(weight, (0, 0, 0, -len(weight) % self._panel)).unflatten(0, (-1, self._panel))
        return torch.cat([part.transpose(1, 2).flatten() for part in panels.split(self._depth, 2)])

    def linear(
        self, n: int, k: int, activation: str = "", epsilon: float | None = None, keeps_sum: bool = False
    ) -> Linear:
        """The kernel for a weight [n, k], with an activation and the epsilon of a layer norm, if there are any."""
        return Linear(self._linear, n, k, list(ACTIVATIONS).index(activation), epsilon, keeps_sum)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        bounds: Tensor | None = None,
        longest: int = 0,
    ) -> Tensor:
        """softmax(scale Q K^T + bias) V of float32 CPU tensors (batch, heads, seq, head_dim), like SDPA.

        `bias` is (batch | 1, heads | 1, seq | 1, keys | 1); a query with all keys blocked gets zeros. The number of
        query heads may be a multiple of the number of key heads. With `bounds` (int32) and no bias, the tensors are
        packed (1, heads, tokens, head_dim): tokens between two bounds, at most `longest`, see each other. The result
        is contiguous as (batch, seq, heads, head_dim).

        Raises:
            ValueError: the shapes do not fit.
            MemoryError: there is no memory for a head's keys, values and scores.
        """
        of_query, of_key, of_value = query.stride(), key.stride(), value.stride()
        if not of_query[3] == of_key[3] == of_value[3] == 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
            return self.attention(query, key, value, bias, is_causal, scale, bounds, longest)
        batch, heads, queries, head_dim = query.shape
        key_heads, keys, value_dim = value.shape[1:]
        if key.shape != (batch, key_heads, keys, head_dim) or len(value) != batch or heads % key_heads:
            raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}")
        output = query.new_empty((batch, queries, heads, value_dim))
        self._attend(
            (query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr()),
            (of_query, of_key, of_value, (queries * heads * value_dim, value_dim, heads * value_dim)),
            (batch, heads, key_heads, queries, keys, head_dim, value_dim),
            *(bias, is_causal, scale, bounds, longest),
        )
        return output.transpose(1, 2)

    def attention_of(
        self, heads: tuple[int, int, int], starts: tuple[int, int, int], head_dim: int
    ) -> Callable[..., Tensor]:
        """`attention` on a projection: (projection, bias, is_causal, scale, bounds, longest) -> the heads' results.

        `projection` is (batch, seq, all heads * head_dim); queries, keys and values are `heads` of its heads, from
        these `starts` on. The result is (batch, seq, query heads * head_dim).
        """
        query_heads, key_heads, value_heads = heads
        if key_heads != value_heads or query_heads % key_heads:
            raise ValueError(f"{query_heads} query heads, {key_heads} key heads, {value_heads} value heads")
        least_width = head_dim * max(start + count for start, count in zip(starts, heads, strict=True))
        output_width = query_heads * head_dim
        places = [start * head_dim * torch.float32.itemsize for start in starts]

        def native_attention(projection: Tensor, *options: Any) -> Tensor:
            projection = projection.contiguous()
            batch, tokens, width = projection.shape
            if width < least_width:
                raise ValueError(f"a projection {tuple(projection.shape)} of {heads} heads of {head_dim} from {starts}")
            output = projection.new_empty((batch, tokens, output_width))
            along, along_output = ((tokens * each, head_dim, each) for each in (width, output_width))
            first = projection.data_ptr()
            self._attend(
                (*(first + place for place in places), output.data_ptr()),
                (along, along, along, along_output),
                (batch, query_heads, key_heads, tokens, tokens, head_dim, head_dim),
                *options,
            )
            return output

        return native_attention

    def chain(
        self,
        steps: bytes,
        given: Sequence[int],
        block: Tensor,
        bounds: Tensor | None,
        sizes: Sequence[int],
    ) -> None:
        """Runs kernels one by one: `steps` are packed `STEP`s, `given` the addresses that they refer to.

        `sizes` are the rows of all values, the number of sequences, and the tokens of each (with `bounds`, of the
        longest).
        """
        count = len(steps) // STEP.size
        call = CHAIN.pack(block.data_ptr(), _address(bounds), count, *sizes, torch.get_num_threads())
        if not self._chain(call, steps, struct.pack(f"@{len(given)}q", *given)):
            raise MemoryError(f"no memory for the scores of {sizes[2]} tokens")

    def _attend(
        self,
        pointers: tuple[int, ...],
        strides: tuple[tuple[int, ...], ...],
        sizes: tuple[int, ...],
        bias: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        bounds: Tensor | None = None,
        longest: int = 0,
    ) -> None:
        """Calls the kernel for query, key, value and output; `strides` are those of sequence, head and token."""
        batch, heads, key_heads, queries, keys, head_dim, value_dim = sizes
        each = [stride for of in strides for stride in of[:3]]
        if bounds is not None:
            each[::3] = (0, 0, 0, 0)
            batch, queries, keys = len(bounds) - 1, longest, longest
        of_bias = [0, 0, 0, 0]
        if bias is not None:
            if not is_bias_of(bias, (batch, heads, queries, keys)):
                raise ValueError(f"a bias {tuple(bias.shape)} on scores {(batch, heads, queries, keys)}")
            bias = bias.contiguous()
            of_bias = strides_of(bias)
        call = ATTENTION.pack(
            *(*pointers, _address(bias), _address(bounds), *each, *of_bias),
            *(batch, heads, heads // key_heads, queries, keys, head_dim, value_dim),
            *(scale_of(scale, head_dim), is_causal, torch.get_num_threads()),
        )
        if not self._attention(call):
            raise MemoryError(f"no memory for the scores of {queries} queries and {keys} keys")


def is_bias_of(bias: Tensor, scores: tuple[int, int, int, int]) -> bool:
    """Whether each axis of a bias has the size of the scores (batch, heads, queries, keys), or size 1."""
    return all(n in (1, size) for n, size in zip(bias.shape, scores, strict=True))


def strides_of(bias: Tensor) -> list[int]:
    """The stride of each axis in floats, 0 where one value serves all."""
    return [0 if n == 1 else along for n, along in zip(bias.shape, bias.stride(), strict=True)]


def scale_of(scale: float | None, head_dim: int) -> float:
    """The factor by which SDPA multiplies scores."""
    return 1 / math.sqrt(head_dim) if scale is None else scale


def _dense(tensor: Any) -> Any:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def library() -> Library | None:
    """The kernels, compiled and tested; None if they are not available."""
    found = _library()
    return found if isinstance(found, Library) else None


def obstacle() -> str | None:
    """Why the kernels are not available; None if they are."""
    found = _library()
    return found if isinstance(found, str) else None


def comes_first() -> bool:
    """Whether to use the kernels where nothing is measured: on processors with instructions they have been timed on.

    On AVX2 (Zen 3) linear layers took 0.6 to 1.0 of the best other kernel's time, attention 0.8 to 1.25; on AVX-512
    (Zen 5) 0.7 to 1.05 from 4 rows on, and 0.45 to 0.9 from 64 tokens on (`shipped.json`).
    """
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and library() is not None


@functools.cache
def _library() -> Library | str:
    try:
        return _made()
    except NoKernel as error:
        logger.info("linears and attention use torch's kernels only: %s", error)
        return str(error)


def _made() -> Library:
    """The kernels for this machine and source: from the package or the cache, else compiled now."""
    path, is_new = compile_ahead().result()
    try:
        return _tried(path)
    except NoKernel as error:
        if is_new:
            raise
        logger.info("compiled again, because %s does not work: %s", path, error)
    return _tried(_compiled(*_wanted())[0])


@functools.cache
def compile_ahead() -> Future[tuple[Path, bool]]:
    """Starts the compiler if the kernels are missing: it takes a second, while tracing a model leaves one core idle.

    The result (or its `NoKernel`) is the file of the kernels, and whether it was just compiled.
    """
    thread = ThreadPoolExecutor(1)
    try:
        return thread.submit(_found_or_compiled)
    finally:
        thread.shutdown(wait=False)


if hasattr(os, "register_at_fork"):  # a forked child does not have the thread
    os.register_at_fork(after_in_child=compile_ahead.cache_clear)


def _found_or_compiled() -> tuple[Path, bool]:
    """One process compiles; others that need the same file wait for it."""
    if path := _prebuilt():
        return path, False
    compiler, flags, name = _wanted()
    shared = cache.once(
        "compiling", lambda: _kept(name), lambda: _compiled(compiler, flags, name), toolchain.COMPILE_SECONDS
    )
    return shared or _compiled(compiler, flags, name)  # compile here rather than wait any longer


def _flags() -> tuple[str, ...]:
    if os.environ.get("FXBT_NATIVE", "1") == "0":
        raise NoKernel("FXBT_NATIVE=0")
    return toolchain.flags_for(torch.backends.cpu.get_cpu_capability())


def _wanted() -> tuple[str, tuple[str, ...], str]:
    """The compiler, its flags, and the name of the file that it makes."""
    flags, compiler = _flags(), toolchain.compiler()
    return compiler, flags, toolchain.name_of(compiler, *flags)


def _prebuilt() -> Path | None:
    """The file from a wheel for this machine and this exact source; None if there is none."""
    path = PREBUILT / toolchain.name_of(*_flags())
    try:
        is_whole = toolchain.digest_of(path.read_bytes()) == _digest_file(path).read_text()
    except OSError:  # a checkout, or a wheel built without a compiler
        return None
    if not is_whole:
        logger.warning("fxbt: %s is damaged and not used; reinstall fxbt", path)
    return path if is_whole else None


def _kept(name: str) -> tuple[Path, bool] | None:
    """The file compiled earlier, if it is whole; loading it by path is safe because nobody else can write there."""
    library, digest = cache.find(name), cache.find(_digest_file(Path(name)).name)
    is_whole = library and digest and toolchain.digest_of(library.data).encode() == digest.data
    return (library.path, False) if library and is_whole else None


def _compiled(compiler: str, flags: tuple[str, ...], name: str) -> tuple[Path, bool]:
    try:
        data = toolchain.compiled(compiler, flags, cache.place())
        path = cache.write(name, data)
        cache.write(_digest_file(Path(name)).name, toolchain.digest_of(data).encode())
    except OSError as error:
        raise NoKernel(f"the compiled kernels cannot be saved: {error}") from error
    return path, True


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _noexec_hint(path: Path) -> str:
    """A hint for a file system mounted noexec; "" for others."""
    try:
        forbids = bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except (AttributeError, OSError):  # Windows, or the file is gone
        return ""
    return f" ({path.parent} is mounted noexec; set FXBT_CACHE_DIR to another folder)" if forbids else ""


def _tried(path: Path) -> Library:
    """Loads the kernels and compares them with torch's: a compiler, or a file in the cache, may be broken."""
    made = Library(path)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for rows, n, k in ((1, 40, 1700), (29, 33, 5)):
            shapes = ((rows, k), (n, k), (n,), (rows, n))
            x, weight, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
            weight /= k**0.5
            packed, exact = made.pack(weight), F.linear(x.double(), weight.double(), bias.double()) + residual
            for activation, function in ACTIVATIONS.items():
                _check(made.linear(n, k, activation)(x, packed, bias, residual), function(exact))
            y, normed = made.linear(n, k, "", 1e-5, keeps_sum=True)(x, packed, bias, residual, bias, None)
            _check(y, exact)
            _check(normed, F.layer_norm(exact, (n,), bias.double()))
            heads = torch.randn(2, rows, 3 * 2, n, generator=generator).transpose(1, 2).split(2, 1)
            exact = F.scaled_dot_product_attention(*(x.double() for x in heads))
            _check(made.attention(*heads), exact)
            side_by_side = torch.cat(heads, 1).transpose(1, 2).flatten(2)
            _check(made.attention_of((2, 2, 2), (0, 2, 4), n)(side_by_side), exact.transpose(1, 2).flatten(2))
    return made


def _check(found: Tensor, exact: Tensor) -> None:
    gap = float((found - exact).abs().max())
    if not gap <= 1e-4:  # values around 1, sums of 1700 products, differ by 2e-6
        raise NoKernel(f"the compiled kernels give values that differ by {gap:.1e}")
