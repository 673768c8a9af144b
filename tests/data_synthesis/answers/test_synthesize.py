"""The synthesize stage above whoever runs the verifier: conversations, the answer log, shards, signals."""

import copy
import json
import os
import signal
import subprocess
import time

import pytest
from builders import Run, converse_all
from commands import popen
from fledge.conf.runtime.artifact import artifact
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import DataConfig, SourceConfig, SynthesizeConfig
from fledge.data_synthesis.answers import local as in_process
from fledge.data_synthesis.answers.answer_log import AnswerLog
from fledge.data_synthesis.answers.conversation import CONTEXT_FULL, EMPTY_ANSWER, Answer, Conversation, Failure
from fledge.data_synthesis.answers.generation import Generated
from fledge.data_synthesis.answers.local import converse
from fledge.data_synthesis.answers.user_turns import FurtherTurns
from fledge.data_synthesis.conversations import content_digest, read_conversations
from fledge.data_synthesis.prompts.rows import Prompt
from fledge.data_synthesis.tokens.chat_template import Turn
from fledge.models.verifier.model import Verifier


def answer(text: str, finish_reason: str = "stop", **fields: object) -> Answer:
    return Answer(text, finish_reason, prompt_tokens=5, completion_tokens=2, **fields)


def asked(*turns: str, system: str | None = None) -> Conversation:
    return Conversation(Prompt("s/train/1", "s/train", turns, system))


def test_a_history_before_which_no_users_turn_is_found_ends_its_conversation(verifier, monkeypatch):
    further = FurtherTurns(DataConfig(sources=[SourceConfig(path="self", limit=1, turns=2)]))
    conversation = further.begin(Prompt("self/train/1", "self/train", ("a?",)))
    conversation.add(answer("A"))
    monkeypatch.setattr(in_process, "find_user_turn", lambda *_: int("none"))  # raises ValueError
    assert not list(converse(verifier, conversation, 0.0, SynthesizeConfig(), further))
    assert not conversation.wants_turn


def test_a_token_that_ends_an_answer_is_no_part_of_its_text_though_it_be_no_special_one(verifier, monkeypatch):
    def answered() -> Answer:
        conversation = asked("Name a colour.")
        converse_all(verifier, [conversation], 0.0, 8)
        return conversation.answers[0]

    tokens = answered().turn.answer
    special = verifier.tokenizer.all_special_ids
    place = next(n for n, token in enumerate(tokens) if n and token not in {*tokens[:n], *special})
    monkeypatch.setattr(verifier, "end_token_ids", [*verifier.end_token_ids, tokens[place]])
    ended = answered()
    assert (ended.turn.answer, ended.finish_reason) == (tokens[: place + 1], "stop")
    assert ended.text == verifier.tokenizer.decode(tokens[:place])


def test_each_turn_is_asked_on_the_answers_before_it_without_their_reasoning():
    conversation = asked("a?", "b?", system="Be short.")
    conversation.add(answer("A", reasoning="hm"))
    assert conversation.question == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b?"},
    ]
    conversation.add(answer("B"))
    assert conversation.question is None
    record = conversation.record(0.7)
    assert record["messages"][2] == {"role": "assistant", "reasoning_content": "hm", "content": "A"}
    assert record["usage"] == {"prompt_tokens": 10, "completion_tokens": 4}
    assert record["unanswered_turns"] == 0
    assert "sequences" not in record, "nobody told the tokens"


def test_a_truncated_answer_ends_a_conversation_and_is_marked():
    conversation = asked("a?", "b?")
    conversation.add(answer("A", "length"))
    assert conversation.question is None
    assert conversation.record(0.0)["finish_reasons"] == ["length"]
    assert conversation.record(0.0)["unanswered_turns"] == 1


def test_an_empty_answer_ends_a_conversation_before_its_turn():
    conversation = asked("a?", "b?")
    conversation.add(answer("A"))
    conversation.add(answer(""))
    assert conversation.question is None
    assert conversation.ended_by is EMPTY_ANSWER
    assert [message["role"] for message in conversation.record(0.0)["messages"]] == ["user", "assistant"]


def test_tokens_are_recorded_where_every_answer_brought_them():
    conversation = asked("a?", "b?")
    conversation.add(answer("A", turn=Turn([1, 2], [3, 4])))
    conversation.add(answer("B", turn=Turn([1, 2, 3, 4, 5], [6])))
    assert conversation.record(0.0)["sequences"] == [{"token_ids": [1, 2, 3, 4, 5, 6], "answers": [[2, 4], [5, 6]]}]


def made(prompt_id: str) -> Conversation:
    conversation = Conversation(Prompt(prompt_id, "s", ("a?",)))
    conversation.add(answer("A"))
    return conversation


