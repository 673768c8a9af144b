"""Evaluation against vLLM's server counts what evaluation in this process counts. Run by `make test-serving`."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from builders import Run
from fledge.conf.runtime.journal import read_journal
from fledge.eval.served.tune import settings
from serving import COUNTS, decode_in_vllm, evaluated, vllm_server

pytestmark = pytest.mark.serving
BY_REQUEST = ("--per-request-spec-decode-metrics", "summary")


@pytest.fixture(scope="module")
def head(finished) -> Path:
    """The finished run's head as an engine reads it, in float32."""
    finished("export", "export.dtype=float32", "overwrite=true")
    return finished.path / "exports" / "plain"


@pytest.fixture(scope="module")
def endpoint(finished, head, tmp_path_factory):
    with vllm_server(tmp_path_factory.mktemp("server"), finished.verifier, *BY_REQUEST, head=head) as endpoint:
        yield endpoint


def by_server(endpoint: str, *options: str) -> list[str]:
    return ["evaluate.engine=server", f"evaluate.endpoint={endpoint}", *options]


def told(run: Run) -> tuple[dict, dict]:
    """Give an evaluation's counts, held-out ones too, and its texts by question."""
    results = json.loads((run.path / "evaluation" / "acceptance.json").read_text())
    heldout = results["heldout"]["decoded"] or {}
    counts = {name: (results[name], heldout.get(name)) for name in (*COUNTS, "num_output_tokens")}
    records = read_journal(run.path / "evaluation" / "questions.jsonl")
    return counts, {record["id"]: [answer["text"] for answer in record["answers"]] for record in records}


def beside(run: Run, finished: Run, name: str) -> Run:
    """Give another run that has the finished one's conversations."""
    other = dataclasses.replace(run, name=name)
    other.path.mkdir(parents=True)
    (other.path / "conversations").symlink_to(finished.path / "conversations")
    return other


@pytest.mark.parametrize("options", [[], ["evaluate.batch_size=4"]], ids=["its counters", "its answers"])
def test_the_server_counts_what_this_process_counts(finished, endpoint, run, options):
    other = beside(run, finished, "server")
    other("evaluate", *by_server(endpoint, *options))
    assert told(other) == told(finished)
    results = json.loads((other.path / "evaluation" / "acceptance.json").read_text())
    assert results["engine"] == "vllm 0.32.0"
    assert results["num_accepted_tokens"] > 20, "or nothing was put to the test"
    assert results["heldout"]["decoded"]["num_drafts"] > 20


def test_a_named_head_brings_what_training_told(finished, endpoint, run):
    other = beside(run, finished, "named")
    checkpoints = finished.path / "training" / "checkpoints"
    named = checkpoints / (checkpoints / "best").read_text().strip()
    out = other("evaluate", *by_server(endpoint, f"evaluate.checkpoint={named}")).stdout
    assert "walked in training" in out
    with open(finished.path / "evaluation" / "acceptance.json") as file:
        walked = json.load(file)["heldout"]["walked_acceptance_length"]
    assert json.loads((other.path / "evaluation" / "acceptance.json").read_text())["heldout"][
        "walked_acceptance_length"
    ] == pytest.approx(walked)


def test_sampled_answers_are_counted_too(endpoint, run):
    out = run("evaluate", *by_server(endpoint, "evaluate.temperature=1.0", "evaluate.heldout_prompts=0")).stdout
    results = json.loads((run.path / "evaluation" / "acceptance.json").read_text())
    assert (results["temperature"], results["seed"], "draft_sampling" in results) == (1.0, 0, False)
    gained = results["num_drafts"] + results["num_accepted_tokens"]
    answers = 2 * results["num_questions"]
    assert gained <= results["num_output_tokens"] + 3 * answers, "the last round may end beyond the answer"
    assert results["num_output_tokens"] <= gained + answers, "the prompt's forward gives a token"
    assert "how drafts are chosen is the server's" in out


