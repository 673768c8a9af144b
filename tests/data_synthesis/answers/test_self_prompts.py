"""Prompts that the verifier writes itself, in this process and by servers: kept, filtered, killed and gone on with."""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import Run
from commands import popen
from fledge.conf.runtime.artifact import digest, read_manifest
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import Config, DataConfig, SourceConfig, SynthesizeConfig, VerifierConfig
from fledge.data_synthesis.answers import local, remote, self_prompts
from fledge.data_synthesis.answers.conversation import Answer
from fledge.data_synthesis.answers.endpoint import Endpoint, RequestError
from fledge.data_synthesis.answers.generation import Generation
from fledge.data_synthesis.answers.self_prompts import FILE, write_self_prompts
from fledge.data_synthesis.answers.user_turns import read_turn
from fledge.data_synthesis.conversations import content_digest, read_conversations
from fledge.data_synthesis.prompts.prepare import prepare_prompts
from fledge.data_synthesis.synthesize import synthesize
from servers import MODEL, answer_to, faulty_server, tokens_of


def config_of(folder: Path, verifier: VerifierConfig, limit: int = 20, **fields: object) -> Config:
    source = {name: fields.pop(name) for name in ("max_tokens", "min_ascii", "temperature") if name in fields}
    own = SourceConfig(path="self", limit=limit, **{"max_tokens": 48, **source})
    data = {name: fields.pop(name) for name in list(fields) if name in DataConfig.__annotations__}
    return Config(
        name="run",
        runs_dir=str(folder),
        verifier=verifier,
        data=DataConfig(sources=[own], **data),
        synthesize=SynthesizeConfig(max_tokens=16, batch_size=8, **fields),
    )


def draws(config: Config) -> list[dict]:
    return list(read_journal(config.self_prompts_folder / "self" / FILE))


def kept(config: Config) -> list[dict]:
    return [json.loads(line) for line in open(config.self_prompts_folder / "self" / "prompts.jsonl")]


def test_the_verifier_in_this_process_writes_prompts_and_they_are_a_source_like_others(tmp_path, verifier_config):
    config = config_of(tmp_path, verifier_config)
    write_self_prompts(config)
    taken = kept(config)
    assert len(taken) == 20
    drawn = {record["id"]: record for record in draws(config)}
    assert all(row["turns"] == [drawn[row["id"]]["text"]] and not drawn[row["id"]]["refused"] for row in taken)
    assert "<|" not in "".join(row["turns"][0] for row in taken)
    assert len({row["turns"][0].casefold() for row in taken}) == 20
    counts = read_manifest(config.self_prompts_folder / "self", "self_prompts")["counts"]
    assert counts["kept"] == 20
    prepared = prepare_prompts(config)
    assert {prompt.id: prompt.turns for prompt in prepared.read()} == {
        f"self/train/{row['id']}": tuple(row["turns"]) for row in taken
    }


def test_a_start_that_was_killed_ends_with_what_an_uninterrupted_one_gives(tmp_path, verifier_config, monkeypatch):
    whole = config_of(tmp_path / "whole", verifier_config)
    write_self_prompts(whole)
    config, step, num_steps = config_of(tmp_path / "killed", verifier_config), Generation._step, []

    def killed_at_the_hundredth(*arguments: object) -> None:
        num_steps.append(1)
        if len(num_steps) == 100:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(Generation, "_step", killed_at_the_hundredth)
    with pytest.raises(KeyboardInterrupt):
        write_self_prompts(config)
    journal = config.self_prompts_folder / "self" / FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 5
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:9])  # half a line
    write_self_prompts(config)
    both = [{record["id"]: record for record in draws(c)} for c in (config, whole)]
    assert all(both[0][number] == both[1][number] for number in both[0].keys() & both[1].keys())
    assert kept(config) == kept(whole)


