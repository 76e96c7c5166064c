"""How each op carries packed tokens on: what keeps tokens apart runs on packed ones, op by op, unchanged.

A handler takes the writer and a node of the dense graph that reads packed or wide values, and gives the value the
node becomes. An op without a handler, or one that would let padding show, is a `Miss`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from ..analysis.axes import (
    EQUATIONS,
    EXPANDS,
    IDENTITIES,
    PERMUTES,
    RESHAPES,
    UNIT_DIMS,
    Axes,
    contraction_of,
    fresh,
    permutation,
    regroup,
    sizes_of,
)
from ..graph.blocks import ATTENTIONS, SDPA, mask_of
from ..graph.miss import Miss
from ..graph.node import argument, is_pure
from ..graph.opsets import CASTS, WHOLE_AXIS
from ..kernels import packed
from .proof import AttentionMask, Residue
from .tokens import Dense, Domain, Guard, Labels, Packed, Value, Wide, Writer, tensor_inputs

aten = torch.ops.aten


def transfer(writer: Writer, node: fx.Node, seeds: Collection[Any]) -> Value:
    """What `node` becomes in the packed graph, where packed values begin at ops of `seeds`.

    Raises:
        Miss: padding could show in its result.
    """
    writer.current = node
    if node.target in seeds and (seed := _seed(writer, node)) is not None:
        return seed
    if all(isinstance(writer.values[source], Dense) for source in node.all_input_nodes):
        return writer.dense(node)
    handler = HANDLERS.get(node.target)
    if handler is None and is_pure(node) and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        handler = pointwise
    if handler is None:
        raise Miss("an op that is not known to keep tokens apart", node=node)
    return handler(writer, node)


def _seed(writer: Writer, node: fx.Node) -> Packed | None:
    """An embedding or linear over (batch, length): where packed values begin."""
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
        return writer.packed(copy, node, writer.with_labels(node, outer), domain)
    return None


# --- ops on several operands ------------------------------------------------------------------------------------


def _merged(writer: Writer, node: fx.Node, found: list[Labels]) -> Labels:
    labels: Labels = {}
    for other in found:
        for dim, label in other.items():
            if writer.key({dim: labels.setdefault(dim, label)}) != writer.key({dim: label}):
                raise Miss("different axes meet in one dim", node=node)
    return labels


def _together(
    writer: Writer, node: fx.Node, operands: dict[fx.Node, Labels], pad: Callable[[Labels, Domain], float | None]
) -> Value:
    """An op whose operands stand beside each other dim by dim: packed where they agree on their tokens, else wide.

    `operands` are the labels of its packed and wide operands, as dims of the result.
    """
    labels = _merged(writer, node, list(operands.values()))
    domain = writer.domain_of(labels)
    agree = all(writer.key(other) == writer.key(labels) for other in operands.values())
    if domain is not None and agree and any(isinstance(writer.values[n], Packed) for n in operands):
        try:
            copy = writer.copy(node, lambda n: writer.gathered(n, labels, domain))
        except Miss:  # a dense operand whose batch axis is merged with others: dense work, but right
            return Wide(writer.copy(node, writer.spread), writer.with_labels(node, labels))
        return writer.packed(copy, node, writer.with_labels(node, labels), domain, pad(labels, domain))
    return Wide(writer.copy(node, writer.spread), writer.with_labels(node, labels))


def _no_pad(labels: Labels, domain: Domain) -> None:
    return None


def _labelled(writer: Writer, node: fx.Node) -> dict[fx.Node, Labels]:
    return {n: labels for n in tensor_inputs(node) if (labels := writer.labels(writer.values[n]))}


def pointwise(writer: Writer, node: fx.Node) -> Value:
    def pad(labels: Labels, domain: Domain) -> float | None:
        return _pad(node, [writer.at_padding(arg, labels, domain) for arg in node.args])

    return _together(writer, node, _labelled(writer, node), pad)


def _pad(node: fx.Node, pads: list[float | None]) -> float | None:
    """A pointwise result at padding, where its operands are known there."""
    target: Any = node.target
    name = target._schema.name
    if name == "aten::mul" and 0 in pads:
        return 0.0
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


def concatenation(writer: Writer, node: fx.Node) -> Value:
    rank = node.meta["val"].dim()
    dim = (argument(node, "dim") or 0) % rank - rank
    operands = _labelled(writer, node)
    if any(dim in labels for labels in operands.values()):
        raise Miss("an op mixes tokens, padded ones among them", node=node)
    return _together(writer, node, operands, _no_pad)


def stack(writer: Writer, node: fx.Node) -> Value:
    rank = node.meta["val"].dim()
    new = (argument(node, "dim") or 0) % rank - rank
    operands = {
        n: {dim if dim > new else dim - 1: label for dim, label in labels.items()}
        for n, labels in _labelled(writer, node).items()
    }
    if all(isinstance(writer.values[n], Packed) for n in tensor_inputs(node)):
        return _together(writer, node, operands, _no_pad)
    return Wide(
        writer.copy(node, writer.spread), writer.with_labels(node, _merged(writer, node, list(operands.values())))
    )


def gather(writer: Writer, node: fx.Node) -> Value:
    """torch.gather along features, by an index as large as its source in batch and tokens."""
    source: Any = node.args[0]
    index: Any = argument(node, "index")
    rank = node.meta["val"].dim()
    dim = argument(node, "dim") % rank - rank
    operands = _labelled(writer, node)
    if dim in operands.get(source, {}):
        raise Miss("an op reads tokens at positions given as data", node=node)
    sizes, index_sizes = sizes_of(source), sizes_of(index)
    for labels in operands.values():
        if any(at != dim and sizes[at] != index_sizes[at] for at in labels):
            raise Miss("an op reads tokens at positions given as data", node=node)
    return _together(writer, node, operands, _no_pad)


def contraction(writer: Writer, node: fx.Node) -> Value:
    """matmul, bmm, einsum: packed where only features are summed and nothing else has the batch."""
    product = contraction_of(node, fresh(node))
    if product is None or product.addend is not None:
        raise Miss("a product that cannot be read", node=node)
    sides = [(product.lhs, product.lhs_axes), (product.rhs, product.rhs_axes)]
    known: dict[Any, Any] = {}
    for operand, axes in sides:
        for dim, label in writer.labels(writer.values[operand]).items():
            if writer.key({0: known.setdefault(axes[dim], label)}) != writer.key({0: label}):
                raise Miss("different axes meet in one dim", node=node)
    labels = {dim - len(product.axes): known[a] for dim, a in enumerate(product.axes) if a in known}
    summed = [known[(atom,)] for atom in product.contracted if (atom,) in known]
    if summed:
        return _summed_tokens(writer, node, sides, labels)
    domain = writer.domain_of(labels)
    values = [writer.values[operand] for operand, _ in sides]
    if domain is not None and all(_fits(value, axes, known) for value, (_, axes) in zip(values, sides, strict=True)):
        return writer.packed(writer.copy(node), node, writer.with_labels(node, labels), domain)
    return Wide(writer.copy(node, writer.spread), writer.with_labels(node, labels))


def _fits(value: Value, axes: Axes, known: dict[Any, Any]) -> bool:
    """Whether an operand has all of the result's batch and token axes, or none of them."""
    own = [label for label in axes if label in known]
    return not own if isinstance(value, Dense) else isinstance(value, Packed) and len(own) == len(known)


