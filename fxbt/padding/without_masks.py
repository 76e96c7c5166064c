"""The graph for calls without padding: removes masks that then hide nothing, or only later keys.

If all tokens are valid, most masks are proven to hide nothing (see `proof`); neither they nor their sum with the scores
need computing.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from ..graph.blocks import ATTENTIONS, SDPA, mask_of
from ..graph.node import copy_of, parameters, with_graph
from .proof import Residue, attention_masks
from .validity_sources import Validity


@dataclass(frozen=True)
class Unmasked:
    """A graph that replaces another one wherever all tokens are valid."""

    module: fx.GraphModule
    assumes: dict[str, torch.Tensor]


def unmask(module: fx.GraphModule, validities: list[Validity]) -> Unmasked:
    """The graph of `module` for calls in which all tokens are valid.

    Raises:
        Miss: an attention mask cannot be read.
    """
    masks = attention_masks(module.graph)
    graph, copies = copy_of(module.graph)
    assumes: set[str] = set()
    for node in module.graph.nodes:
        mask = masks.get(mask_of(node)) if node.target in ATTENTIONS else None
        residue = mask.without_padding(validities) if mask else Residue.BLOCK
        if mask and residue is not Residue.BLOCK:
            _take_mask(copies[node], is_causal=residue is Residue.CAUSAL)
            assumes |= mask.assumes
    graph.eliminate_dead_code()
    return Unmasked(with_graph(module, graph), {name: attrgetter(name)(module) for name in sorted(assumes)})


def _take_mask(attention: fx.Node, is_causal: bool) -> None:
    names = list(parameters(attention.target))
    given: dict[str, Any] = dict(zip(names, attention.args, strict=False)) | dict(attention.kwargs)
    given["is_causal"] = is_causal
    if attention.target is SDPA:
        given["attn_mask"] = None
    else:
        given["after"] = []
    attention.args = tuple(given.pop(name) for name in names[:3])
    attention.kwargs = given
