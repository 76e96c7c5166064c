"""Packed calls on a CUDA device: buckets of tokens, one transfer a call, recordings; on a tape, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, huggingface
from test_cuda import MASK, SETTINGS, graph_on_cuda, needs_gpu
from test_replay import TapeRecorder
from torch import Tensor

import fxbt
from fxbt.kernels import packed
from fxbt.kernels.packed import Tokens, bucket, bucket_step
from fxbt.lower.derived_weights import Weights
from fxbt.lower.program import Program
from fxbt.padding.drop import drop_padding
from fxbt.padding.without_masks import unmask
from fxbt.runtime.race import Evidence
from fxbt.runtime.unpadding import DENSE, EMPTY, PACKED
from fxbt.runtime.unpadding_on_cuda import SLOWER, UnpaddingOnCuda


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


# --- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [10, 100, 4096, 100_000])
def test_a_bucket_takes_its_tokens_and_wastes_an_eighth(most):
    for count in range(1, most + 1, 1 + most // 500):
        size = bucket(count, most)
        assert count <= size <= most
        assert size - count < bucket_step(size)  # what `Tokens` is told to fill at most
        assert size <= max(count + packed.SMALLEST_BUCKET, 1.126 * count)


def test_tokens_row_by_row_are_those_of_the_mask():
    tokens = Tokens.on_device(MASK, int(MASK.sum()))
    assert torch.equal(tokens.flat, MASK.flatten().nonzero()[:, 0]) and tokens.targets is tokens.flat
    assert tokens.bounds.tolist() == [0, *MASK.sum(1).cumsum(0).tolist()] and tokens.bounds.dtype is torch.int32


def test_what_fills_a_bucket_stands_in_sequences_of_its_own_and_goes_nowhere():
    count = int(MASK.sum())
    tokens = Tokens.on_device(MASK, count + 12, most_filled=16)
    starts = tokens.bounds.tolist()
    assert starts[3] == count and starts[-1] == count + 12 and starts == sorted(starts)
    assert max(end - start for start, end in zip(starts, starts[1:], strict=False)) <= tokens.longest == MASK.shape[1]
    x = torch.randn(1, count + 12, 2)
    x[:, count:] = float("nan")
    dense = packed.unpack(x, tokens, 0, 1, fill=-1.0)
    assert dense.shape == (3, 5, 2)
    assert torch.equal(dense[MASK.bool()], x[0, :count]) and (dense[MASK == 0] == -1).all()
    assert packed.gather(torch.randn(3, 5, 2), tokens, 0, 1, 3).shape == x.shape


def test_a_full_bucket_has_nothing_to_fill():
    tokens = Tokens.on_device(MASK, int(MASK.sum()), most_filled=4)
    assert tokens.bounds[3:].tolist() == [int(MASK.sum())] * 2


# --- calls, on a tape -------------------------------------------------------------------------------------------


def by_bounds(q, k, v, starts, key_starts, longest, longest_key, *, scale, window_size, enable_gqa):
    """What `varlen_attn` is documented to compute, without a look at the bounds."""
    sequence = torch.bucketize(torch.arange(len(q)), starts[1:].long(), right=True)
    mask = sequence[:, None] == sequence
    mask = mask.tril() if window_size == (-1, 0) else mask
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


@pytest.fixture
def on_a_tape(monkeypatch, torchs_kernels):
    """Makes (unpadding as if on CUDA, the dense program) of a model."""
    monkeypatch.setattr(packed, "varlen_attention_by_torch", by_bounds)
    monkeypatch.setattr("fxbt.lower.steps.fuse_pointwise", lambda graph: (graph, []))  # its kernels are on no tape

    def make(name: str = "BertModel", recorder: Any = None, **settings: Any) -> tuple[UnpaddingOnCuda, Program]:
        module = graph_on_cuda(name, torch.bfloat16, **settings)
        weights = Weights()
        dense = Program(module, {}, weights, recorder=recorder)
        unpadded = drop_padding(module)
        made = UnpaddingOnCuda(dense, unpadded, unmask(module, unpadded.validities), weights, recorder=recorder)
        made._is_slower = lambda run, tensors: False  # type: ignore[method-assign]
        return made, Program(module, {}, Weights())

    return make


def check(unpadding: UnpaddingOnCuda, dense: Program, mask: Tensor) -> None:
    tensors = (torch.randint(3, VOCAB, mask.shape), mask)
    found, expected = unpadding(*tensors), dense(*tensors)
    for value, dense_value in zip(found, expected, strict=True):
        if value.shape[:2] == mask.shape:
            value, dense_value = value[mask.bool()], dense_value[mask.bool()]
        torch.testing.assert_close(value, dense_value, rtol=2e-2, atol=2e-2)  # bfloat16


def masks_of(*lengths: int, columns: int = 48) -> Tensor:
    return (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()


def with_first(mask: Tensor) -> Tensor:
    """The pooler reads position 0."""
    return mask.index_fill(1, torch.tensor(0), 1)


LLAMA = {"num_key_value_heads": 2, "use_cache": False}


@pytest.mark.parametrize("name, settings", [("BertModel", {}), ("LlamaModel", LLAMA)])
def test_one_recording_serves_all_calls_of_a_bucket(on_a_tape, name, settings):
    unpadding, dense = on_a_tape(name, TapeRecorder(), **settings)
    for lengths in ((40, 12, 48), (41, 12, 44), (48, 3, 47), (10, 40, 48), (1, 2, 3), (20, 30, 10)):
        check(unpadding, dense, masks_of(*lengths))
    assert unpadding.calls == {PACKED: 6}
    recorded = unpadding.replays[-1]
    assert recorded.calls == {"of a new shape": 3, "recorded": 1, "replayed": 2}  # 97 to 104, 6, and 60 tokens


def test_padding_at_the_left_and_in_between_is_dropped_by_the_same_recording(on_a_tape):
    unpadding, dense = on_a_tape(recorder=TapeRecorder())
    for shift in (0, 4, 7, 0):
        check(unpadding, dense, with_first(masks_of(40, 12, 30).roll(shift, 1)))
    check(unpadding, dense, with_first(masks_of(40, 12, 30)[:, torch.randperm(48)]))
    assert unpadding.calls == {PACKED: 5} and unpadding.replays[-1].calls["replayed"] == 3


def test_without_a_recorder_exactly_the_tokens_are_computed(on_a_tape, monkeypatch):
    unpadding, dense = on_a_tape()
    sizes, on_device = [], Tokens.on_device

    def noted(mask: Tensor, size: int, *more: int) -> Tokens:
        sizes.append((size, *more))
        return on_device(mask, size, *more)

    monkeypatch.setattr(Tokens, "on_device", noted)
    check(unpadding, dense, masks_of(40, 12, 30))
    assert sizes == [(82,)] and unpadding.calls == {PACKED: 1}


def test_what_decides_is_read_at_once(on_a_tape):
    unpadding, dense = on_a_tape(recorder=TapeRecorder())
    mask = masks_of(40, 12, 30)
    for _ in range(3):
        check(unpadding, dense, mask)
    for other in (torch.ones_like(mask), mask * 0, mask.clone().index_fill_(0, torch.tensor(1), 0)):
        unpadding(torch.randint(3, VOCAB, mask.shape), other)
    unpadding(torch.randint(3, VOCAB, mask.shape), mask * 2)
    assert unpadding.calls[PACKED] >= 3 and unpadding.calls[DENSE] == 1 and unpadding.calls[EMPTY] <= 1
    assert unpadding.calls["attention_mask holds values other than 0 and 1"] == 1
    assert unpadding._read.calls["replayed"] == 5  # of one shape, whatever is in the mask


def test_dense_calls_serve_where_they_were_faster(on_a_tape):
    unpadding, dense = on_a_tape()
    del unpadding._is_slower
    mask = masks_of(40, 12, 30)
    race = unpadding._races.of(mask.numel())
    race.evidence, race._left = Evidence(12, 12, graph=2.0, original=1.0), 10
    check(unpadding, dense, mask)
    race.evidence = None
    check(unpadding, dense, mask)
    assert unpadding.calls == {SLOWER: 1, PACKED: 1}


def test_weights_that_move_are_recorded_anew(on_a_tape):
    unpadding, dense = on_a_tape(recorder=TapeRecorder())
    mask = masks_of(40, 12, 30)
    for _ in range(3):
        check(unpadding, dense, mask)
    for program in (*unpadding.programs, unpadding.dense, dense):
        program.rebind({id(weight): weight + 0.25 for weight in {id(w): w for w in program._weights}.values()})
    unpadding.forget_recordings()
    for _ in range(2):
        unpadding(torch.randint(3, VOCAB, mask.shape), mask)
    assert unpadding.replays[-1].calls == {"of a new shape": 2, "recorded": 2, "replayed": 1}


# --- on a GPU ---------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True, "static"])
@pytest.mark.parametrize("name, settings", [("BertModel", {}), ("LlamaModel", LLAMA)])
def test_mixed_batches_agree_on_a_gpu(name, settings, cuda_graphs, monkeypatch):
    monkeypatch.setattr(UnpaddingOnCuda, "_is_slower", lambda self, run, tensors: False)  # tiny models are, perhaps
    model = huggingface(name, **{**SETTINGS, **settings})("eager").eval().to("cuda", torch.bfloat16)
    exact = huggingface(name, **{**SETTINGS, **settings})("eager").eval().double()
    fast: Any = fxbt.optimize(model, cuda_graphs=cuda_graphs)
    torch.manual_seed(0)
    for step in range(12):
        mask = masks_of(*torch.randint(1, 49, (4,)).tolist())
        mask = mask.flip(1) if step % 3 == 2 and name == "BertModel" else mask
        call = {"input_ids": torch.randint(3, VOCAB, mask.shape), "attention_mask": mask}
        there = {key: value.cuda() for key, value in call.items()}
        right = exact(**call).last_hidden_state[mask.bool()]
        found, eager = (m(**there).last_hidden_state.cpu().double()[mask.bool()] for m in (fast, model))
        assert (found - right).norm() <= 2 * (eager - right).norm() + 1e-5
    graph = fast.report.latest
    assert graph.calls["packed"] >= 8  # a pooler reads position 0, which every third batch pads
    assert not cuda_graphs or (graph.cuda_graphs["recorded"] > 0 and graph.cuda_graphs["replayed"] > 0)


@needs_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_callers_own_recording_is_of_the_original(cuda_graphs):
    model = huggingface("BertModel", **SETTINGS)("eager").eval().to("cuda", torch.float16)
    fast: Any = fxbt.optimize(model, cuda_graphs=cuda_graphs)
    ids, mask = torch.randint(3, VOCAB, (4, 48)).cuda(), torch.ones(4, 48, dtype=torch.long).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            fast(input_ids=ids, attention_mask=mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fast(input_ids=ids, attention_mask=mask).last_hidden_state
    ids.copy_(torch.randint(3, VOCAB, (4, 48)))
    graph.replay()
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@needs_gpu
def test_streams_and_threads_do_not_meet_on_a_gpu(monkeypatch):
    import threading

    model = huggingface("BertModel", **SETTINGS)("eager").eval().to("cuda", torch.float16)
    monkeypatch.setattr(UnpaddingOnCuda, "_is_slower", lambda self, run, tensors: False)
    fast: Any = fxbt.optimize(model, cuda_graphs=True)
    problems: list[Exception] = []

    def work(seed: int) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                generator = torch.Generator().manual_seed(seed)
                for _ in range(30):
                    mask = masks_of(*torch.randint(1, 49, (4,), generator=generator).tolist()).cuda()
                    ids = torch.randint(3, VOCAB, mask.shape, generator=generator).cuda()
                    found, eager = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (fast, model))
                    valid = mask.bool()
                    torch.testing.assert_close(found[valid], eager[valid], rtol=2e-2, atol=2e-2)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
