"""Heads as other projects publish them, read strictly: what fledge's head cannot represent is refused by name.

Read are the plain format (NVIDIA ModelOpt, SpecForge, AngelSlim, EAGLE: `midlayer.*` or `layers.0.*`) and the
Speculators format; weights from safetensors, in one file or several with an index, or from `pytorch_model.bin`.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...conf.schema import HeadImportConfig
from ..head.architectures import build_head
from ..head.config import DraftHeadConfig
from ..head.draft_head import DraftHead
from ..head.vocabulary import VocabularyMap
from ..verifier.weights import VerifierWeights
from .plain import CONFIG, EMBEDDING, LM_HEAD, WEIGHTS, tensor_problems
from .published_config import FLOATS, HeadFiles, head_config
from .serving_formats import SERVING_FORMATS

INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
KNOWN = re.compile(
    r"(fc|norm|lm_head|embed_tokens|fc_norm\.\d+)\.weight|d2t|t2d|(midlayer|layers\.\d+)\.((input_layernorm|hidden_norm"
    r"|post_attention_layernorm)|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)
_ROTATED = re.compile(r"layers\.\d+\.self_attn\.[qk]_proj\.weight")


@dataclass
class PublishedHead:
    """A head as read: float32 weights, and the dtype they were published in."""

    head: DraftHead
    dtype: torch.dtype


def read_published_head(
    folder: Path, verifier: Any, options: HeadImportConfig | None = None, weights: VerifierWeights | None = None
) -> PublishedHead:
    """Read a published head.

    Args:
        verifier: the verifier's language-model configuration, which the head must fit.
        options: what config.json leaves open.
        weights: the verifier's matrices, for what a head shares with it. An embedding equal to the verifier's is left
            out, and an lm_head that config.json declares shared (`draft_vocab_size` null) is the verifier's.

    Raises:
        ValueError: the head is damaged, does not fit the verifier, or holds what fledge's head cannot represent.
    """
    return assemble_head(HeadFiles(folder, *read_published(folder)), verifier, options, weights)


def assemble_head(
    files: HeadFiles, verifier: Any, options: HeadImportConfig | None = None, weights: VerifierWeights | None = None
) -> PublishedHead:
    """Return the head that files hold; further arguments and errors as in `read_published_head`."""
    options, folder, tensors = options or HeadImportConfig(), files.folder, files.tensors
    if files.prefix:
        raise ValueError(
            f"{folder}: the names of the tensors begin with {files.prefix!r}, of a model that held the head: rename "
            "them without it"
        )
    declared, held = files.layer_counts
    if declared != held:
        raise ValueError(
            f"{folder}: {CONFIG} says num_hidden_layers {declared}, and the weights hold {held}: write "
            f"num_hidden_layers: {held} if they are complete, else fetch the head again"
        )
    if weights is not None and files.shares_lm_head:
        tensors = {**tensors, LM_HEAD: weights.lm_head()}
    if LM_HEAD not in tensors:
        raise ValueError(
            f"{folder}: {LM_HEAD} is missing, and engines would silently use another: {files.lm_head_cure}"
        )
    own = tensors.get(EMBEDDING)
    if own is not None and own.dtype in FLOATS and weights and torch.equal(own, weights.embedding().to(own.dtype)):
        tensors = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    config = head_config(files, tensors[LM_HEAD].shape[0], verifier, options)
    published = _assemble(folder, replace(config, own_embedding=EMBEDDING in tensors), tensors)
    if options.interleaved_rotary:
        published.head.load_state_dict(halves_from_pairs(published.head.state_dict(), config.head_dim))
    return published


def halves_from_pairs(weights: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Reorder q and k of a head whose neighbouring dimensions are rotated as pairs, as in Llama 4 and GPT-J.

    Dimensions 2i and 2i+1 of each attention head become i and i + head_dim / 2, which fledge rotates together.
    """
    order = torch.arange(head_dim).unflatten(0, (-1, 2)).T.flatten()
    return {
        name: weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1) if _ROTATED.fullmatch(name) else weight
        for name, weight in weights.items()
    }


def _assemble(folder: Path, config: DraftHeadConfig, tensors: dict[str, Tensor]) -> PublishedHead:
    """Check every tensor and put the head together."""
    renamed = [re.sub(r"^midlayer\.", "layers.0.", name) for name in tensors]
    weights = dict(zip(renamed, tensors.values(), strict=True))
    problems = HeadFiles(folder, {}, weights).other_dtypes
    d2t, t2d = weights.pop("d2t", None), weights.pop("t2d", None)
    with torch.device("meta"):
        problems += tensor_problems(_empty_head(config), weights)
    problems += [f"{name} stands twice, as midlayer.* too" for name in {n for n in renamed if renamed.count(n) > 1}]
    problems += _map_problems(config, d2t, t2d)
    if not config.own_embedding and config.hidden_size != config.verifier_hidden_size:
        problems.append(f"{EMBEDDING} is missing, the verifier's has rows of {config.verifier_hidden_size}")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    head = _empty_head(config, None if d2t is None else _vocabulary(folder, config, d2t, t2d))
    head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))
    return PublishedHead(head, dtype)


def _empty_head(config: DraftHeadConfig, vocabulary: VocabularyMap | None = None) -> DraftHead:
    """Return a head of these shapes; without a map, with one that stands for any."""
    if vocabulary is None:
        zeros = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        vocabulary = VocabularyMap(zeros, torch.ones(config.vocab_size, dtype=torch.bool))
    return build_head(config, vocabulary)


def _map_problems(config: DraftHeadConfig, d2t: Tensor | None, t2d: Tensor | None) -> list[str]:
    """Return what is missing or misshaped of the vocabulary map."""
    problems = []
    if d2t is None and (t2d is not None or config.draft_vocab_size != config.vocab_size):
        problems.append("d2t is missing, and the draft vocabulary is reduced")
    for name, tensor, size in (("d2t", d2t, config.draft_vocab_size), ("t2d", t2d, config.vocab_size)):
        if tensor is not None and list(tensor.shape) != [size]:
            problems.append(f"{name} has shape {list(tensor.shape)}, [{size}] is required")
    return problems


def _vocabulary(folder: Path, config: DraftHeadConfig, d2t: Tensor, t2d: Tensor | None) -> VocabularyMap:
    """Check the map's values, and make t2d of d2t if it is absent."""
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


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights of a published head.

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


def read_published(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config.json and the tensors of a published head.

    Raises:
        ValueError: a file is missing or damaged.
    """
    files = weight_files(folder)
    values = _read_config(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_weights(file)
    translated = (form.read(values, tensors) for form in SERVING_FORMATS.values())
    return next((found for found in translated if found is not None), (values, tensors))


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
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path} holds something else than named tensors, it is not a head's state")
    return tensors