def _summed_tokens(writer: Writer, node: fx.Node, sides: list[tuple[fx.Node, Axes]], labels: Labels) -> Value:
    """A sum over tokens: right where padding adds exact zeros, whatever stands there."""
    for (operand, axes), (other, other_axes) in (sides, sides[::-1]):
        value = writer.values[operand]
        if not isinstance(value, Packed) or not isinstance(writer.values[other], Dense):
            continue
        by_letter = {axes[dim]: label for dim, label in writer.labels(value).items()}
        beside = {dim - len(other_axes): by_letter[a] for dim, a in enumerate(other_axes) if a in by_letter}
        is_zero = writer.at_padding(other, beside, value.domain) == 0
        if (is_zero or value.pad is not None) and not writer.has_tokens(labels):
            return writer.dense(node)
    raise Miss("a product sums over batch or tokens, padded ones among them", node=node)


# --- ops on one operand -----------------------------------------------------------------------------------------


def _operand(writer: Writer, node: fx.Node, position: int = 0) -> Packed | Wide:
    """The value an op works on; all else that it reads must be dense."""
    source: Any = node.args[position]
    value = writer.values[source] if isinstance(source, fx.Node) else Dense(source)
    others = [writer.values[n] for n in node.all_input_nodes if n is not source]
    if isinstance(value, Dense) or not all(isinstance(other, Dense) for other in others):
        raise Miss("an op that is not known to keep tokens apart", node=node)
    return value


