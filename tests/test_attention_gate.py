"""The gate: all that is attention gets through, nothing that is not, and no number changes.

After the spellings and mutants: one test a row of the pitfalls table in the design.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import compare, compare_gradients, count_attentions, difference, gradients
from mutants import MUTANTS, Mutant, finish
from spellings import SPELLINGS, Spelling
from torch import Tensor, nn

import fxbt

SPELLING_SHAPES = ((2, 6), (3, 9), (4, 11))
BATCH, SEQ, HIDDEN, HEADS, DIM = 2, 6, 16, 4, 4
BY_PRODUCTS = torch.ops.fxbt.attention_by_products.default
FINFO_MIN = torch.finfo(torch.float32).min


def found(fast: Any) -> int:
    """Attentions found in the latest graph."""
    return fast.report.hits.get("attention", 0)


# --- spellings ----------------------------------------------------------------------------------------------


def test_there_are_enough_of_both() -> None:
    assert len(SPELLINGS) >= 30
    assert len(MUTANTS) >= 45
    assert len({s.name for s in SPELLINGS}) == len(SPELLINGS)
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_spelling_is_found_and_stays_equal(spelling: Spelling) -> None:
    model = spelling.make()
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=spelling.inputs(*SPELLING_SHAPES[0]), padding="keep")
        for shape in SPELLING_SHAPES:
            inputs = spelling.inputs(*shape)
            compare(fast(**inputs), model(**inputs))
    assert found(fast) == spelling.found, fast.report.why("attention")
    assert fast.report.fallbacks == []
    assert len(fast.report.graphs) == 1


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_spelling_in_one_row_and_one_position_stays_equal(spelling: Spelling) -> None:
    """Sizes of one as the example, then others: what was learned from a one must not be used for more."""
    model = spelling.make()
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=spelling.inputs(1, 1), padding="keep")
        for shape in ((1, 1), (1, 8), (3, 1), (2, 5)):
            inputs = spelling.inputs(*shape)
            compare(fast(**inputs), model(**inputs))


GRADIENT_SPELLINGS = [
    spelling
    for spelling in SPELLINGS
    if spelling.name
    in {
        "additive_finfo_min",
        "alibi",
        "attention_sink",
        "attention_sink_as_a_factor",
        "causal_buffer",
        "differential_attention",
        "fused_qkv_five_dims_unbind",
        "grouped_heads_expanded",
        "head_mask_after_softmax",
        "relative_bias",
        "scale_per_head",
        "softmax_by_exp_and_sum",
    }
]


@pytest.mark.parametrize("spelling", GRADIENT_SPELLINGS, ids=str)
def test_spelling_has_the_originals_gradients(spelling: Spelling) -> None:
    model = spelling.make()
    fast = fxbt.optimize(model, example_inputs=spelling.inputs(2, 6), padding="keep")
    compare_gradients(*gradients(model, fast, spelling.inputs(3, 9)))
    assert found(fast) == spelling.found, fast.report.why("attention")


@pytest.mark.parametrize("spelling", [s for s in GRADIENT_SPELLINGS if s.name != "alibi"], ids=str)
def test_spelling_in_bfloat16_is_no_worse_than_eager(spelling: Spelling) -> None:
    model = spelling.make().to(torch.bfloat16)
    exact = spelling.make()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    errors = torch.zeros(2, dtype=torch.float64)

    def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}

    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=cast(spelling.inputs(2, 6), torch.bfloat16), padding="keep")
        for seq in range(4, 16):
            inputs = cast(spelling.inputs(3, seq), torch.bfloat16)
            want = exact(**cast(inputs, torch.float64))
            actual, expected = fast(**inputs), model(**inputs)
            assert actual.dtype == expected.dtype
            errors += torch.stack([(t.double() - want).abs().mean() for t in (actual, expected)])
    assert found(fast) == spelling.found, fast.report.why("attention")
    assert errors[0] <= 1.05 * errors[1], f"error against fp64 {errors[0]:.4g}, eager's own {errors[1]:.4g}"


# --- mutants ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tally() -> Iterator[dict[str, int]]:
    """Mutant -> attentions found in it; printed when all have run (`pytest -s`)."""
    counts: dict[str, int] = {}
    yield counts
    replaced = sorted(name for name, count in counts.items() if count)
    print(f"\n{len(counts)} mutants stayed equal, {len(replaced)} of them rewritten: {', '.join(replaced)}")


def compare_where_not_nan(actual: Tensor, expected: Tensor) -> None:
    """Equal; where the original is NaN (rows masked by -inf throughout), zero will do."""
    masked = expected.isnan() & (actual == 0)
    compare(actual.masked_fill(masked, float("nan")), expected)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_stays_equal(mutant: Mutant, tally: dict[str, int]) -> None:
    model = mutant.make()
    check = compare_where_not_nan if mutant.nan_rows else compare
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs=mutant.inputs(*mutant.shapes[0], 0), padding="keep")
        assert fast.report.graphs, fast.report.fallbacks
        count = found(fast)
        for seed, shape in enumerate((mutant.shapes[0], *mutant.shapes)):
            inputs = mutant.inputs(*shape, seed)
            check(fast(**inputs), model(**inputs))
    assert fast.report.fallbacks == []
    assert not (mutant.must_stay and count), f"replaced {count}\n{fast.report.diff()}"
    tally[mutant.name] = count


# --- one test a pitfall -------------------------------------------------------------------------------------


class Small(nn.Module):
    """Projections for a function of (module, x, ...)."""

    def __init__(self, compute: Callable[..., Any]):
        super().__init__()
        self.compute = compute
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.last = nn.Parameter(torch.randn(DIM, DIM))
        self.dropout = nn.Dropout(0.3)
        self.table = nn.Parameter(torch.randn(2, HEADS, 1, 32))
        self.register_buffer("triangle", torch.ones(32, 32).tril().bool())

    def forward(self, x: Tensor) -> Any:
        return finish(self.compute(self, x), self.last)


def heads(tensor: Tensor) -> Tensor:
    """[b, s, h*d] -> [b, h, s, d]"""
    return tensor.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def scored(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled scores and v."""
    return heads(m.q(x)) @ heads(m.k(x)).mT * DIM**-0.5, heads(m.v(x))


