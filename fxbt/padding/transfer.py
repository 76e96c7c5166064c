"""How each op continues packed tokens: ops that keep tokens apart run unchanged on packed ones.

`analysis.axis_transfer` decides whether an op keeps tokens apart; this file says what the op becomes in the packed
graph. An op through which padding could affect tokens is a `Miss`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ..analysis.axes import EQUATIONS, EXPANDS, IDENTITIES, PERMUTES, Axes, Label, sizes_of
from ..analysis.axis_transfer import FILLS, LAYOUTS, POOLS, SELECTIONS, Flow, Labels, Product, tensor_inputs
from ..graph.blocks import ATTENTIONS
from ..graph.miss import Miss
from ..graph.node import argument
from ..graph.opsets import CASTS, FILLED
from ..kernels import packed
from .cross_entropy import CROSS_ENTROPY, cross_entropy
from .packed_attention import attention
from .tokens import Dense, Domain, Packed, Value, Wide, Writer

aten = torch.ops.aten

# Packed values begin as early as possible; if embedded tokens are mixed (shifted, for example), only at linears.
SEEDS = ({aten.embedding.default, aten.linear.default}, {aten.linear.default})
POSITIONS = {aten.select.int, aten.slice.Tensor}
# if the value at padding is one number, it is the same in their results
KEEPING_NUMBERS = SELECTIONS | CASTS | {operator.getitem}
PRODUCTS = EQUATIONS.keys() - {aten.linear.default, aten.sum.dim_IntList}
DENSE_ALONE = {  # may keep tokens apart, but no test runs them on packed ones
    *(aten.repeat.default, aten.pad.default, aten.constant_pad_nd.default, aten.triu.default, aten.tril.default),
    *(aten.group_norm.default, *POOLS),
}


def transfer(writer: Writer, node: fx.Node, seeds: Collection[Any]) -> Value:
    """What `node` becomes in the packed graph, whose packed values begin at ops of `seeds`.

    Raises:
        Miss: padding could affect its result.
    """
    writer.current = node
    if node.target in seeds and (seed := _seed(writer, node)) is not None:
        return seed
    values = {source: writer.values[source] for source in node.all_input_nodes}
    given = {source: value.axes for source, value in values.items() if not isinstance(value, Dense)}
    if not given:
        return writer.dense(node)
    if node.target is aten.sym_size.int:
        return Dense(writer.shape([given[node.args[0]][node.args[1]]], False)[0])  # type: ignore[index]
    if node.target in ATTENTIONS:
        return attention(writer, node)
    if node.target is CROSS_ENTROPY:
        return cross_entropy(writer, node)
    if node.target in PRODUCTS:
        return _multiplied(writer, node, writer.transfer.product(node, given))
    if node.target in DENSE_ALONE:
        raise writer.transfer.unknown(node)
    return _written(writer, node, writer.transfer.carry(node, given))


def _written(writer: Writer, node: fx.Node, flow: Flow) -> Value:
    """Writes an op that keeps tokens apart, or one that computes along them."""
    if flow.mixes:
        return _mixed(writer, node, flow)
    if node.target in LAYOUTS:
        return _laid_out(writer, node, flow.axes) if flow.operands else writer.dense(node)
    if not flow.operands:  # it reads only the dtype or shape of packed values
        return Dense(writer.copy(node))
    if flow.is_beside:
        return _beside(writer, node, flow)
    (source,) = flow.operands
    value: Any = writer.values[source]
    pad = value.pad if isinstance(value, Packed) and node.target in KEEPING_NUMBERS else None
    return writer.like(value, writer.copy(node), node, flow.axes, pad)


def _seed(writer: Writer, node: fx.Node) -> Packed | None:
    """An embedding or linear over (batch, length), where packed values begin; else None."""
    is_embedding = node.target is aten.embedding.default
    source: Any = node.args[1 if is_embedding else 0]
    if not isinstance(writer.values[source], Dense):
        return None
    sizes = sizes_of(source)
    shift = 1 if is_embedding else 0  # the dim that an embedding adds
    for domain in writer.domains:
        batch, length = domain.batch.size, domain.position.size
        if sizes.count(batch) != 1 or sizes.count(length) != 1:
            continue
        inner: Labels = {
            sizes.index(batch) - len(sizes): (domain.batch,),
            sizes.index(length) - len(sizes): (domain.position,),
        }
        if not is_embedding and -1 in inner:
            continue
        operand = writer.gathered(source, inner, domain)
        values = {n: writer.values[n].node for n in node.all_input_nodes}
        copy = writer.copy(node, {**values, source: operand}.__getitem__)
        outer = {dim - shift: label for dim, label in inner.items()}
        return writer.packed(copy, node, writer.transfer.axes(node, outer), domain)
    return None


def _laid_out(writer: Writer, node: fx.Node, axes: Axes) -> Value:
    value: Any = writer.values[node.args[0]]  # type: ignore[index]
    if isinstance(value, Wide):
        return Wide(writer.copy(node, writer.spread), axes)
    if node.target in PERMUTES | IDENTITIES:
        copy = writer.copy(node)
    elif node.target in EXPANDS:
        copy = writer.call(aten.expand.default, value.node, _expanded(writer, value.axes, axes))
    else:
        copy = writer.call(aten.reshape.default, value.node, writer.shape(axes, True))
    return writer.packed(copy, node, axes, value.domain, value.pad)


def _expanded(writer: Writer, source: Axes, axes: Axes) -> list[Any]:
    """The sizes to which a packed value with the axes `source` is expanded."""
    added = len(axes) - len(source)
    shape: list[Any] = []
    for dim, (held, label) in enumerate(zip(((),) * added + source, axes, strict=True)):
        is_kept = bool(held) or not label
        as_it_is = -1 if dim >= added else 1
        shape.append(as_it_is if is_kept else writer.shape([label], True)[0])
    return shape


# --- ops on several operands ------------------------------------------------------------------------------------


def _beside(writer: Writer, node: fx.Node, flow: Flow) -> Value:
    """An op on operands that broadcast: packed if they agree on their tokens, else wide."""
    labels = writer.transfer.labels(flow.axes)
    domain = writer.domain_of(labels)
    packed_ones = [isinstance(writer.values[source], Packed) for source in tensor_inputs(node)]
    is_aligned = node.target is not aten.stack.default or all(packed_ones)  # as their tokens are in the result
    agree = all(writer.transfer.is_same(other, labels) for other in flow.operands.values())
    if domain is not None and agree and is_aligned and any(packed_ones):
        try:
            copy = writer.copy(node, lambda source: writer.gathered(source, labels, domain))
        except Miss:  # a dense operand whose batch axis is merged with others: not packed, but right
            return Wide(writer.copy(node, writer.spread), flow.axes)
        return writer.packed(copy, node, flow.axes, domain, _pad(writer, node, labels, domain))
    return Wide(writer.copy(node, writer.spread), flow.axes)


def _pad(writer: Writer, node: fx.Node, labels: Labels, domain: Domain) -> float | None:
    """A pointwise result at padding, if it is known."""
    if node.target in FILLS:
        number = FILLED.get(node.target, argument(node, "fill_value"))
        return float(number) if isinstance(number, bool | int | float) else None
    if node.target in (aten.cat.default, aten.stack.default, aten.gather.default, aten.scatter.src, aten.scatter.value):
        return None
    return _computed(node, [writer.at_padding(arg, labels, domain) for arg in node.args])


def _computed(node: fx.Node, pads: list[float | None]) -> float | None:
    """A pointwise result at padding, if its operands are known there."""
    target: Any = node.target
    name = target._schema.name
    if name == "aten::mul" and 0 in pads:
        return 0.0
    if name == "aten::dropout":  # it draws: it must not run here
        return 0.0 if pads[0] == 0 else None
    if name == "aten::where" and pads[0] is not None:
        return pads[1] if pads[0] else pads[2]
    if name == "aten::masked_fill" and pads[1] is not None:
        return pads[2] if pads[1] else pads[0]
    if None in pads or node.kwargs:
        return None
    dtypes = [arg.meta["val"].dtype if isinstance(arg, fx.Node) else None for arg in node.args]
    scalars = [pad if dtype is None else torch.tensor(pad).to(dtype) for pad, dtype in zip(pads, dtypes, strict=True)]
    result = target(*scalars)
    return float(result) if isinstance(result, torch.Tensor) and bool(result.isfinite()) else None


def _multiplied(writer: Writer, node: fx.Node, product: Product) -> Value:
    """matmul, bmm, einsum: packed if only features are summed and nothing else has the batch."""
    if product.is_along:
        return _summed_tokens(writer, node, product)
    axes = writer.transfer.axes(node, product.labels)
    domain = writer.domain_of(product.labels)
    if domain is not None and all(_fits(writer.values[operand], side, product) for operand, side in product.sides):
        return writer.packed(writer.copy(node), node, axes, domain)
    return Wide(writer.copy(node, writer.spread), axes)


def _fits(value: Value, axes: Axes, product: Product) -> bool:
    """Whether an operand has all of the result's batch and token axes, or none of them."""
    own: list[Label] = [letter for letter in axes if letter in product.known]
    return not own if isinstance(value, Dense) else isinstance(value, Packed) and len(own) == len(product.known)