def cast(writer: Writer, node: fx.Node) -> Value:
    value = writer.values[node.args[0]]  # type: ignore[index]
    if isinstance(value, Dense):  # to the dtype of a packed tensor
        return Dense(writer.copy(node))
    pad = value.pad if isinstance(value, Packed) else None
    return writer.like(value, writer.copy(node), node, writer.with_labels(node, writer.labels(value)), pad)


def layout(writer: Writer, node: fx.Node) -> Value:
    source: Any = node.args[0]
    value = writer.values[source]
    if isinstance(value, Dense):  # the other operand gives its shape
        return writer.dense(node)
    axes = _moved(writer, node, value)
    if isinstance(value, Wide) or node.target in PERMUTES | IDENTITIES:
        copy = writer.copy(node, writer.spread if isinstance(value, Wide) else None)
    elif node.target in EXPANDS:
        held = (None,) * (len(axes) - len(value.axes)) + value.axes
        kept = [bool(was) or not label for was, label in zip(held, axes, strict=True)]
        shape = [
            -1 if keep and i >= len(axes) - len(value.axes) else 1 if keep else writer.shape([axes[i]], True)[0]
            for i, keep in enumerate(kept)
        ]
        copy = writer.call(aten.expand.default, value.node, shape)
    else:
        copy = writer.call(aten.reshape.default, value.node, writer.shape(axes, True))
    return writer.like(value, copy, node, axes, value.pad if isinstance(value, Packed) else None)


def _moved(writer: Writer, node: fx.Node, value: Packed | Wide) -> Axes:
    axes = value.axes
    if node.target in IDENTITIES:
        return axes
    if node.target in PERMUTES:
        return tuple(axes[dim] for dim in permutation(node))
    if node.target in EXPANDS:
        return writer.with_labels(node, writer.labels(value))
    moved = regroup((atom for label in axes for atom in label), sizes_of(node))
    if writer.is_split():
        raise Miss("a view splits the batch or token axis", node=node)
    return moved


def along(writer: Writer, node: fx.Node) -> Value:
    """An op along dims that hold neither batch nor tokens: reductions, splits, selections, norms."""
    value = _operand(writer, node)
    rank, labels = len(value.axes), writer.labels(value)
    dims = [dim % rank - rank for dim in dims_of(node, rank)]
    touched = [] if _is_whole_slice(node) else [dim for dim in dims if dim in labels]
    if touched and isinstance(value, Packed) and value.pad is not None:
        return writer.dense(node)
    if touched:
        return _at_position(writer, node, value, labels)
    axes = writer.with_labels(node, _left(node, labels, dims, rank))
    pad = value.pad if isinstance(value, Packed) and node.target in SELECTIONS else None
    return writer.like(value, writer.copy(node), node, axes, pad)


def _is_whole_slice(node: fx.Node) -> bool:
    if (
        node.target is not aten.slice.Tensor
        or argument(node, "step", 1) != 1
        or argument(node, "start") not in (None, 0)
    ):
        return False
    end = argument(node, "end")
    return end is None or (isinstance(end, int) and end == WHOLE_AXIS)


def dims_of(node: fx.Node, rank: int) -> list[int]:
    if node.target in NORMS:
        return list(range(-len(argument(node, "normalized_shape")), 0))
    dim = argument(node, "dim", argument(node, "dims"))
    if dim is None or dim == []:
        return list(range(-rank, 0))
    return list(dim) if isinstance(dim, list | tuple) else [dim]


