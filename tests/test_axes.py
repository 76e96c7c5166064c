"""Axis atoms through layout ops and contractions, and back into a layout."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from tracing import graph_of, returned

from fxbt import Miss, axes
from fxbt.analysis.axes import Atom
from fxbt.graph.canonical import canonicalize
from fxbt.torch_compat import FakeTensorMode, ShapeEnv

aten = torch.ops.aten


def sizes(*values):
    return [sympy.sympify(value) for value in values]


def test_regroup_splits_an_atom_where_a_dim_ends_inside_it():
    (hidden,) = (Atom(32),)
    heads, head_dim = axes.regroup([hidden], sizes(4, 8))
    assert [atom.size for atom in (*heads, *head_dim)] == [4, 8]
    assert axes.leaves([hidden]) == (*heads, *head_dim)


def test_a_size_is_what_is_known_of_it_now():
    environment = ShapeEnv()
    x = FakeTensorMode(shape_env=environment).from_tensor(torch.randn(6, 4))
    for _ in range(2):
        assert axes.size_of(x, 0).is_Symbol
    assert x.shape[0] > 5 and x.shape[0] < 7  # guards
    for _ in range(2):
        assert axes.size_of(x, 0) == 6


def test_regroup_merges_and_splits_symbolic_sizes():
    batch, seq = sympy.symbols("b s", positive=True, integer=True)
    folded = Atom(batch * 4)
    first, second, third = axes.regroup([folded, Atom(seq)], [batch, sympy.Integer(4), seq])
    assert [label[0].size for label in (first, second, third)] == [batch, 4, seq]


@pytest.mark.parametrize("target", [(3, 2), (4,), (2, 3, 5)])
def test_regroup_refuses_dims_that_cut_across_axes(target):
    with pytest.raises(Miss, match="cuts across the axes"):
        axes.regroup([Atom(2), Atom(3)], sizes(*target))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2),
        lambda x: x.unflatten(-1, (4, 8)).permute(0, 2, 1, 3),
        lambda x: x.reshape(x.shape[0], -1, 4, 8).swapaxes(1, 2).contiguous(),
        lambda x: x.view(x.shape[0], x.shape[1], 4, 8).movedim(2, 1).flatten(0, 1).unflatten(0, (-1, 4)),
        lambda x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2).unsqueeze(0).squeeze(0).clone(),
    ],
)
def test_peel_does_not_care_how_a_layout_was_written(layout):
    graph = graph_of(lambda x, w: layout(F.linear(x, w)) * 2.0, torch.randn(2, 5, 16), w=torch.randn(32, 16))
    node = returned(graph).args[0]
    labels = axes.fresh(node)
    source, source_axes = axes.peel(node, labels)
    assert source.target is aten.linear.default
    batch, heads, seq, head_dim = axes.resolve(labels)
    assert source_axes == (batch, seq, heads + head_dim)


def test_peel_drops_the_axis_that_expand_repeats():
    def repeat(x):
        return x[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2) * 2.0

    node = returned(canonicalize(graph_of(repeat, torch.randn(2, 4, 5, 8)))).args[0]
    labels = axes.fresh(node)
    source, source_axes = axes.peel(node, labels)
    assert source.op == "placeholder"
    (heads, groups) = axes.resolve(labels)[1]
    assert source_axes[1] == (heads,)
    assert groups not in axes.atoms_of(source_axes)


def test_peel_stops_at_a_view_that_cuts_across_axes():
    node = returned(graph_of(lambda x: x.view(x.shape[0], 6, 4).transpose(1, 2) * 2.0, torch.randn(2, 4, 6))).args[0]
    source, _ = axes.peel(node, axes.fresh(node))
    # (4, 6) read as (6, 4) keeps no axis but the batch
    assert source.target is aten.view.default


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda q, k: q @ k.mT, ((2, 3, 5, 8), (2, 3, 7, 8))),
        (lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k), ((2, 3, 5, 8), (2, 3, 7, 8))),
        (lambda q, k: torch.einsum("...qd,...kd->...qk", q, k), ((2, 3, 5, 8), (2, 3, 7, 8))),
        (lambda q, k: torch.bmm(q, k.transpose(1, 2)), ((6, 5, 8), (6, 7, 8))),
        (lambda q, k: (q[:, :, None] * k[:, None]).sum(-1), ((6, 5, 8), (6, 7, 8))),
        (lambda q, k: torch.baddbmm(q[:, :, :1], q, k.mT, beta=0, alpha=1), ((6, 5, 8), (6, 7, 8))),
    ],
)
def test_every_contraction_has_one_form(function, shapes):
    node = returned(graph_of(function, *(torch.randn(shape) for shape in shapes)))
    product = axes.contraction_of(node, axes.fresh(node))
    assert product is not None
    (_, lhs), (_, rhs) = (
        axes.peel(*side) for side in ((product.lhs, product.lhs_axes), (product.rhs, product.rhs_axes))
    )
    out = axes.resolve(product.axes)
    assert lhs[-1] == rhs[-1] == axes.leaves(product.contracted)
    assert (lhs[-2], rhs[-2]) == (out[-2], out[-1])
    assert product.addend is None


def test_linear_with_bias_is_no_contraction():
    node = returned(graph_of(torch.nn.functional.linear, torch.randn(2, 8), w=torch.randn(3, 8), b=torch.randn(3)))
    assert axes.contraction_of(node, axes.fresh(node)) is None


def test_contraction_summing_one_operand_alone_is_refused():
    graph = graph_of(lambda q, k: torch.einsum("bqd,bke->bqk", q, k), torch.randn(2, 3, 4), torch.randn(2, 5, 6))
    node = returned(graph)
    with pytest.raises(Miss, match="sums an axis that only one operand has"):
        axes.contraction_of(node, axes.fresh(node))


def concrete(*shape):
    return tuple((Atom(size),) for size in shape)


def no_symbols(atom):
    return int(atom.size)


def test_arrange_splits_permutes_and_merges():
    batch, heads, seq, dim = (Atom(size) for size in (2, 3, 5, 4))
    tensor = torch.randn(2, 5, 12)
    out = axes.arrange(tensor, ((batch,), (seq,), (heads, dim)), ((batch, heads), (seq,), (dim,)), no_symbols)
    assert torch.equal(out, tensor.view(2, 5, 3, 4).transpose(1, 2).reshape(6, 5, 4))


def test_arrange_broadcasts_what_the_source_lacks():
    batch, heads, seq = (Atom(size) for size in (2, 3, 5))
    tensor = torch.randn(5)
    whole = axes.arrange(tensor, ((seq,),), ((batch,), (heads,), (seq,)), no_symbols)
    thin = axes.arrange(tensor, ((seq,),), ((batch,), (heads,), (seq,)), no_symbols, expand=False)
    partly = axes.arrange(torch.randn(2, 5), ((batch,), (seq,)), ((batch, heads), (seq,)), no_symbols, expand=False)
    assert (whole.shape, thin.shape, partly.shape) == ((2, 3, 5), (1, 1, 5), (6, 5))
    assert torch.equal(whole[1, 2], tensor)


def test_arrange_leaves_a_layout_that_fits_alone():
    labels = concrete(2, 3, 4)
    tensor = torch.randn(2, 3, 4)
    assert axes.arrange(tensor, labels, labels, no_symbols) is tensor


def test_arrange_needs_every_size_but_one():
    first, second = Atom(sympy.Symbol("a")), Atom(sympy.Symbol("b"))
    with pytest.raises(Miss, match="sizes of merged axes"):
        axes.arrange(torch.randn(6), ((first, second),), ((second,), (first,)), axes.sizes_from({}, []))


def test_minima_that_a_guard_proves_are_sizes():
    """A table of 16 rows cut to the length, added to what is as long: the length is min(16, s) no more."""
    module = canonicalize(graph_of(lambda x, table: x + table[: x.shape[1]], torch.randn(2, 7), table=torch.randn(16)))
    length = module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1].node.expr
    assert axes.sizes_of(returned(module))[1] == length


def test_sums_of_minima_that_a_guard_proves_are_sizes():
    """Two cuts of a table, side by side, added to what is twice as long."""

    def function(x, table):
        seq = x.shape[1]
        return torch.cat([x, x], dim=1) + torch.cat([table[:seq], table[16 : 16 + seq]])

    module = canonicalize(graph_of(function, torch.randn(2, 7), table=torch.randn(32)))
    length = module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1].node.expr
    (cut,) = [node for node in module.graph.nodes if node.target is aten.cat.default and len(axes.sizes_of(node)) == 1]
    assert cut.meta["val"].shape[0].node.expr != 2 * length
    assert axes.sizes_of(cut) == [2 * length]


def test_constant_along_an_axis_is_what_holds_no_part_of_it():
    hidden, seq = Atom(32), Atom(5)
    heads, head_dim = axes.regroup([hidden], sizes(4, 8))
    assert axes.is_constant_along(((seq,), ()), [hidden])
    assert not axes.is_constant_along((head_dim,), [hidden]), "a part of it"
    assert axes.is_constant_along((heads,), head_dim)
    assert not axes.is_constant_along(((hidden,),), head_dim), "the whole of which it is a part"


def test_a_division_says_what_it_splits_and_splits_nothing():
    hidden, seq = Atom(32), Atom(5)
    labels, splits = axes.divided([seq, hidden], sizes(5, 4, 8))
    (heads,), (head_dim,) = labels[1:]
    assert splits == {hidden: (heads, head_dim)} and labels[0] == (seq,)
    assert axes.leaves([hidden]) == (hidden,)
    labels, splits = axes.divided([hidden], sizes(2, 2, 8))
    assert [atom.size for (atom,) in labels] == [2, 2, 8] and len(splits) == 2, "a part may be split again"


def test_a_view_that_cannot_be_followed_splits_nothing():
    hidden, seq = Atom(32), Atom(5)
    with pytest.raises(Miss, match="cuts across"):
        axes.regroup([hidden, seq], sizes(4, 3))
    assert axes.leaves([hidden]) == (hidden,)
