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

from ..conf.schema import AuxNumbering
from .draft_head import DraftHead, DraftHeadConfig
from .foreign_config import head_config
from .formats import CONFIG, EMBEDDING, LM_HEAD, WEIGHTS, tensor_problems
from .verifier import VerifierWeights
from .vocabulary import VocabularyMap

INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ForeignHead:
    """A head as read: float32 weights, and the dtype they were published in."""

    head: DraftHead
    dtype: torch.dtype


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


def read_foreign_head(
    folder: Path, verifier: Any, numbering: AuxNumbering | None = None, weights: VerifierWeights | None = None
) -> ForeignHead:
    """Read a published head.

    Args:
        verifier: the verifier's language-model configuration, which the head must fit.
        numbering: what the aux layer ids mean, where config.json leaves it open.
        weights: the verifier's matrices, for what a head shares with it: an embedding equal to the verifier's is not
            kept, and an lm_head that config.json declares shared (`draft_vocab_size` null) is the verifier's.

    Raises:
        ValueError: the head is damaged, does not fit the verifier, or holds what fledge's head cannot represent.
    """
    values, tensors = read_published(folder)
    return assemble_head(folder, values, tensors, verifier, numbering, weights)


def assemble_head(
    folder: Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    verifier: Any,
    numbering: AuxNumbering | None = None,
    weights: VerifierWeights | None = None,
) -> ForeignHead:
    """Make a head of what `read_published` gave; further arguments and errors as in `read_foreign_head`."""
    if weights is not None and shares_lm_head(values, tensors):
        tensors = {**tensors, LM_HEAD: weights.lm_head()}
    if LM_HEAD not in tensors:
        raise ValueError(
            f"{folder}: {LM_HEAD} is missing, and engines would silently use another in its place: fetch the head's "
            "complete checkpoint, or, if it was trained on the verifier's own, say so by draft_vocab_size: null in "
            "config.json"
        )
    own = tensors.get(EMBEDDING)
    if own is not None and weights is not None and torch.equal(own, weights.embedding().to(own.dtype)):
        tensors = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    config = head_config(folder, values, tensors[LM_HEAD].shape[0], verifier, numbering)
    return _assemble(folder, replace(config, own_embedding=EMBEDDING in tensors), tensors)


def shares_lm_head(values: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Tell whether a head declares the verifier's lm_head as its own, which every engine then takes."""
    return LM_HEAD not in tensors and "draft_vocab_size" in values and values["draft_vocab_size"] is None


def read_published(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give config.json and the tensors of a published head as they stand.

    Raises:
        ValueError: a file is missing or damaged.
    """
    files = weight_files(folder)
    values = _read_config(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read_weights(file)
    return values, tensors


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


def _assemble(folder: Path, config: DraftHeadConfig, tensors: dict[str, Tensor]) -> ForeignHead:
    """Check every tensor and put the head together."""
    renamed = [re.sub(r"^midlayer\.", "layers.0.", name) for name in tensors]
    weights = dict(zip(renamed, tensors.values(), strict=True))
    d2t, t2d = weights.pop("d2t", None), weights.pop("t2d", None)
    with torch.device("meta"):
        problems = tensor_problems(_empty_head(config), weights)
    problems += [f"{name} stands twice, as midlayer.* too" for name in {n for n in renamed if renamed.count(n) > 1}]
    problems += [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}, float32, bfloat16 or float16 is required"
        for name, tensor in weights.items()
        if tensor.dtype not in _DTYPES
    ]
    problems += _map_problems(config, d2t, t2d)
    if not config.own_embedding and config.hidden_size != config.verifier_hidden_size:
        problems.append(f"{EMBEDDING} is missing, the verifier's has rows of {config.verifier_hidden_size}")
    if problems:
        raise ValueError(f"{folder}: {'; '.join(problems)}")
    head = _empty_head(config, None if d2t is None else _vocabulary(folder, config, d2t, t2d))
    head.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))
    return ForeignHead(head, dtype)


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
