"""Whole transformer layers as one node each: attention, out-projection, residuals, norms and MLP.

Post-norm:  a = norm(x + attention(x));  y = norm(a + mlp(a))

Pre-norm:   a = x + attention(norm(x));  y = a + mlp(norm(a))

Parallel:   y = x + attention(norm(x)) + mlp(norm(x))

A decoder layer is causal, or has a cross-attention of the same form between attention and MLP.

Source: Vaswani et al. 2017, "Attention is all you need", section 3.1; pre-norm: Xiong et al. 2020, "On layer
normalization in the transformer architecture"; parallel: Wang and Komatsuzaki 2021, GPT-J.
"""

from __future__ import annotations

from typing import Any

import fxbt


def branch(op: Any, block: Any) -> Any:
    """A block as it joins the residual stream: plain, scaled per channel (LayerScale) or normed (sandwich norm)."""
    return op.either(block, block * op.weight("layer_scale"), op.normalize(block))


def attention(op: Any, x: Any) -> Any:
    """Self-attention on x, with its out-projection."""
    return branch(op, op.linear(op.attention(op.computed_from(x), op.computed_from(x), op.computed_from(x))))


def cross_attention(op: Any, x: Any) -> Any:
    """Attention with queries computed from x, and keys and values from elsewhere."""
    return branch(op, op.linear(op.attention(op.computed_from(x))))


def mlp(op: Any, x: Any) -> Any:
    """The MLP as a branch of the residual stream."""
    return branch(op, op.mlp(x))


def post_norm(op: Any, x: Any, *blocks: Any) -> Any:
    """Post-norm: each block reads x, and the sum is normalised."""
    for block in blocks:
        x = op.normalize(x + block(op, x))
    return x


def pre_norm(op: Any, x: Any, *blocks: Any) -> Any:
    """Pre-norm: each block reads the normalised x."""
    for block in blocks:
        x = x + block(op, op.normalize(x))
    return x


def parallel(op: Any, x: Any) -> Any:
    """With one shared norm (GPT-J) or two (GPT-NeoX)."""
    return x + attention(op, op.normalize(x)) + mlp(op, op.normalize(x))


class DecoderLayer(fxbt.Rule):
    """A causal layer, or one with cross-attention, as one node"""

    name = "decoder_layer"
    outline = "decoder_layer"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.either(
            post_norm(op, x, attention, cross_attention, mlp),
            pre_norm(op, x, attention, cross_attention, mlp),
            post_norm(op, x, attention, mlp),
            pre_norm(op, x, attention, mlp),
            parallel(op, x),
        )

    def check(self, m: fxbt.Found) -> None:
        attentions = [node for node in m.interior if node.target is fxbt.ops.SDPA]
        is_causal = any(map(fxbt.is_causal, attentions))
        m.need(len(attentions) > 1 or is_causal, "there is no cross-attention, and the mask is not proven to be causal")


class EncoderLayer(fxbt.Rule):
    """Self-attention and MLP with their residuals and norms as one node"""

    name = "encoder_layer"
    outline = "encoder_layer"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.either(post_norm(op, x, attention, mlp), pre_norm(op, x, attention, mlp), parallel(op, x))
