"""Exports of small heads, damaged in one way or another, and what the doctor finds in their files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from builders import make_head, matrices
from fledge.eval.doctor.rules import engine_notes, static_findings
from fledge.models.formats.plain import save_head
from fledge.models.formats.published import read_files
from fledge.models.formats.published_config import HeadFiles
from fledge.models.formats.speculators import save_speculators
from published_heads import ABSENT, SHAPE, VERIFIER
from safetensors.torch import load_file, save_file

EMBEDDING, _ = matrices()


def head_in(folder: Path, speculators: bool = False, **changes: Any) -> Path:
    if speculators:
        save_speculators(folder, make_head(**changes), {}, torch.bfloat16, VERIFIER, 3)
    else:
        save_head(folder, make_head(**changes), {}, torch.bfloat16)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder: Path, changes: dict[str, Any]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not ABSENT}, folder / "model.safetensors")


def as_published(folder: Path) -> HeadFiles:
    return read_files(folder, SHAPE, weights=SimpleNamespace(embedding=lambda: EMBEDDING))


def codes(folder: Path) -> list[str]:
    findings = static_findings(as_published(folder))
    assert engine_notes(as_published(folder))
    assert all(finding.what and finding.cost and finding.cure for finding in findings)
    return [finding.code for finding in findings]
