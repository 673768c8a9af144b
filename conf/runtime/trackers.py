"""Trackers by accelerate.tracking: one is opened for a run, by the name that `tracking.report_to` has for it."""

import atexit
import logging
import os
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from ..schema import TrackerName, TrackingConfig, WandbMode

# Seconds that W&B may take for an answer, in online mode; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say otherwise.
WANDB_SECONDS = {"init_timeout": 20.0, "finish_timeout": 60.0}
_SERVICE_SECONDS = 10.0  # that its service, which ends in less than one, may take to end without a run
_RUN_NAME = {  # the argument for a run's name; accelerate's first argument, called run_name, is the project
    TrackerName.mlflow: "run_name",
    TrackerName.trackio: "name",
    TrackerName.swanlab: "experiment_name",
    TrackerName.clearml: "task_name",
}


def open_tracker(
    tracker: TrackerName,
    options: TrackingConfig,
    folder: Path,
    run: str,
    name: str,
    about: dict[str, Any] | None = None,
    step: int = 0,
) -> Any:
    """Open a tracker of accelerate; its `tracker` is its package's own run.

    W&B online goes on under the id `run`; offline every start makes a directory, which `wandb sync` joins. TensorBoard
    hides steps beyond the one resumed from. With the others every start makes a run of its own. W&B and TensorBoard
    write into the folder; `about` is logged with the run.
    """
    from accelerate import tracking
    from transformers.utils import flatten_dict

    tracking.logger = logging.getLogger(tracking.__name__)  # type: ignore[assignment]  # its own needs an Accelerator
    kind = tracking.LOGGER_TYPE_TO_CLASS[tracker.value]
    try:
        if tracker is TrackerName.wandb:
            made = kind(options.project, **_wandb_arguments(options), id=run, name=name, dir=folder, config=about)
        elif tracker is TrackerName.tensorboard:
            made = kind("tensorboard", folder, purge_step=step + 1)
        else:
            place = [folder] if kind.requires_logging_directory else []
            made = kind(options.project, *place, **({_RUN_NAME[tracker]: name} if tracker in _RUN_NAME else {}))
        made.main_process_only = False  # the caller is one rank; accelerate would start a process group to know
        made.start()
    finally:
        if tracker is TrackerName.wandb:
            _end_wandb_at_exit()
    if about and tracker not in (TrackerName.wandb, TrackerName.tensorboard):
        flat = {name: value for name, value in flatten_dict(about).items() if value != {}}  # most know no nested ones
        made.store_init_configuration({k: v if isinstance(v, (int, float, str)) else str(v) for k, v in flat.items()})
    return made


def warn_left_out(tracker: TrackerName, error: Exception, file: str) -> None:
    """Warn that a tracker is left out, and why; `file` is written all the same."""
    name = {TrackerName.wandb: "W&B", TrackerName.tensorboard: "TensorBoard"}.get(tracker, tracker.value)
    reason = " ".join(str(error).split()) or type(error).__name__
    logging.getLogger(__name__).warning("%s is left out (%s); %s is written all the same", name, reason, file)


@cache
def _end_wandb_at_exit() -> None:
    """Kill W&B's service if it does not end with this process, which waits for it without a limit.

    After a request that took too long, the service can miss the message that tells it to end.
    """
    import psutil
    import wandb

    at_exit = threading.Event()

    def end() -> None:
        at_exit.wait()
        time.sleep(_SERVICE_SECONDS + (WANDB_SECONDS["finish_timeout"] if wandb.run else 0.0))
        for process in psutil.Process().children():
            with suppress(psutil.Error):  # it has ended
                if process.name().startswith("wandb"):
                    process.kill()

    threading.Thread(target=end, daemon=True).start()  # none can be started at exit
    atexit.register(at_exit.set)  # after, so called before, what waits for the service


def _wandb_arguments(options: TrackingConfig) -> dict[str, Any]:
    """Return arguments of `wandb.init`, logged in and silenced."""
    import wandb

    online = options.wandb is WandbMode.online
    limits: Any = {key: value for key, value in WANDB_SECONDS.items() if f"WANDB_{key.upper()}" not in os.environ}
    # Silence for one run only (wandb.init) leaves W&B's advertising, which it prints for the whole process.
    wandb.setup(wandb.Settings(silent=True))
    # On a terminal W&B asks for a key that is missing, for ever if it is let.
    if online and not wandb.login(timeout=round(WANDB_SECONDS["init_timeout"])):
        raise ValueError("no API key: set WANDB_API_KEY or run `wandb login`")
    settings = wandb.Settings(console="off", disable_git=True, **limits)
    resume = "allow" if online else None
    return {"entity": options.entity, "mode": options.wandb.value, "resume": resume, "settings": settings}
