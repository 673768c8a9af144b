"""Training checkpoints.

checkpoints/
  step-<n>/       the head in plain format; trainer.json, DeepSpeed's states and RNG states, which resume needs
  latest, best    name the newest and the one with the longest held-out acceptance length, in a line of text
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from safetensors import SafetensorError

from ..conf.runtime.artifact import commit, sync, write_atomic, write_json
from ..models.formats.plain import BEST, HELDOUT_WALKS, LATEST, checkpoint_steps, save_head
from ..models.head.draft_head import DraftHead
from .heldout import HeldoutByLength, HeldoutCounts

STATE = "trainer.json"
_SAVING, _UNIVERSAL = ".saving", ".universal"


@dataclass
class TrainerState:
    """What a run knows besides its weights, optimizer and RNG."""

    step: int = 0  # optimizer steps made
    acceptance: list[float] = field(default_factory=list)  # running probability of acceptance by TTT step
    skipped_steps: int = 0  # in all
    skipped_in_a_row: int = 0
    best_step: int | None = None
    best_acceptance_length: float = 0.0
    best_measure: str = ""  # digest of draft tokens and held-out conversations; under another one all begins anew
    walks: HeldoutByLength = field(default_factory=dict)  # of these weights; empty if they were not measured


def save_checkpoint(
    engine: Any, head: DraftHead, folder: Path, state: TrainerState, record: dict[str, Any], keep: int
) -> None:
    """Write checkpoints/step-<n> on all ranks; it appears under its name only when it is whole.

    Args:
        record: the head's record (`fledge.json`).
        keep: how many of the newest checkpoints stay, next to the best.

    Raises:
        ValueError: it cannot be written, or the ranks' folders differ; the checkpoints before it are as they were.
    """
    saving = folder / _SAVING
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir(parents=True)
        dist.barrier()
        _write(engine, head, saving, state, record)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save cannot write
            raise
        what = f"the checkpoint of step {state.step} cannot be written to {folder}"
        raise _not_written(saving, error, what, "; the same command goes on from the checkpoint before") from error
    dist.barrier()
    if dist.get_rank() == 0:
        _check_parts(saving)
        for path in saving.rglob("*"):
            if path.is_file():
                sync(path)
        final = folder / f"step-{state.step}"
        shutil.rmtree(final, ignore_errors=True)
        commit(saving, final)
        _name(folder, state)
        for old in checkpoint_steps(folder)[:-keep]:
            if old != state.best_step:
                shutil.rmtree(folder / f"step-{old}")
    dist.barrier()


def _write(engine: Any, head: DraftHead, saving: Path, state: TrainerState, record: dict[str, Any]) -> None:
    """Write every file of a checkpoint."""
    universal = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # what its conversion asks for
    engine.save_checkpoint(str(saving.parent), tag=saving.name, client_state=universal, save_latest=False)
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    torch.save(rng, saving / _rng_file(dist.get_rank()))
    parameters = list(head.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        if dist.get_rank() == 0:
            save_head(saving, head, record, next(iter(parameters)).dtype)
            values = dataclasses.asdict(state)
            write_json(saving / HELDOUT_WALKS, values.pop("walks"))
            layout = {"num_processes": dist.get_world_size(), "zero_stage": engine.zero_optimization_stage()}
            write_json(saving / STATE, values | layout)


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.pt"


def _check_parts(saving: Path) -> None:
    """Refuse a checkpoint that some rank has written its part of elsewhere: nothing could go on from it."""
    for rank in range(dist.get_world_size()):
        if not (saving / _rng_file(rank)).is_file():
            raise ValueError(
                f"runs_dir must be one folder that all nodes see: rank {rank} has written its part of the checkpoint "
                f"to another {saving}"
            )


def _not_written(target: Path, error: Exception, what: str, or_else: str) -> ValueError:
    """Delete what was written in part, and say why there is not more of it."""
    shutil.rmtree(target, ignore_errors=True)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    free = shutil.disk_usage(target.parent).free / 2**30
    return ValueError(f"{what} ({reason}; {free:.1f} GiB free): make room there{or_else}")


def _name(folder: Path, state: TrainerState) -> None:
    """Write which checkpoint is the latest and which the best."""
    for name, step in {LATEST: state.step, BEST: state.best_step}.items():
        if step is not None:
            write_atomic(folder / name, f"step-{step}\n")


def needs_conversion(folder: Path, zero_stage: int) -> bool:
    """Whether the newest checkpoint was written by another number of processes, or at another ZeRO stage.

    Raises:
        ValueError: DeepSpeed cannot move it to this stage.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return False
    newest = folder / f"step-{steps[-1]}"
    written = _read_state(newest)
    before = written["zero_stage"]
    if before != zero_stage and {before, zero_stage} != {1, 2}:
        raise ValueError(
            f"deepspeed.zero_stage must stay {before}, with which {newest} was written, got {zero_stage}: DeepSpeed "
            "converts between stages 1 and 2 only"
        )
    same = (written["num_processes"], before) == (dist.get_world_size(), zero_stage)
    return not same and zero_stage > 0  # at stage 0 every rank loads the same


def load_checkpoint(engine: Any, folder: Path) -> TrainerState | None:
    """Restore weights, optimizer and RNG from the newest checkpoint and return its state; None if there is none.

    An engine started for it (`needs_conversion`) loads the checkpoint through DeepSpeed's universal format.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        return None
    newest = folder / f"step-{steps[-1]}"
    values = _read_state(newest)
    converts = engine.load_universal_checkpoint()
    if dist.get_rank() == 0:
        for left in (_SAVING, _UNIVERSAL):  # by a start that was killed
            shutil.rmtree(folder / left, ignore_errors=True)
        if converts:
            _convert(newest, folder / _UNIVERSAL)
    dist.barrier()
    path, _ = engine.load_checkpoint(str(folder), tag=_UNIVERSAL if converts else newest.name)
    if path is None:
        raise ValueError(f"{newest} cannot be read: delete it, training goes on from the checkpoint before")
    dist.barrier()
    if converts and dist.get_rank() == 0:
        shutil.rmtree(folder / _UNIVERSAL)
    rng_path = newest / _rng_file(dist.get_rank())
    if rng_path.is_file():  # a rank that was not there before keeps the state it has from its start
        rng = torch.load(rng_path, weights_only=True)
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
    walks = json.loads((newest / HELDOUT_WALKS).read_text())
    known = {entry.name for entry in dataclasses.fields(TrainerState)}
    state = TrainerState(**{name: value for name, value in values.items() if name in known})
    state.walks = {
        int(num): {name: HeldoutCounts(**walked) for name, walked in by_id.items()} for num, by_id in walks.items()
    }
    if dist.get_rank() == 0:
        _name(folder, state)  # a kill may have come between the checkpoint and its names
    return state


def _read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint / STATE} cannot be read ({error}): delete {checkpoint}, training goes on from the one before"
        ) from None


def _convert(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint in DeepSpeed's universal format, which any number of processes can load.

    Raises:
        ValueError: it cannot be written.
    """
    options = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    except (OSError, RuntimeError) as error:
        what = f"{checkpoint} cannot be converted for another number of processes"
        raise _not_written(target, error, what, ", or start as many processes as wrote it") from error
