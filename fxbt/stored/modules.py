"""Graphs that share a model's tensors and symbols of sizes as text: the nodes, and what is known of their values."""

from __future__ import annotations

from typing import Any

import sympy
from torch import Tensor, fx, nn

from ..capture.guards import environment_of_inputs, sizes_of_inputs
from ..graph.record import Entry
from ..torch_compat import LazyGraphModule
from . import expressions
from .errors import Malformed, Unstorable, checked
from .nodes import NodesReader, path_in, tensor_of, written_constants, written_node
from .tensors import read_tensor
from .values import KindsReader, KindsWriter, written_sizes

_PARTS = ("sizes", "counts", "kinds", "constants", "graphs")
_MOST_GRAPHS = 8


class ModulesWriter:
    """Writes graphs of one model, whose first has all the sizes of inputs.

    Example:
        >>> writer = ModulesWriter(model)
        >>> writer.place(dense), writer.place(packed)
        (0, 1)
        >>> json.dumps(writer.written())
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kinds = KindsWriter()
        self._constants: dict[str, Any] = {}
        self._modules: list[fx.GraphModule] = []
        self._graphs: list[Any] = []

    def place(self, module: fx.GraphModule) -> int:
        """The number of a graph.

        Raises:
            Unstorable: there is something in it that files have no word for.
        """
        self._constants |= written_constants(module, self._model, known=self._constants)
        places = {node: place for place, node in enumerate(module.graph.nodes)}
        self._graphs.append([written_node(Entry.of(node), places, self._kinds) for node in module.graph.nodes])
        self._modules.append(module)
        return len(self._modules) - 1

    def expression(self, size: sympy.Expr) -> Any:
        """A size over the symbols of the inputs' sizes, as what `json` takes."""
        environment = environment_of_inputs(self._modules[0])
        known: Any = size if environment is None else environment.replace(size)
        if not known.free_symbols <= set(sizes_of_inputs(self._modules[0])):
            raise Unstorable(f"the size {known} is of no input")
        return expressions.written(known)

    def written(self) -> dict[str, Any]:
        """All that were placed, as what `json` takes.

        Raises:
            Unstorable: a size is of no input, and no number of tokens.
        """
        first = self._modules[0]
        environment, symbols = environment_of_inputs(first), sizes_of_inputs(first)
        counts = sorted({symbol.name for symbol in self._symbols()} - {symbol.name for symbol in symbols})
        if not all(map(expressions.is_count, counts)):
            raise Unstorable(f"the size {counts[0]} is of no input")
        return {
            "sizes": written_sizes(symbols, environment) if environment else [],
            "counts": counts,
            "kinds": self._kinds.kinds.entries,
            "constants": self._constants,
            "graphs": self._graphs,
        }

    def _symbols(self) -> set[sympy.Symbol]:
        """Those of all sizes of values."""
        nodes = [node for module in self._modules for node in module.graph.nodes]
        values = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), Tensor)]
        sizes = [size.node.expr for value in values for size in value.shape if not isinstance(size, int)]
        return {symbol for size in set(sizes) for symbol in size.free_symbols}


class ModulesReader:
    """Reads what `ModulesWriter` wrote, as graphs of `model`.

    Raises:
        Malformed: it is none of fxbt's, or another model's.
    """

    def __init__(self, text: Any, model: nn.Module) -> None:
        parts = checked(text, dict)
        if set(parts) != set(_PARTS) or len(checked(parts["graphs"], list)) > _MOST_GRAPHS:
            raise Malformed("the parts of graphs are not what they are in this version")
        self._model = model
        self._kinds = KindsReader(parts["kinds"], parts["sizes"], [], parts["counts"])
        constants = checked(parts["constants"], dict)
        self._constants = {path_in(name): read_tensor(tensor) for name, tensor in constants.items()}
        self._graphs: list[Any] = parts["graphs"]

    def expression(self, text: Any) -> sympy.Expr:
        """A size over the symbols of these graphs."""
        found = expressions.read(text, self._kinds.symbols)
        if not isinstance(found, sympy.Expr):
            raise Malformed(f"{found} is no size")
        return found

    def module(self, place: Any) -> fx.GraphModule:
        """The graph of a number."""
        if not 0 <= checked(place, int) < len(self._graphs):
            raise Malformed(f"there is no graph {place}")
        reader = NodesReader(self._kinds)
        for entry in checked(self._graphs[place], list):
            reader.add(entry)
        graph = reader.done()
        names = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
        attributes = {name: tensor_of(node, self._constants, self._model) for name, node in names.items()}
        return LazyGraphModule(attributes, graph)
