"""`fledge status RUN`: where a submitted run stands, by what Slurm, its jobs and its artifacts tell."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..conf.schema import STAGES, Config
from .jobs.freeze import FROZEN
from .jobs.queue import HELD, QUEUED, JobState, job_states
from .jobs.records import JobRecord, read_events, read_submission, submissions
from .jobs.render import stage_before
from .jobs.stage_progress import stage_progress

_TAIL_BYTES = 1 << 16
DONE, RUNNING, WAITING, FAILED, CANCELLED, UNKNOWN = "done", "running", "waiting", "failed", "cancelled", "unknown"
_OF_SLURM = {"COMPLETED": DONE, "CANCELLED": CANCELLED, **dict.fromkeys(QUEUED, WAITING)}
_OF_EVENTS = {
    "begun": RUNNING,
    "healthy": RUNNING,
    "stopping": RUNNING,
    "again": WAITING,
    "done": DONE,
    "failed": FAILED,
    "cancelled": CANCELLED,
}


@dataclass
class TaskStatus:
    """Where one job or one task of an array stands."""

    name: str
    job: str
    state: str
    detail: str
    log: Path


def status(config: Config) -> None:
    """Print stages, jobs, progress, and the last lines of what runs or failed."""
    run_folder = find_run(config)
    found = submissions(run_folder)
    folder = found[max(found)] if found else None
    told = (folder / f"{FROZEN}.yaml" if folder else run_folder, run_folder / "training" / "config.yaml")
    options: Any = next((OmegaConf.to_container(OmegaConf.load(path)) for path in told if path.is_file()), {})
    progress = stage_progress(run_folder, options)
    about, records = read_submission(folder) if folder else ({}, [])
    print(_heading(run_folder, folder, about))
    tasks: dict[str, list[TaskStatus]] = {}
    for record in records:
        assert folder is not None
        tasks[record.stage] = task_statuses(folder, record)
    _name_causes(tasks)
    for stage in [*(stage for stage in tasks if stage not in STAGES), *STAGES]:
        print(_stage_line(stage, tasks.get(stage, []), *progress.get(stage, (False, ""))))
    for of_stage in tasks.values():
        for task in of_stage:
            if task.state in (RUNNING, FAILED):
                print(_tail(task, config.status.lines), end="")


def find_run(config: Config) -> Path:
    """Give the folder of the run that is asked for, by path or name.

    Raises:
        ValueError: there is none.
    """
    if not config.status.run:
        return _existing(config.run_folder)
    path = Path(config.status.run)
    return path if path.is_dir() else _existing(Path(config.runs_dir) / path)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"status.run must be the folder of a run, or its name in runs_dir, and {folder} is not there")
    return folder


def _heading(run_folder: Path, folder: Path | None, about: dict[str, Any]) -> str:
    if folder is None:
        return f"{run_folder}: never submitted; its artifacts tell:"
    if not about:
        return f"{run_folder}: {folder} was interrupted before it was submitted; the artifacts tell:"
    git = about.get("git")
    code = f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
    return f"{run_folder}, submitted {about['submitted']} from {folder}{code}"


def task_statuses(folder: Path, record: JobRecord) -> list[TaskStatus]:
    """Give where the tasks of a submitted job stand: Slurm knows best, and what it has forgotten their events tell."""
    states = job_states(record.id)
    by_task = {task: state for state in states or [] for task in state.tasks or ()}
    whole = next((state for state in states or [] if state.tasks is None), None)
    found = []
    for task, name in enumerate(record.names):
        slurm = by_task.get(task, whole)
        state, detail = _merge(slurm, states is not None, folder, name)
        job = record.id if record.tasks is None else f"{record.id}_{task}"
        found.append(TaskStatus(name, job, state, detail, record.log(folder, task)))
    return found


def _merge(slurm: JobState | None, slurm_answers: bool, folder: Path, name: str) -> tuple[str, str]:
    events = read_events(folder, name)
    last = events[-1] if events else None
    told = _OF_EVENTS.get(last.kind, UNKNOWN) if last else WAITING
    told_detail = "" if last is None else f"since {last.time}" if told == RUNNING else last.detail
    starts = sum(event.kind == "begun" for event in events)
    again = f"start {starts}" if starts > 1 else ""
    if slurm is None:
        if told == RUNNING and slurm_answers:
            return FAILED, "it ended without a word: killed, or its node was lost"
        if told == WAITING and slurm_answers:
            return CANCELLED, f"left the queue without having begun{' again' if last else ''}"
        return told, _joined(told_detail, again)
    state = _OF_SLURM.get(slurm.state, RUNNING if slurm.live else FAILED)
    if state == RUNNING:
        return state, _joined(slurm.state.lower() if slurm.state != "RUNNING" else "", f"on {slurm.nodes}", again)
    if state == FAILED:
        return (
            state,
            told_detail if told == FAILED else f"{slurm.state.lower()}, {slurm.reason}, exit code {slurm.exit_code}",
        )
    if state == WAITING:
        held = slurm.state.lower() if slurm.state in HELD else ""
        return state, _joined(
            held, slurm.reason, f"last: {last.detail}" if last and last.kind == "again" else "", again
        )
    return state, _joined(slurm.reason.replace("None", "") if state == CANCELLED else "", again)


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _name_causes(tasks: dict[str, list[TaskStatus]]) -> None:
    """Say of jobs that can never begin which stage is to blame."""
    causes: dict[str, str] = {}
    for stage, of_stage in tasks.items():
        cause = causes.get(stage_before(stage, list(tasks)) or "", "")
        for task in of_stage:
            if cause and task.state in (CANCELLED, WAITING):
                task.state, task.detail = CANCELLED, f"{cause} failed"
        if stage in STAGES and any(task.state in (FAILED, CANCELLED) for task in of_stage):
            causes[stage] = cause or stage


def _stage_line(stage: str, tasks: list[TaskStatus], complete: bool, progress: str) -> str:
    counts = Counter(task.state for task in tasks)
    if len(counts) == 1:
        state = tasks[0].state
    elif counts:
        state = ", ".join(f"{number} {state}" for state, number in counts.items())
    else:
        state = DONE if complete else "not submitted"
    line = f"{stage:<10} {state:<10} {progress}".rstrip()
    told = [task for task in tasks if task.detail or (task.state != DONE and len(tasks) > 1)]
    if len(tasks) == 1 and not told:
        return f"{line}  (job {tasks[0].job})"
    return "\n".join([line, *(f"  {t.name}: job {t.job} {t.state}{f': {t.detail}' if t.detail else ''}" for t in told)])


def _tail(task: TaskStatus, lines: int) -> str:
    """Give the last lines of a log."""
    if not task.log.is_file():
        return f"{task.name} {task.state}, no log in {task.log}\n"
    with open(task.log, "rb") as file:
        file.seek(max(0, task.log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    last = text.replace("\r", "\n").splitlines()[-lines:] if lines > 0 else []
    return f"{task.name} {task.state}, the end of {task.log}:\n" + "".join(f"  | {line}\n" for line in last)
