"""Linear layers below float32, if requested: in bfloat16, or on int8 weights and activations.

Only what a linear computes is narrow: sums with residuals, norms and attention stay in float32, and so do the model's
own weights.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, fx

from ...graph.node import argument
from ...graph.record import StageRecord
from ...torch_compat import is_vnni_supported
from .epilogue import STAGE, Epilogue, activated, epilogue_of, fused_in
from .linears import can_be_packed, can_pack_here, pack_for_onednn

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn
onednn = torch.ops.onednn

LARGEST = 127  # number of steps on either side of the middle, for activations and weights
MIDDLE = 128  # of an activation's levels, which are unsigned
SMALLEST_STEP = 1e-30  # its inverse is a float32, too
LONGEST_SUM = (2**31 - 1) // (2 * MIDDLE * LARGEST)  # the number of products whose sum always fits an int32


class Precision(Protocol):
    """Writes the linears of one graph; one object per graph, so that what several linears share is made once."""

    name: str

    def __init__(self, graph: fx.Graph, constant: set[fx.Node], record: StageRecord) -> None: ...

    def linear(self, node: fx.Node) -> None:
        """Replaces a linear node."""


def precision_of(dtype: torch.dtype | None, quantize: str | None) -> type[Precision] | None:
    """What `optimize(dtype=..., quantize=...)` asks for; None is the model's own precision.

    Raises:
        ValueError: an unknown value, both at once, or no kernels on this machine.
    """
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"dtype is {dtype!r}, expected None (the model's own) or torch.bfloat16")
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}, expected None or 'int8'")
    if dtype is not None and quantize is not None:
        raise ValueError(
            f"dtype={dtype} and quantize={quantize!r} both set the precision of linear layers; pass only one of them"
        )
    if dtype is not None and not mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("dtype=torch.bfloat16 needs a CPU with AVX-512 for which oneDNN has bfloat16 kernels")
    if quantize is not None and not can_quantize_here():
        # Instructions before VNNI add pairs of products in 16 bits, which saturates.
        raise ValueError("quantize='int8' needs a CPU with AVX512-VNNI and a torch with oneDNN")
    if dtype is not None:
        return Bfloat16
    return Int8 if quantize is not None else None


def can_quantize_here() -> bool:
    """Whether this machine sums products of 8-bit numbers without saturation."""
    return torch.backends.mkldnn.is_available() and is_vnni_supported()


def narrow_linears(precision: type[Precision], graph: fx.Graph, constant: set[fx.Node]) -> StageRecord:
    """Computes linears on float32 weights in `precision`; the nodes that make its own weights join `constant`.

    Returns the record of fused epilogues.
    """
    record = StageRecord(STAGE)
    if not can_pack_here():
        return record
    write = precision(graph, constant, record)
    for node in list(graph.nodes):
        if can_be_packed(node, constant):
            write.linear(node)
    return record


class Bfloat16:
    """Packed copies of the weights in bfloat16, inputs cast, results cast back, an activation fused in."""

    name = "bfloat16"

    def __init__(self, graph: fx.Graph, constant: set[fx.Node], record: StageRecord) -> None:
        self._graph, self._constant, self._record = graph, constant, record
        self._formulas = activated()
        self._known: dict[tuple[Any, torch.dtype], fx.Node] = {}

    def linear(self, node: fx.Node) -> None:
        """Computes a linear, and an activation after it, in bfloat16."""
        x: Any = node.args[0]
        epilogue = epilogue_of(node, self._constant, self._record, self._formulas)
        packed = self._packed(node.args[1])
        narrow = self._cast(x, torch.bfloat16)
        with self._graph.inserting_after(epilogue.chain[-1]):
            arguments: Any = (narrow, packed, argument(node, "bias"), *fused_in(epilogue.activation))
            fused = self._graph.call_function(mkldnn._linear_pointwise.default, arguments)
        wide = self._cast(fused, torch.float32)
        self._known[wide, torch.bfloat16] = fused  # a linear that follows takes it directly
        epilogue.replace_by(wide, self._record)

    def _packed(self, weight: Any) -> fx.Node:
        if (weight, torch.bfloat16) not in self._known:
            with self._graph.inserting_after(weight):
                cast = self._graph.call_function(aten.to.dtype, (weight, torch.bfloat16))
            with self._graph.inserting_after(cast):
                packed = self._graph.call_function(pack_for_onednn, (cast,))
            self._constant.update((cast, packed))
            self._known[weight, torch.bfloat16] = packed
        return self._known[weight, torch.bfloat16]

    def _cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`value` in `dtype`: one node right after it, shared by all readers."""
        if (value, dtype) not in self._known:
            with self._graph.inserting_after(value):
                self._known[value, dtype] = self._graph.call_function(aten.to.dtype, (value, dtype))
        return self._known[value, dtype]


