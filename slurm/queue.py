"""What Slurm says of jobs, and what it is told."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STAGE_OUT", "SIGNALING", "STOPPED")


@dataclass(frozen=True)
class JobState:
    """One job, or one task of an array; `task` is None where the array has not been split up."""

    id: str  # of the job, or the array
    task: int | None
    state: str
    reason: str
    exit_code: str
    restarts: int
    nodes: str

    @property
    def live(self) -> bool:
        """Whether it may still run."""
        return self.state in LIVE


def has_slurm() -> bool:
    """Say whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None


def submit_file(file: Path, dependency: str | None) -> str:
    """Submit a job file and give the id of its job.

    Raises:
        ValueError: Slurm refuses it.
    """
    after = [f"--dependency={dependency}"] if dependency else []
    done = subprocess.run(["sbatch", "--parsable", *after, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise ValueError(f"sbatch refuses {file}: {said}; see the options of cluster")
    return done.stdout.strip().partition(";")[0]  # ID;CLUSTER


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs that are there."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)


def job_states(job: str) -> list[JobState] | None:
    """Give what Slurm knows of a job, by task where it is an array: nothing once it has forgotten it, None if mute."""
    if not has_slurm():
        return None
    done = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=False)
    if done.returncode:
        return [] if "Invalid job id" in done.stderr else None
    return [_parse(line) for line in done.stdout.splitlines() if line.startswith("JobId=")]


def _parse(line: str) -> JobState:
    def value(name: str) -> str:
        found = re.search(rf"(?:^| ){name}=(\S*)", line)
        return found[1] if found else ""

    task = value("ArrayTaskId")
    return JobState(
        id=value("ArrayJobId") or value("JobId"),
        task=int(task) if task.isdecimal() else None,
        state=value("JobState"),
        reason=value("Reason"),
        exit_code=value("ExitCode"),
        restarts=int(value("Restarts") or 0),
        nodes=value("NodeList").replace("(null)", ""),
    )
