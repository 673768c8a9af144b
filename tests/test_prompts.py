"""Prompt sources of the usual forms."""

import json

import pytest
from fledge.conf.schema import DataConfig, EvaluateConfig, SourceConfig
from fledge.data_synthesis.prompts import load_prompts
from fledge.data_synthesis.split import is_heldout
from fledge.eval.questions import load_questions

ULTRACHAT = {"prompt_id": "f0e3", "messages": [
    {"role": "user", "content": "a?"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "b?"},
]}  # fmt: skip
MAGPIE = {"uuid": "77", "conversations": [{"from": "human", "value": "c?"}, {"from": "gpt", "value": "y"}]}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, **changes):
    return load_prompts(DataConfig(sources=[SourceConfig(path=path, **changes)]))


def test_the_real_schemas_are_read_with_stable_ids(tmp_path):
    path = written(tmp_path / "chats.jsonl", [ULTRACHAT, MAGPIE, {"prompt": "d?"}, {"turns": ["e?", "f?"], "id": 5}])
    prompts = load(path)
    assert [prompt.id for prompt in prompts] == [f"chats/train/{i}" for i in ("f0e3", "77", 2, 5)]
    assert [prompt.turns for prompt in prompts] == [("a?", "b?"), ("c?",), ("d?",), ("e?", "f?")]


def test_parquet_and_json_files_are_read(tmp_path):
    from datasets import Dataset

    Dataset.from_list([ULTRACHAT, ULTRACHAT | {"prompt_id": "2"}]).to_parquet(tmp_path / "data.parquet")
    assert [prompt.turns for prompt in load(str(tmp_path / "data.parquet"))] == [("a?", "b?")] * 2
    (tmp_path / "data.json").write_text(json.dumps([MAGPIE]))
    assert load(str(tmp_path / "data.json"))[0].turns == ("c?",)


def test_limit_takes_the_first_prompts(tmp_path):
    path = written(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(9)])
    assert len(load(path, limit=4)) == 4
    assert len(load("embedded", limit=7)) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl line 2 is malformed"),
        (b'{"prompt": "\xff"}\n', "p.jsonl line 1 is malformed"),
        (b'{"text": "a", "label": 1}\n', "has the fields text, label; one of messages, conversations, turns or prompt"),
        (b'{"messages": [{"text": "hi"}]}\n', "row 1: every message needs 'role' and 'content'"),
        (b'{"prompt": " "}\n', "row 1 has no user turn or an empty one"),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "two prompts have the id 'p/train/1'"),
        (b"", "yield no prompt"),
    ],
)
def test_malformed_sources_are_named(tmp_path, content, message):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "p.jsonl"))


def test_a_source_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.jsonl"):
        load(str(tmp_path / "missing.jsonl"))


def test_the_held_out_split_depends_on_the_id_alone():
    ids = [f"source/train/{i}" for i in range(5000)]
    share = sum(is_heldout(i, 0.1) for i in ids) / len(ids)
    assert 0.08 < share < 0.12
    assert all(is_heldout(i, 0.2) for i in ids if is_heldout(i, 0.1))


def test_questions_in_mt_bench_form_are_read_by_category(tmp_path):
    rows = [{"question_id": i, "category": "math" if i % 2 else "stem", "turns": ["a?", "b?"]} for i in range(6)]
    options = EvaluateConfig(questions=written(tmp_path / "question.jsonl", rows), questions_per_category=2)
    questions = load_questions(options)
    assert [(q.id, q.category) for q in questions] == [
        ("question/0", "stem"), ("question/1", "math"), ("question/2", "stem"), ("question/3", "math")
    ]  # fmt: skip
    written(tmp_path / "question.jsonl", [rows[0], rows[0]])
    with pytest.raises(ValueError, match="two questions have the id 'question/0'"):
        load_questions(options)
    written(tmp_path / "question.jsonl", [{"question": "a?"}])
    with pytest.raises(ValueError, match="row 1 has no turns"):
        load_questions(options)
