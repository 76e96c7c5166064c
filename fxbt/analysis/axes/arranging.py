"""Rearranges a tensor by its atoms (like einops.rearrange), reading sizes off the operands."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...graph.miss import Miss
from ...torch_compat import statically_known_true
from .atoms import Atom, Axes, Label, resolve

Sizes = Callable[[Atom], Any]


@dataclass(frozen=True)
class SizeSource:
    """Where a replacement reads an atom's size: `operands[operand].shape[dim] // divisor`."""

    operand: int
    dim: int
    divisor: int


def size_table(operands: Sequence[Axes]) -> dict[Atom, SizeSource]:
    """Which dim gives each atom's size: one that it has alone, else one shared with axes of known size."""
    table: dict[Atom, SizeSource] = {}
    for index, axes in enumerate(operands):
        for dim, label in enumerate(resolve(axes)):
            unknown = [atom for atom in label if not atom.size.is_Integer]
            if len(unknown) != 1:
                continue
            source = SizeSource(index, dim, math.prod(int(atom.size) for atom in label if atom.size.is_Integer))
            known = table.get(unknown[0])
            if known is None or source.divisor < known.divisor:
                table[unknown[0]] = source
    return table


def sizes_from(table: dict[Atom, SizeSource], operands: Sequence[torch.Tensor]) -> Sizes:
    """The size of an atom inside a replacement: an int, a (symbolic) size of an operand, or -1 to be inferred."""

    def size(atom: Atom) -> Any:
        if atom.size.is_Integer:
            return int(atom.size)
        if atom not in table:
            return -1
        source = table[atom]
        whole = operands[source.operand].shape[source.dim]
        return whole if source.divisor == 1 else whole // source.divisor

    return size


def arrange(tensor: torch.Tensor, source: Axes, target: Axes, sizes: Sizes, expand: bool = True) -> torch.Tensor:
    """Rearranges `tensor` from the layout `source` to the layout `target`, like einops.rearrange over atoms.

    Atoms of `target` that `source` lacks are broadcast: expanded if `expand` (or if they share a dim with others), else
    left as a dim of size one.

    Raises:
        Miss: a needed size cannot be read off any operand.
    """
    source, target = _fuse(resolve(source), resolve(target))
    present = [atom for label in source for atom in label]
    if source == target or (not expand and source == _restrict(target, present)):
        return tensor
    tensor = _split_dims(tensor, source, sizes)
    order = [present.index(atom) for label in target for atom in label if atom in present]
    if order != sorted(order):
        tensor = tensor.permute(order)
    for dim, label in enumerate(target):
        tensor = _merge_dim(tensor, dim, label, [atom in present for atom in label], sizes, expand)
    return tensor


def _restrict(target: Axes, present: list[Atom]) -> Axes | None:
    """`target` without its absent atoms, if those have dims of their own; else None."""
    labels = [tuple(atom for atom in label if atom in present) for label in target]
    whole = all(not kept or kept == label for kept, label in zip(labels, target, strict=True))
    return tuple(labels) if whole else None


def _fuse(source: Axes, target: Axes) -> tuple[Axes, Axes]:
    """Fuses atoms that are neighbours within one dim of both layouts, so that they need not be split and merged."""
    following = {a: b for label in source for a, b in zip(label, label[1:], strict=False)}
    chains: dict[Atom, Atom] = {}
    for label in target:
        for first, second in zip(label, label[1:], strict=False):
            if following.get(first) is second:
                chains[first] = second
    inner = set(chains.values())
    fused = {head: _product(head, chains) for head in chains if head not in inner}

    def shorten(axes: Axes) -> Axes:
        return tuple(tuple(fused.get(atom, atom) for atom in label if atom not in inner) for label in axes)

    return shorten(source), shorten(target)


def _product(head: Atom, chains: dict[Atom, Atom]) -> Atom:
    size, atom = head.size, head
    while atom in chains:
        atom = chains[atom]
        size = size * atom.size
    return Atom(size)


def _split_dims(tensor: torch.Tensor, source: Axes, sizes: Sizes) -> torch.Tensor:
    """One dim per atom: drops dims of size one and unflattens products."""
    dim = 0
    for label in source:
        if not label:
            tensor = tensor.squeeze(dim)
            continue
        if len(label) > 1:
            tensor = tensor.unflatten(dim, _inferring([sizes(atom) for atom in label]))
        dim += len(label)
    return tensor


def _inferring(shape: list[Any]) -> list[Any]:
    """Checks that torch needs to infer at most one size of a shape.

    Raises:
        Miss: more than one size is unknown.
    """
    if sum(isinstance(size, int) and size == -1 for size in shape) > 1:
        raise Miss("the sizes of merged axes cannot be read off any operand")
    return shape


def _merge_dim(
    tensor: torch.Tensor, dim: int, label: Label, present: list[bool], sizes: Sizes, expand: bool
) -> torch.Tensor:
    """Makes the atoms of `label`, which start at `dim` as far as present, the one dim `dim`."""
    if not any(present) and not (expand and label):
        return tensor.unsqueeze(dim)
    for offset, here in enumerate(present):
        if not here:
            tensor = tensor.unsqueeze(dim + offset)
    if not all(present):
        shape = [-1] * tensor.dim()
        for offset, (atom, here) in enumerate(zip(label, present, strict=True)):
            if not here:
                shape[dim + offset] = _known(sizes(atom))
        tensor = tensor.expand(shape)
    if len(label) == 1:
        return tensor
    if not all(present) or _merging_asks(tensor, dim, len(label)):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor.flatten(dim, dim + len(label) - 1)


def _merging_asks(tensor: torch.Tensor, dim: int, count: int) -> bool:
    """Whether merging dims copies unless some sizes are one; copying first avoids a guard on sizes."""
    known = all(statically_known_true(size != 1) for size in tensor.shape)
    inner = range(dim + 1, dim + count)
    together = [statically_known_true(tensor.stride(d - 1) == tensor.stride(d) * tensor.shape[d]) for d in inner]
    return not known and not all(together)


def _known(size: Any) -> Any:
    if isinstance(size, int) and size == -1:
        raise Miss("the size of a broadcast axis cannot be read off any operand")
    return size
