"""Stand-ins for library functions that cannot be traced as they are; no other file names any.

A graph cannot branch on values, and a Python loop becomes thousands of nodes. Each entry replaces one function during a
trace, in the tracing thread only, and computes the same for every input that it accepts. The graph asserts what it
requires, and a call that violates this runs the original forward.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor, nn

from ..errors import CaptureError
from ..torch_compat import (
    ATTENTION_ASKS_FOR_ONE,
    SLICES_ARE_UNKNOWN,
    FakeTensor,
    FakeTensorMode,
    _disable_current_modes,
    assert_async,
    attention_of_any_batch,
    decompositions,
    get_proxy_mode,
    place_in_slice,
)
from .isolated import here_only
from .scan import selective_scan


@dataclass(frozen=True)
class Patch:
    """`replacement` replaces `function` ("name" or "Class.name") of `module`; `reason` says why.

    With `only_of`, only that function is replaced: a function that someone put in its place is traced as it is.
    """

    module: str
    function: str
    replacement: Callable[..., Any]
    reason: str
    only_of: Any = None


def _complete_images(self: Any, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int = 200) -> Any:
    """Embeds images without padded pixels: all have the same patches, shuffled anew for each image."""
    assert_async(pixel_mask.all(), "an image has padded pixels; the graph serves only images without padding")
    x = self.patch_embeddings(pixel_values)
    batch, channels, height, width = x.shape
    count = height * width
    kept = min(count, max_image_length) if isinstance(max_image_length, int) and max_image_length >= 0 else count
    sides = [self.config.image_size // self.config.patch_size] * 2
    grid = self.position_embeddings[:, 1:].transpose(1, 2).unflatten(2, sides)
    positions = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)
    x = x.flatten(2).transpose(1, 2) + positions.flatten(2).transpose(1, 2)
    order = torch.rand(batch, count, device=x.device).argsort(1)[:, :kept]
    x = x.gather(1, order.unsqueeze(-1).expand(-1, -1, channels))
    first = (self.cls_token + self.position_embeddings[:, :1]).expand(batch, -1, -1)
    x = self.dropout(torch.cat((first, x), dim=1))
    mask = torch.ones(batch, kept + 1, dtype=torch.long, device=x.device)
    patch_index = torch.stack((order // width, order % width), -1)
    return x, mask, (patch_index, (height, width))


def _never() -> bool:
    return False


_APPLY = nn.Module._apply


def _unconverted(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Accepts conversions of a module to the dtype and device that it has already; others would change the model."""
    named = [*self.named_parameters(recurse=recurse), *self.named_buffers(recurse=recurse)]
    if not any(isinstance(tensor, FakeTensor) for _, tensor in named):
        return _APPLY(self, fn, recurse)  # not a module of the traced model, but another thread's
    with _disable_current_modes(), FakeTensorMode():
        for name, tensor in named:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            if fn(like) is not like:
                raise CaptureError(f"forward converts {name} of a {type(self).__name__}, and a graph cannot")
    return self


