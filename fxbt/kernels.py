"""CPU kernels for a graph that runs without gradients: packed linears with what follows fused in, masks made once.

Each function changes a lowered graph in place and keeps its numbers to floating-point rounding.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from .axes import PERMUTES, RESHAPES, permutation, sizes_of
from .canonical import argument, same_shape
from .tune import Calls, Contest, Tuner, bucket_of

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn

# Ops that read rows of their first argument, and which argument says where.
LOOK_UPS = {aten.embedding.default: 1, aten.gather.default: 2}
ROWS = (1, 4, 16, 64, 256)  # rows of x that linears are measured at
UP_TO = (2, 8, 32, 128)
PACKED_FOR_ROWS = 128  # the layout is the same for 16 to 1024 rows, and no slower for one
MOST_OPERATIONS = 1e9  # of one call that is measured
COLD_BYTES = 32 * 2**20  # of copies of a weight: a model's weights come from memory, not from a cache
# Without measurements: with AVX-512, packed weights were 1.2 to 1.9 times as fast from 16 rows on; calling the packed
# kernel takes some 15 us, F.linear 3, which smaller weights than this do not win back.
PACKED_FROM_ELEMENTS = 256 * 256

# Activations that oneDNN computes as torch does, to the last bits, by their name there and their algorithm.
ACTIVATIONS: dict[Any, Callable[[fx.Node], tuple[str, str]]] = {
    aten.gelu.default: lambda node: ("gelu", argument(node, "approximate")),
    aten.relu.default: lambda node: ("relu", ""),
    aten.silu.default: lambda node: ("swish", ""),
}


class LinearByRows:
    """A linear whose kernel depends on the rows of x: packed for the numbers of rows where that was faster."""

    def __init__(self, packed_pays: tuple[int, ...], activation: tuple[str, str], after: Any):
        self._packed_pays = packed_pays
        self._activation, self._algorithm = activation
        self._after = after  # the activation's own node, for F.linear's path
        self.__name__ = "linear_by_rows"  # fx names nodes by it

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> Any:
        rows = x.numel() // x.shape[-1] if x.numel() else 0
        if self._packed_pays[bucket_of(rows, UP_TO)]:
            return mkldnn._linear_pointwise(x, packed, bias, self._activation, [], self._algorithm)
        y = F.linear(x, weight, bias)
        return y if self._after is None else self._after.target(y, *self._after.args[1:], **self._after.kwargs)


def packed_linears(n: int, k: int, dtype: torch.dtype) -> Contest:
    """F.linear on x[rows, k] and a weight [n, k] against the kernel on packed weights, by rows."""

    @functools.cache
    def weights() -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        copies = max(2, min(256, COLD_BYTES // (n * k * dtype.itemsize)))
        plain = [torch.full((n, k), 0.5, dtype=dtype) for _ in range(copies)]
        packed = [mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS) for weight in plain]
        return torch.zeros(n, dtype=dtype), plain, packed

    def calls(rows: int) -> list[Calls] | None:
        if 2 * rows * n * k > MOST_OPERATIONS and rows > ROWS[0]:
            return None
        x = torch.full((rows, k), 0.5, dtype=dtype)
        bias, plain, packed = weights()
        kernel = mkldnn._linear_pointwise.default
        return [
            [functools.partial(F.linear, x, weight, bias) for weight in plain],
            [functools.partial(kernel, x, weight, bias, "none", [], "") for weight in packed],
        ]

    by_rule = int(torch.cpu._is_avx512_supported() and n * k >= PACKED_FROM_ELEMENTS)
    key = f"linear {n}x{k} {str(dtype).removeprefix('torch.')}"
    return Contest(key, ("F.linear", "packed"), ROWS, UP_TO, calls, by_rule)


def pack_linears(graph: fx.Graph, constant: set[fx.Node], tuner: Tuner) -> None:
    """Give linears on float32 weights oneDNN's packed kernel where it pays, with an activation or residual fused in.

    The nodes that pack weights join `constant`.
    """
    packed: dict[fx.Node, fx.Node] = {}
    if not can_pack_here():
        return
    for node in list(graph.nodes):
        if not can_be_packed(node, constant):
            continue
        weight = node.args[1]
        n, k = map(int, weight.meta["val"].shape)
        pays = tuner.choose(packed_linears(n, k, weight.meta["val"].dtype))
        if not any(pays):
            continue
        if weight not in packed:
            with graph.inserting_after(weight):
                packed[weight] = graph.call_function(mkldnn._reorder_linear_weight.default, (weight, PACKED_FOR_ROWS))
        _use_packed(graph, node, packed[weight], pays)
    constant.update(packed.values())


def _use_packed(graph: fx.Graph, linear: fx.Node, packed: fx.Node, pays: tuple[int, ...]) -> None:
    x, weight = linear.args[:2]
    bias = argument(linear, "bias")
    activation = only_user(linear, ACTIVATIONS)
    name, algorithm = ACTIVATIONS[activation.target](activation) if activation else ("none", "")
    residual = _residual(linear)
    last = activation or (residual[0] if residual and all(pays) else linear)
    with graph.inserting_after(last):
        if not all(pays):
            kernel = LinearByRows(pays, (name, algorithm), activation)
            fused = graph.call_function(kernel, (x, weight, packed, bias))
        elif residual:
            fused = graph.call_function(mkldnn._linear_pointwise.binary, (x, residual[1], packed, bias, "add"))
        else:
            fused = graph.call_function(mkldnn._linear_pointwise.default, (x, packed, bias, name, [], algorithm))
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    graph.erase_node(last)
    if last is not linear:
        graph.erase_node(linear)


def only_user(node: fx.Node, targets: Any) -> fx.Node | None:
    """The one node that reads `node`, if it calls one of `targets`."""
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and user.target in targets else None


def _residual(linear: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(add, what is added) where a linear's result goes only into a sum with a value of its own shape."""
    add = only_user(linear, (aten.add.Tensor,))
    if add is None or add.kwargs or not all(isinstance(value, fx.Node) for value in add.args) or len(add.args) != 2:
        return None
    other: Any = add.args[1] if add.args[0] is linear else add.args[0]
    values = [node.meta["val"] for node in (linear, other)]
    if other is linear or values[0].dtype != values[1].dtype or values[0].dim() < 2 or not same_shape(*values):
        return None
    return add, other


