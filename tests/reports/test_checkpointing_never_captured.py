"""huggingface/optimum#971, huggingface/transformers#36051.

gradient_checkpointing_enable() puts a hook of transformers on the embedding, for which no graph was ever made.
"""

import pytest
import torch

import fxbt

transformers = pytest.importorskip("transformers")


def test_a_bert_that_trains_with_checkpoints_has_a_graph() -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    bert = transformers.BertForSequenceClassification(config).train()
    bert.gradient_checkpointing_enable()
    fast = fxbt.optimize(bert)
    ids = torch.randint(5, 49, (2, 7))
    for _ in range(2):
        fast(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    assert fast.report.hits["attention"] == 2
    assert not fast.report.fallbacks
