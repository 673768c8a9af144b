"""Training checkpoints and exports of heads, in the plain format that SGLang, TensorRT-LLM and vLLM read.

Next to `config.json` and `model.safetensors` stands `fledge.json`, which names the head's verifier.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...conf.runtime.artifact import digest, file_digest, sync, write_json
from ..head.architectures import architecture_of, build_head, named_architecture
from ..head.config import DraftHeadConfig
from ..head.draft_head import DraftHead
from ..head.vocabulary import VocabularyMap
from .fields import AUX_IDS, EAGLE, FIELDS, LAYER, TOP, vllm_layer_ids, window_of, written_fields

LM_HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
INPUT_NORM, HIDDEN_NORM = "input_layernorm.weight", "hidden_norm.weight"  # of a layer
CONFIG, WEIGHTS, RECORD = "config.json", "model.safetensors", "fledge.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_CURE = "`fledge import` reads the heads of other projects and formats"


def plain_config(config: DraftHeadConfig, dtype: torch.dtype, lm_head: bool = True) -> dict[str, Any]:
    """Return the `config.json` in plain format: aux layers 0-based in `eagle_config`, one higher at the top level.

    Without an `lm_head` of its own the head declares the verifier's by `draft_vocab_size: null`.
    """
    architecture = architecture_of(config)
    values: dict[str, Any] = {
        "architectures": [architecture.names["qwen3" if config.qk_norm else "plain"]],
        **written_fields(config, LAYER, architecture.fields),
        "draft_vocab_size": config.draft_vocab_size,
        "torch_dtype": dtype_name(dtype),
        EAGLE: {
            AUX_IDS: list(config.aux_layers),
            "use_aux_hidden_state": True,
            "norm_before_fc": config.norm_before_fc,
        },
        AUX_IDS: vllm_layer_ids(config.aux_layers),
        **written_fields(config, TOP, architecture.fields),
    }
    if not lm_head:
        values["draft_vocab_size"] = None
    if config.verifier_hidden_size != config.hidden_size:
        values["target_hidden_size"] = config.verifier_hidden_size
    return values


def head_digest(folder: Path) -> str:
    """Return the digest of a head: of its weights, and of how its config.json says they are computed with."""
    return digest([file_digest(folder / name) for name in (CONFIG, WEIGHTS)])


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as it stands in a config.json."""
    return str(dtype).removeprefix("torch.")


def config_from_plain(values: dict[str, Any], tensors: Iterable[str]) -> DraftHeadConfig:
    """Read a `config.json` that `plain_config` wrote; the names of the tensors tell what it does not."""
    architecture = named_architecture(values)
    return architecture.config(
        **{field.ours: values[field.name] for field in (*FIELDS, *architecture.fields) if field.ours},
        verifier_hidden_size=values.get("target_hidden_size", values["hidden_size"]),
        aux_layers=tuple(values[EAGLE][AUX_IDS]),
        **window_of(values),
        own_embedding=EMBEDDING in tensors,
        qk_norm=has_qk_norm(tensors),
    )


def has_qk_norm(tensors: Iterable[str]) -> bool:
    """Return whether queries and keys are normed, by the names of the tensors."""
    return any(name.endswith((".q_norm.weight", ".k_norm.weight")) for name in tensors)


def head_tensors(
    head: DraftHead, weights: dict[str, Tensor], dtype: torch.dtype, lm_head: bool = True
) -> dict[str, Tensor]:
    """Return a head's full state dict cast for a file, and its vocabulary map if the vocabulary is reduced."""
    tensors = {
        name: weight.detach().to("cpu", dtype).contiguous()
        for name, weight in weights.items()
        if lm_head or name != LM_HEAD
    }
    if head.config.draft_vocab_size < head.config.vocab_size:
        tensors |= {"d2t": head.d2t.cpu(), "t2d": head.t2d.cpu()}
    return tensors


def save_head(
    folder: Path,
    head: DraftHead,
    record: dict[str, Any],
    dtype: torch.dtype,
    weights: dict[str, Tensor] | None = None,
    lm_head: bool = True,
) -> None:
    """Write a head in plain format into an existing folder.

    The one layer is called midlayer.*, several layers.i.*, each of them as every engine knows it.

    Args:
        record: what `fledge.json` keeps; `verifier` (its identity) among it.
        weights: the head's full state dict, if it is not the module's own.
        lm_head: whether to write it; if not, the verifier's must be the same.
    """
    tensors = head_tensors(head, head.state_dict() if weights is None else weights, dtype, lm_head)
    if head.config.num_layers == 1:
        tensors = {re.sub(r"^layers\.0\.", "midlayer.", name): tensor for name, tensor in tensors.items()}
    for layer in range(1, head.config.num_layers):  # vLLM norms with the one, SGLang and TensorRT-LLM with the other
        tensors[f"layers.{layer}.{HIDDEN_NORM}"] = tensors[f"layers.{layer}.{INPUT_NORM}"].clone()
    write_head_files(folder, tensors, plain_config(head.config, dtype, lm_head), record)


