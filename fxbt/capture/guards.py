"""Turns what a trace assumed about a call's shapes and values into a function that asserts it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import SymBool, SymInt, Tensor, fx

from ..errors import CaptureError
from ..torch_compat import PythonPrinter, ShapeEnv, free_unbacked_symbols
from .size_scalars import Constant

aten = torch.ops.aten
_ASSERTS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def erase_asserts(graph: fx.Graph) -> list[sympy.Basic]:
    """Erases assertions; returns those about input shapes, which become guards (dtypes are in the call's key).

    Assertions about sizes that depend on values stay in the graph: a call for which they fail runs the original.
    """
    conditions = []
    for node in [node for node in graph.nodes if node.target in _ASSERTS]:
        if node.target is aten._assert_scalar.default:
            value = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else node.args[0]
            if isinstance(value, SymBool) and free_unbacked_symbols(value):
                continue
            if isinstance(value, SymBool):
                conditions.append(value.node.expr)
        graph.erase_node(node)
    return conditions


def guards_of(
    module: fx.GraphModule, names: list[str], fixed: Mapping[int, Tensor], assumed: Sequence[sympy.Basic]
) -> Callable[..., None]:
    """A function of the call's tensors that asserts everything `assumed` about their shapes and values.

    The first placeholders are the call's tensors, called `names`; the values of those in `fixed` are constants.
    """
    placeholders = module.graph.find_nodes(op="placeholder")[: len(names)]
    conditions: list[tuple[str, str]] = []  # Python code over t0, t1, ...; its text for messages
    size_of: dict[sympy.Symbol, tuple[str, str]] = {}
    unsettled: list[tuple[str, str, sympy.Basic]] = []
    for i, (node, name) in enumerate(zip(placeholders, names, strict=True)):
        for axis, size in enumerate(node.meta["val"].shape):
            code, text = f"t{i}.shape[{axis}]", f"{name}.shape[{axis}]"
            if not isinstance(size, SymInt):
                conditions.append((f"{code} == {size}", f"{text} == {size}"))
                continue
            expression = size.node.expr
            if isinstance(expression, sympy.Symbol) and expression not in size_of:
                size_of[expression] = (code, text)
            else:
                unsettled.append((code, text, expression))

    def printed(expression: sympy.Basic) -> tuple[str, str]:
        if expression.free_symbols - size_of.keys():
            raise CaptureError(f"the shapes depend on the values of tensors ({expression})")
        written = [_print(expression, {s: size_of[s][way] for s in expression.free_symbols}) for way in (0, 1)]
        return written[0], written[1]

    for code, text in size_of.values():
        conditions.append((f"{code} >= 1", f"{text} >= 1"))  # a trace assumes that no size is 0
    for code, text, expression in unsettled:
        conditions.append((f"{code} == {printed(expression)[0]}", f"{text} == {printed(expression)[1]}"))
    for expression in assumed:
        conditions.append(printed(expression))
    for i, tensor in fixed.items():
        conditions.append((f"t{i}.tolist() == {tensor.tolist()}", f"{names[i]} == {tensor.tolist()}"))
    return assertions(len(names), conditions)


def environment_of_inputs(module: fx.GraphModule) -> ShapeEnv | None:
    """The shape environment of a graph's inputs; None if all their sizes are ints."""
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    return next((size.node.shape_env for value in values for size in value.shape if isinstance(size, SymInt)), None)


def sizes_of_inputs(module: fx.GraphModule) -> list[sympy.Symbol]:
    """The symbols that are sizes of a graph's inputs, in order."""
    values = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    sizes = [size.node.expr for value in values for size in value.shape if isinstance(size, SymInt)]
    return list(dict.fromkeys(size for size in sizes if isinstance(size, sympy.Symbol)))


def assumptions(module: fx.GraphModule) -> list[sympy.Basic]:
    """Everything the trace assumed about the sizes of inputs; the module must still have its assertions."""
    environment, sizes = environment_of_inputs(module), sizes_of_inputs(module)
    found = [*module.meta.pop("fxbt_asserted"), *_unsqueezed(module)]
    if environment is None:
        return found
    found += [environment.replace(guard.expr) for guard in environment.guards]
    for symbol in sizes:
        bounds = environment.var_to_range[symbol]
        found += [symbol >= bounds.lower] if bounds.lower > 0 else []
        found += [symbol <= bounds.upper] if bounds.upper < torch.iinfo(torch.int64).max // 2 else []
    return [e for e in dict.fromkeys(found) if e is not sympy.true]


def _unsqueezed(module: fx.GraphModule) -> list[sympy.Basic]:
    """Squeezes of dynamic axes were traced as keeping them, without a guard that says so."""
    kept = []
    for node in module.graph.nodes:
        if node.target not in _SQUEEZES:
            continue
        shape = node.args[0].meta["val"].shape
        dims = node.args[1] if len(node.args) > 1 else range(len(shape))
        for dim in [dims] if isinstance(dims, int) else dims:
            if isinstance(shape[dim], SymInt):
                kept.append(sympy.Ne(shape[dim].node.expr, 1))
    return kept


def _print(expression: sympy.Basic, names: dict[sympy.Symbol, str]) -> str:
    text = PythonPrinter().doprint(expression)
    for symbol, name in names.items():
        text = re.sub(rf"\b{symbol}\b", name, text)
    return text


def assertions(count: int, conditions: list[tuple[str, str]]) -> Callable[..., None]:
    """A function of `count` tensors t0, t1, ... that asserts (code, text) conditions, naming the first that fails."""
    lines = [f"    if not ({code}): raise AssertionError({text!r})" for code, text in dict.fromkeys(conditions)]
    source = "\n".join([f"def guards({', '.join(f't{i}' for i in range(count))}):", "    pass", *lines])
    namespace: dict[str, Any] = {"math": math}
    exec(source, namespace)  # compares sizes at full speed, without a graph
    return namespace["guards"]


def and_values(guards: Callable[..., None], constants: list[Constant]) -> Callable[..., None]:
    """These guards, and that tensors of the model have their captured values."""

    def both(*tensors: Tensor) -> None:
        guards(*tensors)
        for read in constants:
            if not read.holds():
                raise AssertionError(f"{read.name} == {read.value}")

    return both
