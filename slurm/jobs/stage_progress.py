"""How far the stages of a run are, by what their artifacts hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...conf.runtime.artifact import MANIFEST
from ...train.metrics.tracking import read_metrics


def stage_progress(run_folder: Path, options: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Give whether each stage is complete, and what there is of it in few words.

    Args:
        options: the configuration of the run, as far as it is known.
    """
    store = (options.get("dump") or {}).get("folder")
    stages: dict[str, tuple[Path, Callable[[Path], str]]] = {
        "synthesize": (run_folder / "conversations", _conversations),
        "dump": (Path(store) if store else run_folder / "hidden_states", _shards),
        "train": (run_folder / "training", lambda folder: _steps(folder, options.get("train") or {})),
        "evaluate": (run_folder / "evaluation", _questions),
    }
    found = {stage: (is_complete(folder), tell(folder)) for stage, (folder, tell) in stages.items()}
    exports = [folder.name for folder in sorted((run_folder / "exports").glob("[!.]*")) if is_complete(folder)]
    return found | {"export": (bool(exports), ", ".join(exports))}


def is_complete(folder: Path) -> bool:
    """Say whether an artifact is."""
    return bool(_read(folder / MANIFEST).get("complete"))


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _of(done: int, total: int | None, what: str) -> str:
    return f"{done} of {total} {what}" if total else f"{done} {what}" if done else ""


def _conversations(folder: Path) -> str:
    prompts = (_read(folder.parent / "prompts" / MANIFEST).get("counts") or {}).get("taken")
    made = sum(_lines(path) for path in (folder / "conversations.jsonl", *folder.glob("part-*/conversations.jsonl")))
    return _of(made, prompts, "conversations")


def _shards(folder: Path) -> str:
    planned = _read(folder / "tokens" / MANIFEST).get("shards")
    there = len(list(folder.glob("shard-*.safetensors")))
    return _of(there, len(planned) if planned else None, "shards")


def _steps(folder: Path, options: dict[str, Any]) -> str:
    records = read_metrics(folder)
    steps = [record for record in records if "train/epoch" in record]
    if not steps:
        return ""
    last, total = steps[-1], options.get("max_steps")
    epochs = "" if total else f", epoch {last['train/epoch']:.2f} of {options.get('epochs', '?')}"
    loss = f", loss {last['train/loss']:.3f}" if "train/loss" in last else ""
    return f"step {last['step']}" + (f" of {total}" if total else "") + epochs + loss + _acceptance(records)


def _acceptance(records: list[dict[str, Any]]) -> str:
    """Give the latest held-out acceptance lengths."""
    walked = [record for record in records if any(name.startswith("heldout/acceptance_length_") for name in record)]
    if not walked:
        return ""
    prefix = "heldout/acceptance_length_"
    lengths = {name.removeprefix(prefix): value for name, value in walked[-1].items() if name.startswith(prefix)}
    return "".join(f", τ@{num} {value:.2f}" for num, value in lengths.items() if num.isdecimal())


def _questions(folder: Path) -> str:
    found = _read(folder / "acceptance.json").get("acceptance_length") if is_complete(folder) else None
    if found:
        return f"acceptance length {found:.2f}"
    return _of(_lines(folder / "questions.jsonl"), None, "questions answered")
