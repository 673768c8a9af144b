"""The forms of checkpoint that serving engines load, an entry each (docs/internals/add_a_format.md)."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..head.draft_head import DraftHead
from .engine_forms import SGLANG, TENSORRT_LLM, VLLM, ServedHead, flags, obstacles
from .fields import EAGLE, TOP
from .plain import save_head
from .speculators import save_speculators


@dataclass(frozen=True, kw_only=True)
class ExportedHead(ServedHead):
    """A head and the verifier it serves with."""

    folder: str  # of the export, or its hub id, as the commands name it
    format: str
    dtype: str
    verifier: str  # folder or hub id
    revision: str | None
    num_draft_tokens: int
    imported_from: str | None = None  # the published head it was made of, None if fledge trained it
    started_from: str | None = None  # the head that its training began with, None if it began anew
    base_model: str | None = None  # the verifier's hub id, None if it has none
    on_hub: bool = False  # whether `folder` is a hub id
    longest_sample: int | None = None  # tokens of the longest text it was trained on, if that is known

    @property
    def at_revision(self) -> str:
        """Return what a text says behind the verifier's name."""
        return f" at revision `{self.revision}`" if self.revision else ""


@dataclass(frozen=True)
class Engine:
    """A serving engine, and what it makes of a head in one format."""

    name: str
    section: Callable[[ExportedHead], str]  # of SERVING.md: the command
    obstacles: Callable[[ServedHead], list[str]]  # why it cannot serve the head as it was trained
    ids_at: tuple[str, ...] = ()  # the places of config.json where it looks for aux layer ids, in this order
    first_id: int = 0  # what it calls the output of layer 0
    files: Callable[[ExportedHead], dict[str, str]] = lambda exported: {}  # further ones that it reads


@dataclass(frozen=True)
class ServingFormat:
    """A form of checkpoint."""

    write: Callable[[Path, DraftHead, dict[str, Any], ExportedHead], None]  # head and record, into a folder
    engines: tuple[Engine, ...]  # that read it
    first_ids: dict[str, int]  # by place of aux layer ids in config.json: what it calls the output of layer 0
    library: str = "fledge"  # of the model card
    # Return config.json and tensors as the plain format has them; None if the head is in another format.
    read: Callable[[dict[str, Any], dict[str, Tensor]], tuple[Any, Any] | None] = lambda values, tensors: None


def vllm_command(exported: ExportedHead) -> str:
    """Return the command that serves the verifier with the head in vLLM."""
    options = {"method": "eagle3", "model": exported.folder, "num_speculative_tokens": exported.num_draft_tokens}
    return vllm_serve(exported.verifier, exported.revision, options) + flags(VLLM, exported)


def vllm_serve(verifier: str, revision: str | None, speculative: dict[str, Any]) -> str:
    """Return the command that serves a verifier in vLLM with a speculative configuration."""
    return f"vllm serve {_verifier(verifier, revision)} --speculative-config {shlex.quote(json.dumps(speculative))}"


def _verifier(verifier: str, revision: str | None) -> str:
    return shlex.quote(verifier) + (f" --revision {shlex.quote(revision)}" if revision else "")


def _section(engine: str, command: str, note: str = "") -> str:
    return f"## {engine}\n\n```\n{command}\n```" + (f"\n\n{note}" if note else "")


def _vllm_by_itself(exported: ExportedHead) -> str:
    command = f"vllm serve {shlex.quote(exported.folder)}{flags(VLLM, exported)}"
    by_itself = f"or, as the checkpoint names its verifier:\n\n```\n{command}\n```"
    return _section(VLLM, vllm_command(exported), "" if exported.revision else by_itself)


def _sglang(exported: ExportedHead) -> str:
    command = (
        f"python -m sglang.launch_server --model-path {_verifier(exported.verifier, exported.revision)} "
        f"--speculative-algorithm EAGLE3 --speculative-draft-model-path {shlex.quote(exported.folder)} "
        f"--speculative-num-steps {exported.num_draft_tokens} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {exported.num_draft_tokens + 1}{flags(SGLANG, exported)}"
    )
    note = "Beside an explicit `--quantization`, add `--speculative-draft-model-quantization unquant`."
    return _section(SGLANG, command, note)


def _tensorrt_llm(exported: ExportedHead) -> str:
    options = "trtllm.yaml" if exported.on_hub else shlex.quote(f"{exported.folder}/trtllm.yaml")
    fetched = f"hf download {exported.folder} trtllm.yaml --local-dir .\n" if exported.on_hub else ""
    command = f"{fetched}trtllm-serve {shlex.quote(exported.verifier)} --extra_llm_api_options {options}"
    note = (
        "TensorRT-LLM does not read the aux layers of the checkpoint, they stand in `trtllm.yaml`. Older releases want "
        "`decoding_type: Eagle` and `pytorch_eagle_weights_path` in it for `Eagle3` and `speculative_model`."
    )
    return _section(TENSORRT_LLM, command, note)


def _trtllm_yaml(exported: ExportedHead) -> dict[str, str]:
    """Return the options' file; TensorRT-LLM numbers layers as fledge does, 0-based, their outputs taken."""
    options = {
        "decoding_type": "Eagle3",
        "max_draft_len": exported.num_draft_tokens,
        "speculative_model": json.dumps(exported.folder),
        "eagle3_layers_to_capture": list(exported.head.aux_layers),
    }
    return {"trtllm.yaml": "speculative_config:\n" + "".join(f"  {name}: {value}\n" for name, value in options.items())}


def _write_speculators(folder: Path, head: DraftHead, record: dict[str, Any], exported: ExportedHead) -> None:
    verifier = {"name_or_path": exported.verifier, "architectures": exported.architectures}
    dtype = getattr(torch, exported.dtype)
    save_speculators(folder, head, record, dtype, verifier, exported.num_draft_tokens, exported.lm_head)


def _write_plain(folder: Path, head: DraftHead, record: dict[str, Any], exported: ExportedHead) -> None:
    save_head(folder, head, record, getattr(torch, exported.dtype), lm_head=exported.lm_head)


_VLLM = Engine(
    VLLM, lambda e: _section(VLLM, vllm_command(e)), partial(obstacles, VLLM), ids_at=(TOP, EAGLE), first_id=1
)
# By the value of export.format.
SERVING_FORMATS = {
    "plain": ServingFormat(
        _write_plain,
        engines=(
            _VLLM,
            Engine(SGLANG, _sglang, partial(obstacles, SGLANG), ids_at=(EAGLE,)),
            Engine(TENSORRT_LLM, _tensorrt_llm, partial(obstacles, TENSORRT_LLM), files=_trtllm_yaml),
        ),
        first_ids={EAGLE: 0, TOP: 1},
    ),
    "speculators": ServingFormat(
        _write_speculators,
        engines=(replace(_VLLM, section=_vllm_by_itself),),
        first_ids={TOP: 1},
        library="speculators",
    ),
}
