"""A tiny model of any model type: its config's numbers made small by what their names say, never by the type's name.

`candidates(model_type)` gives one model after the other, from the smallest down to those with the config's own widths;
the caller takes the first that its inputs run on.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from models import enliven
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

HIDDEN, HEADS, HEAD_DIM, LAYERS = 64, 4, 16, 1
VOCAB, FIRST_SPECIAL = 128, 20  # ids from FIRST_SPECIAL to 49 stand for special tokens, text is 50 and above
LARGEST = 50_000_000  # parameters

Numbers = dict[str, Any]
Resize = Callable[[int, str, Numbers], int]


class Unbuildable(Exception):
    """No recipe gives a model of this type; the text says why."""


def model_types() -> list[str]:
    """The model types of the installed transformers that have a model class, each class once."""
    seen, found = set(), []
    for name in CONFIG_MAPPING:
        config = CONFIG_MAPPING[name]
        if config not in seen:
            seen.add(config)
            found.append(name)
    return found


def model_classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The models of a config: AutoModel's, else those in its module that are made from this config."""
    kind = type(config)
    if kind in MODEL_MAPPING:
        found = MODEL_MAPPING[kind]
        return list(found) if isinstance(found, tuple | list) else [found]
    try:
        module = importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    except ImportError as error:
        raise Unbuildable(f"no model class: {error}") from error
    of_config = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.config_class is kind
    ]
    whole = [
        value for value in of_config if value.forward is not nn.Module.forward and "PreTrained" not in value.__name__
    ]
    if not whole:
        raise Unbuildable(f"no model with a forward is made from {kind.__name__} alone")
    prefix = kind.__name__.removesuffix("Config")
    return sorted(whole, key=lambda model: (not model.__name__.startswith(prefix), len(model.__name__)))


# --- what the names of numbers say --------------------------------------------------------------------------------


def _const(number: int) -> Resize:
    return lambda value, name, config: number


def _at_most(number: int) -> Resize:
    return lambda value, name, config: min(value, number)


def _key_value_heads(value: int, name: str, config: Numbers) -> int:
    heads = [config[n] for n in ("num_attention_heads", "num_heads", "n_head") if isinstance(config.get(n), int)]
    if value == 1:
        return 1
    return HEADS if value in heads else 2


def _heads(value: int, name: str, config: Numbers) -> int:
    if isinstance(config.get("expand"), int) and "head_dim" in config:  # state-space heads: their product is fixed
        return config["expand"] * HIDDEN // HEAD_DIM
    return HEADS if value >= HEADS else value


def _window(value: int, name: str, config: Numbers) -> int:
    return 4 if value > 32 else value


def _image(value: int, name: str, config: Numbers) -> int:
    hierarchical = any(isinstance(config.get(n), list | tuple) for n in ("depths", "hidden_sizes", "embed_dims"))
    return min(value, 64 if hierarchical else 32)


def _layers(value: int, name: str, config: Numbers) -> int:
    return min(value, config["fxbt layers"])


def _index(value: int, name: str, config: Numbers) -> int:
    return min(value, config["fxbt layers"] - 1)


