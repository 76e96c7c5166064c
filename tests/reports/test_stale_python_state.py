"""pytorch/pytorch#176851, #124357, #197860: what forward reads besides the module's own attributes may change later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert

import fxbt


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_attention_function_replaced_after_the_capture_is_the_one_that_counts(attention, monkeypatch):
    """modeling_bert.eager_attention_forward and ALL_ATTENTION_FUNCTIONS["sdpa"]."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertModel(BertConfig(**sizes, vocab_size=99, attn_implementation=attention)).eval()
    fast, ids = fxbt.optimize(model), torch.randint(0, 99, (2, 7))
    with torch.no_grad():
        old = [fast(ids).last_hidden_state for _ in range(2)][-1]
        assert fast.report.hits["attention"] == 1 and not fast.report.fallbacks
        original = ALL_ATTENTION_FUNCTIONS.get_interface(attention, modeling_bert.eager_attention_forward)

        def doubled(*args: Any, **kwargs: Any) -> Any:
            out, weights = original(*args, **kwargs)
            return 2 * out, weights

        if attention == "eager":
            monkeypatch.setattr(modeling_bert, "eager_attention_forward", doubled)
        else:
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, attention, doubled)
        for _ in range(2):
            new = fast(ids).last_hidden_state
            torch.testing.assert_close(new, model(ids).last_hidden_state, rtol=1e-4, atol=1e-5)
            assert (new - old).abs().max() > 1e-2
        assert len(fast.report.graphs) == 2 and not fast.report.fallbacks
