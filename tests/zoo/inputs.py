"""Inputs for a model, written from its forward's signature: what a parameter holds is read off its name.

`find(model, config)` tries sets of inputs, the richest first, and returns the first that the model runs on as a
function of (batch, length, padding).
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import re
from collections import Counter
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
REPAIRS = 4  # of one maker, each by what the model complains of


class NoInputs(Exception):
    """The model runs on none of the sets of inputs; the text is the first one's error."""


@dataclass
class Maker:
    """Inputs of one kind for any batch and length."""

    names: list[str]
    config: PreTrainedConfig
    form: dict[str, int] = field(default_factory=dict)  # which of the possible layouts an input has
    placeholders: dict[str, int] = field(default_factory=dict)  # kind of token -> how many at the text's beginning
    lengthened: int = 1  # audio samples or frames a step
    asked: dict[str, int] = field(default_factory=dict)  # what the model's complaints asked for

    @property
    def has_mask(self) -> bool:
        return any("attention_mask" in name and "pixel" not in name for name in self.names)

    @property
    def is_mixed(self) -> bool:
        """Whether text comes with audio, whose length is then the same for every text."""
        return "input_ids" in self.names and bool({"input_features", "input_values"} & set(self.names))

    def __call__(self, batch: int, length: int, padding: str) -> Inputs:
        torch.manual_seed(1000 * batch + length)
        mask = padding_mask(batch, length, padding if self.has_mask else "none")
        long = 10 * self.lengthened if self.is_mixed else length * self.lengthened
        long_mask = mask.new_ones(batch, long) if self.is_mixed else mask.repeat_interleave(self.lengthened, 1)
        sizes = {False: (batch, length, mask), True: (batch, long, long_mask)}
        return {name: self._make(name, *sizes[self._is_long(name)]) for name in self.names}

    def _is_long(self, name: str) -> bool:
        return not self.is_mixed or bool(re.search("^input_(features|values)|audio|padding_mask", name))

    def _make(self, name: str, batch: int, length: int, mask: Tensor) -> Any:
        for pattern, make in NAMES:
            if re.search(pattern, name):
                return make(self, name, batch, length, mask)
        raise NoInputs(f"no input is known by the name {name}")

    @property
    def has_grid(self) -> bool:
        return any("grid_thw" in name for name in self.names)

    def repaired(self, problem: str, sample: Inputs) -> Maker | None:
        """This maker with what the model's complaint asks for; None where it asks for nothing known."""
        for repair in (_placeholders_asked, _width_asked, _size_asked):
            if changes := repair(self, problem, sample):
                return dataclasses.replace(self, **changes)
        return None

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
    vocabulary = min(maker.number("vocab_size", default=99), 99)
    ids = torch.randint(min(TEXT_FROM, vocabulary // 2), vocabulary, mask.shape)
    pad = maker.number("pad_token_id")
    ids = torch.where(mask.bool(), ids, pad if 0 <= pad < TEXT_FROM else 0)
    if name == "input_ids":
        for kind, count in maker.placeholders.items():
            token = maker.number(*(f"{kind}_token_{end}" for end in ("id", "index")), f"{kind}_soft_token_id")
            ids = torch.cat([ids[:, :1], torch.full((batch, count), token), ids[:, 1:]], 1)
    return ids


def _mask(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    more = sum(maker.placeholders.values())
    return torch.cat([mask[:, :1], mask.new_ones(batch, more), mask[:, 1:]], 1) if name == "attention_mask" else mask


def _grid(maker: Maker, batch: int, length: int) -> tuple[int, int]:
    """Patches in height and width of an image, which varies with the length where there is no text."""
    side = 2 * max(1, maker.number("spatial_merge_size", "merge_size", "downsample_factor", default=2))
    return side, side * (1 if length < 10 or "input_ids" in maker.names else 2)


def _grids(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    frames = () if "spatial_shapes" in name or "_hw" in name else (1,)
    return torch.tensor([[*frames, *_grid(maker, batch, length)]] * batch)


def _patch_width(maker: Maker) -> int:
    patch = maker.number("patch_size", default=16)
    frames = maker.number("temporal_patch_size", default=1) if maker.has_grid else 1
    return maker.number("in_channels", "num_channels", "in_chans", default=3) * frames * patch**2


def _patches(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    """Patches of all images in one sequence, or in a row for each image."""
    height, width = _grid(maker, batch, length)
    wide = maker.asked.get(name, _patch_width(maker))
    return torch.randn(*((batch * height * width,) if maker.has_grid else (batch, height * width)), wide)


def _patch_positions(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    height, width = _grid(maker, batch, length)
    return torch.cartesian_prod(torch.arange(height), torch.arange(width)).expand(batch, -1, -1)


def _flattened_patches(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    positions = 1 + torch.arange(length)[None, :, None].expand(batch, -1, 2)
    return torch.cat([positions, torch.randn(batch, length, _patch_width(maker))], -1)


def _image_sizes(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    return torch.full((batch, 2), _image_side(maker))


def _image_side(maker: Maker) -> int:
    size = maker.number("image_size", "pretrain_image_size", "img_size", "input_size", default=64)
    return maker.asked.get("image", size if size >= 8 else 64)


def _images(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    if PATCHED & set(maker.names):
        return _patches(maker, name, batch, length, mask)
    channels = maker.asked.get(name, maker.number("num_channels", "in_channels", "in_chans", default=3))
    size = _image_side(maker)
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
    if PATCHED & set(maker.names):
        return torch.ones(batch, math.prod(_grid(maker, batch, length)), dtype=torch.long)
    return torch.ones(batch, _image_side(maker), _image_side(maker), dtype=torch.long)


def _features(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    width = maker.number("num_mel_bins", "input_feat_per_channel", "feature_size", "input_channels", "input_dim")
    width = maker.asked.get(name, width or 80)
    frames = maker.asked.get("frames", 2 * maker.number("max_source_positions", default=0) or length)
    shapes = [
        (frames, width),
        (width, frames),
        (length, width),
        (width, length),
        (1, width, frames),
        (1, frames, width),
    ]
    return torch.randn(batch, *shapes[maker.form.get(name, 0)])


def _spectrogram(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    width = maker.asked.get(name, maker.number("model_in_dim", "num_mel_bins", "mel_dim", default=80))
    shapes = [(length, width), (width, length)]
    return torch.randn(batch, *shapes[maker.form.get(name, 0)])


def _frame_mask(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    return torch.ones(batch, maker.asked.get("frames", 2 * maker.number("max_source_positions") or length)).long()


def _waves(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    frames = maker.number("max_length", default=length)
    shapes: list[tuple[int, ...]] = [(length,), (1, length), (frames, maker.number("num_mel_bins", default=16))]
    return torch.randn(batch, *shapes[maker.form.get(name, 0)])


def _hidden(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    if maker.has_grid:
        return _patches(maker, name, batch, length, mask)
    width = maker.asked.get(name, maker.number("hidden_size", "d_model", "encoder_hidden_size", default=build.HIDDEN))
    shapes = [(length, width), (width, length)]
    return torch.randn(batch, *shapes[maker.form.get(name, 0)])


def _of_width(*numbers: str) -> Callable[..., Tensor]:
    """A sequence of vectors, as wide as the first of these numbers of the config."""
    return lambda maker, name, batch, length, mask: torch.randn(
        batch, length, maker.asked.get(name, maker.number(*numbers, default=1))
    )


def _steps(maker: Maker, name: str, batch: int, length: int, mask: Tensor) -> Tensor:
    return torch.arange(length).expand(batch, -1)


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
    (r"^(decoder_|qformer_|tasks_|classes_|context_|audio_)?input_ids$|^input$", _ids),
    (r"pixel_mask|pixel_attention_mask", _pixel_mask),
    (r"input_features_mask", _frame_mask),
    (r"attention_mask$|^padding_mask$", _mask),
    (r"grid_thw$|grid_hws?$|spatial_shapes$", _grids),
    (r"(pixel|image)_position_ids", _patch_positions),
    (r"image_sizes$", _image_sizes),
    (r"flattened_patches", _flattened_patches),
    (r"^(past_values_padding|freq)$", _zeros),
    (r"^states$", _of_width("state_dim")),
    (r"^actions$", _of_width("act_dim")),
    (r"^(rewards|returns_to_go)$", _of_width()),
    (r"^timesteps$", _steps),
    (r"^visual_feats$", _of_width("visual_feat_dim")),
    (r"^visual_pos$", _of_width("visual_pos_dim")),
    (r"spectrogram$", _spectrogram),
    (r"pixel_values_videos", _videos),
    (r"pixel_values", _images),
    (r"input_features|audio_mel$", _features),
    (r"input_values|waveform|audio_values", _waves),
    (r"^(past|future)_(values|time_features|observed_mask)$", _past),
    (r"hidden_states?$|_embeds$|^latents$|^context$|_features$|_queries$|^inputs$|^patch_embeds$", _hidden),
    (r"bbox$", _boxes),
    (r"audio_codes", _codes),
    (r"token_type_ids", _zeros),
]

PATCHED = {"image_grid_thw", "grid_thw", "spatial_shapes", "pixel_position_ids", "image_position_ids"}

# What comes with an input where the forward takes it.
COMPANIONS = {
    "input_ids": ("attention_mask", "bbox", "visual_feats", "visual_pos"),
    "decoder_input_ids": ("decoder_attention_mask",),
    "input_values": ("attention_mask",),
    "input_features": ("input_features_mask",),
    "pixel_values": (
        *("image_grid_thw", "grid_thw", "spatial_shapes", "pixel_position_ids", "image_position_ids", "image_sizes"),
    ),
}
MASKS = ("attention_mask", "decoder_attention_mask")
SEVERAL_FORMS = {"pixel_values": 4, "input_features": 6, "input_values": 3, "hidden_states": 2, "spectrogram": 2}

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
    ("flattened_patches", "decoder_input_ids"),
    ("states", "actions", "rewards", "returns_to_go", "timesteps"),
    ("inputs_embeds",),
    (),
)


def _forms(names: list[str]) -> list[dict[str, int]]:
    having = [
        name for name in names if name in SEVERAL_FORMS and not (name != "input_features" and PATCHED & set(names))
    ]
    choices = [range(SEVERAL_FORMS[name]) for name in having]
    return [dict(zip(having, form, strict=True)) for form in itertools.product(*choices)]


def _sets(model: nn.Module) -> Iterator[list[str]]:
    """Names of inputs: each of the sets with all that may come with it, with masks only, and alone."""
    parameters = inspect.signature(model.forward).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    seen = set()
    for wanted in SETS:
        names = [n for n in wanted if n in parameters]
        names += [n for n in required if n not in names]
        companions = [c for n in names for c in COMPANIONS.get(n, ()) if c in parameters]
        masks = [c for c in companions if c in MASKS]
        for chosen in (names + companions, names + masks, names):
            chosen = list(dict.fromkeys(chosen))
            if chosen and tuple(chosen) not in seen:
                seen.add(tuple(chosen))
                yield chosen


def _makers(chosen: list[str], config: PreTrainedConfig) -> Iterator[Maker]:
    is_audio = bool({"input_features", "input_values"} & set(chosen))
    for lengthened in (40, 4, 8, 320) if is_audio else (1,):
        for form in _forms(chosen):
            yield Maker(chosen, config, form, lengthened=lengthened)


def find(model: nn.Module, config: PreTrainedConfig) -> Maker:
    """The first way of making inputs that the model runs on, at all shapes.

    Raises:
        NoInputs: with the first error.
    """
    first: str | None = None
    for chosen in _sets(model):
        problems: Counter[str] = Counter()
        for maker in _makers(chosen, config):
            runs, problem = _after_repairs(model, maker)
            if runs is not None:
                return runs
            first = first or problem
            problems[problem] += 1
            if problems[problem] == len(SEVERAL_FORMS):  # whatever the form
                break
    raise NoInputs(first or "no known inputs in the signature")


def _after_repairs(model: nn.Module, maker: Maker) -> tuple[Maker | None, str]:
    """The maker as the model takes it, or why it does not."""
    first = _runs(model, maker)
    problem = first
    for _ in range(REPAIRS):
        if problem is None:
            break
        better = maker.repaired(problem, maker(*SHAPES[0], "none"))
        if better is None or better == maker:
            break
        maker, problem = better, _runs(model, better)
    return (maker, "") if problem is None else (None, first or problem)


# --- what a complaint asks for: (maker, complaint, the inputs) -> changes of the maker -------------------------------


def _placeholders_asked(maker: Maker, problem: str, sample: Inputs) -> dict[str, Any]:
    """As many placeholders in each row of text as the model has features for."""
    found = re.search(r"features?\D+?tokens?\D*?(\d+)\D+?features?:? (\d+)", problem)
    if not found or int(found[1]) == int(found[2]) or "input_ids" not in sample:
        return {}
    kind = next((kind for kind in ("audio", "video") if kind in problem.lower()), "image")
    batch, more = len(sample["input_ids"]), int(found[2]) - int(found[1])
    count = maker.placeholders.get(kind, 0) + more // batch
    return {"placeholders": {**maker.placeholders, kind: count}} if more % batch == 0 and count > 0 else {}


def _width_asked(maker: Maker, problem: str, sample: Inputs) -> dict[str, Any]:
    """The width of the vectors that the first layer takes."""
    product = re.search(r"cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)", problem)
    channels = re.search(r"to have (\d+) channels, but got (\d+) channels", problem)
    found = (
        (int(product[1]), int(product[2])) if product else (int(channels[2]), int(channels[1])) if channels else None
    )
    if found is None:
        return {}
    got, wanted = found
    for name, value in sample.items():
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (2, 3, 4):
            continue
        axes = [value.shape[-1], value.shape[1]]
        for width in axes:
            if got % width == 0 and width * wanted % got == 0 and width * wanted // got not in (width, 0):
                return {"asked": {**maker.asked, name: width * wanted // got}}
    return {}


def _size_asked(maker: Maker, problem: str, sample: Inputs) -> dict[str, Any]:
    """The one length of sound or size of image that a model takes."""
    if found := re.search(r"(?:of length|multiple of\D*?) \(?(\d+)\)?, but (?:found|got)", problem):
        return {"asked": {**maker.asked, "frames": int(found[1])}}
    if found := re.search(r"[Ii]mage size \(\d+\*\d+\) doesn't match model \((\d+)\*", problem):
        return {"asked": {**maker.asked, "image": int(found[1])}}
    return {}


def _runs(model: nn.Module, maker: Maker) -> str | None:
    """Why the model does not run on what `maker` makes; None where it does, with finite numbers."""
    try:
        with torch.no_grad():
            # A mask of ones is not looked at: only one with padding shows whether it is of the right length.
            for (batch, length), padding in zip(SHAPES[:2], ("none", "right"), strict=True):
                outputs = model(**maker(batch, length, padding))
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
