"""Padding from lengths: a mask that forward computes from a number a row says where tokens are, in every spelling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import padding_gate as gate
import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, compare, enliven
from torch import Tensor, nn

import fxbt

Validity = Callable[[Tensor, Tensor], Tensor]  # (lengths, ids or vectors [b, s, ...]) -> True at tokens
SHAPES = ((3, 9), (2, 6), (4, 13))  # the first is captured
FEATURES = 16


def lengths_of(batch: int, length: int, seed: int = 0) -> Tensor:
    """The first row full, the last of two tokens."""
    found = torch.randint(2, length + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    found[0], found[-1] = length, 2
    return found


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.size(1), device=x.device)


class WithLengths(nn.Module):
    """`gate.Net` that is given lengths, and makes its validity of them."""

    def __init__(self, valid: Validity, **variation: Any):
        super().__init__()
        self.net, self._valid = gate.Net(**variation), valid
        self.register_buffer("places", torch.arange(64))

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Any:
        return self.net(input_ids, self._valid(lengths, input_ids))


def made(valid: Validity, **variation: Any) -> nn.Module:
    torch.manual_seed(0)
    return enliven(WithLengths(valid, **variation)).eval()


def is_right(batch: int, length: int, lengths: Tensor) -> Tensor:
    """Where tokens are if padding stands behind them."""
    return torch.arange(length) < lengths[:, None]


def is_left(batch: int, length: int, lengths: Tensor) -> Tensor:
    return torch.arange(length) >= length - lengths[:, None]


# --- spellings --------------------------------------------------------------------------------------------------


def pad_mask(lengths: Tensor, x: Tensor) -> Tensor:
    """As espnet's make_pad_mask with `xs`: positions expanded, lengths expanded, True at padding."""
    batch, longest = lengths.size(0), x.size(1)
    places = torch.arange(0, longest, dtype=torch.int64, device=x.device).unsqueeze(0).expand(batch, longest)
    return places >= lengths.unsqueeze(-1)


def by_cumsum(lengths: Tensor, x: Tensor) -> Tensor:
    """As wav2vec 2.0 marks the last frame and fills what is before it."""
    marked = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
    marked[(torch.arange(x.shape[0], device=x.device), lengths - 1)] = 1
    return marked.flip([-1]).cumsum(-1).flip([-1]).bool()


RIGHT: dict[str, Validity] = {
    "arange < lengths": lambda n, x: torch.arange(x.size(1))[None] < n[:, None],
    "arange <= lengths - 1": lambda n, x: torch.arange(x.shape[1])[None, :] <= n[:, None] - 1,
    "not arange >= lengths": lambda n, x: ~(positions(x).unsqueeze(0) >= n.unsqueeze(1)),
    "lengths > arange": lambda n, x: n.unsqueeze(1) > positions(x),
    "expand": lambda n, x: positions(x).expand(n.shape[0], x.size(1)) < n.unsqueeze(1),
    "both expanded": lambda n, x: positions(x)[None].expand_as(x) < n[:, None].expand_as(x),
    "repeat": lambda n, x: positions(x).repeat(n.size(0), 1) < n.view(-1, 1),
    "arange of the lengths' dtype": lambda n, x: torch.arange(x.size(1), dtype=n.dtype) < n[:, None],
    "cumulated ones": lambda n, x: torch.ones_like(x).cumsum(1) <= n[:, None],
    "counted from 1": lambda n, x: torch.arange(1, x.size(1) + 1) <= n[:, None],
    "difference": lambda n, x: (n[:, None] - positions(x)) > 0,
    "as floats": lambda n, x: positions(x).float() < n.float()[:, None],
    "as numbers": lambda n, x: (positions(x) < n[:, None]).long(),
    "of four dims": lambda n, x: (positions(x) < n[:, None, None, None])[:, 0, 0],
    "where": lambda n, x: torch.where(positions(x) < n[:, None], 1, 0),
    "clamped": lambda n, x: positions(x) < n.clamp(max=x.size(1))[:, None],
    "make_pad_mask": lambda n, x: ~pad_mask(n, x),
    "logical_not": lambda n, x: pad_mask(n, x).logical_not(),
    "masked_fill": lambda n, x: torch.ones_like(x).masked_fill(pad_mask(n, x), 0),
    "wav2vec 2.0": by_cumsum,
}
PARTS: dict[str, Validity] = {
    "rounded parts": lambda n, x: positions(x) < torch.round(n * x.shape[1])[:, None],
    "whole parts": lambda n, x: positions(x) < (n * x.shape[1]).round().long()[:, None],
    "parts": lambda n, x: positions(x)[None] < (n * x.size(1)).unsqueeze(1),
}
LEFT: dict[str, Validity] = {
    "at the right": lambda n, x: positions(x) >= x.size(1) - n[:, None],
    "at the right, flipped": lambda n, x: (positions(x) < n[:, None]).flip(1),
}


