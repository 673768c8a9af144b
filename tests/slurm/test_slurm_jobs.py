"""A real Slurm of two logical nodes: one command runs all stages, pre-empted jobs go on, failures stop what follows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import Run, copy_parts
from fledge.models.formats.plain import WEIGHTS
from fledge.slurm.jobs.records import JobRecord, read_events, read_submission
from fledge.train.metrics.tracking import read_metrics
from safetensors.torch import load_file
from slurm_cluster import missing, slurm, slurm_cluster, wait_until

pytestmark = pytest.mark.slurm
TWO_NODES = ("train.packs_per_step=2",)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Path]:
    assert not missing(), f"{missing()} must be installed: make test-slurm"
    with slurm_cluster() as folder:
        yield folder


def quoted(path: Path) -> str:
    """Quote a path for Hydra."""
    return "'{}'".format(str(path).replace("'", "\\'"))


@dataclass
class Submitted:
    """A run that `fledge submit` was started for, in a folder whose name has spaces and quotes."""

    run: Run

    def __call__(self, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Submit; the exit code must be `code`."""
        environment = Path(sys.prefix)
        arguments = [a for a in self.run.arguments(*TWO_NODES, *options) if not a.startswith("runs_dir=")]
        arguments += [f"runs_dir={quoted(self.run.folder)}", "cluster=one_machine", f"cluster.venv={environment}"]
        done = fledge("submit", *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    @property
    def folder(self) -> Path:
        jobs = self.run.path / "jobs"
        return max((path for path in jobs.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))

    def record(self, stage: str) -> JobRecord:
        return next(job for job in read_submission(self.folder)[1] if job.stage == stage)

    def job(self, stage: str) -> str:
        """Give the id of a job, of an array that of its last task."""
        record = self.record(stage)
        return record.id if record.tasks is None else f"{record.id}_{record.tasks - 1}"

    def events(self, name: str) -> list[str]:
        return [event.kind for event in read_events(self.folder, name)]

    def wait_for(self, *names: str, seconds: float = 300) -> None:
        """Wait until tasks have ended."""
        try:
            wait_until(
                lambda: all(self.events(name)[-1:] in (["done"], ["failed"], ["cancelled"]) for name in names),
                seconds,
                1,
            )
        except AssertionError:
            raise AssertionError(self.told()) from None

    def start_again(self, stage: str) -> None:
        """Have Slurm start the requeued job of a stage at once."""
        start_again(self.job(stage))

    def told(self) -> str:
        """Give what `fledge status` prints."""
        done = fledge("status", str(self.run.path))
        assert done.returncode == 0, done.stderr
        return done.stdout


def start_again(job: str) -> None:
    """Have Slurm start a requeued job at once: it would wait two minutes."""
    wait_until(lambda: "JobState=PENDING" in slurm("scontrol", "show", "job", job), 60)
    time.sleep(2)  # slurmd refuses a job within the second in which its last start was revoked
    slurm("scontrol", "update", f"jobid={job}", "starttime=now")


def fledge(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fledge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def submitted(tmp_path: Path, tiny_verifier_folder: Path) -> Submitted:
    return Submitted(Run(tmp_path / 'it\'s "the" place', tiny_verifier_folder))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that put the verifier behind a server."""
    command = "[transformers,serve,'{model}',--device,cpu,--host,127.0.0.1,--port,'{port}']"
    hub = f"cluster.server.env.HF_HUB_CACHE={quoted(tmp_path_factory.mktemp('hub'))}"
    offline = "cluster.server.env.HF_HUB_OFFLINE='1'"
    return ["cluster.server.kind=custom", f"cluster.server.command={command}", hub, offline]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, tiny_verifier_folder: Path, served: list[str]) -> Submitted:
    """A run of which Slurm has done every stage."""
    folder = tmp_path_factory.mktemp("it's the pipeline")
    whole = Submitted(Run(folder / "runs", tiny_verifier_folder))
    whole(*served)
    whole.wait_for("evaluate", "export", "server-0")
    return whole


def test_an_adaptation_is_one_job_and_goes_on_when_it_is_requeued(finished, tmp_path):
    run = Run(tmp_path / "runs", finished.verifier)
    options = [f"adapt.head={finished.path}", "data.heldout_share=0.3", "train.max_steps=24", "train.save_every=3"]
    said = [f"--output={tmp_path / 'job.log'}", "--open-mode=append", "--requeue"]
    job = slurm("sbatch", "--parsable", *said, "--wrap", shlex.join(run.command("adapt", *options))).strip()
    wait_until((run.path / "training" / "checkpoints" / "step-3").is_dir, 300)
    slurm("scontrol", "requeue", job)
    start_again(job)
    wait_until((run.path / "adaptation.md").is_file, 300)
    assert re.search(r"going on from step \d+", (tmp_path / "job.log").read_text())


def accepted(run: Run) -> float:
    return float(json.loads((run.path / "evaluation" / "acceptance.json").read_text())["acceptance_length"])


def test_one_command_runs_every_stage_and_the_head_accepts_as_without_slurm(pipeline, tmp_path):
    names = ["server-0", "synthesize-0", "synthesize-1", "dump-0", "dump-1", "train", "evaluate", "export"]
    assert all(pipeline.events(name)[-1] == "done" for name in names), pipeline.told()
    assert "healthy" in pipeline.events("server-0")
    assert "2 process(es)" in pipeline.record("train").log(pipeline.folder, 0).read_text()
    assert (pipeline.run.path / "exports" / "plain" / WEIGHTS).is_file()
    alone = Run(tmp_path, pipeline.run.verifier)
    alone("run", *TWO_NODES)
    assert accepted(pipeline.run) == pytest.approx(accepted(alone), abs=0.05)
    assert accepted(alone) > 1.5


def test_status_needs_no_slurm(pipeline, monkeypatch):
    with_slurm = pipeline.told()
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert pipeline.told() == with_slurm
    for line in (
        "synthesize done       64 of 64 conversations",
        "train      done       step 24 of 24",
        "export     done",
    ):
        assert line in with_slurm


def last_step(training: Path) -> int:
    return max((metrics["step"] for metrics in read_metrics(training)), default=0)


def test_training_preempted_twice_gives_the_weights_of_an_uninterrupted_one(pipeline, submitted):
    options = ("submit.stages=[train]", "train.max_steps=400", "train.log_every=1", "train.save_every=400")
    options = (*options, "train.heldout_every=400")
    copy_parts(pipeline.run, submitted.run)
    submitted(*options)
    job, step, training = submitted.record("train").id, 0, submitted.run.path / "training"
    # As before the time limit: to the shell of the job. As before a pre-emption: to the tasks.
    for signal in (["--signal=USR1", "--batch"], ["--signal=TERM"]):
        wait_until(lambda: last_step(training) > step + 10, 120, 0.02)  # noqa: B023
        slurm("scancel", *signal, job)
        wait_until(lambda: submitted.events("train")[-1] == "again", 60)
        step, before = last_step(training), step
        assert before < step < 400
        submitted.start_again("train")
    submitted.wait_for("train")
    assert submitted.events("train").count("begun") == 3
    told = submitted.told()
    assert "step 400 of 400" in told
    assert "start 3" in told
    whole = Submitted(Run(submitted.run.folder, submitted.run.verifier, name="uninterrupted"))
    copy_parts(pipeline.run, whole.run)
    whole(*options)
    whole.wait_for("train")
    assert whole.events("train") == ["begun", "done"]
    ours, theirs = (
        load_file(run.path / "training" / "checkpoints" / "step-400" / WEIGHTS) for run in (submitted.run, whole.run)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_every_stage_preempted_goes_on_and_those_that_wait_for_it_begin_then(submitted):
    options = ("data.sources=[{path:embedded,limit:1500}]", "evaluate.questions_per_category=null")
    stages = "submit.stages=[synthesize,dump,train,evaluate]"
    submitted(*options, stages, "evaluate.max_tokens=96", "evaluate.batch_size=1", "evaluate.baselines=false")
    grows = {
        "synthesize": "conversations/part-00001-of-00002/conversations.jsonl",
        "dump": "hidden_states/shard-*.safetensors",
        "evaluate": "evaluation/questions.jsonl",
    }
    kept: dict[Path, bytes] = {}
    for stage, pattern in grows.items():
        name = submitted.record(stage).names[-1]
        wait_until(lambda: any(p.stat().st_size for p in submitted.run.path.glob(pattern)), 180, 0.01)  # noqa: B023
        slurm(
            "scancel", *(["--signal=TERM"] if stage == "dump" else ["--signal=USR1", "--batch"]), submitted.job(stage)
        )
        wait_until(lambda: submitted.events(name)[-1] in ("again", "done"), 60)  # noqa: B023
        assert submitted.events(name)[-1] == "again", f"{stage} was at its end before the signal came"
        kept |= {path: path.read_bytes() for path in submitted.run.path.glob(pattern)}
        submitted.start_again(stage)
    submitted.wait_for("evaluate")
    for stage in grows:
        *others, last = submitted.record(stage).names
        assert submitted.events(last).count("begun") == 2
        assert all(submitted.events(other) == ["begun", "done"] for other in others), "one task is not the array"
    assert len(kept) > len(grows)
    assert all(path.read_bytes().startswith(content) for path, content in kept.items()), "nothing is made twice"
    told = submitted.told()
    assert "1500 of 1500 conversations" in told
    assert told.count("done") >= 4


def test_nothing_runs_twice_at_once(pipeline, submitted):
    options = ("submit.stages=[train]", "train.max_steps=100000", "train.log_every=1")
    copy_parts(pipeline.run, submitted.run)
    submitted(*options, "cluster.train.nodes=1")
    wait_until(lambda: read_metrics(submitted.run.path / "training"), 120)
    job = submitted.record("train").id
    assert f"job {job} (train)" in submitted(*options, code=2).stderr
    other = slurm("sbatch", "--parsable", str(submitted.folder / "train.sbatch")).strip()  # by hand
    wait_until(lambda: "failed" in submitted.events("train"), 60)
    failed = next(event for event in read_events(submitted.folder, "train") if event.kind == "failed")
    assert failed.job == other
    assert f"job {job} is at work on it" in failed.detail
    slurm("scancel", job)
    wait_until(lambda: submitted.events("train")[-1] == "cancelled", 60)
    wait_until(lambda: "JobState=CANCELLED" in slurm("scontrol", "show", "job", job), 60)  # for good: not requeued
    assert "train      cancelled" in submitted.told()


def test_a_cancelled_array_does_not_come_back(submitted):
    submitted("submit.stages=[synthesize,dump]", "data.sources=[{path:embedded,limit:1500}]")
    wait_until(lambda: len(list(submitted.run.path.glob("conversations/part-*/conversations.jsonl"))) == 2, 120)
    array = submitted.record("synthesize").id
    slurm("scancel", array)
    wait_until(lambda: all(submitted.events(f"synthesize-{task}")[-1] == "cancelled" for task in range(2)), 60)
    wait_until(lambda: slurm("scontrol", "show", "job", array).count("JobState=CANCELLED") == 2, 60)
    told = submitted.told()
    assert "synthesize cancelled" in told
    assert "dump       cancelled" in told


def test_a_failing_stage_stops_what_follows_and_ends_the_server(submitted, tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "health").touch()  # a server that is well, but of no model
    command = f"[python,-m,http.server,'{{port}}',--directory,{tmp_path}/www]"
    submitted("cluster.server.kind=custom", f"cluster.server.command={command}", "synthesize.retries=0")
    submitted.wait_for("synthesize-0", "synthesize-1", "server-0", seconds=120)
    wait_until(lambda: "JobState=CANCELLED" in slurm("scontrol", "show", "job", submitted.record("export").id), 60)
    assert submitted.events("server-0")[-1] == "done"
    told = submitted.told()
    assert "synthesize-0: job " in told
    assert "failed: exit code 2" in told
    assert "fledge: error: " in told, "the end of its log"
    for stage in ("dump", "train", "evaluate", "export"):
        assert f"{stage:<10} cancelled" in told
    assert told.count("synthesize failed") >= 4


def test_a_server_that_does_not_start_fails_the_array(submitted):
    submitted("cluster.server.kind=custom", "cluster.server.command=[sh,-c,'exit 3','{port}']")
    submitted.wait_for("synthesize-0", "synthesize-1", "server-0", seconds=120)
    told = submitted.told()
    assert "the server ended with exit code 3 before it answered" in told
    assert "every server has failed" in told


def test_a_server_that_dies_is_started_again_and_asked_again(submitted, served):
    options = ("submit.stages=[synthesize]", "cluster.synthesize.tasks=1")
    submitted(*served, *options, "data.sources=[{path:embedded,limit:150}]", "synthesize.concurrency=2")
    conversations = submitted.run.path / "conversations" / "conversations.jsonl"
    wait_until(lambda: conversations.is_file() and conversations.stat().st_size, 120, 0.05)
    slurm("scancel", "--signal=KILL", f"{submitted.job('server')}.0")  # its step: the server, not the job
    wait_until(lambda: submitted.events("server-0")[-1] == "again", 60)
    before = conversations.read_bytes()
    submitted.start_again("server")
    submitted.wait_for("synthesize-0", "server-0")
    assert submitted.events("server-0") == ["begun", "healthy", "again", "begun", "healthy", "done"]
    assert submitted.events("synthesize-0") == ["begun", "done"], "it has found the new address"
    assert conversations.read_bytes().startswith(before)
    assert "150 of 150 conversations" in submitted.told()


def test_starts_without_progress_are_bounded(submitted, tmp_path):
    again = tmp_path / "again"
    again.write_text("#!/bin/sh\nexit 75\n")
    again.chmod(0o755)
    submitted("submit.stages=[export]", f"cluster.python={again}", "cluster.max_restarts=2")
    wait_until(lambda: submitted.events("export")[-1:] == ["again"], 60)
    submitted.start_again("export")
    submitted.wait_for("export", seconds=60)
    assert submitted.events("export") == ["begun", "again", "begun", "failed"]
    assert "2 starts in a row brought no progress" in submitted.told()
