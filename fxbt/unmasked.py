"""The same graph for calls without padding: attention under masks that then say nothing, or only "j <= i", unmasked.

Where every validity mask is 1 throughout, most masks are proven to let everything through (see `validity`), so that
neither they nor their sum with the scores need computing.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from .canonical import argument, with_graph
from .validity import SDPA, Residue, attention_masks


@dataclass(frozen=True)
class Unmasked:
    """A graph that stands for another one wherever its validity masks are 1 throughout."""

    module: fx.GraphModule
    assumes: dict[str, torch.Tensor]


def unmask(module: fx.GraphModule, validity: list[int]) -> Unmasked:
    """The graph of `module` where its inputs at the positions `validity` are ones.

    Raises:
        Miss: an attention mask cannot be read.
    """
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    ones = [inputs[place] for place in validity]
    masks = attention_masks(module.graph)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    assumes: set[str] = set()
    for node in module.graph.nodes:
        mask = masks.get(argument(node, "attn_mask")) if node.target is SDPA else None
        residue = mask.without_padding(ones) if mask else Residue.BLOCK
        if mask and residue is not Residue.BLOCK:
            _take_mask(copies[node], is_causal=residue is Residue.CAUSAL)
            assumes |= mask.assumes
    graph.eliminate_dead_code()
    return Unmasked(with_graph(module, graph), {name: attrgetter(name)(module) for name in sorted(assumes)})


def _take_mask(attention: fx.Node, is_causal: bool) -> None:
    names = [parameter.name for parameter in SDPA._schema.arguments]
    given: dict[str, Any] = dict(zip(names, attention.args, strict=False)) | dict(attention.kwargs)
    given |= {"attn_mask": None, "is_causal": is_causal}
    attention.args = tuple(given.pop(name) for name in names[:3])
    attention.kwargs = given
