"""The models fxbt is judged on: one tiny, randomly weighted model an architecture, with inputs for any shape.

`CASES` is made for `pytest.mark.parametrize`. What is true of an original is counted and compared here without
fxbt: `count_attentions` and `compare`.

Fully masked rows (left padding under a causal mask): measured on transformers 5.23, the eager and sdpa paths of
GPT-2, Llama, CLIP's text model and the decoders of BART and Whisper differ there by the output's own magnitude
(eager averages over all keys, sdpa gives zeros), on 4.57.6 those of GPT-2, Llama and Whisper; T5 and all encoders
agree everywhere. So an optimised eager model must equal its original everywhere; an optimised sdpa model must equal
its own original everywhere and the eager one at positions whose attention_mask is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Inputs = dict[str, Tensor]
VOCAB = 99
PAD = 1
END = 4
TOKEN_SHAPES = ((2, 7), (3, 12), (1, 5))
SEVERAL_SHAPES = ((2, 7), (3, 12), (4, 5))  # nn.MultiheadAttention itself asks whether the batch is 1
IMAGE_SHAPES = ((2, 0), (3, 0), (1, 0))
ALL_PADDINGS = ("right", "none", "left")


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        build: attention implementation ("eager" or "sdpa", which plain torch models ignore) -> model in eval.
        inputs: (batch, seq, padding) -> keyword arguments of forward.
        attentions: attention computations in one forward; `count_attentions` must agree.
        qkv: least number of merged projections: linears that share an input and feed one attention.
        layers: encoder and decoder layers that become one node each.
        implementations: the attention implementations the model has.
        masks: names of inputs that hold the (batch, seq) validity of output positions.
        tolerance: largest difference of an output, as a fraction of its magnitude.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int, int, str], Inputs]
    attentions: int
    qkv: int
    layers: tuple[int, int] = (2, 0)
    shapes: tuple[tuple[int, int], ...] = TOKEN_SHAPES
    paddings: tuple[str, ...] = ALL_PADDINGS
    implementations: tuple[str, ...] = ("eager", "sdpa")
    masks: tuple[str, ...] = ("attention_mask",)
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return self.name

    def valid(self, inputs: Inputs) -> list[Tensor]:
        """The validity masks among these inputs."""
        return [inputs[name].bool() for name in self.masks if name in inputs]


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter: init's std of 0.02 makes attention a plain average."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in [parameter for parameter in model.parameters() if parameter.numel()]:
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.data.add_(0.1 * noise)
            continue
        fan_in = parameter[0].numel()
        parameter.data.copy_(noise * (1.2 / math.sqrt(fan_in)))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data.mul_(math.sqrt(module.embedding_dim) / 1.2)
    return model.eval()


def padding_mask(batch: int, seq: int, padding: str) -> Tensor:
    """(batch, seq) of 0/1: row 0 is full (unless alone), each further row lacks two positions more."""
    missing = torch.arange(batch).mul(2).add(batch == 1).clamp(max=seq - 1)[:, None]
    position = torch.arange(seq)[None]
    if padding == "none":
        return torch.ones(batch, seq, dtype=torch.long)
    if padding == "right":
        return (position < seq - missing).long()
    if padding == "left":
        return (position >= missing).long()
    raise ValueError(f"padding {padding!r}: expected one of {ALL_PADDINGS}")


def token_ids(batch: int, seq: int, mask: Tensor, seed: int = 0) -> Tensor:
    """Random ids above the special ones, PAD where the mask is 0."""
    generator = torch.Generator().manual_seed(seed + 100 * batch + seq)
    ids = torch.randint(5, VOCAB, (batch, seq), generator=generator)
    return torch.where(mask.bool(), ids, PAD)


def tokens(batch: int, seq: int, padding: str) -> Inputs:
    """input_ids and attention_mask."""
    mask = padding_mask(batch, seq, padding)
    return {"input_ids": token_ids(batch, seq, mask), "attention_mask": mask}


def token_pairs(batch: int, seq: int, padding: str) -> Inputs:
    """Encoder tokens as `tokens`, and decoder tokens two longer, padded alike."""
    mask = padding_mask(batch, seq + 2, padding)
    decoder = {"decoder_input_ids": token_ids(batch, seq + 2, mask, seed=7), "decoder_attention_mask": mask}
    return {**tokens(batch, seq, padding), **decoder}


def ended_tokens(batch: int, seq: int, padding: str) -> Inputs:
    """`tokens` whose last valid one is the end token that CLIP pools at."""
    inputs = tokens(batch, seq, padding)
    last = (inputs["attention_mask"] * torch.arange(1, seq + 1)).argmax(dim=1, keepdim=True)
    inputs["input_ids"].scatter_(1, last, END)
    return inputs


def images(batch: int, seq: int, padding: str) -> Inputs:
    """pixel_values (batch, 3, 16, 16)."""
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))}


def texts_and_images(batch: int, seq: int, padding: str) -> Inputs:
    """What the full CLIP model takes: as many texts as images."""
    return {**ended_tokens(batch, seq, padding), **images(batch, seq, padding)}


def audio(batch: int, seq: int, padding: str) -> Inputs:
    """input_values of 40 samples a step, and their attention_mask."""
    mask = padding_mask(batch, seq, padding).repeat_interleave(40, dim=1)
    generator = torch.Generator().manual_seed(batch + seq)
    return {"input_values": torch.randn(mask.shape, generator=generator) * mask, "attention_mask": mask}


def speech(batch: int, seq: int, padding: str) -> Inputs:
    """Whisper's input_features of fixed length, and decoder tokens."""
    mask = padding_mask(batch, seq, padding)
    generator = torch.Generator().manual_seed(batch + seq)
    features = torch.randn(batch, 8, 24, generator=generator)
    return {
        "input_features": features,
        "decoder_input_ids": token_ids(batch, seq, mask),
        "decoder_attention_mask": mask,
    }


