"""Training checkpoints.

checkpoints/
  step-<n>/       the head in plain format; trainer.json, DeepSpeed's states and RNG states, which resume needs
  latest, best    name the newest and the one with the longest held-out acceptance length, in a line of text
"""

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

from ..conf.runtime.artifact import commit, digest, sync, write_atomic, write_json
from ..conf.schema import TrainConfig
from ..models.formats.plain import save_head
from ..models.formats.training_folder import BEST, HELDOUT_WALKS, LATEST, STATE, checkpoint_steps, read_walks
from ..models.head.draft_head import DraftHead
from ..models.head.lora import merged_weights
from .heldout import HeldoutByLength, HeldoutCounts, acceptance_lengths, total

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
    not_better: int = 0  # checkpoints since the best
    start_elsewhere: list[float] = field(default_factory=list)  # held-out acceptance length of each, before step 1
    tokens: int = 0  # trained on, over all ranks
    seconds: float = 0.0  # of steps
    ended: str = ""  # why training ends before its last step
    heldout: HeldoutByLength = field(default_factory=dict)  # latest; in a checkpoint of its weights, or empty

    def note_best(self, num_draft_tokens: int, options: TrainConfig, by_store: list[set[str]]) -> None:
        """Make this step the best if it accepts more than the best before, or is the first by this measure.

        `by_store` has the held-out samples of each store. With `train.max_forgetting` what counts is the first store,
        while each other one keeps what it had at step 0. Say in `ended` if training is to end, by that or by
        `train.patience`.
        """
        counts, lost = self.heldout[num_draft_tokens], 0.0
        measure = digest([num_draft_tokens, sorted(counts)])
        is_first = self.best_step is None or measure != self.best_measure
        if options.max_forgetting is not None:
            own, *others = [{name: counts[name] for name in names} for names in by_store]
            lengths = [total(store.values()).acceptance_length for store in others]
            self.start_elsewhere = lengths if measure != self.best_measure else self.start_elsewhere
            lost = max(before - now for before, now in zip(self.start_elsewhere, lengths, strict=True))
            counts = own
        length = total(counts.values()).acceptance_length
        if lost > (options.max_forgetting or 0.0):
            self.ended = f"another store lost {lost:.3f} of τ@{num_draft_tokens}, more than train.max_forgetting"
        elif is_first or length > self.best_acceptance_length:
            self.best_step, self.best_acceptance_length, self.best_measure = self.step, length, measure
            self.not_better = 0
        else:
            self.not_better += 1
            if self.not_better == options.patience:
                self.ended = f"no checkpoint of the last {self.not_better} was better, as train.patience says"


def save_checkpoint(
    engine: Any, head: DraftHead, folder: Path, record: dict[str, Any], keep: int, state: TrainerState
) -> None:
    """Write checkpoints/step-<n> on all ranks; it appears under its name only when it is whole.

    `record` is the head's (`fledge.json`), but for what the state knows. The `keep` newest stay, next to the best and
    that of step 0, if there is one.
    ValueError if it cannot be written, or the ranks' folders differ: the checkpoints before it are as they were.
    """
    saving = folder / _SAVING
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir(parents=True)
        dist.barrier()
        _write(engine, head, saving, record, state)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch.save cannot write
            raise
        what = f"the checkpoint of step {state.step} cannot be written to {folder}"
        raise _not_written(saving, error, what, "; the same command goes on from the checkpoint before") from error
    dist.barrier()
    if dist.get_rank() == 0:
        for rank in range(dist.get_world_size()):  # nothing could go on from a checkpoint without each part
            if not (saving / _rng_file(rank)).is_file():
                raise ValueError(
                    f"runs_dir must be one folder that all nodes see: rank {rank} has written its part of the "
                    f"checkpoint to another {saving}"
                )
        for path in saving.rglob("*"):
            if path.is_file():
                sync(path)
        final = folder / f"step-{state.step}"
        shutil.rmtree(final, ignore_errors=True)
        commit(saving, final)
        _name(folder, state)
        for old in checkpoint_steps(folder)[:-keep]:
            if old not in (0, state.best_step):
                shutil.rmtree(folder / f"step-{old}")
    dist.barrier()


