"""Answers that were logged with their tokens: taken as they are, and told from other models' words."""

import json
from pathlib import Path

import pytest
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import (
    Config,
    DataConfig,
    DraftConfig,
    DumpConfig,
    SourceConfig,
    SynthesizeConfig,
    VerifierConfig,
)
from fledge.data_synthesis.answers import logged
from fledge.data_synthesis.conversations import read_conversations
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.heldout import is_heldout
from fledge.data_synthesis.prompts.rows import read_prompt
from fledge.data_synthesis.states.own_words import foreign_samples
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.data_synthesis.synthesize import synthesize
from fledge.models.verifier.model import Verifier

SHARE = 0.3


def config_of(folder: Path, verifier: VerifierConfig, rows: list[dict], **data: object) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        name="run",
        runs_dir=str(folder),
        verifier=verifier,
        data=DataConfig(sources=[SourceConfig(path=str(folder / "log.jsonl"))], heldout_share=SHARE, **data),
        synthesize=SynthesizeConfig(max_tokens=24, batch_size=8, temperature=0.7),
        draft=DraftConfig(vocab_size=300),
        dump=DumpConfig(max_length=256),
    )


def answered(config: Config) -> dict[str, dict]:
    synthesize(config)
    return {record["id"]: record for record in read_conversations(config.conversations_folder)}


@pytest.fixture(scope="module")
def log(tmp_path_factory, verifier_config) -> list[dict]:
    """Rows as a gateway logs them: what the verifier has read and written, the later of two turns too."""
    rows = [{"id": n, "prompt": f"How long do I cook {n} eggs?"} for n in range(24)]
    rows += [{"id": n, "turns": [f"What is {n} plus 2?", "Are you sure?"]} for n in range(24, 40)]
    made = answered(config_of(tmp_path_factory.mktemp("log"), verifier_config, rows))
    for row in rows:
        record = made[f"log/train/{row['id']}"]
        sequence = record["sequences"][-1]
        start, end = sequence["answers"][-1]
        del row["turns" if "turns" in row else "prompt"]
        row["messages"] = record["messages"][:-1]  # earlier answers, too
        row |= {"prompt_token_ids": sequence["token_ids"][:start], "token_ids": sequence["token_ids"][start:end]}
    return rows


def test_logged_answers_are_conversations_as_they_are_but_held_out_ones_are_answered(tmp_path, verifier_config, log):
    made = answered(config_of(tmp_path, verifier_config, log))
    assert len(made) == len(log)
    held = [name for name in made if is_heldout(name, SHARE)]
    assert 3 < len(held) < len(log) / 2
    for row in log:
        record = made[f"log/train/{row['id']}"]
        (sequence,) = record["sequences"]
        if record["id"] in held:
            assert record["temperature"] == 0.0
            continue
        start, tokens = len(row["prompt_token_ids"]), row["prompt_token_ids"] + row["token_ids"]
        assert sequence == {"token_ids": tokens, "answers": [[start, len(tokens)]]}
        assert "temperature" not in record, "nobody told it"
        assert record["messages"][0] == row["messages"][-1], "the question that it answers"
        assert record["usage"] == {"prompt_tokens": start, "completion_tokens": len(tokens) - start}


def test_a_killed_start_goes_on_and_no_verifier_is_loaded_if_nothing_is_to_be_answered(
    tmp_path, verifier_config, log, monkeypatch
):
    whole = answered(config_of(tmp_path / "whole", verifier_config, log))
    config, split, calls = config_of(tmp_path / "killed", verifier_config, log), logged.split_answer, []

    def killed(*arguments: object, **options: object) -> tuple:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return split(*arguments, **options)

    monkeypatch.setattr(logged, "split_answer", killed)
    with pytest.raises(KeyboardInterrupt):
        synthesize(config)
    assert len(list(read_journal(config.conversations_folder / "conversations.jsonl"))) == 8
    monkeypatch.undo()
    assert answered(config) == whole
    config = config_of(tmp_path / "none", verifier_config, log)
    config.data.heldout_share = 0.0
    monkeypatch.setattr(Verifier, "load", None)
    assert len(answered(config)) == len(log)


