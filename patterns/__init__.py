"""The built-in rule library: one subject a file, plain data, no import effects."""

from fxbt.patterns.attention import Attention
from fxbt.patterns.qkv import MergeQKV

__all__ = ["Attention", "MergeQKV"]
