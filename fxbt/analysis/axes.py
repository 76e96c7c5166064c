"""Axis atoms: which axis of a tensor is which, whatever layout ops stand between. A read-only analysis.

An `Atom` is one indivisible axis with a symbolic size. The `Axes` of a value name, for each of its dims, the atoms
it is the row-major product of; a dim of size one has none. Layout ops and contractions only move atoms around, so
following them shows what is summed with what, however the model wrote it. A view may split an atom; the split is
seen wherever the atom stands.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..graph.miss import Miss
from ..graph.node import argument as argument
from ..graph.opsets import CASTS as CASTS
from ..torch_compat import FloorDiv, Min, statically_known_true

aten = torch.ops.aten


class Atom:
    """One axis of symbolic size; `parts` once a view has split it."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Any):
        self.size = sympy.sympify(size)
        self.parts: tuple[Atom, ...] = ()

    def __repr__(self) -> str:
        return f"Atom({self.size})"


Axes = tuple[tuple[Atom, ...], ...]


def leaves(label: Iterable[Atom]) -> tuple[Atom, ...]:
    """The label with split atoms replaced by their parts."""
    flat: list[Atom] = []
    for atom in label:
        flat.extend(leaves(atom.parts) if atom.parts else (atom,))
    return tuple(flat)


def resolve(axes: Axes) -> Axes:
    return tuple(leaves(label) for label in axes)


def atoms_of(axes: Axes) -> tuple[Atom, ...]:
    """All atoms of a value in row-major order."""
    return tuple(atom for label in axes for atom in leaves(label))


def is_constant_along(axes: Axes, axis: Iterable[Atom]) -> bool:
    """Whether a value with the labels `axes` is the same all along `axis`, of which it then holds no part.

    Example::

        fxbt.axes.is_constant_along(factor_axes, keys)  # a factor for each query
    """
    return not set(atoms_of(axes)) & set(leaves(axis))


def size_of(value: torch.Tensor, dim: int) -> Any:
    """The size of a dim as a sympy expression, reduced by what the shape environment knows."""
    return reduced(value.shape[dim])


def reduced(size: int | torch.SymInt) -> Any:
    """A size or stride as a sympy expression, reduced by what the shape environment knows.

    Sizes that only their value range shows to be one number (`1 - Max(0, 1 - s)`) become that number.
    """
    if not isinstance(size, torch.SymInt):
        return sympy.Integer(size)
    shape_env = size.node.shape_env
    expr = shape_env.replace(size.node.expr).replace(FloorDiv, _quotient)
    if expr.has(Min):
        expr = expr.xreplace(_proven_minima(shape_env, len(shape_env.guards)))
        expr = expr.replace(Min, functools.partial(_smallest, shape_env))
    bounds = shape_env.bound_sympy(expr)
    return sympy.Integer(int(bounds.lower)) if bounds.is_singleton() else expr


@functools.lru_cache(maxsize=4)
def _proven_minima(shape_env: Any, guards: int) -> dict[Any, Any]:
    """What guards say about minima: min(16, s) == s once a table of 16 rows, cut to s, met an axis of s.

    And about what is computed from them: min(15, s) + min(15, s + 1) - 1 == 2 * s.
    """
    equal = [guard.expr.replace(FloorDiv, _quotient) for guard in shape_env.guards if isinstance(guard.expr, sympy.Eq)]
    sides = [(fact.lhs, fact.rhs) for fact in equal if isinstance(fact, sympy.Eq)]
    sides += [(rhs, lhs) for lhs, rhs in sides]
    return {lhs: rhs for lhs, rhs in sides if lhs.has(Min) and not rhs.has(Min, FloorDiv)}


def _smallest(shape_env: Any, *sizes: Any) -> Any:
    """min(16, s) -> s where s is known to be at most 16."""
    for size in sizes:
        others = [other for other in sizes if other is not size]
        if all(shape_env.bound_sympy(size).upper <= shape_env.bound_sympy(other).lower for other in others):
            return size
    return Min(*sizes)


def _quotient(size: Any, divisor: Any) -> Any:
    """(s**2) // s -> s: what reshapes with -1 infer."""
    whole = _divides(divisor, size)
    return FloorDiv(size, divisor) if whole is None else whole


def sizes_of(node: fx.Node) -> list[Any]:
    value = node.meta["val"]
    return [size_of(value, dim) for dim in range(value.dim())]