def small(compute: Callable[..., Any]) -> nn.Module:
    """A `Small` of lively weights in eval mode."""
    torch.manual_seed(1)
    model = Small(compute)
    for linear in (model.q, model.k, model.v, model.out):
        nn.init.normal_(linear.weight, std=1.3 * HIDDEN**-0.5)
    return model.eval()


def states(batch: int = BATCH, seq: int = SEQ) -> Tensor:
    """Random (batch, seq, hidden)."""
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(10 * batch + seq))


def check(compute: Callable[..., Any], expected: int, tolerance: float = 1e-5) -> Any:
    """Optimise a `Small`, compare on three shapes, and check how many attentions were found."""
    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        for batch, seq in ((BATCH, SEQ), (3, 9), (1, 7)):
            x = states(batch, seq)
            compare(fast(x=x), model(x=x), atol_of_magnitude=tolerance)
    assert found(fast) == expected, fast.report.why("attention")
    return fast


def test_pitfall_aliasing_copy() -> None:
    """The scores seen through an alias are overwritten before the softmax."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        alias = scores.view(-1, scores.shape[-1])
        alias.copy_(alias.flip(-1))
        return scores.softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        compare(fast(x=states(3, 9)), model(x=states(3, 9)))


def test_pitfall_fully_masked_row_with_infinity() -> None:
    """Eager gives NaN, SDPA zeros: accepted in that row alone."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        empty = (torch.arange(x.shape[1]) == 2)[:, None]
        return scores.masked_fill(empty, float("-inf")).softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        actual, expected = fast(x=states(3, 9)), model(x=states(3, 9))
    assert expected[:, :, 2].isnan().all()
    assert (actual[:, :, 2].isnan() | (actual[:, :, 2] == 0)).all()
    others = [0, 1, *range(3, 9)]
    compare(actual[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("fill", [FINFO_MIN, -1e9, -1e4, -50.0, -1.0])
@pytest.mark.parametrize("added", [True, False])
def test_pitfall_fully_masked_row_with_a_finite_fill(fill: float, added: bool) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        blocked = (torch.arange(x.shape[1]) == 2)[:, None] | (torch.arange(x.shape[1]) > 3)
        if added:
            return (scores + blocked * fill).softmax(-1) @ v
        return scores.masked_fill(blocked, fill).softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        for shape in ((2, 6), (3, 9), (1, 7)):
            compare(fast(x=states(*shape)), model(x=states(*shape)))
    if added or fill < -1e8:
        assert found(fast) == 1, fast.report.why("attention")


@pytest.mark.parametrize(("fill", "order_shows"), [(FINFO_MIN, 0), (-1e9, 0), (-1e6, 1), (-1e4, 1), (-100.0, 0)])
def test_pitfall_mask_added_to_another_bias(fill: float, order_shows: int) -> None:
    """Where a mask rounds the scores and the bias, their order shows in a row of masked keys alone."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        place = torch.arange(x.shape[1])
        blocked = (place == 2)[:, None] | (place > 3)
        distance = (place[:, None] - place).float()
        return (scores + 0.37 * distance + blocked * fill).softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        for shape in ((2, 6), (3, 9), (1, 7)):
            compare(fast(x=states(*shape)), model(x=states(*shape)))
    assert found(fast) == 1, fast.report.why("attention")
    written = [node for node in fast.report.latest.module.graph.nodes if node.target is BY_PRODUCTS]
    assert len(written) == order_shows


def test_pitfall_finfo_min_plus_zeroing() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        blocked = (torch.arange(x.shape[1]) == 2)[:, None] | (torch.arange(x.shape[1]) > 3)
        return scores.masked_fill(blocked, FINFO_MIN).softmax(-1).masked_fill(blocked, 0.0) @ v

    check(compute, expected=1)


def test_pitfall_bfloat16() -> None:
    """Over many seeds no worse than eager against fp64."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        return scores.softmax(-1) @ v

    model = small(compute).to(torch.bfloat16)
    exact = small(compute)
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    errors = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states().bfloat16()}, padding="keep")
        for seq in range(3, 23):
            x = states(4, seq).bfloat16()
            want = exact(x=x.double())
            errors += torch.stack([(m(x=x).double() - want).abs().mean() for m in (fast, model)])
    assert found(fast) == 1, fast.report.why("attention")
    assert errors[0] <= 1.05 * errors[1], f"error against fp64 {errors[0]:.4g}, eager's own {errors[1]:.4g}"