def write_head_files(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], record: dict[str, Any]) -> None:
    """Write weights, config.json and fledge.json; the record comes last, without it the folder is no head."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    sync(folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    write_json(folder / RECORD, record)


def longest_sample(folder: Path) -> int:
    """Return the tokens of the longest text that fledge trained a head on; 0 if that is not known."""
    with suppress(OSError, ValueError):
        return int(json.loads((folder / RECORD).read_text()).get("longest_sample") or 0)
    return 0


def load_head(folder: str | Path) -> tuple[DraftHead, dict[str, Any]]:
    """Read a head that `save_head` wrote, in float32, and its record; ValueError: what is missing or damaged."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, RECORD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a fledge head: {name} is missing; {_CURE}")
    try:
        values = json.loads((folder / CONFIG).read_text())
        if "speculators_model_type" in values:
            raise ValueError(f"{folder} holds a head in Speculators format, plain format is required; {_CURE}")
        record = json.loads((folder / RECORD).read_text())
        tensors = load_file(folder / WEIGHTS)
        if LM_HEAD not in tensors:
            raise ValueError(f"{folder} holds a head without {LM_HEAD}, made for its verifier's; {_CURE}")
        config = config_from_plain(values, tensors)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds a damaged head ({type(error).__name__}: {error})") from None
    if config.draft_vocab_size != config.vocab_size and not {"d2t", "t2d"} <= tensors.keys():
        raise ValueError(f"{folder}: d2t and t2d are missing, and the draft vocabulary is reduced")
    return assemble(folder / WEIGHTS, config, tensors), record


def assemble(place: Path, config: DraftHeadConfig, tensors: dict[str, Tensor]) -> DraftHead:
    """Return the head that tensors make, in float32; `place` is named in errors.

    ValueError: all tensors that are missing, unknown, or of another shape or dtype, or a map that is wrong.
    """
    renamed = [re.sub(r"^midlayer\.", "layers.0.", name) for name in tensors]
    weights = dict(zip(renamed, tensors.values(), strict=True))
    problems = _join_norms(weights)
    maps = {"d2t": [config.draft_vocab_size], "t2d": [config.vocab_size]}
    with torch.device("meta"):
        head = build_head(config, VocabularyMap(*map(torch.empty, maps.values())))
    shapes = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    differing = [
        *(f"{name} is missing" for name in shapes.keys() - weights.keys()),
        *(f"{name} is unknown" for name in weights.keys() - shapes.keys() - maps.keys()),
        *(
            f"{name} has shape {list(weights[name].shape)}, {shape} is required"
            for name, shape in (shapes | maps).items()
            if name in weights and list(weights[name].shape) != shape
        ),
    ]
    twice = {name for name in renamed if renamed.count(name) > 1}
    problems += (
        other_dtypes(weights) + sorted(differing) + [f"{name} stands twice, as midlayer.* too" for name in twice]
    )
    if "d2t" not in weights and ("t2d" in weights or config.draft_vocab_size != config.vocab_size):
        problems.append("d2t is missing, and the draft vocabulary is reduced")
    if not config.own_embedding and config.hidden_size != config.verifier_hidden_size:
        problems.append(f"{EMBEDDING} is missing, the verifier's has rows of {config.verifier_hidden_size}")
    if problems:
        raise ValueError(f"{place}: {'; '.join(problems)}")
    d2t, t2d = weights.pop("d2t", None), weights.pop("t2d", None)
    head = build_head(config, None if d2t is None else _vocabulary(place, config.vocab_size, d2t, t2d))
    head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return head


def _join_norms(weights: dict[str, Tensor]) -> list[str]:
    """Leave the norm of a later layer under one of its two names; return what is wrong if they differ."""
    problems = []
    for name in [name for name in weights if re.fullmatch(rf"layers\.[1-9]\d*\.{re.escape(HIDDEN_NORM)}", name)]:
        norm, twin = weights.pop(name), name.replace(HIDDEN_NORM, INPUT_NORM)
        if not torch.equal(weights.setdefault(twin, norm).float(), norm.float()):
            problems.append(
                f"{name} and {twin} differ, of which vLLM applies the second, SGLang and TensorRT-LLM the first: "
                "remove the one that the head was trained without"
            )
    return problems


def other_dtypes(tensors: dict[str, Tensor]) -> list[str]:
    """Return the tensors of a dtype in which no head is trained: quantised ones, and maps that are not integers."""
    maps = {name for name in tensors if name.endswith(("d2t", "t2d"))}
    return [
        f"{name} is {dtype_name(tensor.dtype)}, "
        f"{'integers are' if name in maps else 'float32, bfloat16 or float16 is'} required"
        for name, tensor in tensors.items()
        if tensor.dtype not in (_INTEGERS if name in maps else FLOATS)
    ]


def _vocabulary(place: Path, vocab_size: int, d2t: Tensor, t2d: Tensor | None) -> VocabularyMap:
    """Check the map's values, and make t2d of d2t if it is absent."""
    d2t = d2t.to(torch.int64)
    ids = torch.arange(len(d2t)) + d2t
    low, high, offsets = int(ids.min()), int(ids.max()), "it must hold offsets (target id = draft id + d2t[draft id])"
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{place}: d2t gives target ids from {low} to {high}, 0 to {vocab_size - 1} is required: {offsets}"
        )
    if bool((ids[1:] <= ids[:-1]).any()):
        order = "with draft ids in the order of their target ids"
        raise ValueError(f"{place}: the target ids of d2t do not increase: {offsets}, {order}")
    inside = torch.zeros(vocab_size, dtype=torch.bool)
    inside[ids] = True
    if t2d is not None and not torch.equal(t2d.bool(), inside):
        raise ValueError(
            f"{place}: t2d contradicts d2t, they hold {int(t2d.bool().sum())} and {len(ids)} tokens and not the same: "
            "remove t2d from the weights if d2t is right"
        )
    return VocabularyMap(d2t, inside)