def serves(
    model: nn.Module, valid_of: Callable[[int, int, Tensor], Tensor], of: Callable[[Tensor, int], Tensor]
) -> Any:
    """Compares a model with lengths in several shapes; returns the optimised one."""
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in SHAPES:
            for seed in range(2):
                lengths = lengths_of(batch, length, seed)
                inputs = {"input_ids": ids_of(batch, length), "lengths": of(lengths, length)}
                valid = valid_of(batch, length, lengths)
                found = fast(**inputs)
                compare(found, model(**inputs), atol_of_magnitude=2e-5, dropped=[valid])
    assert not fast.report.fallbacks
    return fast


def as_they_are(lengths: Tensor, length: int) -> Tensor:
    return lengths


@pytest.mark.parametrize("name", RIGHT)
def test_spellings(name: str) -> None:
    fast = serves(made(RIGHT[name]), is_right, as_they_are)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


@pytest.mark.parametrize("name", LEFT)
def test_padding_in_front(name: str) -> None:
    fast = serves(made(LEFT[name]), is_left, as_they_are)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


@pytest.mark.parametrize("name", PARTS)
def test_lengths_as_parts_of_all(name: str) -> None:
    """As speechbrain gives them: 1 is the whole sequence."""
    fast = serves(made(PARTS[name]), is_right, lambda lengths, length: (lengths - 0.25) / length)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    fast = serves(made(RIGHT["arange < lengths"]), is_right, lambda lengths, length: lengths.to(dtype))
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


def test_lengths_of_two_dims() -> None:
    fast = serves(made(lambda n, x: positions(x) < n), is_right, lambda lengths, length: lengths[:, None])
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


def test_positions_of_a_buffer() -> None:
    """The buffer is read at each run: other content is other padding."""
    model = made(lambda n, x: model.places[: x.size(1)] < n[:, None])
    fast = serves(model, is_right, as_they_are)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")
    inputs = {"input_ids": ids_of(3, 9), "lengths": torch.tensor([9, 3, 2])}
    with torch.no_grad():
        model.places.add_(1)
        expected = model(**inputs)
        compare(fast(**inputs), expected)  # the first row has fewer tokens than it says
        model.places.sub_(2)
        compare(fast(**inputs), model(**inputs), dropped=[is_right(3, 9, inputs["lengths"] + 1)])


# --- models ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """nn.TransformerEncoder on vectors and lengths."""

    def __init__(self, nested: bool, causal: bool = False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 32, batch_first=True, norm_first=not nested)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.causal = causal

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        padding = positions(input_ids)[None] >= lengths[:, None]
        x = F.one_hot(input_ids % FEATURES, FEATURES).float()
        return self.encoder(x, src_key_padding_mask=padding)


class ByHand(nn.Module):
    """Attention of matmul and softmax, filled by lengths in place of a mask."""

    def __init__(self, fill: float = -torch.inf):
        super().__init__()
        self.tokens, self.qkv = nn.Embedding(VOCAB, FEATURES), nn.Linear(FEATURES, 3 * FEATURES)
        self.fill = fill

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        padding = torch.arange(x.size(1), device=x.device) >= lengths[:, None, None, None]
        weights = scores.masked_fill(padding, self.fill).softmax(-1)
        return x + (weights @ value).transpose(1, 2).flatten(2)