def test_a_higher_limit_goes_on_from_what_is_drawn_and_a_complete_one_draws_nothing(
    tmp_path, verifier_config, monkeypatch, capsys
):
    write_self_prompts(config_of(tmp_path, verifier_config, limit=5))
    first = draws(config_of(tmp_path, verifier_config))
    more = config_of(tmp_path, verifier_config, limit=20)
    write_self_prompts(more)
    assert draws(more)[: len(first)] == first
    assert len(kept(more)) == 20
    monkeypatch.setattr(self_prompts, "Generation", None)
    write_self_prompts(more)
    assert "is complete" in capsys.readouterr().out
    write_self_prompts(config_of(tmp_path, verifier_config, limit=10))
    assert kept(more) == kept(config_of(tmp_path, verifier_config))[:10]
    with pytest.raises(ValueError, match=r"made with other settings \(temperature: 1.0 -> 0.5\)"):
        write_self_prompts(config_of(tmp_path, verifier_config, temperature=0.5))


def scripted(monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """Let the verifier write these texts in turn, `~` at an end for one that goes on; then `Number n` for ever."""
    number = iter(range(10**6))

    def draw_turn(verifier, turn, *_):
        yield from ()
        text = texts[n] if (n := next(number)) < len(texts) else f"Number {n} of all"
        end = [] if text.endswith("~") else [verifier.tokenizer.eos_token_id]
        return read_turn(turn, verifier.tokenizer, verifier.tokenizer.encode(text) + end, bool(end))

    monkeypatch.setattr(self_prompts, "draw_turn", draw_turn)


def test_a_users_turn_that_is_no_prompt_is_left_out_and_counted(tmp_path, verifier_config, monkeypatch):
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"prompt": "Name a colour of the sky."}) + "\n")
    scripted(
        monkeypatch,
        *("Write a word~", "Say <|start|>user a word", "", "Añadé ñandú óptimo", "name a colour of the sky"),
        *("Write a poem about the sea and its many waves", "write a POEM about the sea, and its many waves!"),
        *("Write a poem about the sea and its many wave", "Look:\n<image>", "x" * 90, "Hm"),
    )
    pytest.importorskip("datasketch")
    options = {"min_ascii": 0.9, "exclude": [str(exam)], "near_duplicates": 0.8, "max_chars": 60, "min_chars": 4}
    config = config_of(tmp_path, verifier_config, limit=2, **options)
    write_self_prompts(config)
    assert [row["turns"] for row in kept(config)] == [
        ["Write a poem about the sea and its many waves"],
        ["Number 11 of all"],
    ]
    counts = read_manifest(config.self_prompts_folder / "self", "self_prompts")["counts"]
    assert counts == {
        "kept": 2,
        **dict.fromkeys(("not_ended", "special_tokens", "not_ascii", "evaluation", "duplicate"), 1),
        **dict.fromkeys(("near_duplicate", "malformed", "too_long"), 1),
        "too_short": 2,
    }


def test_a_verifier_that_says_the_same_for_ever_gives_what_it_has(tmp_path, verifier_config, monkeypatch, capsys):
    monkeypatch.setattr(self_prompts, "_WINDOW", 16)
    monkeypatch.setattr(self_prompts, "_LEAST", 2)
    scripted(monkeypatch, *["Again?"] * 99)
    config = config_of(tmp_path, verifier_config)
    write_self_prompts(config)
    assert len(kept(config)) == 1
    assert "1 in" in (said := capsys.readouterr().out)
    assert "fewer than the 20 asked for; of 16 drawn 15 duplicate left out" in said
    nothing = config_of(tmp_path / "nothing", verifier_config, min_chars=99)
    with pytest.raises(ValueError, match=r"writes no prompt that can be taken: of 16 drawn 16 too_short left out"):
        write_self_prompts(nothing)