def test_what_failed_is_tried_again_in_later_starts_up_to_the_limit(tmp_path):
    for start in range(2):
        log = AnswerLog(tmp_path, max_attempts=2)
        assert log.wants("bad")
        assert log.wants("worse") == (start == 0), "what would fail again for certain is not tried"
        assert log.wants("good") == (start == 0)
        if start == 0:
            log.add([made("good")], 0.0)
            log.fail("worse", CONTEXT_FULL)
        log.fail("bad", Failure("HTTP 500", "boom"))
        assert len(log.to_try_again) == (start == 0)
        log.close()
    log = AnswerLog(tmp_path, max_attempts=2)
    assert not log.wants("bad")
    assert log.failures["bad"].attempts == 2
    log = AnswerLog(tmp_path, max_attempts=3)  # the user gives it another
    assert log.wants("bad")
    log.add([made("bad")], 0.0)
    log.close()
    assert set(AnswerLog(tmp_path, max_attempts=3).failures) == {"worse"}


def manifest(run: Run) -> dict:
    return json.loads((run.path / "conversations" / "manifest.json").read_text())


def test_shards_of_a_job_array_make_together_what_one_start_makes(finished, run):
    for shard in (2, 0):
        out = run("synthesize", "synthesize.num_shards=3", f"synthesize.shard={shard}").stdout
    assert "2 of 3 shards are complete" in out
    run("dump", "synthesize.num_shards=3", code=2)
    out = run("synthesize", "synthesize.num_shards=3", "synthesize.shard=1").stdout
    assert "all 3 shards are complete, 64" in out
    whole = manifest(run)
    assert whole["counts"] == manifest(finished)["counts"]
    assert whole["content"] == content_digest(run.path / "conversations")
    ours, theirs = (
        {record["id"]: record["messages"] for record in read_conversations(r.path / "conversations")}
        for r in (run, finished)
    )
    assert ours.keys() == theirs.keys()
    assert sum(ours[name] == theirs[name] for name in ours) > 60, "but for what other batches round otherwise"
    run("dump", "synthesize.num_shards=3")
    assert "is complete" in run("synthesize", "synthesize.num_shards=3", "synthesize.shard=1").stdout
    assert "num_shards: 3 -> None" in run("synthesize", code=2).stderr


def test_a_signal_ends_the_stage_with_what_is_done_and_the_next_start_goes_on(finished, run):
    path = run.path / "conversations" / "conversations.jsonl"
    process = popen(
        run.command("synthesize"), stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 75, said
    assert "stopped by SIGTERM; the same command goes on" in said
    number = sum(1 for _ in read_journal(path))
    assert 0 < number < 64
    run("synthesize")
    assert content_digest(path.parent) == content_digest(finished.path / "conversations")


def test_a_part_that_is_being_written_is_not_cleared_away(tmp_path):
    whole, part = tmp_path / "conversations", tmp_path / "conversations" / "part-00000-of-00002"
    with artifact(whole, "conversations", {"seed": 0}):
        pass
    with (
        artifact(part, "conversations", {"seed": 0}),
        pytest.raises(ValueError, match=r"part-00000-of-00002 is being written by another process"),
        artifact(whole, "conversations", {"seed": 1}, overwrite=True),
    ):
        pass
    with artifact(whole, "conversations", {"seed": 1}, overwrite=True):
        assert not part.exists()


def test_a_prompt_that_the_chat_template_refuses_fails_alone(verifier, verifier_config):
    strict = Verifier.load(verifier_config)
    strict.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        + verifier.tokenizer.chat_template
    )
    conversations = [asked("Name a colour.", system="Be short."), asked("Name a colour.")]
    converse_all(strict, conversations, 0.0, 8)
    refused, answered = conversations
    assert not refused.answers
    assert refused.ended_by.reason == "the chat template refuses it"
    assert "no system message" in refused.ended_by.detail
    assert len(answered.answers) == 1


def test_reasoning_marked_by_special_tokens_is_recorded_and_not_read_before_the_next_turn(verifier):
    thinking = copy.copy(verifier)
    thinking.tokenizer = copy.deepcopy(verifier.tokenizer)
    thinking.tokenizer.add_tokens(["<|channel>", "<channel|>"], special_tokens=True)
    said = thinking.tokenizer.encode("<|channel>thought\nEasy.<channel|>It is 5.", add_special_tokens=False)
    conversation, read = asked("Add 2 and 3.", "Sure?"), []
    task = converse(thinking, conversation, 0.0, SynthesizeConfig(max_tokens=8))
    request = next(task, None)
    while request is not None:
        read.append(thinking.tokenizer.decode(request.context))
        try:
            request = task.send(Generated([*said, thinking.tokenizer.eos_token_id], True))
        except StopIteration:
            break
    assert [answer.text for answer in conversation.answers] == ["It is 5.", "It is 5."]
    assert "It is 5." in read[1]
    assert "Easy." not in read[1]
    assert conversation.answers[0].turn.answer[:-1] == said
