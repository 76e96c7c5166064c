"""Attention with a sink: each query has one more score, of a key without a value. It takes weight and adds nothing.

`fxbt.attentions` reads both spellings: a score joined to the others and cut off after the softmax, and a factor on the
result, with L = sum_j exp(S_j):  exp(S) / (L + exp(sink)) = softmax(S) * sigmoid(log L - sink).

Source: Xiao et al. 2024, "Efficient streaming language models with attention sinks"; gpt-oss; Granite.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxbt import Found, Operands, attentions, scores
from fxbt.patterns.sdpa import PER_QUERY, AttentionRule, Plan, another_rules, query_and_bias, sdpa


class SinkAttention(AttentionRule):
    """softmax([scale * Q K^T + bias, sink]) [V, 0]  ->  SDPA with one more key and value, both zero"""

    def written(self, found: attentions.Attention, m: Found) -> None:
        if not found.sink or scores.beyond_sdpa(found.steps, found.dtype):
            raise another_rules(m)

    def kernel(self, plan: Plan, query: Tensor, key: Tensor, value: Tensor, operands: Operands) -> Tensor:
        sink: Any = plan.found.sink
        query, bias = query_and_bias(plan, query, operands)
        score = operands(sink.node, sink.axes, PER_QUERY, expand=False)
        return sdpa(plan, query, *with_sink(query, key, value, bias, score))


def with_sink(query: Tensor, key: Tensor, value: Tensor, bias: Any, sink: Tensor) -> Any:
    """(key, value, bias) with one more key and value of zeros; only the bias gives its score.

    The tensors are SDPA's; the sink is (batch | 1, heads | 1, seq | 1, 1).
    """
    rows = query.shape[:3]
    if bias is None:
        bias = query.new_zeros(1, 1, 1, 1)
    if bias.dtype is torch.bool:
        bias = torch.where(bias, 0.0, -math.inf).to(query.dtype)
    bias = torch.cat([bias.expand(*rows, key.shape[2]), sink.expand(*rows, 1)], -1)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), bias
