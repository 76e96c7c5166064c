"""The models that padding must be dropped in: tiny and randomly weighted, each with calls of any mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import ENCODER, PAD, SEQ2SEQ, VOCAB, Inputs, huggingface
from torch import Tensor, nn

DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
}
DEBERTA: dict[str, Any] = {
    **ENCODER,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "type_vocab_size": 0,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "use_cache": False,
    "pad_token_id": PAD,
}
DECODER: dict[str, Any] = {**ENCODER, "num_key_value_heads": 2, "use_cache": False}
T5: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": PAD,
    "decoder_start_token_id": PAD,
    "use_cache": False,
}
BART: dict[str, Any] = {**SEQ2SEQ, "max_position_embeddings": 64}
EMBEDDED: dict[str, Any] = {**ENCODER, "embedding_size": 16}
ESM: dict[str, Any] = {**ENCODER, "mask_token_id": 4, "token_dropout": True, "position_embedding_type": "rotary"}
MODERN: dict[str, Any] = {
    **ENCODER,
    "num_hidden_layers": 3,
    "global_attn_every_n_layers": 2,
    "local_attention": 4,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "cls_token_id": 3,
    "sep_token_id": 4,
}
BLOOM: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
FALCON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "use_cache": False,
    "pad_token_id": PAD,
}

GEMMA2: dict[str, Any] = {
    **DECODER,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "attn_logit_softcapping": 2.0,
}
T5GEMMA: dict[str, Any] = {"encoder": GEMMA2, "decoder": GEMMA2}
EXPERTS: dict[str, Any] = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
SINKS: dict[str, Any] = {**EXPERTS, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


@dataclass(frozen=True)
class Case:
    """One model. `masks` names the inputs that hold validity, the one of the outputs' positions first."""

    architecture: str
    settings: dict[str, Any]
    implementation: str = "eager"
    masks: tuple[str, ...] = ("attention_mask",)
    extra: tuple[tuple[str, Any], ...] = ()
    wrap: Callable[[nn.Module], nn.Module] | None = None

    def __str__(self) -> str:
        parts = [self.architecture, self.implementation, *(name for name, _ in self.extra)]
        parts += [] if self.masks != ("decoder_attention_mask", "attention_mask") else ["decoder mask"]
        return "-".join([*parts, self.wrap.__name__] if self.wrap else parts)

    def model(self) -> nn.Module:
        model = huggingface(self.architecture, **self.settings)(self.implementation)
        return self.wrap(model).eval() if self.wrap else model

    def inputs(self, mask: Tensor, decoder_mask: Tensor) -> Inputs:
        """Random ids, at padding too; the decoder's tokens are others than the encoder's."""
        generator = torch.Generator().manual_seed(int(mask.sum()))
        ids = torch.randint(5, VOCAB, mask.shape, generator=generator)
        inputs: Inputs = {"input_ids": ids, "attention_mask": mask, **dict(self.extra)}
        if self.has_decoder:
            inputs["decoder_input_ids"] = torch.randint(5, VOCAB, decoder_mask.shape, generator=generator)
        if "decoder_attention_mask" in self.masks:
            inputs["decoder_attention_mask"] = decoder_mask
        return inputs

    @property
    def has_decoder(self) -> bool:
        return self.architecture in (
            "T5Model",
            "T5GemmaModel",
            "BartModel",
            "T5ForConditionalGeneration",
            "BartForConditionalGeneration",
        )


class MaskedMean(nn.Module):
    """Sentence embeddings: the mean of the tokens that are none of padding, normalised."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask.unsqueeze(-1).expand(tokens.size()).float()
        pooled = (tokens * weights).sum(1) / torch.clamp(weights.sum(1), min=1e-9)
        return nn.functional.normalize(pooled, p=2, dim=1)


class MeanByProduct(MaskedMean):
    """The same as a product of the mask with the tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        weights = attention_mask.to(tokens.dtype)
        return (weights[:, None] @ tokens).squeeze(1) / weights.sum(1, keepdim=True).clamp(min=1)


class MaskedMax(MaskedMean):
    """The largest value of each feature among the tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return tokens.masked_fill(attention_mask[..., None] == 0, -1e9).max(1).values


BOTH_MASKS = ("decoder_attention_mask", "attention_mask")
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


def both(architecture: str, settings: dict[str, Any], **options: Any) -> list[Case]:
    return [Case(architecture, settings, implementation, **options) for implementation in ("eager", "sdpa")]


ENCODERS = [
    *both("BertModel", ENCODER),
    *both("RobertaModel", ENCODER),
    *both("DistilBertModel", DISTILBERT),
    *both("AlbertModel", EMBEDDED),
    *both("ElectraModel", EMBEDDED),
    Case("MPNetModel", ENCODER),
    *both("XLMRobertaModel", ENCODER),
    *both("CamembertModel", ENCODER),
    *both("EsmModel", ESM),
    Case("DebertaV2Model", DEBERTA),
    *both("ModernBertModel", MODERN),
    *both("T5EncoderModel", T5),
    Case("RoFormerModel", {**ENCODER, "embedding_size": 32}),
    Case("T5GemmaEncoderModel", {**T5GEMMA, "is_encoder_decoder": False}),
]
DECODERS = [
    *both("GPT2Model", GPT2),
    *both("LlamaModel", DECODER),
    *both("OPTModel", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    *both("Qwen3Model", {**DECODER, "head_dim": 8}),
    *both("GPTNeoXModel", {**ENCODER, "use_cache": False}),
    Case("BloomModel", BLOOM),
    *both("FalconModel", FALCON),
    *both("MistralModel", {**DECODER, "sliding_window": 4}),
    Case("Gemma2Model", GEMMA2),
]
PAIRS = [
    *both("T5Model", T5, masks=BOTH_MASKS),
    Case("T5Model", T5, masks=("attention_mask",)),
    *both("BartModel", BART, masks=BOTH_MASKS),
    Case("BartModel", BART, masks=("attention_mask",)),
    Case("T5GemmaModel", T5GEMMA, masks=BOTH_MASKS, extra=(("use_cache", False),)),
]
WITH_HEADS = [
    *(Case(f"Bert{head}", ENCODER, "sdpa") for head in HEADS),
    *(Case(f"DebertaV2{head}", DEBERTA) for head in HEADS[1:3]),
    Case("ModernBertForMaskedLM", MODERN, "sdpa"),
    Case("GPT2LMHeadModel", GPT2, "sdpa"),
    Case("GPT2ForSequenceClassification", GPT2),
    Case("LlamaForSequenceClassification", DECODER, "sdpa"),
    Case("LlamaForCausalLM", DECODER),
    Case("Gemma2ForCausalLM", GEMMA2),
    Case("T5ForConditionalGeneration", T5, masks=BOTH_MASKS),
    Case("BartForConditionalGeneration", BART, "sdpa", masks=BOTH_MASKS),
    Case("BertModel", ENCODER, "sdpa", extra=(("output_hidden_states", True),)),
    Case("LlamaModel", DECODER, "eager", extra=(("output_hidden_states", True),)),
    *(Case("BertModel", ENCODER, "sdpa", wrap=wrap) for wrap in (MaskedMean, MeanByProduct, MaskedMax)),
]

SINK = "an attention sink"
ROUTED = "an op mixes tokens, including padded ones"
DENSE = [
    (Case("GptOssModel", SINKS), SINK),
    (Case("MixtralModel", EXPERTS, "sdpa"), ROUTED),
    (Case("MixtralModel", EXPERTS), ROUTED),
    (Case("MixtralForCausalLM", {**EXPERTS, "sliding_window": None}, "sdpa"), ROUTED),
]
