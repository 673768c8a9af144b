"""What Slurm's commands say, read among whatever else they print."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from fledge.slurm.jobs.queue import _parse, array_tasks, submit_file
from fledge.slurm.jobs.render import TEMPLATES


def as_commands(folder: Path, monkeypatch, **scripts: str) -> None:
    """Put commands on PATH, each a line of bash."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


BANNER = r"printf 'Welcome, 12 users\n--> Checking 3 queues (login4)...OK\n\n'; "


@pytest.mark.parametrize(
    "said",
    [
        "echo 4711",
        "echo '4711;alps'",
        BANNER + "echo 4711",
        BANNER + "echo '4711;alps'; echo; echo Good luck",
        r"printf '4711 \r\n'",
        "echo 'Submitted batch job 4711'",
        "echo 'Submitted batch job 4711 on cluster alps'; echo 'sbatch: 5 jobs' >&2",
    ],
)
def test_the_id_of_a_job_is_found_among_whatever_sbatch_says(tmp_path, monkeypatch, said):
    as_commands(tmp_path / "bin", monkeypatch, sbatch=said)
    assert submit_file(tmp_path / "a.sbatch", None) == "4711"


@pytest.mark.parametrize("said", ["true", "echo Welcome", "echo 'job 12 of user 7'; echo submitted >&2"])
def test_an_sbatch_that_names_no_job_is_quoted(tmp_path, monkeypatch, said):
    as_commands(tmp_path / "bin", monkeypatch, sbatch=said)
    with pytest.raises(
        ValueError, match=r"sbatch names no job for .*a\.sbatch, it says '.*': see with squeue"
    ) as caught:
        submit_file(tmp_path / "a.sbatch", None)
    assert said == "true" or said.split()[1].strip("';") in str(caught.value)


def test_jobs_see_the_states_of_jobs_among_whatever_squeue_says(tmp_path, monkeypatch):
    def told(function: str) -> bool:
        command = f"SLURM_JOB_ID=7; . {TEMPLATES / 'common.sh'}; {function}"
        return subprocess.run(["bash", "-c", command], check=False).returncode == 0

    for state, running, cancelled in (("RUNNING None", 1, 0), ("CANCELLED None", 0, 1), ("", 0, 0)):
        shown = f"[[ $* == *'%T %r'* ]] && echo '{state}' || echo '{state.partition(' ')[0]}'"
        for before in ("", BANNER, "echo 'squeue: warning' >&2; "):
            as_commands(tmp_path / "bin", monkeypatch, squeue=before + shown)
            assert (told("is_running 7"), told("is_cancelled")) == (running, cancelled), (state, before)


@pytest.mark.parametrize("stage", ["run bash -c 'exit 75'", "serve http://127.0.0.1:1/v1 60 bash -c 'exit 143'"])
def test_the_signal_that_ends_a_start_for_the_next_is_no_news(tmp_path, monkeypatch, stage):
    """Slurm sends it as soon as it has taken the request, while the job's shell may still live."""
    job = "server-0" if stage.startswith("serve") else "train"
    (tmp_path / "jobs").mkdir()
    requeue = 'kill -s TERM "$(<"$jobs/../shell")"; sleep 0.2; exit 0'
    as_commands(tmp_path / "bin", monkeypatch, squeue="echo RUNNING None", scontrol=requeue)
    settings = f"export jobs='{tmp_path / 'jobs'}' artifact='{tmp_path}' grows=none max_restarts=3 SLURM_JOB_ID=7"
    text = f'{settings}; echo $$ >"{tmp_path / "shell"}"; . {TEMPLATES / "common.sh"}; begin {job}; {stage}'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 75, done.stderr
    lines = (tmp_path / "jobs" / "events" / job).read_text().splitlines()
    assert [line.split("\t")[2] for line in lines] == ["begun", "again"]


def test_jobs_are_read_as_slurm_shows_them():
    line = (
        "JobId=8 ArrayJobId=3 ArrayTaskId=0 JobName=x JobState=FAILED Reason=NonZeroExitCode Requeue=1 "
        "Restarts=2 BatchFlag=1 Reboot=0 ExitCode=2:0 NodeList=n0 ReqNodeList=(null)"
    )
    state = _parse(line)
    assert (state.tasks, state.state, state.reason) == ({0}, "FAILED", "NonZeroExitCode")
    assert (state.exit_code, state.nodes, state.live) == ("2:0", "n0", False)
    assert _parse(line.replace("ArrayTaskId=0 ", "ArrayTaskId=2-3,7%4 ")).tasks == {2, 3, 7}
    for named in ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESIZING", "REQUEUE_FED", "RESV_DEL_HOLD"):
        assert _parse(line.replace("FAILED", named)).live, "it may still run"


def test_tasks_of_an_array_are_read_as_slurm_writes_them():
    written = {"5": {5}, "0,2-5%4": {0, 2, 3, 4, 5}, "0-10:5": {0, 5, 10}, "1-3,8-9": {1, 2, 3, 8, 9}, "0": {0}}
    assert {text: array_tasks(text) for text in written} == written
    assert array_tasks("") is None
    assert array_tasks("1-3,5,...") is None
