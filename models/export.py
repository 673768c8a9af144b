"""The export stage: checkpoints that serving engines load as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import MANIFEST, commit, digest, file_digest, held, write_atomic, write_json
from ..conf.schema import Config, ExportFormat
from .formats.plain import WEIGHTS, head_folder, load_head
from .formats.serving_formats import SERVING_FORMATS, ExportedHead, vllm_command
from .formats.serving_notes import model_card, serving_files, unserved
from .head.draft_head import DraftHead
from .verifier.config import load_whole_config, verifier_location
from .verifier.weights import check_identity


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
    choice = config.export.format
    for format_ in SERVING_FORMATS if choice is ExportFormat.all else [choice.value]:
        _export_one(config, format_, source, head, record)


def _export_one(config: Config, format_: str, source: Path, head: DraftHead, record: dict[str, Any]) -> None:
    folder = config.run_folder / "exports" / format_
    exported = ExportedHead(
        head=head.config,
        folder=str(folder),
        format=format_,
        dtype=config.export.dtype.value,
        verifier=verifier_location(config.verifier),
        architectures=list(load_whole_config(config.verifier).architectures or []),
        verifier_layers=record["verifier"]["num_layers"],
        revision=config.verifier.revision,
        num_draft_tokens=config.evaluate.draft_depth,  # a chain as deep as the tree that was evaluated
        imported_from=record.get("imported_from"),
    )
    card = model_card(exported, _acceptance(config, source), _conversations(config, source))
    texts = {**serving_files(exported), "README.md": card}
    settings: dict[str, Any] = {"head": file_digest(source / WEIGHTS), "dtype": exported.dtype}
    settings |= {"format": format_, "num_draft_tokens": exported.num_draft_tokens, "texts": digest(texts)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder.with_name(f".{folder.name}.lock"), f"{folder} is being written by"):
        manifest = _manifest(folder)
        if folder.exists() and manifest.get("kind") != "export":
            raise ValueError(f"{folder} is not an export of fledge's: move it away")
        if manifest.get("settings") == settings and all((folder / name).is_file() for name in (WEIGHTS, *texts)):
            print(f"export: {folder} is complete")
            return
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        SERVING_FORMATS[format_].write(temporary, head, record, exported)
        for name, text in texts.items():
            write_atomic(temporary / name, text)
        write_json(temporary / MANIFEST, {"kind": "export", "settings": settings, "complete": True})
        shutil.rmtree(folder, ignore_errors=True)
        commit(temporary, folder)
    refused = unserved(exported)
    for engine, reason in refused.items():
        print(f"export: {engine} cannot serve this head: {reason}")
    in_vllm = "vLLM" in {engine.name for engine in SERVING_FORMATS[format_].engines} - refused.keys()
    command = f", served by `{vllm_command(exported)}`" if in_vllm else ""
    print(f"export: {folder}{command}; more in {folder / 'SERVING.md'}")


def _acceptance(config: Config, source: Path) -> dict[str, Any] | None:
    """Return acceptance.json of the run if it was measured with this very head, by the weights' checksum."""
    path = config.run_folder / "evaluation" / "acceptance.json"
    measured = (_manifest(path.parent).get("settings") or {}).get("head")
    this = path.is_file() and measured == file_digest(source / WEIGHTS)
    return json.loads(path.read_text()) if this else None


def _conversations(config: Config, source: Path) -> dict[str, Any] | None:
    """Return the manifest of the run's conversations if the head is a checkpoint of the run's own training."""
    own = (config.training_folder / "checkpoints").resolve() in source.resolve().parents
    manifest = _manifest(config.conversations_folder) if own else {}
    return manifest or None


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder that is complete; else nothing."""
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else {}
    return manifest if manifest.get("complete") else {}
