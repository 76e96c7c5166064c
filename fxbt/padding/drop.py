"""Unpadding a graph: derives by proof a graph that does not compute on padding, or refuses with a reason.

Packed values begin at embeddings and linears over (batch, length) and pass through every op that keeps tokens apart
(see `transfer`). Attention is where tokens meet, under a mask that must be proven to hide padding (see `proof`). Packed
values end at outputs, at ops that are right whatever padding holds, and where a run-time guard says that padding is not
read. What cannot be followed is a `Miss`, and the graph does not change.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..analysis.axes import sizes_of
from ..graph.miss import Miss, module_path
from ..graph.node import is_random, with_graph
from ..kernels import packed, packed_with_gradients
from .padded_calls import GivenLengths, GivenMask
from .proof import AttentionMask, attention_masks
from .tokens import Dense, Domain, Packed, Wide, Writer
from .transfer import SEEDS, transfer
from .validity_sources import Validity

ATTENTIONS = {
    *(packed.attention, packed.softcapped_attention, packed.cross_attention, packed.varlen_attention),
    *(packed_with_gradients.attention, packed_with_gradients.cross_attention),
}


@dataclass(frozen=True)
class Output:
    """How an output shows padding: the mask of its tokens, their dims, and the value at padding."""

    mask: int  # index of the mask
    batch: int
    token: int
    fill: float


@dataclass(frozen=True)
class Unpadded:
    """A graph that computes on valid tokens. It takes the dense graph's inputs, then one `Tokens` per mask."""

    module: fx.GraphModule
    masks: fx.GraphModule  # inputs -> for each mask, [batch, length], nonzero where tokens are
    given: list[GivenMask | GivenLengths]  # what each mask comes from
    validities: list[Validity]  # the same, in the dense graph
    guards: fx.GraphModule  # inputs -> booleans
    reasons: list[str]  # for each guard, why a call runs dense if it fails
    outputs: list[Output | None]  # None: exact everywhere
    assumes: dict[str, torch.Tensor]


def drop_padding(module: fx.GraphModule) -> Unpadded:
    """The graph of `module` on valid tokens only; `module` itself does not change.

    Raises:
        Miss: nothing masks padding, or something in the graph would see it.
    """
    masks = attention_masks(module.graph)
    candidates = dict.fromkeys(found for mask in masks.values() for found in mask.validities(module.graph))
    if not candidates:
        raise Miss(
            "no attention is masked by an input [batch, length], an embedding's padding_idx, or lengths; nothing "
            "says which tokens are padding"
        )
    first: Miss | None = None
    for validities, seeds in itertools.product(_one_for_each_length(candidates), SEEDS):
        try:
            return _packed_from(module, validities, masks, seeds)
        except Miss as miss:
            first = first or miss
    assert first is not None
    raise first


def _one_for_each_length(candidates: Iterable[Validity]) -> list[tuple[Validity, ...]]:
    """The possible sources of which tokens of a length are valid, in order: a mask, lengths, token ids."""
    by_length: dict[Any, list[Validity]] = {}
    for validity in sorted(candidates, key=lambda one: (one.of_ids, one.condition is not None)):
        by_length.setdefault(validity.sizes[1], []).append(validity)
    return list(itertools.product(*by_length.values()))


def _packed_from(
    module: fx.GraphModule, validities: tuple[Validity, ...], masks: dict[fx.Node, AttentionMask], seeds: set[Any]
) -> Unpadded:
    writer = Writer(module, validities)
    writer.masks = masks
    for domain in writer.domains:
        _guard_source(writer, domain)
    outputs: list[Output | None] = []
    for node in module.graph.nodes:
        try:
            if node in writer.values:  # it is part of computing where the tokens are
                continue
            if node.op == "get_attr":
                writer.values[node] = Dense(writer.copy(node))
            elif node.op == "call_function":
                writer.values[node] = transfer(writer, node, seeds)
            elif node.op == "output":
                outputs = _write_outputs(writer, node)
        except Miss as miss:
            miss.where = module_path(node)
            raise
    return _unpadded(module, writer, outputs)


