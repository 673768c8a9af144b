"""Files of a submission in its folder, runs/NAME/jobs/N/: configuration and code as they were, jobs, logs, events."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...conf.runtime.artifact import write_json
from ...conf.runtime.frozen import freeze_options
from ...conf.schema import Config
from ...train.metrics.tracking import git_state

PACKAGE = Path(__file__).parents[2]
JOBS = "jobs"
LOGS = "logs"
_SUBMISSION = "submission.json"


@dataclass(frozen=True)
class JobRecord:
    """A submitted job file."""

    stage: str
    file: str
    id: str
    tasks: int | None  # of an array; None: it is none

    @property
    def names(self) -> list[str]:
        """Names of its tasks' events and locks."""
        return [self.stage] if self.tasks is None else [f"{self.stage}-{task}" for task in range(self.tasks)]

    def log(self, folder: Path, task: int) -> Path:
        """Return the log of a task, which all its starts append to."""
        return folder / LOGS / f"{self.stage}-{self.id}{'' if self.tasks is None else f'_{task}'}.log"


@dataclass(frozen=True)
class Event:
    """A line that a job has written: begun, healthy, stopping, again, cancelled, done, failed."""

    time: str
    job: str
    kind: str
    detail: str


def submissions(run_folder: Path) -> dict[int, Path]:
    """Return the folders of a run's submissions by number."""
    return {int(path.name): path for path in (run_folder / JOBS).glob("*") if path.name.isdecimal()}


def freeze(config: Config, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Write configuration and code into the folder of a submission; return what is to be recorded of them."""
    freeze_options(config, folder)
    target = folder / "code" / "fledge"  # templates/head.sh puts code/ on PYTHONPATH
    target.mkdir(parents=True)
    for entry in sorted(PACKAGE.iterdir()):  # tests, environments and runs may lie next to the modules
        if entry.is_file() and entry.suffix == ".py":
            shutil.copy2(entry, target)
        elif entry.is_dir() and (entry / "__init__.py").is_file():
            shutil.copytree(entry, target / entry.name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return {"fledge": __version__, "overrides": overrides, "git": git_state(PACKAGE)}


def write_submission(folder: Path, about: dict[str, Any], jobs: list[JobRecord]) -> None:
    """Write submission.json."""
    write_json(folder / _SUBMISSION, {**about, "jobs": [vars(job) for job in jobs]})


def read_submission(folder: Path) -> tuple[dict[str, Any], list[JobRecord]]:
    """Read submission.json: what is known of all jobs, and the jobs; nothing if submitting was interrupted."""
    path = folder / _SUBMISSION
    about = json.loads(path.read_text()) if path.is_file() else {}
    return about, [JobRecord(**job) for job in about.pop("jobs", [])]


def read_events(folder: Path, name: str) -> list[Event]:
    """Read what a task has written so far."""
    path = folder / "events" / name
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Event(*line.split("\t", 3)) for line in lines if line.count("\t") >= 3]
