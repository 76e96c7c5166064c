"""Direct torch functions for ATen ops: a call through the dispatcher's Python object takes 5 us instead of 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..capture.value_branches import assert_now
from ..graph.blocks import BY_PRODUCTS
from ..graph.record import is_made
from ..kernels.attention_products import by_products
from ..kernels.differentiable import attention_with_gradient
from ..torch_compat import silu

aten = torch.ops.aten

# The direct binding of an op, if it takes the op's arguments unchanged.
BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: F.linear,
    aten.layer_norm.default: torch.layer_norm,
    aten.embedding.default: torch.embedding,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.gelu.default: F.gelu,
    aten.silu.default: silu,
    aten.softmax.int: torch.softmax,
    aten.matmul.default: torch.matmul,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.tanh.default: torch.tanh,
    aten.relu.default: torch.relu,
    aten.rsqrt.default: torch.rsqrt,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.contiguous.default: torch.Tensor.contiguous,
    aten.unflatten.int: torch.unflatten,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.expand.default: torch.Tensor.expand,
    aten.select.int: torch.select,
    aten.cat.default: torch.cat,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.where.self: torch.where,
    aten.where.ScalarOther: torch.where,
    aten.sym_size.int: torch.Tensor.size,
    aten.to.dtype: torch.Tensor.to,
    aten.to.device: torch.Tensor.to,
    aten.gather.default: torch.gather,
    aten.arange.default: torch.arange,
    aten.__and__.Tensor: torch.bitwise_and,
    aten.ge.Scalar: torch.ge,
    aten._assert_async.msg: assert_now,
    BY_PRODUCTS: by_products,
}


def called_by(node: fx.Node) -> Any:
    """What a program calls for a node."""
    is_attention = node.target is aten.scaled_dot_product_attention.default
    if is_attention and is_made(node) and torch.is_grad_enabled():
        return attention_with_gradient
    return BINDINGS.get(node.target, node.target)