def _left(node: fx.Node, labels: Labels, dims: list[int], rank: int) -> Labels:
    """The labels once the dims are gone that the op removes."""
    val = node.meta["val"]
    left = (val if isinstance(val, torch.Tensor) else val[0]).dim()
    if left == rank:
        return labels
    if left != rank - len(dims):
        raise Miss("an op changes the rank", node=node)
    return {dim + sum(gone > dim for gone in dims): label for dim, label in labels.items()}


def _at_position(writer: Writer, node: fx.Node, value: Packed | Wide, labels: Labels) -> Dense:
    """A read at constant positions: exact if no row has padding there."""
    dim = argument(node, "dim", 0)
    dim = dim if isinstance(dim, int) else 0
    label = labels.get(dim % len(value.axes) - len(value.axes))
    if not isinstance(value, Packed) or label != (value.domain.position,) or node.target not in POSITIONS:
        raise Miss("an op mixes tokens, padded ones among them", node=node)
    if node.target is aten.select.int:
        start: Any = argument(node, "index")
        end: Any = start + 1 or None
    else:
        start, end = argument(node, "start") or 0, argument(node, "end")
    if (
        not isinstance(start, int)
        or not isinstance(end, int | None)
        or (end or 0) >= 2**31
        or argument(node, "step", 1) != 1
    ):
        raise Miss("a range of positions is read, padded ones among them", node=node)
    writer.guard(
        f"padding stands at position {start}, which is read", packed.is_valid_between, value.domain.mask, start, end
    )
    return writer.dense(node)


def index(writer: Writer, node: fx.Node) -> Value:
    """x[..., features] as it is; x[rows, positions] is exact if no padding stands there."""
    value = _operand(writer, node)
    labels, rank = writer.labels(value), len(value.axes)
    positions: Any = node.args[1]
    given = [dim - rank for dim, at in enumerate(positions) if at is not None]
    if len(given) == 1 and given[0] not in labels and node.meta["val"].dim() == rank:
        return writer.like(value, writer.copy(node), node, writer.with_labels(node, labels))
    if not isinstance(value, Packed):
        raise Miss("an op mixes tokens, padded ones among them", node=node)
    batch, token = writer.places(labels, value.domain)
    is_boolean = any(positions[dim + rank].meta["val"].dtype is torch.bool for dim in given)
    if given != sorted({batch, token}) or batch == token or is_boolean:
        raise Miss("an op reads tokens at positions given as data", node=node)
    reason = "padding is read at a position that the call gives"
    at = [writer.values[positions[dim + rank]].node for dim in (batch, token)]
    writer.guard(reason, packed.is_valid_at, value.domain.mask, *at)
    return writer.dense(node)


def linear(writer: Writer, node: fx.Node) -> Value:
    return _rowwise(writer, node, _operand(writer, node), 0)


def addmm(writer: Writer, node: fx.Node) -> Value:
    if node.args[0].meta["val"].dim() != 1:  # type: ignore[union-attr]
        raise Miss("an addend of its own for each token", node=node)
    return _rowwise(writer, node, _operand(writer, node, 1), 0)


def embedding(writer: Writer, node: fx.Node) -> Value:
    return _rowwise(writer, node, _operand(writer, node, 1), 1)


def _rowwise(writer: Writer, node: fx.Node, value: Packed | Wide, added: int) -> Value:
    labels = writer.labels(value)
    if not added and -1 in labels:
        raise Miss("a product sums over batch or tokens, padded ones among them", node=node)
    axes = writer.with_labels(node, {dim - added: label for dim, label in labels.items()})
    return writer.like(value, writer.copy(node), node, axes)


def convolution(writer: Writer, node: fx.Node) -> Value:
    """A convolution of kernel size 1: a linear over the channels."""
    value = _operand(writer, node)
    weight: Any = argument(node, "weight")
    kernel = weight.meta["val"].shape[2:]
    steps = [argument(node, name) for name in ("stride", "padding")]
    if any(size != 1 for size in kernel) or any(s != 1 for s in steps[0]) or any(p != 0 for p in steps[1]):
        raise Miss("a convolution mixes tokens, padded ones among them", node=node)
    return _per_channel(writer, node, value, -1 - len(kernel))


