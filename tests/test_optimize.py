"""optimize and restore: what the optimised object is, its copies, and the errors for bad input."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from fxbt.errors import ExampleError, FxbtWarning, NotOptimizedError
from fxbt.optimize import optimize, restore


class Net(nn.Module):
    """A model at module level, so that it can be pickled."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, *, bias=None):
        y = self.drop(self.linear(x).relu())
        return y if bias is None else y + bias


X = torch.randn(2, 3, 4)


@pytest.fixture(params=[False, True], ids=["twin", "inplace"])
def inplace(request):
    return request.param


def test_same_class_same_state(inplace):
    model = Net().eval()
    fast = optimize(model, inplace=inplace)
    assert isinstance(fast, Net) and type(fast).__name__ == "Net" and type(fast).__qualname__ == "Net"
    assert (fast is model) == inplace
    assert inspect.signature(fast.forward) == inspect.signature(Net().forward)
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    fast.train()
    assert model.training and model.drop.training
    fast.linear = nn.Linear(4, 4)
    assert model.linear is fast.linear
    assert list(fast.state_dict()) == list(Net().state_dict())


def test_restore_gives_the_original_back(inplace):
    model = Net().eval()
    attributes = list(vars(model))
    expected = model(X)
    fast = optimize(model, (X,), inplace=inplace)
    torch.testing.assert_close(fast(X), expected)
    assert restore(fast) is model
    assert type(model) is Net and list(vars(model)) == attributes and not hasattr(model, "report")
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("example", [{"x": X}, (X,), [X]], ids=["dict", "tuple", "list"])
def test_example_inputs_capture_ahead(example):
    fast = optimize(Net().eval(), example)
    assert len(fast.report.graphs) == 1
    fast(torch.randn(7, 2, 4))
    assert len(fast.report.graphs) == 1


def test_warmup_leaves_no_trace():
    fast = optimize(Net().train())
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    fast.warmup(X)
    assert torch.equal(torch.rand(2), expected)
    assert len(fast.report.graphs) == 1


def test_optimising_again_uses_the_original_and_the_new_options(inplace):
    model = Net().eval()
    first = optimize(model, (X,), inplace=inplace)
    again = optimize(first, verify=True)
    assert restore(again) is model and not again.report.graphs
    assert again._fxbt_dispatcher is not first._fxbt_dispatcher if not inplace else type(model) is Net
    torch.testing.assert_close(again(X), model(X))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_optimised_and_their_own(duplicate, inplace):
    fast = optimize(Net().eval(), (X,), inplace=inplace)
    other = duplicate(fast)
    assert isinstance(other, Net) and not other.report.graphs
    torch.testing.assert_close(other(X), fast(X))
    assert len(other.report.graphs) == 1
    with torch.no_grad():
        other.linear.weight.zero_()
    assert fast.linear.weight.any() and restore(fast).linear.weight.any()
    assert type(restore(other)) is Net


def test_a_model_holding_an_optimised_part_copies():
    whole = nn.Sequential(optimize(Net().eval(), (X,)), nn.ReLU())
    other = copy.deepcopy(whole)
    assert other[0].linear.weight is not whole[0].linear.weight
    torch.testing.assert_close(other(X), whole(X))
    assert other[0].report.graphs and whole[0].report is not other[0].report


def test_shallow_copy_shares_parameters():
    fast = optimize(Net().eval())
    other = copy.copy(fast)
    assert other.linear is fast.linear and other is not fast
    torch.testing.assert_close(other(X), fast(X))
    assert not fast.report.graphs or other.report is not fast.report


def test_torch_save():
    fast = optimize(Net().eval(), (X,))
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(X), fast(X))


def test_new_instances_of_the_class_are_models_of_their_own():
    fast = optimize(Net().eval(), (X,))
    other = type(fast)().eval()
    expected = Net.forward(other, X)
    assert torch.equal(other(X), expected) and not torch.allclose(other(X), fast(X))
    replica = fast._replicate_for_data_parallel()
    replica.linear = nn.Linear(4, 4)
    assert torch.equal(replica(X), Net.forward(replica, X))


def test_a_graph_module_can_be_optimised():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval())
    fast = optimize(traced)
    for _ in range(2):
        torch.testing.assert_close(fast(X), traced(X))
    assert len(fast.report.graphs) == 1, fast.report.fallbacks


