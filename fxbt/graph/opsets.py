"""Which ATen ops are casts, copies or fills: each table exists once, for all rooms."""

from __future__ import annotations

import torch

aten = torch.ops.aten

WHOLE_AXIS = 2**63 - 1  # the end of a slice that takes everything

CASTS = {
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other),
    *(aten._to_copy.default, aten.type_as.default),
}
COPIES = {
    *(aten.contiguous.default, aten.clone.default, aten.alias.default),
    *(aten.lift_fresh_copy.default, aten.detach.default),
}
# Ops that use another algorithm if their input has other strides.
BY_STRIDES = {
    *(aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding),
    *(aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.convolution.default),
    *(aten.group_norm.default, aten.batch_norm.default),
}
SCALAR_ARITHMETIC = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor}
COMMUTATIVE = {aten.mul.Tensor, aten.add.Tensor}
# The number that fills the result; None if it is an argument.
FILLED = {aten.ones_like.default: 1, aten.ones.default: 1, aten.zeros_like.default: 0, aten.zeros.default: 0}
NEW_FILLED = {aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_full.default: None}
