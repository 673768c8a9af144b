"""Servers that go wrong and clients that are killed: every row exactly once, and none with another's answer.

FLEDGE_FAULT_ROWS=5000 FLEDGE_FAULT_KILLS=10 makes the first test as large as one likes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from commands import popen, run_command
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.runtime.journal import read_journal
from servers import END, SHARES, answer_to, faulty_server, free_port, stats, tokens_of

ROWS = int(os.environ.get("FLEDGE_FAULT_ROWS", "240"))
KILLS = int(os.environ.get("FLEDGE_FAULT_KILLS", "3"))


class Regeneration:
    """`fledge synthesize` on rows of a file, through servers."""

    def __init__(self, folder: Path, verifier: Path, rows: list[dict], *options: str) -> None:
        self.path = folder / "runs" / "run"
        self.rows = rows
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.arguments = [
            *("experiment=demo", "name=run", f"runs_dir={folder / 'runs'}", f"verifier.path={verifier}"),
            *(
                f"data.sources=[{{path:{folder / 'rows.jsonl'}}}]",
                "synthesize.model=faulty",
                "synthesize.max_tokens=64",
            ),
            *options,
        ]

    def start(self, *endpoints: str, log: int | None = subprocess.PIPE) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fledge", "synthesize", *self.arguments]
        command.append(f"synthesize.endpoints=[{','.join(endpoints)}]")
        return popen(command, stdout=log, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def finish(self, *endpoints: str, starts: int = 1) -> str:
        """Start until the exit code is 0; give what was printed."""
        for _ in range(starts):
            process = self.start(*endpoints)
            printed = "".join(process.communicate())
            if process.returncode == 0:
                return printed
            assert process.returncode == 75, printed
        raise AssertionError(f"not finished after {starts} starts: {printed}")

    @property
    def journal(self) -> Path:
        return self.path / "conversations" / "conversations.jsonl"

    def lines(self) -> int:
        return self.journal.read_bytes().count(b"\n") if self.journal.exists() else 0

    def check(self, with_tokens: bool = True) -> dict:
        """Hold every conversation against its row and the answers it must have; give the manifest's counts."""
        records = list(read_journal(self.journal))
        expected = {f"rows/train/{row['id']}": row["turns"] for row in self.rows}
        failed = Counter(record["id"] for record in read_journal(self.journal.with_name("failures.jsonl")))
        made = Counter(record["id"] for record in records)
        assert set(made.values()) <= {1}, "none twice"
        assert set(made) | set(failed) >= set(expected) >= set(made), "none lost, none from elsewhere"
        for record in records:
            check_record(record, expected[record["id"]], with_tokens)
        counts = read_manifest(self.path / "conversations", "conversations")["counts"]
        assert counts["prompts"] == len(expected) == counts["conversations"] + counts["failed"]
        assert counts["conversations"] == len(records)
        assert counts["truncated"] == sum("length" in record["finish_reasons"] for record in records)
        assert counts["completion_tokens"] == sum(record["usage"]["completion_tokens"] for record in records)
        return counts


def check_record(record: dict, turns: list[str], with_tokens: bool) -> None:
    messages: list[dict] = []
    for turn, reason in zip(turns, record["finish_reasons"], strict=False):
        messages.append({"role": "user", "content": turn})
        text = answer_to(messages)
        messages.append({"role": "assistant", "content": text[:12] if reason == "length" else text})
        assert reason == ("length" if "CUT" in turn else "stop")
    assert record["messages"] == messages
    assert ("sequences" in record) == with_tokens
    if with_tokens:
        (sequence,) = record["sequences"]
        answers = [bytes(sequence["token_ids"][start:end]) for start, end in without_end(sequence)]
        assert [answer.decode() for answer in answers] == [m["content"] for m in messages if m["role"] == "assistant"]
        assert sequence["token_ids"][: sequence["answers"][0][0]] == tokens_of(messages[:1])


def without_end(sequence: dict) -> list[tuple[int, int]]:
    return [(start, end - (sequence["token_ids"][end - 1] == END)) for start, end in sequence["answers"]]


def make_rows(number: int) -> list[dict]:
    """Give rows of one to three turns; some answers are cut or empty, some prompts too long for the server."""
    rows = []
    for n in range(number):
        turns = [f"row {n} asks {turn}: naïve “ünïcode” — 😀" for turn in range(1 + n % 3)]
        if n % 40 == 7:
            turns[-1] += " CUT"
        if n % 60 == 11:
            turns[0] += " TOO LONG"
        if n % 60 == 23:
            turns[-1] += " EMPTY"
        rows.append({"id": f"r{n}", "turns": turns})
    return rows


PATIENT = (
    "synthesize.request_timeout_s=2",
    "synthesize.concurrency=64",
    "synthesize.retries=12",
    "synthesize.max_attempts=20",
)


