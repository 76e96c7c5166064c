"""tracer="hf-fx": the fx tracer of transformers 4.x as front end, and a clear error where it does not exist."""

import pytest
import torch
from models import compare
from torch import nn

from fxbt.capture.call import make_call
from fxbt.capture.capture import capture
from fxbt.capture.tracers import hf_fx_missing
from fxbt.errors import CaptureError
from fxbt.optimize import optimize

transformers = pytest.importorskip("transformers")
MISSING = hf_fx_missing()
needs_tracer = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tokens(batch, length):
    ids = torch.randint(1, 50, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, length - 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.skipif(MISSING is None, reason="transformers.utils.fx exists here")
def test_without_it_the_error_says_so():
    with pytest.raises(ValueError, match=r"needs transformers.utils.fx, which transformers 5.* does not have"):
        optimize(nn.Linear(2, 2), tracer="hf-fx")


@needs_tracer
@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "DistilBert"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_models(name, implementation):
    config = getattr(transformers, f"{name}Config")
    sizes = (
        TINY if name != "DistilBert" else {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}
    )
    if (name, implementation) == ("Electra", "sdpa"):
        pytest.skip("transformers 4's ELECTRA has no sdpa attention")
    model = getattr(transformers, f"{name}Model")(config(**sizes, attn_implementation=implementation)).eval()
    fast = optimize(model, tokens(2, 6), tracer="hf-fx")
    assert len(fast.report.graphs) == 1, fast.report.fallbacks
    for shape in [(2, 6), (3, 9), (1, 5)]:
        inputs = tokens(*shape)
        compare(fast(**inputs), model(**inputs), dropped=[inputs["attention_mask"].bool()])
    assert not fast.report.fallbacks


@needs_tracer
def test_weights_are_the_originals():
    model = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    captured = capture(model, make_call(model, **tokens(2, 6)), "hf-fx")
    name = "encoder.layer.0.attention.self.query.weight"
    assert captured.module.get_parameter(name) is model.get_parameter(name)


@needs_tracer
def test_a_model_it_cannot_trace_runs_the_original():
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).eval()
    fast = optimize(model, tracer="hf-fx")
    inputs = {**tokens(2, 6), "use_cache": False}
    with pytest.warns(UserWarning, match="runs its original forward"):
        torch.testing.assert_close(fast(**inputs)[0], model(**inputs)[0])


@needs_tracer
def test_nested_inputs_are_refused():
    model = transformers.BertModel(transformers.BertConfig(**TINY)).eval()
    with pytest.raises(CaptureError, match="only as keyword arguments"):
        capture(model, make_call(model, [torch.ones(2, 3, dtype=torch.long)]), "hf-fx", rehearse=False)
