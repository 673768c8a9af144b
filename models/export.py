"""The export stage: checkpoints that serving engines load as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..conf.runtime.artifact import MANIFEST, commit, digest, file_digest, held, write_atomic, write_json
from ..conf.schema import Config, ExportFormat
from .formats.plain import WEIGHTS, head_folder, load_head, save_head
from .formats.serving_notes import Served, model_card, serving_notes, trtllm_options, unserved, vllm_command
from .formats.speculators import save_speculators
from .head.draft_head import DraftHead
from .verifier.model import check_identity, verifier_architectures, verifier_location


def export(config: Config) -> None:
    """Write runs/<name>/exports/<format>/ from a head, in one format or all; a half-written export is never seen."""
    source = head_folder(config.export.checkpoint, config.training_folder)
    head, record = load_head(source)
    check_identity(record["verifier"], config.verifier, str(source), "set the verifier it was trained for")
    if head.config.num_layers > 1:
        raise ValueError(
            f"{source} has {head.config.num_layers} layers: engines disagree on how they norm the second, "
            "only heads of one layer (draft.num_layers=1) can be served"
        )
    formats = [ExportFormat.plain, ExportFormat.speculators]
    for format_ in formats if config.export.format is ExportFormat.all else [config.export.format]:
        _export_one(config, format_, source, head, record)


def _export_one(config: Config, format_: ExportFormat, source: Path, head: DraftHead, record: dict[str, Any]) -> None:
    folder = config.run_folder / "exports" / format_.value
    served = Served(
        head=head.config,
        folder=str(folder),
        format=format_.value,
        dtype=config.export.dtype.value,
        verifier=verifier_location(config.verifier),
        verifier_layers=record["verifier"]["num_layers"],
        revision=config.verifier.revision,
        num_draft_tokens=config.evaluate.draft_depth,  # a chain as deep as the tree that was evaluated
        imported_from=record.get("imported_from"),
    )
    texts = _texts(config, served, source)
    settings = {
        "head": file_digest(source / WEIGHTS),
        "dtype": served.dtype,
        "format": served.format,
        "num_draft_tokens": served.num_draft_tokens,
        "texts": digest(texts),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.with_name(f".{folder.name}.lock"), f"{folder} is being written by"):
        if _current_settings(folder) == settings and all((folder / name).is_file() for name in (WEIGHTS, *texts)):
            print(f"export: {folder} is complete")
            return
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _save(config, temporary, served, head, record)
        for name, text in texts.items():
            write_atomic(temporary / name, text)
        write_json(temporary / MANIFEST, {"kind": "export", "settings": settings, "complete": True})
        shutil.rmtree(folder, ignore_errors=True)
        commit(temporary, folder)
    refused = unserved(served)
    for engine, reason in refused.items():
        print(f"export: {engine} cannot serve this head: {reason}")
    command = "" if "vLLM" in refused else f", served by `{vllm_command(served)}`"
    print(f"export: {folder}{command}; more in {folder / 'SERVING.md'}")


def _save(config: Config, folder: Path, served: Served, head: DraftHead, record: dict[str, Any]) -> None:
    dtype = getattr(torch, served.dtype)
    if served.format == ExportFormat.plain.value:
        save_head(folder, head, record, dtype)
        return
    verifier = {"name_or_path": served.verifier, "architectures": verifier_architectures(config.verifier)}
    save_speculators(folder, head, record, dtype, verifier, served.num_draft_tokens)


def _texts(config: Config, served: Served, source: Path) -> dict[str, str]:
    """Give the files beside the weights, by name."""
    card = model_card(served, _acceptance(config, source), _conversations(config, source))
    texts = {"SERVING.md": serving_notes(served), "README.md": card}
    if served.format == ExportFormat.plain.value and "TensorRT-LLM" not in unserved(served):
        texts["trtllm.yaml"] = trtllm_options(served)
    return texts


def _acceptance(config: Config, source: Path) -> dict[str, Any] | None:
    """Give acceptance.json of the run if it was measured with this very head, by the weights' checksum."""
    folder = config.run_folder / "evaluation"
    if not (folder / "acceptance.json").is_file() or not (folder / MANIFEST).is_file():
        return None
    manifest = json.loads((folder / MANIFEST).read_text())
    measured = (manifest.get("settings") or {}).get("head")
    if not manifest.get("complete") or measured != file_digest(source / WEIGHTS):
        return None
    return json.loads((folder / "acceptance.json").read_text())


def _conversations(config: Config, source: Path) -> dict[str, Any] | None:
    """Give the manifest of the run's conversations if the head is a checkpoint of the run's own training."""
    manifest = config.conversations_folder / MANIFEST
    own = (config.training_folder / "checkpoints").resolve() in source.resolve().parents
    if not own or not manifest.is_file():
        return None
    content = json.loads(manifest.read_text())
    return content if content.get("complete") else None


def _current_settings(folder: Path) -> dict[str, Any] | None:
    """Give the settings of the export that is there; refuse a folder that is not one."""
    if not folder.exists():
        return None
    manifest = folder / MANIFEST
    content = json.loads(manifest.read_text()) if manifest.is_file() else {}
    if content.get("kind") != "export":
        raise ValueError(f"{folder} is not an export of fledge's: move it away")
    return content["settings"]
