"""Almost attention: modules one small change away from it, where a careless rewrite to SDPA gives a wrong number.

Whatever fxbt does with a mutant, its outputs must stay those of the original. Some of them can be written as SDPA by
someone who looks closely (a scale on the weights belongs to V); `must_stay` marks those which cannot be, or where the
weights are needed besides. Heads, head_dim, batch and the first example's sequence all have size 4, so that no shape
tells one axis from another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = DIM = 4
HIDDEN = HEADS * DIM
CONTEXT = 16
SCALE = DIM**-0.5
SHAPES = ((4, 4), (2, 7), (3, 9), (1, 12))
FOUR_POSITIONS = ((4, 4), (2, 4), (3, 4))
FINFO_MIN = torch.finfo(torch.float32).min
INF = float("inf")


@dataclass(frozen=True)
class Mutant:
    """One module that is almost attention.

    Attributes:
        make: a new module with fixed weights, in eval mode.
        inputs: (batch, seq, seed) -> keyword arguments.
        shapes: (batch, seq) to run; the first is the example.
        must_stay: no SDPA computes this; it must not be replaced at all.
        nan_rows: rows are fully masked by -inf: NaN in the original, where SDPA gives zeros (documented).
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], dict[str, Tensor]]
    shapes: tuple[tuple[int, int], ...] = SHAPES
    must_stay: bool = False
    nan_rows: bool = False

    def __str__(self) -> str:
        return self.name


def finish(result: Any, weight: Tensor) -> Any:
    """The context [..., d] times a matrix: a bare one as output is refused for its strides, and proves nothing."""
    if isinstance(result, tuple):
        return finish(result[0], weight), *result[1:]
    return F.linear(result, weight.to(result.dtype)) if result.shape[-1] == DIM else result


class Mutated(nn.Module):
    """Projections and small parameters for `compute(self, x)`."""

    triangle: Tensor
    almost_triangle: Tensor

    def __init__(self, compute: Callable[[Any, Tensor], Any]):
        super().__init__()
        self.compute = compute
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.kv_small = nn.Linear(HIDDEN, 2 * 2 * DIM)
        self.gate = nn.Linear(HIDDEN, HEADS)
        self.mix = nn.Linear(HEADS, HEADS)
        self.last = nn.Parameter(torch.randn(DIM, DIM))
        self.head_scale = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        self.by_key = nn.Parameter(torch.randn(CONTEXT))
        self.by_pair = nn.Parameter(torch.randn(CONTEXT, CONTEXT))
        self.by_head_pair = nn.Parameter(torch.randn(HEADS, CONTEXT, CONTEXT))
        triangle = torch.ones(CONTEXT, CONTEXT).tril()
        self.register_buffer("triangle", triangle)
        self.register_buffer("almost_triangle", triangle.clone().index_fill_(1, torch.tensor([5]), 0.0))

    def forward(self, x: Tensor) -> Any:
        return finish(self.compute(self, x), self.last)


def states(batch: int, seq: int, seed: int) -> dict[str, Tensor]:
    """x of (batch, seq, hidden)."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * batch + seq)
    return {"x": 1.5 * torch.randn(batch, seq, HIDDEN, generator=generator)}


MUTANTS: list[Mutant] = []
Compute = Callable[[Any, Tensor], Any]


def mutant(
    *, must_stay: bool = False, nan_rows: bool = False, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> Callable[[Compute], Compute]:
    """Register a function of (module, x) as a mutant under its own name."""

    def register(compute: Compute) -> Compute:
        def make() -> nn.Module:
            torch.manual_seed(5)
            module = Mutated(compute)
            for linear in (module.q, module.k, module.v, module.out, module.kv_small):
                nn.init.normal_(linear.weight, std=HIDDEN**-0.5)
            return module.eval()

        name = compute.__name__.strip("_")
        MUTANTS.append(Mutant(name, make, states, shapes, must_stay, nan_rows))
        return compute

    return register


def heads(tensor: Tensor, count: int = HEADS) -> Tensor:
    """[b, s, h*d] -> [b, h, s, d]"""
    return tensor.unflatten(-1, (count, DIM)).transpose(1, 2)


def qkv(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [b, h, s, d]."""
    return heads(m.q(x)), heads(m.k(x)), heads(m.v(x))