@pytest.mark.parametrize("wide", ["q", "k", "v", "qk", "weights"])
def test_pitfall_mixed_dtypes(wide: str) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        q = q.double() if "q" in wide else q
        k = k.double() if "k" in wide else k
        scores = torch.matmul(q.to(k.dtype), k.mT.to(k.dtype)) * DIM**-0.5
        scores = scores.double() if wide == "weights" else scores
        weights = scores.softmax(-1)
        v = v.double() if wide == "v" else v.to(weights.dtype)
        return weights.to(v.dtype) @ v

    fast = check(compute, expected=1)
    assert fast.report.fallbacks == []


def test_pitfall_training_dropout() -> None:
    """In training the dropout stays, with its probability: the mean and the mean gradient are the original's."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        return m.dropout(scores.softmax(-1)) @ v

    model = small(compute).train()
    x = states()
    fast = fxbt.optimize(model, example_inputs={"x": x}, padding="keep")
    runs = 600
    means, grads, spreads = [], [], []
    for run in (fast, model):
        model.zero_grad()
        samples = torch.stack([run(x=x) for _ in range(runs)])
        samples.square().sum().div(runs).backward()
        means.append(samples.detach().mean(0))
        spreads.append(samples.detach().std(0).mean())
        grads.append(model.q.weight.grad.clone())
    assert fast.report.fallbacks == []
    error, magnitude = difference(*means)
    assert error < 0.15 * magnitude, "the mean under dropout is another one"
    assert abs(spreads[0] / spreads[1] - 1) < 0.1, f"dropout's spread is {spreads[0]:.3g}, expected {spreads[1]:.3g}"
    similarity = F.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0)
    assert similarity > 0.97, f"gradients under dropout point elsewhere: cosine {similarity:.3f}"
    model.eval()
    with torch.no_grad():
        compare(fast(x=x), model(x=x))


def test_pitfall_weights_also_returned() -> None:
    def compute(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, v = scored(m, x)
        weights = scores.softmax(-1)
        return weights @ v, weights

    check(compute, expected=0)


def test_pitfall_bias_of_the_scores() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        return (scores + scores.mean(-2, keepdim=True)).softmax(-1) @ v

    check(compute, expected=0)


def test_pitfall_multiplicative_term_along_keys() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        return (scores * x.square().mean(-1)[:, None, None, :] + 1.0).softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        compare(fast(x=states(3, 9)), model(x=states(3, 9)))


def test_pitfall_strides_before_a_view() -> None:
    """A view that the product's contiguous layout allows, and SDPA's may not."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        context = scores.softmax(-1) @ v
        folded = context.view(x.shape[0] * HEADS, x.shape[1], DIM)
        return folded.view(x.shape[0], HEADS, -1)

    check(compute, expected=1)


