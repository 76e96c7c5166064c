"""Graphs and rewrites as text: equal for every capture of a model, with repeated layers written once."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..graph.miss import description, module_path, short_dtype, short_type, source_line
from ..graph.node import attribute
from ..graph.record import RULE, Entry, Rewrite, Snapshot
from ..torch_compat import OpOverload
from .fold import Line, Repeat, repeats

Symbols = dict[sympy.Symbol, sympy.Symbol]

_SHORT_OPS = {"scaled_dot_product_attention": "sdpa"}
_NAME = re.compile(r"%[\w.]+?_(\d+)(?!\w)")  # %linear_3, not the input %input_ids
_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # the 3 of encoder.layer.3.output
_SYMBOL_NUMBER = re.compile(r"\d+")
_SLICE_END = torch.iinfo(torch.int64).max


def text(graph: fx.GraphModule | Snapshot, collapse: bool = True) -> str:
    """The graph as text: one operation per line, in execution order.

    A line reads `%name = op(args) -> dtype[shape]  # module path  [rule that made it]`. Names count each op from 0, and
    symbolic sizes are s0, s1, … in order of appearance, so nothing depends on the numbers that a capture assigned.
    Weights and sizes have no line of their own. A weight appears where it is used, by its name in the model (`.weight`
    if it belongs to the line's module); a size appears as its formula.

    Args:
        graph: a flat graph module, or a snapshot; values with `meta["val"]` (fake tensors) print with dtype and shape.
        collapse: write equal layers in a row once, with their count and what each passes to the next.

    Example::

        >>> print(fxbt.explain.show.text(fast.report.latest.module, collapse=False))
        %input_ids = input -> i64[s0, s1]
        %embedding_0 = embedding(.weight, %input_ids, 0) -> f32[s0, s1, 384]  # embeddings.word_embeddings
        ...
    """
    printer = Printer((Snapshot(graph.graph) if isinstance(graph, fx.GraphModule) else graph).entries)
    lines = printer.lines()
    return "\n".join(_collapsed(printer, lines) if collapse else lines)


def blocks(rewrites: Sequence[Rewrite], symbols: Symbols | None = None) -> str:
    """What the rewrites removed (`-`) and added (`+`), one block each; equal ones (in equal layers) are shown once.

    Names count within a block; a new value that replaces an old one has the old name. `symbols` are those of a graph's
    `Printer`, so that sizes have the same names.

    Example::

        >>> print(fxbt.explain.show.blocks(stage.rewrites))
        silu at encoder.layer.0..11.mlp, x 12
        -%sigmoid_0 = sigmoid(%linear_0) -> f32[s0, s1, 64]
        -%mul_0 = mul(%linear_0, %sigmoid_0) -> f32[s0, s1, 64]
        +%mul_0 = silu(%linear_0) -> f32[s0, s1, 64]
    """
    symbols = {} if symbols is None else symbols
    groups: defaultdict[tuple[str, str], list[Rewrite]] = defaultdict(list)
    for rewrite in rewrites:
        groups[rewrite.rule, _block(rewrite, _BlockKeys(rewrite, symbols))].append(rewrite)
    return "\n\n".join(_group(group, symbols) for group in groups.values())


def _group(group: list[Rewrite], symbols: Symbols) -> str:
    place = common_place([rewrite.where for rewrite in group])
    head = group[0].rule + (f" at {place}" if place else "") + (f", x {len(group)}" if len(group) > 1 else "")
    return f"{head}\n{_block(group[0], _BlockPrinter(group[0], symbols))}"


def _block(rewrite: Rewrite, printer: Printer) -> str:
    added = {entry.node for entry in rewrite.added}
    lines = ["-" + printer.line(entry) for entry in rewrite.removed]
    for old, new in rewrite.results:
        if new in added:
            printer.names.setdefault(new, printer.name(old))
    lines += ["+" + printer.line(entry) for entry in rewrite.added]
    pairs = [(printer.name(old), printer.name(new)) for old, new in rewrite.results]
    lines += [f"+{old} = {new}" for old, new in pairs if old != new]
    return "\n".join(lines)


def common_place(paths: Sequence[str]) -> str:
    """The paths of repeated layers as one: `encoder.layer.0..11.mlp`; the first path if they differ in more.

    Example::

        >>> common_place(["layer.0.mlp", "layer.2.mlp", "layer.3.mlp"])
        'layer.0,2,3.mlp'
    """
    parts = [path.split(".") for path in paths]
    if len({len(part) for part in parts}) != 1:
        return paths[0]
    differing = [i for i, names in enumerate(zip(*parts, strict=True)) if len(set(names)) > 1]
    if len(differing) != 1 or not all(part[differing[0]].isdigit() for part in parts):
        return paths[0]
    numbers = sorted({int(part[differing[0]]) for part in parts})
    in_a_row = numbers == list(range(numbers[0], numbers[-1] + 1))
    shown = f"{numbers[0]}..{numbers[-1]}" if in_a_row else ",".join(map(str, numbers))
    return ".".join([*parts[0][: differing[0]], shown, *parts[0][differing[0] + 1 :]])


def _collapsed(printer: Printer, lines: list[str]) -> list[str]:
    """The lines with each repeated segment once: indented under its count, with the values it passes on below."""
    entries = printer.printed
    keys = Keys(printer)
    number = {entry.node: i for i, entry in enumerate(entries)}
    folded = [
        Line(keys.line(entry), tuple(number[node] for node in _reads(entry) if node in number)) for entry in entries
    ]
    shown, done = [], 0
    for repeat in repeats(folded):
        shown += lines[done : repeat.start]
        shown.append(f"x {repeat.times}{_layers(entries, repeat)}")
        shown += ["| " + line for line in lines[repeat.start : repeat.start + repeat.length]]
        shown += _handed_on(printer, folded, repeat)
        done = repeat.end
    return shown + lines[done:]


def _layers(entries: Sequence[Entry], repeat: Repeat) -> str:
    """The modules of the segments: `  # encoder.layer.0..11`; "" if their paths do not show it."""
    for i in range(repeat.start, repeat.start + repeat.length):
        paths = [module_path(entries[i + k * repeat.length].node) for k in range(repeat.times)]
        if len(set(paths)) > 1:
            parts = [path.split(".") for path in paths]
            depth = next((d for d, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), -1)
            return f"  # {common_place(['.'.join(part[: depth + 1]) for part in parts])}"
    return ""


def _handed_on(printer: Printer, lines: Sequence[Line], repeat: Repeat) -> list[str]:
    """For each value that a segment reads from the previous one: its name in the first and in the last segment."""
    start, length, times = repeat
    handed: dict[int, int] = {}
    for first, second in zip(lines[start : start + length], lines[start + length :], strict=False):
        pairs = zip(first.reads, second.reads, strict=True)
        handed.update((new, old) for old, new in pairs if old < start <= new < start + length)
    names = [printer.name(entry.node) for entry in printer.printed]
    to_last = (times - 1) * length
    return [
        f"each passes {names[new]} to the next one as {names[old]}; in the last one it is {names[new + to_last]}"
        for new, old in handed.items()
    ]


def _reads(entry: Entry) -> list[fx.Node]:
    read: list[fx.Node] = []
    fx.node.map_arg((entry.args, entry.kwargs), read.append)
    return read


def diff(before: str, after: str) -> str:
    """What changed between two graph texts, as a unified diff; "" if nothing did.

    Equal lines are found ignoring the counted names, so that a removed op does not change every line after it. Names
    are those of `after`; a value that only `before` has gets a quote: `%softmax_0'`.

    Example::

        >>> print(fxbt.explain.show.diff(report.before, report.after))
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
    """The lines of `old`, with names of `new` for the values both have and quoted names for the others."""
    pairs: list[tuple[str, str]] = []
    done = (0, 0)
    for i, j, length in _common(_keys(old), _keys(new)):
        # Between two runs of equal lines, lines that differ only in their arguments are still the same value.
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


class Printer:
    """Prints one graph: assigns names and symbols in order of appearance."""

    def __init__(self, entries: Sequence[Entry]):
        self.printed = [entry for entry in entries if not _has_no_line(entry.node)]
        self.targets = {entry.node: entry.target for entry in entries}
        self.names: dict[fx.Node, str] = {}
        self.used: set[str] = set()
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.symbols: Symbols = {}

    def lines(self) -> list[str]:
        """All lines of the text."""
        return [self.line(entry) for entry in self.printed]

    def line(self, entry: Entry) -> str:
        """The line of one node."""
        node = entry.node
        path = module_path(node)
        arguments = self.items(_without_body(entry.args), path)
        for key, value in entry.kwargs.items():
            arguments += f"{', ' if arguments else ''}{key}={self.argument(value, path)}"
        if node.op == "output":
            return f"return {arguments}"
        head = "input" if node.op == "placeholder" else f"{self.op(node)}({arguments})"
        shape = short_type(node.meta.get("val"), self.size)
        return f"{self.name(node)} = {head}{f' -> {shape}' if shape else ''}{self.origin(node, path)}"

    def origin(self, node: fx.Node, path: str) -> str:
        """Where a line comes from: module path and rule."""
        made_by = node.meta.get(RULE)
        return (f"  # {self.path(path)}" if path else "") + (f"  [{made_by}]" if made_by else "")

    def path(self, path: str) -> str:
        """A module path or weight name as printed."""
        return path

    def describe(self, node: fx.Node) -> str:
        """`describe` with the names of this text."""
        type = short_type(node.meta.get("val"), self.size)
        return description(self.name(node), type, self.path(module_path(node)), source_line(node))

    def op(self, node: fx.Node) -> str:
        """The short name of what a node called."""
        return op_name(self.targets.get(node, node.target))

    def name(self, node: fx.Node) -> str:
        """The name of a node's value, assigned on first use."""
        if node not in self.names:
            self.names[node] = self.new_name(node)
            self.used.add(self.names[node])
        return self.names[node]

    def new_name(self, node: fx.Node) -> str:
        """A name that no other value has."""
        if node.op in ("placeholder", "output"):
            return f"%{node.target}"
        op = self.op(node)
        while (name := f"%{op}_{self.counts[op]}") in self.used:  # an input may be called linear_0
            self.counts[op] += 1
        return name

    def argument(self, value: Any, path: str) -> str:
        """An argument as text."""
        match value:
            case fx.Node(op="get_attr"):
                return self.path(_relative(str(value.target), path))
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
                return short_dtype(value)
            case int() if value == _SLICE_END:
                return "end"
        return self.size(value).removeprefix("torch.")

    def items(self, values: Iterable[Any], path: str) -> str:
        """Several arguments as text, separated by commas."""
        return ", ".join(self.argument(value, path) for value in values)

    def size(self, size: Any) -> str:
        """A size as text, its symbols renamed to s0, s1, ..."""
        if not isinstance(size, (torch.SymInt, torch.SymBool, torch.SymFloat)):
            return str(size)
        expression = sympy.sympify(size.node.expr)
        for symbol in sorted(expression.free_symbols - self.symbols.keys(), key=_symbol_order):
            # Keep the assumptions, so that substitution does not simplify the formula.
            self.symbols[symbol] = sympy.Symbol(f"s{len(self.symbols)}", **symbol.assumptions0)
        return str(expression.xreplace(self.symbols))


class Keys(Printer):
    """Lines without what distinguishes equal layers: the numbers of values and of layers."""

    def __init__(self, printer: Printer):
        super().__init__(())
        self.targets, self.symbols = printer.targets, printer.symbols

    def path(self, path: str) -> str:
        return _LAYER_NUMBER.sub("*", path)

    def name(self, node: fx.Node) -> str:
        return f"%{self.op(node)}"

    def argument(self, value: Any, path: str) -> str:
        is_line = isinstance(value, fx.Node) and not _has_no_line(value)
        return "%" if is_line else super().argument(value, path)  # `Line.reads` says which line


class _BlockPrinter(Printer):
    """Lines of one rewrite: module paths relative to its place, and the rule only in the block's head."""

    def __init__(self, rewrite: Rewrite, symbols: Symbols):
        super().__init__((*rewrite.removed, *rewrite.added))
        self.symbols, self.where = symbols, rewrite.where

    def origin(self, node: fx.Node, path: str) -> str:
        return "" if path == self.where else f"  # {self.path(_relative(path, self.where))}"


class _BlockKeys(_BlockPrinter):
    """The same without layer numbers, and without what computes the values that the rewrite only reads."""

    def path(self, path: str) -> str:
        return _LAYER_NUMBER.sub("*", path)

    def new_name(self, node: fx.Node) -> str:
        return super().new_name(node) if node in self.targets else f"%read_{len(self.names)}"


def _without_body(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a fused op without the submodule of its graph, and with the number of its weights."""
    if not args or not _is_body(args[0]):
        return args
    weights = [arg for arg in args[1:] if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    return *(arg for arg in args[1:] if arg not in weights), f"{len(weights)} weights"


def _is_body(arg: Any) -> bool:
    if not isinstance(arg, fx.Node) or arg.op != "get_attr" or arg.graph.owning_module is None:
        return False
    return isinstance(attribute(arg.graph.owning_module, arg), fx.GraphModule)


def op_name(target: Any) -> str:
    """The short name of what a node calls: `linear`, `sdpa`, `layer_norm`."""
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        name = target._schema.name.split("::")[-1].strip("_")
    else:
        name = target.__name__.strip("_")
    return _SHORT_OPS.get(name, name)


def _has_no_line(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and _is_size(node))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat))


def _float(value: float) -> str:
    short = format(value, ".8g")
    return short + ".0" if short.lstrip("-").isdigit() else short


def _relative(target: str, path: str) -> str:
    return target.removeprefix(path) if path and target.startswith(path + ".") else target


def _symbol_order(symbol: sympy.Symbol) -> tuple[str, int]:
    number = _SYMBOL_NUMBER.search(symbol.name)
    return symbol.name[:1], int(number[0]) if number else 0
