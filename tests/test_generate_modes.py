"""`generate` in its other ways: candidates from a prompt or a smaller model, and caches that no graph may fill."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_generate import GROUPED, generate, gpt2, graphs_of, made, of, prompt, served

import fxbt

transformers: Any = pytest.importorskip("transformers", minversion="5.0")

pytestmark = pytest.mark.filterwarnings("ignore::fxbt.errors.FxbtWarning")


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("build", [gpt2, of("Llama", GROUPED)], ids=["gpt2", "llama"])
def test_candidates_from_the_prompt(build: Callable[[], Any]) -> None:
    model, fast = made(build)
    for length in (9, 12, 10):
        ids = prompt(1, length)
        found, expected = (generate(each, ids, 60, prompt_lookup_num_tokens=3) for each in (fast, model))
        assert torch.equal(found, expected)
    assert served(fast) > 30 and not fast.report.fallbacks
    assert len(graphs_of(fast)) <= 6  # one for each number of candidates


def test_candidates_of_a_smaller_model() -> None:
    model, fast = made(gpt2)
    torch.manual_seed(1)
    small = gpt2().eval()
    small.generation_config.eos_token_id = None
    assistant: Any = fxbt.optimize(small)
    for length in (9, 12, 10):
        ids = prompt(1, length)
        found = generate(fast, ids, 60, assistant_model=assistant)
        assert torch.equal(found, generate(model, ids, 60, assistant_model=small))
    assert served(fast) > 40 and served(assistant) > 40
    assert not fast.report.fallbacks and not assistant.report.fallbacks


@pytest.mark.parametrize("build", [gpt2, of("Llama", GROUPED)], ids=["gpt2", "llama"])
def test_quantised_caches_run_the_original(build: Callable[[], Any]) -> None:
    model, fast = made(build)
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    for batch in (2, 1):
        ids = prompt(batch, 6)
        assert torch.equal(generate(fast, ids, 60, **options), generate(model, ids, 60, **options))
    assert not graphs_of(fast) and len(fast.report.fallbacks) == 2
    assert all("float8_e4m3fn, a quantised cache" in reason for reason in fast.report.fallbacks)
    generate(fast, prompt(2, 6), 10)
    assert len(graphs_of(fast)) == 2  # other caches have graphs
