"""`fledge status RUN`: where a submitted run stands, by Slurm, the events of its jobs, and its artifacts."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..conf.runtime.frozen import FROZEN
from ..conf.schema import STAGES, Config
from .jobs.queue import HELD, QUEUED, JobState, job_states
from .jobs.records import JobRecord, read_events, read_submission, submissions
from .jobs.render import stage_before
from .jobs.stage_progress import stage_progress

_TAIL_BYTES = 1 << 16
DONE, RUNNING, WAITING, FAILED, CANCELLED, UNKNOWN = "done", "running", "waiting", "failed", "cancelled", "unknown"
_OF_SLURM = {"COMPLETED": DONE, "CANCELLED": CANCELLED, **dict.fromkeys(QUEUED, WAITING)}
_OF_EVENTS = {"again": WAITING, "done": DONE, "failed": FAILED, "cancelled": CANCELLED}
_OF_EVENTS |= dict.fromkeys(("begun", "healthy", "stopping"), RUNNING)


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
    folders = submissions(run_folder)
    folder = folders[max(folders)] if folders else None
    about, records = read_submission(folder) if folder else ({}, [])
    print(_heading(run_folder, folder, about))
    files = (folder / f"{FROZEN}.yaml" if folder else run_folder, run_folder / "training" / "config.yaml")
    options: Any = next((OmegaConf.to_container(OmegaConf.load(path)) for path in files if path.is_file()), {})
    progress = stage_progress(run_folder, options)
    tasks = {record.stage: task_statuses(folder, record) for record in records if folder}
    _name_causes(tasks)
    for stage in [*(stage for stage in tasks if stage not in STAGES), *STAGES]:
        print(_stage_line(stage, tasks.get(stage, []), *progress.get(stage, (False, ""))))
    for task in (task for of_stage in tasks.values() for task in of_stage):
        if task.state in (RUNNING, FAILED):
            print(_tail(task, config.status.lines), end="")


def find_run(config: Config) -> Path:
    """Return the folder of the run that `status.run` names, by path or name; ValueError if there is none."""
    run = config.status.run
    folders = [Path(run), Path(config.runs_dir) / run] if run else [config.run_folder]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise ValueError(f"status.run must be the folder of a run, or its name in runs_dir, and {folders[-1]} is not there")


def _heading(run_folder: Path, folder: Path | None, about: dict[str, Any]) -> str:
    if folder is None:
        return f"{run_folder}: never submitted; its artifacts tell:"
    if not about:
        return f"{run_folder}: {folder} was interrupted before it was submitted; the artifacts tell:"
    git = about.get("git")
    code = f", commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else ""
    return f"{run_folder}, submitted {about['submitted']} from {folder}{code}"


def task_statuses(folder: Path, record: JobRecord) -> list[TaskStatus]:
    """Return where the tasks of a submitted job stand: Slurm knows best; of jobs it has forgotten, their events."""
    states = job_states(record.id)
    by_task = {task: state for state in states or [] for task in state.tasks or ()}
    whole = next((state for state in states or [] if state.tasks is None), None)
    statuses = []
    for task, name in enumerate(record.names):
        state, detail = _merge(by_task.get(task, whole), states is not None, folder, name)
        job = record.id if record.tasks is None else f"{record.id}_{task}"
        statuses.append(TaskStatus(name, job, state, detail, record.log(folder, task)))
    return statuses


def _merge(slurm: JobState | None, slurm_answers: bool, folder: Path, name: str) -> tuple[str, str]:
    events = read_events(folder, name)
    last = events[-1] if events else None
    state = _OF_EVENTS.get(last.kind, UNKNOWN) if last else WAITING
    detail = "" if last is None else f"since {last.time}" if state == RUNNING else last.detail
    starts = sum(event.kind == "begun" for event in events)
    again = f"start {starts}" if starts > 1 else ""
    if slurm is None:
        if state == RUNNING and slurm_answers:
            return FAILED, "it ended without a word: killed, or its node was lost"
        if state == WAITING and slurm_answers:
            return CANCELLED, f"left the queue without having begun{' again' if last else ''}"
        return state, _joined(detail, again)
    says_why = state == FAILED
    state = _OF_SLURM.get(slurm.state, RUNNING if slurm.live else FAILED)
    if state == FAILED:
        return state, detail if says_why else f"{slurm.state.lower()}, {slurm.reason}, exit code {slurm.exit_code}"
    if state == RUNNING:
        return state, _joined(slurm.state.lower() if slurm.state != "RUNNING" else "", f"on {slurm.nodes}", again)
    if state == WAITING:
        held = slurm.state.lower() if slurm.state in HELD else ""
        before = f"last: {last.detail}" if last and last.kind == "again" else ""
        return state, _joined(held, slurm.reason, before, again)
    return state, _joined(slurm.reason.replace("None", "") if state == CANCELLED else "", again)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _name_causes(tasks: dict[str, list[TaskStatus]]) -> None:
    """Set the failed stage as the reason of jobs that can never begin."""
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
    state = ", ".join(f"{number} {name}" for name, number in counts.items()) or (DONE if complete else "not submitted")
    if len(counts) == 1:
        state = tasks[0].state
    line = f"{stage:<10} {state:<10} {progress}".rstrip()
    shown = [task for task in tasks if task.detail or (task.state != DONE and len(tasks) > 1)]
    if len(tasks) == 1 and not shown:
        return f"{line}  (job {tasks[0].job})"
    return "\n".join(
        [line, *(f"  {t.name}: job {t.job} {t.state}{f': {t.detail}' if t.detail else ''}" for t in shown)]
    )


def _tail(task: TaskStatus, lines: int) -> str:
    if not task.log.is_file():
        return f"{task.name} {task.state}, no log in {task.log}\n"
    with open(task.log, "rb") as file:
        file.seek(max(0, task.log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    last = text.replace("\r", "\n").splitlines()[-lines:] if lines > 0 else []
    return f"{task.name} {task.state}, the end of {task.log}:\n" + "".join(f"  | {line}\n" for line in last)
