"""What is told of jobs, and of runs of which only artifacts are left."""

from __future__ import annotations

import re
from pathlib import Path

from builders import copy_folder
from commands import fledge
from fledge.conf.schema import Config
from fledge.slurm.jobs.queue import _parse
from fledge.slurm.jobs.records import JobRecord, write_submission
from fledge.slurm.status import CANCELLED, DONE, FAILED, WAITING, TaskStatus, _name_causes, status, task_statuses


def test_what_waits_says_nothing_of_tasks_that_slurm_has_forgotten(tmp_path, monkeypatch):
    (tmp_path / "events").mkdir()
    ended = {"0": "done\t", "2": "again\tstopped by SIGUSR1"}
    for task, told in ended.items():
        (tmp_path / "events" / f"dump-{task}").write_text(f"t0\t8\tbegun\tn0, start 1\nt1\t8\t{told}\n")
    record = JobRecord("dump", "dump.sbatch", "3", 6)

    def told(*lines: str) -> list[tuple[str, str]]:
        monkeypatch.setattr("fledge.slurm.status.job_states", lambda _: [_parse(line) for line in lines])
        return [(task.state, task.detail) for task in task_statuses(tmp_path, record)]

    waiting = "JobId=3 ArrayJobId=3 ArrayTaskId=4-5%4 JobState=PENDING Reason=JobArrayTaskLimit"
    left = (CANCELLED, "left the queue without having begun")
    again = (CANCELLED, "left the queue without having begun again")
    later = (WAITING, "JobArrayTaskLimit")
    assert told(waiting) == [(DONE, ""), left, again, left, later, later]
    assert told() == [(DONE, ""), left, again, left, left, left]
    held = "JobId=4 ArrayJobId=3 ArrayTaskId=2 JobState=REQUEUE_HOLD Reason=job_requeued_in_held_state"
    assert told(held)[2][0] == WAITING
    assert told(held)[2][1].startswith("requeue_hold, job_requeued_in_held_state, last: stopped by SIGUSR1")


def make_submission(run_folder: Path, events: dict[str, str]) -> Path:
    folder = run_folder / "jobs" / "1"
    (folder / "events").mkdir(parents=True)
    (folder / "logs").mkdir()
    jobs = [JobRecord("dump", "dump.sbatch", "3", 2)]
    jobs += [JobRecord(stage, f"{stage}.sbatch", str(id_), None) for id_, stage in enumerate(("train", "evaluate"), 4)]
    write_submission(folder, {"submitted": "today", "git": {"commit": "a" * 40, "dirty": True}}, jobs)
    for name, text in events.items():
        (folder / "events" / name).write_text(text)
    return folder


def test_a_failed_evaluation_is_no_cause_for_an_export(tmp_path):
    stages = (("dump", DONE), ("train", DONE), ("evaluate", FAILED), ("export", WAITING))
    tasks = {stage: [TaskStatus(stage, "1", state, "", tmp_path)] for stage, state in stages}
    _name_causes(tasks)
    assert tasks["export"][0].state == WAITING
    tasks["train"][0].state = FAILED
    _name_causes(tasks)
    assert (tasks["export"][0].state, tasks["export"][0].detail) == (CANCELLED, "train failed")


def test_status_tells_what_failed_and_why_from_events_alone(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/none")
    run_folder = tmp_path / "it's a run"
    for name in ("prompts", "conversations", "hidden_states"):
        copy_folder(finished.path / name, run_folder / name)
    began, done = "t0\t8\tbegun\tn0, start 1\n", "t1\t8\tdone\t\n"
    failed = "t1\t4\tagain\tstopped by SIGUSR1\nt2\t4\tbegun\tn0, start 2\nt3\t4\tfailed\texit code 2\n"
    folder = make_submission(run_folder, {"dump-0": began + done, "dump-1": began, "train": began + failed})
    (folder / "logs" / "train-4.log").write_text("many\nlines\nfledge: error: the disk is full\n")
    config = Config()
    config.status.run, config.status.lines = str(run_folder), 2
    status(config)
    out = capsys.readouterr().out
    for text in (
        "commit aaaaaaaaaa with changes",
        "synthesize done       64 of 64 conversations",
        "1 done, 1 running",
        "dump-1: job 3_1 running: since t0",
        "train: job 4 failed: exit code 2, start 2",
        "evaluate: job 5 cancelled: train failed",
        "export     not submitted",
        "  | lines\n  | fledge: error: the disk is full\n",
    ):
        assert text in out, out
    assert "many" not in out


def test_status_of_a_run_that_was_not_submitted_is_that_of_its_artifacts(finished):
    by_name = fledge("status", finished.name, f"runs_dir={finished.folder}")
    assert by_name.returncode == 0, by_name.stderr
    assert "never submitted" in by_name.stdout
    assert re.search(r"train +done +step 24 of 24, loss \d", by_name.stdout)
    assert re.search(r"evaluate +done +acceptance length \d\.\d\d\n", by_name.stdout)
    assert fledge("status", str(finished.path)).stdout == by_name.stdout
    missing = fledge("status", "nowhere")
    assert missing.returncode == 2
    assert "runs/nowhere is not there" in missing.stderr
