"""Attention, however it is written: its rules, in the order they are tried at each softmax and each SDPA."""

from __future__ import annotations

import fxbt
from fxbt.patterns.sdpa import CalledAttention, SoftmaxAttention
from fxbt.patterns.sinks import SinkAttention
from fxbt.patterns.written_out import WrittenOutAttention


class Attention(fxbt.OneOf):
    """softmax(scale * Q K^T + bias) V, with a sink, a softcap or expanded heads  ->  one node"""

    def __init__(self) -> None:
        super().__init__("attention", SoftmaxAttention(), SinkAttention(), WrittenOutAttention(), CalledAttention())
