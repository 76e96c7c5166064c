"""Linears on a CPU without gradients: the fastest kernel for each number of rows, with epilogue fusion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...graph.node import argument
from ...graph.record import StageRecord
from ...kernels import native
from ...kernels.autotune import Tuner
from ...kernels.turns import Calls, Contest, bucket_of
from ...torch_compat import is_avx512_supported
from .epilogue import STAGE, Activation, Epilogue, Norm, epilogue_of, epilogues, fused_in

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn
# saves a Python frame
ONEDNN_LINEAR, ONEDNN_SUM = mkldnn._linear_pointwise.default._op, mkldnn._linear_pointwise.binary._op

ROWS = (1, 4, 16, 64, 256, 1024)  # numbers of rows of x at which linears are measured
UP_TO = (2, 8, 32, 128, 512)
PACKED_FOR_ROWS = 128  # the layout is the same for 16 to 1024 rows, and no slower for one
MOST_OPERATIONS = 2e9  # of one measured call, 10 to 20 ms; more rows use the kernel of fewer
COLD_BYTES = 16 * 2**20  # of copies of a weight, because a model's weights come from memory, not from a cache
# Without measurements, where our own kernel does not come first: with AVX-512, packed weights were 1.2 to 1.9 times as
# fast from 16 rows on; calling the packed kernel takes about 15 us, F.linear 3, which weights smaller than this do not
# win back.
PACKED_FROM_ELEMENTS = 256 * 256


# (x, weight, bias, residual) -> x W^T + bias, then either an activation of it or its sum with a residual. With a norm,
# two more arguments: gamma and beta.
Run = Callable[..., Any]


@dataclass(frozen=True)
class Kernel:
    """One way to compute a linear and its epilogue, on the weight as `pack` makes it."""

    run: Run
    pack: Callable[[Tensor], Tensor] | None = None


def linear_kernels(n: int, k: int, activation: Activation | None, norm: Norm | None = None) -> dict[str, Kernel]:
    """The kernels for a weight [n, k], by name, each with its epilogue: an activation, a norm. Some have it fused."""
    torchs = {"F.linear": Kernel(_plain), "packed": Kernel(_by_onednn(None), pack_for_onednn)}
    if activation is not None:
        torchs = {name: Kernel(_followed(kernel.run, activation.write), kernel.pack) for name, kernel in torchs.items()}
        torchs["fused"] = Kernel(_by_onednn(activation), pack_for_onednn)
    if norm is not None:
        torchs = {name: Kernel(_normed(kernel.run, n, norm), kernel.pack) for name, kernel in torchs.items()}
    if (library := native.library()) is None:
        return torchs
    own = library.linear(n, k, activation.known_as if activation else "", *(norm or ()))
    return {**torchs, "native": Kernel(own, library.pack)}


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


def pack_for_onednn(weight: Tensor) -> Tensor:
    """A weight [n, k] in oneDNN's packed layout."""
    return mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)


