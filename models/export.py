"""The export stage: a checkpoint that serving engines load as it is."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch

from ..conf.artifact import MANIFEST, commit, file_digest, write_json
from ..conf.schema import Config
from .formats import WEIGHTS, check_verifier, head_folder, load_head, save_head
from .verifier import verifier_identity, verifier_location


def export(config: Config) -> None:
    """Write runs/<name>/exports/<format>/ from a head; a half-written export is never seen."""
    source = head_folder(config.export.checkpoint, config.training_folder)
    head, record = load_head(source)
    check_verifier(record, verifier_identity(config.verifier), source)
    if head.config.num_layers > 1:
        raise ValueError(
            f"{source} has {head.config.num_layers} layers: engines disagree on how they norm the second, "
            "only heads of one layer (draft.num_layers=1) can be served"
        )
    folder = config.run_folder / "exports" / config.export.format.value
    settings = {"head": file_digest(source / WEIGHTS), "dtype": config.export.dtype.value, "format": folder.name}
    if _is_current(folder / MANIFEST, settings):
        print(f"export: {folder} is complete")
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_head(temporary, head, record, getattr(torch, config.export.dtype.value))
    write_json(temporary / MANIFEST, {"kind": "export", "settings": settings, "complete": True})
    if folder.exists():
        shutil.rmtree(folder)
    commit(temporary, folder)
    options = json.dumps(
        {"method": "eagle3", "model": str(folder), "num_speculative_tokens": config.evaluate.num_draft_tokens}
    )
    served_by = f"vllm serve {verifier_location(config.verifier)} --speculative-config '{options}'"
    print(f"export: {folder}, served by `{served_by}`")


def _is_current(manifest: Any, settings: dict[str, Any]) -> bool:
    return manifest.is_file() and json.loads(manifest.read_text()).get("settings") == settings
