"""The tensors of a graph: the model's own by name, small constants of the trace by value."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Malformed, Unstorable, checked
from .values import DTYPES

MOST_BYTES = 1 << 20  # for one constant; a table that forward computes is an operation, not a constant
MOST_COMPARED = 64 << 20  # bytes of a tensor that is neither parameter nor buffer; its values are compared


def own_tensor(model: nn.Module, path: str) -> Tensor | None:
    """The model's own tensor of that name; None if there is none. Runs no code of the model.

    Example:
        >>> own_tensor(nn.Linear(2, 3), "bias").shape
        torch.Size([3])
    """
    *parents, name = path.split(".")
    module: Any = model
    for parent in parents:
        module = vars(module)["_modules"].get(parent)
        if not isinstance(module, nn.Module):
            return None
    namespace = vars(module)
    found = [namespace[kind].get(name) for kind in ("_parameters", "_buffers")]
    return next((value for value in [*found, namespace.get(name)] if isinstance(value, Tensor)), None)


def written_tensor(value: Tensor) -> list[Any]:
    """A constant as JSON data.

    Raises:
        Unstorable: it is too large, or not a plain CPU tensor.
    """
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.is_quantized
    if not is_plain or value.device.type != "cpu" or value.is_complex() or value.requires_grad:
        raise Unstorable(
            f"the trace made a constant that is a {type(value).__name__} on {value.device}, which files cannot hold"
        )
    if value.numel() * value.element_size() > MOST_BYTES:
        raise Unstorable(f"the trace made a constant of {value.numel()} elements, which is too large to store")
    return [str(value.dtype), list(value.shape), base64.b64encode(content(value)).decode()]


def content(value: Tensor) -> bytes:
    """The bytes of a tensor's values, in order."""
    plain = value.detach().cpu().contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).numpy().data) if plain.numel() else b""


def values_of(value: Tensor) -> bytes:
    """`content` of a tensor small enough to compare for each graph.

    Raises:
        Unstorable: it is too large.
    """
    if value.numel() * value.element_size() > MOST_COMPARED:
        raise Unstorable(
            f"a tensor of {value.numel()} elements, neither a parameter nor a buffer, is too large to compare"
        )
    return content(value)


def read_tensor(text: Any) -> Tensor:
    """Reads what `written_tensor` wrote.

    Raises:
        Malformed: it is not one of fxbt's constants.
    """
    dtype, shape, encoded = text if type(text) is list and len(text) == 3 else ("", None, "")
    if DTYPES.get(checked(dtype, str)) is None or len(encoded) > 2 * MOST_BYTES:
        raise Malformed("the file has something other than a constant where one belongs")
    sizes = [checked(size, int) for size in checked(shape, list)]
    try:
        data = bytearray(base64.b64decode(checked(encoded, str), validate=True))
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"the file has a constant that cannot be decoded: {error}") from error
    kind = DTYPES[dtype]
    if len(sizes) > 32 or min(sizes, default=0) < 0 or math.prod(sizes) * kind.itemsize != len(data):
        raise Malformed("the file has a constant whose data does not fit its shape")
    if not data:
        return torch.empty(sizes, dtype=kind)
    return torch.frombuffer(data, dtype=torch.uint8).clone().view(kind).reshape(sizes)
