"""The fields of a head's config.json, a row each: what fledge writes, reads and refuses, and what engines need.

In plain format all stand at the top level; in Speculators format those of the layer have a place of their own.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ..head.config import DraftHeadConfig

TOP, LAYER, EAGLE = "", "transformer_layer_config", "eagle_config"  # where fields stand
AUX_IDS = "eagle_aux_hidden_state_layer_ids"
POST_NORM = "return_hidden_post_norm"  # TensorRT-LLM's name of norm_output, in eagle_config
FULL, SLIDING = "full_attention", "sliding_attention"  # entries of layer_types
PARTIAL = "partial_rotary_factor"
ANY = object()


@dataclass(frozen=True)
class Field:
    """A field of config.json. One with a name alone is known to have no effect on a head."""

    name: str
    home: str | None = None  # the one place where it is read; elsewhere it must say the same
    ours: str | None = None  # the attribute of `DraftHeadConfig` that it is
    only: Any = ANY  # the one value with which the arithmetic is fledge's
    value: Callable[[Any], Any] | None = None  # what fledge writes of a head if neither of these two
    at: str | None = None  # where fledge writes it if not at home
    of: Callable[[DraftHeadConfig], bool] = lambda config: True  # the heads of which fledge writes it
    nested: bool = False  # a plain head may have it in eagle_config alone
    absent: Callable[[dict[str, Any], Any], Any] | None = None  # its default, by the layer's fields and the verifier
    required: bool = False  # a published head must have it
    needed_by: str = ""  # an engine that reads it without a default, in plain format

    def allows(self, value: Any) -> bool:
        """Return whether the arithmetic is fledge's with this value."""
        return self.only is ANY or value == self.only