def _summed_tokens(writer: Writer, node: fx.Node, product: Product) -> Value:
    """A sum over tokens: right if padding adds exact zeros, whatever it holds."""
    for (operand, axes), (other, other_axes) in (product.sides, product.sides[::-1]):
        value = writer.values[operand]
        if not isinstance(value, Packed) or not isinstance(writer.values[other], Dense):
            continue
        is_zero = writer.at_padding(other, product.beside(other_axes, axes), value.domain) == 0
        if (is_zero or value.pad is not None) and not writer.has_tokens(product.labels):
            return writer.dense(node)
    raise Miss("a product sums over batch or tokens, including padded ones", node=node)


# --- ops along tokens -------------------------------------------------------------------------------------------


def _mixed(writer: Writer, node: fx.Node, flow: Flow) -> Dense:
    """An op along tokens: exact if the value at padding is known, or a guard says that no padding is read."""
    values = [writer.values[source] for source in flow.operands]
    if all(isinstance(value, Packed) and value.pad is not None for value in values):
        return writer.dense(node)
    if len(values) == 1 and isinstance(values[0], Packed):
        (labels,) = flow.operands.values()
        if node.target in POSITIONS:
            return _at_position(writer, node, values[0], labels)
        if node.target is aten.index.Tensor:
            return _at_given(writer, node, values[0], labels)
    raise Miss(f"{flow.mixes} tokens, including padded ones", node=node)


