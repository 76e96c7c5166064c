"""The memory of a graph's values while it runs, by liveness: from when each is made until it is last read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..torch_compat import pytree


def peak_bytes(graph: fx.Graph, arguments: Sequence[Any]) -> int:
    """The largest number of bytes that values computed from the arguments occupy at once, between two operations.

    A view counts with its base; memory that an operation uses internally is not included.

    Example::

        >>> graph = fx.symbolic_trace(lambda x: x.exp().sin().cos()).graph
        >>> peak_bytes(graph, [torch.ones(256)])  # one value read and one made
        2048
    """
    watched = _Watched(graph, arguments)
    watched.run(*arguments)
    return watched.peak


class _Watched(fx.Interpreter):
    def __init__(self, graph: fx.Graph, arguments: Sequence[Any]) -> None:
        super().__init__(nn.Module(), garbage_collect_values=True, graph=graph)
        self.peak = 0
        self._given = _storages(arguments)
        self._held: dict[fx.Node, dict[int, int]] = {}  # by values that are still to be read, and not given

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        held = {} if node.op == "placeholder" else _storages([result])
        self._held = {earlier: memory for earlier, memory in self._held.items() if earlier in self.env}
        self._held[node] = {storage: size for storage, size in held.items() if storage not in self._given}
        memory = {storage: size for memory in self._held.values() for storage, size in memory.items()}
        self.peak = max(self.peak, sum(memory.values()))
        return result


def _storages(values: Iterable[Any]) -> dict[int, int]:
    """The memory behind tensors: storage -> bytes. Packed weights have none to look at, and do not count."""
    tensors = [value for value in pytree.tree_leaves(list(values)) if isinstance(value, Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {storage._cdata: storage.nbytes() for storage in storages}