def test_the_verifier_answers_if_it_is_told_to(tmp_path, verifier_config, log):
    made = answered(config_of(tmp_path, verifier_config, log, logged_answers=False))
    assert {record["temperature"] for record in made.values()} == {0.0, 0.7}


def test_a_run_that_took_logged_answers_is_made_anew_without_them(tmp_path, verifier_config, log):
    answered(config_of(tmp_path, verifier_config, log))
    config = config_of(tmp_path, verifier_config, log, logged_answers=False)
    with pytest.raises(ValueError, match="logged_answers"):
        synthesize(config)
    config.overwrite = True
    assert {record["temperature"] for record in answered(config).values()} == {0.0, 0.7}


def test_tokens_that_are_not_the_verifiers_are_a_failure_each(tmp_path, verifier_config, log):
    changed = {
        5: {"token_ids": [10**6]},
        7: {"messages": [{"role": "user", "content": "How long do I cook [REDACTED] eggs?"}]},
        8: {"prompt_token_ids": log[9]["prompt_token_ids"]},
        9: {"system": "Be brief."},
    }
    rows = [row | changed.get(row["id"], {}) for row in log]
    config = config_of(tmp_path, verifier_config, rows)
    config.data.heldout_share = 0.0
    made = answered(config)
    assert len(made) == len(log) - 4
    failures = {one["id"]: one["reason"] for one in read_journal(config.conversations_folder / "failures.jsonl")}
    assert failures.pop("log/train/5") == "the verifier has no embedding of a token"
    assert failures == {f"log/train/{n}": "the logged tokens do not hold the question" for n in (7, 8, 9)}


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": [1]},
        {"prompt_token_ids": [], "token_ids": [1]},
        {"prompt_token_ids": [1], "token_ids": ["a"]},
        {"prompt_token_ids": [1], "token_ids": [-1]},
        {"prompt_token_ids": [1], "token_ids": [True]},
        {"prompt_token_ids": "12", "token_ids": [1]},
    ],
)
def test_half_a_logged_answer_is_malformed(fields):
    with pytest.raises(
        ValueError, match="must have lists of token ids, not empty, in both of prompt_token_ids and tok"
    ):
        read_prompt({"prompt": "a?", **fields}, "s", 0, local=True, logged=True)


def test_a_logged_answer_to_images_is_refused():
    parts = [{"type": "image_url", "image_url": {"url": "https://h.org/a.png"}}]
    row = {"messages": [{"role": "user", "content": parts}], "prompt_token_ids": [1], "token_ids": [2]}
    with pytest.raises(
        ValueError, match="has images, whose tokens in prompt_token_ids cannot be told: remove token_ids"
    ):
        read_prompt(row, "s", 0, local=True, logged=True)
    assert read_prompt(row, "s", 0, local=True)[0].logged is None


def test_a_request_without_an_answer_is_a_prompt():
    for fields in ({"prompt_token_ids": [1]}, {"prompt_token_ids": [1], "token_ids": []}):
        assert read_prompt({"prompt": "a?", **fields}, "s", 0, local=True, logged=True)[0].logged is None


def test_answers_of_another_model_are_told_from_the_verifiers_own(tmp_path, verifier_config, log):
    rows = [row | {"token_ids": row["token_ids"][::-1]} if row["id"] % 4 == 0 else row for row in log]
    config = config_of(tmp_path, verifier_config, rows)
    synthesize(config)
    dump(config)
    store = HiddenStateStore(config.hidden_states_folder)
    found, looked = foreign_samples(store, verifier_config, 0.7)
    long = [name for n, name in enumerate(store.ids) if store.loss_mask(n).sum() > 16 and not is_heldout(name, SHARE)]
    assert looked == len(long) > 10
    assert found == [name for name in long if int(name.split("/")[-1]) % 4 == 0] != []
