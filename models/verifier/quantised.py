"""Quantised verifiers: which of them transformers runs and how, and their matrices that training needs, dequantised."""

import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from ...conf.schema import Dtype, VerifierConfig
from .config import checkpoint_file

_DENSE = (torch.float32, torch.bfloat16, torch.float16)
_MISREAD_IN_EXPERTS = re.compile(r"\.experts\.\d+\..*\.(weight_global_scale|weight_zero_point)$")  # silently left out
_BY_AN_ENGINE = "transformers cannot run: set dump.engine=vllm, and give synthesize.endpoints of a server that can"


def quantisation(whole: Any) -> dict[str, Any] | None:
    """Return what a checkpoint's configuration says of its quantisation; None if it is not quantised."""
    for part in (whole, whole.get_text_config()):
        stated = getattr(part, "quantization_config", None)
        if stated is not None:
            return dict(stated if isinstance(stated, Mapping) else stated.to_dict())
    return None


def prepare_quantised(config: VerifierConfig, whole: Any, tensors: Iterable[str]) -> None:
    """Set in a checkpoint's configuration how transformers is to run it if it is quantised; ValueError: it does not.

    compressed-tensors rounds a layer's inputs as an engine does, if its scheme says so. If it only stores weights in
    few bits, they are dequantised on loading, which changes no value. NVFP4 runs in bfloat16 only, and transformers
    loads no packed zero points: these are dequantised too, at the price of inputs that are not rounded.

    `tensors` are the names of all that the checkpoint holds.
    """
    stated = quantisation(whole)
    if stated is None:
        if checkpoint_file(config, "hf_quant_config.json") is not None:
            raise ValueError(f"verifier.path {config.path!r} is quantised by modelopt, which {_BY_AN_ENGINE}")
        return
    method = str(stated.get("quant_method"))
    if method not in AUTO_QUANTIZER_MAPPING and not method.startswith("bitsandbytes"):
        raise ValueError(f"verifier.path {config.path!r} is quantised by {method}, which {_BY_AN_ENGINE}")
    if method != "compressed-tensors":
        return
    if config.tensor_parallel:
        raise ValueError(
            f"verifier.tensor_parallel must be false for verifier.path {config.path!r}: transformers does not divide "
            "what compressed-tensors has quantised, but spreads it over the GPUs of one process"
        )
    if whole.get_text_config().model_type != "llama4_text" and any(map(_MISREAD_IN_EXPERTS.search, tensors)):
        raise ValueError(
            f"verifier.path {config.path!r} has experts in {stated.get('format')} with global scales or zero points, "
            f"which {_BY_AN_ENGINE}"
        )
    groups = _parse(config, stated).config_groups.values()
    if len(groups) != 1:  # transformers dequantises a checkpoint of one scheme only
        return
    (scheme,) = groups
    if scheme.input_activations is not None:
        kind = scheme.format or stated["format"]
        packed_zero_points = kind == "pack-quantized" and not scheme.weights.symmetric
        if not packed_zero_points and (kind != "nvfp4-pack-quantized" or config.dtype is Dtype.bfloat16):
            return
        print(
            f"verifier: {config.path} ({kind}) is dequantised, since transformers cannot run it as it is in "
            f"{config.dtype.value}: the inputs of its layers are not rounded as an engine rounds them"
        )
    for part in (whole, whole.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            part.quantization_config = {**stated, "dequantize": True}


def _parse(config: VerifierConfig, stated: dict[str, Any]) -> Any:
    if find_spec("compressed_tensors") is None:
        raise ValueError(
            f"verifier.path {config.path!r} is quantised by compressed-tensors, which is not installed: "
            "run `pip install compressed-tensors`"
        )
    from compressed_tensors.quantization import QuantizationConfig

    return QuantizationConfig.model_validate(stated)


def dense_matrix(
    config: VerifierConfig, stated: dict[str, Any] | None, module: str, tensors: dict[str, Tensor]
) -> Tensor:
    """Return the matrix of a linear layer or embedding; if it is quantised, multiplied out, in `verifier.dtype`.

    Args:
        stated: the `quantisation` of the checkpoint.
        module: its name in the checkpoint.
        tensors: the checkpoint's, by parameter (weight, or weight_packed and weight_scale, ...).
    """
    weight = tensors.get("weight")
    if weight is not None and weight.dtype in _DENSE:
        return weight
    dtype = getattr(torch, config.dtype.value)
    method = (stated or {}).get("quant_method")
    if stated and method == "fp8" and weight is not None and "weight_scale_inv" in tensors:
        rows, columns = stated["weight_block_size"]
        scales = tensors["weight_scale_inv"].float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        height, width = weight.shape  # the last blocks may be cut off
        return (weight.float() * scales[:height, :width]).to(dtype)
    scheme = _scheme(config, stated, module) if stated and method == "compressed-tensors" else None
    if scheme is None:
        raise ValueError(
            f"verifier.path {config.path!r} holds {module} in a quantised form that fledge does not read "
            f"({', '.join(sorted(tensors))}): give a checkpoint that leaves it as it was"
        )
    from compressed_tensors.compressors import BaseCompressor

    exact = {name: tensor.float() if tensor.dtype in _DENSE else tensor for name, tensor in tensors.items()}
    matrix: Tensor = BaseCompressor.get_value_from_registry(scheme.format).decompress(exact, scheme)["weight"]
    return matrix.to(dtype)


def _scheme(config: VerifierConfig, stated: dict[str, Any], module: str) -> Any:
    """Return the scheme of compressed-tensors that a module is quantised by, with its format set, or None."""
    groups = _parse(config, stated).config_groups
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.utils.match import match_name

    kind = torch.nn.Embedding if module.endswith("embed_tokens") else torch.nn.Linear
    for scheme in groups.values():
        if any(target == kind.__name__ or match_name(module, target) for target in scheme.targets):
            scheme.format = scheme.format or infer_module_format(kind, scheme)
            return scheme
    return None