def test_killed_at_random_moments_with_servers_that_go_wrong_every_row_is_made_once(tmp_path, byte_verifier):
    rows = make_rows(ROWS)
    run = Regeneration(tmp_path, byte_verifier, rows, *PATIENT)
    generator = random.Random(time.time_ns())
    kills = []
    with faulty_server(faults=SHARES, latency_s=0.05, seed=39) as endpoint:
        for _ in range(KILLS):
            goal = run.lines() + generator.randint(0, 2 * ROWS // (3 * KILLS))
            process = run.start(endpoint, log=subprocess.DEVNULL)
            while process.poll() is None and run.lines() <= goal:
                time.sleep(0.002)
            time.sleep(generator.random() / 5)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append(run.lines())
        run.finish(endpoint, starts=8)
        counts = run.check()
        print("rows when killed", kills, "server", stats(endpoint), "counts", counts)
        assert set(SHARES) <= set(stats(endpoint)), "not everything went wrong"
    assert counts["failed"] == sum("TOO LONG" in row["turns"][0] for row in rows)
    assert counts["truncated"] == sum("CUT" in row["turns"][-1] and "TOO LONG" not in row["turns"][0] for row in rows)
    assert counts["cut_short"] == sum("EMPTY" in row["turns"][-1] for row in rows)
    assert kills[-1] < counts["conversations"], "the last kill came when nothing was left to do"


def test_servers_that_die_or_go_away_for_a_while_lose_nothing(tmp_path, byte_verifier):
    run = Regeneration(tmp_path, byte_verifier, make_rows(150), "synthesize.concurrency=16")
    away = {"pause_after": 100, "pause_s": 2}
    with faulty_server(latency_s=0.05, die_after=60) as mortal, faulty_server(latency_s=0.05, **away) as other:
        run.finish(mortal, other)
        counts = run.check()
        assert stats(other)["requests"] > 200
        with pytest.raises(OSError, match="refused"):
            stats(mortal)
    assert counts["failed"] == 3


def test_servers_that_write_their_addresses_are_found_later_too_and_asked_by_no_proxy(
    tmp_path, byte_verifier, monkeypatch
):
    servers = tmp_path / "it's where"
    servers.mkdir()
    option = "synthesize.servers='{}'".format(str(servers).replace("'", "\\'"))
    run = Regeneration(tmp_path, byte_verifier, make_rows(150), "synthesize.concurrency=8", option)
    with faulty_server(latency_s=0.05, die_after=60) as mortal, faulty_server(latency_s=0.05) as other:
        (servers / "0.healthy").write_text(f"{mortal}\n")
        (servers / "1.starting").write_text(f"{other}\n")
        with monkeypatch.context() as context:
            context.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
            process = run.start()
        while process.poll() is None and run.lines() < 10:
            time.sleep(0.01)
        (servers / "1.starting").rename(servers / "1.healthy")
        printed = "".join(process.communicate(timeout=120))
        assert process.returncode == 0, printed
        assert stats(other)["requests"] > 100
    assert run.check()["failed"] == 3


def test_requests_in_flight_adapt_to_what_the_server_takes(tmp_path, byte_verifier):
    run = Regeneration(tmp_path, byte_verifier, make_rows(200), "synthesize.concurrency=256")
    with faulty_server(latency_s=0.05, at_most=12) as endpoint:
        run.finish(endpoint)
        run.check()
        did = stats(endpoint)
    assert did["rate_limited"] < 0.3 * did["requests"], did


def test_what_a_server_refuses_for_good_is_not_tried_again_by_another_start(tmp_path, byte_verifier):
    rows = [{"id": f"r{n}", "turns": [f"row {n}", "second?" + " REFUSED" * (n == 2)]} for n in range(3)]
    run = Regeneration(tmp_path, byte_verifier, [*rows, {"id": "r3", "turns": ["row 3 REFUSED"]}])
    with faulty_server() as endpoint:
        run.finish(endpoint)
        counts = run.check()
        assert stats(endpoint)["requests"] - 2 == 2 * 3 + 1
    assert (counts["failed_because"], counts["cut_short"]) == ({"HTTP 400": 1}, 1)
    (failure,) = read_journal(run.journal.with_name("failures.jsonl"))
    assert (failure["id"], failure["final"]) == ("rows/train/r3", True)
    run.journal.with_name("failures.jsonl").unlink()
    with faulty_server() as endpoint:
        run.finish(endpoint)
        assert stats(endpoint)["requests"] - 2 == 1, "tried anew"


def test_no_server_and_another_model_are_said_in_one_sentence(tmp_path, byte_verifier):
    run = Regeneration(tmp_path, byte_verifier, make_rows(3))
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    with faulty_server(model="someone/else") as endpoint:
        for address, words in ((nobody, "no server answers"), (endpoint, "serves someone/else and not")):
            process = run.start(address)
            _, said = process.communicate()
            assert process.returncode == 2, said
            (sentence,) = [line for line in said.splitlines() if line.startswith("fledge: ")]
            assert address in sentence
            assert words in sentence


def stopped(run: Regeneration, endpoint: str, number: int) -> tuple[int, str]:
    """Send a signal once some more rows are done; give the exit code and what was printed."""
    before = run.lines()
    process = run.start(endpoint)
    while process.poll() is None and run.lines() < before + 5:
        time.sleep(0.01)
    process.send_signal(number)
    printed = "".join(process.communicate(timeout=30))
    return process.returncode, printed


def test_a_signal_lets_what_is_in_flight_end_within_the_grace(tmp_path, byte_verifier):
    rows = [{"id": f"r{n}", "turns": [f"first {n}?", "second?"]} for n in range(60)]
    run = Regeneration(tmp_path, byte_verifier, rows, "synthesize.concurrency=8")
    with faulty_server(latency_s=0.3) as endpoint:
        code, printed = stopped(run, endpoint, signal.SIGINT)
        assert code == 130, printed
        assert "conversations in flight have 60 s" in printed
        assert stats(endpoint)["as it should"] - 2 == 2 * run.lines(), "no answer was thrown away"
        run.arguments.append("synthesize.grace_s=0")
        code, printed = stopped(run, endpoint, signal.SIGTERM)
        assert code == 75, printed
        assert stats(endpoint)["requests"] - 4 > 2 * run.lines(), "nothing was waited for"
        run.finish(endpoint)
        run.check()


def test_a_server_that_renders_other_tokens_is_refused_before_anything_is_asked(tmp_path, byte_verifier):
    other = tmp_path / "verifier"
    shutil.copytree(byte_verifier, other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant:", "bot:"))
    run = Regeneration(tmp_path, other, make_rows(3))
    with faulty_server() as endpoint:
        process = run.start(endpoint)
        _, said = process.communicate()
        assert process.returncode == 2, said
        assert "reads a chat as other tokens than verifier.path" in said
        assert stats(endpoint)["requests"] == 2, "the probe alone"


def test_an_answer_longer_than_the_context_leaves_is_refused_at_once(tmp_path, byte_verifier):
    run = Regeneration(tmp_path, byte_verifier, make_rows(3), "synthesize.max_tokens=9000")
    with faulty_server() as endpoint:
        process = run.start(endpoint)
        _, said = process.communicate()
    assert process.returncode == 2, said
    assert "synthesize.max_tokens=9000 leaves no room for a prompt in the 8192 tokens of" in said


def test_without_token_ids_the_template_tells_what_was_written(tmp_path, byte_verifier):
    run = Regeneration(tmp_path, byte_verifier, make_rows(12))
    with faulty_server(no_token_ids=True) as endpoint:
        run.finish(endpoint)
    run.check(with_tokens=False)


def test_when_all_is_answered_a_start_needs_no_server(tmp_path, byte_verifier):
    run = Regeneration(tmp_path, byte_verifier, make_rows(6))
    with faulty_server() as endpoint:
        run.finish(endpoint)
    manifest = run.path / "conversations" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))
    run.finish(f"http://127.0.0.1:{free_port()}/v1")
    run.check()


