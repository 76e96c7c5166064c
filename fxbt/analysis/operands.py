"""A replacement's tensors, laid out by axis names: rules write no transpose or reshape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import axes


class Operands:
    """The inputs of a match at run time, each in the layout that the replacement asks for.

    `tensors` are in the order of `Match.inputs`, `position` gives each node's index there, `known` the axes of each
    tensor; `named` turns names into axes. Names are separated by spaces; "1" is a dim of size one.

    Example::

        operands = fxbt.Operands(tensors, plan.position, plan.axes, layout.named)
        query = operands(found.query, found.query_axes, "batch heads seq head_dim")
        mask = operands(step.node, step.axes, "batch heads seq keys", expand=False)  # broadcasts where it lacks an axis
        return operands.back(query * scale, "batch heads seq head_dim", found.output_axes)
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        position: Mapping[fx.Node, int],
        known: Sequence[axes.Axes],
        named: Callable[[str], axes.Axes],
    ):
        self._known = known
        self._tensors, self._position, self._named = tensors, position, named
        self._sizes = axes.sizes_from(axes.size_table(known), tensors)

    def by(self, named: Callable[[str], axes.Axes]) -> Operands:
        """The same tensors, with other names for the axes."""
        return Operands(self._tensors, self._position, self._known, named)

    def __call__(self, node: fx.Node, labels: axes.Axes, names: str, expand: bool = True) -> Any:
        """The tensor of `node` (whose axes are `labels`) with the axes `names`; a number is returned as it is.

        Raises:
            Miss: a needed size cannot be read off any operand.
        """
        tensor = self._tensors[self._position[node]]
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return axes.arrange(tensor, labels, self._named(names), self._sizes, expand)

    def back(self, tensor: torch.Tensor, names: str, labels: axes.Axes) -> torch.Tensor:
        """A result with the axes `names`, laid out as `labels`, which is the layout of the graph.

        Raises:
            Miss: a needed size cannot be read off any operand.
        """
        return axes.arrange(tensor, self._named(names), labels, self._sizes)