def batch_norm(writer: Writer, node: fx.Node) -> Value:
    value = _operand(writer, node)
    if argument(node, "training"):
        raise Miss("statistics over the batch, padding among it", node=node)
    return _per_channel(writer, node, value, 1 - len(value.axes))


def _per_channel(writer: Writer, node: fx.Node, value: Packed | Wide, channels: int) -> Value:
    labels = writer.labels(value)
    if channels in labels or len(value.axes) != node.meta["val"].dim():
        raise Miss("an op takes batch or tokens for channels", node=node)
    return writer.like(value, writer.copy(node), node, writer.with_labels(node, labels))


def filled(writer: Writer, node: fx.Node) -> Value:
    """zeros_like and its kin: a number in the shape of tokens."""
    value = _operand(writer, node)
    number = FILLS[node.target] if FILLS[node.target] is not None else argument(node, "fill_value")
    pad = float(number) if isinstance(number, bool | int | float) else None
    return writer.like(value, writer.copy(node), node, writer.with_labels(node, writer.labels(value)), pad)


def new(writer: Writer, node: fx.Node) -> Value:
    """x.new_zeros(shape): of x, the dtype alone."""
    _operand(writer, node)
    return Dense(writer.copy(node))


def item(writer: Writer, node: fx.Node) -> Value:
    value = _operand(writer, node)
    pad = value.pad if isinstance(value, Packed) else None
    return writer.like(value, writer.copy(node), node, writer.with_labels(node, writer.labels(value)), pad)


def size(writer: Writer, node: fx.Node) -> Value:
    value, dim = _operand(writer, node), node.args[1]
    return Dense(writer.shape([value.axes[dim]], False)[0])  # type: ignore[index]


# --- attention --------------------------------------------------------------------------------------------------


def attention(writer: Writer, node: fx.Node) -> Value:
    """Per sequence where queries and keys are packed, else on dense queries under a mask that hides padding."""
    if argument(node, "dropout_p"):
        raise Miss("attention with dropout", node=node)
    operands: list[Any] = [argument(node, name) for name in ("query", "key", "value")]
    mask = mask_of(node)
    if any(-1 in writer.labels(writer.values[operand]) for operand in operands):
        raise Miss("attention sums over batch or tokens as if they were features", node=node)
    query, key, value = (_sequences(writer, writer.values[operand]) for operand in operands)
    if key is not value:
        raise Miss("keys and values stand for different tokens", node=node)
    if query is not None and query is key:
        return _self_attention(writer, node, mask, query)
    if key is not None:
        return _attention_on_packed_keys(writer, node, mask, query, key)
    if isinstance(mask, fx.Node) and not isinstance(writer.values[mask], Dense):
        raise Miss("an attention mask depends on tokens", node=node)
    if not all(isinstance(writer.values[operand], Dense) for operand in operands[1:]):
        raise Miss("attention between packed and other tokens", node=node)
    return Wide(writer.copy(node, writer.spread), writer.with_labels(node, writer.labels(writer.values[operands[0]])))


def _sequences(writer: Writer, value: Value) -> Domain | None:
    """The domain of a packed [batch, heads, tokens, dim]."""
    if not isinstance(value, Packed) or len(value.axes) != 4:
        return None
    domain = value.domain
    return domain if writer.labels(value) == {-4: (domain.batch,), -2: (domain.position,)} else None


