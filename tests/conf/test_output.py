"""`fledge ... | head`: a command ends quietly when nobody reads it, and a stage goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation, question_record

SIGPIPE_EXIT = 141
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def unread(command: list[str], *streams: str, unbuffered: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of which nobody reads some of its streams, as after `| head` has ended."""
    reading, writing = os.pipe()
    os.close(reading)
    ends: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **dict.fromkeys(streams, writing)}
    environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1" if unbuffered else ""}
    try:
        return subprocess.run(command, text=True, check=False, timeout=120, env=environment, **ends)
    finally:
        os.close(writing)


def fledge(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fledge", *arguments]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-h"],
        ["--unbuffered", "-h"],
        ["--unbuffered", "--version"],
        ["train", "experiment=demo", "name=x", "--cfg", "job"],
        ["--unbuffered", "plan", "--help"],
        ["compare", "first", "first", "runs_dir=RUNS"],
        ["status", "first", "runs_dir=RUNS"],
        [
            "submit",
            "experiment=demo",
            "name=x",
            "runs_dir=RUNS",
            "cluster=one_machine",
            "train.packs_per_step=2",
            "--dry-run",
        ],
    ],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_a_command_that_nobody_reads_ends_as_unix_tools_do(tmp_path, arguments):
    evaluation(tmp_path / "first", [question_record([2, 1], name=f"q/{i}") for i in range(4)])
    command = fledge(*(argument.replace("RUNS", str(tmp_path)) for argument in arguments if argument != "--unbuffered"))
    done = unread(command, "stdout", unbuffered="--unbuffered" in arguments)
    assert (done.returncode, done.stderr) == (SIGPIPE_EXIT, "")


def test_what_is_wrong_is_told_on_the_stream_that_is_read(tmp_path):
    done = unread(fledge("compare", "gone", f"runs_dir={tmp_path}"), "stdout")
    assert done.returncode == 2
    assert done.stderr.startswith("fledge: error: compare.runs: gone has neither an evaluation nor a training")
    assert unread(fledge("compare", "gone", f"runs_dir={tmp_path}"), "stdout", "stderr").returncode == SIGPIPE_EXIT


@pytest.mark.parametrize(("closed", "said"), [(">&-", ("", "")), ("2>&-", ("0.1.0\n", ""))])
def test_a_stream_that_is_closed_is_written_to_by_nobody(closed, said):
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *fledge("--version")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, *said)


STAGE = """
import sys
from dataclasses import replace
from pathlib import Path
from fledge.conf import cli
from fledge.conf.runtime.progress import Progress
made = Path(sys.argv.pop(1))
def work(config):
    for number in range(3):
        print("line", number, flush=True)
        print("warning", number, file=sys.stderr, flush=True)
    progress = Progress("work", 3, "step")
    progress.update(3)
    progress.close()
    made.write_text("all")
cli.COMMANDS[sys.argv[1]] = replace(cli.COMMANDS[sys.argv[1]], function="__main__:work")
cli.main()
"""


@pytest.mark.parametrize("stage", ["synthesize", "train"])
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_a_stage_goes_on_when_nobody_reads_its_log_and_says_so_where_somebody_does(tmp_path: Path, stage, streams):
    command = [sys.executable, "-c", STAGE, str(tmp_path / "done"), stage, "experiment=demo", "name=x"]
    done = unread(command, *streams)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "all"
    said = "".join(text or "" for text in (done.stdout, done.stderr))
    expected = [f"fledge: nobody reads <{streams[0]}> any more; {stage} goes on"] if len(streams) == 1 else []
    assert [line for line in said.splitlines() if line.startswith("fledge")] == expected


@pytest.mark.parametrize("arguments", [["-h"], ["compare", "first", "first"], ["train", "--help"]], ids=lambda a: a[0])
def test_a_full_disk_is_not_taken_for_a_reader_that_left(tmp_path, arguments):
    evaluation(tmp_path / "first", [question_record([2, 1], name=f"q/{i}") for i in range(4)])
    command = fledge(*arguments, *([f"runs_dir={tmp_path}"] if arguments[0] == "compare" else []))
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    told = (2, "fledge: error: <stdout> cannot be written: No space left on device\n")
    assert (done.returncode, done.stderr) == told
