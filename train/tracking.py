"""Where metrics go: metrics.jsonl always, W&B beside it. Neither ever stops a run.

| name                           | meaning                                                                     |
|--------------------------------|-----------------------------------------------------------------------------|
| `train/loss`                   | the loss minimised; nats, or what `train.loss` is in                        |
| `train/kl_step_<k>`            | mean KL(verifier, draft) at TTT step k, nats a token                        |
| `train/agreement_step_<k>`     | share of counted rows whose greedy draft token is the verifier's            |
| `train/prefix_agreement_step_<k>` | the same, and so at every step before                                    |
| `train/overlap_step_<k>`       | mean sum_v min(P, q): acceptance at temperature 1                           |
| `train/entropy_step_<k>`       | mean entropy of the verifier over the draft vocabulary: the least cross entropy |
| `train/outside_draft_vocab`    | share of rows whose greedy verifier token cannot be drafted; bounds acceptance |
| `train/lr`, `train/grad_norm`, `train/tokens_per_s`, `train/epoch` |                                         |
| `heldout/acceptance_length_<n>`| greedy, n draft tokens, walked on held-out answers                          |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..conf.artifact import write_atomic
from ..conf.schema import TrackingConfig, WandbMode

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics of a training folder; a torn last line is left out."""
    path = folder / METRICS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Tracker:
    """Records metrics by optimizer step.

    Args:
        folder: the training folder.
        step: the step training goes on from; records beyond it, of a start that was killed, are dropped.
        run: W&B run id, the same over all starts.
        config: logged with the run.
    """

    def __init__(
        self, options: TrackingConfig, folder: Path, step: int, run: str, name: str, config: dict[str, Any]
    ) -> None:
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        write_atomic(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(folder / METRICS, "a")  # noqa: SIM115
        self._run = None if options.wandb is WandbMode.disabled else _start_wandb(options, folder, run, name, config)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        self._tell_wandb(lambda run: run.log(metrics, step=step))

    def close(self) -> None:
        """Finish the records."""
        self._file.close()
        self._tell_wandb(lambda run: run.finish())

    def _tell_wandb(self, action: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # whatever is wrong with the tracker, training matters more
            _warn(error)
            self._run = None


def _start_wandb(options: TrackingConfig, folder: Path, run: str, name: str, config: dict[str, Any]) -> Any:
    try:
        import wandb

        return wandb.init(
            project=options.project,
            entity=options.entity,
            id=run,
            name=name,
            dir=folder,
            mode=options.wandb.value,
            resume="allow" if options.wandb is WandbMode.online else None,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except Exception as error:  # whatever is wrong with the tracker, training matters more
        _warn(error)
        return None


def _warn(error: Exception) -> None:
    logging.getLogger(__name__).warning("W&B is left out (%s); metrics.jsonl is written all the same", error)
