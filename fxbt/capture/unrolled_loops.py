"""Refuses Python loops over a sequence (`for i in range(length):`), which a trace would unroll.

The graph would contain the loop's body once per token, take minutes to make, and serve a single length.
"""

from __future__ import annotations

import contextlib
import linecache
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import SymInt, Tensor

from ..errors import CaptureError, line_at

_UNROLLED = "a loop over the sequence would be unrolled, and the graph would serve one length only"


@contextlib.contextmanager
def refused(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Raises `CaptureError` in a block that loops over the second axis of a 2-D input, which is known to be a length.

    Loops with fewer steps (chunks of the sequence, layers, a batch) pass.

    Example:
        >>> with refused((input_ids, attention_mask)):
        ...     model(input_ids, attention_mask)
    """
    lengths = _symbols([t.shape[1] for t in inputs if t.ndim == 2]) - _symbols([t.shape[0] for t in inputs if t.ndim])
    as_index = torch.SymInt.__index__

    def checked(self: SymInt) -> int:
        if self.node.expr in lengths:
            _refuse_range(sys._getframe(1).f_code.co_filename, sys._getframe(1).f_lineno)
        return as_index(self)

    with mock.patch.object(torch.SymInt, "__index__", checked):
        yield


def _symbols(sizes: list[Any]) -> set[Any]:
    return {size.node.expr for size in sizes if isinstance(size, SymInt)}


def _refuse_range(file: str, number: int) -> None:
    if re.search(r"\bfor\b.*\brange\(", linecache.getline(file, number)):
        raise CaptureError(_UNROLLED, line_at(file, number))
