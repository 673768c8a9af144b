"""Metrics arrive where they are wanted, once, and no tracker ever stops or delays a run for long."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from commands import run_command
from evaluations import evaluation, question_record
from fledge.conf.cli import main
from fledge.conf.runtime.artifact import artifact
from fledge.conf.schema import Config, TrackerName, TrackingConfig, WandbMode
from fledge.train.metrics.tracking import Tracker, git_state, read_metrics, run_description
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

NO_KEY = {"WANDB_API_KEY": None, "WANDB_MODE": None, "WANDB_BASE_URL": None}
UNREACHABLE = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "3"}


def environment(home: Path, changes: dict[str, str | None]) -> dict[str, str]:
    """Give this process's environment, with no settings of W&B but those given (None: without)."""
    values = {
        **os.environ,
        "WANDB_CONFIG_DIR": str(home),
        "NETRC": str(home / "none"),
        "OMP_NUM_THREADS": "1",
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read TensorBoard's event files as TensorBoard does."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_the_table_names_every_metric_that_is_recorded(finished):
    page = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
    table = set(re.findall(r"`((?:train|heldout)/[^`]*)`", page.read_text()))
    recorded = {name for record in read_metrics(finished.path / "training") for name in record if name != "step"}
    assert {re.sub(r"_step_\d+$", "_step_<k>", re.sub(r"(length|t1)_\d+$", r"\1_<n>", name)) for name in recorded} == (
        table - {"train/skipped_steps"} | {"train/skipped_steps"} & recorded
    )


def test_a_run_without_network_is_trained_with_one_warning_and_tensorboard_shows_it(finished, run, tmp_path):
    run.path.mkdir(parents=True)
    (run.path / "hidden_states").symlink_to(finished.path / "hidden_states")
    options = ["tracking.wandb=online", "tracking.tensorboard=true", "train.max_steps=3", "train.log_every=1"]
    done = run_command(run.command("train", *options), env=environment(tmp_path, {**NO_KEY, **UNREACHABLE}))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B is left out") == 1
    records = read_metrics(run.path / "training")
    assert [r["step"] for r in records] == [1, 2, 3, 3]
    shown = curves(run.path / "training")
    assert shown.keys() == {name for record in records for name in record if name != "step"}
    for name, points in shown.items():
        assert points == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in records if name in r]
    assert "τ@3" in done.stderr.splitlines()[-1]
    assert " tokens/s " in done.stderr.splitlines()[-1]


TRACK = """
import json, logging, sys, time
from pathlib import Path
from fledge.conf.schema import TrackingConfig, WandbMode
from fledge.train.metrics.tracking import Tracker
logging.basicConfig(level=logging.WARNING)
started = time.monotonic()
options = TrackingConfig(wandb=WandbMode(sys.argv[2]), project="p")
tracker = Tracker(options, Path(sys.argv[1]), 0, "id", "name", {"train": {"lr": 1e-3}})
for step in range(1, 6):
    if step == 3 and sys.argv[3] == "kill":
        import psutil
        for child in psutil.Process().children(recursive=True):
            child.kill()
            child.wait()
    tracker.log(step, {"train/loss": 1 / step})
tracker.close()
print(time.monotonic() - started)
"""


EVALUATED = """
import json, logging, sys, types
from pathlib import Path
sys.modules |= {name: types.ModuleType(name) for name in sys.argv[4:]}
from fledge.conf.schema import Config, TrackingConfig, VerifierConfig, WandbMode
from fledge.eval.figures.wandb_summary import track
logging.basicConfig(level=logging.WARNING)
run = Path(sys.argv[1])
tracking = TrackingConfig(wandb=WandbMode(sys.argv[2]), project="p")
config = Config(name=run.name, runs_dir=str(run.parent), verifier=VerifierConfig(path="v"), tracking=tracking)
results = json.loads((run / "evaluation" / "acceptance.json").read_text())
track(config, Path(sys.argv[3]), {"of": "the evaluation"}, run / "evaluation", results)
"""


def evaluated(run: Path, mode: str, head: Path, changes: dict[str, str | None]) -> str:
    """Track the evaluation of a run in a process of its own; give its warnings."""
    command = [sys.executable, "-c", EVALUATED, str(run), mode, str(head)]
    done = run_command(command, env=environment(run.parent, {**NO_KEY, **changes}))
    assert done.returncode == 0, done.stderr
    return done.stderr


def wandb_records(path: Path) -> Iterator[Record]:
    """Read a .wandb file: after seven bytes LevelDB's log, in blocks of 32 KiB."""
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def recorded(folder: Path) -> tuple[str, dict[str, object]]:
    """Read id and summary of the one W&B run in a folder."""
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    name, summary = "", {}
    for record in wandb_records(path):
        name = record.run.run_id or name
        summary |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
    return name, summary


