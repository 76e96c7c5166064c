"""Layout ops: converts labels of the output to labels of the input, and back."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from ...graph.miss import Miss
from .atoms import Axes, Label, atoms_of, regroup, resolve, sizes_of

aten = torch.ops.aten

RESHAPES = {aten.reshape.default, aten.view.default, aten._unsafe_view.default}
RESHAPES |= {aten.flatten.using_ints, aten.unflatten.int}
UNIT_DIMS = {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims}
IDENTITIES = {aten.contiguous.default, aten.clone.default, aten.alias.default}
EXPANDS = {aten.expand.default, aten.expand_as.default}
PERMUTES = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
}


def permutation(node: fx.Node) -> list[int]:
    """The input dim that each output dim of a permuting op is, by running the op on a tensor whose sizes name its
    dims."""
    rank = node.meta["val"].dim()
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    args = (probe, *node.args[1:])
    return [size - 2 for size in node.target(*args, **node.kwargs).shape]  # type: ignore[operator]


def step_back(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """Goes back through one layout op to its input; None if `node` is not one.

    Raises:
        Miss: the op's view cuts across the axes.
    """
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in IDENTITIES:
        return source, axes
    if node.target in RESHAPES or node.target in UNIT_DIMS:
        return source, regroup(atoms_of(axes), sizes_of(source))
    if node.target in PERMUTES:
        inner: list[Label] = [()] * len(axes)
        for output_dim, input_dim in enumerate(permutation(node)):
            inner[input_dim] = axes[output_dim]
        return source, tuple(inner)
    if node.target in EXPANDS:
        return source, _before_expand(axes, sizes_of(source))
    if node.target is aten.repeat_interleave.self_int:
        return _before_repeat_interleave(node, axes)
    return None


def _before_expand(axes: Axes, sizes: list[Any]) -> Axes:
    kept = axes[len(axes) - len(sizes) :]
    return tuple(() if size == 1 else label for label, size in zip(kept, sizes, strict=True))


def _before_repeat_interleave(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    source, repeats, *rest = node.args
    dim = rest[0] if rest else node.kwargs.get("dim")
    if not isinstance(dim, int) or not isinstance(repeats, int) or not isinstance(source, fx.Node):
        return None
    dim %= len(axes)
    size = sizes_of(source)[dim]
    kept, _ = regroup(axes[dim], [size, sympy.Integer(repeats)])
    return source, (*axes[:dim], kept, *axes[dim + 1 :])


def peel(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes]:
    """Goes back through layout ops as far as they keep axes whole."""
    while (step := _whole_step_back(node, axes)) is not None:
        node, axes = step
    return node, resolve(axes)


def _whole_step_back(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    try:
        return step_back(node, axes)
    except Miss:
        return None


def step_forward(node: fx.Node, axes: Axes, user: fx.Node) -> Axes | None:
    """The labels of `user`, a layout op on `node`; None if it is not one (or repeats values)."""
    if user.args[0] is not node:
        return None
    if user.target in IDENTITIES:
        return axes
    if user.target in RESHAPES or user.target in UNIT_DIMS:
        return regroup(atoms_of(axes), sizes_of(user))
    if user.target in PERMUTES:
        return tuple(axes[dim] for dim in permutation(user))
    return None
