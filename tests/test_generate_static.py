"""`generate` with static caches: graphs write to the caller's own tensors, as the original does."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import (
    GROUPED,
    MODELS,
    WINDOW,
    Steps,
    assert_caches_agree,
    assert_same,
    generate,
    gpt2,
    graphs_of,
    left_padding,
    made,
    of,
    prompt,
    served,
)
from torch import Tensor, nn

import fxbt

transformers: Any = pytest.importorskip("transformers", minversion="5.0")

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")

STATIC = {"cache_implementation": "static"}
SLIDING = ("mistral", "gemma2")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def static(model: Any, length: int) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def steps(model: Any, fast: Any, ids: Tensor, length: int) -> tuple[Steps, Steps]:
    """A generation by graphs and one by the original, each with a static cache of its own."""
    return Steps(fast, ids, static(model, length)), Steps(model, ids, static(model, length))


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "t5"])
def test_the_same_tokens(name: str) -> None:
    build, graphs = MODELS[name]
    model, fast = made(build)
    generate(fast, prompt(2, 6), 30, **STATIC)
    assert not fast.report.fallbacks and len(graphs_of(fast)) == graphs
    assert_same(model, fast, prompt(2, 6), 100, **STATIC)
    # Writing a row of a full window asks whether the batch is 1.
    assert_same(model, fast, prompt(1, 9), 40, new=int(name in SLIDING), **STATIC)
    assert_same(model, fast, prompt(2, 5), 40, do_sample=True, top_k=20, **STATIC)
    assert_same(model, fast, prompt(3, 5), 40, num_beams=3, **STATIC)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_left_padding(name: str) -> None:
    build, graphs = MODELS[name]
    model, fast = made(build)
    generate(fast, ids := prompt(2, 6), 40, attention_mask=left_padding(ids), **STATIC)
    assert not fast.report.fallbacks and len(graphs_of(fast)) == graphs
    for batch, length in ((2, 6), (3, 9)):
        ids = prompt(batch, length)
        assert_same(model, fast, ids, 40, attention_mask=left_padding(ids, 3), **STATIC)
        assert_same(model, fast, ids, 40, attention_mask=left_padding(ids), num_beams=2, **STATIC)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_the_callers_tensors_hold_what_the_original_writes(name: str) -> None:
    model, fast = made(MODELS[name][0])
    for batch, length in ((2, 6), (1, 9), (3, 7)):
        one, other = steps(model, fast, prompt(batch, length), 40)
        keys = one.cache.layers[0].keys
        for _ in range(25):
            torch.testing.assert_close(one.step(), other.step(), rtol=1e-4, atol=1e-5)
            assert one.out.past_key_values is one.cache and one.cache.layers[0].keys is keys
            assert_caches_agree(one.cache, other.cache)
    assert not fast.report.fallbacks and served(fast) > 60
    assert len(graphs_of(fast)) == MODELS[name][1] + (name in SLIDING)


def test_graph_and_original_take_turns() -> None:
    model, fast = made(of("Llama", GROUPED))
    for _ in range(2):
        one, other = steps(model, fast, prompt(2, 6), 30)
        for turn in range(12):
            torch.testing.assert_close(one.step(model=(fast, model)[turn % 2]), other.step(), rtol=1e-4, atol=1e-5)
            assert_caches_agree(one.cache, other.cache)
    assert served(fast) == 1 + 2 * 6 - 1 and not fast.report.fallbacks


def test_no_capture_in_two_hundred_tokens() -> None:
    model, fast = made(gpt2)
    generate(fast, prompt(2, 6), 4, **STATIC)
    assert_same(model, fast, prompt(2, 30), 200, **STATIC)
    assert fast._fxbt_dispatcher._graphs.captures == 2


def test_other_graphs_hold_beside_a_longer_cache() -> None:
    """`generate` notes the length of its static caches on the model."""
    model, fast = made(gpt2)
    assert_same(model, fast, prompt(2, 6), 10, new=2)
    assert_same(model, fast, prompt(2, 6), 20, new=2, **STATIC)
    assert_same(model, fast, prompt(2, 6), 40, **STATIC)
    assert_same(model, fast, prompt(2, 6), 10)


def test_a_cache_that_is_too_small() -> None:
    model, fast = made(of("Llama", GROUPED))
    for _turn in range(2):
        one, other = steps(model, fast, prompt(2, 6), 9)
        for _ in range(3):
            one.step(), other.step()
        errors = []
        for each in (one, other):
            with pytest.raises((IndexError, RuntimeError)) as raised:
                each.step(torch.full((2, 1), 7))
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]
        assert_caches_agree(one.cache, other.cache)
    assert served(fast) == 3 * 2 and not fast.report.fallbacks


def test_a_second_generation_with_the_same_cache() -> None:
    model, fast = made(of("Llama", GROUPED))
    ids = prompt(2, 7)
    caches = static(model, 64), static(model, 64)
    for _ in range(3):
        found, expected = (
            generate(each, ids, 50, past_key_values=cache) for each, cache in zip((fast, model), caches, strict=True)
        )
        assert torch.equal(found, expected)
        assert_caches_agree(*caches)
        for cache in caches:
            cache.reset()
    assert len(graphs_of(fast)) == 3 and not fast.report.fallbacks  # a cache that was reset has keys at the start
    assert served(fast) == 3 * 50 - 3


def test_a_cache_kept_by_the_caller() -> None:
    model, fast = made(gpt2)
    one, other = steps(model, fast, prompt(2, 6), 30)
    for _ in range(3):
        one.step(), other.step()
    kept = [copy.deepcopy(each.cache) for each in (one, other)]
    tokens = torch.full((2, 1), 9)
    for _ in range(4):
        one.step(tokens), other.step(tokens)
    assert_caches_agree(one.cache, other.cache)
    assert_caches_agree(*kept)
    one.cache, other.cache = kept
    torch.testing.assert_close(one.step(tokens), other.step(tokens), rtol=1e-4, atol=1e-5)
    assert_caches_agree(*kept)
    assert not fast.report.fallbacks


def test_what_the_caller_does_to_a_cache() -> None:
    model, fast = made(of("Llama", GROUPED))
    one, other = steps(model, fast, prompt(2, 8), 40)

    def both(change: Callable[[Any], Any]) -> None:
        for each in (one, other):
            change(each.cache)
        token = torch.full((2, 1), 11)
        for _ in range(3):
            torch.testing.assert_close(one.step(token), other.step(token), rtol=1e-4, atol=1e-5)
            assert_caches_agree(one.cache, other.cache)

    both(lambda cache: None)
    both(lambda cache: cache.reorder_cache(torch.tensor([1, 0])))
    both(lambda cache: [layer.keys.mul_(0.5) for layer in cache.layers])
    both(lambda cache: [layer.cumulative_length.sub_(2) for layer in cache.layers])
    assert not fast.report.fallbacks and len(graphs_of(fast)) == 2


def test_keys_in_memory_of_any_layout() -> None:
    model, fast = made(gpt2)
    one, other = steps(model, fast, prompt(2, 8), 30)
    for each in (one, other):
        for layer in each.cache.layers:
            layer.keys = layer.keys.transpose(1, 2).contiguous().transpose(1, 2)
    for _ in range(5):
        torch.testing.assert_close(one.step(), other.step(), rtol=1e-4, atol=1e-5)
        assert_caches_agree(one.cache, other.cache)
    assert not fast.report.fallbacks and served(fast) == 4


def test_layers_that_share_memory_run_the_original() -> None:
    model, fast = made(gpt2)
    warm, _ = steps(model, fast, prompt(2, 6), 30)
    warm.step(), warm.step()
    before = served(fast)
    one, other = steps(model, fast, prompt(2, 6), 30)
    for each in (one, other):
        first, second = each.cache.layers
        second.keys = first.keys[:]
    for _ in range(3):
        torch.testing.assert_close(one.step(), other.step(), rtol=1e-4, atol=1e-5)
        assert_caches_agree(one.cache, other.cache)
    assert served(fast) == before + 1  # the prefill
    assert any("whose memory another tensor shares" in reason for reason in fast.report.fallbacks)


def test_two_threads() -> None:
    model, fast = made(of("Llama", GROUPED))
    generate(fast, prompt(1, 6), 4, past_key_values=static(model, 50))
    expected = {batch: generate(model, prompt(batch, 6), 40, past_key_values=static(model, 50)) for batch in (1, 2)}
    found: dict[int, Tensor] = {}

    def run(batch: int) -> None:
        with torch.no_grad():
            found[batch] = fast.generate(
                prompt(batch, 6),
                past_key_values=static(model, 50),
                max_new_tokens=40,
                min_new_tokens=40,
                do_sample=False,
            )

    threads = [threading.Thread(target=run, args=(batch,)) for batch in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[batch], expected[batch]) for batch in (1, 2))
    assert not fast.report.fallbacks


def test_inference_mode() -> None:
    model, fast = made(of("Llama", GROUPED))
    with torch.inference_mode():
        for _ in range(2):
            one, other = steps(model, fast, prompt(2, 6), 30)
            for _ in range(10):
                torch.testing.assert_close(one.step(), other.step(), rtol=1e-4, atol=1e-5)
                assert_caches_agree(one.cache, other.cache)
    assert not fast.report.fallbacks and served(fast) == 20


def test_changed_weights_and_train() -> None:
    model, fast = made(of("Llama", GROUPED))
    generate(fast, prompt(2, 6), 4, **STATIC)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    assert_same(model, fast, prompt(2, 6), 20, **STATIC)
    fast.train()
    assert_same(model, fast, prompt(2, 6), 20, new=2, **STATIC)
    fast.eval()
    assert_same(model, fast, prompt(2, 6), 20, **STATIC)


def test_gradients_run_the_original() -> None:
    model, fast = made(gpt2)
    with torch.enable_grad():
        one, other = steps(model, fast, prompt(2, 6), 20)
        torch.testing.assert_close(one.step(), other.step())
    assert "with gradients enabled" in fast.report.fallbacks[0] and not graphs_of(fast)


def test_report() -> None:
    model, fast = made(gpt2)
    for _ in range(2):
        generate(fast, prompt(2, 6), 11, **STATIC)
    found = {graph.step: graph.tokens for graph in fast.report.graphs.values()}
    assert found == {"prefill": 2 * 6, "decode": 2 * (9 + 10)}
    assert "calls with a KV cache" in str(fast.report)


@pytest.mark.parametrize("name", ["gemma2", "bart"])
def test_layers_are_one_node_each(name: str) -> None:
    model, fast = made(MODELS[name][0])
    generate(fast, prompt(2, 6), 5, **STATIC)
    assert [graph.step for graph in fast.report.graphs.values()] == ["prefill", "decode"]
    for graph in fast.report.graphs.values():
        layers = graph.hits["decoder_layer"] + graph.hits["encoder_layer"]
        assert layers == 2, (graph.step, str(graph.why("encoder_layer")))


def test_no_copy_of_the_cache_in_a_step() -> None:
    model, fast = made(gpt2)
    one, _ = steps(model, fast, prompt(2, 6), 30)
    one.step()
    decode = next(graph for graph in graphs_of(fast) if graph.use.step == "decode")
    call = fast._fxbt_dispatcher._binder.call(
        (), {"input_ids": torch.full((2, 1), 5), "past_key_values": one.cache, "use_cache": True}
    )
    values = decode.run(*call.tensors)
    held = {id(tensor) for tensor in call.tensors}
    assert sum(id(value) in held for value in values) == 2 * 2  # keys and values of two layers


class Register(nn.Module):
    """A module whose objects' tensors it writes to in other ways than a static cache does."""

    class Held:
        def __init__(self, size: int) -> None:
            self.last = torch.zeros(size, 3, 4)
            self.before = torch.zeros(size, 3, 4)

    def __init__(self, returns: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.returns = returns

    def forward(self, x: Tensor, held: Any) -> Any:
        y = self.linear(x) + held.before
        held.before.copy_(held.last)
        held.last.copy_(y)
        return (y, held.last) if self.returns else y * 2


def test_a_tensor_that_takes_what_another_one_held() -> None:
    module = Register().eval()
    fast: Any = fxbt.optimize(module)
    one, other = Register.Held(2), Register.Held(2)
    for _ in range(5):
        x = torch.randn(2, 3, 4)
        torch.testing.assert_close(fast(x, one), module(x, other))
        torch.testing.assert_close(one.last, other.last)
        torch.testing.assert_close(one.before, other.before)
    assert not fast.report.fallbacks and served(fast) == 4


def test_a_written_tensor_that_is_returned_runs_the_original() -> None:
    module = Register(returns=True).eval()
    fast: Any = fxbt.optimize(module)
    one, other = Register.Held(2), Register.Held(2)
    for _ in range(3):
        x = torch.randn(2, 3, 4)
        torch.testing.assert_close(fast(x, one)[1], module(x, other)[1])
        torch.testing.assert_close(one.before, other.before)
    assert "returns memory that it writes in place to" in fast.report.fallbacks[0] and not graphs_of(fast)


def test_an_argument_that_is_no_object_runs_the_original() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x[0] = 1
            return x.sum(1)

    fast: Any = fxbt.optimize(Writing().eval())
    for _ in range(2):
        x = torch.zeros(2, 3)
        assert torch.equal(fast(x), torch.tensor([3.0, 0.0])) and x[0, 0] == 1
    assert "writes in place to its argument x" in fast.report.fallbacks[0]


def test_a_window_that_fills_in_the_prompt() -> None:
    model, fast = made(MODELS["mistral"][0])
    for length in (WINDOW + 4, WINDOW, WINDOW - 1):
        assert torch.equal(
            generate(fast, prompt(2, length), 10, **STATIC), generate(model, prompt(2, length), 10, **STATIC)
        )
    assert not fast.report.fallbacks


def test_graphs_of_another_process(tmp_path: Path) -> None:
    model, fast = made(gpt2)
    Steps(fast, prompt(2, 6), static(model, 40)).step()
    fxbt.save(fast, tmp_path)
    _, fresh = made(gpt2)
    other: Any = fxbt.load(tmp_path, fxbt.restore(fresh))
    one, original = Steps(other, prompt(2, 6), static(model, 40)), Steps(model, prompt(2, 6), static(model, 40))
    for _ in range(3):
        torch.testing.assert_close(one.step(), original.step(), rtol=1e-4, atol=1e-5)
        assert_caches_agree(one.cache, original.cache)
    assert all(graph.is_stored for graph in graphs_of(other)) and not other.report.fallbacks