def test_an_evaluation_adds_its_figures_to_the_summary_of_the_run_that_trained_the_head(tmp_path):
    run = tmp_path / "first"
    results = evaluation(run, [question_record([3, i % 4], [0], name=f"q/{i}", category="stem") for i in range(6)])
    with artifact(run / "training", "training", {}) as target:
        target.finish(wandb_run="a1b2c3")
    assert "W&B" not in evaluated(run, "offline", run / "training" / "checkpoints" / "step-1", {})
    name, summary = recorded(run / "evaluation")
    assert name == "a1b2c3"
    shown = {key.removeprefix("evaluation/"): value for key, value in summary.items() if key.startswith("evaluation/")}
    assert shown["acceptance_length"] == shown["acceptance_length_stem"] == pytest.approx(1 + 25 / 18)
    assert [shown[f"acceptance_position_{i}"] for i in (1, 2, 3)] == pytest.approx(results["acceptance_rate_per_pos"])
    assert shown["speedup"] == pytest.approx(results["speedup"])
    assert [shown[f"speedup_{end}"] for end in ("low", "high")] == pytest.approx(results["speedup_interval"])
    assert (shown["condition_drafting"], shown["condition_num_draft_tokens_per_round"]) == ("chain", 3)


def test_an_evaluation_of_a_head_made_elsewhere_has_a_wandb_run_of_its_own(tmp_path):
    run = tmp_path / "first"
    evaluation(run, [question_record([3, 1], name=f"q/{i}") for i in range(3)])
    with artifact(run / "training", "training", {}) as target:
        target.finish(wandb_run="a1b2c3")
    evaluated(run, "offline", run / "imports" / "head", {})
    name, summary = recorded(run / "evaluation")
    assert name not in ("", "a1b2c3")
    assert "evaluation/acceptance_length" in summary


@pytest.mark.parametrize(("mode", "changes"), [("online", {}), ("online", UNREACHABLE), ("disabled", {})])
def test_wandb_never_stops_an_evaluation(tmp_path, mode, changes):
    evaluation(tmp_path / "first", [question_record([3, 1], name=f"q/{i}") for i in range(3)])
    warnings = evaluated(tmp_path / "first", mode, tmp_path / "first" / "imports" / "head", changes)
    assert warnings.count("W&B is left out") == (mode == "online")
    if mode == "disabled":
        assert not (tmp_path / "first" / "evaluation" / "wandb").exists()


SERVICE = """
import atexit, subprocess, sys
from fledge.conf.runtime import trackers
service = subprocess.Popen(["wandb-core", "60"], executable=sys.argv[1])
atexit.register(service.wait)  # as W&B does, without a limit
trackers._SERVICE_SECONDS = 0.2
trackers._end_wandb_at_exit()
"""


def test_a_service_of_wandb_that_does_not_end_is_killed_at_exit(tmp_path):
    (tmp_path / "wandb-core").symlink_to(shutil.which("sleep"))
    started = time.monotonic()
    run_command([sys.executable, "-c", SERVICE, str(tmp_path / "wandb-core")])
    assert time.monotonic() - started < 30


# W&B advertises if it finds such a package.
@pytest.mark.parametrize(
    "packages", [[], ["openai"], ["anthropic"], ["litellm", "mcp"]], ids=lambda names: "+".join(names)
)
def test_wandb_says_nothing_in_the_midst_of_results(tmp_path, packages):
    run = tmp_path / "first"
    evaluation(run, [question_record([3, 1], name=f"q/{i}") for i in range(3)])
    command = [sys.executable, "-c", EVALUATED, str(run), "offline", str(run / "imports" / "head"), *packages]
    done = run_command(command, env=environment(run.parent, NO_KEY))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("mode", "changes", "kill"),
    [
        ("online", NO_KEY, ""),
        ("online", UNREACHABLE, ""),
        ("offline", NO_KEY, "kill"),
        ("offline", NO_KEY, ""),
    ],
    ids=["no key", "unreachable", "its process dies", "offline"],
)
def test_wandb_never_stops_training_and_warns_once(tmp_path, mode, changes, kill):
    command = [sys.executable, "-c", TRACK, str(tmp_path), mode, kill]
    done = run_command(command, env=environment(tmp_path, {**NO_KEY, **changes}))
    assert done.returncode == 0, done.stderr
    works = mode == "offline" and not kill
    assert done.stderr.count("W&B is left out") == (0 if works else 1), done.stderr
    assert kill or len(done.stderr.splitlines()) == (0 if works else 1), f"W&B itself says something: {done.stderr}"
    assert float(done.stdout.splitlines()[-1]) < 30
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert bool(list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))) == (mode == "offline")


