"""What a verifier weighs and costs, from its configuration alone: the model is built without memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ..conf.schema import Config, VerifierConfig
from ..models.quantised import quantisation
from ..models.verifier import load_whole_config, takes_images, verifier_location

_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "modelopt": 4.5}  # of methods that do not say; NVFP4: 4, and a byte for 16


@dataclass(frozen=True)
class VerifierShape:
    """Sizes of a verifier."""

    text: Any  # its language-model configuration
    source: str  # where that is from
    parameters: int
    active: int  # parameters that a token meets, embedding left out
    weight_bytes: int  # of all, as they are stored
    active_bytes: int
    loaded_bytes: int  # of all, as transformers holds them: what only stores weights in few bits is dequantised
    fp8_inputs: bool  # its products run in fp8

    def forward_bytes(self, tokens: int, num_aux: int) -> int:
        """Estimate what a forward of some tokens needs beside weights: a layer's inner states, and those captured."""
        inner = max(getattr(self.text, name, 0) or 0 for name in ("intermediate_size", "intermediate_size_mlp"))
        return tokens * (3 * inner + (6 + num_aux) * self.text.hidden_size) * 2

    def flops(self, tokens: float, mean_context: float) -> float:
        """Give the operations of reading tokens: 2 a parameter, and attention to half a context each."""
        queries = self.text.num_attention_heads * _head_dim(self.text)
        return tokens * (2 * self.active + 4 * self.text.num_hidden_layers * queries * mean_context / 2)

    def cache_bytes(self, tokens: float) -> float:
        """Give the bytes of the keys and values of some tokens, in 16 bit."""
        heads = getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads
        return tokens * self.text.num_hidden_layers * 2 * heads * _head_dim(self.text) * 2


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def load_whole(config: Config) -> tuple[Any, str]:
    """Find the verifier's configuration, nearest source first, and say which it is."""
    given, verifier = config.plan.verifier_config, config.verifier
    if given is not None:
        if not Path(given).is_file():
            raise ValueError(f"plan.verifier_config must be the path of a config.json, got {given}")
        return AutoConfig.from_pretrained(given), given
    if verifier.shapes and not Path(verifier.path).is_dir():
        return _of_shapes(verifier), "verifier.shapes"
    return load_whole_config(verifier), str(verifier_location(verifier))


def _of_shapes(verifier: VerifierConfig) -> Any:
    values = dict(verifier.shapes)
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"verifier.shapes must have what config.json has, model_type {kind!r} among it: {reason}"
        ) from None


def verifier_shape(config: Config) -> VerifierShape:
    """Give the sizes of the configured verifier; its image tower counts where its configuration has one."""
    whole, source = load_whole(config)
    text = whole.get_text_config()
    kind = AutoModelForImageTextToText if takes_images(whole) else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(whole, dtype=torch.bfloat16)
    scheme = _Scheme(quantisation(whole), 8.0 * getattr(torch, config.verifier.dtype.value).itemsize)
    share = _expert_share(text)
    total = active = 0
    weight_bits = active_bits = loaded_bits = 0.0
    for name, parameter in model.named_parameters():
        number, bits = parameter.numel(), scheme.bits(name, parameter.dim())
        total, weight_bits = total + number, weight_bits + number * bits
        loaded_bits += number * (scheme.dense if scheme.dequantised else bits)
        if "embed_tokens" in name and not getattr(whole, "tie_word_embeddings", False):
            continue
        met = share if ".experts." in name else 1.0
        active, active_bits = active + round(number * met), active_bits + number * met * bits
    weights, met_weights, loaded = (round(bits / 8) for bits in (weight_bits, active_bits, loaded_bits))
    return VerifierShape(text, source, total, active, weights, met_weights, loaded, scheme.fp8_inputs)


def _expert_share(text: Any) -> float:
    """Give the share of the routed experts that a token meets."""
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    return text.num_experts_per_tok / experts if experts else 1.0


class _Scheme:
    """How many bits weights are stored in."""

    def __init__(self, stated: dict[str, Any] | None, dense_bits: float) -> None:
        self.dense, self._bits = dense_bits, dense_bits
        self.fp8_inputs = self.dequantised = False
        self._ignored: list[str] = []
        if stated is None:
            return
        groups = list((stated.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") or {}) if groups else {}
        self._bits = _BITS.get(str(stated.get("quant_method")), dense_bits)
        if "num_bits" in weights:
            self._bits = weights["num_bits"] + (16 / weights["group_size"] if weights.get("group_size") else 0)
        inputs = groups[0].get("input_activations") if groups else None
        self.fp8_inputs = self._bits == 8 and (not groups or inputs is not None)
        self.dequantised = len(groups) == 1 and inputs is None  # models/quantised.py
        self._ignored = [*(stated.get("ignore") or []), *(stated.get("modules_to_not_convert") or [])]

    def bits(self, name: str, dimensions: int) -> float:
        """Give the bits a weight of that name takes: embeddings, norms, routers and what is left out stay dense."""
        module = name.removesuffix(".weight")
        if dimensions < 2 or any(part in module for part in ("embed_tokens", "lm_head", "router", "vision")):
            return self.dense
        for ignored in self._ignored:
            if re.match(ignored[3:], module) if ignored.startswith("re:") else ignored in module:
                return self.dense
        return self._bits
