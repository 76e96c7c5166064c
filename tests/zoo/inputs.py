"""Inputs for a model, written from its forward's signature: what a parameter holds is read off its name.

`find(model, config)` tries sets of inputs, the richest first, and returns the first that the model runs on as a
function of (batch, length, padding).
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from models import padding_mask
from torch import Tensor, nn
from transformers import PreTrainedConfig

from . import build

Inputs = dict[str, Any]
TEXT_FROM = 50
SHAPES = ((2, 7), (3, 12), (1, 5))


class NoInputs(Exception):
    """The model runs on none of the sets of inputs; the text is the first one's error."""


@dataclass
class Maker:
    """Inputs of one kind for any batch and length."""

    names: list[str]
    config: PreTrainedConfig
    form: dict[str, int] = field(default_factory=dict)  # which of the possible layouts an input has
    image_tokens: int = 0  # placeholders at the beginning of the text
    lengthened: int = 1  # audio samples or frames a step

    @property
    def has_mask(self) -> bool:
        return any("attention_mask" in name for name in self.names)

    def __call__(self, batch: int, length: int, padding: str) -> Inputs:
        torch.manual_seed(1000 * batch + length)
        length = length * self.lengthened
        mask = padding_mask(batch, length, padding if self.has_mask else "none")
        return {name: self._make(name, batch, length, mask) for name in self.names}

    def _make(self, name: str, batch: int, length: int, mask: Tensor) -> Any:
        for pattern, make in NAMES:
            if re.search(pattern, name):
                return make(self, name, batch, length, mask)
        raise NoInputs(f"no input is known by the name {name}")

    def number(self, *names: str, default: int = 0) -> int:
        """The first of these numbers that the config or one of its parts has."""
        for name in names:
            for part in _parts(self.config):
                value = getattr(part, name, None)
                if isinstance(value, list | tuple) and value and isinstance(value[0], int):
                    return value[0]
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return default


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


# --- by name: (maker, name, batch, length, mask) -> value ----------------------------------------------------------


