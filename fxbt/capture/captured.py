"""`Captured`: a call of a model as a graph, with what its use rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
from torch import Tensor, fx

from ..torch_compat import pytree
from .effects import Effects
from .size_scalars import Constant


@dataclass
class Captured:
    """A captured graph. Its placeholders are the call's tensors in order; its output is a flat tuple of values.

    Those of its `effects` on the model come after both.
    """

    module: fx.GraphModule
    out_spec: pytree.TreeSpec
    guards: Callable[..., None]  # guards(*tensors) raises AssertionError naming the condition that does not hold
    example: tuple[Tensor, ...]  # of all placeholders
    assumed: list[sympy.Basic]  # of the sizes of inputs, which the guards assert
    fixed: dict[int, Tensor] = field(default_factory=dict)  # the inputs, by number, whose values the guards compare
    read: list[Constant] = field(default_factory=list)  # tensors of the model whose values the guards compare
    seconds: float = 0.0
    effects: Effects = field(default_factory=Effects)
    copied: int = 0  # layers that were not traced, as an equal one was
    has_objects: bool = False  # among the call's arguments, which forward may change
    is_stored: bool = False  # another process captured it
    growing: tuple[int, ...] = ()  # the inputs that such an object holds a longer tensor for afterwards
