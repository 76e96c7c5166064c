"""`Miss`: why a rule did not match, with the place, what was expected and what was found."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

# Text that is built only when read: nodes are described, anything else goes through `str`.
Words = Any

# Frames of torch and fxbt stand between the model's own code and the op.
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
_FRAME = re.compile(r'File "(.+)", line (\d+)')
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


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module whose code made `node`; "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry[0] for entry in stack.values()]
    path = entries[-1] if entries else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']")


def source_line(node: fx.Node) -> str:
    """The line of the model's code that computes `node`, such as "modeling_bert.py:192"; "" if unknown."""
    for file, line in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
        if not file.startswith(_NOT_THE_MODEL):
            return f"{Path(file).name}:{line}"
    return ""


def short_dtype(dtype: torch.dtype) -> str:
    """`f32` for torch.float32."""
    return _SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def short_type(value: Any, size: Callable[[Any], str] = str) -> str:
    """`f32[s0, 4, s1]` for a tensor, the same in parentheses for several, "" for anything else."""
    if isinstance(value, torch.Tensor):
        return f"{short_dtype(value.dtype)}[{', '.join(map(size, value.shape))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(short_type(item, size) for item in value)})"
    return ""


def describe(node: fx.Node) -> str:
    """`%softmax f32[s0, 4, s1, s1] at encoder.layer.0 (modeling_bert.py:192)`: how messages name a node."""
    return description(f"%{node.name}", short_type(node.meta.get("val")), module_path(node), source_line(node))


def description(name: str, type: str, path: str, line: str) -> str:
    """The same from its parts; empty ones are left out."""
    return " ".join(part for part in (name, type, path and f"at {path}", line and f"({line})") if part)


class Miss(Exception):
    """Why a rule did not match at a place. Rules have no other way to refuse.

    Rules raise it from `find`; the report shows it. `reason` is a sentence. `expected` and `found` say what the rule
    needed and what the graph has (by default `node`): a text, a node, anything with a `str`, or a tuple of these,
    because text is built only when read. `matched` of the pattern's `total` nodes were found before it failed; the
    nearest miss has the largest share. `hint` says what the user may change.

    Example::

        raise fxbt.Miss("the weights are scaled along the key axis", node=mul, expected="a factor per query")
        raise fxbt.Miss("", expected="one use", found=(add, "is also used by", user), matched=9, total=14)
    """

    def __init__(
        self,
        reason: str,
        *,
        node: fx.Node | None = None,
        expected: Words = "",
        found: Words = "",
        matched: int = 0,
        total: int = 0,
        hint: str = "",
    ):
        super().__init__(reason)
        self.reason = reason
        self.node = node
        self.matched = matched
        self.total = max(total, matched) if total else 0  # a graph may spell the match in more nodes
        self.hint = hint
        self.rule = ""
        self.where = ""
        self.anchor: fx.Node | None = None  # where the rule was tried
        self.refused = False  # it matched, but its rewrite changed the values
        self._expected = expected
        self._found = found

    @property
    def expected(self) -> str:
        """What the rule needed, as text."""
        return _in_words(self._expected, describe)

    @property
    def found(self) -> str:
        """What the graph has instead, as text."""
        return _in_words(self._found or self.node or "", describe)

    @property
    def nearness(self) -> float:
        """The share of the pattern that was found, from 0.0 to 1.0; 1.0 if the rewrite was refused."""
        if self.refused:
            return 1.0
        return self.matched / self.total if self.total else 0.0

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes that it mentions."""
        words = (self.node, *_parts(self._expected), *_parts(self._found))
        return [part for part in words if isinstance(part, fx.Node)]

    def without_frames(self) -> Miss:
        """The miss without frames and causes, which would keep a call's tensors alive as long as the report."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)

    def details(self, describe: Callable[[fx.Node], str] = describe) -> list[str]:
        """Lines for what was expected, what was found instead, and the hint; `describe` names the nodes."""
        rows = {
            "expected": _in_words(self._expected, describe),
            "found": _in_words(self._found or self.node or "", describe),
            "hint": self.hint,
        }
        return [f"  {title:<8}  {text}" for title, text in rows.items() if text]

    def __str__(self) -> str:
        place = f" at {self.where}" if self.where else ""
        matched = f" ({self.matched} of {self.total} matched)" if self.total else ""
        head = f"{self.rule or 'rule'}{place}: {self.reason or 'no match'}{matched}"
        return "\n".join([head, *self.details()])


def _in_words(words: Words, describe: Callable[[fx.Node], str]) -> str:
    return " ".join(describe(part) if isinstance(part, fx.Node) else str(part) for part in _parts(words))


def _parts(words: Words) -> tuple[Any, ...]:
    return words if isinstance(words, tuple) else (words,)
