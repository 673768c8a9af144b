"""The config.json of heads as other projects publish them, in plain or Speculators format, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..conf.schema import AuxNumbering
from .draft_head import DraftHeadConfig
from .formats import CONFIG, vllm_layer_ids
from .verifier import default_aux_layers

_IDS = "eagle_aux_hidden_state_layer_ids"

# Fields that change the arithmetic, and the only value with which it is fledge's; absent and null mean the same.
_REPRESENTED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "norm_before_fc": False,
    "quantization_config": None,
    "use_sliding_window": False,
    "speculators_model_type": "eagle3",
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": 1,
}


def head_config(
    folder: Path, values: dict[str, Any], lm_head_rows: int, verifier: Any, numbering: AuxNumbering | None
) -> DraftHeadConfig:
    """Read either format's config.json.

    Args:
        lm_head_rows: the draft vocabulary where the configuration does not name its size.
        verifier: the verifier's language-model configuration, which the head must fit.
        numbering: what the aux layer ids mean, where the configuration leaves it open.

    Raises:
        ValueError: a field is missing, contradicts another, or says what fledge's head cannot represent.
    """
    speculators = "speculators_model_type" in values
    layer = values.get("transformer_layer_config") or {} if speculators else values
    eagle = values.get("eagle_config") or {}
    for name, represented in _REPRESENTED.items():
        for place in (values, layer, eagle):
            if place.get(name) not in (None, represented):
                raise ValueError(f"{folder}: {name} is {place[name]!r}, fledge's head knows {represented!r} only")
    required = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    absent = [name for name in required if not isinstance(layer.get(name), int) or layer[name] < 1]
    if absent:
        raise ValueError(f"{folder / CONFIG} has no usable {', '.join(absent)}: fetch the head again")
    verifier_hidden_size = values.get("target_hidden_size") or layer["hidden_size"]
    _check_fit(folder, verifier, layer["vocab_size"], verifier_hidden_size)
    return DraftHeadConfig(
        hidden_size=layer["hidden_size"],
        intermediate_size=layer["intermediate_size"],
        num_attention_heads=layer["num_attention_heads"],
        num_key_value_heads=layer.get("num_key_value_heads") or layer["num_attention_heads"],
        head_dim=layer.get("head_dim") or layer["hidden_size"] // layer["num_attention_heads"],
        vocab_size=layer["vocab_size"],
        draft_vocab_size=values.get("draft_vocab_size") or lm_head_rows,
        verifier_hidden_size=verifier_hidden_size,
        aux_layers=_aux_layers(folder, values, verifier.num_hidden_layers, numbering),
        max_position_embeddings=layer.get("max_position_embeddings") or verifier.max_position_embeddings,
        rope_parameters=rope_parameters(folder, layer),
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),  # engines read the file as a LlamaConfig: its default
        num_layers=layer.get("num_hidden_layers", 1),
        fc_norm=bool(values.get("fc_norm", False)),
        norm_output=bool(values.get("norm_output", False)),
        norm_before_residual=bool(values.get("norm_before_residual", speculators)),
    )


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
    if rope := layer.get("rope_parameters"):
        given = layer.get("rope_theta") or rope.get("rope_theta")
        if rope.get("rope_theta", given) != given:
            raise ValueError(
                f"{folder}: rope_theta is {given} at the top and {rope['rope_theta']} in rope_parameters: "
                "correct config.json to the one the head was trained with"
            )
        joined = {"rope_type": "default", "rope_theta": given or 10000.0, **rope}
    else:
        scaling = dict(layer.get("rope_scaling") or {})
        kind = scaling.pop("type", "default")
        joined = {"rope_type": kind, "rope_theta": layer.get("rope_theta") or 10000.0, **scaling}
    if joined["rope_type"] not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(f"{folder}: rope_type is {joined['rope_type']!r}, fledge's head does not know it")
    return joined


def _aux_layers(
    folder: Path, values: dict[str, Any], num_layers: int, numbering: AuxNumbering | None
) -> tuple[int, ...]:
    """Give the aux layers, 0-based and ascending, the order in which every engine concatenates their states.

    Nested ids are 0-based, those of the Speculators format are vLLM's, one higher. At the top level of a plain head
    both occur in the wild: nested ids beside them tell which, without them the option must.
    """
    nested, top = ((place or {}).get(_IDS) or [] for place in (values.get("eagle_config"), values))
    if not all(isinstance(layer, int) for layer in (*nested, *top)):
        raise ValueError(f"{folder}: {_IDS} must be a list of integers, got {nested or top}")
    nested, top = sorted(nested), sorted(top)
    speculators = "speculators_model_type" in values
    if numbering is not None and (nested or not top or speculators):
        raise ValueError(
            f"head_import.aux_numbering is {numbering.value}, and {folder / CONFIG} leaves nothing open: "
            "drop the option"
        )
    if nested and top and top not in (vllm_layer_ids(nested), nested):
        raise ValueError(
            f"{folder}: {_IDS} is {top} at the top level and {nested} in eagle_config, which is neither the same nor "
            "one higher: correct config.json to the layers the head was trained with"
        )
    if nested:
        layers = nested
    elif not top:
        layers = default_aux_layers(num_layers)
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
    return tuple(layers)
