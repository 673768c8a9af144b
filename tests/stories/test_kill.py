"""A stage killed at any moment goes on at the next start: nothing lost, nothing doubled, the same result."""

import json
import os
import signal
import subprocess
import time

import torch
from builders import Run
from commands import popen
from fledge.conf.runtime.journal import Journal, read_journal
from fledge.data_synthesis.conversations import content_digest
from fledge.models.formats.training_folder import checkpoint_steps
from fledge.train.metrics.tracking import read_metrics
from safetensors.torch import load_file


def kill_when(run: Run, stage: str, reached, *overrides: str) -> bool:
    """Start a stage and SIGKILL it as soon as `reached()`; say whether it was still at work then."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = popen(
        run.command(stage, *overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    while process.poll() is None and not reached():
        time.sleep(0.002)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_torn_last_line_is_dropped_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append([{"id": "a"}, {"id": "b"}])
    journal.close()
    with open(path, "ab") as file:
        file.write(b'{"id": "c", "text": "half')
    journal = Journal(path)
    assert journal.done == {"a", "b"}
    journal.append([{"id": "c"}])
    journal.close()
    assert [record["id"] for record in read_journal(path)] == ["a", "b", "c"]


def test_a_journal_is_lines_to_every_reader(tmp_path):
    texts = ["one\u2028two", "one\u2029two", "one\x85two", "one\x1e\x0c\x0b\r\ntwo", "plain ü"]
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append([{"id": text, "text": text} for text in texts])
    journal.close()
    split = (tmp_path / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in split] == texts
    assert [record["id"] for record in read_journal(tmp_path / "journal.jsonl")] == texts


def test_every_stage_killed_and_started_again_ends_as_if_nothing_had_happened(finished, run):
    conversations = run.path / "conversations" / "conversations.jsonl"
    for share in (0, 15, 30):
        assert kill_when(run, "synthesize", lambda share=share: lines(conversations) > share)
        with open(conversations, "ab") as file:
            file.write(b'{"id": "torn')
    run("synthesize")
    assert content_digest(conversations.parent) == content_digest(finished.path / "conversations")

    store = run.path / "hidden_states"
    for number in (0, 2):
        assert kill_when(run, "dump", lambda number=number: (store / f"shard-{number:05d}.safetensors").exists())
    assert not json.loads((store / "manifest.json").read_text())["complete"]
    run("dump")
    ours, theirs = (json.loads((r.path / "hidden_states" / "manifest.json").read_text()) for r in (run, finished))
    assert ours["shards"] == theirs["shards"], "checksums included"
    assert {p.name for p in store.glob("*.safetensors")} == {
        p.name for p in (finished.path / "hidden_states").glob("*.safetensors")
    }

    checkpoints = run.path / "training" / "checkpoints"
    assert kill_when(run, "train", lambda: (checkpoints / ".saving").exists())  # in mid-save, before any checkpoint
    assert kill_when(run, "train", lambda: (checkpoints / "step-9").exists())
    assert kill_when(run, "train", lambda: any(r["step"] == 12 for r in read_metrics(run.path / "training")))  # mid-run
    assert checkpoint_steps(checkpoints) == [9]
    assert kill_when(run, "train", lambda: (checkpoints / ".saving").exists() and (checkpoints / "step-18").exists())
    run("train")
    weights, expected = (load_file(r.path / "training/checkpoints/step-24/model.safetensors") for r in (run, finished))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [r["step"] for r in read_metrics(run.path / "training")] == [
        r["step"] for r in read_metrics(finished.path / "training")
    ]

    records = run.path / "evaluation" / "questions.jsonl"
    for number in (0, 4):
        assert kill_when(run, "evaluate", lambda number=number: lines(records) > number)
    run("evaluate")
    ours, theirs = (json.loads((r.path / "evaluation" / "acceptance.json").read_text()) for r in (run, finished))
    assert ours["num_questions"] == theirs["num_questions"] == 8
    for name in ("num_drafts", "num_accepted_tokens_per_pos", "num_output_tokens", "lossless"):
        assert ours[name] == theirs[name]

    leftover = run.path / "exports" / ".plain.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    run("export")
    ours_, theirs_ = (load_file(r.path / "exports" / "plain" / "model.safetensors") for r in (run, finished))
    assert all(torch.equal(ours_[name], theirs_[name]) for name in theirs_)
    assert not leftover.exists()
