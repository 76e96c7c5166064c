"""`generate` with an optimised model: prefill and decode on graphs, caches as the original leaves them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxbt

transformers: Any = pytest.importorskip("transformers", minversion="5.0")

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")

STEPS, WINDOW, PAD = 64, 16, 0
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
SEQ2SEQ = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=99, n_embd=32, n_layer=2, n_head=4, pad_token_id=PAD, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def opt() -> Any:
    config = {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32}
    del config["intermediate_size"]
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config))


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=PAD
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(**SEQ2SEQ, max_position_embeddings=128, forced_eos_token_id=None)
    return transformers.BartForConditionalGeneration(config)


def of(kind: str, config: dict[str, Any], **more: Any) -> Callable[[], Any]:
    def build() -> Any:
        made = getattr(transformers, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")(**config, **more)
        return getattr(transformers, f"{kind}ForCausalLM")(made)

    return build


# How many graphs there are for one kind of call: a sliding window that is full has a decode graph of its own, as Python
# asks whether it is.
MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "gpt2": (gpt2, 2),
    "llama": (of("Llama", GROUPED), 2),
    "mistral": (of("Mistral", GROUPED, sliding_window=WINDOW), 3),
    "qwen3": (of("Qwen3", GROUPED, head_dim=8), 2),
    "opt": (opt, 2),
    "gpt neox": (of("GPTNeoX", SMALL), 2),
    "gemma2": (of("Gemma2", GROUPED, head_dim=8, sliding_window=WINDOW), 3),
    "gemma3": (of("Gemma3", GROUPED, head_dim=8, sliding_window=WINDOW), 3),
    "t5": (t5, 2),
    "bart": (bart, 2),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def made(build: Callable[[], Any]) -> tuple[Any, Any]:
    """A model that never ends by itself, and the same optimised."""
    torch.manual_seed(0)
    model = build().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model, fxbt.optimize(model)


def prompt(batch: int, length: int) -> Tensor:
    return torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(batch * 100 + length))


def left_padding(ids: Tensor, count: int = 2) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :count] = 0
    return mask


def graphs_of(fast: Any) -> list[Any]:
    return list(fast._fxbt_dispatcher._graphs)


def served(fast: Any) -> int:
    return sum(graph.served for graph in graphs_of(fast))


def generate(model: Any, ids: Tensor, steps: int = STEPS, **options: Any) -> Tensor:
    torch.manual_seed(7)
    return model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, **{"do_sample": False, **options})


def assert_same(model: Any, fast: Any, ids: Tensor, steps: int = STEPS, new: int = 0, **options: Any) -> None:
    """The same tokens; all calls but those that captured one of the `new` graphs were served by graphs."""
    before, count = served(fast), len(graphs_of(fast))
    assert torch.equal(generate(fast, ids, steps, **options), generate(model, ids, steps, **options))
    assert not fast.report.fallbacks
    assert len(graphs_of(fast)) - count == new
    assert served(fast) - before == steps - new


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens(name: str) -> None:
    build, graphs = MODELS[name]
    model, fast = made(build)
    before = served(fast)
    assert torch.equal(generate(fast, prompt(2, 6)), generate(model, prompt(2, 6)))
    assert len(graphs_of(fast)) == graphs and not fast.report.fallbacks
    assert served(fast) - before == STEPS - graphs
    assert_same(model, fast, prompt(1, 9))
    assert_same(model, fast, prompt(3, 5), num_beams=3)
    assert_same(model, fast, prompt(2, 7), do_sample=True, top_k=20)


@pytest.mark.parametrize("name", MODELS)
def test_left_padding(name: str) -> None:
    build, graphs = MODELS[name]
    model, fast = made(build)
    generate(fast, ids := prompt(2, 6), attention_mask=left_padding(ids))
    assert len(graphs_of(fast)) == graphs and not fast.report.fallbacks
    for batch, length in ((2, 6), (3, 9)):
        ids = prompt(batch, length)
        assert_same(model, fast, ids, attention_mask=left_padding(ids, 3))
        assert_same(model, fast, ids, attention_mask=left_padding(ids), num_beams=2)


def test_no_capture_in_two_hundred_tokens() -> None:
    model, fast = made(gpt2)
    generate(fast, prompt(2, 6), 4)
    assert_same(model, fast, prompt(2, 30), 200)
    assert fast._fxbt_dispatcher._graphs.captures == 2


def test_scores_of_each_step() -> None:
    model, fast = made(of("Llama", GROUPED))
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 60, "do_sample": False}
    found, expected = (one.generate(prompt(2, 6), **options) for one in (fast, model))
    assert torch.equal(found.sequences, expected.sequences)
    for new, old in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    assert type(found.past_key_values) is type(expected.past_key_values)


def test_whisper() -> None:
    config = {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 80}
    config |= {"suppress_tokens": None, "begin_suppress_tokens": None, "forced_decoder_ids": None}
    model, fast = made(lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config)))
    for batch in (2, 1, 3):
        features = torch.randn(batch, 8, 40)
        options = {"max_new_tokens": 60, "do_sample": False, "decoder_input_ids": torch.full((batch, 3), 2)}
        new, old = (each.generate(features, **options) for each in (fast, model))
        assert torch.equal(new, old)
    assert served(fast) > 3 * 50 and len(graphs_of(fast)) <= 3 and not fast.report.fallbacks


# Step by step


class Steps:
    """One generation by hand, whose cache the caller holds."""

    def __init__(self, model: Any, ids: Tensor, cache: Any = None) -> None:
        self.model, self.length = model, ids.shape[1]
        self.cache = transformers.DynamicCache(config=model.config) if cache is None else cache
        self.out = model(input_ids=ids, past_key_values=self.cache, use_cache=True)

    def step(self, token: Tensor | None = None, model: Any = None) -> Tensor:
        token = self.out.logits[:, -1:].argmax(-1) if token is None else token
        self.out = (model or self.model)(input_ids=token, past_key_values=self.cache, use_cache=True)
        return self.out.logits


def assert_caches_agree(one: Any, other: Any) -> None:
    assert type(one) is type(other) and len(one.layers) == len(other.layers)
    for new, old in zip(one.layers, other.layers, strict=True):
        assert type(new) is type(old) and list(vars(new)) == list(vars(old))
        for name, value in vars(old).items():
            found = vars(new)[name]
            assert type(found) is type(value), name
            if isinstance(value, Tensor):
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
            else:
                assert found == value, name


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2"])
def test_the_callers_cache_is_what_the_original_makes_of_it(name: str) -> None:
    model, fast = made(MODELS[name][0])
    for batch, length in ((2, 6), (1, 9)):
        one, other = (Steps(each, prompt(batch, length)) for each in (fast, model))
        for _ in range(20):
            torch.testing.assert_close(one.step(), other.step(), rtol=1e-4, atol=1e-5)
            assert one.out.past_key_values is one.cache
            assert_caches_agree(one.cache, other.cache)
    assert not fast.report.fallbacks and served(fast) > 30


def test_graph_and_original_take_turns() -> None:
    model, fast = made(gpt2)
    one, other = (Steps(each, prompt(2, 6)) for each in (fast, model))
    for turn in range(12):
        torch.testing.assert_close(one.step(model=(fast, model)[turn % 2]), other.step(), rtol=1e-4, atol=1e-5)
    assert_caches_agree(one.cache, other.cache)
    assert served(fast) == 5


def test_what_the_caller_does_to_a_cache() -> None:
    model, fast = made(of("Llama", GROUPED))
    one, other = (Steps(each, prompt(2, 8)) for each in (fast, model))

    def both(change: Callable[[Any], Any]) -> None:
        for each in (one, other):
            change(each.cache)
        token = torch.full((other.cache.layers[0].keys.shape[0], 1), 11)
        for _ in range(3):
            torch.testing.assert_close(one.step(token), other.step(token), rtol=1e-4, atol=1e-5)
        assert_caches_agree(one.cache, other.cache)

    both(lambda cache: None)
    both(lambda cache: cache.crop(-2))
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
    both(lambda cache: cache.batch_repeat_interleave(2))
    both(lambda cache: cache.batch_select_indices(torch.tensor([0, 3])))
    both(lambda cache: [layer.keys.mul_(0.5) for layer in cache.layers])
    assert not fast.report.fallbacks and len(graphs_of(fast)) == 2


def test_an_old_cache_keeps_what_it_showed() -> None:
    model, fast = made(gpt2)
    one = Steps(fast, prompt(2, 6))
    for _ in range(3):
        one.step()
    old = copy.copy(one.cache)
    old.layers = [copy.copy(layer) for layer in one.cache.layers]
    shown = [(layer.keys.clone(), layer.values.clone()) for layer in old.layers]
    prefix = copy.deepcopy(one.cache)
    for _ in range(5):
        one.step()
    for layer, (keys, values) in zip(old.layers, shown, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    for first in (3, 4):  # two ways on from one prefix, after each other and in turns
        ways = [copy.copy(old), copy.deepcopy(prefix)]
        ways[0].layers = [copy.copy(layer) for layer in old.layers]
        token = torch.full((2, 1), first)
        for _ in range(4):
            new, expected = (
                each(input_ids=token, past_key_values=cache).logits
                for each, cache in zip((fast, model), ways, strict=True)
            )
            torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-5)
    assert not fast.report.fallbacks


def test_a_write_to_one_cache_shows_in_no_other() -> None:
    model, fast = made(of("Llama", GROUPED))
    one, other = (Steps(each, prompt(2, 6)) for each in (fast, model))
    kept: list[list[Tensor]] = [[], []]
    for turn in range(8):
        for each, tensors in zip((one, other), kept, strict=True):
            tensors.append(each.cache.layers[0].keys)
            each.step(torch.full((2, 1), 5 + turn))
            each.cache.layers[0].keys[:, :, turn] = turn
            tensors[turn // 2].mul_(1.5)
        for new, old in zip(*kept, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    assert_caches_agree(one.cache, other.cache)
    assert not fast.report.fallbacks


def test_a_generation_copies_its_cache_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = made(of("Llama", GROUPED))
    generate(fast, prompt(2, 6), 4)
    made_anew: list[int] = []
    buffer = fxbt.kernels.growing._buffer
    monkeypatch.setattr(fxbt.kernels.growing, "_buffer", lambda *args: made_anew.append(args[1]) or buffer(*args))
    generate(fast, prompt(2, 6), 200)
    assert len(made_anew) == 4 * len(set(made_anew)) <= 4 * 3
    assert not fxbt.kernels.growing._ROOMS  # what was made is gone with the cache


def test_generating_twice_from_one_prefix() -> None:
    model, fast = made(gpt2)
    ids = prompt(1, 8)
    prefix = Steps(fast, ids[:, :7]).cache
    whole = generate(model, ids, 20)
    for _ in range(3):
        found = fast.generate(ids, past_key_values=copy.deepcopy(prefix), max_new_tokens=20, do_sample=False)
        assert torch.equal(found, whole)
    assert not fast.report.fallbacks


def test_changed_weights() -> None:
    model, fast = made(of("Llama", GROUPED))
    assert_same(model, fast, prompt(2, 6), 20, new=2)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert_same(model, fast, prompt(2, 6), 20)
    model.load_state_dict({name: value * 0.9 for name, value in model.state_dict().items()})
    assert_same(model, fast, prompt(1, 6), 20)


def test_a_chunk_of_tokens_after_a_cache() -> None:
    model, fast = made(of("Llama", GROUPED))
    for batch, length, more in ((2, 6, 4), (2, 9, 3), (1, 5, 7)):
        one, other = (Steps(each, prompt(batch, length)) for each in (fast, model))
        torch.testing.assert_close(one.step(prompt(batch, more)), other.step(prompt(batch, more)), rtol=1e-4, atol=1e-5)
        assert_caches_agree(one.cache, other.cache)
    assert not fast.report.fallbacks and len(graphs_of(fast)) == 2


# What runs the original


def test_gradients_run_the_original() -> None:
    model, fast = made(gpt2)
    with torch.enable_grad():
        one, other = (Steps(each, prompt(2, 6)) for each in (fast, model))
        one.step().sum().backward()
        found = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        other.step().sum().backward()
    for new, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(new, parameter.grad)
    assert "with gradients enabled" in fast.report.fallbacks[0] and not graphs_of(fast)


def test_an_error_midway_leaves_what_the_original_leaves() -> None:
    model, fast = made(gpt2)
    one, other = (Steps(each, prompt(2, 6)) for each in (fast, model))
    for _ in range(2):
        one.step(), other.step()
    for each in (one, other):
        with pytest.raises(IndexError):
            each.step(torch.full((2, 1), 500))  # no such token
        with pytest.raises(RuntimeError):
            each.step(torch.full((3, 1), 5))  # another batch than the cache's
    assert_caches_agree(one.cache, other.cache)
    one.cache, other.cache = (copy.deepcopy(other.cache) for _ in range(2))
    torch.testing.assert_close(one.step(torch.full((2, 1), 5)), other.step(torch.full((2, 1), 5)), rtol=1e-4, atol=1e-5)


class Quantized(Tensor):
    """Stands for the tensors of a quantised cache."""


def test_a_cache_of_other_tensors_runs_the_original() -> None:
    model, fast = made(gpt2)
    one, other = (Steps(each, prompt(2, 6)) for each in (fast, model))
    for each in (one, other):
        for layer in each.cache.layers:
            layer.keys = layer.keys.as_subclass(Quantized)
        torch.testing.assert_close(one.out.logits, other.out.logits)
    new, old = one.step(torch.full((2, 1), 5)), other.step(torch.full((2, 1), 5))
    assert torch.equal(new.as_subclass(Tensor), old.as_subclass(Tensor))
    assert "keys of an argument" in fast.report.fallbacks[0]


# Caches of the user's own


class Window:
    """A cache that is no transformers class: the last values of each call."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.count = 0

    def update(self, x: Tensor) -> Tensor:
        self.seen = [torch.cat([*self.seen, x], 1)]
        self.count += x.shape[1]
        return self.seen[0]


