"""Where metrics go: metrics.jsonl, and the trackers of `tracking.report_to`, none of which ever stops a run."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ... import __version__
from ...conf.runtime.artifact import write_atomic
from ...conf.runtime.trackers import open_tracker, warn_left_out
from ...conf.schema import Config, TrackerName, TrackingConfig

METRICS = "metrics.jsonl"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read the metrics of a training folder; a torn last line is left out."""
    path = Path(folder) / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def run_description(config: Config, inputs: dict[str, str], kernels: dict[str, Any]) -> dict[str, Any]:
    """Return what trackers record of a run: every option, the code, the inputs' digests, the kernels used."""
    options: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    about = {"fledge": __version__, "git": git_state(Path(__file__).parents[2])}
    return {**options, **about, "inputs": inputs, "kernels": kernels}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit that a folder is a checkout of and whether files differ from it; None if it is none."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    run = partial(
        subprocess.run, capture_output=True, text=True, check=True, timeout=10, env=outside, stdin=subprocess.DEVNULL
    )
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    try:
        top, commit = run([*git, "rev-parse", "--show-toplevel", "HEAD"]).stdout.splitlines()
        if Path(top).resolve() != folder.resolve():
            return None  # installed into an environment inside another project's checkout
        return {"commit": commit, "dirty": bool(run([*git, "status", "--porcelain"]).stdout)}
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


class Tracker:
    """Records metrics by optimizer step, in the training folder and with the trackers that `open_tracker` opens.

    Training goes on from `step`; records beyond it, of a start that was killed, are dropped.
    """

    def __init__(
        self, options: TrackingConfig, folder: Path, step: int, run: str, name: str, about: dict[str, Any]
    ) -> None:
        lines = [json.dumps(record) + "\n" for record in read_metrics(folder) if record["step"] <= step]
        write_atomic(folder / METRICS, "".join(lines))
        self._file = open(folder / METRICS, "a")  # noqa: SIM115
        self._trackers: dict[TrackerName, Any] = {}
        for tracker in options.trackers:
            try:
                self._trackers[tracker] = open_tracker(tracker, options, folder, run, name, about, step)
            except Exception as error:  # whatever is wrong with a tracker, training matters more
                warn_left_out(tracker, error, METRICS)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record metrics of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        self._each(lambda tracker: tracker.log(metrics, step=step))

    def close(self) -> None:
        """Finish the records."""
        self._file.close()
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:  # as above
                warn_left_out(name, error, METRICS)
                del self._trackers[name]
