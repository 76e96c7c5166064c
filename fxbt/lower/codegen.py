"""Compiles a graph to a plain Python function, which a program runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..torch_compat import OpOverload, past_python
from .bindings import called_by


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a plain Python function of its placeholders: one line a node, what is called bound as globals."""
    graph.lint()
    bound: dict[str, Any] = {}
    last_use = {source: node for node in graph.nodes for source in node.all_input_nodes}
    parameters = ", ".join(node.name for node in graph.nodes if node.op == "placeholder")
    lines = [f"def program({parameters}):"]
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"    return {_source(node.args[0], bound)}")
        if node.op != "call_function":
            continue
        arguments = [_source(value, bound) for value in node.args]
        arguments += [f"{name}={_source(value, bound)}" for name, value in node.kwargs.items()]
        lines.append(f"    {node.name} = {_bind(called_by(node), bound)}({', '.join(arguments)})")
        done = [n.name for n in node.all_input_nodes if last_use[n] is node and n.op == "call_function"]
        done += [] if node in last_use else [node.name]
        lines += [f"    del {', '.join(done)}"] if done else []
    exec(compile("\n".join(lines), "<fxbt program>", "exec"), bound)
    return bound["program"]


def _bind(value: Any, bound: dict[str, Any]) -> str:
    name = f"_fxbt{len(bound)}"
    bound[name] = past_python(value) if isinstance(value, OpOverload) else value  # saves one Python frame per call
    return name


def _source(value: Any, bound: dict[str, Any]) -> str:
    """An argument as Python text; a value without an exact text becomes a global."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(_source(item, bound) for item in value)}]"
    if type(value) is tuple:
        return f"({''.join(_source(item, bound) + ', ' for item in value)})"
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return f"slice({', '.join(_source(part, bound) for part in parts)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_source(item, bound)}' for key, item in value.items())}}}"
    return _bind(value, bound)