NAMES: list[tuple[str, Resize]] = [
    (r"proj_layers$|layer_offset$", _const(0)),
    (r"layer_period$|full_attention_interval", _at_most(2)),
    (
        r"type_vocab_size|^num_labels$|_cost$|coefficient|ignore_index|temperature|sampling_rate|hop_length",
        _at_most(10**9),
    ),
    (r"vocab_size$|vocab_size_|^num_embeddings$|codebook_size$", _at_most(VOCAB)),
    (r"max_source_positions", _at_most(24)),
    (
        r"max_position|n_positions|^n_ctx$|max_seq|max_target_pos|block_size|max_2d_pos|position_embeddings_size",
        _at_most(128),
    ),
    (r"num_position_embeddings|^num_patches$", _const(16)),
    (r"sliding_window|attention_window|local_attention|window_size", _window),
    (r"(key_value|kv)_heads$|multi_query_group_num|n_head_kv|num_kv_heads", _key_value_heads),
    (r"linear_num_key_heads", _const(2)),
    (r"mamba_(n|num)_heads", _const(2 * HIDDEN // HEAD_DIM)),
    (r"mamba_d_head", _const(HEAD_DIM)),
    (r"(^|_)n?(um)?_?(attention|attn)?_?heads?$|num_attention_heads", _heads),
    (r"qk_rope_head_dim|qk_nope_head_dim|rope_head_dim", _const(HEAD_DIM // 2)),
    (r"head_dim|^d_kv$|kv_channels|global_head_dim", _const(HEAD_DIM)),
    (r"lora_rank|_rank$", _at_most(16)),
    (r"repeats$|depth_multiplier", _at_most(1)),
    (r"first_k_dense_replace", _const(1)),
    (r"num_kv_shared_layers|num_nextn", _const(0)),
    (r"feat_extract_layers|adapter_layers|residual_layers|window_layers", _at_most(10**9)),
    (
        r"(^|_)n?(um)?_?(hidden_)?layers?$|(^|_)depths?$|num_blocks$|layers_per|num_stages_layers|num_local_layers",
        _layers,
    ),
    (r"num_experts_per|top_?k|topk_group", _at_most(2)),
    (r"n_group$", _at_most(2)),
    (r"n_shared_experts|num_shared_experts", _at_most(1)),
    (r"experts", _at_most(4)),
    (r"image_size|input_size$|pretrain_image|frame_size", _image),
    (r"patch_size", _at_most(8)),
    (r"num_frames", _at_most(4)),
    (r"num_queries|num_query|query_tokens|num_latents|resampler_n_latents", _at_most(8)),
    (r"index|indices|indexes|feature_layer", _index),
]


MISSING: Numbers = {"prediction_length": 8}  # what a config has to be told

# What a config may leave open although its model needs it.
OPEN: Numbers = {
    "vocab_size": VOCAB,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attn_layer_indices": [0],
    "sliding_window": 4,
    "image_token_id": FIRST_SPECIAL + 5,
    "image_token_index": FIRST_SPECIAL + 5,
    "video_token_id": FIRST_SPECIAL + 6,
    "video_token_index": FIRST_SPECIAL + 6,
    "deepstack_layer_map": [[0, 0]],
    "downsample_rate": "1/2",
}
EMPTY: Numbers = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}}
OPEN_PER_LAYER = {"layer_types": "full_attention", "mlp_layer_types": "dense"}


def _base_width(value: int, name: str, config: Numbers) -> int:
    """Widths in proportion to the config's own hidden size."""
    if value < 64:
        return value
    if re.search(r"intermediate|ffn|mlp_dim|d_ff|n_inner|inner_dim", name):
        return 32 if "moe" in name or "expert" in name else 96
    own = [config[n] for n in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim") if n in config]
    for hidden in [width for width in own if isinstance(width, int) and width > 0]:
        if value % hidden == 0 and value // hidden <= 8:
            return HIDDEN * (value // hidden)
    return HIDDEN if value in config["fxbt widths"] else max(16, value // 16 // 8 * 8)


def _scaled_width(value: int, name: str, config: Numbers) -> int:
    return max(value // 4, 16) if value >= 64 and value % 4 == 0 else value


def _own_width(value: int, name: str, config: Numbers) -> int:
    return value


@dataclass(frozen=True)
class Recipe:
    """How to make a config small: its widths' rule, and whether heads and images shrink too."""

    width: Resize
    keep: str = r"^$"  # names left alone
    fill: bool = False  # whether what the config leaves open is given
    layers: int = LAYERS
    use_cache: bool = True


HEADS_AND_WIDTHS = r"heads?$|head_dim|_rank$|^d_kv$|head_size|lora"
RECIPES = (
    Recipe(_base_width),
    Recipe(_base_width, fill=True),
    Recipe(_base_width, fill=True, layers=2, use_cache=False),
    Recipe(_base_width, fill=True, layers=6),
    Recipe(_base_width, keep=r"image_size|patch_size|input_size|position|window"),
    Recipe(_scaled_width, keep=HEADS_AND_WIDTHS),
    Recipe(_own_width, keep=HEADS_AND_WIDTHS),
    Recipe(_own_width, keep=HEADS_AND_WIDTHS + r"|image_size|patch_size|input_size|index|indices|position|window"),
    Recipe(_own_width, keep=r".*"),
)


# --- configs ------------------------------------------------------------------------------------------------------


LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers")


def _number_of_layers(config: Numbers, recipe: Recipe) -> int:
    """As the recipe says, or as many as there are kinds of layers or layers whose output is read."""
    kinds = config.get("layer_types") or config.get("layers_block_type") or ()
    if any(name.endswith("layer_period") for name in config):
        kinds = ("attention", "other")
    read = [len(v) for n, v in config.items() if re.search("indices|indexes", n) and isinstance(v, list | tuple)]
    return max(recipe.layers, len(set(kinds)), *read, 0)


def shrink(config: PreTrainedConfig, recipe: Recipe, widths: set[int] | None = None) -> PreTrainedConfig:
    """A small config of the same class."""
    numbers = dict(vars(config))
    widths = widths or _hidden_sizes(config)
    context = {**numbers, "fxbt widths": widths, "fxbt layers": _number_of_layers(numbers, recipe)}
    context["fxbt layers before"] = {numbers[n] for n in LAYER_COUNTS if isinstance(numbers.get(n), int)}
    known = set(inspect.signature(type(config).__init__).parameters) | set(getattr(config, "__dataclass_fields__", ()))
    changes: Numbers = {}
    for name, value in numbers.items():
        if name not in known or (name.startswith("_") and name not in known):
            continue
        small = _small(name, value, context, recipe, widths)
        if small is not value:
            changes[name] = small
    per_layer = {name: [kind] * context["fxbt layers"] for name, kind in OPEN_PER_LAYER.items()}
    missing = {**MISSING, **OPEN, **per_layer} if recipe.fill else MISSING
    for name, value in missing.items():
        if name in known and numbers.get(name) is None:
            changes[name] = value
    changes |= {n: value for n, value in EMPTY.items() if recipe.fill and n in known and numbers.get(n) == {}}
    for flag in ("_attn_implementation", "torch_dtype", "dtype"):
        changes.pop(flag, None)
    return type(config)(**changes)


def _hidden_sizes(config: PreTrainedConfig) -> set[int]:
    found = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= _hidden_sizes(value)
        if re.search(r"^(hidden_size|d_model|n_embd|embed_dim|dim|hidden_dim|encoder_hidden_size)$", name):
            found |= {value} if isinstance(value, int) else set()
    return found


def _small(name: str, value: Any, context: Numbers, recipe: Recipe, widths: set[int]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return shrink(value, recipe, widths).to_dict()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, dict):
        return _small_rope(value, recipe.fill) if "rope" in name and recipe.width is _base_width else value
    if isinstance(value, float) and "depth_coefficient" in name:
        return 0.3
    if isinstance(value, int):
        return _resized(name, value, context, recipe)
    if isinstance(value, list | tuple) and value:
        return _small_list(name, list(value), context, recipe)
    return value


def _small_list(name: str, values: list[Any], context: Numbers, recipe: Recipe) -> list[Any]:
    layers = context["fxbt layers"]
    shrinks_layers = re.search(recipe.keep, "num_hidden_layers") is None
    is_per_layer = shrinks_layers and len(values) in context["fxbt layers before"] and not isinstance(values[0], str)
    if is_per_layer:
        values = values[:layers]
    if is_per_layer and name.endswith("layers") and all(isinstance(value, int) for value in values):
        return [min(value, layers - 1) for value in values]
    if all(isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], list) for value in values):
        return [[kinds[:layers], 1] for kinds, _ in values]  # kinds of layers and how often they come
    if all(isinstance(value, str) for value in values):
        if not shrinks_layers:
            return values
        return (
            list(dict.fromkeys(values))[:layers] + values[: max(0, layers - len(set(values)))]
            if "type" in name
            else values
        )
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return values
    if re.search("index|indices|indexes", name):
        return list(range(len(values)))
    if re.search(r"heads?$", name) and re.search(recipe.keep, name) is None:
        return [min(value, 2) for value in values]
    return [_resized(name, value, context, recipe) for value in values]


def _resized(name: str, value: int, context: Numbers, recipe: Recipe) -> int:
    if re.search(r"token_id|token_index|_token$|_id$|_ids$", name):
        return _special(value)
    if value <= 0:
        return value
    if re.search(recipe.keep, name):
        return value
    for pattern, resize in NAMES:
        if re.search(pattern, name):
            return resize(value, name, context)
    return recipe.width(value, name, context)


def _special(value: int) -> int:
    """A small id for a special token, the same for the same token in all parts of a config."""
    return value if value < FIRST_SPECIAL else FIRST_SPECIAL + value % 29


def _small_rope(parameters: Any, fill: bool) -> Any:
    if not isinstance(parameters, dict):
        return parameters
    small = {name: _small_rope(value, fill) for name, value in parameters.items()}
    if section := small.get("mrope_section", (2, 3, 3) if fill and "rope_theta" in small else None):
        angles = int(HEAD_DIM * small.get("partial_rotary_factor", 1.0)) // 2
        parts = [max(1, part * angles // sum(section)) for part in section]
        parts[0] += angles - sum(parts)
        small["mrope_section"] = parts
    return small


# --- models -------------------------------------------------------------------------------------------------------


def _set_everywhere(config: Any, name: str, value: Any) -> None:
    if hasattr(config, name):
        setattr(config, name, value)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            _set_everywhere(part, name, value)


def candidates(model_type: str, use_cache: bool = True) -> Iterator[tuple[PreTrainedModel, PreTrainedConfig]]:
    """Models of this type, smallest first, with eager attention and weights that matter.

    Raises:
        Unbuildable: with the first recipe's reason, after the last one.
    """
    try:
        default = CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise Unbuildable(f"no default config: {_first_line(error)}") from error
    reason = None
    for recipe in RECIPES:
        try:
            config = shrink(default, recipe)
            if not (use_cache and recipe.use_cache):
                _set_everywhere(config, "use_cache", False)
            model = _model(config)
        except ImportError as error:
            raise Unbuildable(_first_line(error)) from error
        except Exception as error:
            reason = reason or _first_line(error)
            continue
        yield model, config
    raise Unbuildable(reason or "no recipe")


def _model(config: PreTrainedConfig) -> PreTrainedModel:
    *others, last = model_classes(config)
    for kind in others:
        try:
            return _made(kind, config)
        except (AttributeError, KeyError, TypeError):  # a part that is made from more than its config
            continue
    return _made(last, config)


def _made(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
    except ImportError:
        raise
    except Exception:  # some models cannot be made without data
        size = 0
    if size > LARGEST:
        raise Unbuildable(f"{size:,} parameters")
    torch.manual_seed(0)
    with _at_most_parameters(LARGEST):
        return enliven(kind._from_config(config, attn_implementation="eager"))


@contextlib.contextmanager
def _at_most_parameters(limit: int) -> Iterator[None]:
    """Stops the making of a model that grows too large, before it takes the machine's memory."""
    register, left = nn.Module.register_parameter, limit

    def counted(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= parameter.numel() if parameter is not None else 0
        if left < 0:
            raise Unbuildable(f"more than {limit:,} parameters")
        register(self, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", counted):
        yield


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:160]}"
