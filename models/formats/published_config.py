"""The config.json of heads as other projects publish them, in plain or Speculators format, read strictly.

Every field is represented, known to be without effect, or refused by name, at every level; null is the same as absent.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...conf.schema import AuxNumbering, HeadImportConfig
from ..head.config import DraftHeadConfig
from ..verifier.model import default_aux_layers
from .plain import CONFIG, vllm_layer_ids

_IDS = "eagle_aux_hidden_state_layer_ids"
_POST_NORM = "return_hidden_post_norm"  # TensorRT-LLM's name of norm_output, in eagle_config

_CURE = "serve the head in the engine it was made for, or correct the field if it was trained otherwise"
# Fields that change the arithmetic, and the only value with which it is fledge's.
_REPRESENTED: dict[str, Any] = {
    "hidden_act": "silu",
    "norm_type": "rms",
    "attention_bias": False,
    "mlp_bias": False,
    "qkv_bias": False,
    "bias": False,  # of fc
    "is_causal": True,
    "norm_before_fc": False,
    "additional_fc": False,
    "eh_proj_before_attn": False,
    "eh_proj_bias": False,
    "quantization_config": None,
    "use_sliding_window": False,
    "attention_chunk_size": None,
    "position_embedding_type": "rope",
    "use_rotary_pos_emb": True,
    "partial_rotary_factor": 1.0,
    "rope_interleave": False,
    "rope_interleaved": False,
    "logit_scale": 1.0,
    "speculators_model_type": "eagle3",
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_drafting": False,
    "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": 1,
}
# Fields that are read at the top level, and those that are read of the layer: a head in Speculators format has its own
# place for the latter. Elsewhere they must say the same.
_TOP = re.compile(
    "draft_vocab_size|fc_norm|norm_before_residual|norm_output|num_aux_hidden_states|reuse_target_lm_head"
    "|target_hidden_size|use_aux_norm"
)
_LAYER = re.compile(
    "head_dim|hidden_size|intermediate_size|intermediate_size_mlp|layer_types|max_position_embeddings|no_rope_layers"
    "|num_attention_heads|num_hidden_layers|num_key_value_heads|rms_norm_eps|rope_parameters|rope_scaling|rope_theta"
    "|sliding_window|vocab_size"
)
# Fields without effect on a head: what transformers keeps beside any model, what served training or describes the
# verifier, and what would show in tensors, each of which is checked. (The first ones are read, wherever they stand.)
_KNOWN = re.compile(
    r"""eagle_aux_hidden_state_layer_ids|eagle_config|tie_word_embeddings|transformer_layer_config
    |add_classification_head|add_cross_attention|attention_dropout|attention_head_dim|auto_map|class_num
    |cla_share_factor|cross_attention_hidden_size|decoder_sparse_step|dense_list|embed_requires_grad|eagle_decoder_type
    |finetuning_task|first_k_dense_replace|has_lm_head|inference_type|initializer_range|interleave_moe_layer_step|is_decoder
    |max_window_layers|modal_type|model_max_length|moe_intermediate_size|moe_layers|n_routed_experts|n_shared_experts
    |no_rope_layer_interval|norm_topk_prob|num_experts|num_experts_per_tok|num_local_experts|num_nextn_predict_layers
    |org_vocab_size|output_router_logits|pool_type|prefix|pretraining_tp|pruned_heads|router_aux_loss_coef
    |router_jitter_noise|speculators_config|target_model_type|task_specific_params|tf_legacy_loss|tie_encoder_decoder
    |tokenizer_class|torch_dtype|torchscript|use_bfloat16|use_cla|use_mrope|use_qk_norm

    |_.+|.+_version|(.+_)?token_(id|index)|(im|text)_(start|end|newline)_id|(pad|mask_init)_id""",
    re.VERBOSE,
)
_OF_ANY_MODEL = PreTrainedConfig().to_dict().keys() | GenerationConfig().to_dict().keys()
_ROPE_KNOWN = re.compile(
    r"""rope_type|type|rope_theta|factor|original_max_position_embeddings|attention_factor|beta_fast|beta_slow|truncate
    |short_factor|long_factor|low_freq_factor|high_freq_factor|mscale|mscale_all_dim|mrope_section|mrope_interleaved
    |partial_rotary_factor""",
    re.VERBOSE,
)
_ROPE_ALIASES = {"mrope": "default", "su": "longrope"}  # equal on text, and an older name


def head_config(
    folder: Path, values: dict[str, Any], lm_head_rows: int, verifier: Any, options: HeadImportConfig
) -> DraftHeadConfig:
    """Read either format's config.json.

    Args:
        lm_head_rows: the draft vocabulary where the configuration does not name its size.
        verifier: the verifier's language-model configuration, which the head must fit.
        options: what the configuration may leave open.

    Raises:
        ValueError: a field is missing, unknown, contradicts another, or says what fledge's head cannot represent.
    """
    speculators = "speculators_model_type" in values
    layer = values.get("transformer_layer_config") or {} if speculators else values
    _check_fields(folder, values, layer)
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    absent = [name for name in required if not isinstance(layer.get(name), int) or layer[name] < 1]
    if absent:
        raise ValueError(f"{folder / CONFIG} has no usable {', '.join(absent)}: fetch the head again")
    verifier_hidden_size = values.get("target_hidden_size") or layer["hidden_size"]
    _check_fit(folder, verifier, layer["vocab_size"], verifier_hidden_size)
    llama4 = layer.get("model_type") == "llama4_text"  # SGLang and TensorRT-LLM then read the other field
    return DraftHeadConfig(
        hidden_size=layer["hidden_size"],
        intermediate_size=(llama4 and layer.get("intermediate_size_mlp")) or layer["intermediate_size"],
        num_attention_heads=layer["num_attention_heads"],
        num_key_value_heads=layer.get("num_key_value_heads") or layer["num_attention_heads"],
        head_dim=layer.get("head_dim") or layer["hidden_size"] // layer["num_attention_heads"],
        vocab_size=layer["vocab_size"],
        draft_vocab_size=values.get("draft_vocab_size") or lm_head_rows,
        verifier_hidden_size=verifier_hidden_size,
        aux_layers=_aux_layers(folder, values, verifier.num_hidden_layers, options),
        max_position_embeddings=layer.get("max_position_embeddings") or verifier.max_position_embeddings,
        rope_parameters=rope_parameters(folder, layer),
        rms_norm_eps=layer.get("rms_norm_eps") or 1e-6,  # engines read the file as a LlamaConfig: its default
        num_layers=layer.get("num_hidden_layers") or 1,
        fc_norm=bool(values.get("fc_norm") or values.get("use_aux_norm")),
        norm_output=_norm_output(folder, values),
        norm_before_residual=bool(values.get("norm_before_residual", speculators)),
    )


def _check_fields(folder: Path, values: dict[str, Any], layer: dict[str, Any]) -> None:
    """Refuse what is unknown, and what the head's arithmetic is not."""
    for name in ("eagle_config", "transformer_layer_config", "rope_parameters", "rope_scaling"):
        for place in (values, layer):
            if isinstance(place, dict) and not isinstance(place.get(name) or {}, dict):
                raise ValueError(
                    f"{folder}: {name} is {place[name]!r}, fields with values are required: fetch the head again"
                )
    eagle = values.get("eagle_config") or {}
    places = {"": values, "transformer_layer_config.": layer if layer is not values else {}, "eagle_config.": eagle}
    given = [(p + name, name, value) for p, held in places.items() for name, value in held.items() if value is not None]
    for path, name, value in given:
        if name in _REPRESENTED and value != _REPRESENTED[name]:
            raise ValueError(f"{folder}: {path} is {value!r}, fledge's head knows {_REPRESENTED[name]!r} only: {_CURE}")
    unknown = []
    for path, name, value in given:
        home, where = _home(name, values, layer)
        if home is not None and value != home.get(name, name == "norm_before_residual" and home is not layer):
            raise ValueError(
                f"{folder}: {path} is {value!r}, and {name} is read {where}, where it is {home.get(name, 'absent')!r}: "
                "write the one that the head was trained with there, and remove the other"
            )
        known = home is not None or name in _OF_ANY_MODEL or name in _REPRESENTED or _KNOWN.fullmatch(name)
        unknown += [] if known else [f"{path} = {value!r}"]
    if unknown:
        raise ValueError(
            f"{folder / CONFIG} has fields that fledge does not know: {', '.join(unknown)}; it drops none silently, as "
            "they may change what the head computes: remove those that do not from the file"
        )
    _check_attention(folder, layer)