def _self_attention(writer: Writer, node: fx.Node, mask: Any, domain: Domain) -> Packed:
    is_causal, bias = bool(argument(node, "is_causal")), None
    if mask is None and not is_causal:
        raise Miss("padding is not masked out of the attention", node=node)
    if mask is None:
        writer.guard(
            "padding stands before tokens under a mask that is only causal", packed.is_padded_right, domain.mask
        )
    else:
        residue = writer.masks[mask].self_attention(domain.validity)
        _rely_on(writer, writer.masks[mask])
        is_causal = residue is Residue.CAUSAL
        if residue is Residue.BLOCK:
            bias = writer.cached(packed.blocks, writer.spread(mask), domain.tokens)
    operands = _nodes(writer, node)
    if _is_on_cuda(node):
        _check_varlen(node, bias)
        call = writer.call(packed.varlen_attention, *operands, domain.tokens, is_causal, **_options(node))
    else:
        attend = packed.attention if node.target is SDPA else packed.softcapped_attention
        call = writer.call(attend, *operands, domain.tokens, bias, is_causal, **_options(node))
    labels: Labels = {-4: (domain.batch,), -2: (domain.position,)}
    return writer.packed(call, node, writer.with_labels(node, labels), domain)


def _is_on_cuda(node: fx.Node) -> bool:
    return node.meta["val"].device.type == "cuda"


def _check_varlen(node: fx.Node, bias: fx.Node | None) -> None:
    """Raises Miss for what `varlen_attn` does not take; sequence by sequence, a GPU is slower than with padding."""
    if node.target is not SDPA:
        raise Miss("on CUDA, sequences of different lengths attend without a softcap only", node=node)
    if bias is not None:
        raise Miss("on CUDA, sequences of different lengths attend without a bias only", node=node)
    operands: Any = [argument(node, name).meta["val"] for name in ("query", "key", "value")]
    if any(operand.dtype not in (torch.float16, torch.bfloat16) for operand in operands):
        raise Miss("on CUDA, sequences of different lengths attend in float16 or bfloat16 only", node=node)
    widths = {operand.shape[-1] for operand in operands}
    if len(widths) > 1 or any(not isinstance(width, int) or width % 8 or width > 256 for width in widths):
        raise Miss("on CUDA, heads must be alike and 8, 16, ... 256 wide", node=node, found=str(widths))


def _attention_on_packed_keys(writer: Writer, node: fx.Node, mask: Any, query: Domain | None, key: Domain) -> Value:
    if mask is None:
        raise Miss("padding is not masked out of the attention", node=node)
    proof = writer.masks[mask]
    is_apart = query is None or query.batch is not key.batch or _is_on_cuda(node) or node.target is not SDPA
    if query is not None and not is_apart and proof.is_padding_alone(query.validity, key.validity):
        _rely_on(writer, proof)
        reason = "a row has queries but no keys"
        writer.guard(reason, packed.has_keys_for_queries, query.mask, key.mask)
        call = writer.call(packed.cross_attention, *_nodes(writer, node), query.tokens, key.tokens, **_options(node))
        labels: Labels = {-4: (query.batch,), -2: (query.position,)}
        return writer.packed(call, node, writer.with_labels(node, labels), query)
    proof.blocks_keys(key.validity)
    _rely_on(writer, proof)
    writer.guard("a row has no keys", packed.has_no_empty_row, key.mask)
    if not isinstance(writer.values[mask], Dense):
        raise Miss("an attention mask depends on tokens", node=node)
    labels = writer.labels(writer.values[argument(node, "query")])
    copy = writer.copy(node, writer.spread)
    return Wide(copy, writer.with_labels(node, labels)) if labels else Dense(copy)


def _rely_on(writer: Writer, proof: AttentionMask) -> None:
    """What must hold for a proof: constants as they are, and a bias that is none as large as a mask."""
    writer.assumes |= proof.assumes
    for addend in proof.addends():
        _bound(writer, addend)


def _bound(writer: Writer, addend: fx.Node) -> None:
    """Guards the size of what a mask adds, up to where it is computed as scores are: those are taken to be small."""
    if isinstance(writer.values[addend], Dense):
        source = _selected_from(addend)
        largest = writer.cached(aten.abs.default, writer.values[source].node, val=source.meta["val"])
        largest = writer.cached(aten.amax.default, largest, val=writer.fake([], source.meta["val"]))
        reason = f"a bias in an attention mask is larger than {packed.BOUND:g}"
        writer.guards[packed.is_bounded, largest] = Guard(writer.cached(packed.is_bounded, largest), reason)
        return
    if addend.target in SCORES:
        return
    if any(isinstance(arg, int | float) and abs(arg) > packed.BOUND for arg in addend.args):
        raise Miss("an attention mask adds what may be a mask itself", node=addend)
    for source in tensor_inputs(addend):
        _bound(writer, source)


