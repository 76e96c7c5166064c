"""The built-in rules: one subject per file; importing them has no effect."""

from fxbt.patterns.activation import Activation
from fxbt.patterns.attention import Attention
from fxbt.patterns.encoder_layer import DecoderLayer, EncoderLayer
from fxbt.patterns.mlp import MLP
from fxbt.patterns.norm import LayerNorm, ResidualNorm, RMSNorm
from fxbt.patterns.qkv import MergeQKV
from fxbt.patterns.rotary import Rotary
from fxbt.patterns.sdpa import CalledAttention, SoftmaxAttention
from fxbt.patterns.sinks import SinkAttention
from fxbt.patterns.written_out import WrittenOutAttention

__all__ = [
    "MLP",
    "Activation",
    "Attention",
    "CalledAttention",
    "DecoderLayer",
    "EncoderLayer",
    "LayerNorm",
    "MergeQKV",
    "RMSNorm",
    "ResidualNorm",
    "Rotary",
    "SinkAttention",
    "SoftmaxAttention",
    "WrittenOutAttention",
]