def _at_position(writer: Writer, node: fx.Node, value: Packed, labels: Labels) -> Dense:
    """A read at constant positions: exact if no row has padding there."""
    dim = argument(node, "dim", 0)
    dim = dim if isinstance(dim, int) else 0
    label = labels.get(dim % len(value.axes) - len(value.axes))
    if label != (value.domain.position,):
        raise Miss("an op mixes tokens, including padded ones", node=node)
    if node.target is aten.select.int:
        start: Any = argument(node, "index")
        end: Any = start + 1 or None
    else:
        start, end = argument(node, "start") or 0, argument(node, "end")
    is_range = isinstance(start, int) and isinstance(end, int | None) and argument(node, "step", 1) == 1
    if not is_range or (end or 0) >= 2**31:
        raise Miss("an op reads a range of positions, including padded ones", node=node)
    writer.guard(
        f"position {start} is read, and a row has padding there", packed.is_valid_between, value.domain.mask, start, end
    )
    return writer.dense(node)


def _at_given(writer: Writer, node: fx.Node, value: Packed, labels: Labels) -> Dense:
    """x[rows, positions]: exact if there is no padding at these positions."""
    rank, batch_and_token = len(value.axes), writer.places(labels, value.domain)
    positions: Any = node.args[1]
    given = {dim - rank: at for dim, at in enumerate(positions) if at is not None}
    is_boolean = any(at.meta["val"].dtype is torch.bool for at in given.values())
    if list(given) != sorted(set(batch_and_token)) or len(given) != 2 or is_boolean:
        raise Miss("positions given as data select tokens, including padded ones", node=node)
    reason = "the call reads a position where there is padding"
    at = [writer.values[given[dim]].node for dim in batch_and_token]
    writer.guard(reason, packed.is_valid_at, value.domain.mask, *at)
    return writer.dense(node)
