"""Nodes of a graph as text: what they call, with what, and what is known of their values."""

from __future__ import annotations

import keyword
import re
from collections.abc import Container, Mapping
from typing import Any

from torch import SymInt, Tensor, fx, nn

from ..capture.checkpointing import regions_of
from ..graph.node import attribute
from ..graph.record import Entry
from .errors import Malformed, Unstorable, checked
from .operations import name_of, operation
from .tensors import own_tensor, written_tensor
from .values import KindsReader, KindsWriter, read_argument, written_argument

LENGTH = 6  # of a node's entry
_OPS = ("placeholder", "get_attr", "call_function", "output")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")  # names in a graph become names in generated Python


def written_node(entry: Entry, places: dict[fx.Node, int], kinds: KindsWriter) -> list[Any]:
    """A node as what `json` takes, as it was when it was recorded; `places` are those of the nodes before it.

    Raises:
        Unstorable: there is something in it that files have no word for.
    """
    node = entry.node
    if node.op not in _OPS or regions_of(node):
        raise Unstorable(
            f"%{node.name} is a {node.op}{' inside a checkpoint' if regions_of(node) else ''}, which files cannot hold"
        )
    return [
        node.op,
        node.name,
        name_of(entry.target) if node.op == "call_function" else str(entry.target),
        [written_argument(argument, places) for argument in entry.args],
        {name: written_argument(argument, places) for name, argument in entry.kwargs.items()},
        kinds.place(node.meta["val"]) if "val" in node.meta else None,
    ]


def written_constants(module: fx.GraphModule, model: nn.Module, known: Container[str] = ()) -> dict[str, Any]:
    """The tensors, by name, that a graph reads and `model` does not have, except `known` ones, as what `json` takes.

    Raises:
        Unstorable: one of them cannot be stored, or the graph contains another graph.
    """
    constants = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value, name = attribute(module, node), str(node.target)
        if not isinstance(value, Tensor):
            raise Unstorable(f"the graph contains another graph, {name}")
        if name not in known and own_tensor(model, name) is not value:
            constants[name] = written_tensor(value)
    return constants


def tensor_of(node: fx.Node, constants: Mapping[str, Any], model: nn.Module) -> Tensor:
    """The tensor of a get_attr node: a constant from the file, or the model's own of the same kind as before.

    Raises:
        Malformed: there is none.
    """
    name = str(node.target)
    value = constants.get(name)
    value = own_tensor(model, name) if value is None else value
    if value is None or not _is_alike(value, node.meta.get("val")):
        raise Malformed(f"the model has no {name} of the dtype and shape that the graph reads")
    return value


class NodesReader:
    """Reads what `written_node` wrote, node by node, into one graph.

    Raises:
        Malformed: it is none of fxbt's.
    """

    def __init__(self, kinds: KindsReader) -> None:
        self.graph = fx.Graph()
        self._nodes: list[fx.Node] = []
        self._kinds = kinds

    def add(self, entry: Any) -> fx.Node:
        """The next node."""
        if type(entry) is not list or len(entry) != LENGTH or entry[0] not in _OPS:
            raise Malformed("the file has something other than a node where a node belongs")
        op, name, target, args, kwargs, kind = entry
        arguments = tuple([read_argument(argument, self._nodes) for argument in checked(args, list)])
        named = {name_in(key): read_argument(value, self._nodes) for key, value in checked(kwargs, dict).items()}
        node = self.graph.create_node(op, _target(op, target), arguments, named, name_in(name))
        if node.name != name:
            raise Malformed(f"two nodes have the name {name}")
        if kind is not None:
            node.meta["val"] = self._kinds.value(kind)
        self._nodes.append(node)
        return node

    def done(self) -> fx.Graph:
        """The graph, which ends in its one output, a tuple."""
        outputs = [place for place, node in enumerate(self._nodes) if node.op == "output"]
        is_ended = outputs == [len(self._nodes) - 1]
        if not is_ended or len(self._nodes[-1].args) != 1 or not isinstance(self._nodes[-1].args[0], tuple):
            raise Malformed("the graph does not end with its output")
        self.graph.lint()
        return self.graph


def name_in(text: Any) -> str:
    """A name that may stand in the Python that is made of a graph."""
    if not _NAME.fullmatch(checked(text, str)) or keyword.iskeyword(text):
        raise Malformed(f"the file has a name {text[:80]!r} that fxbt never writes")
    return str(text)


def path_in(text: Any) -> str:
    """The name of a tensor: parts with dots between them, which may be numbers (`layers.0.weight`)."""
    parts = checked(text, str).split(".")
    if not all(part.isascii() and (_NAME.fullmatch(part) or part.isdigit()) for part in parts):
        raise Malformed(f"the file has a name {text[:80]!r} that fxbt never writes")
    return str(text)


def _is_alike(value: Tensor, kind: Any) -> bool:
    """Whether a tensor is of the kind that a graph reads."""
    same_rank = isinstance(kind, Tensor) and kind.ndim == value.ndim
    if not same_rank or (kind.dtype, kind.device) != (value.dtype, value.device):
        return False
    return all(isinstance(size, SymInt) or size == now for size, now in zip(kind.shape, value.shape, strict=True))


def _target(op: str, text: Any) -> Any:
    if op == "call_function":
        return operation(text)
    return path_in(text) if op == "get_attr" else name_in(text)