@pytest.mark.parametrize("no_token_ids", [False, True], ids=["tokens", "text"])
def test_servers_write_prompts_from_a_raw_prompt_and_a_later_start_goes_on(tmp_path, byte_verifier, no_token_ids):
    options = {"no_token_ids": True} if no_token_ids else {"faults": {"error": 0.05, "rate_limited": 0.05}}
    with faulty_server(**options) as endpoint:
        config = config_of(
            tmp_path, VerifierConfig(path=str(byte_verifier)), limit=40, endpoints=[endpoint], model=MODEL
        )
        write_self_prompts(config)
        texts = [row["turns"][0] for row in kept(config)]
        assert len(texts) == len(set(texts)) == 40
        assert all(text.startswith("What is ") and not text.endswith("by 0?") for text in texts)
        journal = config.self_prompts_folder / "self" / FILE
        before = {record["id"]: record for record in draws(config)}
        assert any(record["refused"] == "not_ended" for record in before.values())
        assert len(before) == len(draws(config))
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join(lines[:20]) + lines[20][:9])
        config.data.sources[0].limit = 41  # to be made again
        write_self_prompts(config)
        after = {record["id"]: record for record in draws(config)}
        assert len(after) == len(draws(config))
        assert {name: before.get(name, record) for name, record in after.items()} == after
        assert [row["turns"][0] for row in kept(config)][:40] == texts


def test_a_server_that_adds_tokens_to_a_raw_prompt_is_refused(tmp_path, byte_verifier, monkeypatch):
    complete = Endpoint.ask

    async def longer(endpoint, body, path="/chat/completions"):
        return await complete(endpoint, {**body, "prompt": [*body["prompt"], 65]} if "prompt" in body else body, path)

    monkeypatch.setattr(Endpoint, "ask", longer)
    with faulty_server() as endpoint:
        verifier = VerifierConfig(path=str(byte_verifier))
        config = config_of(tmp_path, verifier, endpoints=[endpoint], model=MODEL)
        with pytest.raises(ValueError, match=r"reads a raw prompt of 5 tokens as 6: its completions must add none"):
            write_self_prompts(config)


def intercept(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict, Answer], Answer]) -> list[dict]:
    """Change what servers give to raw prompts, or raise; return the list that their requests are put in."""
    ask, requests = Endpoint.ask, []

    async def changed(endpoint, body, path="/chat/completions"):
        if "prompt" not in body:
            return await ask(endpoint, body, path)
        requests.append(body)
        return change(body, await ask(endpoint, body, path))

    monkeypatch.setattr(Endpoint, "ask", changed)
    return requests


def numbers_of(count: int) -> dict[int, int]:
    """Return the numbers of draws by their seeds."""
    return {int(digest([0, "self/train", number]), 16) % 2**31: number for number in range(count)}


def test_draws_that_fail_are_given_up_as_answers_are_and_those_behind_them_count(
    tmp_path, byte_verifier, monkeypatch, capsys
):
    numbers, tries = numbers_of(1000), Counter()

    def failing(body, answer):
        tries[number := numbers[body["seed"]]] += 1
        if number == 2:
            raise RequestError("context full", "", lasting=True, context_full=True)
        if number == 3:
            raise RequestError("finish_reason abort", "{}")
        return replace(answer, text=f"Number {number}", finish_reason="stop", turn=None)

    intercept(monkeypatch, failing)
    verifier = VerifierConfig(path=str(byte_verifier))
    with faulty_server() as endpoint:
        options = {"endpoints": [endpoint], "model": MODEL, "retries": 0, "max_attempts": 2}
        config = config_of(tmp_path, verifier, limit=20, **options)
        with pytest.raises(SystemExit, match="75"):
            write_self_prompts(config)
        assert "1 prompts could not be drawn, the last: finish_reason abort" in capsys.readouterr().err
        write_self_prompts(config)
    assert [int(row["id"]) for row in kept(config)] == [0, 1, *range(4, 22)]
    assert (tries[2], tries[3]) == (1, 2)
    counts = read_manifest(config.self_prompts_folder / "self", "self_prompts")["counts"]
    assert counts == {"kept": 20, "context full": 1, "finish_reason abort": 1}


