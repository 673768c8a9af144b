"""How far the stages of a run are, by what their artifacts hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...conf.runtime.artifact import MANIFEST
from ...train.metrics.tracking import read_metrics


def stage_progress(run_folder: Path, options: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Return by stage whether it is complete, and what there is of it in few words; `options` as far as known."""
    store = (options.get("dump") or {}).get("folder")
    stages: dict[str, tuple[Path, Callable[[Path], str]]] = {
        "synthesize": (run_folder / "conversations", _conversations),
        "dump": (Path(store) if store else run_folder / "hidden_states", _shards),
        "train": (run_folder / "training", lambda folder: _steps(folder, options.get("train") or {})),
        "evaluate": (run_folder / "evaluation", _questions),
    }
    progress = {stage: (_is_complete(folder), describe(folder)) for stage, (folder, describe) in stages.items()}
    exports = [folder.name for folder in sorted((run_folder / "exports").glob("[!.]*")) if _is_complete(folder)]
    return progress | {"export": (bool(exports), ", ".join(exports))}


def _is_complete(folder: Path) -> bool:
    return bool(_read(folder / MANIFEST).get("complete"))


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is none."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _of(done: int, total: int, what: str) -> str:
    return f"{done} of {total} {what}" if total else f"{done} {what}" if done else ""


def _conversations(folder: Path) -> str:
    prompts = (_read(folder.parent / "prompts" / MANIFEST).get("counts") or {}).get("taken") or 0
    files = (folder / "conversations.jsonl", *folder.glob("part-*/conversations.jsonl"))
    return _of(sum(map(_lines, files)), prompts, "conversations")


def _shards(folder: Path) -> str:
    shards = _read(folder / "tokens" / MANIFEST).get("shards") or []
    return _of(len(list(folder.glob("shard-*.safetensors"))), len(shards), "shards")


def _steps(folder: Path, options: dict[str, Any]) -> str:
    records = read_metrics(folder)
    steps = [record for record in records if "train/epoch" in record]
    if not steps:
        return ""
    last, total = steps[-1], options.get("max_steps")
    epochs = "" if total else f", epoch {last['train/epoch']:.2f} of {options.get('epochs', '?')}"
    loss = f", loss {last['train/loss']:.3f}" if "train/loss" in last else ""
    prefix = "heldout/acceptance_length_"
    of_heldout = [{name: value for name, value in record.items() if name.startswith(prefix)} for record in records]
    lengths: dict[str, Any] = next(filter(None, reversed(of_heldout)), {})  # the latest
    numbers = {name.removeprefix(prefix): value for name, value in lengths.items()}
    acceptance = "".join(f", τ@{num} {value:.2f}" for num, value in numbers.items() if num.isdecimal())
    return f"step {last['step']}" + (f" of {total}" if total else "") + epochs + loss + acceptance


def _questions(folder: Path) -> str:
    length = _read(folder / "acceptance.json").get("acceptance_length") if _is_complete(folder) else None
    if length:
        return f"acceptance length {length:.2f}"
    return _of(_lines(folder / "questions.jsonl"), 0, "questions answered")