def implementations(architecture: str) -> tuple[str, ...]:
    """The attention implementations this version of transformers has for a model class."""
    return ("eager", "sdpa") if getattr(transformers, architecture)._supports_sdpa else ("eager",)


def huggingface(architecture: str, **settings: Any) -> Callable[[str], nn.Module]:
    """A builder of a transformers model from its class name and config settings."""

    def build(implementation: str) -> nn.Module:
        model_class = getattr(transformers, architecture)
        config = model_class.config_class(**settings)
        torch.manual_seed(0)
        return enliven(model_class._from_config(config, attn_implementation=implementation))

    return build


ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
CLIP_TEXT: dict[str, Any] = {**ENCODER, "bos_token_id": 3, "eos_token_id": END}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": PAD,
    "bos_token_id": 3,
    "eos_token_id": END,
    "decoder_start_token_id": END,
    "use_cache": False,
}


# --- plain torch models, of our own writing -----------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The sizes of the plain torch models."""

    hidden: int = 32
    heads: int = 4
    layers: int = 2
    context: int = 32


class CausalSelfAttention(nn.Module):
    """Fused qkv, split; softmax by hand over a masked triangle, or one SDPA call."""

    bias: Tensor

    def __init__(self, sizes: Sizes, flash: bool):
        super().__init__()
        self.heads, self.hidden, self.flash = sizes.heads, sizes.hidden, flash
        self.c_attn = nn.Linear(sizes.hidden, 3 * sizes.hidden)
        self.c_proj = nn.Linear(sizes.hidden, sizes.hidden)
        self.attn_dropout = nn.Dropout(0.1)
        triangle = torch.tril(torch.ones(sizes.context, sizes.context))
        self.register_buffer("bias", triangle.view(1, 1, sizes.context, sizes.context))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, hidden = x.size()
        q, k, v = self.c_attn(x).split(self.hidden, dim=2)
        q, k, v = (t.view(batch, seq, self.heads, hidden // self.heads).transpose(1, 2) for t in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :seq, :seq] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, seq, hidden))


class Block(nn.Module):
    """Pre-norm block around any attention of x (and a mask)."""

    def __init__(self, sizes: Sizes, attention: nn.Module):
        super().__init__()
        self.ln_1 = nn.LayerNorm(sizes.hidden)
        self.attn = attention
        self.ln_2 = nn.LayerNorm(sizes.hidden)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.hidden, 2 * sizes.hidden), nn.GELU(), nn.Linear(2 * sizes.hidden, sizes.hidden)
        )

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x), *mask)
        return x + self.mlp(self.ln_2(x))


