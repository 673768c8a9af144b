"""Quantised checkpoints, made of plain ones on the spot: what llm-compressor writes, but for its calibration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

FP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
SCHEMES: dict[str, dict[str, dict[str, Any]]] = {  # of weights and of a layer's inputs
    "fp8": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    },
    "fp8, a scale a tensor": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    },
    "fp8, a scale a block": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 32]},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
    },
    "int8": {
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    },
    "w4a16": {"weights": INT4},
    "w4a16, zero points": {"weights": {**INT4, "symmetric": False}},
    "nvfp4": {"weights": FP4, "input_activations": {**FP4, "dynamic": "local"}},
    "nvfp4a16": {"weights": FP4},
}


def quantise(folder: Path, kind: str, left_out: tuple[str, ...] = ("lm_head",)) -> dict[str, torch.Tensor]:
    """Quantise the linear layers of a checkpoint by one of `SCHEMES`, and give their weights as they now are.

    Args:
        left_out: regular expressions, found in the names of those that stay as they are.
    """
    rounded = {}
    scheme = QuantizationScheme(targets=["Linear"], **SCHEMES[kind])
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n, t in tensors.items() if t.dim() == 2 and n.endswith(".weight")]:
            module = name.removesuffix(".weight")
            if any(re.search(part, module) for part in ("embed_tokens", *left_out)):
                continue
            packed = compressor.compress(_with_scales(tensors.pop(name), scheme), scheme)
            rounded[name] = compressor.decompress(packed, scheme)["weight"].to(torch.float32)
            tensors.update({f"{module}.{parameter}": tensor for parameter, tensor in packed.items()})
        save_file(tensors, file, {"format": "pt"})
    _index_again(folder)
    stated = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=[f"re:.*{part}" for part in left_out],
        format=scheme.format.value,
        quantization_status="compressed",
    )
    set_quantisation(folder, stated.model_dump(mode="json"))
    return rounded


def _with_scales(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    arguments = scheme.weights
    state = {"weight": weight}
    if arguments.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).reshape(1)
        if scheme.input_activations is not None:
            state["input_global_scale"] = torch.tensor([448.0 * 6 / 8])  # inputs are within 8
    elif scheme.input_activations is not None and not scheme.input_activations.dynamic:
        state["input_scale"] = torch.tensor([8 / 448])
    scale, zero_point = calculate_qparams(
        *_ranges(weight, arguments), arguments, global_scale=state.get("weight_global_scale")
    )
    return {**state, "weight_scale": scale, "weight_zero_point": zero_point}


def _ranges(weight: torch.Tensor, arguments: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the least and greatest value for each scale."""
    rows, columns = weight.shape
    block = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": arguments.block_structure,
    }.get(arguments.strategy, (1, arguments.group_size))
    blocks = weight.view(rows // block[0], block[0], columns // block[1], block[1])
    least, greatest = blocks.amin((1, 3)), blocks.amax((1, 3))
    return (least[0], greatest[0]) if arguments.strategy == "tensor" else (least, greatest)


def _index_again(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
        index.write_text(json.dumps({**json.loads(index.read_text()), "weight_map": files}))


def set_quantisation(folder: Path, stated: dict[str, Any]) -> None:
    """Write the quantisation into a checkpoint's config.json."""
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": stated}))


def quantise_in_float8_blocks(folder: Path, block: int = 32) -> dict[str, torch.Tensor]:
    """Quantise a bfloat16 checkpoint as DeepSeek does, and give its weights as they now are."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    rounded = {}
    for name in [
        n for n, t in tensors.items() if t.dim() == 2 and not re.search(r"embed_tokens|lm_head|mlp\.gate\.", n)
    ]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().view(rows // block, block, columns // block, block)
        scales = blocks.abs().amax((1, 3), keepdim=True) / 448
        weight = (blocks / scales).to(torch.float8_e4m3fn)
        tensors[name] = weight.view(rows, columns)
        tensors[f"{name}_scale_inv"] = scales[:, 0, :, 0].contiguous()
        rounded[name] = (weight.float() * scales).view(rows, columns)
    save_file(tensors, file, {"format": "pt"})
    set_quantisation(
        folder, {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    )
    return rounded


def quantise_in_mxfp4(folder: Path) -> dict[str, torch.Tensor]:
    """Quantise the experts of a gpt-oss checkpoint as OpenAI does, and give their weights as they now are."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    rounded = {}
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = tensors.pop(name).float().transpose(1, 2)  # [E, out, in]
        blocks = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        codes = (blocks / exponent.exp2()).unsqueeze(-1).sub(values).abs().argmin(-1)
        tensors[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponent.squeeze(-1) + 127).to(torch.uint8)
        rounded[name] = (values[codes] * exponent.exp2()).view(weight.shape).transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    set_quantisation(folder, {"quant_method": "mxfp4", "modules_to_not_convert": left_out})
    return rounded
