"""The values of an unpadded graph, and the writer of that graph.

Every value is one of: `Dense`, computed exactly as in the dense graph; `Packed`, only the valid tokens (see `packed`);
`Wide`, dense with token axes, exact wherever the tokens of all these axes are valid.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..analysis.axes import Atom, Axes, Label, sizes_of
from ..analysis.axis_transfer import AxisTransfer, Labels
from ..graph.miss import Miss
from ..graph.record import RULE
from ..graph.walk import ancestors
from ..kernels import packed
from .proof import AttentionMask, value_at_padding
from .validity_sources import Validity

aten = torch.ops.aten


@dataclass(frozen=True)
class Domain:
    """The valid tokens of one source."""

    validity: Validity  # in the dense graph
    mask: fx.Node  # in the packed graph: [batch, length], nonzero where tokens are valid
    tokens: fx.Node  # the packed graph's input with the positions of tokens
    batch: Atom
    position: Atom
    count: torch.SymInt  # the number of tokens


@dataclass(frozen=True)
class Dense:
    """Exact everywhere."""

    node: Any


@dataclass(frozen=True)
class Packed:
    """`axes` are those of the dense tensor; `pad` is its value at padding, if that is one number."""

    node: fx.Node
    axes: Axes
    domain: Domain
    pad: float | None = None


@dataclass(frozen=True)
class Wide:
    """Exact wherever the tokens of all token axes are valid."""

    node: fx.Node
    axes: Axes


Value = Dense | Packed | Wide


@dataclass(frozen=True)
class Guard:
    """A node of the packed graph that must be true at run time, else the dense graph runs."""

    node: fx.Node
    reason: str


def _as_held(number: float, dtype: torch.dtype) -> float | None:
    """A number as a tensor of this dtype holds it: 0.75 becomes 0 in an integer dtype, which cannot hold infinity."""
    if dtype.is_complex or not (dtype.is_floating_point or math.isfinite(number)):
        return None
    exact = torch.tensor(number, dtype=torch.float64) if isinstance(number, float) else torch.tensor(number)
    held: float = exact.to(dtype).item()
    return held


class Writer:
    """The packed graph while it is written: what each node of the dense graph became, and conversions between kinds."""

    def __init__(self, module: fx.GraphModule, validities: Sequence[Validity]):
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Value] = {}
        self.masks: dict[fx.Node, AttentionMask] = {}
        self.guards: dict[Any, Guard] = {}
        self.assumes: set[str] = set()
        self.current = next(iter(module.graph.nodes))
        self._sizes: dict[Any, Any] = {}
        self._cache: dict[Any, fx.Node] = {}
        self._fakes: dict[Any, torch.Tensor] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Dense(self.graph.node_copy(node))
        self.domains: list[Domain] = []
        tokens = [self.graph.placeholder(f"tokens_{place}") for place in range(len(validities))]
        for validity, node in zip(validities, tokens, strict=True):
            self.domains.append(self._domain(validity, node))
        self._positions = {domain.position for domain in self.domains}
        batches = {domain.batch for domain in self.domains}
        self.transfer = AxisTransfer("tokens", self._positions | batches)
        for domain in self.domains:
            for dim, atom in enumerate((domain.batch, domain.position)):
                self._sizes[atom.size] = self.cached(aten.sym_size.int, domain.mask, dim)

    def _domain(self, validity: Validity, tokens: fx.Node) -> Domain:
        source = validity.source
        batch, length = validity.sizes
        if batch.is_Integer or length.is_Integer:
            raise Miss("the mask has a fixed batch or length", node=source)
        shared = [domain.batch for domain in self.domains if domain.batch.size == batch]
        count = source.meta["val"].fake_mode.shape_env.create_unbacked_symint()
        torch._check(count >= 0)
        mask = self._source(source)
        if validity.relation is not None:
            mask = self.cached(packed.COMPARISONS[validity.relation.rel_op], mask, validity.number)
        return Domain(validity, mask, tokens, shared[0] if shared else Atom(batch), Atom(length), count)

    def _source(self, node: fx.Node) -> fx.Node:
        """The node that says where tokens are, [batch, length]: an input, or computed before anything else."""
        for earlier in sorted(ancestors([node])):
            if earlier not in self.values:
                self.values[earlier] = self.dense(earlier) if earlier.op != "get_attr" else Dense(self.copy(earlier))
        made: fx.Node = self.values[node].node
        return made if node.meta["val"].dim() == 2 else self.cached(aten.flatten.using_ints, made, 1)

    # --- reading ---

    def labels(self, value: Value) -> Labels:
        """The dims of a value that hold the batch or tokens."""
        return {} if isinstance(value, Dense) else self.transfer.labels(value.axes)

    def has_tokens(self, labels: Labels) -> bool:
        """Whether one of these dims holds tokens."""
        return any(not self._positions.isdisjoint(label) for label in labels.values())

    def domain_of(self, labels: Labels) -> Domain | None:
        """The domain of a value with exactly one token axis and one batch axis."""
        atoms = [atom for label in labels.values() for atom in label if atom in self.transfer.marks]
        for domain in self.domains:
            if len(atoms) == 2 and domain.batch in atoms and domain.position in atoms:
                return domain
        return None

    def places(self, labels: Labels, domain: Domain) -> tuple[int, int]:
        """The dims of batch and tokens.

        Raises:
            Miss: one of them shares its dim with other axes.
        """
        found = {atom: dim for dim, label in labels.items() for atom in label}
        batch, token = found[domain.batch], found[domain.position]
        expected = (domain.batch, domain.position) if batch == token else (domain.position,)
        if labels[token] != expected or (batch != token and labels[batch] != (domain.batch,)):
            raise Miss("the batch or token axis is merged with another", node=self.current)
        return batch, token

    # --- writing ---

    def call(self, function: Callable[..., Any], *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        """A new node that calls a function, with the module path of the current node."""
        node = self.graph.call_function(function, args, kwargs)
        meta: Any = self.current.meta
        node.meta = {key: meta[key] for key in ("nn_module_stack", "stack_trace") if key in meta}
        node.meta |= {RULE: "padding", "val": val}
        return node

    def cached(self, function: Callable[..., Any], *args: Any, val: Any = None) -> fx.Node:
        """One node for equal calls."""
        key = (function, args)
        if key not in self._cache:
            self._cache[key] = self.call(function, *args, val=val)
        return self._cache[key]

    def copy(self, node: fx.Node, use: Callable[[fx.Node], Any] | None = None) -> fx.Node:
        """The same op on the packed graph's versions of its inputs."""
        return self.graph.node_copy(node, use or (lambda source: self.values[source].node))

    def dense(self, node: fx.Node) -> Dense:
        """The same op on dense inputs: exact if they are exact."""
        copy = self.copy(node, self.spread)
        if isinstance(node.meta.get("val"), torch.SymInt):
            self._sizes.setdefault(node.meta["val"].node.expr, copy)
        return Dense(copy)

    def guard(self, reason: str, function: Callable[..., Any], *args: Any) -> None:
        """Adds a condition on values of this graph."""
        self.guards.setdefault((function, args), Guard(self.cached(function, *args), reason))

    def packed(self, copy: fx.Node, node: fx.Node, axes: Axes, domain: Domain, pad: float | None = None) -> Packed:
        """`copy` as the packed value of `node`."""
        val = node.meta["val"]
        if isinstance(val, torch.Tensor):
            shape = [self._packed_size(label, size) for label, size in zip(axes, val.shape, strict=True)]
            copy.meta["val"] = self.fake(shape, val)
            pad = None if pad is None else _as_held(pad, val.dtype)
        return Packed(copy, axes, domain, pad)

    def fake(self, shape: Sequence[Any], like: Any) -> torch.Tensor:
        """A fake tensor of another shape; equal requests, as in equal layers, share one."""
        sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in shape]
        key = (*sizes, like.dtype, like.device)
        if key not in self._fakes:
            with like.fake_mode:
                self._fakes[key] = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        return self._fakes[key]

    def like(self, value: Packed | Wide, copy: fx.Node, node: fx.Node, axes: Axes, pad: float | None = None) -> Value:
        """`copy` as a value of the same kind as `value`."""
        return Wide(copy, axes) if isinstance(value, Wide) else self.packed(copy, node, axes, value.domain, pad)

    def spread(self, node: fx.Node, fill: float = 0) -> Any:
        """The packed graph's version of `node`, in its dense shape."""
        value = self.values[node]
        if not isinstance(value, Packed):
            return value.node
        fill = fill if value.pad is None else value.pad
        domain, labels, val = value.domain, self.labels(value), node.meta["val"]
        apart: Axes = tuple((atom,) for label in value.axes for atom in label)
        if any(len(label) > 1 and label != (domain.batch, domain.position) for label in labels.values()):
            split = self.cached(aten.reshape.default, value.node, tuple(self.shape(apart, True)))
            places = self.places(self.labels(Wide(split, apart)), domain)
            whole = self.cached(packed.unpack, split, domain.tokens, *places, fill)
            return self.cached(aten.reshape.default, whole, tuple(self.shape(value.axes, False)), val=val)
        return self.cached(packed.unpack, value.node, domain.tokens, *self.places(labels, domain), fill, val=val)

    def gathered(self, node: fx.Node, labels: Labels, domain: Domain) -> Any:
        """`node` as an operand of a packed value with these labels: gathered at its tokens, if it has them."""
        value = self.values[node]
        if isinstance(value, Packed) or not isinstance(node.meta.get("val"), torch.Tensor):
            return value.node
        sizes, rank = sizes_of(node), max(-dim for dim in labels)
        rank = max(rank, len(sizes))
        has = {dim for dim in labels if -dim <= len(sizes) and sizes[dim] != 1}
        if not has:
            return value.node
        batch, token = self.places(labels, domain)
        shape = [1] * (rank - len(sizes)) + list(node.meta["val"].shape)
        shape[batch], shape[token] = 1, domain.count
        val = self.fake(shape, node.meta["val"])
        if batch in has and token not in has:
            return self.cached(packed.gather_rows, value.node, domain.tokens, batch, token, rank, val=val)
        full = batch if batch in has else None
        return self.cached(packed.gather, value.node, domain.tokens, full, token, rank, val=val)

    def size(self, atom: Atom, is_packed: bool) -> Any:
        """The size of an axis as an argument of a reshape; in packed form, -1 for tokens and 1 for the batch.

        Raises:
            Miss: the size cannot be computed in the packed graph.
        """
        if is_packed and atom in self.transfer.marks:
            return -1 if atom in self._positions else 1
        if atom.size.is_Integer:
            return int(atom.size)
        if atom.size not in self._sizes:
            raise Miss("a size cannot be computed in the packed graph", node=self.current, found=str(atom.size))
        return self._sizes[atom.size]

    def shape(self, axes: Iterable[Label], is_packed: bool) -> list[Any]:
        """The sizes of a dense shape (or of its packed form) as arguments of a reshape."""
        return [self._product([self.size(atom, is_packed) for atom in label]) for label in axes]

    def _product(self, sizes: list[Any]) -> Any:
        if any(isinstance(size, int) and size == -1 for size in sizes):
            return -1
        product: Any = math.prod(size for size in sizes if isinstance(size, int))
        for size in sizes:
            if not isinstance(size, int):
                product = (
                    size if isinstance(product, int) and product == 1 else self.cached(operator.mul, product, size)
                )
        return product

    def _packed_size(self, label: Label, size: Any) -> Any:
        if self.transfer.marks.isdisjoint(label):
            return size
        counts = [domain.count for domain in self.domains if domain.position in label]
        return math.prod([*counts, *(int(atom.size) for atom in label if atom not in self.transfer.marks)])

    # --- what a value is at padding ---

    def at_padding(self, arg: Any, labels: Labels, domain: Domain) -> float | None:
        """The number an operand has wherever the token beside it (dims as in `labels`) is padding; None if unknown."""
        if not isinstance(arg, fx.Node):
            return arg if isinstance(arg, bool | int | float) else None
        value = self.values[arg]
        if isinstance(value, Packed):
            return value.pad
        if isinstance(value, Wide) or not isinstance(arg.meta.get("val"), torch.Tensor):
            return None
        batch, position = sympy.Symbol("b", integer=True), sympy.Symbol("s", integer=True)
        symbols: dict[Label, Any] = {(domain.batch,): batch, (domain.position,): position}
        sizes = sizes_of(arg)
        index: list[Any] = []
        for dim in range(-len(sizes), 0):
            other = sympy.Symbol(f"d{-dim}", integer=True, nonnegative=True)
            at = symbols.get(labels.get(dim, ()), other)
            index.append(sympy.Integer(0) if sizes[dim] == 1 else at)
        return value_at_padding(arg, tuple(index), domain.validity, (batch, position))