class Slotted:
    """A cache that only pytree can take apart."""

    __slots__ = ("keys",)

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: Any) -> Any:
        x = self.linear(x)
        if isinstance(cache, Slotted):
            keys = torch.cat([cache.keys, x], 1)
            return keys.mean(1), Slotted(keys)
        return cache.update(x).mean(1) / cache.count


def test_a_cache_of_the_users_own() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    fast: Any = fxbt.optimize(model)
    one, other = Window(), Window()
    for count in (3, 1, 1, 1, 1, 1, 1):
        x = torch.randn(2, count, 4)
        torch.testing.assert_close(fast(x, one), model(x, other))
        assert one.count == other.count and torch.allclose(one.seen[0], other.seen[0])
    assert not fast.report.fallbacks and len(graphs_of(fast)) <= 3 and served(fast) >= 4


def test_a_cache_that_is_registered_as_a_pytree() -> None:
    pytree = torch.utils._pytree
    if Slotted not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(Slotted, lambda c: ([c.keys], None), lambda keys, _: Slotted(keys[0]))
    torch.manual_seed(0)
    model = Net().eval()
    fast: Any = fxbt.optimize(model)
    one = other = Slotted(torch.randn(2, 3, 4))
    for _ in range(5):
        x = torch.randn(2, 1, 4)
        (new, one), (old, other) = fast(x, one), model(x, other)
        torch.testing.assert_close(new, old)
        assert type(one) is Slotted and torch.allclose(one.keys, other.keys)
    assert not fast.report.fallbacks and served(fast) >= 3


