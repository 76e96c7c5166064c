"""What a forward leaves in its model: buffers written in place, attributes set anew; by a graph as by the original."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from around import WIDTH, Net
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import fxbt
from fxbt.runtime.guarded_graph import GuardedGraph

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPES = ((2, 5), (2, 5), (3, 4), (1, 7))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that a graph served."""
    calls: list[int] = []
    run = GuardedGraph.output

    def counted(self: GuardedGraph, *given: Any) -> Any:
        output = run(self, *given)
        calls.append(1)
        return output

    monkeypatch.setattr(GuardedGraph, "output", counted)
    return calls


class WithBuffers(Net):
    """Buffers that cases write to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))
        self.register_buffer("count", torch.tensor(0))


class RunningMean(WithBuffers):
    def forward(self, x):
        y = self.first(x)
        self.count += 1
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 1)))
        return self.last(y - self.mean)


class WithoutGradients(WithBuffers):
    def forward(self, x):
        y = self.first(x)
        with torch.no_grad():
            self.mean.lerp_(y.mean((0, 1)), 0.1)
            self.count.add_(1)
        return self.last(y - self.mean) * self.count


class ReadBefore(WithBuffers):
    """Autograd keeps what was read, which is written then."""

    def forward(self, x):
        before = self.variance.clone()
        self.variance.add_(0.1)
        return self.first(x) * before


class OnlyWritten(WithBuffers):
    def forward(self, x):
        self.mean.copy_(x.detach().mean((0, 1)))
        return super().forward(x)


class PartWritten(WithBuffers):
    def forward(self, x):
        self.mean[: x.shape[1]] = x.detach()[0, :, 0]
        return super().forward(x) + self.mean


class Normalized(WithBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


class NormalizedTwice(Normalized):
    def forward(self, x):
        return super().forward(super().forward(x) + x)


class Uncounted(WithBuffers):
    """Statistics whose writes torch does not count as versions."""

    def forward(self, x):
        y = F.batch_norm(x.flatten(0, 1), self.mean, self.variance, training=True)
        return super().forward(y.view_as(x))


class Spectral(Net):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.last)


class OldSpectral(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.spectral_norm(self.last)


class OldWeightNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.weight_norm(self.last)
        nn.utils.weight_norm(self.first.q, dim=None)


class LastSeen(Net):
    """An attribute whose shape follows the call's, and one that is its input."""

    def forward(self, x):
        self.input, self.seen = x, self.first(x)
        return self.last(self.seen)


SERVED = (
    *(RunningMean, WithoutGradients, ReadBefore, OnlyWritten, PartWritten, Normalized, NormalizedTwice, Uncounted),
    *(Spectral, OldSpectral, OldWeightNorm, LastSeen),
)


