"""Real servers answer as the verifier in this process does."""

import json
import sys
from pathlib import Path

import pytest
import regeneration
from builders import Run
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.runtime.journal import read_journal
from fledge.data_synthesis.conversations import read_conversations
from fledge.models.embedded.verifier import prompts as embedded_prompts
from servers import free_port, model_server
from serving import vllm_server

SAME = ("messages", "finish_reasons", "unanswered_turns", "usage", "temperature")


@pytest.fixture
def rows(tmp_path) -> Path:
    """Conversations of one to three turns, a third of them with a system message."""
    questions = [turn for row in embedded_prompts()[-40:] for turn in row["turns"]]
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        for number in range(12):
            system = [{"role": "system", "content": "Answer briefly."}] if number % 3 == 0 else []
            users = [
                {"role": "user", "content": f"{question}"} for question in questions[3 * number :][: 1 + number % 3]
            ]
            file.write(json.dumps({"id": f"{number}", "messages": system + between(users)}) + "\n")
    return path


def between(users: list[dict]) -> list[dict]:
    """Put somebody's answers between user turns; they are not used."""
    messages = [message for user in users for message in (user, {"role": "assistant", "content": "Somebody's words."})]
    return messages[:-1]


def regenerated(folder: Path, verifier: Path, rows: Path, *options: str) -> tuple[Run, dict[str, dict]]:
    """Regenerate the rows greedily; give the run and its conversations by id."""
    run = Run(folder, verifier)
    run("synthesize", f"data.sources=[{{path:{rows}}}]", "synthesize.temperature=0", *options)
    return run, {record["id"]: record for record in read_conversations(run.path / "conversations")}


def check_same(ours: dict[str, dict], theirs: dict[str, dict], *fields: str) -> None:
    assert len(ours) == 12
    assert theirs.keys() == ours.keys()
    for number, record in ours.items():
        for field in fields:
            assert theirs[number][field] == record[field], (number, field)
    assert {len(record["finish_reasons"]) for record in ours.values()} == {1, 2, 3}


def check_self_prompts(folder: Path, verifier: Path, endpoint: str, *options: str) -> None:
    """A server goes on after the user header, and answers what it wrote."""
    run = Run(folder, verifier)
    source = "data.sources=[{path:self,limit:6,max_tokens:48}]"
    run("synthesize", source, f"synthesize.endpoints=[{endpoint}]", "synthesize.max_tokens=8", *options)
    drawn = list(read_journal(run.path / "self_prompts" / "self" / "draws.jsonl"))
    kept = {record["text"] for record in drawn if not record["refused"]}
    conversations = list(read_conversations(run.path / "conversations"))
    assert len(conversations) == 6
    assert {record["messages"][0]["content"] for record in conversations} <= kept
    assert not any("<|" in text for text in kept)


def test_transformers_serve_answers_as_the_verifier_in_this_process(tmp_path, tiny_verifier_folder, rows):
    (tmp_path / "hub").mkdir()
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(tiny_verifier_folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with model_server(command, port, tmp_path / "server.log", environment) as endpoint:
        run, theirs = regenerated(tmp_path / "theirs", tiny_verifier_folder, rows, f"synthesize.endpoints=[{endpoint}]")
        sampled = """synthesize.request={generation_config:'{"do_sample": true}'}"""  # it samples by this alone
        check_self_prompts(tmp_path / "self", tiny_verifier_folder, endpoint, sampled)
    _, ours = regenerated(tmp_path / "ours", tiny_verifier_folder, rows)
    check_same(ours, theirs, *SAME)
    run("dump")  # the server gives no tokens: the template tells them
    assert read_manifest(run.path / "hidden_states", "hidden_states")["complete"]


def test_the_benchmark_measures_the_whole_stage(tiny_verifier_folder):
    options = regeneration.parse(["rows=300", "latency_s=0.05", "at_once=20", f"verifier={tiny_verifier_folder}"])
    result = regeneration.measure(options)
    assert result["requests"] == 600
    assert 20 < result["most_in_flight"] <= options.concurrency, "more than the server works on at once"
    assert 0.1 < result["share_with_start_and_end"] <= 1.05
    assert result["client_cpu_ms_per_request"] > 0
    with pytest.raises(ValueError, match="unknown option 'row=1'"):
        regeneration.parse(["row=1"])


@pytest.mark.serving
def test_vllm_gives_the_tokens_that_the_verifier_in_this_process_gives(tmp_path, tiny_verifier_folder, rows):
    with vllm_server(tmp_path, tiny_verifier_folder) as endpoint:
        _, theirs = regenerated(tmp_path / "theirs", tiny_verifier_folder, rows, f"synthesize.endpoints=[{endpoint}]")
        check_self_prompts(tmp_path / "self", tiny_verifier_folder, endpoint)
    _, ours = regenerated(tmp_path / "ours", tiny_verifier_folder, rows)
    check_same(ours, theirs, *SAME, "sequences")