def _guard_source(writer: Writer, domain: Domain) -> None:
    """Guards what the values that say where tokens are must satisfy."""
    validity, source = domain.validity, domain.validity.source
    if validity.condition is None:
        if validity.relation is None and source.meta["val"].dtype is not torch.bool:
            writer.guard(f"{source.name} holds values other than 0 and 1", packed.is_zero_or_one, domain.mask)
        return
    lengths = validity.lengths
    for counted in validity.counted():
        reason = f"{lengths.name} holds values above {packed.EXACT}"
        writer.guard(reason, packed.is_exact, writer.values[counted].node)
    inputs = [node for node in source.graph.nodes if node.op == "placeholder"]
    if any(validity.sizes[1] in sizes_of(node) for node in inputs):  # otherwise these are not the tokens of the call
        reason = f"a row has fewer tokens than {lengths.name} says"
        writer.guard(reason, packed.has_tokens_of, domain.mask, writer.values[lengths].node)


def _write_outputs(writer: Writer, node: fx.Node) -> list[Output | None]:
    results: list[Any] = []
    contracts: list[Output | None] = []
    returned: Any = node.args[0]
    for result in returned:
        value = writer.values[result] if isinstance(result, fx.Node) else Dense(result)
        if isinstance(value, Wide):
            value = writer.values[result] = _packed_again(writer, result, value)
        contract = _contract(writer, result, value) if isinstance(value, Packed) and value.pad is None else None
        contracts.append(contract)
        results.append(
            value.node if isinstance(value, Dense) else writer.spread(result, contract.fill if contract else 0)
        )
    writer.graph.output(tuple(results))
    return contracts


def _packed_again(writer: Writer, node: fx.Node, value: Wide) -> Packed:
    labels = writer.labels(value)
    domain = writer.domain_of(labels)
    if domain is None:
        raise Miss("an output holds pairs of tokens, including padded ones", node=node)
    return Packed(writer.gathered(node, labels, domain), value.axes, domain)


def _contract(writer: Writer, node: fx.Node, value: Packed) -> Output:
    batch, token = writer.places(writer.labels(value), value.domain)
    dtype = node.meta["val"].dtype
    scores_positions = token == -1 and batch != token and dtype.is_floating_point
    fill = torch.finfo(dtype).min if scores_positions else 0
    return Output(writer.domains.index(value.domain), batch, token, fill)


def _unpadded(module: fx.GraphModule, writer: Writer, outputs: list[Output | None]) -> Unpadded:
    guards = list(writer.guards.values())
    guard_graph = _input_graph(writer, [guard.node for guard in guards])
    mask_graph = _input_graph(writer, [domain.mask for domain in writer.domains])
    writer.graph.eliminate_dead_code()  # also removes guards and masks, which nothing in it reads
    if not any(node.target in ATTENTIONS for node in writer.graph.nodes):
        raise Miss("no attention runs over tokens of the mask's batch and length")
    return Unpadded(
        with_graph(module, writer.graph),
        with_graph(module, mask_graph),
        [_given(module, domain.validity) for domain in writer.domains],
        [domain.validity for domain in writer.domains],
        with_graph(module, guard_graph),
        [guard.reason for guard in guards],
        outputs,
        {name: operator.attrgetter(name)(module) for name in sorted(writer.assumes)},
    )


def _given(module: fx.GraphModule, validity: Validity) -> GivenMask | GivenLengths:
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    if validity.condition is not None:
        return GivenLengths(inputs.index(validity.lengths))
    place = inputs.index(validity.source)
    if validity.relation is None:
        return GivenMask(place)
    return GivenMask(place, validity.relation.rel_op, validity.number)


def _input_graph(writer: Writer, results: list[fx.Node]) -> fx.Graph:
    """Values computed only from the inputs, as a graph of their own that runs first."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    tokens = {domain.tokens for domain in writer.domains}
    needed = set(results)
    for node in reversed(writer.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    if not tokens.isdisjoint(needed):
        raise Miss("a guard or mask for padding depends on packed tokens")
    if any(node.op == "call_function" and is_random(node) for node in needed):
        raise Miss("a guard or mask for padding depends on random numbers, which would be drawn twice")
    for node in writer.graph.nodes:
        is_input = node.op == "placeholder" and node not in tokens
        if is_input or (node in needed and node.op != "placeholder"):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[result] for result in results))
    return graph