# What the report says


def test_report_of_prefill_and_decode() -> None:
    model, fast = made(of("Llama", GROUPED))
    generate(fast, prompt(2, 6), 10)  # captures both; the first call of each runs the original
    assert {graph.step: graph.tokens for graph in fast.report.graphs.values()} == {"prefill": 0, "decode": 2 * 8}
    generate(fast, prompt(3, 5), 20)
    found = {graph.step: graph for graph in fast.report.graphs.values()}
    assert found["prefill"].tokens == 3 * 5 and found["decode"].tokens == 2 * 8 + 3 * 19
    assert found["decode"].cache_bytes == 0
    one = Steps(fast, prompt(2, 6))
    for _ in range(3):
        one.step()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in one.cache.layers)
    found = {graph.step: graph for graph in fast.report.graphs.values()}  # those without position_ids come last
    assert held < found["decode"].cache_bytes < 16 * held and found["prefill"].cache_bytes == 0
    assert "calls with a KV cache" in str(fast.report)
    del one
    assert found["decode"].cache_bytes == 0


def test_report_of_an_encoder_decoder() -> None:
    model, fast = made(bart)
    for _ in range(2):
        generate(fast, prompt(2, 6), 10)
    found = {graph.step: graph.tokens for graph in fast.report.graphs.values()}
    assert found == {"prefill": 2 * 1, "decode": 2 * (8 + 9)}