class Int8:
    """Weights in int8 with a step per output channel, inputs in 8 bits with a step per token.

    This is the scheme of torchao's `Int8DynamicActivationInt8WeightConfig`, with oneDNN's kernel. One step for all
    tokens, as in `torch.ao.quantization.quantize_dynamic`, changes MiniLM's outputs by 14 % where this changes them by
    5, and a token's result would depend on the tokens beside it.
    """

    name = "int8"

    def __init__(self, graph: fx.Graph, constant: set[fx.Node], record: StageRecord) -> None:
        self._graph, self._constant, self._record = graph, constant, record
        self._known: dict[Any, tuple[fx.Node, ...]] = {}

    def linear(self, node: fx.Node) -> None:
        """Computes a linear on int8 weights, unless its sums could exceed an int32."""
        x, weight = node.args[:2]
        outputs, inputs = map(int, weight.meta["val"].shape)  # type: ignore[union-attr]
        if not 0 < inputs <= LONGEST_SUM:
            return
        weights = self._weights(weight)
        with self._graph.inserting_after(node):
            arguments: Any = (x, *weights, argument(node, "bias"))
            quantized = self._graph.call_function(Int8Linear(outputs), arguments)
        Epilogue((node,)).replace_by(quantized, self._record)

    def _weights(self, weight: Any) -> tuple[fx.Node, ...]:
        if weight not in self._known:
            with self._graph.inserting_after(weight):
                steps = self._graph.call_function(channel_steps, (weight,))
            with self._graph.inserting_after(steps):
                levels = self._graph.call_function(in_steps, (weight, steps))
            with self._graph.inserting_after(levels):
                packed = self._graph.call_function(onednn.qlinear_prepack.default, (levels, None))
                sums = self._graph.call_function(channel_sums, (levels, steps))
            self._known[weight] = packed, steps, sums
            self._constant.update((levels, *self._known[weight]))
        return self._known[weight]


def channel_steps(weight: Tensor) -> Tensor:
    """[n, k] -> [n]: the value of one int8 step in each output channel."""
    return weight.abs().amax(1).div_(LARGEST).clamp_min_(SMALLEST_STEP)


def in_steps(weight: Tensor, steps: Tensor) -> Tensor:
    """A weight in int8."""
    return (weight / steps[:, None]).round_().to(torch.int8)


def channel_sums(levels: Tensor, steps: Tensor) -> Tensor:
    """[n, k] -> [n]: the sums of each channel's int8 weights, by which the middle of an input is multiplied.

    Sums of the original weights would be worse: the rounding errors of a channel add up, times a middle that is large
    if one feature is.
    """
    return levels.sum(1) * steps


class Int8Linear:
    """x @ w.T + b for x = middle + step * level, where levels are 8-bit integers and w has int8 steps of its own.

    The products of levels and weights are summed exactly. NaN or inf in a token makes all its results NaN or inf.
    """

    def __init__(self, outputs: int):
        self._outputs = outputs
        self._weight_zeros = torch.zeros(outputs, dtype=torch.int32)
        self.__name__ = "int8_linear"  # fx names nodes after it

    def __call__(self, x: Tensor, packed: Tensor, steps: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        middle = low.add(high).mul_(0.5)
        step = high.sub_(low).mul_(0.5 / LARGEST).clamp_min_(SMALLEST_STEP)
        levels = x.sub(middle).div_(step).add_(MIDDLE + 0.5).to(torch.uint8)  # 0.5 because the cast rounds down
        scaling: Any = (levels, 1.0, MIDDLE, packed, steps, self._weight_zeros)
        product = onednn.qlinear_pointwise(*scaling, None, 1.0, 0, torch.float32, "none", [], "")
        product = product.view(*x.shape[:-1], self._outputs)
        offset = middle * sums if bias is None else torch.addcmul(bias, middle, sums)
        return offset.addcmul_(product, step)