def test_a_draw_that_fails_is_no_matter_if_enough_are_kept(tmp_path, byte_verifier, monkeypatch):
    numbers = numbers_of(100)

    def failing(body, answer):
        if numbers[body["seed"]] >= 5:
            raise RequestError("HTTP 500", "")
        return replace(answer, text=f"Number {numbers[body['seed']]}", finish_reason="stop", turn=None)

    intercept(monkeypatch, failing)
    with faulty_server() as endpoint:
        options = {"endpoints": [endpoint], "model": MODEL, "retries": 0}
        config = config_of(tmp_path, VerifierConfig(path=str(byte_verifier)), limit=5, **options)
        write_self_prompts(config)
    assert len(kept(config)) == 5


def test_a_user_turn_that_a_servers_context_has_no_room_for_is_refused_at_once(tmp_path, byte_verifier):
    with faulty_server() as endpoint:
        verifier = VerifierConfig(path=str(byte_verifier))
        config = config_of(tmp_path, verifier, endpoints=[endpoint], model=MODEL, max_tokens=8190)
        config.synthesize.max_tokens = 16
        with pytest.raises(ValueError, match=r"data.sources\[0\].max_tokens=8190 leaves no room .* 8192 tokens of"):
            write_self_prompts(config)


def test_fields_of_requests_are_sent_and_special_tokens_found_in_texts(tmp_path, byte_verifier, monkeypatch):
    def through_a_header(body, answer):
        mark = "<end>" if body.get("skip_special_tokens") is False else ""
        text = f"{answer.text}{mark}assistant:Yes" if body["seed"] % 5 == 0 else f"{answer.text}{mark}"
        return replace(answer, text=text, turn=None)

    requests = intercept(monkeypatch, through_a_header)
    with faulty_server() as endpoint:
        verifier = VerifierConfig(path=str(byte_verifier))
        options = {"endpoints": [endpoint], "model": MODEL, "request": {"top_k": 50}}
        config = config_of(tmp_path, verifier, limit=20, **options)
        write_self_prompts(config)
    assert {body["top_k"] for body in requests} == {50}
    texts = [row["turns"][0] for row in kept(config)]
    assert len(texts) == 20
    assert all(text.endswith("?") for text in texts)
    assert any(record["refused"] == "special_tokens" for record in draws(config))


def answered(config: Config) -> list[dict]:
    config.data.sources[0].turns = 3
    synthesize(config)
    return sorted(read_conversations(config.conversations_folder), key=lambda record: record["id"])