def _ids(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    ids = torch.randint(TEXT_FROM, min(maker.number("vocab_size", default=99), 99), mask.shape)
    pad = maker.number("pad_token_id")
    ids = torch.where(mask.bool(), ids, pad if 0 <= pad < TEXT_FROM else 0)
    if maker.image_tokens and name == "input_ids":
        token = maker.number("image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
        images = torch.full((batch, maker.image_tokens), token)
        ids = torch.cat([ids[:, :1], images, ids[:, 1:]], 1)
    return ids


def _mask(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    if maker.image_tokens and name == "attention_mask":
        return torch.cat([mask[:, :1], mask.new_ones(batch, maker.image_tokens), mask[:, 1:]], 1)
    return mask


def _images(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    channels = maker.number("num_channels", "in_channels", "in_chans", default=3)
    size = maker.number("image_size", "pretrain_image_size", "img_size", "input_size", default=64)
    size = size if size >= 8 else 64
    frames = maker.number("num_frames", "frames_per_clip", default=2)
    shapes = [
        (channels, size, size),
        (frames, channels, size, size),
        (1, channels, size, size),
        (1, 1, channels, size, size),
    ]
    return torch.randn(batch, *shapes[maker.form.get(name, 0)])


def _videos(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    size = maker.number("image_size", "crop_size", default=32)
    return torch.randn(batch, maker.number("num_frames", "frames_per_clip", default=4), 3, size, size)


def _pixel_mask(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    size = maker.number("image_size", default=64)
    return torch.ones(batch, size, size, dtype=torch.long)


def _features(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    width = maker.number(
        "num_mel_bins", "input_feat_per_channel", "feature_size", "input_channels", "input_dim", default=80
    )
    frames = 2 * maker.number("max_source_positions", default=0) or length
    shapes = [(frames, width), (width, frames), (length, width), (width, length), (1, width, frames)]
    return torch.randn(batch, *shapes[maker.form.get(name, 0)])


def _waves(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    frames = maker.number("max_length", default=length)
    shapes: list[tuple[int, ...]] = [(length,), (1, length), (frames, maker.number("num_mel_bins", default=16))]
    return torch.randn(batch, *shapes[maker.form.get(name, 0)])


def _hidden(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    return torch.randn(
        batch, length, maker.number("hidden_size", "d_model", "encoder_hidden_size", default=build.HIDDEN)
    )


def _boxes(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    corners = torch.randint(0, 60, (batch, length, 2))
    return torch.cat([corners, corners + torch.randint(1, 60, corners.shape)], -1)


def _past(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    context = maker.number("context_length", default=0) + max(maker.form.get("lags", 0), _lags(maker.config))
    features = [
        maker.number("num_time_features", default=1),
        maker.number("num_input_channels", "input_size", default=1),
    ]
    if "time_features" in name:
        return torch.randn(batch, context, features[0])
    wide = features[1] > 1 or hasattr(maker.config, "num_input_channels")
    shape = (batch, context, features[1]) if wide else (batch, context)
    return torch.ones(shape) if "mask" in name else torch.randn(shape)


def _lags(config: Any) -> int:
    return max(getattr(config, "lags_sequence", None) or [0])


def _codes(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    return torch.randint(0, 99, (batch, maker.number("num_codebooks", "num_quantizers", default=1), length))


def _zeros(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.long)


NAMES: list[tuple[str, Callable[..., Any]]] = [
    (r"^(decoder_|qformer_|tasks_|classes_)?input_ids$|^input$", _ids),
    (r"pixel_mask|pixel_attention_mask", _pixel_mask),
    (r"attention_mask$|^padding_mask$|input_features_mask", _mask),
    (r"pixel_values_videos", _videos),
    (r"pixel_values", _images),
    (r"input_features|audio_mel$", _features),
    (r"input_values|waveform|audio_values", _waves),
    (r"^(past|future)_(values|time_features|observed_mask)$", _past),
    (r"hidden_states$|inputs_embeds$|query_embeds|^latents$", _hidden),
    (r"^bbox$", _boxes),
    (r"audio_codes", _codes),
    (r"token_type_ids", _zeros),
]

# Which sets of inputs to try, the richest first: of each set, what the forward takes.
SETS = (
    ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids"),
    ("input_ids", "pixel_values", "decoder_input_ids"),
    ("input_ids", "decoder_input_ids"),
    ("input_ids",),
    ("pixel_values",),
    ("pixel_values", "decoder_input_ids"),
    ("pixel_values_videos",),
    ("input_features", "decoder_input_ids"),
    ("input_features",),
    ("input_values",),
    ("past_values", "past_time_features", "past_observed_mask"),
    (),
)


def _forms(names: list[str]) -> list[dict[str, int]]:
    counts = {"pixel_values": 4, "input_features": 5, "input_values": 3}
    having = [name for name in names if name in counts]
    return [dict(zip(having, form, strict=True)) for form in itertools.product(*(range(counts[n]) for n in having))]


def _makers(model: nn.Module, config: PreTrainedConfig) -> Iterator[Maker]:
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    seen = set()
    for wanted in SETS:
        names = [n for n in wanted if n in parameters]
        names += [n for n in required if n not in names]
        masks = {
            "input_ids": "attention_mask",
            "decoder_input_ids": "decoder_attention_mask",
            "input_values": "attention_mask",
        }
        with_masks = names + [
            masks[n] for n in names if n in masks and masks[n] in parameters and masks[n] not in names
        ]
        for chosen in (with_masks, names):
            chosen = list(dict.fromkeys(chosen))
            if not chosen or tuple(chosen) in seen:
                continue
            seen.add(tuple(chosen))
            for form in _forms(chosen):
                for lengthened in (1,) if not {"input_features", "input_values"} & set(chosen) else (40, 4, 8, 320):
                    yield Maker(chosen, config, form, lengthened=lengthened)


def find(model: nn.Module, config: PreTrainedConfig) -> Maker:
    """The first way of making inputs that the model runs on, at all shapes.

    Raises:
        NoInputs: with the first error.
    """
    first: str | None = None
    for maker in itertools.islice(_makers(model, config), 24):
        problem = _runs(model, maker)
        if problem is not None and (count := _missing_images(problem)):
            maker.image_tokens = count
            problem = _runs(model, maker)
        if problem is None:
            return maker
        first = first or problem
    raise NoInputs(first or "no known inputs in the signature")


def _missing_images(problem: str) -> int:
    """How many placeholders a row of text needs, as the model's own complaint says."""
    found = re.search(r"features?\D+?tokens?\D*?0\D+?features?:? (\d+)", problem)
    return int(found[1]) // SHAPES[0][0] if found else 0


def _runs(model: nn.Module, maker: Maker) -> str | None:
    """Why the model does not run on what `maker` makes; None where it does, with finite numbers."""
    try:
        with torch.no_grad():
            for batch, length in SHAPES[:2]:
                outputs = model(**maker(batch, length, "none"))
        leaves = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    except NoInputs as error:
        return str(error)
    except Exception as error:
        return build._first_line(error)
    if not leaves:
        return "the model returns no tensors"
    floats = [t for t in leaves if t.is_floating_point() and t.numel()]
    if floats and not any(math.isfinite(t.abs().max().item()) for t in floats):
        return "the model's outputs are not finite"
    return None
