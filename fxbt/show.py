"""A graph as text, the same for every capture of the same model, and the difference of two such texts."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx

from .rule import module_path

RULE_KEY = "fxbt_rule"  # node.meta entry: the name of the rule that made the node

_SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_SHORT_OPS = {"scaled_dot_product_attention": "sdpa"}
_NAME = re.compile(r"%[\w.]+?_(\d+)(?!\w)")  # %linear_3, not the input %input_ids
_SYMBOL_NUMBER = re.compile(r"\d+")
_SLICE_END = torch.iinfo(torch.int64).max


def text(module: fx.GraphModule) -> str:
    """The graph as text: one operation a line, in the order of execution.

    A line reads `%name = op(args) -> dtype[shape]  # module path  [rule that made it]`. Names count each op
    from 0, symbolic sizes are s0, s1, … in order of appearance: nothing depends on the numbers a capture
    happened to draw. Weights and sizes have no line of their own: they stand where they are used, a weight by
    its name in the model (`.weight` for one of the module the line is from), a size as its formula.

    Args:
        module: a flat graph module; values with `meta["val"]` (fake tensors) print with dtype and shape.

    Example::

        >>> print(fxbt.show.text(fast.report.graphs[key].module))
        %input_ids = input -> i64[s0, s1]
        %embedding_0 = embedding(.weight, %input_ids, 0) -> f32[s0, s1, 384]  # embeddings.word_embeddings
        ...
    """
    return "\n".join(_Printer(module.graph).lines())


def diff(before: str, after: str) -> str:
    """What changed between two graph texts, as a unified diff; "" if nothing did.

    Equal lines are found without looking at the counted names, so that a removed op does not show as a change
    in every line after it. Names are those of `after`; a value of `before` alone has a quote: `%softmax_0'`.

    Example::

        >>> print(fxbt.show.diff(report.before, report.after))
        --- before
        +++ after
        @@ -40,14 +40,9 @@
        ...
        -%softmax_0' = softmax(%add_4', -1) -> f32[s0, 12, s1, s1]  # encoder.layer.0.attention.self
    """
    old, new = before.splitlines(), after.splitlines()
    renamed = _rename(old, new)
    return "\n".join(difflib.unified_diff(renamed, new, "before", "after", lineterm=""))


def _rename(old: list[str], new: list[str]) -> list[str]:
    """The lines of `old` with the names of `new` for the values both have, quoted ones for the others."""
    pairs: list[tuple[str, str]] = []
    done = (0, 0)
    for i, j, length in _common(_keys(old), _keys(new)):
        # Between two runs of equal lines: what differs in its arguments only is still the same value.
        changed = old[done[0] : i], new[done[1] : j]
        for k, m, count in _common(_heads(changed[0]), _heads(changed[1])):
            pairs += zip(changed[0][k : k + count], changed[1][m : m + count], strict=True)
        pairs += zip(old[i : i + length], new[j : j + length], strict=True)
        done = (i + length, j + length)
    names = {_defined(line): _defined(twin) for line, twin in pairs}
    return [_NAME.sub(lambda name: names.get(name[0], name[0] + "'"), line) for line in old]


def _common(old: list[str], new: list[str]) -> Iterable[tuple[int, int, int]]:
    return difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()


def _keys(lines: list[str]) -> list[str]:
    return [_NAME.sub(lambda name: name[0].removesuffix(name[1]), line) for line in lines]


def _heads(lines: list[str]) -> list[str]:
    return [line.split(" = ")[-1].split("(")[0] + line.partition("  # ")[2] for line in lines]


def _defined(line: str) -> str:
    return line.split(" = ")[0]


class _Printer:
    """One pass over a graph: hands out names and symbols in the order in which they appear."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.names: dict[fx.Node, str] = {}
        self.used: set[str] = set()
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}

    def lines(self) -> list[str]:
        return [line for node in self.graph.nodes for line in self.line(node)]

    def line(self, node: fx.Node) -> list[str]:
        if node.op == "get_attr" or (node.op == "call_function" and _is_size(node)):
            return []
        path = module_path(node)
        arguments = self.items(node.args, path)
        for key, value in node.kwargs.items():
            arguments += f"{', ' if arguments else ''}{key}={self.argument(value, path)}"
        if node.op == "output":
            return [f"return {arguments}"]
        head = "input" if node.op == "placeholder" else f"{op_name(node)}({arguments})"
        shape = self.shape(node.meta.get("val"))
        made_by = node.meta.get(RULE_KEY)
        parts = [f"{self.name(node)} = {head}{f' -> {shape}' if shape else ''}"]
        parts += [f"# {path}"] if path else []
        parts += [f"[{made_by}]"] if made_by else []
        return ["  ".join(parts)]

    def name(self, node: fx.Node) -> str:
        if node not in self.names:
            self.names[node] = self.new_name(node)
            self.used.add(self.names[node])
        return self.names[node]

    def new_name(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"%{node.target}"
        op = op_name(node)
        while (name := f"%{op}_{self.counts[op]}") in self.used:  # an input may be called linear_0
            self.counts[op] += 1
        return name

    def argument(self, value: Any, path: str) -> str:
        match value:
            case fx.Node(op="get_attr"):
                return _relative(str(value.target), path)
            case fx.Node() if _is_size(value):
                return self.size(value.meta["val"])
            case fx.Node():
                return self.name(value)
            case list():
                return f"[{self.items(value, path)}]"
            case tuple():
                return f"({self.items(value, path)})"
            case slice():
                return f"{value.start}:{value.stop}:{value.step}"
            case float():
                return _float(value)
            case torch.dtype():
                return _dtype(value)
            case int() if value == _SLICE_END:
                return "end"
        return self.size(value).removeprefix("torch.")

    def items(self, values: Iterable[Any], path: str) -> str:
        return ", ".join(self.argument(value, path) for value in values)

    def shape(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{_dtype(value.dtype)}[{', '.join(self.size(size) for size in value.shape)}]"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.shape(item) for item in value)})"
        return ""

    def size(self, size: Any) -> str:
        if not isinstance(size, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return str(size)
        expression = sympy.sympify(size.node.expr)
        for symbol in sorted(expression.free_symbols - self.symbols.keys(), key=_symbol_order):
            # The same assumptions, so that substituting does not simplify the formula into another one.
            self.symbols[symbol] = sympy.Symbol(f"s{len(self.symbols)}", **symbol.assumptions0)
        return str(expression.xreplace(self.symbols))


def op_name(node: fx.Node) -> str:
    """The short name of what a node calls: `linear`, `sdpa`, `layer_norm`.

    Example::

        >>> op_name(graph.call_function(torch.ops.aten.add.Tensor, (x, y)))
        'add'
    """
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.split("::")[-1].strip("_")
    else:
        name = node.target.__name__.strip("_")
    return _SHORT_OPS.get(name, name)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat))


def _dtype(dtype: torch.dtype) -> str:
    return _SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def _float(value: float) -> str:
    short = format(value, ".8g")
    return short + ".0" if short.lstrip("-").isdigit() else short


def _relative(target: str, path: str) -> str:
    return target.removeprefix(path) if path and target.startswith(path + ".") else target


def _symbol_order(symbol: sympy.Symbol) -> tuple[str, int]:
    number = _SYMBOL_NUMBER.search(symbol.name)
    return symbol.name[:1], int(number[0]) if number else 0
