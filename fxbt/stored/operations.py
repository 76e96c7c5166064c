"""The operations that a file may name: those of torch and fxbt that only compute, and Python's on sizes.

Nothing else is looked up.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import packed
from ..torch_compat import OpOverload, OpOverloadPacket
from .errors import Malformed, Unstorable, checked

_OF_PYTHON: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv")},
    **{f"operator.{name}": getattr(operator, name) for name in ("mod", "neg", "pow", "lt", "le", "gt", "ge", "eq")},
    **{f"operator.{name}": getattr(operator, name) for name in ("ne", "and_", "or_")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_int", "sym_float")},
}
_OF_KERNELS: dict[str, Callable[..., Any]] = {
    **{f"packed.{name}": getattr(packed, name) for name in ("attention", "softcapped_attention", "cross_attention")},
    **{f"packed.{name}": getattr(packed, name) for name in ("varlen_attention", "gather", "gather_rows", "unpack")},
    **{f"packed.{name}": getattr(packed, name) for name in ("blocks", "is_zero_or_one", "is_exact", "has_tokens_of")},
    **{f"packed.{name}": getattr(packed, name) for name in ("is_valid_between", "is_valid_at", "is_padded_right")},
    **{f"packed.{name}": getattr(packed, name) for name in ("is_bounded", "has_no_empty_row", "has_keys_for_queries")},
    **{f"torch.{comparison.__name__}": comparison for comparison in packed.COMPARISONS.values()},
}
_PLAIN = {**_OF_PYTHON, **_OF_KERNELS}
_NAMES = {function: name for name, function in _PLAIN.items()}
_OF_TORCH = re.compile(r"aten\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
_READS_FILES = frozenset(["from_file"])
# Operations with a leading underscore are internal to torch, but traces contain these.
_OF_TORCHS_OWN = re.compile(
    r"__\w+__|_assert_async|_assert_scalar|_assert_tensor_metadata|_softmax|_log_softmax|_to_copy|_unsafe_view"
    r"|_convolution|_native_batch_norm_legit\w*|_unsafe_index|_weight_norm\w*|_fft_\w+|_adaptive_avg_pool2d"
    r"|_scaled_dot_product_\w+|_shape_as_tensor|_upsample_\w+|_conj|_reshape_alias|_trilinear|_grouped_mm|_cdist_forward"
    r"|_embedding_bag\w*|_local_scalar_dense|_is_all_true|_stack|_cast_\w+"
)
_FXBTS = {"fxbt.selective_scan.default", "fxbt.attention_by_products.default"}


def name_of(target: Any) -> str:
    """The name of an operation in files.

    Raises:
        Unstorable: files have no name for it.

    Example:
        >>> name_of(torch.ops.aten.relu.default)
        'aten.relu.default'
    """
    if isinstance(target, OpOverload):
        name = str(target)
        if operation_of_torch(name) is target:
            return name
    elif name := _NAMES.get(target, ""):
        return name
    raise Unstorable(f"the graph calls {target}, which a file cannot name")


def operation(name: Any) -> Callable[..., Any]:
    """The operation with a name.

    Raises:
        Malformed: files may name no such operation.
    """
    found = _PLAIN.get(checked(name, str)) or operation_of_torch(name)
    if found is None:
        raise Malformed(f"{name[:80]} is not an operation that a stored graph may call")
    return found


@functools.lru_cache(maxsize=4096)
def operation_of_torch(name: str) -> OpOverload | None:
    """An operation of torch or fxbt that only computes and writes nothing; None if there is none with this name."""
    if name in _FXBTS:
        return _overload(torch.ops.fxbt, *name.split(".")[1:])
    parts = _OF_TORCH.fullmatch(name)
    if parts is None or parts[1] in _READS_FILES:
        return None
    if parts[1].startswith("_") and not _OF_TORCHS_OWN.fullmatch(parts[1]):
        return None
    found = _overload(torch.ops.aten, *parts.groups())
    return found if found is not None and not found._schema.is_mutable else None


def _overload(namespace: Any, name: str, overload: str) -> OpOverload | None:
    packet = getattr(namespace, name, None)
    if not isinstance(packet, OpOverloadPacket) or overload not in packet.overloads():
        return None
    found = getattr(packet, overload)
    return found if isinstance(found, OpOverload) else None
