"""The engines: fxbt and its peers, each a function from a loaded Hugging Face model to `batch -> last hidden states`.

Each does what its own documentation recommends for a CPU, in float32 (but for those that name another precision).
An engine that cannot take a model raises `Skip`.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import Batch, minilm_directory
from torch import Tensor, nn

Run = Callable[[Batch], Tensor]
Prepare = Callable[[nn.Module, Batch, int], Run]  # model, example, threads
OPSET = 18


class Skip(Exception):
    """Why an engine does not run a model."""


@dataclass(frozen=True)
class Engine:
    attention: str  # the model's attention implementation
    prepare: Prepare  # makes it from the model
    libraries: tuple[str, ...] = ()  # that it needs besides torch and transformers

    def load(self) -> None:
        """Imports its libraries."""
        missing = [name for name in self.libraries if importlib.util.find_spec(name) is None]
        if missing:
            raise Skip(f"{', '.join(missing)} not installed")
        for name in self.libraries:
            importlib.import_module(name)


def hugging_face(model: nn.Module, example: Batch, threads: int) -> Run:
    return lambda batch: model(**batch).last_hidden_state


def fxbt(model: nn.Module, example: Batch, threads: int) -> Run:
    return _optimized(model, example)


def fxbt_bfloat16(model: nn.Module, example: Batch, threads: int) -> Run:
    return _optimized(model, example, dtype=torch.bfloat16)


def fxbt_int8(model: nn.Module, example: Batch, threads: int) -> Run:
    return _optimized(model, example, quantize="int8")


def _optimized(model: nn.Module, example: Batch, **options: Any) -> Run:
    """Warmed up, as its documentation says for servers: kernels are measured now, not between the calls that follow."""
    import fxbt

    fast = fxbt.optimize(model, **options)
    fast.warmup(**example)
    return lambda batch: fast(**batch).last_hidden_state


def inductor(model: nn.Module, example: Batch, threads: int) -> Run:
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 64  # a graph for each shape: what is fastest once it is compiled
    compiled = torch.compile(model, dynamic=False)
    return lambda batch: compiled(**batch).last_hidden_state


def inductor_freezing(model: nn.Module, example: Batch, threads: int) -> Run:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    return inductor(model, example, threads)


# nn.TransformerEncoder's fast path, which BetterTransformer ran: nested tensors in place of padding


def fast_path(model: nn.Module, example: Batch, threads: int) -> Run:
    convert = FAST_PATHS.get(type(model).__name__)
    if convert is None:
        raise Skip("nn.TransformerEncoder has no such layers (biased or causal attention, or another activation)")
    embed, encoder, norm = convert(model)

    def run(batch: Batch) -> Tensor:
        inputs = dict(batch)
        mask = inputs.pop("attention_mask", None)
        padding = None if mask is None or bool(mask.all()) else mask == 0
        states = encoder(embed(**inputs), src_key_padding_mask=padding)
        if padding is not None and states.shape[1] < padding.shape[1]:  # nested tensors end at the longest row
            states = nn.functional.pad(states, (0, 0, 0, padding.shape[1] - states.shape[1]))
        return norm(states)

    return run


def _bert_layers(model: Any) -> tuple[Any, nn.Module, nn.Module]:
    layers = [
        _layer(
            model.config,
            attention=(layer.attention.self.query, layer.attention.self.key, layer.attention.self.value),
            parts=(layer.attention.output.dense, layer.intermediate.dense, layer.output.dense),
            norms=(layer.attention.output.LayerNorm, layer.output.LayerNorm),
        )
        for layer in model.encoder.layer
    ]
    return model.embeddings, _encoder(layers), nn.Identity()


def _distilbert_layers(model: Any) -> tuple[Any, nn.Module, nn.Module]:
    layers = [
        _layer(
            model.config,
            attention=(layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin),
            parts=(layer.attention.out_lin, layer.ffn.lin1, layer.ffn.lin2),
            norms=(layer.sa_layer_norm, layer.output_layer_norm),
        )
        for layer in model.transformer.layer
    ]
    return model.embeddings, _encoder(layers), nn.Identity()


def _vit_layers(model: Any) -> tuple[Any, nn.Module, nn.Module]:
    layers = [
        _layer(
            model.config,
            attention=(layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj),
            parts=(layer.attention.o_proj, layer.mlp.fc1, layer.mlp.fc2),
            norms=(layer.layernorm_before, layer.layernorm_after),
            norm_first=True,
        )
        for layer in model.layers
    ]
    return model.embeddings, _encoder(layers), model.layernorm


def _whisper_layers(model: Any) -> tuple[Any, nn.Module, nn.Module]:
    layers = [
        _layer(
            model.config,
            attention=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            parts=(layer.self_attn.out_proj, layer.fc1, layer.fc2),
            norms=(layer.self_attn_layer_norm, layer.final_layer_norm),
            norm_first=True,
        )
        for layer in model.layers
    ]

    def embed(input_features: Tensor) -> Tensor:
        states = nn.functional.gelu(model.conv1(input_features))
        states = nn.functional.gelu(model.conv2(states))
        return states.permute(0, 2, 1) + model.embed_positions.weight

    return embed, _encoder(layers), model.layer_norm


def _layer(
    config: Any,
    attention: tuple[nn.Linear, ...],
    parts: tuple[nn.Linear, ...],
    norms: tuple[nn.LayerNorm, ...],
    norm_first: bool = False,
) -> nn.Module:
    out, first, second = parts
    heads = getattr(config, "num_attention_heads", None) or config.encoder_attention_heads
    layer = nn.TransformerEncoderLayer(
        out.out_features,
        heads,
        first.out_features,
        activation="gelu",
        batch_first=True,
        norm_first=norm_first,
        layer_norm_eps=norms[0].eps,
    )
    biases = [torch.zeros(p.out_features) if p.bias is None else p.bias.detach() for p in attention]
    layer.self_attn.in_proj_weight = nn.Parameter(torch.cat([p.weight.detach() for p in attention]))
    layer.self_attn.in_proj_bias = nn.Parameter(torch.cat(biases))
    layer.self_attn.out_proj.load_state_dict(out.state_dict())
    layer.linear1.load_state_dict(first.state_dict())
    layer.linear2.load_state_dict(second.state_dict())
    layer.norm1.load_state_dict(norms[0].state_dict())
    layer.norm2.load_state_dict(norms[1].state_dict())
    return layer


def _encoder(layers: list[Any]) -> nn.Module:
    encoder = nn.TransformerEncoder(layers[0], 1, enable_nested_tensor=True)
    encoder.layers, encoder.num_layers = nn.ModuleList(layers), len(layers)
    return encoder.eval()


FAST_PATHS: dict[str, Callable[[Any], tuple[Any, nn.Module, nn.Module]]] = {
    "BertModel": _bert_layers,
    "DistilBertModel": _distilbert_layers,
    "ViTModel": _vit_layers,
    "WhisperEncoder": _whisper_layers,
}


class _States(nn.Module):
    """The model from named tensors to the last hidden states alone, as the exporters want it."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).last_hidden_state


