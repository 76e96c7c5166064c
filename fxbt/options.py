"""`Options`: what `optimize` was asked for, checked once and handed down whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .capture.capture import TRACERS
from .capture.hf_fx import hf_fx_missing
from .kernels.autotune import TUNE_SECONDS
from .lower.cpu.precision import Precision, precision_of
from .lower.spill import check_can_spill
from .match.rule import Rule, check_rules
from .stored.files import Folder

PADDINGS = ("drop", "keep")


@dataclass(frozen=True)
class Options:
    """The options of `fxbt.optimize`, which says what each is.

    Attributes:
        folder: of graphs that `fxbt.save` wrote, which are read.
        precision: how linears compute, as `dtype` and `quantize` say; None is the model's own.

    Raises:
        TypeError: a rule is no `Rule` instance.
        ValueError: an option has no such value, or cannot be had here.

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
    keep_original: bool = True
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
            raise ValueError(f"padding is {self.padding!r}; it can be 'drop' (compute on valid tokens alone) or 'keep'")
        if self.cuda_graphs not in (False, True, "static"):
            raise ValueError(
                f"cuda_graphs is {self.cuda_graphs!r}; it can be False, True, or 'static' (outputs that the next call "
                "overwrites)"
            )
        object.__setattr__(self, "precision", precision_of(self.dtype, self.quantize))
        if type(self.max_captures) is not int or self.max_captures < 1:
            raise ValueError(
                f"max_captures is {self.max_captures!r}; it can be 1 or more: how many graphs are kept at once"
            )
        check_seconds(self.tune_seconds)
        if not self.keep_original:
            check_can_spill()
        object.__setattr__(self, "rules", check_rules(self.rules))

    @property
    def graphs(self) -> Folder | None:
        """Where graphs are that other processes captured; hf-fx's guards have no text."""
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
