"""A signal is answered at once, whatever is at work; the stage ends soon, and loses the batch at work at most."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from builders import copy_parts
from commands import Started, popen
from fledge.conf.cli import COMMANDS
from fledge.conf.runtime.artifact import artifact
from fledge.conf.runtime.journal import read_journal
from fledge.data_synthesis.states.record import _scratch
from sglang_double import sglang_double


@pytest.mark.parametrize("stage", ["dump", "evaluate"])
def test_a_signal_stops_a_stage_with_everything_saved(stage, finished, run):
    grows = {"dump": "hidden_states/shard-*.safetensors", "evaluate": "evaluation/questions.jsonl"}[stage]
    copy_parts(finished, run, "conversations", *["hidden_states", "training"] * (stage == "evaluate"))
    options = {"dump": ["dump.shard_tokens=60", "dump.batch_tokens=64"], "evaluate": ["evaluate.max_tokens=64"]}[stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with popen(run.command(stage, *options), stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not any(path.stat().st_size for path in run.path.glob(grows)):
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGUSR1)
        _, error = process.communicate()
    assert process.returncode == 75, error
    assert f"{stage}: stopped by SIGUSR1" in error
    assert "Traceback" not in error
    before = {path: path.read_bytes() for path in run.path.glob(grows)}
    run(stage, *options)
    assert all(path.read_bytes().startswith(content) for path, content in before.items()), "nothing is made twice"


@pytest.mark.parametrize("stage", ["evaluate", "run"])
def test_a_signal_in_the_middle_of_a_question_ends_evaluation_and_changes_no_count(finished, run, tmp_path, stage):
    copy_parts(finished, run, "prompts", "conversations", "hidden_states", "training")
    records = run.path / "evaluation" / "questions.jsonl"
    evaluation = Started(run.command(stage), tmp_path)
    evaluation.wait(lambda: records.exists() and records.stat().st_size)
    code, said = evaluation.stop(signal.SIGTERM)
    assert code == 75, said
    assert "evaluate: SIGTERM received: it ends now" in said
    assert ("run: SIGTERM received: passed on to `evaluate`" in said) == (stage == "run")
    run("evaluate")
    ours, theirs = (json.loads((r.path / "evaluation" / "acceptance.json").read_text()) for r in (run, finished))
    for name in ("num_questions", "num_drafts", "num_accepted_tokens_per_pos", "num_output_tokens", "lossless"):
        assert ours[name] == theirs[name]


def test_a_signal_ends_an_evaluation_by_a_server_which_asks_nothing_twice(run, tmp_path):
    rows = [{"question_id": n, "category": "math", "turns": [f"What is {n}?", "And more?"]} for n in range(400)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = run.path / "evaluation" / "questions.jsonl"
    with sglang_double(str(run.verifier)) as server:
        run.options = [
            *("evaluate.engine=server", f"evaluate.endpoint={server.endpoint}"),
            *(f"evaluate.questions={tmp_path / 'q.jsonl'}", "evaluate.questions_per_category=null"),
        ]
        evaluation = Started(run.command("evaluate"), tmp_path)
        evaluation.wait(lambda: records.exists() and records.stat().st_size)
        code, said = evaluation.stop(signal.SIGTERM)
        assert code == 75, said
        assert "evaluate: SIGTERM received: it ends now" in said
        assert "Traceback" not in said
        answered = records.read_bytes()
        assert 0 < answered.count(b"\n") < len(rows)
        run("evaluate")
    assert records.read_bytes().startswith(answered)
    assert len({record["id"] for record in read_journal(records)}) == len(rows)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_every_command_answers_from_its_start(tmp_path, command):
    options = ["experiment=demo", "name=x", f"runs_dir={tmp_path}"]
    started = Started([sys.executable, "-m", "fledge", command, *options], tmp_path, cold=True)
    started.wait(lambda: started.answers(signal.SIGUSR1))
    code, said = started.stop(signal.SIGUSR1)
    assert code == 75, said
    assert f"{command}: SIGUSR1 received: it ends now" in said
    assert f"{command}: stopped by SIGUSR1; the same command goes on" in said


NODE = """
import os, signal, sys, time
from fledge.slurm.jobs import node

def run_stage(*_):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.2)
    return int(sys.argv[1])