def _home(name: str, values: dict[str, Any], layer: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Give the one place where a field is read, and its name; None if there are several, or none."""
    if name == _POST_NORM:
        return values.get("eagle_config") or {}, "in eagle_config"
    if _LAYER.fullmatch(name) and layer is not values:
        return layer, "in transformer_layer_config"
    return (values, "at the top level") if _TOP.fullmatch(name) or _LAYER.fullmatch(name) else (None, "")


def _check_attention(folder: Path, layer: dict[str, Any]) -> None:
    """Refuse a head that does not attend to all earlier positions, or not by their rotary positions."""
    window, types = layer.get("sliding_window"), layer.get("layer_types")
    kind = CONFIG_MAPPING[layer["model_type"]] if layer.get("model_type") in CONFIG_MAPPING else None
    narrow = window and types is None and "use_sliding_window" not in layer and hasattr(kind, "sliding_window")
    for name, restricts in (
        ("layer_types", any(entry != "full_attention" for entry in types or [])),
        ("sliding_window", narrow and not hasattr(kind, "use_sliding_window")),
        ("no_rope_layers", not all(layer.get("no_rope_layers") or [])),
    ):
        if restricts:
            raise ValueError(
                f"{folder}: {name} is {layer[name]!r}, fledge's head has full attention with rotary positions only: "
                f"{_CURE}"
            )


def _norm_output(folder: Path, values: dict[str, Any]) -> bool:
    """Tell whether the normed state is fed onward, by either name."""
    top, nested = values.get("norm_output"), (values.get("eagle_config") or {}).get(_POST_NORM)
    if top is not None and nested is not None and top != nested:
        raise ValueError(
            f"{folder}: norm_output is {top} and eagle_config.{_POST_NORM} {nested}, TensorRT-LLM's name of the same: "
            "correct config.json to the one the head was trained with"
        )
    return bool(top or nested)


def _check_fit(folder: Path, verifier: Any, vocab_size: int, hidden_size: int) -> None:
    for name, has, needs in (
        ("vocab_size", vocab_size, verifier.vocab_size),
        ("hidden size", hidden_size, verifier.hidden_size),
    ):
        if has != needs:
            raise ValueError(
                f"{folder} is made for a verifier of {name} {has}, verifier.path has {needs}: set the head's verifier"
            )


def rope_parameters(folder: Path, layer: dict[str, Any]) -> dict[str, Any]:
    """Join the rotary fields, in the form of transformers 5 (`rope_parameters`) or the older one (two fields)."""
    joined: dict[str, Any] = {"rope_theta": layer["rope_theta"]} if layer.get("rope_theta") else {}
    given = [(name, *item) for name in ("rope_parameters", "rope_scaling") for item in (layer.get(name) or {}).items()]
    for name, field, value in given:
        if not _ROPE_KNOWN.fullmatch(field) or (field == "partial_rotary_factor" and value not in (None, 1)):
            raise ValueError(
                f"{folder}: {name}.{field} is {value!r}, which fledge's head does not know: remove it if the head was "
                "trained without"
            )
        if field in ("rope_type", "type"):
            field, value = "rope_type", _ROPE_ALIASES.get(str(value), value)
        if value is not None and joined.setdefault(field, value) != value:
            raise ValueError(
                f"{folder}: {field} is {joined[field]}, and {value} in {name}: correct config.json to the one the head "
                "was trained with"
            )
    joined = {"rope_type": "default", "rope_theta": 10000.0, **joined}
    if joined["rope_type"] not in ["default", *ROPE_INIT_FUNCTIONS]:
        raise ValueError(f"{folder}: rope_type is {joined['rope_type']!r}, fledge's head does not know it: {_CURE}")
    return joined


def _aux_layers(folder: Path, values: dict[str, Any], num_layers: int, options: HeadImportConfig) -> tuple[int, ...]:
    """Give the aux layers, 0-based and ascending, the order in which every engine concatenates their states.

    Nested ids are 0-based, those of the Speculators format are vLLM's, one higher. At the top level of a plain head
    both occur in the wild: nested ids beside them tell which, without them the option must.
    """
    nested, top = ((place or {}).get(_IDS) or [] for place in (values.get("eagle_config"), values))
    if not all(isinstance(layer, int) for layer in (*nested, *top)):
        raise ValueError(f"{folder}: {_IDS} must be a list of integers, got {nested or top}")
    nested, top, numbering = sorted(nested), sorted(top), options.aux_numbering
    speculators = "speculators_model_type" in values
    for name, given, is_open in (
        ("aux_numbering", numbering and numbering.value, top and not nested and not speculators),
        ("aux_layers", options.aux_layers, not top and not nested),
    ):
        if given is not None and not is_open:
            raise ValueError(
                f"head_import.{name} is {given}, and {folder / CONFIG} leaves nothing open: drop the option"
            )
    if nested and top and top not in (vllm_layer_ids(nested), nested):
        raise ValueError(
            f"{folder}: {_IDS} is {top} at the top level and {nested} in eagle_config, which is neither the same nor "
            "one higher: correct config.json to the layers the head was trained with"
        )
    if nested:
        layers = nested
    elif not top:
        layers = _given_layers(folder, options.aux_layers, num_layers)
    elif speculators or numbering is AuxNumbering.vllm:
        layers = [layer - 1 for layer in top]
    elif numbering is AuxNumbering.zero_based:
        layers = top
    else:
        raise ValueError(
            f"{folder}: {_IDS} is {top} at the top level alone, which projects number in two ways: set "
            "head_import.aux_numbering=zero_based if id k is the output of layer k, =vllm if of layer k-1"
        )
    if len(set(layers)) != len(layers) or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise ValueError(
            f"{folder}: the aux layers are {layers} (0-based), different ones from 0 to {num_layers - 1}, the "
            "verifier's, are required"
        )
    if values.get("num_aux_hidden_states") not in (None, len(layers)):
        raise ValueError(
            f"{folder}: num_aux_hidden_states is {values['num_aux_hidden_states']}, and the aux layers are {layers} "
            "(0-based): correct config.json to what the head was trained with"
        )
    return tuple(layers)


def _given_layers(folder: Path, layers: list[int] | None, num_layers: int) -> list[int]:
    """Give the layers of the option, which must name them where config.json does not."""
    if layers is None:
        try:
            usual = f"; engines take {default_aux_layers(num_layers)} unasked, which costs acceptance if it was others"
        except ValueError:
            usual = ""
        raise ValueError(
            f"{folder / CONFIG} does not say which layers the head was trained on: set "
            f"head_import.aux_layers=[...] to them (0-based, of the verifier's {num_layers}){usual}"
        )
    return sorted(layers)
