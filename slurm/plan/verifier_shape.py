"""What a verifier weighs, from its configuration alone: the model is built without memory."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ...conf.schema import Config, VerifierConfig
from ...data_synthesis.states.verifier_check import check_verifier
from ...models.head.config import DraftHeadConfig, num_active_experts, num_experts, size_of
from ...models.verifier.config import empty_model, load_whole_config
from ...models.verifier.quantised import quantisation

_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.25}  # of methods that do not say; MXFP4: 4, and a byte for 32
_BITS_OF_MODELOPT = {"FP8": 8.0, "FP8_PER_CHANNEL_PER_TOKEN": 8.0, "FP8_PB_WO": 8.0, "NVFP4": 4.5}  # a byte for 16


@dataclass(frozen=True)
class VerifierShape:
    """Sizes of a verifier."""

    text: Any  # its language-model configuration
    source: str  # of that
    parameters: int
    active: int  # parameters that a token meets, embedding left out
    weight_bytes: int  # of all, as they are stored
    loaded_bytes: int  # of all, as transformers holds them: what only stores weights in few bits is dequantised

    def forward_bytes(self, tokens: int, num_aux: int) -> int:
        """Estimate what a forward of some tokens needs next to weights: a layer's inner states, and captured ones."""
        inner = max(size_of(self.text, name) or 0 for name in ("intermediate_size", "intermediate_size_mlp"))
        return tokens * (3 * inner + (6 + num_aux) * self.text.hidden_size) * 2

    def cache_bytes(self, tokens: float) -> float:
        """Return the bytes of the keys and values of some tokens, in 16 bit."""
        heads = size_of(self.text, "num_key_value_heads", "num_attention_heads")
        width = size_of(self.text, "head_dim") or self.text.hidden_size // size_of(self.text, "num_attention_heads")
        return tokens * self.text.num_hidden_layers * 2 * heads * width * 2


def _load_config(path: str | None, verifier: VerifierConfig) -> tuple[Any, str]:
    """Read the verifier's configuration from the nearest source, a path first, and return which that is."""
    verifier = replace(verifier, adapter=None)  # it changes no sizes
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"plan.verifier_config must be the path of a config.json, got {path}")
        try:
            return load_whole_config(replace(verifier, path=path, revision=None)), path
        except ValueError as error:
            raise ValueError(str(error).replace("verifier.path", "plan.verifier_config")) from None
    if not verifier.shapes or Path(verifier.path).is_dir():
        return load_whole_config(verifier), verifier.path
    kind: Any = verifier.shapes.get("model_type")
    try:
        sizes = {name: value for name, value in verifier.shapes.items() if name != "model_type"}
        return AutoConfig.for_model(kind, **sizes), "verifier.shapes"
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        needed = f"verifier.shapes must have what config.json has, model_type {kind!r} among it"
        raise ValueError(f"{needed}: {' '.join(str(error).split())[:200]}") from None


def planned_head(config: Config) -> DraftHeadConfig:
    """Derive the head from the configuration at hand, and check the verifier's files if they are at hand too."""
    whole, source = _load_config(config.plan.verifier_config, config.verifier)
    head = DraftHeadConfig.from_verifier(config.draft, whole.get_text_config())
    if source == config.verifier.path and any(Path(source).glob("*.safetensors")):
        check_verifier(replace(config.verifier, adapter=None), config.draft)
    return head


def verifier_shape(config: Config) -> VerifierShape:
    """Return the sizes of the configured verifier; its image tower counts if its configuration has one."""
    whole, source = _load_config(config.plan.verifier_config, config.verifier)
    text, model = whole.get_text_config(), empty_model(whole)
    matrices = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module]
    dense_bits = 8.0 * getattr(torch, config.verifier.dtype.value).itemsize
    scheme = _Scheme(config.verifier.path, quantisation(whole), dense_bits)
    share = num_active_experts(text) / num_experts(text) if num_active_experts(text) else 1.0
    total, active, weight_bits, loaded_bits = 0, 0, 0.0, 0.0
    for name, parameter in model.named_parameters():
        is_matrix = any(parameter is matrix for matrix in matrices)
        number, bits = parameter.numel(), scheme.dense if is_matrix else scheme.bits(name, parameter.dim())
        total, weight_bits = total + number, weight_bits + number * bits
        loaded_bits += number * (scheme.dense if scheme.dequantised else bits)
        if parameter is matrices[0] and not getattr(whole, "tie_word_embeddings", False):
            continue
        active += round(number * (share if ".experts." in name else 1.0))
    return VerifierShape(text, source, total, active, round(weight_bits / 8), round(loaded_bits / 8))


def _stored_bits(quantization_config: dict[str, Any], groups: list[dict[str, Any]]) -> float | None:
    """Return the bits of a quantised weight, its group's scale and zero point among them; None: not known."""
    method = str(quantization_config.get("quant_method"))
    weights = (groups[0].get("weights") or {}) if groups else {}
    if "num_bits" in weights:
        bits, size = weights["num_bits"], weights.get("group_size") or 0
        scale = 8 if weights.get("type") == "float" and bits == 4 else 16  # of NVFP4 and MXFP4, and of all others
        return float(bits + (scale / size if size > 0 else 0))
    if method == "modelopt":
        return _BITS_OF_MODELOPT.get(str(quantization_config.get("quant_algo")))
    if method in ("awq", "gptq", "auto-round") and "bits" in quantization_config:
        bits, size = quantization_config["bits"], quantization_config.get("group_size") or 0
        return float(bits + ((16 + bits) / size if size > 0 else 0))
    if method.startswith("bitsandbytes"):
        return 4.5 if quantization_config.get("load_in_4bit") else 8.0  # a float32 for 64
    return _BITS.get(method)


class _Scheme:
    """How many bits weights are stored in; ValueError if the method is not known."""

    def __init__(self, path: str, quantization_config: dict[str, Any] | None, dense_bits: float) -> None:
        stated = quantization_config or {}
        groups = list((stated.get("config_groups") or {}).values())
        bits = _stored_bits(stated, groups) if stated else dense_bits
        if bits is None:
            method = " ".join(str(stated[name]) for name in ("quant_method", "quant_algo") if name in stated)
            raise ValueError(
                f"verifier.path {path!r} is quantised by {method}, and how many bits its weights take is not known: "
                "give plan.verifier_config=, its config.json without quantization_config, for a plan of dense weights"
            )
        self.dense, self._bits = dense_bits, bits
        weights_only = len(groups) == 1 and groups[0].get("input_activations") is None  # models/verifier/quantised.py
        self.dequantised = weights_only and stated.get("quant_method") == "compressed-tensors"
        self._ignored = [*(stated.get("ignore") or []), *(stated.get("modules_to_not_convert") or [])]

    def bits(self, name: str, dimensions: int) -> float:
        """Return the bits a weight of that name takes: embeddings, norms, routers and what is left out stay dense."""
        module = name.removesuffix(".weight")
        if dimensions < 2 or any(part in module for part in ("embed_tokens", "router", "vision")):
            return self.dense
        for ignored in self._ignored:
            pattern = ignored[3:] if ignored.startswith("re:") else ".*" + re.escape(ignored).replace(r"\*", ".*")
            if re.match(pattern, module):
                return self.dense
        return self._bits