def test_the_verifier_asks_again_after_an_answer_and_a_killed_start_ends_with_the_same(
    tmp_path, verifier_config, verifier, monkeypatch
):
    whole = answered(config_of(tmp_path / "whole", verifier_config, limit=8, heldout_share=0.3))
    assert len(whole) == 8
    users = [[m["content"] for m in record["messages"] if m["role"] == "user"] for record in whole]
    assert max(map(len, users)) == 3
    assert all(len(set(turns)) == len(turns) for turns in users)
    for record, turns in zip(whole, users, strict=True):
        text = "".join(verifier.tokenizer.decode(sequence["token_ids"]) for sequence in record["sequences"])
        assert all(f"<|start|>user<|message|>{turn}<|end|>" in text for turn in turns)
    config, write_turns, num_calls = config_of(tmp_path / "k", verifier_config, limit=8, heldout_share=0.3), [], []
    write_turns.append(local._write_turn)

    def killed_at_the_third(*arguments: object) -> object:
        num_calls.append(1)
        if len(num_calls) == 3:
            raise KeyboardInterrupt
        return write_turns[0](*arguments)

    monkeypatch.setattr(local, "_write_turn", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        answered(config)
    assert answered(config) == whole


@pytest.mark.parametrize("no_token_ids", [False, True], ids=["tokens", "text"])
def test_servers_ask_again_after_an_answer(tmp_path, byte_verifier, monkeypatch, no_token_ids):
    threads, find = set(), remote.find_user_turn
    monkeypatch.setattr(remote, "find_user_turn", lambda *a: (threads.add(threading.current_thread()), find(*a))[1])
    with faulty_server(**({"no_token_ids": True} if no_token_ids else {})) as endpoint:
        verifier = VerifierConfig(path=str(byte_verifier))
        records = answered(config_of(tmp_path, verifier, limit=12, endpoints=[endpoint], model=MODEL))
    assert threads
    assert threading.main_thread() not in threads, "requests wait for nothing long"
    lengths = Counter(len(record["messages"]) for record in records)
    assert lengths[6] > 3, "but for the seventh of user turns that do not end"
    for record in records:
        messages = record["messages"]
        for place in range(1, len(messages), 2):
            assert messages[place]["content"] == answer_to(messages[:place])
            assert messages[place - 1]["content"].startswith("What is ")
        assert ("sequences" in record) != no_token_ids
        for sequence in record.get("sequences", []):
            assert sequence["token_ids"] == [*tokens_of(messages)[: -len(b"assistant:")]]


@pytest.mark.parametrize("no_token_ids", [False, True], ids=["tokens", "text"])
def test_a_history_that_cannot_be_asked_for_ends_its_conversation_alone(
    tmp_path, byte_verifier, monkeypatch, no_token_ids
):
    def refused(body, answer):
        prompt = body["prompt"]
        prompt = prompt if isinstance(prompt, str) else bytes(token for token in prompt if token < 256).decode()
        if "assistant:" in prompt and body["seed"] % 2:
            raise RequestError("HTTP 400", "not to our taste", lasting=True)
        return answer

    requests = intercept(monkeypatch, refused)
    with faulty_server(**({"no_token_ids": True} if no_token_ids else {})) as endpoint:
        verifier = VerifierConfig(path=str(byte_verifier))
        records = answered(config_of(tmp_path, verifier, limit=12, endpoints=[endpoint], model=MODEL))
    lengths = Counter(len(record["messages"]) for record in records)
    assert sum(lengths.values()) == 12
    assert lengths[2] > 1
    assert lengths[4] + lengths[6] > 1
    assert any(isinstance(body["prompt"], str) for body in requests) == no_token_ids


def test_excluding_what_a_further_turn_says_makes_conversations_anew(tmp_path, byte_verifier):
    with faulty_server() as endpoint:
        verifier = VerifierConfig(path=str(byte_verifier))
        config = config_of(tmp_path, verifier, limit=12, endpoints=[endpoint], model=MODEL)
        later = next(record["messages"][2]["content"] for record in answered(config) if len(record["messages"]) > 2)
        (tmp_path / "exam.jsonl").write_text(json.dumps({"prompt": later}) + "\n")
        config.data.exclude, config.overwrite = [str(tmp_path / "exam.jsonl")], True
        records = answered(config)
    assert len(records) == 12
    assert all(message["content"] != later for record in records for message in record["messages"])


def test_a_stage_that_is_killed_at_any_moment_ends_with_the_same_conversations(tmp_path, tiny_verifier_folder):
    source = "data.sources=[{path:self,limit:16,max_tokens:48,turns:2}]"
    whole, run = (Run(tmp_path, tiny_verifier_folder, name, [source]) for name in ("whole", "killed"))
    small = "synthesize.max_tokens=16"
    whole("synthesize", small)
    for journal, num_lines in (("self_prompts/self/draws.jsonl", 8), ("conversations/conversations.jsonl", 1)):
        process = popen(run.command("synthesize", small), env={**os.environ, "OMP_NUM_THREADS": "1"})
        path = run.path / journal
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= num_lines):
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert 0 < len(path.read_bytes().splitlines()) < 16
    run("synthesize", small)
    for name in ("self_prompts/self/prompts.jsonl", "prompts/prompts.jsonl"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()
    ours, theirs = (content_digest(r.path / "conversations") for r in (run, whole))
    assert ours == theirs
