"""Heads as other projects publish them, read strictly: what fledge's head cannot represent is refused by name.

Read are the plain format (NVIDIA ModelOpt, SpecForge, AngelSlim, EAGLE: `midlayer.*` or `layers.0.*`) and the
Speculators format; weights from safetensors, in one file or several with an index, or from `pytorch_model.bin`.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..conf.schema import AuxNumbering
from .draft_head import DraftHead, DraftHeadConfig
from .formats import CONFIG, WEIGHTS, tensor_problems, vllm_layer_ids
from .verifier import default_aux_layers
from .vocabulary import VocabularyMap

INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
LM_HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_IDS = "eagle_aux_hidden_state_layer_ids"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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


@dataclass
class ForeignHead:
    """A head as read: float32 weights, the dtype they were published in, and the embedding it came with."""

    head: DraftHead
    dtype: torch.dtype
    embedding: Tensor | None  # [V, H], as published


def weight_files(folder: Path) -> list[Path]:
    """Give the files that hold the weights of a published head.

    Raises:
        ValueError: the folder is no head, or a file that the index names is missing.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a head: {CONFIG} is missing")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is not an index of weights ({error!r}): fetch the head again") from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder}: {name} is named by the index and missing: fetch the head again")
        return [folder / name for name in names]
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    raise ValueError(f"{folder} holds no weights: {WEIGHTS}, {INDEX} or {PICKLE} is required")


def read_foreign_head(folder: Path, verifier: Any, numbering: AuxNumbering | None = None) -> ForeignHead:
    """Read a published head.

    Args:
        verifier: the verifier's language-model configuration, which the head must fit.
        numbering: what the aux layer ids mean, where config.json leaves it open.

    Raises:
        ValueError: the head is damaged, does not fit the verifier, or holds what fledge's head cannot represent.
    """
    files = weight_files(folder)
    values = _read_config(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_weights(file)
    if LM_HEAD not in tensors:
        raise ValueError(
            f"{folder}: {LM_HEAD} is missing, and engines would silently use another in its place: fetch the head's "
            "complete checkpoint, or, if it was trained on the verifier's own, add that matrix to it under this name"
        )
    config = _head_config(folder, values, tensors[LM_HEAD].shape[0], verifier, numbering)
    return _assemble(folder, config, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the head again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a configuration: fetch the head again")
    return values


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors; a pickle is read as tensors only, code in it is refused and never run."""
    try:
        tensors = load_file(path) if path.name != PICKLE else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged or holds more than tensors (code in it was not run): get the head as safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as weights ({reason}): fetch the head again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds something else than named tensors, it is not a head's state")
    return tensors


def _head_config(
    folder: Path, values: dict[str, Any], lm_head_rows: int, verifier: Any, numbering: AuxNumbering | None
) -> DraftHeadConfig:
    """Read either format's config.json and check it against the verifier."""
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
    for name, has, needs in (
        ("vocab_size", layer["vocab_size"], verifier.vocab_size),
        ("hidden size", verifier_hidden_size, verifier.hidden_size),
        ("embedding size", layer["hidden_size"], verifier.hidden_size),
    ):
        if has != needs:
            raise ValueError(
                f"{folder} is made for a verifier of {name} {has}, verifier.path has {needs}: set the head's verifier"
            )
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
        rope_parameters=_rope_parameters(folder, layer),
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),  # engines read the file as a LlamaConfig: its default
        num_layers=layer.get("num_hidden_layers", 1),
        fc_norm=bool(values.get("fc_norm", False)),
        norm_output=bool(values.get("norm_output", False)),
        norm_before_residual=bool(values.get("norm_before_residual", speculators)),
    )


def _rope_parameters(folder: Path, layer: dict[str, Any]) -> dict[str, Any]:
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


def _assemble(folder: Path, config: DraftHeadConfig, tensors: dict[str, Tensor]) -> ForeignHead:
    """Check every tensor and put the head together."""
    renamed = [re.sub(r"^midlayer\.", "layers.0.", name) for name in tensors]
    weights = dict(zip(renamed, tensors.values(), strict=True))
    d2t, t2d = weights.pop("d2t", None), weights.pop("t2d", None)
    embedding = weights.pop(EMBEDDING, None)
    with torch.device("meta"):
        problems = tensor_problems(_empty_head(config), weights)
    problems += [f"{name} stands twice, as midlayer.* too" for name in {n for n in renamed if renamed.count(n) > 1}]
    problems += [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}, float32, bfloat16 or float16 is required"
        for name, tensor in weights.items()
        if tensor.dtype not in _DTYPES
    ]
    problems += _map_problems(config, d2t, t2d)
    if embedding is not None and list(embedding.shape) != (needed := [config.vocab_size, config.hidden_size]):
        problems.append(f"{EMBEDDING} has shape {list(embedding.shape)}, {needed} is required")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    head = _empty_head(config, None if d2t is None else _vocabulary(folder, config, d2t, t2d))
    head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))
    return ForeignHead(head, dtype, embedding)


def _empty_head(config: DraftHeadConfig, vocabulary: VocabularyMap | None = None) -> DraftHead:
    """Make a head of these shapes; without a map, one that stands for any."""
    if vocabulary is None:
        zeros = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        vocabulary = VocabularyMap(zeros, torch.ones(config.vocab_size, dtype=torch.bool))
    return DraftHead(config, vocabulary)


def _map_problems(config: DraftHeadConfig, d2t: Tensor | None, t2d: Tensor | None) -> list[str]:
    """Name what is missing or misshaped of the vocabulary map."""
    problems = []
    if d2t is None and (t2d is not None or config.draft_vocab_size != config.vocab_size):
        problems.append("d2t is missing, and the draft vocabulary is reduced")
    for name, tensor, size in (("d2t", d2t, config.draft_vocab_size), ("t2d", t2d, config.vocab_size)):
        if tensor is not None and list(tensor.shape) != [size]:
            problems.append(f"{name} has shape {list(tensor.shape)}, [{size}] is required")
        elif tensor is not None and tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, integers are required")
    return problems


def _vocabulary(folder: Path, config: DraftHeadConfig, d2t: Tensor, t2d: Tensor | None) -> VocabularyMap:
    """Check the map's values; a t2d that is not there is made of d2t."""
    d2t = d2t.to(torch.int64)
    ids = torch.arange(len(d2t)) + d2t
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ValueError(
            f"{folder}: d2t gives target ids from {int(ids.min())} to {int(ids.max())}, "
            f"0 to {config.vocab_size - 1} is required: it must hold offsets (target id = draft id + d2t[draft id])"
        )
    if bool((ids[1:] <= ids[:-1]).any()):
        raise ValueError(
            f"{folder}: the target ids of d2t do not increase: it must hold offsets (target id = draft id + "
            "d2t[draft id]), with draft ids in the order of their target ids"
        )
    inside = torch.zeros(config.vocab_size, dtype=torch.bool)
    inside[ids] = True
    if t2d is not None and not torch.equal(t2d.bool(), inside):
        raise ValueError(
            f"{folder}: t2d contradicts d2t, they hold {int(t2d.bool().sum())} and {len(ids)} tokens and not the same: "
            "remove t2d from the weights if d2t is right"
        )
    return VocabularyMap(d2t, inside)