def test_an_endpoint_that_turns_into_something_else_is_left_out_and_takes_no_row_along(tmp_path, byte_verifier):
    run = Regeneration(tmp_path, byte_verifier, make_rows(150), "synthesize.concurrency=8")
    with faulty_server(latency_s=0.2) as good, faulty_server(rename_after=20) as bad:
        printed = run.finish(good, bad)
    assert f"{bad} is left out until it answers" in printed
    assert run.check()["failed_because"] in ({}, {"the prompt fills the verifier's context": 3})


def test_images_reach_the_server_as_they_are_and_dump_leaves_them_out(tmp_path, byte_verifier):
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    content = [{"type": "text", "text": "What is this?"}, picture]
    rows = [{"id": "seen", "messages": [{"role": "user", "content": content}]}]
    run = Regeneration(tmp_path, byte_verifier, rows)
    with faulty_server() as endpoint:
        run.finish(endpoint)
    (record,) = read_journal(run.journal)
    user, assistant = record["messages"]
    assert user["content"] == content
    assert assistant["content"] == answer_to([user]), "which repeats what the server was asked"
    command = [
        sys.executable,
        "-m",
        "fledge",
        "dump",
        *run.arguments,
        "draft.aux_layers=[1,3,5]",
        "draft.vocab_size=99",
    ]
    dumped = run_command(command)
    assert dumped.returncode == 2
    assert "1 conversations whose images cannot be read" in dumped.stderr


def test_text_parts_reach_the_server_as_the_text_that_the_template_takes(tmp_path, byte_verifier):
    content = [{"type": "text", "text": "Name a colour."}, {"type": "text", "text": "Or two."}]
    run = Regeneration(tmp_path, byte_verifier, [{"id": "parts", "messages": [{"role": "user", "content": content}]}])
    with faulty_server() as endpoint:
        run.finish(endpoint)
    (record,) = read_journal(run.journal)
    user, assistant = record["messages"]
    assert user["content"] == content
    asked = {"role": "user", "content": "Name a colour.\nOr two."}
    assert assistant["content"] == answer_to([asked]), "which repeats what the server was asked"
    assert record["sequences"][0]["token_ids"][: record["sequences"][0]["answers"][0][0]] == tokens_of([asked])