class Frames(nn.Module):
    """A speech encoder: every second frame, the lengths of frames computed as convolutions do, padding zeroed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, FEATURES)
        self.frames = nn.Conv1d(FEATURES, FEATURES, 3, stride=2, padding=1)
        self.net = gate.Net()

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.frames(self.tokens(input_ids).transpose(1, 2)).transpose(1, 2)
        valid = positions(x) < ((lengths - 1) // 2 + 1)[:, None]
        x = self.net.norm(self.net.out[0](x)) * valid.unsqueeze(-1)
        for layer in range(2):
            x = self.net.attention(layer, x, gate.additive(valid, x))
        return x


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn.TransformerEncoder, pre-norm": lambda: Encoder(nested=False),
    "nn.TransformerEncoder, nested": lambda: Encoder(nested=True),
    "by hand": ByHand,
    "by hand, finite": lambda: ByHand(torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    fast = serves(enliven(MODELS[name]()).eval(), is_right, as_they_are)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


def test_lengths_of_frames() -> None:
    torch.manual_seed(0)
    model = enliven(Frames()).eval()

    def frames(batch: int, length: int, lengths: Tensor) -> Tensor:
        return is_right(batch, (length - 1) // 2 + 1, (lengths - 1) // 2 + 1)

    fast = serves(model, frames, as_they_are)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


def causal(mask: Tensor, x: Tensor) -> Tensor:
    return mask.bool()[:, None, None] & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def pooled(net: gate.Net, x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).sum(1)


VARIATIONS: dict[str, dict[str, Any]] = {
    "boolean": {"mask": lambda mask, x: mask[:, None, None].bool()},
    "boolean for each query": {"mask": lambda mask, x: mask[:, None, None].bool().expand(-1, -1, x.shape[1], -1)},
    "queries too": {"mask": gate.boolean(lambda m: m[:, None, None] & m[:, None, :, None])},
    "causal": {"mask": causal},
    "zeroed": {"mix": lambda net, x, mask: x * mask[..., None]},
    "masked mean": {"head": gate.masked_mean},
    "masked maximum": {"head": lambda net, x, mask: x.masked_fill(mask[..., None] == 0, -1e9).amax(1)},
    "first token": {"head": lambda net, x, mask: x[:, 0]},
    "two spellings": {
        "second": lambda mask, x: torch.zeros(1).masked_fill(~mask[:, None, None].bool(), gate.LOWEST),
    },
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_masks_and_heads(name: str) -> None:
    fast = serves(made(RIGHT["arange < lengths"], **VARIATIONS[name]), is_right, as_they_are)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


class Spelled(nn.Module):
    """Two layers and a mean, each by a spelling of its own."""

    def __init__(self, first: Validity, second: Validity, mean: Validity):
        super().__init__()
        self.net, self._spellings = gate.Net(), (first, second, mean)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        first, second, mean = (valid(lengths, input_ids) for valid in self._spellings)
        x = self.net.tokens(input_ids)
        x = self.net.attention(0, x, gate.additive(first, x))
        x = self.net.attention(1, x, gate.additive(second, x))
        return (x * mean[..., None]).sum(1) / lengths[:, None]


@pytest.mark.parametrize("mean", ["counted from 1", "difference", "lengths > arange"])
def test_spellings_that_say_the_same_are_the_same(mean: str) -> None:
    model = Spelled(RIGHT["arange < lengths"], RIGHT["make_pad_mask"], RIGHT[mean])
    fast = serves(enliven(model).eval(), is_right, as_they_are)
    assert fast.report.latest.calls == {"packed": 6}, fast.report.why("padding")


# --- lengths of all kinds ----------------------------------------------------------------------------------------


def head_by_lengths(valid: Validity) -> nn.Module:
    """The sum of the tokens, and their mean by the lengths."""
    return enliven(Spelled(valid, valid, valid)).eval()


@pytest.mark.parametrize(
    ("lengths", "verdict"),
    [
        ([9, 9, 9], "dense"),
        ([9, 9, 8], "hardly any padding"),
        ([40, 3, 9], "packed"),
        ([1, 1, 1], "packed"),
        ([2**40, 3, 2], "lengths holds values above 1048576"),
    ],
)
def test_lengths_of_any_size(lengths: list[int], verdict: str) -> None:
    model = head_by_lengths(RIGHT["arange < lengths"])
    fast: Any = fxbt.optimize(model)
    ids = ids_of(3, 9)
    with torch.no_grad():
        fast(input_ids=ids, lengths=torch.tensor([9, 4, 2]))
        for _ in range(2):
            given = torch.tensor(lengths)
            compare(fast(ids, given), model(ids, given), atol_of_magnitude=2e-5)
    assert not fast.report.fallbacks
    assert fast.report.latest.calls[verdict] >= 2, fast.report.latest.calls


@pytest.mark.parametrize("none", [0, -3])
def test_rows_without_tokens(none: int) -> None:
    """A row without tokens is all padding; the others are as ever, as is a batch without any."""
    model = made(RIGHT["arange < lengths"])
    fast: Any = fxbt.optimize(model)
    ids = ids_of(3, 9)
    with torch.no_grad():
        for given in ([9, none, 4], [none, none, 2], [none, none, none], [9, 9, 9]):
            lengths = torch.tensor(given)
            valid = is_right(3, 9, lengths)
            for _ in range(2):
                compare(fast(ids, lengths), model(ids, lengths), atol_of_magnitude=2e-5, valid=valid)
    assert not fast.report.fallbacks
    assert fast.report.latest.calls == {"packed": 4, "no token in the whole batch": 2, "dense": 2}


def test_what_stands_at_padding() -> None:
    model = made(RIGHT["arange < lengths"])
    fast: Any = fxbt.optimize(model)
    lengths = torch.tensor([9, 4, 2])
    with torch.no_grad():
        for _ in range(2):
            found = fast(ids_of(3, 9), lengths)
            padding = ~is_right(3, 9, lengths)
            assert (found[padding] == 0).all() and (found[~padding] != 0).any(-1).all()


def test_last_token_by_length() -> None:
    """Read at a position that the call gives: right where a token stands there."""
    model = LastToken()
    fast: Any = fxbt.optimize(enliven(model).eval())
    with torch.no_grad():
        for given in ([9, 4, 2], [9, 3, 1], [9, 0, 2]):
            ids, lengths = ids_of(3, 9), torch.tensor(given)
            rows = lengths > 0
            compare(fast(ids, lengths)[rows], model(ids, lengths)[rows], atol_of_magnitude=2e-5)
    assert not fast.report.fallbacks
    assert fast.report.latest.calls["packed"] == 2, fast.report.why("padding")


class LastToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = gate.Net()

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.net(input_ids, positions(input_ids) < lengths[:, None])
        return x[torch.arange(x.shape[0]), lengths - 1]


def test_weights_that_change() -> None:
    model = made(RIGHT["arange < lengths"])
    fast: Any = fxbt.optimize(model)
    inputs = {"input_ids": ids_of(3, 9), "lengths": torch.tensor([9, 4, 2])}
    with torch.no_grad():
        fast(**inputs)
        enliven(model, seed=3)
        compare(fast(**inputs), model(**inputs), atol_of_magnitude=2e-5, dropped=[is_right(3, 9, inputs["lengths"])])
    assert fast.report.latest.calls == {"packed": 2}


def test_gradients_keep_padding_before_a_backward_pass() -> None:
    model = made(RIGHT["arange < lengths"]).train()
    fast: Any = fxbt.optimize(model)
    inputs = {"input_ids": ids_of(3, 9), "lengths": torch.tensor([9, 4, 2])}
    for _ in range(2):
        compare(fast(**inputs), model(**inputs), atol_of_magnitude=2e-5)
    assert "packed" not in fast.report.latest.calls and not fast.report.fallbacks


def test_training_drops_padding() -> None:
    model = made(RIGHT["arange < lengths"]).train()
    original, fast = copy.deepcopy(model), fxbt.optimize(model)
    for lengths in ([9, 4, 2], [3, 9, 5], [9, 1, 8]):
        inputs = {"input_ids": ids_of(3, 9), "lengths": torch.tensor(lengths)}
        valid = is_right(3, 9, inputs["lengths"])
        found, expected = [], []
        for net, grads in ((fast, found), (original, expected)):
            net.zero_grad()
            net(**inputs)[valid].pow(3).sum().backward()
            grads += [p.grad for p in net.parameters() if p.grad is not None]
        for new, old in zip(found, expected, strict=True):
            compare(new, old, atol_of_magnitude=1e-4)
    assert fast.report.latest.calls["packed"] == 2 and not fast.report.fallbacks


# --- what must stay dense ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    name: str
    build: Callable[[], nn.Module]
    reason: str

    def __str__(self) -> str:
        return self.name


def refused(name: str, valid: Validity, reason: str, **variation: Any) -> Refused:
    return Refused(name, lambda: made(valid, **variation), reason)


def other_layer(second: Validity) -> Callable[[], nn.Module]:
    plain = RIGHT["arange < lengths"]
    return lambda: enliven(Spelled(plain, second, plain)).eval()


def other_mean(mean: Validity) -> Callable[[], nn.Module]:
    plain = RIGHT["arange < lengths"]
    return lambda: enliven(Spelled(plain, plain, mean)).eval()


NONE = "no attention is masked"
UNMASKED = "padding is not masked out"
PLAIN = RIGHT["arange < lengths"]
REFUSED = [
    refused("inverted in the second layer", PLAIN, UNMASKED, second=lambda m, x: gate.additive(~m, x)),
    refused("no mask in the second layer", PLAIN, UNMASKED, second=lambda m, x: None),
    refused("queries instead of keys", PLAIN, NONE, mask=lambda m, x: (1.0 - m[:, None, :, None].float()) * -1e30),
    refused("-10000", PLAIN, NONE, mask=lambda m, x: (1.0 - m[:, None, None].float()) * -1e4),
    refused("a mean of all", PLAIN, "mixes tokens", head=lambda net, x, m: x.mean(1)),
    refused("a mean of padding", PLAIN, "mixes tokens", head=lambda net, x, m: gate.masked_mean(net, x, ~m)),
    refused("a sum by count", PLAIN, "mixes tokens", head=lambda net, x, m: x.sum(1) / m.sum(1, keepdim=True)),
    refused("half the heads", PLAIN, NONE, mask=lambda m, x: gate.half_the_heads(m, x)),
    refused("of the ids", lambda n, x: positions(x) < (n + 0 * x[:, 0])[:, None], NONE),
    refused("of as many as there are ids", lambda n, x: positions(x) < x.ne(7).sum(1, keepdim=True), NONE),
    refused("the same for all rows", lambda n, x: (positions(x) < n.max())[None].expand_as(x), NONE),
    Refused("one less in the second layer", other_layer(lambda n, x: positions(x) < n[:, None] - 1), ""),
    Refused("one more in the second layer", other_layer(lambda n, x: positions(x) <= n[:, None]), UNMASKED),
    Refused("other rows in the second layer", other_layer(lambda n, x: positions(x) < n.flip(0)[:, None]), UNMASKED),
    Refused("the other end in the second layer", other_layer(LEFT["at the right"]), UNMASKED),
    Refused("one more in the mean", other_mean(lambda n, x: positions(x) <= n[:, None]), "mixes tokens"),
    Refused("other rows in the mean", other_mean(lambda n, x: positions(x) < n.flip(0)[:, None]), "mixes tokens"),
]


def check_dense(model: nn.Module) -> Any:
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for batch, length in SHAPES:
            for seed in range(2):
                ids, lengths = ids_of(batch, length), lengths_of(batch, length, seed)
                compare(fast(ids, lengths), model(ids, lengths), atol_of_magnitude=2e-5)
    assert not fast.report.fallbacks
    return fast


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_would_see_padding_stays_dense(case: Refused) -> None:
    fast = check_dense(case.build())
    assert fast.report.hits["padding"] == 0
    assert case.reason in fast.report.why("padding")


FEWER = "a row has fewer tokens than lengths says"
HIDDEN_TOKENS: dict[str, Validity] = {
    "one less": lambda n, x: positions(x) < n[:, None] - 1,
    "two less, clamped": lambda n, x: positions(x) < (n - 2).clamp(min=1)[:, None],
    "other rows": lambda n, x: positions(x) < n.flip(0)[:, None],
    "the shortest": lambda n, x: positions(x) < n.amin(0, keepdim=True).expand_as(n)[:, None],
    "halves": lambda n, x: positions(x) < (n[:, None] // 2),
}


@pytest.mark.parametrize("name", HIDDEN_TOKENS)
def test_tokens_that_no_token_sees_are_no_padding(name: str) -> None:
    """A model may hide some of the tokens that the lengths count: who reads its outputs reads them there too."""
    fast = check_dense(made(HIDDEN_TOKENS[name]))
    calls = fast.report.latest.calls
    assert set(calls) == {FEWER} or (fast.report.hits["padding"] == 0 and not calls)


def test_positions_that_wrap_around_are_other_positions() -> None:
    """torch.arange(300, dtype=torch.uint8) begins again at 256: one layer sees there what the other one hides."""
    net = Spelled(RIGHT["arange < lengths"], RIGHT["arange of the lengths' dtype"], RIGHT["arange < lengths"])
    fast: Any = fxbt.optimize(enliven(net).eval())
    with torch.no_grad():
        for length in (9, 300):
            ids, lengths = ids_of(3, length), torch.tensor([min(length, 255), 4, 2], dtype=torch.uint8)
            compare(fast(ids, lengths), net(ids, lengths), atol_of_magnitude=2e-5)
    assert fast.report.hits["padding"] == 0 and not fast.report.fallbacks


def test_two_roundings_of_parts_are_two_masks() -> None:
    """0.6 of 5 tokens are 3 in float32 and 4 in float64: what one layer hides, the other one sees."""
    second: Validity = lambda n, x: positions(x) < (n.double() * x.size(1))[:, None]  # noqa: E731
    model = enliven(Spelled(PARTS["parts"], second, PARTS["parts"])).eval()
    fast: Any = fxbt.optimize(model)
    with torch.no_grad():
        for given in ([1.0, 0.6, 0.2], [1.0, 0.8, 0.6]):
            ids, parts = ids_of(3, 5), torch.tensor(given)
            compare(fast(ids, parts), model(ids, parts), atol_of_magnitude=2e-5)
    assert fast.report.hits["padding"] == 0 and not fast.report.fallbacks


def test_a_mask_beside_lengths() -> None:
    """Where both hide padding, tokens are where the mask says."""
    model = Both()
    fast: Any = fxbt.optimize(enliven(model).eval())
    with torch.no_grad():
        for batch, length in SHAPES:
            ids, lengths = ids_of(batch, length), lengths_of(batch, length)
            mask = (ids % 3 > 0) | (torch.arange(length) == 0)
            compare(
                fast(ids, mask.long(), lengths),
                model(ids, mask.long(), lengths),
                atol_of_magnitude=2e-5,
                valid=mask & is_right(batch, length, lengths),
            )
    assert not fast.report.fallbacks
    assert fast.report.latest.calls.get("packed", 0) == 3 or fast.report.hits["padding"] == 0


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = gate.Net()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, lengths: Tensor) -> Tensor:
        return self.net(input_ids, attention_mask.bool() & (positions(input_ids) < lengths[:, None]))