def _every_expert(self: Any, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
    """Runs each expert on its tokens, even if it has none: a graph cannot loop over experts that have some."""
    output = torch.zeros_like(hidden_states)
    chosen = selected_experts.permute(2, 1, 0)
    for i in range(self.num_experts):
        choice, token = torch.where(chosen[i])
        result = self[f"expert_{i}"](hidden_states[token]) * routing_weights[token, choice, None]
        output.index_add_(0, token, result.to(output.dtype))
    return output


def _every_gated_expert(
    self: Any, hidden_states: Tensor, router_indices: Tensor | None = None, routing_weights: Any = None
) -> Tensor:
    """The same for experts that are slices of stacked weights and compute in float32, as the privacy filter's."""
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    chosen = F.one_hot(router_indices, num_classes=self.num_experts).permute(2, 1, 0)  # type: ignore[arg-type]
    for i in range(self.num_experts):
        choice, token = torch.where(chosen[i])
        x = hidden_states[token].float()
        gated = self._apply_gate(x @ self.gate_up_proj[i].float() + self.gate_up_proj_bias[i].float()).float()
        result = gated @ self.down_proj[i].float() + self.down_proj_bias[i].float()
        output.index_add_(0, token, result * routing_weights[token, choice, None].float())
    return output.to(hidden_states.dtype)


def _kimi_delta_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with a decay per channel, in chunks; (I - A)^-1 of a chunk by one triangular solve."""
    dtype, length = query.dtype, key.shape[1]
    query, key, value, beta, g = (x.transpose(1, 2).float() for x in (query, key, value, beta, g))
    if use_qk_l2norm_in_kernel:
        query, key = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    padding = -length % chunk_size
    query = query * query.shape[-1] ** -0.5
    beta = beta.unsqueeze(-1)
    query, key, value, g, beta = (
        F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk_size)) for x in (query, key, value, g, beta)
    )
    decay = g.cumsum(-2)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=query.device).triu(1)
    between = (decay.unsqueeze(-2) - decay.unsqueeze(-3)).masked_fill(later.unsqueeze(-1), float("-inf")).exp()
    inside = (key.unsqueeze(-2) * key.unsqueeze(-3) * between).sum(-1) * beta  # zero for later keys

    def solved(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(inside, x, upper=False, unitriangular=True)

    values, keys = solved(value * beta), solved(key * beta * decay.exp())
    scores = (query.unsqueeze(-2) * key.unsqueeze(-3) * between).sum(-1)
    state = value.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    state = state if initial_state is None else initial_state.to(value)
    outputs = []
    for i in range(key.shape[2]):
        new = values[:, :, i] - keys[:, :, i] @ state
        outputs.append((query[:, :, i] * decay[:, :, i].exp()) @ state + scores[:, :, i] @ new)
        last = decay[:, :, i, -1:]
        state = state * last.exp().transpose(-1, -2) + (key[:, :, i] * (last - decay[:, :, i]).exp()).mT @ new
    output = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)
    return output, state if output_final_state else None


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Mamba's recurrence over the tokens as one operation."""
    dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt
    decay = torch.exp(A[None, :, None, :] * dt[..., None])
    inputs = dt[..., None] * B.transpose(1, 2)[:, None].float() * hidden_states[..., None].float()
    output, state = selective_scan(decay, inputs, C.transpose(1, 2))
    output = output if D is None else output + hidden_states * D[None, :, None]
    output = output if z is None else output * F.silu(z)
    return (output, state) if return_last_state else output


def _text_on_patches(
    image_embeddings: Tensor,
    inputs_embeds: Tensor,
    bbox: Tensor,
    visual_bbox: Tensor | None,
    attention_mask: Tensor | None = None,
    num_patches: int = 14,
    max_len: int = 0,
    image_size: int = 224,
    patch_size: int = 16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """UDOP's tokens with the patches they are on, then the patches without a token, in order, and zeros."""
    if max_len != 0:
        raise CaptureError(f"combine_image_text_embeddings can only be captured with max_len=0, not {max_len}")
    column, row = (
        torch.floor((bbox[..., i] + bbox[..., i + 2]) / 2.0 * num_patches).long().clip(0, num_patches - 1)
        for i in (0, 1)
    )
    patch = column + row * num_patches
    bbox = bbox.to(torch.float32 if bbox.device.type == "mps" else torch.float64)
    is_blank = (bbox.mean(-1) == 0.0) | (bbox.mean(-1) == 1.0)
    of_tokens = image_embeddings.gather(1, patch.unsqueeze(-1).expand(-1, -1, image_embeddings.shape[-1]))
    inputs_embeds += of_tokens.masked_fill(is_blank.unsqueeze(-1), 0.0)
    is_free = torch.ones_like(image_embeddings[..., 0], dtype=torch.bool).scatter(1, patch, False)
    order = torch.argsort((~is_free).long(), dim=1, stable=True)
    is_free = is_free.gather(1, order)

    def free(values: Tensor) -> Tensor:
        values = values.gather(1, order.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
        return values.masked_fill(~is_free.unsqueeze(-1), 0.0)

    if visual_bbox is None:
        from transformers.models.udop.modeling_udop import get_visual_bbox

        places = get_visual_bbox(image_size=image_size, patch_size=patch_size).to(image_embeddings.device)
        visual_bbox = places.expand(image_embeddings.shape[0], -1, -1)
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask, is_free.to(attention_mask.dtype)], 1)
    return (
        torch.cat([inputs_embeds, free(image_embeddings)], 1),
        torch.cat([bbox, free(visual_bbox)], 1),
        attention_mask,
    )


def _first_step(layer: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent network's layer where only shapes are needed; the graph has it as one operation."""

    def stand_in(inp: Tensor, *args: Any, **options: Any) -> Any:
        if not isinstance(inp, FakeTensor) or get_proxy_mode() is not None:
            return layer(inp, *args, **options)
        output, hidden = layer(inp[:1], *args, **options)
        return output.expand(inp.shape[0], -1, -1).contiguous(), hidden

    return stand_in


def _linear_of_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, linear: Any) -> Tensor:
    """A linear layer that first copies single rows per sequence (the last token's, before a decoder's head).

    torch finds the product's shape with a view, which for such rows would ask whether the batch has size one.
    """
    is_a_row_each = x.ndim == 3 and isinstance(x.shape[1], int) and x.shape[1] == 1 and isinstance(x.stride(0), SymInt)
    return linear(x.clone(memory_format=torch.contiguous_format) if is_a_row_each else x, weight, bias)


def _gelu_by_operations(self: Any, x: Tensor) -> Tensor:
    from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

    return bloom_gelu_forward(x)


_ATTENTION = Patch(
    "torch.nn.functional",
    "scaled_dot_product_attention",
    attention_of_any_batch,
    "asks whether a mask's batch is 1 to choose its kernel; the graph's own op chooses again",
    only_of=F.scaled_dot_product_attention,
)

_SLICES = Patch(
    "torch._subclasses.fake_impls",
    "_compute_slice_index",
    place_in_slice,
    "treats the length of a slice as unknown where it is the smaller of two sizes",
)

PATCHES = (
    *((_ATTENTION,) if ATTENTION_ASKS_FOR_ONE else ()),
    *((_SLICES,) if SLICES_ARE_UNKNOWN else ()),
    Patch(
        "torch.nn.modules.module",
        "Module._apply",
        _unconverted,
        "puts parameters into their module again, where a trace has its own",
    ),
    Patch(
        "transformers.models.bloom.modeling_bloom",
        "BloomGelu.forward",
        _gelu_by_operations,
        "has its own backward, which equals the derivative of its operations",
    ),
    Patch(
        "transformers.models.vilt.modeling_vilt",
        "ViltEmbeddings.visual_embed",
        _complete_images,
        "loops over the images to remove padded pixels, and shuffles the rest",
    ),
    Patch(
        "transformers.models.udop.modeling_udop",
        "combine_image_text_embeddings",
        _text_on_patches,
        "loops over images to remove the patches that tokens are on",
    ),
    Patch(
        "transformers.models.switch_transformers.modeling_switch_transformers",
        "SwitchTransformersExperts.forward",
        _every_expert,
        "loops over the experts that have tokens",
    ),
    Patch(
        "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter",
        "OpenAIPrivacyFilterExperts.forward",
        _every_gated_expert,
        "loops over the experts that have tokens",
    ),
    *(
        Patch(
            f"transformers.models.{library}.modeling_{library}",
            "is_torchdynamo_exporting",
            _never,
            "solves the gated delta rule's triangular system row by row under export, and at once otherwise",
        )
        for library in ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid")
    ),
    *(
        Patch(
            "torch._decomp.decompositions",
            layer,
            _first_step(getattr(decompositions, layer)),
            "loops over the tokens to find the shape of an LSTM's or GRU's output",
        )
        for layer in ("one_layer_lstm", "one_layer_rnn")
    ),
    Patch(
        "torch.nn.functional",
        "linear",
        functools.partial(_linear_of_rows, linear=F.linear),
        "asks whether a batch of single rows has size one",
        only_of=F.linear,
    ),
    *(
        Patch(
            f"transformers.models.{library}.modeling_{library}",
            "mamba_selective_scan",
            _selective_scan,
            "loops over the tokens",
        )
        for library in ("mamba", "falcon_mamba", "jamba", "zamba")
    ),
    *(
        Patch(
            f"transformers.models.{library}.modeling_{library}",
            "chunk_kimi_delta_attention",
            _kimi_delta_attention,
            "solves the triangular system of a chunk row by row, 64 of them",
        )
        for library in ("kimi_linear", "bailing_hybrid", "glm5_next")
    ),
)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Replaces functions by their stand-ins, for libraries that are loaded."""
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for patch in PATCHES:
            owner: Any = sys.modules.get(patch.module)
            *inside, name = patch.function.split(".")
            for part in inside:
                owner = getattr(owner, part, None)
            original = getattr(owner, name, None)
            if original is not None and patch.only_of in (None, original):
                replaced.append((owner, name, original))
                setattr(owner, name, here_only(patch.replacement, original))
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)
