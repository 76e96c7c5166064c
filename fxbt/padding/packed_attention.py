"""Attention on packed tokens: where tokens meet, under a mask proven to hide padding (see `proof`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..analysis.axes import EQUATIONS, EXPANDS, IDENTITIES, PERMUTES, RESHAPES, UNIT_DIMS
from ..analysis.axis_transfer import NORMS, Labels, tensor_inputs
from ..graph.blocks import ATTENTIONS, SDPA, mask_of
from ..graph.miss import Miss
from ..graph.node import argument
from ..graph.opsets import CASTS
from ..kernels import packed, packed_with_gradients
from .proof import AttentionMask, Residue
from .tokens import Dense, Domain, Guard, Packed, Value, Wide, Writer

aten = torch.ops.aten

SCORES = {*EQUATIONS, *NORMS, aten.linear.default, aten.addmm.default, *ATTENTIONS}
CHOICES = {
    *(RESHAPES | UNIT_DIMS | PERMUTES | EXPANDS | IDENTITIES | CASTS),
    *(aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default),
    *(aten.slice.Tensor, aten.select.int),
}


def attention(writer: Writer, node: fx.Node) -> Value:
    """Attention per sequence if queries and keys are packed, else on dense queries under a mask that hides padding."""
    if argument(node, "dropout_p") and not torch.is_grad_enabled():
        raise Miss("the attention uses dropout", node=node)
    operands: list[Any] = [argument(node, name) for name in ("query", "key", "value")]
    mask = mask_of(node)
    if any(-1 in writer.labels(writer.values[operand]) for operand in operands):
        raise Miss("attention sums over batch or tokens as if they were features", node=node)
    query, key, value = (_sequences(writer, writer.values[operand]) for operand in operands)
    if key is not value:
        raise Miss("keys and values belong to different tokens", node=node)
    if query is not None and query is key:
        return _self_attention(writer, node, mask, query)
    if key is not None:
        return _attention_on_packed_keys(writer, node, mask, query, key)
    if isinstance(mask, fx.Node) and not isinstance(writer.values[mask], Dense):
        raise Miss("an attention mask depends on tokens", node=node)
    if not all(isinstance(writer.values[operand], Dense) for operand in operands[1:]):
        raise Miss("the attention runs between packed and other tokens", node=node)
    return Wide(writer.copy(node, writer.spread), writer.transfer.axes(node, writer.labels(writer.values[operands[0]])))


def _sequences(writer: Writer, value: Value) -> Domain | None:
    """The domain of a packed (batch, heads, tokens, dim) value; None if it is not one."""
    if not isinstance(value, Packed) or len(value.axes) != 4:
        return None
    domain = value.domain
    return domain if writer.labels(value) == {-4: (domain.batch,), -2: (domain.position,)} else None


def _self_attention(writer: Writer, node: fx.Node, mask: Any, domain: Domain) -> Packed:
    is_causal, bias = bool(argument(node, "is_causal")), None
    if mask is None and not is_causal:
        raise Miss("padding is not masked out of the attention", node=node)
    if mask is None:
        writer.guard("padding comes before tokens, and the mask is only causal", packed.is_padded_right, domain.mask)
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
        if node.target is not SDPA and torch.is_grad_enabled():
            raise Miss("softcapped attention on valid tokens has no gradients", node=node)
        attend = _kernels().attention if node.target is SDPA else packed.softcapped_attention
        call = writer.call(attend, *operands, domain.tokens, bias, is_causal, **_options(node))
    labels: Labels = {-4: (domain.batch,), -2: (domain.position,)}
    return writer.packed(call, node, writer.transfer.axes(node, labels), domain)


def _kernels() -> Any:
    """The functions that compute attention on packed tokens; those of `packed` are not for graphs with gradients."""
    return packed_with_gradients if torch.is_grad_enabled() else packed


def _is_on_cuda(node: fx.Node) -> bool:
    return node.meta["val"].device.type == "cuda"


def _check_varlen(node: fx.Node, bias: fx.Node | None) -> None:
    """Raises Miss for what `varlen_attn` does not support; attention per sequence is slower on a GPU than padding."""
    if node.target is not SDPA:
        raise Miss("on CUDA, attention over sequences of different lengths supports no softcap", node=node)
    if bias is not None:
        raise Miss("on CUDA, attention over sequences of different lengths supports no bias", node=node)
    operands: Any = [argument(node, name).meta["val"] for name in ("query", "key", "value")]
    if any(operand.dtype not in (torch.float16, torch.bfloat16) for operand in operands):
        raise Miss("on CUDA, attention over sequences of different lengths needs float16 or bfloat16", node=node)
    widths = {operand.shape[-1] for operand in operands}
    if len(widths) > 1 or any(not isinstance(width, int) or width % 8 or width > 256 for width in widths):
        raise Miss("on CUDA, query, key and value need one head_dim of 8, 16, ... 256", node=node, found=str(widths))


def _attention_on_packed_keys(writer: Writer, node: fx.Node, mask: Any, query: Domain | None, key: Domain) -> Value:
    if mask is None:
        raise Miss("padding is not masked out of the attention", node=node)
    proof = writer.masks[mask]
    is_apart = query is None or query.batch is not key.batch or _is_on_cuda(node) or node.target is not SDPA
    if query is not None and not is_apart and proof.is_padding_alone(query.validity, key.validity):
        _rely_on(writer, proof)
        reason = "a row has queries but no keys"
        writer.guard(reason, packed.has_keys_for_queries, query.mask, key.mask)
        operands = _nodes(writer, node)
        call = writer.call(_kernels().cross_attention, *operands, query.tokens, key.tokens, **_options(node))
        labels: Labels = {-4: (query.batch,), -2: (query.position,)}
        return writer.packed(call, node, writer.transfer.axes(node, labels), query)
    proof.blocks_keys(key.validity)
    _rely_on(writer, proof)
    writer.guard("a row has no keys", packed.has_no_empty_row, key.mask)
    if not isinstance(writer.values[mask], Dense):
        raise Miss("an attention mask depends on tokens", node=node)
    labels = writer.labels(writer.values[argument(node, "query")])
    copy = writer.copy(node, writer.spread)
    return Wide(copy, writer.transfer.axes(node, labels)) if labels else Dense(copy)


def _rely_on(writer: Writer, proof: AttentionMask) -> None:
    """Records what a proof relies on: the content of constants, and biases smaller than a mask."""
    writer.assumes |= proof.assumes
    for addend in proof.addends():
        _bound(writer, addend)


def _bound(writer: Writer, addend: fx.Node) -> None:
    """Guards the size of what a mask adds, back to where it is computed like scores, which count as small."""
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
        raise Miss("an attention mask adds a term that may itself be a mask", node=addend)
    for source in tensor_inputs(addend):
        _bound(writer, source)


def _selected_from(node: fx.Node) -> fx.Node:
    """The value of which a node only selects elements or changes the layout."""
    while node.target in CHOICES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _nodes(writer: Writer, node: fx.Node) -> list[Any]:
    return [writer.values[argument(node, name)].node for name in ("query", "key", "value")]


def _options(node: fx.Node) -> dict[str, Any]:
    names = ["scale", "enable_gqa"] if node.target is SDPA else ["scale", "softcap"]
    names += ["dropout_p"] if argument(node, "dropout_p") else []
    return {name: argument(node, name) for name in names}
