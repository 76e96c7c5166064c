"""Linears on a CPU without gradients: the fastest kernel for each number of rows, with what follows fused in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .canonical import argument, only_user, same_shape
from .tune import Calls, Contest, Tuner, bucket_of

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn
ONEDNN_LINEAR = mkldnn._linear_pointwise.default

ROWS = (1, 4, 16, 64, 256, 1024)  # rows of x that linears are measured at
UP_TO = (2, 8, 32, 128, 512)
PACKED_FOR_ROWS = 128  # the layout is the same for 16 to 1024 rows, and no slower for one
MOST_OPERATIONS = 5e9  # of one call that is measured
COLD_BYTES = 32 * 2**20  # of copies of a weight: a model's weights come from memory, not from a cache
# Without measurements: with AVX-512, packed weights were 1.2 to 1.9 times as fast from 16 rows on; calling the packed
# kernel takes some 15 us, F.linear 3, which smaller weights than this do not win back.
PACKED_FROM_ELEMENTS = 256 * 256


@dataclass(frozen=True)
class Activation:
    """An activation that oneDNN computes as torch does, to the last bits: its name and algorithm there.

    `write` is torch's own, in place.
    """

    name: str
    algorithm: str
    write: Callable[[Tensor], Any]


ACTIVATIONS: dict[Any, Callable[[fx.Node], Activation]] = {
    aten.gelu.default: lambda node: _gelu(argument(node, "approximate")),
    aten.relu.default: lambda node: Activation("relu", "", torch.relu_),
    aten.silu.default: lambda node: Activation("swish", "", torch._C._nn.silu_),
}


def _gelu(approximate: str) -> Activation:
    write = functools.partial(torch._C._nn.gelu_, approximate=approximate)  # type: ignore[attr-defined]
    return Activation("gelu", approximate, write)


# Kernels for activation(x W^T + b): (x, weight, packed weight, bias) -> y.
Kernel = Callable[[Tensor, Tensor, Any, Tensor | None], Tensor]


def linear_kernels(activation: Activation | None) -> dict[str, Kernel]:
    """The kernels for a linear, by name; with an activation each of them includes it, and one has it fused in."""
    kernels: dict[str, Kernel] = {"F.linear": _plain, "packed": _by_onednn(None)}
    if activation is None:
        return kernels
    kernels = {name: _followed(kernel, activation.write) for name, kernel in kernels.items()}
    return {**kernels, "fused": _by_onednn(activation)}


def fused_in(activation: Activation | None) -> tuple[str, list[Any], str]:
    """The last arguments of `mkldnn._linear_pointwise`."""
    return ("none", [], "") if activation is None else (activation.name, [], activation.algorithm)


def _plain(x: Tensor, weight: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _by_onednn(activation: Activation | None) -> Kernel:
    how = fused_in(activation)
    return lambda x, weight, packed, bias: ONEDNN_LINEAR(x, packed, bias, *how)


def _followed(kernel: Kernel, write: Callable[[Tensor], Any]) -> Kernel:
    def call(x: Tensor, weight: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        y = kernel(x, weight, packed, bias)
        write(y)
        return y

    return call


class LinearByRows:
    """A linear, and the activation after it, by the kernel that was chosen for the number of rows of x."""

    def __init__(self, kernels: list[Kernel]):
        self._kernels = kernels
        self.__name__ = "linear_by_rows"  # fx names nodes by it

    def __call__(self, x: Tensor, weight: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        return self._kernels[bucket_of(rows, UP_TO)](x, weight, packed, bias)


def linears(n: int, k: int, activation: Activation | None = None) -> Contest:
    """The kernels for x[rows, k] and a float32 weight [n, k], by rows."""
    kernels = linear_kernels(activation)

    @functools.cache
    def weights() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        copies = max(len(kernels), min(256, COLD_BYTES // (n * k * torch.float32.itemsize)))
        plain = [torch.full((n, k), 0.5) for _ in range(copies)]
        packed = [mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) for weight in plain]
        return torch.zeros(n), list(zip(plain, packed, strict=True))

    def calls(rows: int) -> list[Calls] | None:
        if 2 * rows * n * k > MOST_OPERATIONS and rows > ROWS[0]:
            return None
        x = torch.full((rows, k), 0.5)
        bias, copies = weights()
        apart = len(copies) // len(kernels)  # a kernel must not find what another one has just read in the cache
        return [
            [functools.partial(kernel, x, *pair, bias) for pair in copies[apart * place :] + copies[: apart * place]]
            for place, kernel in enumerate(kernels.values())
        ]

    is_packed = torch.cpu._is_avx512_supported() and n * k >= PACKED_FROM_ELEMENTS
    by_rule = list(kernels).index(("fused" if activation else "packed") if is_packed else "F.linear")
    what = (f"linear {n}x{k} float32", *((activation.name, activation.algorithm) if activation else ()))
    return Contest(" ".join(filter(None, what)), tuple(kernels), ROWS, UP_TO, calls, by_rule)


def choose_linears(graph: fx.Graph, constant: set[fx.Node], tuner: Tuner) -> None:
    """Give linears on float32 weights the kernels that are the fastest here, with an activation or residual fused in.

    The nodes that pack weights for oneDNN join `constant`.
    """
    packed: dict[fx.Node, fx.Node] = {}
    if not can_pack_here():
        return
    for node in list(graph.nodes):
        if not can_be_packed(node, constant):
            continue
        weight = node.args[1]
        n, k = map(int, weight.meta["val"].shape)
        contest = linears(n, k, activation_after(node)[1])
        chosen = [contest.names[place] for place in tuner.choose(contest)]
        if weight not in packed and set(chosen) != {"F.linear"}:
            with graph.inserting_after(weight):
                packed[weight] = graph.call_function(mkldnn._reorder_linear_weight.default, (weight, PACKED_FOR_ROWS))
        _use(chosen, graph, node, packed.get(weight))
    constant.update(packed.values())


def activation_after(linear: fx.Node) -> tuple[fx.Node | None, Activation | None]:
    """The activation that alone reads a linear, if oneDNN has it: its node, and what it is."""
    node = only_user(linear, ACTIVATIONS)
    return (None, None) if node is None else (node, ACTIVATIONS[node.target](node))


def _use(chosen: list[str], graph: fx.Graph, linear: fx.Node, packed: fx.Node | None) -> None:
    activation, how = activation_after(linear)
    only = chosen[0] if len(set(chosen)) == 1 else None
    if only == "F.linear" and how is None:
        return
    (x, weight), bias = linear.args[:2], argument(linear, "bias")
    residual = _residual(linear) if only == "packed" and how is None else None
    last = activation or (residual[0] if residual else linear)
    target: Any
    arguments: Any
    if residual:
        target, arguments = mkldnn._linear_pointwise.binary, (x, residual[1], packed, bias, "add")
    elif only == ("fused" if how else "packed"):  # past the choice by rows
        target, arguments = ONEDNN_LINEAR, (x, packed, bias, *fused_in(how))
    else:
        kernels = linear_kernels(how)
        target, arguments = LinearByRows([kernels[name] for name in chosen]), (x, weight, packed, bias)
    with graph.inserting_after(last):
        result = graph.call_function(target, arguments)
    result.meta = dict(last.meta)
    last.replace_all_uses_with(result)
    graph.erase_node(last)
    if last is not linear:
        graph.erase_node(linear)


def _residual(linear: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(add, what is added) where a linear's result goes only into a sum with a value of its own shape."""
    add = only_user(linear, (aten.add.Tensor,))
    if add is None or add.kwargs or not all(isinstance(value, fx.Node) for value in add.args) or len(add.args) != 2:
        return None
    other: Any = add.args[1] if add.args[0] is linear else add.args[0]
    values = [node.meta["val"] for node in (linear, other)]
    if other is linear or values[0].dtype != values[1].dtype or values[0].dim() < 2 or not same_shape(*values):
        return None
    return add, other


def can_pack_here() -> bool:
    """Outside autocast, which would not see the packed op."""
    has_kernel = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_kernel and not torch.is_autocast_enabled("cpu")


def can_be_packed(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a node is a float32 linear on a weight, and not itself computed from weights alone."""
    if node.target is not aten.linear.default or node.args[1] not in constant or node in constant:
        return False
    x, weight = (node.args[place].meta["val"] for place in (0, 1))  # type: ignore[union-attr]
    on_cpu = x.device.type == weight.device.type == "cpu"
    return on_cpu and x.dtype is weight.dtype is torch.float32 and weight.dim() == 2 and weight.numel() > 0