def test_no_steps_without_a_cache() -> None:
    model, fast = made(gpt2)
    fast(input_ids=prompt(2, 6), use_cache=False)
    (graph,) = fast.report.graphs.values()
    assert (graph.step, graph.tokens, graph.cache_bytes) == ("", 0, 0) and "KV cache" not in str(fast.report)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_one_node_each(name: str) -> None:
    model, fast = made(MODELS[name][0])
    generate(fast, prompt(2, 6), 5)
    assert [graph.step for graph in fast.report.graphs.values()] == ["prefill", "decode"]
    for graph in fast.report.graphs.values():
        # Softcapped attention is not asked for masks.
        layers = graph.hits["decoder_layer"] + graph.hits["encoder_layer"]
        assert layers == 2, (graph.step, str(graph.why("encoder_layer")))
        assert "%getitem" in graph.after  # keys and values are results of the layers


def test_a_value_inside_a_layer_that_a_model_returns_is_no_cache() -> None:
    class Returning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = MODELS["gpt2"][0]()
            self.seen: list[Tensor] = []

        def forward(self, ids: Tensor) -> Any:
            seen: list[Tensor] = []
            handles = [
                block.ln_2.register_forward_hook(lambda module, args, output: seen.append(output))
                for block in self.model.transformer.h[:1]
            ]
            logits = self.model(ids, use_cache=False).logits
            for handle in handles:
                handle.remove()
            return logits, seen[0]

    fast: Any = fxbt.optimize(Returning().eval())
    for _ in range(2):
        new, old = fast(prompt(2, 6)), fxbt.restore(fast)(prompt(2, 6))
        torch.testing.assert_close(new, old)
    assert all(graph.hits["decoder_layer"] <= 1 for graph in fast.report.graphs.values())
