"""Contractions: matmul, bmm, einsum and linear as one einsum over atoms."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...graph.miss import Miss
from .atoms import Axes, Label, label_of, sizes_of

aten = torch.ops.aten


@dataclass
class Contraction:
    """sum over `contracted` of lhs * rhs (times `factor`, plus `addend` times `addend_factor`)."""

    node: fx.Node
    lhs: fx.Node
    lhs_axes: Axes
    rhs: fx.Node
    rhs_axes: Axes
    axes: Axes
    contracted: Label
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
    """The term with "..." as letters, right-aligned as einsum broadcasts them."""
    if "..." not in term:
        return term
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    return term.replace("...", "".join(unused[: rank - len(term) + 3])[::-1])


def _sum_of_product(node: fx.Node) -> _Equation | None:
    """(a * b).sum(dim), a contraction that is written out."""
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


def _bind(letters: str, axes: Axes, known: dict[str, Label]) -> None:
    for letter, label in zip(letters, axes, strict=True):
        if label:
            known[letter] = label


def _complete(letters: str, node: fx.Node, known: dict[str, Label]) -> Axes:
    """The labels of an operand: () where it broadcasts, new atoms for unknown letters."""
    axes = []
    for letter, size in zip(letters, sizes_of(node), strict=True):
        axes.append(() if size == 1 else known.setdefault(letter, label_of(size)))
    return tuple(axes)


def _contraction(node: fx.Node, equation: _Equation, known: dict[str, Label]) -> Contraction:
    lhs_axes = _complete(equation.lhs_letters, equation.lhs, known)
    rhs_axes = _complete(equation.rhs_letters, equation.rhs, known)
    axes = _complete(equation.out_letters, node, known)
    summed = [letter for letter in equation.lhs_letters if letter not in equation.out_letters]
    if any(letter not in equation.rhs_letters for letter in summed):
        raise Miss("a contraction sums an axis that only one operand has", node=node)
    if any(c not in equation.lhs_letters and c not in equation.out_letters for c in equation.rhs_letters):
        raise Miss("a contraction sums an axis that only one operand has", node=node)
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
    """`node` as a contraction, its operands labelled from the labels of its output; None if it is not one."""
    equation = _equation(node)
    if equation is None:
        return None
    known: dict[str, Label] = {}
    _bind(equation.out_letters, axes, known)
    return _contraction(node, equation, known)


def contraction_with(node: fx.Node, operand: fx.Node, axes: Axes) -> Contraction | None:
    """`node` as a contraction whose `operand` (on one side only) has the given labels; None if it is not one."""
    equation = _equation(node)
    if equation is None or (equation.lhs is operand) == (equation.rhs is operand):
        return None
    known: dict[str, Label] = {}
    _bind(equation.lhs_letters if equation.lhs is operand else equation.rhs_letters, axes, known)
    return _contraction(node, equation, known)


def broadcast_axes(node: fx.Node, axes: Axes) -> Axes:
    """The labels of an operand that broadcasts against a value with the labels `axes`.

    Raises:
        Miss: the operand does not broadcast to that value.
    """
    sizes = sizes_of(node)
    kept = axes[len(axes) - len(sizes) :]
    if len(kept) != len(sizes):
        raise Miss("an operand has more dims than the value it broadcasts to", node=node)
    if any(size != 1 and not label for label, size in zip(kept, sizes, strict=True)):
        raise Miss("an operand is larger than the value it broadcasts to", node=node)
    return tuple(() if size == 1 else label for label, size in zip(kept, sizes, strict=True))
