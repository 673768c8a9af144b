"""Head checkpoints on disk, in the plain format that SGLang, TensorRT-LLM and vLLM read.

Training checkpoints and exports are both of this form: `config.json` and `model.safetensors`, and beside them
`fledge.json`, which says for which verifier the head was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...conf.runtime.artifact import sync, write_json
from ..head.draft_head import DraftHead, DraftHeadConfig
from ..head.vocabulary import VocabularyMap

LM_HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
CONFIG, WEIGHTS, RECORD = "config.json", "model.safetensors", "fledge.json"
_CURE = "`fledge import` reads the heads of other projects and formats"
LATEST, BEST = "latest", "best"  # names of training checkpoints
HELDOUT_WALKS = "heldout_walks.json"  # in training checkpoints: a `HeldoutCounts` by draft tokens and conversation


def layer_fields(config: DraftHeadConfig) -> dict[str, Any]:
    """Give the Llama fields of a head's layers, as both formats write them.

    The rotary base stands in it twice: releases of transformers before 5 read `rope_theta` and `rope_scaling`.
    """
    rope = dict(config.rope_parameters)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": rope.get("rope_theta"),
        "rope_parameters": rope,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }


def plain_config(config: DraftHeadConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Give the `config.json` of a head in plain format.

    Aux layers stand in it twice: 0-based in `eagle_config` (SGLang, ModelOpt) and one higher at the top level (vLLM,
    whose id k is the input of layer k).
    """
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_fields(config),
        "draft_vocab_size": config.draft_vocab_size,
        "torch_dtype": dtype_name(dtype),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
            "use_aux_hidden_state": True,
            "norm_before_fc": False,
        },
        "eagle_aux_hidden_state_layer_ids": vllm_layer_ids(config.aux_layers),
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }
    if len(config.aux_layers) != 3:
        values["num_aux_hidden_states"] = len(config.aux_layers)
    if config.verifier_hidden_size != config.hidden_size:
        values["target_hidden_size"] = config.verifier_hidden_size
    return values


def vllm_layer_ids(aux_layers: Iterable[int]) -> list[int]:
    """Number aux layers as vLLM and Speculators do: id k is the output of layer k-1."""
    return [layer + 1 for layer in aux_layers]


def dtype_name(dtype: torch.dtype) -> str:
    """Give the name of a dtype as it stands in a config.json."""
    return str(dtype).removeprefix("torch.")


def config_from_plain(values: dict[str, Any], own_embedding: bool) -> DraftHeadConfig:
    """Read a `config.json` that `plain_config` wrote; whether the head has an embedding is told by its tensors."""
    return DraftHeadConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        vocab_size=values["vocab_size"],
        draft_vocab_size=values["draft_vocab_size"],
        verifier_hidden_size=values.get("target_hidden_size", values["hidden_size"]),
        aux_layers=tuple(values["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
        max_position_embeddings=values["max_position_embeddings"],
        rope_parameters=values["rope_parameters"],
        rms_norm_eps=values["rms_norm_eps"],
        num_layers=values["num_hidden_layers"],
        fc_norm=values["fc_norm"],
        norm_output=values["norm_output"],
        norm_before_residual=values["norm_before_residual"],
        own_embedding=own_embedding,
    )


def head_tensors(head: DraftHead, weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast a head's weights for a file; the vocabulary map is among them only where the vocabulary is reduced.

    Args:
        weights: the head's state dict (gathered, if ZeRO has partitioned the module's own).
    """
    tensors = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    if head.config.draft_vocab_size < head.config.vocab_size:
        tensors["d2t"] = head.d2t.cpu()
        tensors["t2d"] = head.t2d.cpu()
    return tensors


def save_head(
    folder: Path, head: DraftHead, record: dict[str, Any], dtype: torch.dtype, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a head in plain format into an existing folder.

    Args:
        record: what `fledge.json` keeps; `verifier` (its identity) among it.
        weights: the head's full state dict where the module's own is partitioned.
    """
    tensors = head_tensors(head, head.state_dict() if weights is None else weights, dtype)
    named = {re.sub(r"^layers\.0\.", "midlayer.", name): tensor for name, tensor in tensors.items()}
    write_head_files(folder, named, plain_config(head.config, dtype), record)


def write_head_files(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], record: dict[str, Any]) -> None:
    """Write weights, config.json and fledge.json; the record comes last, without it the folder is no head."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    sync(folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    write_json(folder / RECORD, record)


def load_head(folder: Path) -> tuple[DraftHead, dict[str, Any]]:
    """Read a head that `save_head` wrote, float32, with its record.

    Raises:
        ValueError: a file is missing or damaged, or a tensor is missing, unknown or of another shape (all named).
    """
    for name in (CONFIG, WEIGHTS, RECORD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a fledge head: {name} is missing; {_CURE}")
    try:
        values = json.loads((folder / CONFIG).read_text())
        if "speculators_model_type" in values:
            raise ValueError(f"{folder} holds a head in Speculators format, plain format is required; {_CURE}")
        record = json.loads((folder / RECORD).read_text())
        tensors = load_file(folder / WEIGHTS)
        config = config_from_plain(values, own_embedding=EMBEDDING in tensors)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds a damaged head ({type(error).__name__}: {error})") from None
    vocabulary = (
        VocabularyMap(tensors.pop("d2t"), tensors.pop("t2d")) if "d2t" in tensors and "t2d" in tensors else None
    )
    weights = {re.sub(r"^midlayer\.", "layers.0.", name): tensor.float() for name, tensor in tensors.items()}
    if vocabulary is None and config.draft_vocab_size != config.vocab_size:
        raise ValueError(f"{folder}: d2t and t2d are missing, and the draft vocabulary is reduced")
    head = DraftHead(config, vocabulary)
    problems = tensor_problems(head, weights)
    if problems:
        raise ValueError(f"{folder / WEIGHTS}: {'; '.join(problems)}")
    head.load_state_dict(weights)
    return head, record


def tensor_problems(head: DraftHead, weights: dict[str, Tensor]) -> list[str]:
    """Name every tensor that is missing, unknown, or of another shape than the head's."""
    required = head.state_dict()
    return sorted(
        [
            *(f"{name} is missing" for name in required.keys() - weights.keys()),
            *(f"{name} is unknown" for name in weights.keys() - required.keys()),
            *(
                f"{name} has shape {list(weights[name].shape)}, {list(tensor.shape)} is required"
                for name, tensor in required.items()
                if name in weights and weights[name].shape != tensor.shape
            ),
        ]
    )


def checkpoint_steps(folder: Path) -> list[int]:
    """Give the steps of the finished checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def head_folder(checkpoint: str | None, training_folder: Path) -> Path:
    """Give the folder of the head to use.

    Args:
        checkpoint: a folder, or the `best` or `latest` checkpoint of a training run; None is the best, or the newest
            where none was measured.
    """
    if checkpoint is not None and checkpoint not in (BEST, LATEST):
        return Path(checkpoint)
    folder = training_folder / "checkpoints"
    steps = checkpoint_steps(folder)
    if not steps:
        raise ValueError(f"{training_folder} holds no checkpoint: run `fledge train` first")
    if checkpoint != LATEST and (folder / BEST).exists():
        return folder / (folder / BEST).read_text().strip()
    if checkpoint == BEST:
        raise ValueError(f"{folder} has no best checkpoint, as nothing was held out: use latest")
    return folder / f"step-{steps[-1]}"