def test_pitfall_mask_of_a_part_of_a_folded_axis() -> None:
    """Windows folded into the batch, a mask for each window (Swin's way)."""

    def compute(m: Any, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        windows = torch.stack([x, x.flip(1), x * 2.0], dim=1).flatten(0, 1)
        scores, v = scored(m, windows)
        block = (torch.arange(3)[:, None, None] + torch.arange(seq)[None, None, :]) % 3 == 0
        bias = (block & (torch.arange(seq) > 0)).float()[:, None] * -100.0
        scores = (scores.view(batch, 3, HEADS, seq, seq) + bias[None]).view(-1, HEADS, seq, seq)
        return m.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, 3, seq, HIDDEN))

    check(compute, expected=1)


def test_pitfall_size_that_is_one_by_its_range() -> None:
    """`[:1]` of a dynamic axis is of size Min(1, s)."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        bias = torch.einsum("bid,bjd->bij", x, x)[:1, -1:].unsqueeze(1)
        return (scores + bias).softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        for shape in ((2, 6), (3, 9), (1, 7)):
            compare(fast(x=states(*shape)), model(x=states(*shape)))
    assert fast.report.fallbacks == []


class CachingPositions(nn.Module):
    """Attention whose bias is computed once and kept, as rotary tables often are."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            position = torch.arange(32)
            self.cache = -(position[:, None] - position[None]).abs().float()
        scores, v = scored(self, x)
        context = (scores + self.cache[: x.shape[1], : x.shape[1]]).softmax(-1) @ v
        return self.out(context.transpose(1, 2).flatten(2))


def test_pitfall_tensors_cached_inside() -> None:
    torch.manual_seed(1)
    model = CachingPositions().eval()
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        for shape in ((2, 6), (3, 9), (1, 7)):
            compare(fast(x=states(*shape)), model(x=states(*shape)))
    assert found(fast) == 1, fast.report.why("attention")
    assert type(model.cache) is Tensor


def test_pitfall_slice_assigned_bias() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        scores[:, :, 1:, 1:] += m.table[0, :, :, : x.shape[1] - 1]
        return scores.softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        for shape in ((2, 6), (3, 9), (1, 7)):
            compare(fast(x=states(*shape)), model(x=states(*shape)))


def test_pitfall_scale_not_given_is_one() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        return (heads(m.q(x)) @ heads(m.k(x)).mT).softmax(-1) @ heads(m.v(x))

    check(compute, expected=1)