def fresh(node: fx.Node) -> Axes:
    """New atoms for every dim of a node."""
    return tuple(_label(size) for size in sizes_of(node))


def _label(size: Any) -> tuple[Atom, ...]:
    return () if size == 1 else (Atom(size),)


def _divides(divisor: Any, size: Any) -> Any | None:
    """size / divisor where that is a whole number for all sizes, else None."""
    if divisor == size:
        return sympy.Integer(1)
    if divisor.is_Integer and size.is_Integer:
        return size // divisor if size % divisor == 0 else None
    quotient = sympy.cancel(size / divisor)
    numerator, denominator = quotient.as_numer_denom()
    return numerator if denominator == 1 else None


def regroup(atoms: Iterable[Atom], sizes: Sequence[Any]) -> Axes:
    """Distribute atoms, in row-major order, over dims of the given sizes, splitting atoms where a dim ends inside one.

    Raises:
        Miss: the dims do not fall on boundaries of axes.
    """
    waiting = list(leaves(atoms))[::-1]
    axes: list[tuple[Atom, ...]] = []
    for size in sizes:
        label: list[Atom] = []
        missing = size
        while missing != 1:
            if not waiting:
                raise Miss("a view cuts across the axes", expected=f"atoms for a dim of size {size}")
            atom = waiting.pop()
            if (rest := _divides(atom.size, missing)) is not None:
                label.append(atom)
                missing = rest
            elif (inner := _divides(missing, atom.size)) is not None:
                atom.parts = (Atom(missing), Atom(inner))
                label.append(atom.parts[0])
                waiting.append(atom.parts[1])
                missing = sympy.Integer(1)
            else:
                raise Miss(
                    "a view cuts across the axes",
                    expected=f"a dim of {missing}",
                    found=f"an axis of {atom.size}",
                )
        axes.append(tuple(label))
    if waiting:
        raise Miss("a view cuts across the axes", found=f"axes left over: {waiting}")
    return tuple(axes)


# --- layout ops: labels of the output <-> labels of the input ---------------------------------------------------

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
    """Which input dim each output dim of a permuting op is: asked of torch, on a tensor that names its dims."""
    rank = node.meta["val"].dim()
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    args = (probe, *node.args[1:])
    return [size - 2 for size in node.target(*args, **node.kwargs).shape]  # type: ignore[operator]