node.run_stage = run_stage
sys.exit(node.main(["1", "train"]))
"""


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_node_ends_with_the_code_of_its_stage_whatever_signal_came(code):
    done = subprocess.run([sys.executable, "-c", NODE, str(code)], capture_output=True, text=True, check=False)
    assert (done.returncode, "passed on to the processes of this node" in done.stderr) == (code, True), done.stderr


LONG_OPERATION = """
import sys, torch
from fledge.conf.runtime.signals import answered, deferred
a = torch.ones(4000, 4000, dtype=torch.float64)
with answered("long"), deferred("it ends after the product"):
    print("begins", flush=True)
    try:
        a @ a
    finally:
        print("is over", flush=True)
"""


def test_a_signal_is_answered_while_one_operation_runs(tmp_path):
    started = Started([sys.executable, "-c", LONG_OPERATION], tmp_path)
    started.wait(lambda: "begins" in started.said)
    code, said = started.stop(signal.SIGTERM)
    assert code == 75, said
    assert said.index("long: SIGTERM received: it ends after the product") < said.index("is over")


def test_a_second_interrupt_ends_at_once_what_the_first_let_finish(tmp_path):
    code = (
        "import time; from fledge.conf.runtime.signals import answered, deferred\n"
        "with answered('x'), deferred('it waits'):\n"
    )
    started = Started([sys.executable, "-c", f"{code}    print('begins', flush=True); time.sleep(600)"], tmp_path)
    started.wait(lambda: "begins" in started.said)
    started.process.send_signal(signal.SIGINT)
    started.wait(lambda: "x: SIGINT received: it waits; Ctrl-C ends it at once" in started.said)
    time.sleep(1.2)
    code, said = started.stop(signal.SIGINT)
    assert code == 130, said
    assert "received again: it ends at once" in said


def test_what_an_outer_part_of_a_command_waits_for_is_said_while_an_inner_one_is_at_work(tmp_path):
    code = (
        "import time; from fledge.conf.runtime.signals import answered, deferred\n"
        "with answered('x'), deferred('it ends after all answers'), deferred('it writes a record'):\n"
        "    print('begins', flush=True); time.sleep(600)"
    )
    started = Started([sys.executable, "-c", code], tmp_path)
    started.wait(lambda: "begins" in started.said)
    started.process.send_signal(signal.SIGTERM)
    started.wait(lambda: "x: SIGTERM received: it ends after all answers" in started.said)
    time.sleep(1.2)
    assert started.stop(signal.SIGINT)[0] == 130


HOLDS = """
import sys, time
from pathlib import Path
from fledge.conf.runtime.artifact import artifact
from fledge.conf.runtime.signals import answered, deferred
from fledge.data_synthesis.states.record import _scratch
held = {"artifact": lambda f: artifact(f, "evaluation", {}), "writer": lambda f: _scratch(f, 0)}[sys.argv[1]]
with answered("x"), deferred("it waits"), held(Path(sys.argv[2])):
    print("holds", flush=True)
    time.sleep(600)
"""


def test_a_note_that_cannot_be_written_beside_a_lock_stops_nothing(tmp_path):
    (tmp_path / ".lock-holder").mkdir()
    with artifact(tmp_path, "evaluation", {}) as target:
        assert target.folder == tmp_path


@pytest.mark.parametrize("kind", ["artifact", "writer"])
def test_a_second_start_is_told_who_is_at_work_and_that_it_is_asked_to_stop(tmp_path, kind):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    first = Started([sys.executable, "-c", HOLDS, kind, str(folder)], tmp_path)
    again = {"artifact": lambda: artifact(folder, "evaluation", {}), "writer": lambda: _scratch(folder, 0)}[kind]
    try:
        first.wait(lambda: "holds" in first.said)
        with (
            pytest.raises(
                ValueError, match=rf"(by|in) another process \({first.process.pid} on [^ ]+, since \S+ \S+\): wai"
            ),
            again(),
        ):
            pass
        first.process.send_signal(signal.SIGTERM)
        first.wait(lambda: "SIGTERM received" in first.said)
        with pytest.raises(ValueError, match=r"asked to stop by SIGTERM at .*: wait for it"), again():
            pass
    finally:
        first.process.kill()
        first.process.wait()
    with again():
        pass
    assert not list(tmp_path.rglob("*-holder"))