# --- beyond the table ---------------------------------------------------------------------------------------


def causal_by_buffer(m: Any, x: Tensor) -> Tensor:
    """nanoGPT's mask."""
    scores, v = scored(m, x)
    return scores.masked_fill(~m.triangle[: x.shape[1], : x.shape[1]], float("-inf")).softmax(-1) @ v


def test_causal_mask_is_proven_and_not_computed() -> None:
    fast = check(causal_by_buffer, expected=1)
    (sdpa,) = [node for node in latest(fast).nodes if "scaled_dot_product" in str(node.target)]
    assert sdpa.kwargs.get("is_causal", len(sdpa.args) > 5 and sdpa.args[5]), fast.report.after
    assert "triangle" not in fast.report.after


def test_sequence_longer_than_the_causal_buffer_is_the_originals_error() -> None:
    """The mask that is_causal stands for has an end; the original says so."""
    model = small(causal_by_buffer)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        with pytest.raises(RuntimeError, match="must match the size"):
            model(x=states(2, 40))
        with pytest.raises(RuntimeError, match="must match the size"):
            fast(x=states(2, 40))


def latest(fast: Any) -> torch.fx.Graph:
    """The graph of the latest capture."""
    return list(fast.report.graphs.values())[-1].module.graph


def test_causal_buffer_changed_after_capture() -> None:
    """What was proven of a buffer's content holds only as long as the content does."""
    model = small(causal_by_buffer)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        compare(fast(x=states()), model(x=states()))
        model.triangle.fill_(True)
        compare(fast(x=states()), model(x=states()))
        model.triangle.copy_(torch.ones(32, 32).tril(2).bool())
        compare(fast(x=states(3, 9)), model(x=states(3, 9)))


def test_causal_buffer_replaced_after_capture() -> None:
    model = small(causal_by_buffer)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        model.triangle = torch.ones(32, 32).tril(1).bool()
        compare(fast(x=states()), model(x=states()))


def test_causal_buffer_changed_through_data_after_capture() -> None:
    """`.data` writes do not count up `_version`."""
    model = small(causal_by_buffer)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        model.triangle.data = torch.ones(32, 32).tril(1).bool()
        compare(fast(x=states()), model(x=states()))


@pytest.mark.parametrize("cut", ["weights", "scores", "query", "value"])
def test_stopped_gradients_stay_stopped(cut: str) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        q, k, v = heads(m.q(x)), heads(m.k(x)), heads(m.v(x))
        q = q.detach() if cut == "query" else q
        v = v.detach() if cut == "value" else v
        scores = q @ k.mT * DIM**-0.5
        scores = scores.detach() if cut == "scores" else scores
        weights = scores.softmax(-1)
        return (weights.detach() if cut == "weights" else weights) @ v

    model = small(compute)
    fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
    actual, expected = gradients(model, fast, {"x": states(3, 9)})
    compare_gradients(actual, expected)


def test_learned_mask_has_its_gradient() -> None:
    """A float bias that needs a gradient must stay in the computation."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        return (scores + m.table[0, :, :, : x.shape[1]]).softmax(-1) @ v

    model = small(compute)
    fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
    actual, expected = gradients(model, fast, {"x": states(3, 9)})
    assert expected["table"].abs().max() > 0
    compare_gradients(actual, expected)
    assert found(fast) == 1, fast.report.why("attention")


@pytest.mark.parametrize("fill", [FINFO_MIN, -1e9])
@pytest.mark.parametrize("added", [True, False])
def test_gradients_in_fully_masked_rows(fill: float, added: bool) -> None:
    """torch's flash kernel on CPU forgets the row's sum in the backward of such a row (1.9 off on gradients of 1).

    And masked_fill stops the gradient of what it fills; an added bias does not.
    """

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        blocked = (torch.arange(x.shape[1]) == 2)[:, None] | (torch.arange(x.shape[1]) > 3)
        masked = scores + blocked * fill if added else scores.masked_fill(blocked, fill)
        return masked.softmax(-1) @ v

    model = small(compute)
    fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
    compare_gradients(*gradients(model, fast, {"x": states(3, 9)}))


def _trained_alike(function: Callable[..., Tensor]) -> Any:
    """Gradients of query and key as the original's, in training; the optimised model's report."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, SEQ, DIM) for _ in range(3))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Parameter(q), nn.Parameter(k)

        def forward(self, v: Tensor) -> Tensor:
            return function(self.q, self.k, v)

    model = Model()
    fast = fxbt.optimize(model, example_inputs=(v,), padding="keep")
    weights = torch.randn(BATCH, HEADS, SEQ, DIM)
    grads = []
    for run in (fast, model):
        model.zero_grad()
        (run(v) * weights).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    compare_gradients(*grads)
    return fast.report