def _selected_from(node: fx.Node) -> fx.Node:
    """What a node only selects elements of, or lays out anew."""
    while node.target in CHOICES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _nodes(writer: Writer, node: fx.Node) -> list[Any]:
    return [writer.values[argument(node, name)].node for name in ("query", "key", "value")]


def _options(node: fx.Node) -> dict[str, Any]:
    names = ("scale", "enable_gqa") if node.target is SDPA else ("scale", "softcap")
    return {name: argument(node, name) for name in names}


# --- the table --------------------------------------------------------------------------------------------------

# Packed values begin as early as possible; where embedded tokens are mixed (shifted, say), at linears alone.
SEEDS = ({aten.embedding.default, aten.linear.default}, {aten.linear.default})
SHAPES_OF = {aten.reshape_as.default, aten.view_as.default}
POSITIONS = {aten.select.int, aten.slice.Tensor}
UNTAGGED = {  # pointwise, though torch does not say so
    *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.masked_fill.Tensor),
    *(aten.__and__.Tensor, aten.__and__.Scalar, aten.__or__.Tensor, aten.__or__.Scalar, aten.rsub.Tensor),
    *(aten.multiply.Tensor, aten.subtract.Tensor, aten.divide.Tensor, aten.floor_divide.default),
    *(aten.negative.default, aten.absolute.default, aten.hardswish.default, aten.log_sigmoid.default),
}
NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default}
SCORES = {*EQUATIONS, *NORMS, aten.linear.default, aten.addmm.default, *ATTENTIONS}
SELECTIONS = {
    *(aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.chunk.default),
    *(aten.split_with_sizes.default, aten.split.Tensor),
}
CHOICES = {
    *(RESHAPES | UNIT_DIMS | PERMUTES | EXPANDS | IDENTITIES | CASTS),
    *(aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default),
    *(aten.slice.Tensor, aten.select.int),
}
REDUCTIONS = {
    *(aten.sum.dim_IntList, aten.mean.dim, aten.prod.dim_int, aten.amax.default, aten.amin.default),
    *(aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default, aten.any.dim, aten.all.dim),
    *(aten.mean.default, aten.sum.default, aten.max.default, aten.min.default, aten.var.dim, aten.std.dim),
    *(aten.var.correction, aten.std.correction, aten.logsumexp.default, aten.linalg_vector_norm.default),
}
SCANS = {
    *(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default),
    *(aten.topk.default, aten.sort.default, aten.argsort.default, aten.glu.default, aten.flip.default),
    *(aten.index_select.default, aten.repeat_interleave.self_int),
}
FILLS: dict[Any, float | None] = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.full_like.default: None,
}
NEW = {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}

HANDLERS: dict[Any, Callable[[Writer, fx.Node], Value]] = {
    **dict.fromkeys(UNTAGGED, pointwise),
    **dict.fromkeys(CASTS, cast),
    **dict.fromkeys(RESHAPES | SHAPES_OF | UNIT_DIMS | PERMUTES | EXPANDS | IDENTITIES, layout),
    **dict.fromkeys(SELECTIONS | NORMS | REDUCTIONS | SCANS, along),
    **dict.fromkeys(EQUATIONS, contraction),
    **dict.fromkeys(FILLS, filled),
    **dict.fromkeys(NEW, new),
    aten.sum.dim_IntList: along,
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.embedding.default: embedding,
    aten.cat.default: concatenation,
    aten.stack.default: stack,
    aten.gather.default: gather,
    aten.index.Tensor: index,
    aten.conv1d.default: convolution,
    aten.conv2d.default: convolution,
    aten.batch_norm.default: batch_norm,
    aten.sym_size.int: size,
    operator.getitem: item,
    **dict.fromkeys(ATTENTIONS, attention),
}