def scored(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled scores [b, h, q, k], and v."""
    q, k, v = qkv(m, x)
    return q @ k.mT * SCALE, v


def padded(x: Tensor) -> Tensor:
    """True at padding, [b, 1, 1, k]: the last position of every row and more of later rows; never the first."""
    position = torch.arange(x.shape[1])
    length = x.shape[1] - torch.arange(x.shape[0])[:, None] % 3 - 1
    return ((position >= length) & (position > 0))[:, None, None, :]


def some_rows_padded(x: Tensor) -> Tensor:
    """True at padding, [b, 1, q, k]: rows 0 and 2 see no key at all."""
    position = torch.arange(x.shape[1])
    nothing = (position % 2 == 0) & (position < 3)
    return nothing[None, None, :, None] | padded(x)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """i [q, 1] and j [1, k]."""
    position = torch.arange(x.shape[1])
    return position[:, None], position[None, :]


def keep(scores: Tensor, allowed: Tensor, v: Tensor, fill: float = -INF) -> Tensor:
    """Attention where `allowed`."""
    return scores.masked_fill(~allowed, fill).softmax(-1) @ v


# --- softmax over something else ----------------------------------------------------------------------------


@mutant(must_stay=True)
def softmax_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-2) @ v


@mutant(must_stay=True)
def softmax_over_heads(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(1) @ v


@mutant(must_stay=True)
def softmax_over_the_batch(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(0) @ v


@mutant(must_stay=True)
def softmax_over_keys_and_heads(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    joint = scores.permute(0, 2, 1, 3).flatten(2).softmax(-1)
    return joint.unflatten(-1, (HEADS, x.shape[1])).permute(0, 2, 1, 3) @ v


@mutant(must_stay=True)
def softmax_over_keys_and_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.flatten(2).softmax(-1).view(scores.shape) @ v


@mutant(must_stay=True)
def softmax_twice(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).softmax(-1) @ v


@mutant(must_stay=True)
def softmax_over_queries_then_keys(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-2).softmax(-1) @ v


@mutant(must_stay=True)
def exp_summed_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-2, keepdim=True) @ v


@mutant(must_stay=True)
def exp_less_the_maximum_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    powers = torch.exp(scores - scores.amax(-2, keepdim=True))
    return powers / powers.sum(-1, keepdim=True) @ v


@mutant(must_stay=True)
def softmax_plus_one(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    powers = torch.exp(scores)
    return powers / (powers.sum(-1, keepdim=True) + 1.0) @ v


@mutant(must_stay=True)
def exp_not_divided(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.exp(scores - scores.amax(-1, keepdim=True)) @ v


@mutant(must_stay=True)
def sigmoid_instead(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.sigmoid() @ v


@mutant(must_stay=True)
def log_softmax_instead(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.log_softmax(-1) @ v


@mutant(must_stay=True)
def relu_weights_normalised(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.relu()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


@mutant(must_stay=True)
def softmax_in_half(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1, dtype=torch.float16).float() @ v


@mutant()
def softmax_in_double(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1, dtype=torch.float64).to(x.dtype) @ v


@mutant()
def softmax_in_double_kept(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.double().softmax(-1) @ v.double()


@mutant()
def softmin(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return F.softmin(scores, dim=-1) @ v


@mutant()
def softmax_of_two_halves(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores[..., :2].softmax(-1) @ v[:, :, :2] + scores[..., 2:].softmax(-1) @ v[:, :, 2:]


# --- what is done to the weights ----------------------------------------------------------------------------


@mutant()
def weights_normalised_again(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights / weights.sum(-1, keepdim=True) @ v


@mutant(must_stay=True)
def weights_normalised_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights / (1e-9 + weights.sum(-2, keepdim=True)) @ v


@mutant(must_stay=True)
def weights_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v, weights


@mutant(must_stay=True)
def weights_averaged_and_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v, weights.mean(1)


@mutant(must_stay=True)
def weights_summed_over_queries_too(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v + weights.sum(-2).unsqueeze(-1)


@mutant(must_stay=True)
def weights_squared(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) ** 2 @ v


@mutant(must_stay=True)
def weights_thresholded(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights.where(weights > 0.2, 0.0) @ v


@mutant(must_stay=True)
def weights_thresholded_and_renormalised(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    weights = weights.masked_fill(weights < 0.15, 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ v


@mutant(must_stay=True)
def weights_clamped(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).clamp(max=0.3) @ v


@mutant(must_stay=True)
def weights_cumulated(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).cumsum(-1) @ v


@mutant()
def weights_times_a_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) * 0.7 @ v


@mutant()
def weights_plus_a_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.softmax(-1) + 0.1) @ v


@mutant()
def weights_minus_identity(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (torch.eye(x.shape[1]) - scores.softmax(-1)) @ v


@mutant()
def weights_times_something_of_the_key(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) * m.by_key[: x.shape[1]] @ v


@mutant()
def weights_times_something_of_the_query(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) * m.by_key[: x.shape[1], None] @ v


@mutant(must_stay=True)
def weights_times_something_of_the_pair(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) * m.by_pair[: x.shape[1], : x.shape[1]] @ v


@mutant(must_stay=True)
def weights_masked_causally_without_renormalising(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return (scores.softmax(-1) * (j <= i)) @ v


@mutant()
def weights_masked_by_key_without_renormalising(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).masked_fill(padded(x), 0.0) @ v


@mutant()
def weights_masked_other_than_the_scores(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    weights = scores.masked_fill(padded(x), FINFO_MIN).softmax(-1)
    return weights.masked_fill(j > i, 0.0) @ v


@mutant()
def weights_masked_inverted(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    padding = padded(x)
    return scores.masked_fill(padding, FINFO_MIN).softmax(-1).masked_fill(~padding, 0.0) @ v


@mutant(must_stay=True)
def weights_transposed(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).mT @ v


@mutant()
def weights_rolled_along_keys(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).roll(1, dims=-1) @ v


@mutant()
def weights_flipped(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).flip(-1) @ v


@mutant()
def weights_without_the_first_key(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1)[..., 1:] @ v[:, :, 1:]


@mutant()
def weights_times_themselves(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ weights @ v


@mutant()
def two_contractions_of_the_weights(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v + weights @ heads(x)


@mutant()
def weights_rounded(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).mul(8).round().div(8) @ v


@mutant()
def top_row_zeroed(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return torch.cat([torch.zeros_like(weights[:, :, :1]), weights[:, :, 1:]], dim=2) @ v


# --- what is done to the scores -----------------------------------------------------------------------------


@mutant(must_stay=True)
def relu_of_scores(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.relu().softmax(-1) @ v


@mutant()
def softcap(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (2.0 * torch.tanh(scores / 2.0)).softmax(-1) @ v


@mutant()
def softcap_on_a_bias(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    place = torch.arange(x.shape[1])
    return (2.0 * torch.tanh((scores - (place[:, None] - place).abs()) / 2.0)).softmax(-1) @ v


@mutant(must_stay=True)
def softcap_on_a_mask(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    later = torch.arange(x.shape[1])[:, None] < torch.arange(x.shape[1])
    return (2.0 * torch.tanh(scores.masked_fill(later, FINFO_MIN) / 2.0)).softmax(-1) @ v


@mutant(must_stay=True)
def softcap_twice(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (2.0 * torch.tanh(torch.tanh(scores / 2.0))).softmax(-1) @ v


@mutant(must_stay=True)
def softcap_by_query(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (x[:, None, :, :1] * torch.tanh(scores / 2.0)).softmax(-1) @ v


@mutant(must_stay=True)
def sigmoid_in_the_place_of_a_softcap(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (2.0 * torch.sigmoid(scores / 2.0)).softmax(-1) @ v


@mutant(must_stay=True)
def scores_clamped(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.clamp(-1.0, 1.0).softmax(-1) @ v


@mutant()
def scores_clamped_at_the_lowest_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(padded(x), -INF).clamp(min=FINFO_MIN).softmax(-1) @ v


@mutant()
def fully_masked_rows_clamped_at_the_lowest_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(some_rows_padded(x), -INF).clamp(min=FINFO_MIN).softmax(-1) @ v


@mutant(must_stay=True)
def scores_squared(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.square().softmax(-1) @ v


@mutant(must_stay=True)
def scores_absolute(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.abs().softmax(-1) @ v


@mutant(must_stay=True)
def scores_as_divisor(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (1.0 / (scores + 20.0)).mul(50.0).softmax(-1) @ v


@mutant(must_stay=True)
def bias_of_the_scores_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores - scores.mean(-2, keepdim=True)).softmax(-1) @ v


@mutant()
def bias_of_the_scores_over_keys(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + 3.0 * scores.mean(-1, keepdim=True)).softmax(-1) @ v


@mutant(must_stay=True)
def bias_of_the_scores_themselves(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + scores.sin()).softmax(-1) @ v


@mutant(must_stay=True)
def scores_normalised(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores / scores.norm(dim=-1, keepdim=True) * 3.0).softmax(-1) @ v


@mutant()
def scores_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v, scores


@mutant()
def scores_plus_their_transpose(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + scores.mT).softmax(-1) @ v


@mutant()
def scores_transposed(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.mT.softmax(-1) @ v


@mutant()
def scores_rolled_along_keys(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.roll(1, dims=-1).softmax(-1) @ v


@mutant()
def scores_of_other_heads(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.flip(1).softmax(-1) @ v


@mutant()
def two_scores_added(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + heads(x) @ v.mT).softmax(-1) @ v


@mutant(must_stay=True)
def two_scores_multiplied(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * (heads(x) @ v.mT)).softmax(-1) @ v


@mutant()
def noise_as_bias(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    noise = torch.log(x[..., :1].abs() + 0.1)[:, None] - torch.log(x[..., 1].abs() + 0.1)[:, None, None]
    return ((scores + noise) / 0.7).softmax(-1) @ v


@mutant(must_stay=True)
def best_scores_alone(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    third = scores.topk(3, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < third, -INF).softmax(-1) @ v


@mutant(must_stay=True)
def talking_heads_before_softmax(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.einsum("bhqk,gh->bgqk", scores, m.mix.weight).softmax(-1) @ v


@mutant(must_stay=True)
def talking_heads_after_softmax(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return m.mix(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


@mutant()
def sum_over_heads_before_softmax(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.sum(1, keepdim=True).softmax(-1) @ v


@mutant()
def mean_over_heads_after_softmax(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1).mean(1, keepdim=True) @ v


# --- scale --------------------------------------------------------------------------------------------------


@mutant()
def scale_after_the_bias(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return ((q @ k.mT + m.by_pair[: x.shape[1], : x.shape[1]]) * 0.3).softmax(-1) @ v


@mutant()
def scale_on_the_value(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ (v * 0.5)


@mutant()
def scale_on_the_value_and_the_context(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ (v / 3.0) * 2.0


@mutant()
def negative_scale(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (1.5 - scores * 2.0).softmax(-1) @ v


@mutant()
def scale_of_zero(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * 0.0).softmax(-1) @ v


@mutant()
def scale_of_the_query(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * m.gate(x).transpose(1, 2).unsqueeze(-1)).softmax(-1) @ v


@mutant()
def scale_of_the_key(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * m.gate(x).transpose(1, 2).unsqueeze(-2)).softmax(-1) @ v


@mutant(must_stay=True)
def scale_of_the_pair(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * m.by_pair[: x.shape[1], : x.shape[1]]).softmax(-1) @ v


@mutant()
def scale_of_the_batch(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * x.mean((1, 2)).exp().view(-1, 1, 1, 1)).softmax(-1) @ v


@mutant()
def scale_of_the_key_after_a_mask(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.masked_fill(padded(x), -2.0) * m.by_key[: x.shape[1]]).softmax(-1) @ v


@mutant()
def query_times_a_vector_of_its_position(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return ((q * m.by_key[: x.shape[1], None]) @ k.mT).softmax(-1) @ v


@mutant()
def query_times_a_vector_of_its_head(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return ((q * m.head_scale[:, None, None]) @ k.mT).softmax(-1) @ v


@mutant()
def query_times_a_vector_of_its_dim(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return ((q * m.head_scale) @ k.mT).softmax(-1) @ v


@mutant(shapes=FOUR_POSITIONS)
def scores_times_a_vector_of_head_size_along_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x[:, :HEADS])
    return (scores * m.head_scale[:, None]).softmax(-1) @ v


@mutant()
def bias_before_a_where_with_a_finite_other(m: Any, x: Tensor) -> Tensor:
    """A term constant along the keys counts once part of the row holds a fixed number."""
    scores, v = scored(m, x)
    shifted = scores + m.gate(x).transpose(1, 2).unsqueeze(-1)
    return torch.where(padded(x), 0.5, shifted).softmax(-1) @ v


@mutant()
def row_maximum_before_a_where_with_a_finite_other(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    shifted = scores - scores.amax(-1, keepdim=True)
    return shifted.masked_fill(padded(x), -1.0).softmax(-1) @ v


@mutant()
def bias_of_the_query(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + m.by_key[: x.shape[1], None]).softmax(-1) @ v


@mutant()
def bias_of_the_key(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + m.by_key[: x.shape[1]]).softmax(-1) @ v


@mutant()
def bias_of_head_and_pair(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + m.by_head_pair[:, : x.shape[1], : x.shape[1]]).softmax(-1) @ v


@mutant()
def bias_of_head_and_pair_swapped(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + m.by_head_pair[:, : x.shape[1], : x.shape[1]].mT).softmax(-1) @ v


@mutant()
def bias_of_the_batch_alone(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    bias = torch.einsum("bid,bjd->bij", x, x.flip(0)) * 0.1
    return (scores + bias[:, None]).softmax(-1) @ v


@mutant()
def bias_of_another_row_of_the_batch(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(padded(x).flip(0), FINFO_MIN).softmax(-1) @ v


@mutant()
def bias_taken_away(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (m.by_pair[: x.shape[1], : x.shape[1]] - scores).softmax(-1) @ v


@mutant()
def weak_bias_in_single_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    padding = F.pad(m.by_pair[: x.shape[1] - 1, : x.shape[1] - 1], (1, 0, 1, 0))
    return (scores + padding).softmax(-1) @ v


# --- masks --------------------------------------------------------------------------------------------------


@mutant()
def mask_of_minus_ten_thousand_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(some_rows_padded(x), -1e4).softmax(-1) @ v


@mutant()
def mask_of_minus_ten_thousand_added_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + some_rows_padded(x) * -1e4).softmax(-1) @ v


@mutant()
def mask_of_finfo_min_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(some_rows_padded(x), FINFO_MIN).softmax(-1) @ v


@mutant()
def mask_of_finfo_min_added_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + some_rows_padded(x) * FINFO_MIN).softmax(-1) @ v


@mutant()
def two_masks_of_finfo_min_added(m: Any, x: Tensor) -> Tensor:
    """Both together give -inf where both hold: rows 0 and 2 then see some padded keys less than others."""
    scores, v = scored(m, x)
    i, _ = positions(x)
    return (scores + padded(x) * FINFO_MIN + (i % 2 == 0) * (0.5 * FINFO_MIN)).softmax(-1) @ v


@mutant(nan_rows=True)
def mask_of_infinity_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(some_rows_padded(x), -INF).softmax(-1) @ v


@mutant()
def nan_to_num_after_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(some_rows_padded(x), -INF).softmax(-1).nan_to_num(0.0) @ v


@mutant()
def nan_to_a_number_after_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(some_rows_padded(x), -INF).softmax(-1).nan_to_num(0.25) @ v


@mutant()
def zeroed_after_finfo_min_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    padding = some_rows_padded(x)
    return scores.masked_fill(padding, FINFO_MIN).softmax(-1).masked_fill(padding, 0.0) @ v


@mutant()
def mask_weakened_by_a_later_scale(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return ((q @ k.mT * 1e6).masked_fill(padded(x), -1e6) * 0.5e-6).softmax(-1) @ v


@mutant()
def mask_turned_around_by_a_negative_scale(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.masked_fill(padded(x), -6.0) * -0.5).softmax(-1) @ v


@mutant()
def mask_of_a_positive_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(padded(x), 5.0).softmax(-1) @ v


@mutant()
def mask_of_zero(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(padded(x), 0.0).softmax(-1) @ v


@mutant()
def mask_of_a_small_negative_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(padded(x), -3.0).softmax(-1) @ v


@mutant()
def mask_added_as_a_boolean(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + padded(x)).softmax(-1) @ v


@mutant()
def mask_added_as_a_boolean_to_the_sdpa_call(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=padded(x).float())


@mutant()
def mask_inverted(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(~padded(x), -1e9).softmax(-1) @ v


@mutant()
def mask_cast_and_scaled_a_little(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + (1.0 - padded(x).float()) * -3.0).softmax(-1) @ v


@mutant()
def mask_multiplied_onto_the_scores(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * ~padded(x)).softmax(-1) @ v


@mutant()
def mask_multiplied_and_added(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    real = 1.0 - padded(x).float()
    return (scores * real - 1e9 * (1.0 - real)).softmax(-1) @ v


@mutant()
def mask_along_the_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(padded(x).mT, -1e9).softmax(-1) @ v


@mutant()
def mask_of_one_head(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    first = (torch.arange(HEADS) == 0)[:, None, None]
    return scores.masked_fill(padded(x) & first, -1e9).softmax(-1) @ v


@mutant()
def mask_of_the_scores(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(scores < 0, -1e9).softmax(-1) @ v


@mutant()
def value_masked(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v.masked_fill(padded(x).mT, 0.0)


@mutant()
def sdpa_call_with_mask_and_scale_of_its_own(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return F.scaled_dot_product_attention(q * 2.0, k, v, attn_mask=~padded(x), scale=0.3)


# --- causality ----------------------------------------------------------------------------------------------


@mutant()
def causal(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, j <= i, v)


@mutant()
def causal_one_ahead(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, j <= i + 1, v)


@mutant()
def causal_strictly(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, j < i, v, fill=-1e9)


@mutant(nan_rows=True)
def causal_strictly_with_infinity(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, j < i, v)


@mutant()
def causal_backwards(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, j >= i, v)


@mutant()
def causal_triangle_transposed(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return keep(scores, m.triangle[: x.shape[1], : x.shape[1]].T == 1, v)


@mutant()
def causal_triangle_flipped(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return keep(scores, m.triangle[: x.shape[1], : x.shape[1]].flip(0, 1) == 1, v)


@mutant()
def causal_triangle_inverted(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return keep(scores, m.triangle[: x.shape[1], : x.shape[1]] == 0, v, fill=-1e9)


@mutant()
def causal_triangle_shifted(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return keep(scores, m.triangle[1 : x.shape[1] + 1, : x.shape[1]] == 1, v)


@mutant()
def causal_triangle_added_as_a_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores + m.triangle[: x.shape[1], : x.shape[1]]).softmax(-1) @ v


@mutant()
def causal_triangle_multiplied(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores * m.triangle[: x.shape[1], : x.shape[1]]).softmax(-1) @ v


@mutant()
def causal_triangle_weak(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores - (1.0 - m.triangle[: x.shape[1], : x.shape[1]]) * 2.0).softmax(-1) @ v


@mutant()
def causal_up_to_the_examples_length(m: Any, x: Tensor) -> Tensor:
    """The buffer is a triangle in its first 5 columns alone."""
    scores, v = scored(m, x)
    allowed = m.almost_triangle[: x.shape[1], : x.shape[1]] == 1
    return keep(scores, allowed, v, fill=-1e9)


@mutant()
def causal_window_wider_than_the_example(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, (j <= i) & (i - j < 6), v)


@mutant()
def causal_window(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, (j <= i) & (i - j < 2), v)


@mutant()
def causal_bias_weakened_by_a_later_scale(m: Any, x: Tensor) -> Tensor:
    """-1e30, but scaled to -0.5 before the softmax."""
    q, k, v = qkv(m, x)
    i, j = positions(x)
    bias = torch.where(j <= i, 0.0, -1e30)
    return ((q @ k.mT * 1e30 + bias) * 1e-30 * SCALE).softmax(-1) @ v


@mutant()
def causal_bias_turned_around_by_a_later_scale(m: Any, x: Tensor) -> Tensor:
    """What was lowest is highest."""
    q, k, v = qkv(m, x)
    i, j = positions(x)
    return ((-(q @ k.mT) * SCALE + torch.where(j <= i, 0.0, -1e9)) * -1.0).softmax(-1) @ v


@mutant()
def causal_or_prefix(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, (j <= i) | (j < 2), v)


@mutant()
def causal_from_the_sixth_position_on(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, (j <= i) | (i > 5), v)


@mutant()
def causal_by_blocks(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, j // 3 <= i // 3, v)


@mutant()
def causal_by_doubled_positions(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, j <= 2 * i, v)


@mutant()
def causal_and_padded(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores, (j <= i) & ~padded(x), v)


@mutant()
def causal_and_bias(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    i, j = positions(x)
    return keep(scores + m.by_pair[: x.shape[1], : x.shape[1]], j <= i, v)


@mutant()
def causal_with_more_keys_aligned_left(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    i, j = positions(x)
    return keep(q[:, :, 1:] @ k.mT * SCALE, (j <= i)[:-1], v)


@mutant()
def causal_with_more_keys_aligned_right(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    i, j = positions(x)
    return keep(q[:, :, 1:] @ k.mT * SCALE, (j <= i)[1:], v)


@mutant()
def causal_with_more_queries(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    i, j = positions(x)
    return keep(q @ k[:, :, 1:].mT * SCALE, (j <= i)[:, :-1], v[:, :, 1:])


@mutant()
def causal_sdpa_call_with_more_keys(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return F.scaled_dot_product_attention(q[:, :, 1:], k, v, is_causal=True)


@mutant()
def causal_over_reversed_keys(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    i, j = positions(x)
    return keep(q @ k.flip(2).mT * SCALE, j <= i, v)


@mutant()
def causal_over_data_positions(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    rank = x[..., 0].argsort(-1)
    return keep(scores, rank[:, None, None, :] <= rank[:, None, :, None], v)


@mutant()
def causal_for_heads_as_queries(m: Any, x: Tensor) -> Tensor:
    """Attention among the heads of one token, under a triangle of heads."""
    q, k, v = (t.transpose(1, 2) for t in qkv(m, x))
    return keep(q @ k.mT * SCALE, m.triangle[:HEADS, :HEADS] == 1, v)


@mutant()
def triangle_over_heads_and_keys(m: Any, x: Tensor) -> Tensor:
    """Head h may see keys up to h: where heads == queries a careless reader takes it for a causal mask."""
    scores, v = scored(m, x)
    allowed = torch.arange(HEADS)[:, None, None] >= torch.arange(x.shape[1])[None, None, :]
    return keep(scores, allowed, v)


# --- axes whose sizes coincide ------------------------------------------------------------------------------


@mutant(must_stay=True)
def value_contracted_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.einsum("bhqk,bhqd->bhkd", scores.softmax(-1), v)


@mutant(must_stay=True)
def weights_summed_over_keys_alone(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.einsum("bhqk,bhqd->bhqd", scores.softmax(-1), v)


@mutant(must_stay=True, shapes=FOUR_POSITIONS)
def value_multiplied_elementwise(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x[:, :DIM])
    return scores.softmax(-1) * v


@mutant(shapes=FOUR_POSITIONS)
def value_contracted_over_head_dim(m: Any, x: Tensor) -> Tensor:
    """Four positions, four dims: the keys meet the dims of V."""
    scores, v = scored(m, x[:, :DIM])
    return scores.softmax(-1) @ v.mT


@mutant()
def queries_and_keys_contracted_over_heads(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    weights = torch.einsum("bhqd,bhkd->bdqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bdqk,bhkd->bhqd", weights, v)


@mutant()
def queries_contracted_over_heads_and_keys_over_dims(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return (q.transpose(1, 3) @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def values_of_dims_as_heads(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v.transpose(1, 3)


@mutant()
def contracted_over_heads_and_dims(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    weights = torch.einsum("bhqd,bhkd->bqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bqk,bhkd->bhqd", weights, v)


@mutant()
def value_summed_over_heads_too(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.einsum("bhqk,bhkd->bqd", scores.softmax(-1), v)


@mutant()
def value_with_heads_of_its_own(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.einsum("bhqk,bgkd->bhgqd", scores.softmax(-1), v)


@mutant()
def attention_across_the_batch(m: Any, x: Tensor) -> Tensor:
    q, k, v = (t.permute(2, 1, 0, 3) for t in qkv(m, x))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant(shapes=((4, 4), (4, 7), (4, 9)))
def batch_and_heads_of_the_key_swapped(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return (q @ k.transpose(0, 1).mT * SCALE).softmax(-1) @ v


@mutant(shapes=((4, 4), (4, 7), (4, 9)))
def batch_and_heads_of_the_value_swapped(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v.transpose(0, 1)


@mutant()
def query_of_the_next_row_of_the_batch(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return (q.roll(1, dims=0) @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def heads_joined_the_wrong_way(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return m.out((scores.softmax(-1) @ v).reshape(x.shape))


@mutant()
def heads_split_the_wrong_way(m: Any, x: Tensor) -> Tensor:
    batch, seq, _ = x.shape
    q, k, v = (p(x).view(batch, HEADS, seq, DIM) for p in (m.q, m.k, m.v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def queries_and_keys_change_roles(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return (k @ q.mT * SCALE).softmax(-1) @ v


@mutant()
def value_is_the_key(m: Any, x: Tensor) -> Tensor:
    q, k, _ = qkv(m, x)
    return (q @ k.mT * SCALE).softmax(-1) @ k


@mutant()
def everything_is_the_input(m: Any, x: Tensor) -> Tensor:
    return m.out((x @ x.mT).softmax(-1) @ x)


@mutant()
def value_of_the_weights(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ (v * weights.amax())


@mutant()
def grouped_heads_tiled(m: Any, x: Tensor) -> Tensor:
    """Head h uses key head h % 2, where grouped attention uses h // 2."""
    k, v = (heads(t, 2).repeat(1, 2, 1, 1) for t in m.kv_small(x).chunk(2, dim=-1))
    return (heads(m.q(x)) @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def grouped_heads_expanded_outside(m: Any, x: Tensor) -> Tensor:
    k, v = (heads(t, 2)[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2) for t in m.kv_small(x).chunk(2, dim=-1))
    return (heads(m.q(x)) @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def grouped_heads_key_inside_value_outside(m: Any, x: Tensor) -> Tensor:
    k, v = (heads(t, 2) for t in m.kv_small(x).chunk(2, dim=-1))
    k, v = k.repeat_interleave(2, dim=1), v.repeat(1, 2, 1, 1)
    return (heads(m.q(x)) @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def grouped_heads_of_the_key_alone(m: Any, x: Tensor) -> Tensor:
    k = heads(m.kv_small(x)[..., : 2 * DIM], 2).repeat_interleave(2, dim=1)
    return (heads(m.q(x)) @ k.mT * SCALE).softmax(-1) @ heads(m.v(x))


# --- keys and values that do not meet -----------------------------------------------------------------------


@mutant()
def value_rolled(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v.roll(1, dims=2)


@mutant()
def key_rolled(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return (q @ k.roll(1, dims=2).mT * SCALE).softmax(-1) @ v


@mutant()
def key_and_value_of_shifted_slices(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return (q @ k[:, :, :-1].mT * SCALE).softmax(-1) @ v[:, :, 1:]


@mutant()
def scores_without_the_first_key(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores[..., 1:].softmax(-1) @ v[:, :, 1:]


@mutant()
def scores_without_the_first_key_value_without_the_last(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores[..., 1:].softmax(-1) @ v[:, :, :-1]


@mutant()
def scores_of_every_other_key(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores[..., ::2].softmax(-1) @ v[:, :, ::2]


@mutant()
def keys_doubled(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    return (q @ torch.cat([k, k], dim=2).mT * SCALE).softmax(-1) @ torch.cat([v, v.flip(2)], dim=2)


@mutant()
def sink_at_the_end_sliced_off(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    sink = m.head_scale.view(1, HEADS, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] @ v


@mutant()
def sink_at_the_end_first_key_sliced_off(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    sink = m.head_scale.view(1, HEADS, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., 1:] @ v


@mutant()
def sink_at_the_front_sliced_off(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    sink = m.head_scale.view(1, HEADS, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
    return torch.cat([sink, scores], dim=-1).softmax(-1)[..., 1:] @ v


@mutant()
def sink_with_a_value(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    sink = m.head_scale.view(1, HEADS, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1) @ torch.cat([v, v.mean(2, keepdim=True)], dim=2)


@mutant()
def sink_of_the_scores(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.cat([scores, scores.mean(-1, keepdim=True)], dim=-1).softmax(-1)[..., :-1] @ v


@mutant()
def sink_of_three_zeros(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return F.pad(scores, (0, 3)).softmax(-1)[..., : x.shape[1]] @ v


def sink_factor(m: Any, scores: Tensor) -> Tensor:
    """sigmoid(logsumexp(scores) - sink), which makes a sink of a factor on the context."""
    return (scores.logsumexp(-1) - m.head_scale.view(1, -1, 1)).sigmoid().unsqueeze(-1)


@mutant()
def sink_by_a_factor(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v * sink_factor(m, scores)


@mutant()
def sink_by_a_factor_where_rows_are_masked(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores = scores.masked_fill(torch.arange(x.shape[1])[:, None] == 2, FINFO_MIN)
    return scores.softmax(-1) @ v * sink_factor(m, scores)


@mutant(nan_rows=True)
def sink_by_a_factor_where_rows_are_masked_by_infinity(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores = scores.masked_fill(torch.arange(x.shape[1])[:, None] == 2, -INF)
    return scores.softmax(-1) @ v * sink_factor(m, scores)


@mutant(must_stay=True)
def sink_by_a_factor_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v * (scores.logsumexp(-2) - m.head_scale.view(1, -1, 1)).sigmoid().unsqueeze(-1)


@mutant(must_stay=True, shapes=FOUR_POSITIONS)
def sink_by_a_factor_of_another_head(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v * sink_factor(m, scores).transpose(1, 2)


@mutant(must_stay=True, shapes=FOUR_POSITIONS)
def sink_by_a_factor_along_the_value(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v * sink_factor(m, scores).transpose(2, 3)


@mutant(must_stay=True, shapes=FOUR_POSITIONS)
def sink_by_a_factor_with_a_sink_for_each_value(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v * (scores.logsumexp(-1, keepdim=True) - m.head_scale).sigmoid()


@mutant(must_stay=True)
def sink_by_a_factor_of_the_scores_before_their_mask(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.masked_fill(padded(x), FINFO_MIN).softmax(-1) @ v * sink_factor(m, scores)


@mutant(must_stay=True)
def sink_by_a_factor_of_the_scores_before_their_scale(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    scores = q @ k.mT
    return (scores * SCALE).softmax(-1) @ v * sink_factor(m, scores)


@mutant(must_stay=True)
def sink_by_the_other_factor(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v * (m.head_scale.view(1, -1, 1) - scores.logsumexp(-1)).sigmoid().unsqueeze(-1)


@mutant(must_stay=True)
def sink_by_a_factor_twice_the_sink(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    total = scores.logsumexp(-1, keepdim=True)
    return scores.softmax(-1) @ v * torch.sub(total, m.head_scale.view(1, -1, 1, 1), alpha=2).sigmoid()


@mutant(must_stay=True)
def sink_taken_from_the_factor(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ v * (scores.logsumexp(-1, keepdim=True).sigmoid() - m.head_scale.view(1, -1, 1, 1))


@mutant(must_stay=True)
def sink_by_a_factor_on_the_value(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return scores.softmax(-1) @ (v * sink_factor(m, scores))


@mutant(must_stay=True)
def sink_by_a_factor_behind_a_residual(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.softmax(-1) @ v + v) * sink_factor(m, scores)


@mutant(must_stay=True)
def sink_by_a_factor_and_the_context_besides(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    context = scores.softmax(-1) @ v
    return context * sink_factor(m, scores) + context.flip(2)


@mutant(must_stay=True)
def sink_by_a_factor_that_is_returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, v = scored(m, x)
    factor = sink_factor(m, scores)
    return scores.softmax(-1) @ v * factor, factor


@mutant(must_stay=True)
def sink_by_a_factor_on_one_of_two_values(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v * sink_factor(m, scores) + weights @ v.flip(2)


@mutant()
def sink_by_a_factor_on_both_of_two_values(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights, factor = scores.softmax(-1), sink_factor(m, scores)
    return weights @ v * factor + weights @ v.flip(2) * factor


@mutant()
def two_values(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v - weights @ (v.flip(2) * 0.5)


@mutant(must_stay=True)
def two_values_one_of_them_for_each_query(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    relative = m.by_pair[: x.shape[1], : x.shape[1], None] * m.last[0]
    return weights @ v + torch.einsum("bhij,ijd->bhid", weights, relative)


@mutant(must_stay=True)
def two_values_one_of_them_of_one_head(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v + torch.einsum("bhij,bjd->bhid", weights, v[:, 1])


@mutant(must_stay=True)
def two_values_one_of_them_summed_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v + weights.mT @ v


@mutant(must_stay=True)
def two_values_one_of_them_the_result_of_the_other(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ (weights @ v)


@mutant(must_stay=True)
def a_value_and_a_norm_of_the_weights(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    return weights @ v / weights.square().sum(-1, keepdim=True)


@mutant()
def sink_scaled_with_the_scores(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    sink = m.head_scale.view(1, HEADS, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)
    return torch.cat([q @ k.mT, sink], dim=-1).mul(0.3).softmax(-1)[..., :-1] @ v


# --- writes in place ----------------------------------------------------------------------------------------


@mutant()
def column_of_scores_overwritten(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores[..., 0] = -1e9
    return scores.softmax(-1) @ v


@mutant()
def column_of_scores_overwritten_with_data(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores[..., 0] = m.gate(x).transpose(1, 2)
    return scores.softmax(-1) @ v


@mutant()
def column_of_weights_overwritten(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    weights[..., 1] = 0.0
    return weights @ v


@mutant()
def scores_copied_over(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores.copy_(scores.mT.clone())
    return scores.softmax(-1) @ v


@mutant()
def scores_added_to(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores.add_(m.by_key[: x.shape[1]])
    return scores.softmax(-1) @ v


@mutant()
def scores_view_written(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores.transpose(1, 2).mul_(2.0)
    return scores.softmax(-1) @ v


@mutant()
def scores_diagonal_written(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores.diagonal(dim1=-2, dim2=-1).fill_(-1e9)
    return scores.softmax(-1) @ v


@mutant()
def weights_view_written_after(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    weights.view(x.shape[0], HEADS, -1)[:, :, 0].zero_()
    return weights @ v


@mutant()
def scores_written_after_use(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.softmax(-1)
    scores.zero_()
    return weights @ v + scores.sum()


@mutant()
def query_written_after_use(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    scores = q @ k.mT * SCALE
    q.zero_()
    k.mul_(3.0)
    return scores.softmax(-1) @ v


@mutant()
def value_written_between(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    weights = (q @ k.mT * SCALE).softmax(-1)
    v.mul_(2.0)
    return weights @ v


@mutant()
def context_written_after(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    context = scores.softmax(-1) @ v
    context[:, :, 0] = 0.0
    return context


@mutant()
def mask_written_after_use(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    bias = padded(x).float() * -1e9
    masked = scores + bias
    bias.zero_()
    return masked.softmax(-1) @ v


# --- projections that look alike (for the qkv merge) --------------------------------------------------------


@mutant()
def key_projection_of_another_input(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.k(x.tanh())), heads(m.v(x))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def key_projection_without_bias(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(F.linear(x, m.k.weight)), heads(m.v(x))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def one_projection_for_query_and_key(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(m.q(x)), heads(m.v(x))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def projection_used_elsewhere(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    query = m.q(x)
    q, k, v = heads(query), heads(m.k(x)), heads(m.v(x))
    return (q @ k.mT * SCALE).softmax(-1) @ v, query


@mutant()
def projection_by_weights_of_the_data(m: Any, x: Tensor) -> Tensor:
    weight = x[0, 0].outer(x[0, 0])
    q, k, v = heads(m.q(x)), heads(F.linear(x, weight)), heads(m.v(x))
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def projection_written_before_use(m: Any, x: Tensor) -> Tensor:
    query, key, value = m.q(x), m.k(x), m.v(x)
    query.mul_(2.0)
    q, k, v = heads(query), heads(key), heads(value)
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def input_written_between_projections(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    q = heads(m.q(x))
    x.tanh_()
    return (q @ heads(m.k(x)).mT * SCALE).softmax(-1) @ heads(m.v(x))


@mutant()
def projection_by_a_transposed_weight(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(m.q(x)), heads(F.linear(x, m.k.weight.T)), heads(x @ m.v.weight)
    return (q @ k.mT * SCALE).softmax(-1) @ v


@mutant()
def projections_of_unequal_widths(m: Any, x: Tensor) -> Tensor:
    gate = m.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)
    q, k, v = qkv(m, x)
    return (q @ k.mT * SCALE).softmax(-1) @ v * gate


# --- near misses of idioms --------------------------------------------------------------------------------------


@mutant()
def fill_of_a_tensor_that_is_not_one_number(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    low = torch.full_like(scores, FINFO_MIN).masked_fill(positions(x)[1] == 1, 0.25)
    return torch.where(some_rows_padded(x), low, scores).softmax(-1) @ v


@mutant()
def where_full_like_of_a_number_that_is_no_mask(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return torch.where(some_rows_padded(x), torch.full_like(scores, -2.0), scores).softmax(-1) @ v


@mutant()
def fill_of_minus_a_hundred_that_large_scores_reach(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 8)
    return scores.masked_fill(some_rows_padded(x), -100.0).softmax(-1) @ v


@mutant()
def fill_of_minus_ten_thousand_that_large_scores_reach(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 80)
    return scores.masked_fill(some_rows_padded(x), -1e4).softmax(-1) @ v


@mutant()
def fill_of_minus_a_billion_under_large_scores(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 30)
    return scores.masked_fill(some_rows_padded(x), -1e9).softmax(-1) @ v


@mutant()
def fill_of_minus_a_billion_under_a_causal_mask_and_left_padding(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 8)
    i, j = positions(x)
    left = (j < 2) & (torch.arange(x.shape[0]) == 0)[:, None, None, None]
    return scores.masked_fill((j > i) | left, -1e9).softmax(-1) @ v


@mutant()
def two_fills_of_several_numbers(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 8)
    i, j = positions(x)
    return scores.masked_fill(j <= i, -1e9).masked_fill(some_rows_padded(x), -2e9).softmax(-1) @ v


@mutant()
def fill_and_a_bias_that_masks(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 8)
    i, j = positions(x)
    return (scores + (j > i) * -1e9).masked_fill(some_rows_padded(x) | (j <= i), -1e9).softmax(-1) @ v


@mutant()
def fill_lifted_by_a_later_bias(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.masked_fill(some_rows_padded(x), -1e9) + 100 * m.by_key[: x.shape[1]]).softmax(-1) @ v


@mutant(must_stay=True)
def zeroed_by_one_of_two_masks(m: Any, x: Tensor) -> Tensor:
    """Rows that both mask together lose the weight that the second takes away."""
    scores, v = scored(m, x)
    i, j = positions(x)
    padding = some_rows_padded(x)
    return scores.masked_fill(j <= i, -1e9).masked_fill(padding, -1e9).softmax(-1).masked_fill(padding, 0.0) @ v


@mutant(must_stay=True)
def weights_times_mask_under_a_weak_fill(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.masked_fill(padded(x), -2.0).softmax(-1) * ~padded(x)) @ v


@mutant(must_stay=True)
def weights_times_the_mask_of_other_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.masked_fill(padded(x), FINFO_MIN).softmax(-1) * ~padded(x).flip(0)) @ v


@mutant(must_stay=True)
def weights_times_numbers_where_the_mask_is(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.masked_fill(padded(x), FINFO_MIN).softmax(-1) * (~padded(x) * 0.5)) @ v


@mutant(must_stay=True)
def weights_times_the_mask_turned_around(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.masked_fill(padded(x), FINFO_MIN).softmax(-1) * padded(x)) @ v


@mutant()
def scores_times_mask_plus_the_rest_of_another(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    real = (~some_rows_padded(x)).float()
    return (scores * real + (1 - real.flip(0)) * -1e9).softmax(-1) @ v


@mutant()
def scores_times_mask_plus_a_weak_rest(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    real = (~some_rows_padded(x)).float()
    return (scores * real + (1 - real) * -4.0).softmax(-1) @ v


@mutant()
def scores_times_mask_plus_its_rest_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 8)
    real = (~some_rows_padded(x)).float()
    return (scores * real + (1 - real) * -1e9).softmax(-1) @ v


@mutant(must_stay=True)
def scores_times_numbers_along_the_keys(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    real = (~padded(x)).float() * 0.5 + 0.25
    return (scores * real + (1 - real) * -1e9).softmax(-1) @ v


@mutant()
def assigned_by_index_on_full_rows(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x * 8)
    scores[some_rows_padded(x).expand_as(scores)] = -1e9
    return scores.softmax(-1) @ v


@mutant()
def added_by_index(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    mask = some_rows_padded(x).expand_as(scores)
    return scores.index_put([mask], torch.tensor(-3.0), accumulate=True).softmax(-1) @ v


@mutant()
def assigned_to_a_part_of_the_scores(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    scores[:, :2][some_rows_padded(x).expand_as(scores)[:, :2]] = -1e9
    return scores.softmax(-1) @ v


@mutant(must_stay=True)
def exponentials_over_their_sum_and_a_little(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.exp()
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 0.01)


@mutant(must_stay=True)
def exponentials_over_the_sum_of_others(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (scores.exp() @ v) / (scores * 1.01).exp().sum(-1, keepdim=True)


@mutant(must_stay=True)
def exponentials_over_their_sum_over_queries(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.exp()
    return (weights / weights.sum(-2, keepdim=True)) @ v


@mutant(must_stay=True)
def exponentials_over_their_sum_masked_in_between(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = scores.exp()
    return (weights.masked_fill(padded(x), 0.0) @ v) / weights.sum(-1, keepdim=True)


@mutant(must_stay=True)
def exponentials_of_two(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    weights = torch.exp2(scores)
    return (weights @ v) / weights.sum(-1, keepdim=True)


@mutant(must_stay=True)
def log_softmax_over_queries_exponentiated(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return F.log_softmax(scores, -2).exp() @ v


@mutant(must_stay=True)
def half_of_the_log_softmax_exponentiated(m: Any, x: Tensor) -> Tensor:
    scores, v = scored(m, x)
    return (F.log_softmax(scores, -1) * 0.5).exp() @ v


@mutant(must_stay=True)
def keys_in_parts_and_weights_cut_elsewhere(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    weights = torch.cat([q @ k[:, :, :2].mT, q @ k.mT], -1).softmax(-1)
    return weights[..., :2] @ v[:, :, :2] + weights[..., 1:-1] @ v


@mutant(must_stay=True)
def keys_in_parts_of_two_queries(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    weights = torch.cat([q.flip(2) @ k[:, :, :2].mT, q @ k.mT], -1).softmax(-1)
    return weights[..., :2] @ v[:, :, :2] + weights[..., 2:] @ v


@mutant(must_stay=True)
def keys_in_parts_scaled_differently(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    weights = torch.cat([q @ k[:, :, :2].mT * 0.3, q @ k.mT * 0.5], -1).softmax(-1)
    return weights[..., :2] @ v[:, :, :2] + weights[..., 2:] @ v


@mutant()
def softmax_of_each_part_of_the_keys(m: Any, x: Tensor) -> Tensor:
    q, k, v = qkv(m, x)
    old, own = (q @ k[:, :, :2].mT).softmax(-1), (q @ k.mT).softmax(-1)
    return old @ v[:, :, :2] + own @ v