def step_back(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """Through one layout op towards its input, or None where `node` is none.

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
        inner: list[tuple[Atom, ...]] = [()] * len(axes)
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
    """Walk back through layout ops as far as they keep axes whole."""
    while (step := _whole_step_back(node, axes)) is not None:
        node, axes = step
    return node, resolve(axes)


def _whole_step_back(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    try:
        return step_back(node, axes)
    except Miss:
        return None


def step_forward(node: fx.Node, axes: Axes, user: fx.Node) -> Axes | None:
    """The labels of `user`, a layout op on `node`, or None where it is none (or repeats values)."""
    if user.args[0] is not node:
        return None
    if user.target in IDENTITIES:
        return axes
    if user.target in RESHAPES or user.target in UNIT_DIMS:
        return regroup(atoms_of(axes), sizes_of(user))
    if user.target in PERMUTES:
        return tuple(axes[dim] for dim in permutation(user))
    return None


# --- contractions: matmul, bmm, einsum, linear as one einsum over atoms -----------------------------------------


@dataclass
class Contraction:
    """sum over `contracted` of lhs * rhs (times `factor`, plus `addend` times `addend_factor`)."""

    node: fx.Node
    lhs: fx.Node
    lhs_axes: Axes
    rhs: fx.Node
    rhs_axes: Axes
    axes: Axes
    contracted: tuple[Atom, ...]
    factor: float = 1.0
    addend: fx.Node | None = None
    addend_factor: float = 1.0


@dataclass
class _Equation:
    lhs: fx.Node
    rhs: fx.Node
    lhs_letters: str
    rhs_letters: str
    out_letters: str
    factor: float = 1.0
    addend: fx.Node | None = None
    addend_factor: float = 1.0


def _rank(node: Any) -> int:
    return node.meta["val"].dim()


def _matmul(node: fx.Node) -> _Equation | None:
    lhs, rhs = node.args[:2]
    if _rank(lhs) < 2 or _rank(rhs) < 2:
        return None
    batch = string.ascii_lowercase[: _rank(node) - 2]
    lhs_letters = batch[len(batch) - (_rank(lhs) - 2) :] + "MK"
    rhs_letters = batch[len(batch) - (_rank(rhs) - 2) :] + "KN"
    return _Equation(lhs, rhs, lhs_letters, rhs_letters, batch + "MN")  # type: ignore[arg-type]


def _baddbmm(node: fx.Node) -> _Equation | None:
    addend, lhs, rhs = node.args[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if isinstance(beta, fx.Node) or isinstance(alpha, fx.Node):
        return None  # numbers computed from sizes
    return _Equation(lhs, rhs, "aMK", "aKN", "aMN", alpha, addend if beta else None, beta)  # type: ignore[arg-type]


def _linear(node: fx.Node) -> _Equation | None:
    if len(node.args) > 2 and node.args[2] is not None:
        return None
    x, weight = node.args[:2]
    batch = string.ascii_lowercase[: _rank(x) - 1]
    return _Equation(x, weight, batch + "K", "NK", batch + "N")  # type: ignore[arg-type]


def _spell_ellipsis(term: str, rank: int, equation: str) -> str:
    """The term with "..." written as letters, aligned at the right as einsum broadcasts them."""
    if "..." not in term:
        return term
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    return term.replace("...", "".join(unused[: rank - len(term) + 3])[::-1])


def _sum_of_product(node: fx.Node) -> _Equation | None:
    """(a * b).sum(dim): what a contraction is before anyone gives it a name."""
    product, dims = node.args[0], node.args[1]
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor or product.kwargs:
        return None
    keepdim = node.args[2] if len(node.args) > 2 else False
    if keepdim or node.kwargs or len(dims) != 1 or not all(isinstance(arg, fx.Node) for arg in product.args):  # type: ignore[arg-type]
        return None
    letters = string.ascii_lowercase[: _rank(product)]
    dim = int(dims[0]) % len(letters)  # type: ignore[index, arg-type]
    lhs, rhs = product.args
    out = letters[:dim] + letters[dim + 1 :]
    return _Equation(lhs, rhs, letters[-_rank(lhs) :], letters[-_rank(rhs) :], out)  # type: ignore[arg-type]


def _einsum(node: fx.Node) -> _Equation | None:
    equation, operands = node.args[:2]
    letters = str(equation).replace(" ", "")
    if len(operands) != 2 or "->" not in letters:  # type: ignore[arg-type]
        return None
    inputs, out = letters.split("->")
    lhs, rhs = inputs.split(",")
    lhs, rhs, out = (
        _spell_ellipsis(term, _rank(tensor), letters)
        for term, tensor in ((lhs, operands[0]), (rhs, operands[1]), (out, node))  # type: ignore[index]
    )
    if any(len(set(term)) != len(term) for term in (lhs, rhs, out)):
        return None
    return _Equation(operands[0], operands[1], lhs, rhs, out)  # type: ignore[arg-type, index]


EQUATIONS: dict[Any, Callable[[fx.Node], _Equation | None]] = {
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.einsum.default: _einsum,
    aten.linear.default: _linear,
    aten.sum.dim_IntList: _sum_of_product,
}


def _bind(letters: str, axes: Axes, known: dict[str, tuple[Atom, ...]]) -> None:
    for letter, label in zip(letters, axes, strict=True):
        if label:
            known[letter] = label


def _complete(letters: str, node: fx.Node, known: dict[str, tuple[Atom, ...]]) -> Axes:
    """The labels of an operand: () where it broadcasts, new atoms for letters not known yet."""
    axes = []
    for letter, size in zip(letters, sizes_of(node), strict=True):
        axes.append(() if size == 1 else known.setdefault(letter, _label(size)))
    return tuple(axes)


def _contraction(node: fx.Node, equation: _Equation, known: dict[str, tuple[Atom, ...]]) -> Contraction:
    lhs_axes = _complete(equation.lhs_letters, equation.lhs, known)
    rhs_axes = _complete(equation.rhs_letters, equation.rhs, known)
    axes = _complete(equation.out_letters, node, known)
    summed = [letter for letter in equation.lhs_letters if letter not in equation.out_letters]
    if any(letter not in equation.rhs_letters for letter in summed):
        raise Miss("a contraction sums an axis of one operand alone", node=node)
    if any(c not in equation.lhs_letters and c not in equation.out_letters for c in equation.rhs_letters):
        raise Miss("a contraction sums an axis of one operand alone", node=node)
    contracted = tuple(atom for letter in summed for atom in known.get(letter, ()))
    return Contraction(
        node,
        equation.lhs,
        lhs_axes,
        equation.rhs,
        rhs_axes,
        axes,
        contracted,
        equation.factor,
        equation.addend,
        equation.addend_factor,
    )


def _equation(node: fx.Node) -> _Equation | None:
    if node.op != "call_function" or node.target not in EQUATIONS:
        return None
    return EQUATIONS[node.target](node)


def contraction_of(node: fx.Node, axes: Axes) -> Contraction | None:
    """`node` as a contraction, its operands labelled from the labels of its output; None where it is none."""
    equation = _equation(node)
    if equation is None:
        return None
    known: dict[str, tuple[Atom, ...]] = {}
    _bind(equation.out_letters, axes, known)
    return _contraction(node, equation, known)


def contraction_with(node: fx.Node, operand: fx.Node, axes: Axes) -> Contraction | None:
    """`node` as a contraction in which `operand` (on one side only) has the given labels; None where it is none."""
    equation = _equation(node)
    if equation is None or (equation.lhs is operand) == (equation.rhs is operand):
        return None
    known: dict[str, tuple[Atom, ...]] = {}
    _bind(equation.lhs_letters if equation.lhs is operand else equation.rhs_letters, axes, known)
    return _contraction(node, equation, known)


def broadcast_axes(node: fx.Node, axes: Axes) -> Axes:
    """The labels of an operand that broadcasts against a value with the labels `axes`."""
    sizes = sizes_of(node)
    kept = axes[len(axes) - len(sizes) :]
    if len(kept) != len(sizes):
        raise Miss("an operand has more dims than the value it meets", node=node)
    if any(size != 1 and not label for label, size in zip(kept, sizes, strict=True)):
        raise Miss("an operand is larger than the value it meets", node=node)
    return tuple(() if size == 1 else label for label, size in zip(kept, sizes, strict=True))


# --- emission ---------------------------------------------------------------------------------------------------

Sizes = Callable[[Atom], Any]


@dataclass(frozen=True)
class SizeSource:
    """Where a replacement reads an atom's size: `operands[operand].shape[dim] // divisor`."""

    operand: int
    dim: int
    divisor: int


def size_table(operands: Sequence[Axes]) -> dict[Atom, SizeSource]:
    """The dims that tell the size of an atom: those that it has alone, else shares with axes of known size."""
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
    """The size of an atom inside a replacement: a number, a (symbolic) size of an operand, or -1: to be inferred."""

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
    """`tensor`, laid out as `source`, as one laid out as `target`: what einops calls rearrange, over atoms.

    Atoms of `target` that `source` lacks are broadcast: expanded where `expand` (or where they share a dim with
    others), else left as a dim of size one.

    Raises:
        Miss: a size is needed that can be read off no operand.
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
    """`target` without its absent atoms, where those have dims of their own; else None."""
    labels = [tuple(atom for atom in label if atom in present) for label in target]
    whole = all(not kept or kept == label for kept, label in zip(labels, target, strict=True))
    return tuple(labels) if whole else None


def _fuse(source: Axes, target: Axes) -> tuple[Axes, Axes]:
    """Atoms that stay neighbours within one dim of both layouts, as one: they need not be split and merged again."""
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
    """One dim for each atom: dims of size one dropped, products unflattened."""
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
    """A shape in which torch infers at most one size.

    Raises:
        Miss: more than one size is unknown.
    """
    if sum(isinstance(size, int) and size == -1 for size in shape) > 1:
        raise Miss("the sizes of merged axes cannot be read off any operand")
    return shape


def _merge_dim(
    tensor: torch.Tensor, dim: int, label: tuple[Atom, ...], present: list[bool], sizes: Sizes, expand: bool
) -> torch.Tensor:
    """Make the atoms of `label`, standing from `dim` on where present, the one dim `dim`."""
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
    """Whether merging dims copies, unless some sizes are one: copied first, it asks no question about sizes."""
    known = all(statically_known_true(size != 1) for size in tensor.shape)
    inner = range(dim + 1, dim + count)
    together = [statically_known_true(tensor.stride(d - 1) == tensor.stride(d) * tensor.shape[d]) for d in inner]
    return not known and not all(together)


def _known(size: Any) -> Any:
    if isinstance(size, int) and size == -1:
        raise Miss("the size of a broadcast axis cannot be read off any operand")
    return size