class PlainModel(nn.Module):
    """Token and position embeddings, blocks, norm, head; `blocks` get the padding mask where one is given."""

    def __init__(self, sizes: Sizes, make_attention: Callable[[], nn.Module]):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, sizes.hidden)
        self.wpe = nn.Embedding(sizes.context, sizes.hidden)
        self.blocks = nn.ModuleList(Block(sizes, make_attention()) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        position = torch.arange(input_ids.size(1), device=input_ids.device)
        x = self.wte(input_ids) + self.wpe(position)
        masks = () if attention_mask is None else (attention_mask,)
        for block in self.blocks:
            x = block(x, *masks)
        return self.head(self.norm(x))


class MultiheadSelfAttention(nn.Module):
    """nn.MultiheadAttention under a key padding mask."""

    def __init__(self, sizes: Sizes, need_weights: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(sizes.hidden, sizes.heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=mask == 0, need_weights=self.need_weights)[0]


class EinsumAttention(nn.Module):
    """Attention as three einsums on [batch, seq, heads, dim] tensors."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.heads, self.scale = sizes.heads, (sizes.hidden // sizes.heads) ** -0.5
        self.query, self.key, self.value = (nn.Linear(sizes.hidden, sizes.hidden) for _ in range(3))
        self.out = nn.Parameter(torch.empty(sizes.heads, sizes.hidden // sizes.heads, sizes.hidden))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.query, self.key, self.value))
        scores = torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k)
        scores = scores + (1.0 - mask[:, None, None, :].to(scores.dtype)) * -1e9
        context = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return torch.einsum("bqhd,hdo->bqo", context, self.out)


class TorchEncoder(nn.Module):
    """nn.TransformerEncoder on embedded tokens."""

    def __init__(self, sizes: Sizes, norm_first: bool):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, sizes.hidden)
        layer = nn.TransformerEncoderLayer(
            sizes.hidden, sizes.heads, 2 * sizes.hidden, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(self.wte(input_ids), src_key_padding_mask=attention_mask == 0)


def plain(make: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    """A builder of a plain torch model."""

    def build(implementation: str) -> nn.Module:
        torch.manual_seed(0)
        return enliven(make())

    return build


def ids_only(batch: int, seq: int, padding: str) -> Inputs:
    """input_ids without padding."""
    return {"input_ids": tokens(batch, seq, "none")["input_ids"]}


def _plain(attention: Callable[[Sizes], nn.Module]) -> Callable[[str], nn.Module]:
    sizes = Sizes()
    return plain(lambda: PlainModel(sizes, lambda: attention(sizes)))


CASES: list[Case] = [
    Case("bert", huggingface("BertModel", **ENCODER), tokens, attentions=2, qkv=2),
    Case("roberta", huggingface("RobertaModel", **ENCODER), tokens, attentions=2, qkv=2),
    Case(
        "distilbert",
        huggingface(
            "DistilBertModel",
            vocab_size=VOCAB,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=64,
            pad_token_id=PAD,
        ),
        tokens,
        attentions=2,
        qkv=2,
    ),
    Case("albert", huggingface("AlbertModel", embedding_size=16, **ENCODER), tokens, attentions=2, qkv=2),
    Case(
        "electra",
        huggingface("ElectraModel", embedding_size=16, **ENCODER),
        tokens,
        attentions=2,
        qkv=2,
        implementations=implementations("ElectraModel"),
    ),
    Case(
        "mpnet",
        huggingface("MPNetModel", **ENCODER),
        tokens,
        attentions=2,
        qkv=2,
        implementations=("eager",),
    ),
    Case(
        "deberta-v2",
        huggingface(
            "DebertaV2Model",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            max_relative_positions=-1,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            type_vocab_size=0,
            **ENCODER,
        ),
        tokens,
        attentions=2,
        qkv=2,
        implementations=("eager",),
    ),
    Case(
        "vit", huggingface("ViTModel", **VISION), images, attentions=2, qkv=2, shapes=IMAGE_SHAPES, paddings=("none",)
    ),
    Case("clip-text", huggingface("CLIPTextModel", **CLIP_TEXT), ended_tokens, attentions=2, qkv=2, layers=(0, 2)),
    Case(
        "clip-vision",
        huggingface("CLIPVisionModel", **VISION),
        images,
        attentions=2,
        qkv=2,
        shapes=IMAGE_SHAPES,
        paddings=("none",),
    ),
    Case(
        "clip",
        huggingface("CLIPModel", text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16),
        texts_and_images,
        attentions=4,
        qkv=4,
        layers=(2, 2),
        # For one text and one image the only logit is a sum that cancels to 0.18: there, eager itself is 1.1e-5 of it
        # away from float64 (measured; the optimised model 8e-7).
        tolerance=2e-5,
    ),
    Case(
        "wav2vec2",
        huggingface(
            "Wav2Vec2Model",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16, 16),
            conv_kernel=(10, 4),
            conv_stride=(5, 4),
            feat_extract_norm="layer",
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        audio,
        attentions=2,
        qkv=2,
        paddings=("right", "none"),
        masks=(),
    ),
    Case(
        "gpt2",
        huggingface("GPT2Model", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False),
        tokens,
        attentions=2,
        qkv=0,
        layers=(0, 2),
    ),
    Case(
        "llama",
        huggingface("LlamaModel", num_key_value_heads=2, use_cache=False, **ENCODER),
        tokens,
        attentions=2,
        qkv=2,
        layers=(0, 2),
    ),
    Case(
        "t5",
        huggingface(
            "T5Model",
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            pad_token_id=PAD,
            use_cache=False,
        ),
        token_pairs,
        attentions=6,
        qkv=6,
        layers=(2, 2),
        implementations=implementations("T5Model"),
        masks=("attention_mask", "decoder_attention_mask"),
    ),
    Case(
        "bart",
        huggingface("BartModel", max_position_embeddings=64, **SEQ2SEQ),
        token_pairs,
        attentions=6,
        qkv=6,
        layers=(2, 2),
        masks=("attention_mask", "decoder_attention_mask"),
    ),
    Case(
        "whisper",
        huggingface(
            "WhisperModel",
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=64,
            **SEQ2SEQ,
        ),
        speech,
        attentions=6,
        qkv=6,
        layers=(2, 2),
        masks=("decoder_attention_mask",),
    ),
    Case(
        "nanogpt",
        _plain(lambda sizes: CausalSelfAttention(sizes, flash=False)),
        ids_only,
        attentions=2,
        qkv=0,
        layers=(0, 2),
        paddings=("none",),
        implementations=("eager",),
    ),
    Case(
        "nanogpt-flash",
        _plain(lambda sizes: CausalSelfAttention(sizes, flash=True)),
        ids_only,
        attentions=2,
        qkv=0,
        layers=(0, 2),
        paddings=("none",),
        implementations=("sdpa",),
    ),
    Case(
        "multihead-attention",
        _plain(lambda sizes: MultiheadSelfAttention(sizes, need_weights=False)),
        tokens,
        attentions=2,
        qkv=0,
        shapes=SEVERAL_SHAPES,
        implementations=("sdpa",),
    ),
    Case(
        "multihead-attention-weights",
        _plain(lambda sizes: MultiheadSelfAttention(sizes, need_weights=True)),
        tokens,
        attentions=2,
        qkv=0,
        shapes=SEVERAL_SHAPES,
        implementations=("eager",),
    ),
    Case(
        "transformer-encoder",
        plain(lambda: TorchEncoder(Sizes(), norm_first=False)),
        tokens,
        attentions=2,
        qkv=0,
        shapes=SEVERAL_SHAPES,
        implementations=("sdpa",),
    ),
    Case(
        "transformer-encoder-prenorm",
        plain(lambda: TorchEncoder(Sizes(), norm_first=True)),
        tokens,
        attentions=2,
        qkv=0,
        shapes=SEVERAL_SHAPES,
        implementations=("sdpa",),
    ),
    Case("einsum", _plain(EinsumAttention), tokens, attentions=2, qkv=2, layers=(0, 0), implementations=("eager",)),
]
CASES_BY_NAME = {case.name: case for case in CASES}
VARIANTS = [(case, implementation) for case in CASES for implementation in case.implementations]
VARIANT_IDS = [f"{case.name}-{implementation}" for case, implementation in VARIANTS]


# --- what is true of the original --------------------------------------------------------------------------

SOFTMAXES = {torch.softmax, torch.Tensor.softmax, F.softmax, F.softmin}
# Calls that hold exactly one attention each and hide their softmax from a torch-function mode.
WHOLE_ATTENTIONS = {
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
}


class _AttentionCounter(TorchFunctionMode):
    """Counts calls at the level the model makes them, so that a softmax inside SDPA is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func in SOFTMAXES or func in WHOLE_ATTENTIONS
        return func(*args, **(kwargs or {}))


def count_attentions(model: nn.Module, inputs: Inputs | tuple[Any, ...]) -> int:
    """How many attentions the original computes in one forward (models here use softmax for nothing else)."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    counter = _AttentionCounter()
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    return counter.count


def compare(
    actual: Any,
    expected: Any,
    *,
    atol_of_magnitude: float = 1e-5,
    valid: Sequence[Tensor] | Tensor | None = None,
    dropped: Sequence[Tensor] = (),
) -> None:
    """Assert that two outputs have one structure, and tensors of one shape and dtype with equal numbers.

    Args:
        atol_of_magnitude: largest difference, as a fraction of the expected tensor's largest finite value.
        valid: (batch, seq) boolean masks; an output that begins with the dims of one is compared only where it is
            True.
        dropped: (batch, seq) boolean masks; where one is False, such an output may hold, throughout, what fxbt puts
            at padding: 0, or the lowest number if its last axis is seq.

    Raises:
        AssertionError: naming the output's place, what was found and what was expected.
    """
    masks = [valid] if isinstance(valid, Tensor) else list(valid or ())
    assert type(actual) is type(expected), f"got a {type(actual)}, expected a {type(expected)}"
    found, found_spec = pytree.tree_flatten(actual)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    assert found_spec == wanted_spec, f"structure {found_spec}, expected {wanted_spec}"
    for index, (got, want) in enumerate(zip(found, wanted, strict=True)):
        want = padding_blanked(got, want, dropped) if isinstance(got, Tensor) else want
        _compare_leaf(got, want, f"output {index}", atol_of_magnitude, masks)


def padding_blanked(got: Tensor, want: Tensor, dropped: Sequence[Tensor]) -> Tensor:
    """`want` with padding as the contract has it, if that is what `got` has at every padded position."""
    for mask in dropped:
        if want.shape[: mask.dim()] != mask.shape:
            continue
        scores_positions = want.dim() == mask.dim() and want.is_floating_point()
        fill = torch.finfo(want.dtype).min if scores_positions else 0
        if bool((got[~mask] == fill).all()):
            return torch.where(mask.view(*mask.shape, *[1] * (want.dim() - mask.dim())), want, fill)
    return want


def _compare_leaf(got: Any, want: Any, place: str, tolerance: float, masks: list[Tensor]) -> None:
    assert type(got) is type(want), f"{place}: got a {type(got).__name__}, expected a {type(want).__name__}"
    if not isinstance(want, Tensor):
        assert got == want, f"{place}: got {got!r}, expected {want!r}"
        return
    assert got.shape == want.shape, f"{place}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{place}: dtype {got.dtype}, expected {want.dtype}"
    for mask in masks:
        if want.shape[: mask.dim()] == mask.shape:
            got, want = got[mask], want[mask]
            break
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{place}: integer or boolean values differ"
        return
    assert torch.equal(got.isnan(), want.isnan()), f"{place}: NaN at other positions than expected"
    error, magnitude = difference(got, want)
    assert error <= tolerance * magnitude, (
        f"{place} {tuple(want.shape)}: differs by {error:.3g}, allowed {tolerance:g} of magnitude {magnitude:.3g}"
    )


def difference(got: Tensor, want: Tensor) -> tuple[float, float]:
    """The largest absolute difference of two float tensors, and the expected one's magnitude, over finite values."""
    finite = want.isfinite()
    assert torch.equal(got[~finite].nan_to_num(), want[~finite].nan_to_num()), "infinities differ"
    if not finite.any():
        return 0.0, 1.0
    got, want = got[finite].double(), want[finite].double()
    return (got - want).abs().max().item(), max(want.abs().max().item(), 1e-6)


def gradients(model: nn.Module, fast: Any, inputs: Inputs) -> list[dict[str, Tensor]]:
    """Gradients of the optimised and of the original model, by parameter, for the squared sum of the first output."""
    grads = []
    for run in (fast, model):
        model.zero_grad()
        output = run(**inputs)
        (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return grads


def compare_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], exact: Callable[[], dict[str, Tensor]] | None = None
) -> None:
    """Assert that the same parameters have the same gradients, to 1e-5 of the largest one's magnitude.

    A key's bias has none but rounding (softmax takes no notice of it): its own magnitude is no measure. Where float32
    rounds more than that, those in float64, `exact`, must be no farther than from the expected ones.
    """
    assert set(actual) == set(expected), f"gradients of {set(actual) ^ set(expected)} on one side alone"
    magnitude = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max().item()
        if error > 1e-5 * magnitude and exact is not None:
            reference = exact()[name]
            mine, eager = ((found[name].double() - reference).abs().max().item() for found in (actual, expected))
            assert mine <= eager, f"{name}: gradient is off by {mine:.3g} from float64's, eager's by {eager:.3g}"
            continue
        assert error <= 1e-5 * magnitude, f"{name}: gradient differs by {error:.3g}, magnitude {magnitude:.3g}"