def pair(kind: type[nn.Module], training: bool = True) -> tuple[Any, Any]:
    """(an optimised model, the same in eager)."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(kind().train(training))
    return fxbt.optimize(models[0]), models[1]


def left(model: nn.Module) -> dict[str, Tensor]:
    """All tensors that the model has now."""
    found = dict(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        found.update({f"{path}.{k}": v for k, v in vars(module).items() if type(v) is Tensor})
    return found


def is_like(fast: nn.Module, eager: nn.Module, x: Tensor, gradients: bool) -> None:
    """Calls both, and compares what they return, leave, and derive."""
    weights = torch.linspace(-1, 2, x.numel()).cos().view_as(x)
    results = [model(x) for model in (fast, eager)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    found, expected = left(fast), left(eager)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [t.requires_grad for t in found.values()] == [t.requires_grad for t in expected.values()]
    if not gradients:
        return
    for model, result in zip((fast, eager), results, strict=True):
        model.zero_grad()
        (result * weights).sum().backward()
    of_both = [{n: p.grad for n, p in model.named_parameters()} for model in (fast, eager)]
    torch.testing.assert_close(*of_both, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["inference", "training", "training without gradients"])
@pytest.mark.parametrize("kind", SERVED)
def test_a_graph_leaves_what_the_original_leaves(kind: type[nn.Module], mode: str, served: list[int]) -> None:
    fast, eager = pair(kind, training=mode != "inference")
    with torch.set_grad_enabled(mode == "training"):
        for shape in SHAPES:
            is_like(fast, eager, torch.randn(*shape, WIDTH), mode == "training")
    assert not fast.report.fallbacks and fast.report.hits["attention"] and len(fast.report.graphs) == 1
    assert len(served) >= len(SHAPES) - 1  # all but the call that was captured, at the most


@pytest.mark.parametrize("kind", [RunningMean, Normalized, OldSpectral])
def test_modes_and_weights_change_in_between(kind: type[nn.Module]) -> None:
    fast, eager = pair(kind)
    for step in range(4):
        for training in (True, False):
            fast.train(training), eager.train(training)
            is_like(fast, eager, torch.randn(2, 5, WIDTH), gradients=True)
            with torch.no_grad():
                is_like(fast, eager, torch.randn(3, 4, WIDTH), gradients=False)
                for model in (fast, eager):
                    model.last.bias.add_(0.1)
                    next(model.buffers(), model.last.bias).mul_(1.5)
        if step == 1:
            state = copy.deepcopy(eager.state_dict())
            for model in (fast, eager):
                model.load_state_dict(copy.deepcopy(state), assign=True)
    assert not fast.report.fallbacks and len(fast.report.graphs) == 4


def test_dropout_beside_statistics() -> None:
    class Dropped(Normalized):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    fast, eager = pair(Dropped)
    for shape in SHAPES:
        x = torch.randn(*shape, WIDTH)
        fast(x), eager(x)
        torch.testing.assert_close(dict(fast.named_buffers()), dict(eager.named_buffers()))
    assert not fast.report.fallbacks and fast.report.graphs


def test_an_attribute_is_the_value_that_is_returned() -> None:
    class Both(Net):
        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    fast, _ = pair(Both)
    for _ in range(3):
        assert fast(torch.randn(2, 5, WIDTH)) is fast.seen
    assert not fast.report.fallbacks and fast.report.graphs


# What is refused ------------------------------------------------------------------------------------------------------


class ReadsItsLast(Net):
    kept = None

    def forward(self, x):
        y = self.first(x)
        y = y if self.kept is None else y + self.kept
        self.kept = y.detach().mean((0, 1))
        return y


class ReadsQuietly(Net):
    """An old value that is only asked for its length, and the answer to which is caught."""

    kept = torch.zeros(3)

    def forward(self, x):
        try:
            more = len(self.kept)
        except Exception:
            more = 0
        self.kept = x.detach()[0]
        return super().forward(x) + more


class Reassigned(WithBuffers):
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return super().forward(x) + self.mean


class Returned(WithBuffers):
    def forward(self, x):
        self.mean.add_(1)
        return super().forward(x) + self.mean, self.mean[:2]


class LeftInAnAttribute(WithBuffers):
    def forward(self, x):
        self.mean.add_(1)
        self.seen = self.mean[:2]
        return super().forward(x) + self.mean


class SharedMemory(WithBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("part", self.mean[2:5])

    def forward(self, x):
        self.mean.add_(1)
        return super().forward(x) + self.part.sum()


class WithGradient(WithBuffers):
    def forward(self, x):
        y = self.first(x)
        self.mean.mul_(0.0).add_(y.mean((0, 1)))
        return self.last(y - self.mean.detach())


class WritesWeights(Net):
    def forward(self, x):
        with torch.no_grad():
            self.last.bias.mul_(0.9)
        return super().forward(x)


class PlainTensor(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(WIDTH)

    def forward(self, x):
        self.seen.add_(1)
        return super().forward(x) + self.seen


class InCheckpoint(Normalized):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Cumulative(Normalized):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, momentum=None)


class PerInstance(Normalized):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(WIDTH, track_running_stats=True)


REFUSED = {
    ReadsItsLast: "reads the value that an earlier call left in its attribute kept",
    ReadsQuietly: "reads the value that an earlier call left in its attribute kept",
    Reassigned: "changes attributes of the model (model: mean)",
    Returned: "returns memory that it writes",
    LeftInAnAttribute: "whose memory another tensor shares",
    SharedMemory: "whose memory another tensor shares",
    WithGradient: "requires a gradient",
    WritesWeights: "writes in place to last.bias",
    PlainTensor: "writes in place to a tensor",
    InCheckpoint: "checkpoints, which may repeat the write",
    Cumulative: "branches on or uses a number that depends on the values",
    PerInstance: "writes in place to the statistics of instance_norm",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_graph_would_not_leave_is_the_originals(kind: type[nn.Module]) -> None:
    fast, eager = pair(kind)
    for shape in SHAPES[:3]:
        x = torch.randn(*shape, WIDTH)
        results = [model(x) for model in (fast, eager)]
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        torch.testing.assert_close(left(fast), left(eager), rtol=0, atol=0)
        if kind is InCheckpoint:
            for result in results:
                result.sum().backward()
            assert fast.norm.num_batches_tracked == eager.norm.num_batches_tracked
    assert not fast.report.graphs and any(REFUSED[kind] in reason for reason in fast.report.fallbacks)


def test_a_buffer_as_the_argument_is_the_originals() -> None:
    class Adds(WithBuffers):
        def forward(self, x):
            self.mean.add_(1)
            return x * 2 + self.mean

    fast, eager = pair(Adds)
    for model in (fast, eager):
        model(torch.randn(WIDTH))
    for _ in range(2):
        torch.testing.assert_close(fast(fast.mean), eager(eager.mean))
        torch.testing.assert_close(fast(fast.mean[:1]), eager(eager.mean[:1]))
        torch.testing.assert_close(fast.mean, eager.mean)
    assert any("writes in place to its argument x" in reason for reason in fast.report.fallbacks)


# Once a call ----------------------------------------------------------------------------------------------------------


def test_a_call_that_goes_another_way_writes_once() -> None:
    class Branches(WithBuffers):
        def forward(self, x):
            self.count += 1
            y = super().forward(x)
            return y * 2 if x.sum() > 0 else y

    fast, eager = pair(Branches)
    x = torch.rand(2, 5, WIDTH)
    for sign in (1, 1, -1, 1, -1, -1):
        is_like(fast, eager, sign * x, gradients=False)
    assert fast.report.graphs and any("another way" in reason for reason in fast.report.fallbacks)


def test_ahead_of_calls_nothing_is_written() -> None:
    fast, eager = pair(RunningMean)
    fast.warmup(torch.randn(2, 5, WIDTH))
    assert fast.report.graphs
    torch.testing.assert_close(fast.state_dict(), eager.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [RunningMean, Reassigned, LastSeen])
def test_under_hooks_on_saved_tensors_a_call_writes_once(kind: type[nn.Module]) -> None:
    fast, eager = pair(kind)
    for _ in range(3):
        with torch.autograd.graph.save_on_cpu():
            is_like(fast, eager, torch.randn(2, 5, WIDTH), gradients=True)


def test_a_checkpoint_around_it_writes_as_often() -> None:
    fast, eager = pair(RunningMean)
    for _ in range(3):
        x = torch.randn(2, 5, WIDTH, requires_grad=True)
        for model in (fast, eager):
            checkpoint(model, x, use_reentrant=False).sum().backward()
        torch.testing.assert_close(fast.state_dict(), eager.state_dict())
    assert fast.report.graphs and "while hooks on saved tensors are active" in fast.report.fallbacks[0]


def test_what_autograd_kept_outlives_later_calls() -> None:
    """Of the first call, which is captured after the original ran, and of calls in eval before some in training."""

    class Keeps(WithBuffers):
        def forward(self, x):
            self.count.add_(1)
            return super().forward(x) * self.variance

    fast, eager = pair(Keeps)
    x = torch.randn(2, 5, WIDTH)
    for model in (fast, eager):
        model(x).sum().backward()
    fast, eager = pair(Uncounted)
    for model in (fast, eager):
        first = F.batch_norm(x.flatten(0, 1).requires_grad_(), model.mean, model.variance, model.last.bias)
        for _ in range(3):
            model(x)
        first.sum().backward()
    assert fast.report.graphs and not fast.report.fallbacks
    torch.testing.assert_close(fast.last.bias.grad, eager.last.bias.grad)


def test_padding_is_kept() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(0))
            self.embed = nn.Embedding(20, WIDTH, padding_idx=0)
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

        def forward(self, ids):
            self.count.add_(1)
            x = self.embed(ids)
            return self.attention(x, x, x, key_padding_mask=ids.eq(0), need_weights=False)[0]

    fast, eager = pair(Encoder)
    ids = torch.tensor([[3, 4, 5, 0, 0, 0], [3, 4, 5, 6, 0, 0]])
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(ids), eager(ids))
    assert fast.count == 3 and fast.report.hits["attention"] and not fast.report.fallbacks
    assert "forward changes count in the model" in str(fast.report.why("padding"))


# Rotary embeddings ----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8, "factor": 4.0}


def phi() -> Any:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **LONG}
    sizes = {"max_position_embeddings": 32, "original_max_position_embeddings": 8}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, **sizes, rope_parameters=rope))


def llama() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, max_position_embeddings=8, rope_parameters=rope)
    )


LENGTHS = (7, 7, 9, 8, 12, 6, 20, 20, 7)  # some beyond the 8 of its training


def logits_are_alike(fast: Any, eager: Any, length: int, gradients: bool) -> None:
    ids = torch.randint(5, 99, (2, length))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    with torch.set_grad_enabled(gradients):
        found, expected = (model(ids, attention_mask=mask, use_cache=False).logits for model in (fast, eager))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    found, expected = (vars(model.model.rotary_emb) for model in (fast, eager))
    torch.testing.assert_close(found["_buffers"], expected["_buffers"], rtol=0, atol=0)
    assert found.get("max_seq_len_cached") == expected.get("max_seq_len_cached")


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1]])
def test_longrope(lengths: tuple[int, ...], gradients: bool, served: list[int]) -> None:
    fast, eager = pair(phi, training=False)
    for length in lengths:
        logits_are_alike(fast, eager, length, gradients)
    assert not fast.report.fallbacks and fast.report.hits["attention"] == 2 and len(served) == len(lengths) - 1


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[::-1]])
def test_dynamic_frequencies(lengths: tuple[int, ...], served: list[int]) -> None:
    """Calls longer than any before, and the first short one after those, change the model by its own Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast, eager = pair(llama, training=False)
        for length in lengths:
            logits_are_alike(fast, eager, length, gradients=False)
    assert len(served) >= 3


@pytest.mark.parametrize("heads", [2, 4])
def test_gradients_under_a_boolean_mask_of_grouped_heads(heads: int) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, heads * WIDTH // 4)

        def forward(self, x, mask):
            q, k = (f(x).unflatten(-1, (-1, WIDTH // 4)).transpose(1, 2) for f in (self.q, self.k))
            mask = mask[:, None, None] & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

    fast, eager = pair(Grouped)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for _ in range(3):
        x = torch.randn(2, 5, WIDTH)
        found, expected = fast(x, mask), eager(x, mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for model, result in ((fast, found), (eager, expected)):
            model.zero_grad()
            result.sin().sum().backward()
        torch.testing.assert_close(fast.q.weight.grad, eager.q.weight.grad, rtol=1e-3, atol=1e-4)
    assert not fast.report.fallbacks and fast.report.graphs
