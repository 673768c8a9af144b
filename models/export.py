"""The export stage: a checkpoint that serving engines load as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..conf.artifact import MANIFEST, commit, file_digest, write_json
from ..conf.schema import Config
from .formats import WEIGHTS, head_folder, load_head, save_head
from .verifier import check_identity, verifier_location


def export(config: Config) -> None:
    """Write runs/<name>/exports/<format>/ from a head; a half-written export is never seen."""
    source = head_folder(config.export.checkpoint, config.training_folder)
    head, record = load_head(source)
    check_identity(record["verifier"], config.verifier, str(source), "set the verifier it was trained for")
    if head.config.num_layers > 1:
        raise ValueError(
            f"{source} has {head.config.num_layers} layers: engines disagree on how they norm the second, "
            "only heads of one layer (draft.num_layers=1) can be served"
        )
    folder = config.run_folder / "exports" / config.export.format.value
    settings = {"head": file_digest(source / WEIGHTS), "dtype": config.export.dtype.value, "format": folder.name}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if _current_settings(folder) == settings and (folder / WEIGHTS).is_file():
            print(f"export: {folder} is complete")
            return
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_head(temporary, head, record, getattr(torch, config.export.dtype.value))
        write_json(temporary / MANIFEST, {"kind": "export", "settings": settings, "complete": True})
        shutil.rmtree(folder, ignore_errors=True)
        commit(temporary, folder)
    options = json.dumps(
        {"method": "eagle3", "model": str(folder), "num_speculative_tokens": config.evaluate.num_draft_tokens}
    )
    served_by = f"vllm serve {verifier_location(config.verifier)} --speculative-config '{options}'"
    print(f"export: {folder}, served by `{served_by}`")


def _current_settings(folder: Path) -> dict[str, Any] | None:
    """Give the settings of the export that is there; refuse a folder that is not one."""
    if not folder.exists():
        return None
    manifest = folder / MANIFEST
    content = json.loads(manifest.read_text()) if manifest.is_file() else {}
    if content.get("kind") != "export":
        raise ValueError(f"{folder} is not an export of fledge's: move it away")
    return content["settings"]