def test_gradients_in_rows_that_two_fills_mask_together() -> None:
    first, second = torch.arange(SEQ) < 3, torch.ones(SEQ, SEQ).tril().bool()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(first, FINFO_MIN).masked_fill(~second, FINFO_MIN)
        return scores.softmax(-1) @ v

    assert _trained_alike(attend).hits["attention"] == 1


def test_gradients_in_rows_that_a_fill_and_a_bias_mask_together() -> None:
    """A fill stops the gradient, a bias does not: left as it is where there are gradients (GPT-Neo's way)."""
    padded, causal = torch.arange(SEQ) < 3, torch.ones(SEQ, SEQ).tril().bool()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.where(causal, q @ k.mT, FINFO_MIN) + torch.where(padded, FINFO_MIN, 0.0)
        return scores.softmax(-1) @ v

    report = _trained_alike(attend)
    assert report.hits["attention"] == 0
    assert "masked by a fill and by a bias" in report.why("attention")


def test_gradients_of_a_fill_behind_a_small_bias() -> None:
    slopes, causal = -torch.arange(SEQ).float(), torch.ones(SEQ, SEQ).tril().bool()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(causal, q @ k.mT + slopes, FINFO_MIN).softmax(-1) @ v

    assert _trained_alike(attend).hits["attention"] == 1


def test_writes_of_data_in_place_train() -> None:
    """aten.copy, which functionalising leaves behind, has no derivative."""

    def compute(m: Any, x: Tensor) -> Tensor:
        scores, v = scored(m, x)
        scores[..., 0] = m.k(x)[:, None, :, 0]
        return scores.softmax(-1) @ v

    model = small(compute)
    fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
    compare_gradients(*gradients(model, fast, {"x": states(3, 9)}))


@pytest.mark.parametrize("names", [("q", "k", "v"), ("k", "v"), ("q", "v")])
def test_qkv_merge_follows_its_weights(names: tuple[str, ...]) -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        source = {name: x if name in names else x.tanh() for name in ("q", "k", "v")}
        q, k, v = heads(m.q(source["q"])), heads(m.k(source["k"])), heads(m.v(source["v"]))
        return (q @ k.mT * DIM**-0.5).softmax(-1) @ v

    model = small(compute)
    with torch.no_grad():
        fast = fxbt.optimize(model, example_inputs={"x": states()}, padding="keep")
        assert fast.report.hits.get("qkv", 0) == 1, fast.report.why("qkv")
        for linear in (model.q, model.k, model.v):
            linear.weight.mul_(-0.5)
            linear.bias.add_(1.0)
            compare(fast(x=states(3, 9)), model(x=states(3, 9)))


def test_every_mutant_and_spelling_makes_what_it_says() -> None:
    """The spellings' counts, checked against the softmax and SDPA calls they make (those by exp make none)."""
    hidden = ("softmax_by_exp_and_sum", "exponential", "flash_attention_in_one_block")
    for spelling in SPELLINGS:
        calls = count_attentions(spelling.make(), spelling.inputs(2, 6))
        assert calls == (0 if spelling.name.startswith(hidden) else spelling.attentions), spelling.name
