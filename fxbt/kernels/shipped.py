"""Measurements of common processors that come with the package: shipped.json, which benchmarks/cpu_kernels.py writes.

They decide where nothing was measured on the machine itself. Speed alone rests on them: a table that cannot be read, or
is of another make, is said once, and kernels are chosen as if there were none.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch

from . import machine

logger = logging.getLogger("fxbt")

FILE = Path(__file__).with_name("shipped.json")


def times_of(key: str, version: int) -> Any:
    """The microseconds of a contest's kernels on a processor like this one; None where there are none.

    Args:
        key: as `Contest.key`.
        version: of what is measured; a table of another one is not read.

    Example:
        >>> times_of("linear 384x384 float32", FORMAT)
        {'F.linear': [65, 111, 97, 170, 501, 2117], 'packed': [72, 81, 87, 168, 523, 2064], ...}
    """
    for entry in _machines(FILE, version):
        if _is_like_this(entry):
            return entry["microseconds"].get(key)
    return None


def _is_like_this(entry: dict[str, Any]) -> bool:
    here = machine.cpu_family(), machine.capability(), torch.get_num_threads()
    first, behind_last = (_release(text) for text in entry["torch"])
    is_of_torch = first <= _release(torch.__version__) < behind_last
    return is_of_torch and here == (entry["cpu"], entry["capability"], entry["threads"])


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: "2.13.0+cpu" -> (2, 13)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


@functools.cache
def _machines(file: Path, version: int) -> list[dict[str, Any]]:
    """The table's entries; [] and one message where it is no such table."""
    try:
        data = json.loads(file.read_text())
        if data["format"] != version:
            raise ValueError(f"it has format {data['format']}, not {version}")
        return list(map(_checked, data["machines"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "fxbt: the table of kernels that came with the package is not used: %s: %s (%s)",
            type(error).__name__,
            error,
            file,
        )
        return []


def _checked(entry: Any) -> dict[str, Any]:
    texts, versions = (entry["cpu"], entry["capability"], entry["from"]), entry["torch"]
    if not all(isinstance(text, str) for text in texts) or type(entry["threads"]) is not int:
        raise ValueError("a machine is not described as it should be")
    if len(versions) != 2 or not all(isinstance(text, str) and len(_release(text)) == 2 for text in versions):
        raise ValueError(f"{versions!r} are no two versions of torch")
    if not isinstance(entry["microseconds"], dict):
        raise ValueError("a machine has no times")
    return dict(entry)