def test_resumed_records_show_every_step_once(tmp_path):
    options = TrackingConfig(wandb=WandbMode.disabled, tensorboard=True)
    for start, value in ((0, 1.0), (3, 2.0)):  # killed after step 5, its last checkpoint at step 3
        tracker = Tracker(options, tmp_path, start, "run", "name", {})
        for step in range(start + 1, start + 6):
            tracker.log(step, {"train/loss": value})
        tracker.close()
        time.sleep(1.1)  # event files are ordered by their second
    expected = [(step, 1.0 if step <= 3 else 2.0) for step in range(1, 9)]
    assert [(r["step"], r["train/loss"]) for r in read_metrics(tmp_path)] == expected
    assert curves(tmp_path) == {"train/loss": expected}


class Recorded:
    """A tracker as accelerate has them, which notes its calls and fails at a step if it is to."""

    requires_logging_directory = False
    calls: ClassVar[list[tuple[Any, ...]]] = []
    fails_at = 0

    def __init__(self, project: str, **options: str) -> None:
        self.calls.append((project, options))

    def start(self) -> None:
        self.calls.append(("start",))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("about", values))

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("fails_at", [0, 2])
def test_further_trackers_of_accelerate_get_every_step_until_they_fail(fails_at, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorded)
    monkeypatch.setattr(Recorded, "calls", [])
    monkeypatch.setattr(Recorded, "fails_at", fails_at)
    options = TrackingConfig(report_to=[TrackerName.trackio, TrackerName.tensorboard], project="p")
    tracker = Tracker(options, tmp_path, 0, "run", "name", {"train": {"lr": 0.1, "betas": [0.9, 0.95]}, "git": None})
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.close()
    about = {"train.lr": 0.1, "train.betas": "[0.9, 0.95]", "git": "None"}
    steps = [(step, {"train/loss": 1 / step}) for step in (1, 2, 3)]
    expected = [("p", {"name": "name"}), ("start",), ("about", about), *steps, ("finish",)]
    assert Recorded.calls == (expected[:4] if fails_at else expected)
    assert caplog.text.count("trackio is left out (the server is gone)") == bool(fails_at)
    assert curves(tmp_path) == {"train/loss": [(s, pytest.approx(1 / s)) for s in (1, 2, 3)]}
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["wandb"]),
        ({"wandb": WandbMode.disabled}, []),
        ({"tensorboard": True}, ["wandb", "tensorboard"]),
        ({"report_to": [TrackerName.tensorboard], "tensorboard": True}, ["tensorboard"]),
        ({"report_to": []}, []),
    ],
)
def test_the_older_options_of_wandb_and_tensorboard_keep_their_meaning(options, expected):
    assert [tracker.value for tracker in TrackingConfig(**options).trackers] == expected


@pytest.mark.parametrize(
    ("package", "override", "message"),
    [
        (
            "trackio",
            "tracking.report_to=[wandb,trackio]",
            "tracking.report_to needs the package trackio, which is not installed: pip inst",
        ),
        ("tensorboard", "tracking.tensorboard=true", "tracking.tensorboard needs the package tensorboard"),
    ],
)
def test_a_tracker_that_is_not_installed_is_asked_for_before_anything_is_done(
    capfd, monkeypatch, tmp_path, package, override, message
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as exit_:
        main(["train", "experiment=demo", "name=x", f"runs_dir={tmp_path}", override])
    assert exit_.value.code == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", "-C", str(folder), *names, *arguments], capture_output=True, check=True, env=clean)
    return done.stdout.decode().strip()


def test_the_git_state_is_that_of_the_folder_itself(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None, "no commit yet"
    (tmp_path / "inside").mkdir()
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(tmp_path) == clean
    assert git_state(tmp_path / "inside") is None, "installed into an environment within another project"
    (tmp_path / "file").write_text("2")
    assert git_state(tmp_path) == {**clean, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_what_is_logged_of_a_run_holds_every_option_and_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    monkeypatch.setenv("HF_TOKEN", "another-secret")
    config = Config(name="x")
    config.verifier.path = "somewhere"
    config.train.lr = 3e-4
    about = run_description(config, {"hidden_states": "abc"}, {"attention": {"used": False}})
    text = json.dumps(about)
    assert "secret" not in text
    assert about["train"]["lr"] == 3e-4
    assert about["train"]["dtype"] == "bfloat16"
    assert about["evaluate"].keys() == vars(config.evaluate).keys()
    assert about["inputs"] == {"hidden_states": "abc"}
    assert about["kernels"] == {"attention": {"used": False}}
    assert {"git", "fledge"} <= about.keys()
