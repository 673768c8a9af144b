"""Where a training run's checkpoints are, and what it measured of each; without torch."""

import json
import re
from pathlib import Path
from typing import Any

LATEST, BEST = "latest", "best"  # names of training checkpoints
STATE = "trainer.json"  # in training checkpoints: a `TrainerState`
HELDOUT_WALKS = "heldout_walks.json"  # in training checkpoints: a `HeldoutCounts` by draft tokens and conversation


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the finished checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def head_folder(checkpoint: str | None, training_folder: Path) -> Path:
    """Return the folder of the head to use: `checkpoint`, or a training run's `best` or `latest` checkpoint.

    None is the best, or the newest if none was measured.
    """
    if checkpoint is not None and checkpoint not in (BEST, LATEST):
        return Path(checkpoint)
    folder = training_folder / "checkpoints"
    steps = checkpoint_steps(folder)
    if not steps:
        raise ValueError(f"{training_folder} holds no checkpoint: run `fledge train` first")
    if checkpoint != LATEST and (folder / BEST).exists():
        return folder / (folder / BEST).read_text().strip()
    if checkpoint == BEST:
        raise ValueError(f"{folder} has no best checkpoint, as nothing was held out: use latest")
    return folder / f"step-{steps[-1]}"


def head_origin(folder: Path) -> str:
    """Return what records say of a head's folder: its name, after that of the run that it is a part of."""
    parts = folder.resolve().parts
    above = {"checkpoints": 4, "exports": 3, "imports": 3}.get(folder.resolve().parent.name, 1)
    return "/".join(dict.fromkeys([parts[-above], parts[-1]])) if above <= len(parts) else parts[-1]


def read_walks(checkpoint: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Return what training measured of a checkpoint: by draft tokens and sample id the entries of a `HeldoutCounts`.

    Nothing of a head that is no training checkpoint, or if nothing was held out.
    """
    path = checkpoint / HELDOUT_WALKS
    return {int(depth): counts for depth, counts in json.loads(path.read_text()).items()} if path.is_file() else {}


def best_acceptance_length(training_folder: Path) -> float | None:
    """Return the held-out acceptance length of a training's best checkpoint; None if nothing was held out."""
    state = json.loads((head_folder(LATEST, training_folder) / STATE).read_text())
    return None if state["best_step"] is None else float(state["best_acceptance_length"])