def test_a_forward_of_the_objects_own_stays():
    model = Net().eval()
    model.forward = lambda x: x + 1
    fast = optimize(model)
    with pytest.warns(FxbtWarning, match="own attribute `forward`"):
        assert torch.equal(fast(X), X + 1)
    assert "own attribute `forward`" in fast.report.fallbacks[0]
    del model.forward
    assert torch.equal(fast(X), Net.forward(model, X)) and len(fast.report.graphs) == 1


class NotARule:
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("bert",), TypeError, "was given a str, expected a torch.nn.Module"),
        ((Net,), TypeError, "was given the class Net, expected a torch.nn.Module instance"),
        ((torch.jit.script(nn.ReLU()),), TypeError, "TorchScript"),
        ((nn.LazyLinear(3),), ValueError, "not initialised yet"),
        ((Net(), X), TypeError, r"example_inputs is a Tensor.*\(tensor,\)"),
        ((Net(), {"x": torch.randn(2, 3, 5)}), ExampleError, r"Net itself fails on .*x torch.float32\[2, 3, 5\]"),
        ((Net(), {"y": X}), ExampleError, "unexpected keyword"),
    ],
    ids=["str", "class", "script", "lazy", "bare tensor", "wrong shape", "wrong name"],
)
def test_bad_input(arguments, error, words):
    with pytest.raises(error, match=words):
        optimize(*arguments)


def test_bad_options():
    with pytest.raises(ValueError, match="unknown tracer 'fx'; the known ones are 'auto', 'export', 'hf-fx'"):
        optimize(Net(), tracer="fx")
    with pytest.raises(TypeError, match=r"rules holds .*NotARule.*fxbt\.Rule"):
        optimize(Net(), rules=[NotARule()])
    from fxbt.match.rule import Rule

    with pytest.raises(TypeError, match=r"Mine.*instance.*Mine\(\)"):
        optimize(Net(), rules=[type("Mine", (Rule,), {})])


def test_the_models_error_is_the_cause():
    with pytest.raises(ExampleError) as caught:
        optimize(Net(), (torch.randn(2, 5),))
    assert isinstance(caught.value.__cause__, RuntimeError) and "mat1" in str(caught.value.__cause__)


def test_restore_of_what_is_not_optimised():
    for model in (Net(), type(optimize(Net()))()):
        with pytest.raises(NotOptimizedError, match="Net that is not optimised"):
            restore(model)


# transformers models


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    return transformers.BertModel(config).eval()


def tokens(batch=2, length=6):
    ids = torch.randint(1, 50, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def test_outputs_of_every_form(bert):
    fast = optimize(bert)
    inputs = tokens()
    # Hidden states first: for them transformers puts hooks on the modules, after which older graphs do not apply.
    for extra in [{"output_hidden_states": True}, {}, {"return_dict": False}]:
        for _ in range(2):
            found, expected = fast(**inputs, **extra), bert(**inputs, **extra)
            assert type(found) is type(expected)
            torch.testing.assert_close(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1])
            if extra.get("output_hidden_states"):
                assert len(found.hidden_states) == len(expected.hidden_states) == 3
                torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    torch.testing.assert_close(fast(inputs["input_ids"], inputs["attention_mask"])[0], bert(**inputs)[0])
    assert len(fast.report.graphs) == 3 and not fast.report.fallbacks


@torch.no_grad()
def test_save_pretrained_saves_the_original(bert, tmp_path):
    fast = optimize(bert, tokens())
    fast.save_pretrained(tmp_path)
    again = type(bert).from_pretrained(tmp_path).eval()
    assert again.config.architectures == ["BertModel"]
    inputs = tokens()
    torch.testing.assert_close(again(**inputs)[0], bert(**inputs)[0])


@torch.no_grad()
def test_generate_equals_the_original():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    fast = optimize(model)
    inputs = tokens()
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(fast.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    assert len(fast.report.graphs) == 2 and not fast.report.fallbacks
    out = fast(**inputs, use_cache=False)
    torch.testing.assert_close(out.logits, model(**inputs, use_cache=False).logits)
    assert len(fast.report.graphs) == 3