def _dynamic(example: Batch) -> tuple[dict[int, Any], ...]:
    """Batch and tokens are dynamic; of images and spectrograms, the batch."""
    axes = [range(2 if value.dim() == 2 else 1) for value in example.values()]
    return tuple(dict.fromkeys(dynamic, torch.export.Dim.AUTO) for dynamic in axes)


def _larger(example: Batch) -> Batch:
    """Two rows: an axis of size one is exported as a constant."""
    return {name: value.repeat_interleave(2, 0) if len(value) == 1 else value for name, value in example.items()}


def _to_onnx(model: nn.Module, example: Batch, path: Path) -> None:
    example = _larger(example)
    torch.onnx.export(
        _States(model, list(example)).eval(),
        tuple(example.values()),
        str(path),
        dynamo=True,
        dynamic_shapes=(_dynamic(example),),
        input_names=list(example),
        output_names=["states"],
        opset_version=OPSET,
        verbose=False,
    )


def onnx_runtime(model: nn.Module, example: Batch, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _to_onnx(model, example, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(batch: Batch) -> Tensor:
        (states,) = session.run(None, {name: value.numpy() for name, value in batch.items()})
        return torch.from_numpy(states)

    return run


def openvino(model: nn.Module, example: Batch, threads: int) -> Run:
    import openvino as ov

    example = _larger(example)
    program = torch.export.export(
        _States(model, list(example)).eval(), tuple(example.values()), dynamic_shapes=(_dynamic(example),), strict=False
    )
    converted = ov.convert_model(program)
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(converted, "CPU", config).create_infer_request()

    def run(batch: Batch) -> Tensor:
        inputs = [value.numpy() for value in batch.values()]
        return torch.from_numpy(request.infer(inputs, share_inputs=True)[0])

    return run


def ctranslate2(model: nn.Module, example: Batch, threads: int) -> Run:
    kind = type(model).__name__
    if kind not in ("BertModel", "DistilBertModel"):
        raise Skip("CTranslate2 has no interface to these hidden states")
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        model.config.position_embedding_type = "absolute"  # transformers 5 knows no other; the converter still asks
        model.save_pretrained(f"{folder}/hf")
        _copy_tokenizer(Path(folder) / "hf")
        ctranslate2.converters.TransformersConverter(f"{folder}/hf").convert(f"{folder}/ct2")
        encoder = ctranslate2.Encoder(f"{folder}/ct2", device="cpu", compute_type="float32", intra_threads=threads)

    def run(batch: Batch) -> Tensor:
        ids = ctranslate2.StorageView.from_array(batch["input_ids"].int().numpy())
        lengths = ctranslate2.StorageView.from_array(batch["attention_mask"].sum(-1).int().numpy())
        return torch.utils.dlpack.from_dlpack(_numpy(encoder.forward_batch(ids, lengths).last_hidden_state))

    return run


def _numpy(view: Any) -> Any:
    import numpy

    return numpy.array(view)


def _copy_tokenizer(folder: Path) -> None:
    for file in minilm_directory().iterdir():
        if file.is_file() and ("token" in file.name or "vocab" in file.name):
            (folder / file.name).write_bytes(file.read_bytes())


ENGINES = {
    "fxbt": Engine("sdpa", fxbt, ("fxbt",)),
    "fxbt before": Engine("sdpa", fxbt, ("fxbt",)),
    "fxbt bf16": Engine("sdpa", fxbt_bfloat16, ("fxbt",)),
    "fxbt int8": Engine("sdpa", fxbt_int8, ("fxbt",)),
    "HF eager": Engine("eager", hugging_face),
    "HF sdpa": Engine("sdpa", hugging_face),
    "fast path": Engine("sdpa", fast_path),
    "Inductor": Engine("sdpa", inductor, ("torch._dynamo", "torch._inductor.compile_fx")),
    "Inductor freezing": Engine("sdpa", inductor_freezing, ("torch._dynamo", "torch._inductor.compile_fx")),
    "ONNX Runtime": Engine("sdpa", onnx_runtime, ("onnx", "onnxscript", "onnxruntime")),
    "OpenVINO": Engine("sdpa", openvino, ("openvino",)),
    "CTranslate2": Engine("sdpa", ctranslate2, ("ctranslate2",)),
}