def test_other_requests_at_the_server_are_noticed(finished, endpoint, run):
    over = threading.Event()

    def disturb() -> None:
        body = {"model": str(finished.verifier), "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}
        while not over.is_set():
            request = urllib.request.Request(
                f"{endpoint}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=60).read()
            time.sleep(0.05)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        done = run("evaluate", *by_server(endpoint), code=2)
    finally:
        over.set()
        thread.join()
    assert f"{endpoint} answers others too (it counts " in done.stderr
    assert "leave it to the evaluation; what is done is saved" in done.stderr


def test_a_server_that_drafts_more_tokens_is_refused(endpoint, run):
    message = run("evaluate", *by_server(endpoint, "evaluate.num_draft_tokens=5"), code=2).stderr
    assert f"evaluate.num_draft_tokens=5, and {endpoint} drafts 3 tokens a round: set it to 3" in message


def test_a_server_without_a_head_is_refused_and_so_are_batches_it_does_not_count(finished, head, run, tmp_path):
    with vllm_server(tmp_path, finished.verifier) as endpoint:
        message = run("evaluate", *by_server(endpoint), code=2).stderr
        assert f"{endpoint} serves without a draft head (its /metrics have no vllm:spec_decode counters)" in message
    with vllm_server(tmp_path, finished.verifier, head=head) as endpoint:
        message = run("evaluate", *by_server(endpoint, "evaluate.batch_size=2"), code=2).stderr  # by the same name
        assert "evaluate.batch_size=2 needs a server that counts each request: start it with --per-request" in message


def test_draft_tokens_by_load_are_served_and_a_verifier_without_its_head_is_measured(finished, head, run, tmp_path):
    loads = {}
    for name, tokens in (("alone", 0), ("head", 3)):
        served = {"head": head} if tokens else {}
        with vllm_server(tmp_path, finished.verifier, *(BY_REQUEST if tokens else ()), **served) as endpoint:
            for size in (1, 2):
                options = [f"evaluate.num_draft_tokens={tokens}", f"evaluate.batch_size={size}"]
                loads[f"{name}-{size}"] = beside(run, finished, f"{name}-{size}")
                loads[f"{name}-{size}"]("evaluate", *by_server(endpoint, *options))
    assert told(loads["alone-1"])[1] == told(loads["alone-2"])[1] == told(finished)[1], "texts"
    assert told(loads["head-2"]) == told(finished)
    names = [f"{name}-{size}" for name in ("alone", "head") for size in (1, 2)]
    out = run("tune", *names).stdout
    assert re.search(r"\| 2 +\| +\d+ \| +~\d+ \| +~\d+ \| +\d+ \|", out), out
    by_load = json.loads(settings([(1, 1, 3), (2, 8, 1)], str(head))["vllm.json"])
    with vllm_server(tmp_path, finished.verifier, *BY_REQUEST, speculation=by_load) as endpoint:
        scheduled = beside(run, finished, "scheduled")
        scheduled("evaluate", *by_server(endpoint))
        assert told(scheduled) == told(finished), "one request at a time: three draft tokens"
        busy = beside(run, finished, "busy")
        busy("evaluate", *by_server(endpoint, "evaluate.batch_size=4"))
        ours, theirs = told(finished), told(busy)
        assert theirs[1] == ours[1]
        assert theirs[0]["num_draft_tokens"][0] < ours[0]["num_draft_tokens"][0], "one draft token while it is busy"


def test_vllm_starts_by_the_command_of_a_plan_without_any_weights_of_a_head(finished, run, tmp_path):
    """On the CPU it goes no further: "Synthetic acceptance not supported with CPU sampling"."""
    options = ["plan.acceptance_rates=[0.8,0.4]", "plan.disk_tb=1", "plan.conversations=9"]
    planned = run("plan", *options).stdout
    (command,) = (line for line in planned.splitlines() if line.startswith("vllm serve "))
    speculation = json.loads(shlex.split(command)[-1])
    server = vllm_server(tmp_path, finished.verifier, *BY_REQUEST, speculation=speculation)
    with server as endpoint, urllib.request.urlopen(f"{endpoint}/models", timeout=60) as answer:
        assert json.loads(answer.read())["data"][0]["id"] == str(finished.verifier)
    assert "planned_head" in (tmp_path / "server.log").read_text()


def test_a_server_that_is_killed_leaves_what_is_done(finished, head, run, tmp_path):
    other = beside(run, finished, "killed")
    journal = other.path / "evaluation" / "questions.jsonl"
    with vllm_server(tmp_path, finished.verifier, head=head) as endpoint:
        command = other.command("evaluate", *by_server(endpoint))
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not (journal.is_file() and journal.read_text().count("\n") >= 3):
            assert process.poll() is None
            time.sleep(0.02)
    _, message = process.communicate()
    assert process.returncode == 75, message
    assert "what is done is saved, the same command goes on" in message
    done = journal.read_text()
    with vllm_server(tmp_path, finished.verifier, head=head) as endpoint:
        other("evaluate", *by_server(endpoint))
    assert journal.read_text().startswith(done)
    assert told(other) == told(finished)


@pytest.mark.skipif("FLEDGE_MT_BENCH" not in os.environ, reason="MT-Bench's question.jsonl is not part of fledge")
def test_mt_bench_is_counted_alike_in_this_process_by_vllm_and_by_its_server(finished, head, endpoint, run, tmp_path):
    file, best = Path(os.environ["FLEDGE_MT_BENCH"]), finished.path / "training" / "checkpoints"
    checkpoint = best / (best / "best").read_text().strip()
    options = [f"evaluate.questions={file}", "evaluate.questions_per_category=null", "evaluate.max_tokens=64"]
    run("evaluate", *options, "evaluate.baselines=false", f"evaluate.checkpoint={checkpoint}")
    other = dataclasses.replace(run, name="server")
    other("evaluate", *options, *by_server(endpoint))
    ours, theirs = told(run), told(other)
    assert len(ours[1]) == 80
    assert theirs == ours
    results, request, texts = evaluated(run)
    offline, log = decode_in_vllm(tmp_path, {**request, "head": str(head), "engine": {"max_model_len": 2048}})
    assert offline is not None, log[-6000:]
    assert {name: offline[name] for name in COUNTS} == {name: results[name] for name in COUNTS}
    assert offline["texts"] == texts
    print("MT-Bench:", {name: results[name] for name in COUNTS})
