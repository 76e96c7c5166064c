"""Whether an attention hides later keys from its queries, by its argument or by its mask."""

from __future__ import annotations

import torch
from torch import fx

from ..graph.node import argument
from . import masks
from .scores import LARGEST_FILL


def is_causal(attention: fx.Node) -> bool:
    """Whether an SDPA node lets no query see a later key; False if its mask cannot be read.

    Example::

        m.need(fxbt.is_causal(m["attention"]), "the mask is not proven causal")
    """
    if argument(attention, "is_causal") or _is_one_step(attention):
        return True
    mask = argument(attention, "attn_mask")
    return mask is not None and any(map(_masks_later_keys, _addends(mask)))


def _is_one_step(attention: fx.Node) -> bool:
    """Whether its keys are those of a cache, an input of the graph, and the new one behind them: none is later."""
    key = argument(attention, "key")
    while getattr(key.target, "is_view", False):
        key = key.all_input_nodes[0]
    if key.target is not torch.ops.aten.cat.default or len(key.all_input_nodes) != 2:
        return False
    past, new = key.all_input_nodes
    axis = argument(key, "dim") % new.meta["val"].dim()
    return past.op == "placeholder" and axis == new.meta["val"].dim() - 2 and new.meta["val"].shape[axis] == 1


def _addends(bias: fx.Node) -> list[fx.Node]:
    """The addends of a bias; one of them being a causal mask is enough."""
    if bias.target is not torch.ops.aten.add.Tensor or bias.kwargs:
        return [bias]
    return [addend for arg in bias.args if isinstance(arg, fx.Node) for addend in _addends(arg)]


def _masks_later_keys(mask: fx.Node) -> bool:
    value = mask.meta["val"]
    if value.dim() < 2:
        return False
    index = masks.index_symbols(value.dim())
    try:
        read = masks.evaluate(mask, index, masks.read_constants(mask))
    except (masks.Opaque, TypeError):  # sympy raises TypeError on NaN
        return False
    attend = masks.truth(read) if value.dtype is torch.bool else masks.zero_else_below(read, LARGEST_FILL)
    return attend is not None and masks.implies_causal(attend, index[-2], index[-1])
