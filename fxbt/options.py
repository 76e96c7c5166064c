"""`Options`: the options of `optimize`, checked once and passed on as one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .capture.tracers import TRACERS, hf_fx_missing
from .kernels.autotune import TUNE_SECONDS
from .lower.cpu.precision import Precision, precision_of
from .match.rule import Rule, check_rules
from .stored.files import Folder

PADDINGS = ("drop", "keep")


@dataclass(frozen=True)
class Options:
    """The options of `fxbt.optimize`, which documents each of them.

    Attributes:
        folder: the folder of graphs written by `fxbt.save` to read from.
        precision: how linear layers compute, according to `dtype` and `quantize`; None means in the model's own dtype.

    Raises:
        TypeError: a rule is not a `Rule`.
        ValueError: an option does not have such a value, or it is not available here.

    Example:
        >>> Options(padding="keep").padding
        'keep'
    """

    rules: Sequence[Rule] = ()
    verify: bool = False
    tracer: str = "auto"
    padding: str = "drop"
    inplace: bool = False
    dtype: torch.dtype | None = None
    quantize: str | None = None
    cuda_graphs: bool | str = False
    max_captures: int = 8
    strict: bool = False
    cache: bool = False
    tune_seconds: float = TUNE_SECONDS
    folder: Path | None = None
    precision: type[Precision] | None = field(init=False)

    def __post_init__(self) -> None:
        _check_tracer(self.tracer)
        if self.padding not in PADDINGS:
            raise ValueError(f"padding is {self.padding!r}; it can be 'drop' (compute on valid tokens only) or 'keep'")
        if self.cuda_graphs not in (False, True, "static"):
            raise ValueError(
                f"cuda_graphs is {self.cuda_graphs!r}; it can be False, True, or 'static' (outputs that the next call "
                "overwrites)"
            )
        object.__setattr__(self, "precision", precision_of(self.dtype, self.quantize))
        if type(self.max_captures) is not int or self.max_captures < 1:
            raise ValueError(
                f"max_captures is {self.max_captures!r}; expected an int of 1 or more, the largest number of graphs "
                "kept"
            )
        check_seconds(self.tune_seconds)
        object.__setattr__(self, "rules", check_rules(self.rules))

    @property
    def graphs(self) -> Folder | None:
        """The folder of graphs captured by other processes; None with hf-fx, whose guards cannot be written as text."""
        is_wanted = (self.cache or self.folder is not None) and self.tracer != "hf-fx"
        return Folder(self.folder) if is_wanted else None


def check_seconds(seconds: Any) -> None:
    """Raises ValueError for what is no number of seconds to measure kernels in."""
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 <= seconds < math.inf:
        raise ValueError(f"tune_seconds is {seconds!r}; it can be 0 (measure nothing) or more: the seconds for it")


def _check_tracer(tracer: str) -> None:
    if tracer not in TRACERS:
        known = ", ".join(map(repr, TRACERS))
        raise ValueError(f"unknown tracer {tracer!r}; the known ones are {known}")
    if tracer == "hf-fx" and (missing := hf_fx_missing()):
        raise ValueError(missing)
