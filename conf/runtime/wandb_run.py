"""The W&B run of a run: training records it step by step, evaluation adds its summary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..schema import TrackingConfig, WandbMode

# Seconds that W&B may take for an answer, in online mode; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say otherwise.
WANDB_SECONDS = {"init_timeout": 20.0, "finish_timeout": 60.0}


class WandbRun:
    """W&B. Online a resumed run goes on under its id, and steps that are there already are not recorded twice.

    Offline every start makes a directory of its own; `wandb sync` puts those of one run together.

    Args:
        folder: where W&B keeps its files.
        run: W&B run id, the same over all starts.
        about: logged with the run; None adds nothing.
    """

    def __init__(
        self, options: TrackingConfig, folder: Path, run: str, name: str, about: dict[str, Any] | None = None
    ) -> None:
        import wandb

        online = options.wandb is WandbMode.online
        limits: Any = {key: value for key, value in WANDB_SECONDS.items() if f"WANDB_{key.upper()}" not in os.environ}
        # Silence for one run only (wandb.init) leaves W&B's advertising, which it prints for the whole process.
        wandb.setup(wandb.Settings(silent=True))
        # On a terminal W&B asks for a key that is missing, for ever if it is let.
        if online and not wandb.login(timeout=round(WANDB_SECONDS["init_timeout"])):
            raise ValueError("no API key: set WANDB_API_KEY or run `wandb login`")
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            id=run,
            name=name,
            dir=folder,
            mode=options.wandb.value,
            resume="allow" if online else None,
            config=about,
            settings=wandb.Settings(console="off", disable_git=True, **limits),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        self._run.log(metrics, step=step)

    def summarise(self, figures: dict[str, Any]) -> None:
        """Record figures of the run as a whole."""
        self._run.summary.update(figures)

    def close(self) -> None:
        """Finish the records."""
        self._run.finish()