def _rope_scaling(config: DraftHeadConfig) -> dict[str, Any] | None:
    scaling = {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    return None if scaling.get("rope_type", "default") == "default" else scaling


def _layer_types(config: DraftHeadConfig) -> list[str]:
    return [SLIDING if config.window(layer) else FULL for layer in range(config.num_layers)]


def _has_window(config: DraftHeadConfig) -> bool:
    return bool(config.window_layers)


def _rotates_in_part(config: DraftHeadConfig) -> bool:
    return PARTIAL in config.rope_parameters


# What served training or describes the verifier, and what would show in tensors, which are all checked.
_WITHOUT_EFFECT = """
    eagle_aux_hidden_state_layer_ids eagle_config transformer_layer_config speculators_config add_classification_head
    add_cross_attention attention_dropout attention_head_dim auto_map class_num cla_share_factor
    cross_attention_hidden_size decoder_sparse_step dense_list embed_requires_grad eagle_decoder_type finetuning_task
    first_k_dense_replace has_lm_head inference_type initializer_range interleave_moe_layer_step is_decoder
    max_window_layers modal_type model_max_length moe_intermediate_size moe_layers n_routed_experts n_shared_experts
    no_rope_layer_interval norm_topk_prob num_experts num_experts_per_tok num_local_experts num_nextn_predict_layers
    org_vocab_size output_router_logits pool_type prefix pretraining_tp pruned_heads router_aux_loss_coef
    router_jitter_noise target_model_type task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class
    torch_dtype torchscript use_bfloat16 use_cla use_mrope use_qk_norm
"""
FIELDS = (
    # Of the layers, in the order in which they are written. The norms of q and k show in tensors.
    Field("model_type", value=lambda head: "qwen3" if head.qk_norm else "llama", at=LAYER),
    Field("hidden_size", LAYER, "hidden_size", required=True),
    Field("intermediate_size", LAYER, "intermediate_size", required=True),
    Field("num_hidden_layers", LAYER, "num_layers", absent=lambda layer, verifier: 1),
    Field("num_attention_heads", LAYER, "num_attention_heads", required=True),
    Field("num_key_value_heads", LAYER, "num_key_value_heads", absent=lambda layer, _: layer["num_attention_heads"]),
    Field("head_dim", LAYER, "head_dim", absent=lambda layer, _: layer["hidden_size"] // layer["num_attention_heads"]),
    Field("hidden_act", only="silu", at=LAYER),
    # Engines read the file as a LlamaConfig, and this is its default.
    Field("rms_norm_eps", LAYER, "rms_norm_eps", absent=lambda layer, verifier: 1e-6),
    Field("vocab_size", LAYER, "vocab_size", required=True),
    Field("max_position_embeddings", LAYER, "max_position_embeddings",
          absent=lambda _, verifier: verifier.max_position_embeddings),
    # The rotary base stands twice: releases of transformers before 5 read rope_theta and rope_scaling.
    Field("rope_theta", LAYER, value=lambda head: head.rope_parameters.get("rope_theta")),
    Field("rope_parameters", LAYER, "rope_parameters", value=lambda head: dict(head.rope_parameters)),
    Field("rope_scaling", LAYER, value=_rope_scaling),
    # SGLang and TensorRT-LLM read it here, vLLM in rope_parameters.
    Field(PARTIAL, LAYER, value=lambda head: head.rope_parameters[PARTIAL], of=_rotates_in_part),
    Field("attention_bias", LAYER, "attention_bias", absent=lambda *_: False, needed_by="TensorRT-LLM"),
    Field("mlp_bias", only=False, at=LAYER, needed_by="TensorRT-LLM"),
    Field("tie_word_embeddings", value=lambda _: False, at=LAYER, needed_by="TensorRT-LLM"),
    # A Qwen3 forgets its window without the last of the three.
    Field("layer_types", LAYER, value=_layer_types, of=_has_window),
    Field("sliding_window", LAYER, value=lambda head: head.sliding_window, of=_has_window),
    Field("use_sliding_window", LAYER, value=lambda _: True, of=_has_window),
    # In Speculators format vLLM gets the layer's fields, and reads it among them.
    Field("num_aux_hidden_states", value=lambda head: len(head.aux_layers), at=LAYER,
          of=lambda head: len(head.aux_layers) != 3),
    # Of the head.
    Field("draft_vocab_size", TOP, "draft_vocab_size"),
    Field("norm_before_residual", TOP, "norm_before_residual"),
    Field("norm_before_fc", TOP, "norm_before_fc", absent=lambda *_: False, nested=True),
    Field("fc_norm", TOP, "fc_norm"),
    Field("norm_output", TOP, "norm_output"),
    # Read, and not written, or in one format alone.
    *(Field(name, TOP) for name in ("reuse_target_lm_head", "target_hidden_size", "use_aux_norm")),
    *(Field(name, LAYER) for name in ("intermediate_size_mlp", "no_rope_layers")),
    Field(POST_NORM, EAGLE),
    # What changes the arithmetic, and the only value with which it is fledge's.
    Field("quantization_config", only=None),
    Field("norm_type", only="rms"),
    Field("position_embedding_type", only="rope"),
    Field("speculators_model_type", only="eagle3"),
    Field("attention_chunk_size", only=None),
    *(Field(name, only=True) for name in (
        "is_causal", "use_rotary_pos_emb", "use_aux_hidden_state", "use_input_layernorm_in_first_layer",
        "use_last_layernorm", "next_layer_regular")),
    *(Field(name, only=False) for name in (
        "qkv_bias", "bias", "additional_fc", "eh_proj_before_attn", "eh_proj_bias", "rope_interleave",
        "rope_interleaved", "use_mtp_layernorm", "parallel_drafting")),
    Field("logit_scale", only=1.0),
    *(Field(name, only=1) for name in ("parallel_draft_step", "parallel_draft_heads_num_layers")),
    *map(Field, _WITHOUT_EFFECT.split()),
)  # fmt: skip
_KNOWN = re.compile(r"_.+|.+_version|(.+_)?token_(id|index)|(im|text)_(start|end|newline)_id|(pad|mask_init)_id")
_OF_ANY_MODEL = PreTrainedConfig().to_dict().keys() | GenerationConfig().to_dict().keys()
ROPE_FIELDS = re.compile(
    "rope_type|type|rope_theta|factor|original_max_position_embeddings|attention_factor"
    "|beta_fast|beta_slow|truncate|short_factor|long_factor|low_freq_factor|high_freq_factor"
    "|mscale|mscale_all_dim|mrope_section|mrope_interleaved|partial_rotary_factor"
)


def has_no_effect(name: str) -> bool:
    """Return whether a field without a row has no effect on a head: transformers keeps it next to any model."""
    return name in _OF_ANY_MODEL or _KNOWN.fullmatch(name) is not None


def written_fields(config: DraftHeadConfig, place: str, more: Iterable[Field] = ()) -> dict[str, Any]:
    """Return the fields that both formats write of a head at one place; `more` are rows of its architecture."""
    return {
        row.name: row.value(config) if row.value else getattr(config, row.ours) if row.ours else row.only
        for row in (*FIELDS, *more)
        if row.of(config) and place == (row.home if row.at is None and (row.ours or row.value) else row.at)
    }


def window_of(layer: dict[str, Any]) -> dict[str, Any]:
    """Return the window among the attributes of `DraftHeadConfig`, by the layer's fields."""
    types = (layer.get("layer_types") or [])[: layer.get("num_hidden_layers") or 1]
    layers = tuple(number for number, kind in enumerate(types) if kind == SLIDING)
    return {"sliding_window": layer.get("sliding_window") if layers else None, "window_layers": layers}


def vllm_layer_ids(aux_layers: Iterable[int]) -> list[int]:
    """Return aux layers as vLLM and Speculators number them: id k is the output of layer k-1."""
    return [layer + 1 for layer in aux_layers]