def _by_onednn(activation: Activation | None) -> Run:
    how = fused_in(activation)

    def onednn(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if residual is not None:
            return ONEDNN_SUM(x, residual, packed, bias, "add")
        return ONEDNN_LINEAR(x, packed, bias, *how)

    return onednn


def _followed(run: Run, write: Callable[[Tensor], Any]) -> Run:
    def followed(x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = run(x, weight, bias, residual)
        write(y)
        return y

    return followed


def _normed(run: Run, n: int, norm: Norm) -> Run:
    def normed(
        x: Tensor, weight: Any, bias: Tensor | None, residual: Tensor | None, gamma: Tensor | None, beta: Tensor | None
    ) -> Any:
        y = run(x, weight, bias, residual)
        normalized = torch.layer_norm(y, (n,), gamma, beta, norm.epsilon, False)
        return (y, normalized) if norm.keeps_sum else normalized

    return normed


class LinearByRows:
    """A linear and its epilogue, with the kernel chosen for the number of rows of x.

    `weights` is its weight in each form that the kernels take; `forms` has the index of the form for each kernel.
    """

    def __init__(self, runs: list[Run], forms: list[int]):
        self.runs, self.forms = runs, forms
        self.__name__ = "linear_by_rows"  # fx names nodes after it

    def __call__(self, x: Tensor, weights: list[Tensor], *others: Tensor | None) -> Any:
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        place = bucket_of(rows, UP_TO)
        return self.runs[place](x, weights[self.forms[place]], *others)


def linears(n: int, k: int, activation: Activation | None = None) -> Contest:
    """The kernels for x[rows, k] and a float32 weight [n, k], by rows."""
    kernels = linear_kernels(n, k, activation)

    @functools.cache
    def weights() -> tuple[Tensor, dict[Any, list[Tensor]]]:
        copies = max(len(kernels), min(256, COLD_BYTES // (n * k * torch.float32.itemsize)))
        plain = [torch.full((n, k), 0.5, dtype=torch.float32, device="cpu") for _ in range(copies)]
        packs = {kernel.pack for kernel in kernels.values()}
        return torch.zeros(n, dtype=torch.float32, device="cpu"), {
            pack: list(map(pack, plain)) if pack else plain for pack in packs
        }

    def calls(rows: int) -> list[Calls] | None:
        if 2 * rows * n * k > MOST_OPERATIONS and rows > ROWS[0]:
            return None
        x = torch.full((rows, k), 0.5, dtype=torch.float32, device="cpu")
        bias, forms = weights()
        found: list[Calls] = []
        for place, kernel in enumerate(kernels.values()):
            copies = forms[kernel.pack]
            # so that none finds in the cache what another one has just read
            start = len(copies) // len(kernels) * place
            found.append(
                [functools.partial(kernel.run, x, copy, bias, None) for copy in copies[start:] + copies[:start]]
            )
        return found

    what = f"linear {n}x{k} float32 {activation.known_as if activation else ''}".strip()
    return Contest(what, tuple(kernels), ROWS, UP_TO, calls, _by_rule(n * k, kernels), weights.cache_clear)


def _by_rule(elements: int, kernels: dict[str, Kernel]) -> str:
    if native.comes_first():
        return "native"
    if elements < PACKED_FROM_ELEMENTS or not is_avx512_supported():
        return "F.linear"
    return "fused" if "fused" in kernels else "packed"


def choose_linears(graph: fx.Graph, constant: set[fx.Node], tuner: Tuner) -> StageRecord:
    """Gives linears on float32 weights the kernels that are fastest here, with one of `epilogues` fused in.

    Returns the record of fused epilogues. The nodes that pack weights join `constant`.
    """
    packed: dict[Any, fx.Node] = {}
    record, formulas = StageRecord(STAGE), epilogues()
    if not can_pack_here():
        return record
    for node in list(graph.nodes):
        if not can_be_packed(node, constant):
            continue
        weight: Any = node.args[1]
        n, k = map(int, weight.meta["val"].shape)
        epilogue = epilogue_of(node, constant, record, formulas)
        names = tuner.choose(linears(n, k, epilogue.activation))
        if epilogue.activation is None and set(names) == {"F.linear"}:
            continue
        kernels = linear_kernels(n, k, epilogue.activation, epilogue.norm)
        forms = [_form(weight, kernels[name].pack, packed) for name in names]
        result = _call(graph, epilogue, [kernels[name].run for name in names], forms)
        epilogue.replace_by(result, record)
    if tuner.answers and (reason := native.obstacle()):
        tuner.notes["native"] = f"not available: {reason}"
    constant.update(packed.values())
    return record


def _form(weight: fx.Node, pack: Callable[[Tensor], Tensor] | None, packed: dict[Any, fx.Node]) -> fx.Node:
    """The node of a weight as `pack` makes it."""
    if pack is None:
        return weight
    if (weight, pack) not in packed:
        with weight.graph.inserting_after(weight):
            packed[weight, pack] = weight.graph.call_function(pack, (weight,))
    return packed[weight, pack]


def _call(graph: fx.Graph, epilogue: Epilogue, runs: list[Run], forms: list[fx.Node]) -> fx.Node:
    """The node that computes a linear with its epilogue."""
    linear, last = epilogue.chain[0], epilogue.chain[-1]
    others = (argument(linear, "bias"), epilogue.residual, *epilogue.affine)
    with graph.inserting_after(last):
        if len(set(runs)) == 1:
            return graph.call_function(runs[0], (linear.args[0], forms[0], *others))
        each = list(dict.fromkeys(forms))
        target = LinearByRows(runs, [each.index(form) for form in forms])
        return graph.call_function(target, (linear.args[0], each, *others))


def can_pack_here() -> bool:
    """Whether weights can be packed: not under autocast, which would not see the packed op."""
    has_kernel = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_kernel and not torch.is_autocast_enabled("cpu")


def can_be_packed(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a node is a float32 linear on a weight, and not itself computed from weights only."""
    if node.target is not aten.linear.default or node.args[1] not in constant or node in constant:
        return False
    x, weight = (node.args[place].meta["val"] for place in (0, 1))  # type: ignore[union-attr]
    on_cpu = x.device.type == weight.device.type == "cpu"
    is_float = on_cpu and x.dtype is weight.dtype is torch.float32 and weight.dim() == 2 and weight.numel() > 0
    bias = argument(node, "bias")
    # oneDNN reads any bias as if it were contiguous
    return is_float and (bias is None or bias in constant and bias.meta["val"].is_contiguous())
