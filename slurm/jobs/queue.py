"""Slurm's commands: submit, cancel, and read the states of jobs."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HELD = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # until somebody lets them go on
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_FED", *HELD)
LIVE = (*QUEUED, "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "STAGE_OUT", "SIGNALING", "STOPPED")
# The line of sbatch that names the job, among whatever else a cluster prints: ID, ID;CLUSTER, or without --parsable.
_JOB_ID = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S+| on cluster \S+)?\s*$", re.MULTILINE)
_ALL_TASKS = {"SLURM_BITSTR_LEN": "0"}  # or scontrol cuts long lists of tasks off


@dataclass(frozen=True)
class JobState:
    """One job, one task of an array, or those of its tasks that have not been split off."""

    tasks: frozenset[int] | None  # of an array; None: it is none, or its tasks are not shown
    state: str
    reason: str
    exit_code: str
    nodes: str

    @property
    def live(self) -> bool:
        """Whether it may still run."""
        return self.state in LIVE


def has_slurm() -> bool:
    """Return whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None


def submit_file(file: Path, dependency: str | None) -> str:
    """Submit a job file and return the id of its job; ValueError if Slurm refuses it."""
    after = [f"--dependency={dependency}"] if dependency else []
    done = subprocess.run(["sbatch", "--parsable", *after, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise ValueError(f"sbatch refuses {file}: {reason}; see the options of cluster")
    if not (ids := _JOB_ID.findall(done.stdout)):
        output = " ".join(f"{done.stdout} {done.stderr}".split())[-300:]
        raise ValueError(
            f"sbatch names no job for {file}, it says {output!r}: see with squeue whether one is queued, cancel it, "
            "and let sbatch --parsable print the id on a line of its own"
        )
    return str(ids[-1])


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs that are there."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)


def job_states(job: str) -> list[JobState] | None:
    """Return what Slurm knows of a job, by task if it is an array: nothing once it has forgotten it, None if mute."""
    if not has_slurm():
        return None
    command = ["scontrol", "--oneliner", "show", "job", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **_ALL_TASKS})
    if done.returncode:
        return [] if "Invalid job id" in done.stderr else None
    return [_parse(line) for line in done.stdout.splitlines() if line.startswith("JobId=")]


def array_tasks(text: str) -> frozenset[int] | None:
    """Read the tasks of an array as Slurm writes them: `3`, `0,2-5%4`, `0-10:2`; None: that is none, or not all."""
    tasks: set[int] = set()
    for part in text.partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match is None:
            return None
        first, last, step = match.groups()
        tasks.update(range(int(first), int(last or first) + 1, int(step or 1) or 1))
    return frozenset(tasks)


def _parse(line: str) -> JobState:
    values = dict(re.findall(r"(?:^|(?<= ))(\w+)=(\S*)", line)[::-1])  # the first of a name counts
    state, reason, exit_code, nodes = (values.get(name, "") for name in ("JobState", "Reason", "ExitCode", "NodeList"))
    return JobState(array_tasks(values.get("ArrayTaskId", "")), state, reason, exit_code, nodes.replace("(null)", ""))