def can_pack_here() -> bool:
    """Outside autocast, which would not see the packed op."""
    has_kernel = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return has_kernel and not torch.is_autocast_enabled("cpu")


def can_be_packed(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a node is a float32 linear on a weight, and not itself computed from weights alone."""
    if node.target is not aten.linear.default or node.args[1] not in constant or node in constant:
        return False
    x, weight = (node.args[place].meta["val"] for place in (0, 1))  # type: ignore[union-attr]
    on_cpu = x.device.type == weight.device.type == "cpu"
    return on_cpu and x.dtype is weight.dtype is torch.float32 and weight.dim() == 2


def look_up_once(graph: fx.Graph, constant: set[fx.Node]) -> None:
    """Rows of a weight at a slice of a constant index (positions, token types) -> a slice of the rows at all of it.

    Expanding comes after the look-up too. The nodes that then depend on weights alone join `constant`.
    """
    waiting = [node for node in graph.nodes if node.target in LOOK_UPS and node.args[0] in constant]
    while waiting:
        node = waiting.pop(0)
        place = LOOK_UPS[node.target]
        cut: Any = node.args[place]
        if not _can_be_cut_later(node, cut, constant):
            continue
        index, *layout = cut.args
        if cut.target is aten.expand.default:
            layout = [[*layout[0], -1]]
        target: Any = node.target
        with graph.inserting_before(node):
            whole = graph.call_function(target, (*node.args[:place], index, *node.args[place + 1 :]))
            again = graph.call_function(cut.target, (whole, *layout))
        whole.meta["val"] = target(*fx.node.map_arg(whole.args, lambda source: source.meta["val"]))
        again.meta = dict(node.meta)
        constant.update([whole] if index in constant else [])
        waiting.insert(0, whole)
        node.replace_all_uses_with(again)
        graph.erase_node(node)


def _can_be_cut_later(look_up: fx.Node, cut: Any, constant: set[fx.Node]) -> bool:
    """Whether the index is an expansion, or a slice of a constant in a dim that the looked up rows have too."""
    if not isinstance(cut, fx.Node) or cut.kwargs or look_up.kwargs or cut in constant:
        return False
    if cut.target is aten.expand.default:
        return look_up.target is aten.embedding.default
    if cut.target is not aten.slice.Tensor or cut.args[0] not in constant:
        return False
    dim = argument(cut, "dim")
    return dim >= 0 and (look_up.target is aten.embedding.default or dim == argument(look_up, "dim"))


def make_masks_once(graph: fx.Graph) -> None:
    """A boolean mask of several attentions -> the additive one that SDPA would make of it in each of them."""
    attentions: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            mask = argument(node, "attn_mask")
            if isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool:
                attentions.setdefault(mask, []).append(node)
    for mask, users in attentions.items():
        dtypes = {user.meta["val"].dtype for user in users}
        if len(users) < 2 or len(dtypes) > 1:
            continue
        with graph.inserting_after(mask):
            bias = graph.call_function(additive, (mask, dtypes.pop()))
        for user in users:
            user.replace_input_with(mask, bias)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as what is added to scores."""
    columns = mask.shape[-1]
    # On CUDA, SDPA's memory-efficient kernel asks for rows at multiples of 8 elements, and would copy others each time.
    room = -(-columns // 8) * 8 if mask.is_cuda else columns
    bias = torch.zeros((*mask.shape[:-1], room), dtype=dtype, device=mask.device).narrow(-1, 0, columns)
    return bias.masked_fill_(mask.logical_not(), -math.inf)


def split_heads_once(graph: fx.Graph) -> None:
    """split(x, sizes, -1), each part viewed as (b, s, heads, d), transposed -> one view, transpose and split."""
    for split in [node for node in graph.nodes if node.target is aten.split_with_sizes.default]:
        parts = _parts_of_heads(split)
        if not parts:
            continue
        width = int(parts[0][1].meta["val"].shape[-1])
        sizes: Any = split.args[1]
        heads = [size // width for size in sizes]
        with graph.inserting_before(min(view for _, view, _ in parts)):
            whole = graph.call_function(aten.unflatten.int, (split.args[0], 2, [sum(heads), width]))
            turned = graph.call_function(aten.transpose.int, (whole, 1, 2))
            again = graph.call_function(aten.split_with_sizes.default, (turned, heads, 1))
            items = [graph.call_function(operator.getitem, (again, part[0].args[1])) for part in parts]
        for item, (old_item, view, transposed) in zip(items, parts, strict=True):
            item.meta = dict(transposed.meta)
            transposed.replace_all_uses_with(item)
            for old in (transposed, view, old_item):
                graph.erase_node(old)
        graph.erase_node(split)


def _parts_of_heads(split: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """(part, its view, its transpose) for all parts of a split of the last axis; none if one is used otherwise."""
    source: Any = split.args[0]
    if source.meta["val"].dim() != 3 or argument(split, "dim") not in (-1, 2):
        return []
    parts, widths = [], set()
    for item in split.users:
        view = only_user(item, RESHAPES) if item.target is operator.getitem else None
        transposed = only_user(view, PERMUTES) if view is not None else None
        if view is None or transposed is None or view.meta["val"].dim() != 4 or permutation(transposed) != [0, 2, 1, 3]:
            return []
        if sizes_of(view)[:2] != sizes_of(source)[:2]:
            return []
        parts.append((item, view, transposed))
        widths.add(sizes_of(view)[3])
    sizes: Any = split.args[1]
    width = widths.pop() if len(widths) == 1 else None
    is_even = width is not None and width.is_Integer and all(type(size) is int and size % width == 0 for size in sizes)
    return parts if is_even else []
