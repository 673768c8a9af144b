"""Small random verifiers of many architectures, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from builders import SMALL_DECODER, SMALL_LLAMA4, SMALL_VISION
from fledge.conf.schema import Device, Dtype, VerifierConfig

SIZES = {**SMALL_DECODER, "max_position_embeddings": 256}
DENSE = {"intermediate_size": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DENSE),
    "llama, tied embedding": ("Llama", {**DENSE, "tie_word_embeddings": True}),
    "llama 4 text": ("Llama4", {**SMALL_LLAMA4, "attention_chunk_size": 16}),
    "qwen3": ("Qwen3", DENSE),
    "qwen3 moe": ("Qwen3Moe", {**DENSE, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}),
    "mistral, sliding window": ("Mistral", {**DENSE, "sliding_window": 16}),
    "gemma 2, soft-capped": (
        "Gemma2",
        {
            **DENSE,
            "sliding_window": 16,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 0.5,
        },
    ),
    "gemma 3": ("Gemma3", {**DENSE, "sliding_window": 16, "tie_word_embeddings": True}),
    "gpt-oss": (
        "GptOss",
        {
            **DENSE,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "granite": ("Granite", {**DENSE, "logits_scaling": 8.0}),
    "cohere": ("Cohere", {**DENSE, "logit_scale": 0.25, "tie_word_embeddings": True}),
    "falcon h1": (
        "FalconH1",
        {**DENSE, "lm_head_multiplier": 3.0, "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32},
    ),
    "lfm2, final norm by another name": ("Lfm2", {**DENSE, "tie_word_embeddings": True}),
}
IMAGE_TEXT_MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama 4": ("Llama4", MODELS["llama 4 text"][1], SMALL_VISION),
    "qwen3 vl": (
        "Qwen3VL",
        {
            **DENSE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        },
        {
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 1,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
        },
    ),
}


def make_model(name: str, vocab_size: int, **more: Any) -> transformers.PreTrainedModel:
    """Make a random model whose norms are not all ones (or zeros), so that a forgotten one shows."""
    torch.manual_seed(0)
    if name in IMAGE_TEXT_MODELS:
        family, changes, vision = IMAGE_TEXT_MODELS[name]
        text = {"tie_word_embeddings": False, **SIZES, **changes, **more, "vocab_size": vocab_size}
        whole = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(whole)
    else:
        family, changes = MODELS[name]
        config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
        values = {"tie_word_embeddings": False, **SIZES, "pad_token_id": 0, **changes, **more, "vocab_size": vocab_size}
        model = getattr(transformers, f"{family}ForCausalLM")(config_class(**values))
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def save_verifier(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
    dtype: Dtype = Dtype.float32,
    **options: Any,
) -> VerifierConfig:
    """Write a checkpoint with another verifier's tokenizer."""
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return VerifierConfig(path=str(folder), dtype=dtype, device=Device.cpu)
