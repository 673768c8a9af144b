"""Heads as other projects publish them, read strictly: what fledge's head cannot represent is refused by name.

Read are the plain format (NVIDIA ModelOpt, SpecForge, AngelSlim, EAGLE: `midlayer.*` or `layers.0.*`) and the
Speculators format; weights from safetensors, in one file or several with an index, or from `pytorch_model.bin`.
"""

import json
import pickle
import re
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...conf.schema import HeadImportConfig
from ..head.config import DraftHeadConfig
from ..head.draft_head import DraftHead
from ..verifier.weights import VerifierWeights
from .fields import PARTIAL
from .plain import CONFIG, EMBEDDING, FLOATS, LM_HEAD, WEIGHTS, assemble
from .published_config import HeadFiles, head_config
from .serving_formats import SERVING_FORMATS

INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"
_ROTATED = re.compile(r"layers\.\d+\.self_attn\.[qk]_(proj|norm)\.(weight|bias)")


class PublishedHead(NamedTuple):
    """A head as read: float32 weights, and the dtype they were published in."""

    head: DraftHead
    dtype: torch.dtype


def read_published_head(
    folder: Path, verifier: Any, options: HeadImportConfig | None = None, weights: VerifierWeights | None = None
) -> PublishedHead:
    """Read a published head; arguments and errors as of `read_files` and `assemble_head`."""
    return assemble_head(read_files(folder, verifier, options, weights))


def assemble_head(files: HeadFiles) -> PublishedHead:
    """Return the head that files hold.

    An embedding equal to the verifier's is left out; an lm_head that config.json declares shared is the verifier's.
    ValueError: the head is damaged, does not fit the verifier, or holds what fledge's head cannot represent.
    """
    folder, tensors, weights = files.folder, files.tensors, files.weights
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
        use = "engines would silently use another"
        raise ValueError(f"{folder}: {LM_HEAD} is missing, and {use}: {files.lm_head_cure}")
    own = tensors.get(EMBEDDING)
    if own is not None and own.dtype in FLOATS and weights and torch.equal(own, weights.embedding().to(own.dtype)):
        tensors = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    config = replace(head_config(files, tensors[LM_HEAD].shape[0]), own_embedding=EMBEDDING in tensors)
    head = assemble(folder, config, tensors)
    if files.options.interleaved_rotary:
        head.load_state_dict(halves_from_pairs(head.state_dict(), config))
    dtypes = (tensor.dtype for name, tensor in tensors.items() if name not in ("d2t", "t2d"))
    return PublishedHead(head, reduce(torch.promote_types, dtypes))


def halves_from_pairs(weights: dict[str, Tensor], config: DraftHeadConfig) -> dict[str, Tensor]:
    """Reorder q and k of a head that rotates neighbouring dimensions as pairs, as Llama 4 and GPT-J do.

    Of each attention head's R rotated dimensions 2i and 2i+1 become i and i + R / 2, which fledge rotates together.
    """
    order = torch.arange(config.head_dim)
    rotated = int(config.head_dim * config.rope_parameters.get(PARTIAL, 1))
    order[:rotated] = order[:rotated].unflatten(0, (-1, 2)).T.flatten()
    return {
        name: weight.unflatten(0, (-1, config.head_dim))[:, order].flatten(0, 1) if _ROTATED.fullmatch(name) else weight
        for name, weight in weights.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a head's weights; ValueError: it is no head, or a file of the index is missing."""
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


def read_files(
    folder: Path, verifier: Any, options: HeadImportConfig | None = None, weights: VerifierWeights | None = None
) -> HeadFiles:
    """Read the files of a published head, arguments as in `HeadFiles`; ValueError: one is missing or damaged."""
    files, path = weight_files(folder), folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the head again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a configuration: fetch the head again")
    tensors = {name: tensor for file in files for name, tensor in _read_weights(file).items()}
    translated = (form.read(values, tensors) for form in SERVING_FORMATS.values())
    values, tensors = next((found for found in translated if found is not None), (values, tensors))
    return HeadFiles(folder, values, tensors, verifier, options or HeadImportConfig(), weights)


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