def _write(engine: Any, head: DraftHead, saving: Path, record: dict[str, Any], state: TrainerState) -> None:
    universal = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # what its conversion asks for
    engine.save_checkpoint(str(saving.parent), tag=saving.name, client_state=universal, save_latest=False)
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    torch.save({"cpu": torch.get_rng_state(), **cuda}, saving / _rng_file(dist.get_rank()))
    zero_stage, parameters = engine.zero_optimization_stage(), list(head.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=zero_stage == 3):
        if dist.get_rank() == 0:
            known = {"step": state.step, "heldout": acceptance_lengths(state.heldout)}
            save_head(saving, head, record | known, parameters[0].dtype, merged_weights(head))
            values = dataclasses.asdict(state)
            write_json(saving / HELDOUT_WALKS, values.pop("heldout"))
            write_json(saving / STATE, {**values, "num_processes": dist.get_world_size(), "zero_stage": zero_stage})


def _rng_file(rank: int) -> str:
    return f"rng-{rank}.pt"


def _not_written(target: Path, error: Exception, what: str, or_else: str) -> ValueError:
    """Delete what was written in part, and return the error that says why."""
    shutil.rmtree(target, ignore_errors=True)
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    free = shutil.disk_usage(target.parent).free / 2**30
    return ValueError(f"{what} ({reason}; {free:.1f} GiB free): make room there{or_else}")


def _name(folder: Path, state: TrainerState) -> None:
    """Write which checkpoint is the latest and which the best."""
    for name, step in {LATEST: state.step, BEST: state.best_step}.items():
        if step is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomic(folder / name, f"step-{step}\n")


def _newest(folder: Path) -> Path | None:
    steps = checkpoint_steps(folder)
    return folder / f"step-{steps[-1]}" if steps else None


def needs_conversion(folder: Path, zero_stage: int) -> bool:
    """Return whether the newest checkpoint is of other processes or ZeRO stage; refuse what DeepSpeed cannot move."""
    if (newest := _newest(folder)) is None:
        return False
    written = _read_state(newest)
    before = written["zero_stage"]
    if before != zero_stage and {before, zero_stage} != {1, 2}:
        raise ValueError(
            f"deepspeed.zero_stage must stay {before}, with which {newest} was written, got {zero_stage}: DeepSpeed "
            "converts between stages 1 and 2 only"
        )
    same = (written["num_processes"], before) == (dist.get_world_size(), zero_stage)
    return not same and zero_stage > 0  # at stage 0 every rank loads the same


def load_checkpoint(engine: Any, folder: Path) -> TrainerState:
    """Restore weights, optimizer and RNG from the newest checkpoint, if there is one, and return the run's state.

    An engine started for it (`needs_conversion`) loads the checkpoint through DeepSpeed's universal format.
    """
    if (newest := _newest(folder)) is None:
        return TrainerState()
    values = _read_state(newest)
    rank, converts = dist.get_rank(), engine.load_universal_checkpoint()
    if rank == 0:
        for left in (_SAVING, _UNIVERSAL):  # by a start that was killed
            shutil.rmtree(folder / left, ignore_errors=True)
        if converts:
            _convert(newest, folder / _UNIVERSAL)
    dist.barrier()
    path, _ = engine.load_checkpoint(str(folder), tag=_UNIVERSAL if converts else newest.name)
    if path is None:
        raise ValueError(f"{newest} cannot be read: delete it, training goes on from the checkpoint before")
    dist.barrier()
    if converts and rank == 0:
        shutil.rmtree(folder / _UNIVERSAL)
    if (newest / _rng_file(rank)).is_file():  # a rank that was not there before keeps the state it has from its start
        rng = torch.load(newest / _rng_file(rank), weights_only=True)
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])
    names = [entry.name for entry in dataclasses.fields(TrainerState)]
    state = TrainerState(**{name: values[name] for name in names if name in values})
    if state.best_step not in checkpoint_steps(folder):  # deleted, as was one that was better since
        state.best_step = None
    for length, by_sample in read_walks(newest).items():
        state.heldout[length] = {sample_id: HeldoutCounts(**counts) for sample_id, counts in by_sample.items()}
    if rank == 0:
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
    """Write a checkpoint in DeepSpeed's universal format, which any number of processes can load."""
    folders = {"input_folder": str(checkpoint), "output_folder": str(target)}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    options = Namespace(**folders, **workers, keep_temp_folder=False, strict=True, inject_missing_state=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            ds_to_universal.main(options)
    except (OSError, RuntimeError) as error:
        what = f"{checkpoint} cannot be converted for another number of processes"
        raise _not_written(target, error, what, ", or start as many processes as wrote it") from error
