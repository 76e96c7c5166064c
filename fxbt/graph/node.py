"""Small questions about one node: its arguments, its value's shape, its readers, its writes."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from ..torch_compat import LazyGraphModule, pytree, statically_known_true


def value_of(node: Any) -> Any:
    """The fake tensor, size or number of a node; a number stands for itself."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument called `name` in the op's schema, given by position, by keyword, or by default.

    Example::

        fxbt.argument(node, "attn_mask")
    """
    if name in node.kwargs:
        return node.kwargs[name]
    if name not in (known := parameters(node.target)):
        return default
    place, its_default = known[name]
    return node.args[place] if place < len(node.args) else its_default


@functools.cache
def parameters(op: Any) -> dict[str, tuple[int, Any]]:
    """The position and default of each parameter by name, cached because torch's schema recomputes them on access."""
    return {each.name: (place, each.default_value) for place, each in enumerate(op._schema.arguments)}


def attribute(module: Any, node: fx.Node) -> Any:
    """The parameter, buffer or constant that a get_attr node stands for."""
    return operator.attrgetter(str(node.target))(module)


def with_graph(module: Any, graph: fx.Graph) -> fx.GraphModule:
    """A module of its own for `graph`, with the weights and constants of `module`."""
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return LazyGraphModule({name: operator.attrgetter(name)(module) for name in names}, graph)


def copy_of(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a graph, and for each of its nodes the one that it is there."""
    copy, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, copies))
    return copy, copies


def writes(node: fx.Node) -> bool:
    """Whether a node calls an op that writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def only_user(node: fx.Node, targets: Any) -> fx.Node | None:
    """The one node that reads `node`, if it calls one of `targets`."""
    user = next(iter(node.users), None)
    return user if user is not None and len(node.users) == 1 and user.target in targets else None


def same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two shapes are equal for every call that the graph serves."""
    if a.dim() != b.dim():
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def reaches_output(node: fx.Node) -> bool:
    """Whether the caller gets `node` itself or a view of it, and so can see its strides and write to it."""
    return any(user.op == "output" or (_is_view(user) and reaches_output(user)) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or getattr(node.target, "is_view", False)


def is_pure(node: fx.Node) -> bool:
    """Whether a node always computes the same from the same inputs and writes nothing."""
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) and not writes(node)


def expression(node: fx.Node) -> Any:
    """A key that is equal for nodes that compute the same; numbers include type and sign, because 1 == 1.0 == True."""
    arguments, spec = pytree.tree_flatten((node.args, node.kwargs))
    return (
        node.target,
        str(spec),
        tuple((type(arg), arg if isinstance(arg, fx.Node) else repr(arg)) for arg in arguments),
    )


def is_weight(value: Any) -> bool:
    """Whether a node is a parameter, buffer or constant, or computed from these only."""
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or node.op not in ("get_attr", "call_function"):
            return False
        if node.op == "call_function" and (not node.all_input_nodes or not is_pure(node)):
            return False
        seen.add(node)
        waiting += [source for source in node.all_input_nodes if source not in seen]
    return True


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers; dropout only if it is active."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    # Ops with a dropout probability or a training flag draw numbers only if that is set.
    switches = [argument(node, name) for name in ("dropout_p", "train")]
    return all(switch is None or bool(switch) for switch in switches)


def is_stochastic(graph: fx.Graph) -> bool:
    """Whether the graph draws random numbers (training dropout)."""
    return any(is_random(node) for node in graph.nodes if node.op == "call_function")
