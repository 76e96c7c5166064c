"""The numbers of a mask in sympy, and their conversion to another dtype: a rounding cast is a sympy function."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

EXACT_FOR_POSITIONS = {torch.int32, torch.int64, torch.float32, torch.float64}
NO_NUMBERS = {torch.bool, torch.uint8, torch.int8, torch.int16}  # 1 + 1 is 1 in bool, 0 - 1 is 255 in uint8


class Opaque(Exception):
    """The mask depends on something whose value at a symbolic position is not known."""


def number_of(value: Any) -> Any:
    """A Python number or boolean as a sympy one."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    # sympy distinguishes 0.0 and 0
    return sympy.Integer(int(value)) if math.isfinite(value) and value == int(value) else sympy.sympify(value)


def cast_to(value: Any, source: torch.dtype, dtype: torch.dtype) -> Any:
    """A number as torch converts it; an expression unchanged if the new dtype holds all its values."""
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*[(cast_to(case, source, dtype), when) for case, when in value.args])
    if value.is_number:
        return converted(value, dtype)
    is_wider = source.is_floating_point and dtype.is_floating_point and torch.promote_types(source, dtype) is dtype
    if is_wider or (value.is_integer and dtype in EXACT_FOR_POSITIONS):
        return value
    if dtype not in ROUNDINGS:
        raise Opaque(f"a cast to {dtype}")
    return ROUNDINGS[dtype](value)


def converted(number: Any, dtype: torch.dtype) -> Any:
    """A number as a tensor of another dtype holds it."""
    return number_of(torch.tensor(float(number), dtype=torch.float64).to(dtype).item())


class Rounding(sympy.Function):
    """A value in a less precise dtype: evaluated once the value is a number, such as a mask's 0 or 1."""

    dtype: torch.dtype

    @classmethod
    def eval(cls, value: Any) -> Any:
        """The rounded number; None, which keeps the call unevaluated, for anything else."""
        return converted(value, cls.dtype) if value.is_number else None


class ToFloat16(Rounding):
    """A value rounded to float16."""

    dtype = torch.float16


class ToBFloat16(Rounding):
    """A value rounded to bfloat16."""

    dtype = torch.bfloat16


class ToFloat32(Rounding):
    """A value rounded to float32."""

    dtype = torch.float32


ROUNDINGS = {kind.dtype: kind for kind in (ToFloat16, ToBFloat16, ToFloat32)}
