"""Axis atoms: identifies the axes of a tensor across layout ops. A read-only analysis.

An `Atom` is one indivisible axis with a symbolic size. The `Axes` of a value say, for each of its dims, of which atoms
it is the row-major product; a dim of size one has none. Layout ops and contractions only move atoms, so following them
shows what is summed with what, however the model wrote it. A view may split an atom: `divided` returns the split, and
`regroup` applies it wherever the atom occurs.
"""

from ...graph.node import argument
from ...graph.opsets import CASTS
from .arranging import Sizes, SizeSource, arrange, size_table, sizes_from
from .atoms import (
    Atom,
    Axes,
    Label,
    atoms_of,
    divided,
    fresh,
    is_constant_along,
    leaves,
    reduced,
    regroup,
    resolve,
    size_of,
    sizes_of,
)
from .contractions import EQUATIONS, Contraction, broadcast_axes, contraction_of, contraction_with
from .layouts import EXPANDS, IDENTITIES, PERMUTES, RESHAPES, UNIT_DIMS, peel, permutation, step_back, step_forward

__all__ = [
    "Atom",
    "Axes",
    "CASTS",
    "Contraction",
    "EQUATIONS",
    "EXPANDS",
    "IDENTITIES",
    "Label",
    "PERMUTES",
    "RESHAPES",
    "SizeSource",
    "Sizes",
    "UNIT_DIMS",
    "argument",
    "arrange",
    "atoms_of",
    "broadcast_axes",
    "contraction_of",
    "contraction_with",
    "divided",
    "fresh",
    "is_constant_along",
    "leaves",
    "peel",
    "permutation",
    "reduced",
    "regroup",
    "resolve",
    "size_of",
    "size_table",
    "sizes_from",
    "sizes_of",
    "step_back",
    "step_forward",
]
