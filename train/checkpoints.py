"""Training checkpoints: what resume needs (DeepSpeed's files, RNG states) beside a plain copy of the head."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ..conf.artifact import commit, sync, write_json
from ..models.draft_head import DraftHead
from ..models.formats import HELDOUT_WALKS, checkpoint_steps, save_head
from .heldout import Walks

_SAVING = ".saving"


def save_checkpoint(
    engine: Any, head: DraftHead, folder: Path, state: dict[str, Any], record: dict[str, Any], keep: int
) -> None:
    """Write checkpoints/step-<n> on all ranks; it appears under its name only when it is whole.

    Args:
        state: what `load_checkpoint` gives back: `step`, `acceptance`, and `walks`, the held-out rounds.
        record: the head's record (`fledge.json`).
        keep: how many of the newest checkpoints stay.
    """
    saving = folder / _SAVING
    if dist.get_rank() == 0:
        shutil.rmtree(saving, ignore_errors=True)
        saving.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=_SAVING, client_state=state, save_latest=False)
    torch.save(torch.get_rng_state(), saving / f"rng-{dist.get_rank()}.pt")
    parameters = list(head.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() == 0:
            save_head(saving, head, record, next(iter(parameters)).dtype)
            write_json(saving / HELDOUT_WALKS, _as_json(state["walks"]))
    dist.barrier()
    if dist.get_rank() == 0:
        for path in saving.rglob("*"):
            if path.is_file():
                sync(path)
        final = folder / f"step-{state['step']}"
        shutil.rmtree(final, ignore_errors=True)
        commit(saving, final)
        for old in checkpoint_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old}")
    dist.barrier()


def _as_json(walks: Walks) -> dict[str, Any]:
    return {
        str(num): {name: dataclasses.asdict(walked) for name, walked in by_id.items()} for num, by_id in walks.items()
    }


def load_checkpoint(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Restore weights, optimizer and RNG from the newest checkpoint and give its state; None where there is none.

    Raises:
        ValueError: the checkpoint was written by another number of processes, or cannot be read.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return None
    newest = folder / f"step-{steps[-1]}"
    num_ranks = len(list(newest.glob("rng-*.pt")))
    if num_ranks != dist.get_world_size():
        raise ValueError(
            f"{newest} was written by {num_ranks} processes, this start has {dist.get_world_size()}: start as many"
        )
    path, state = engine.load_checkpoint(str(folder), tag=newest.name)
    if path is None:
        raise ValueError(f"{newest} cannot be read: delete it, training goes on from the checkpoint before")
    torch.set_rng_state(torch.load(newest / f"rng-{dist.get_rank()}.pt", weights_only=True))
    return state
