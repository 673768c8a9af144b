"""Questions of the benchmarks that acceptance is measured on, in the forms they are published in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fledge.conf.schema import Config, EvaluateConfig, VerifierConfig
from fledge.data_synthesis.tokens.images import conversation_images
from fledge.eval.questions.question import Question, load_questions, questions_identity
from fledge.eval.questions.reader import QuestionReader

MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Shorter."], "reference": None}
H4 = {"prompt_id": 97, "category": "math", "prompt": ["What is 2 + 2?", "And 3 + 3?"], "reference": ["4", "6"]}
HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f", "test": "assert f(1) == 1"}
GSM8K = {"question": "Natalia sold 48 clips. How many are 3?", "answer": "3 * 48 = 144\n#### 144"}
CNN = {"id": "42c0", "article": "LONDON -- It rained.", "highlights": "Rain ."}


def written(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def in_hub_form(folder: Path, row: dict[str, Any], subset: str, split: str) -> str:
    """A dataset as the hub has it: Parquet, subsets and splits named in README.md."""
    (folder / subset).mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), folder / subset / f"{split}-00000-of-00001.parquet")
    files = f"  data_files:\n  - split: {split}\n    path: {subset}/{split}-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n{files}---\n")
    return str(folder)


@pytest.mark.parametrize(
    ("row", "subset", "split", "name", "category", "turns"),
    [
        (MT_BENCH, "default", "train", "81", "writing", ("Write a post.", "Shorter.")),
        (H4, "default", "train", "97", "math", ("What is 2 + 2?", "And 3 + 3?")),
        (HUMANEVAL, "code", "test", "HumanEval/0", "humaneval", ("Complete the code I provided.\ndef f(x):\n",)),
        (GSM8K, "main", "test", "1", "gsm8k", ("Natalia sold 48 clips. How many are 3?",)),
        (CNN, "3.0.0", "test", "42c0", "cnn_dailymail", ("Summarize: LONDON -- It rained.",)),
    ],
    ids=["philschmid/mt-bench", "HuggingFaceH4/mt_bench_prompts", "humaneval", "gsm8k", "cnn_dailymail"],
)  # fmt: skip
def test_benchmarks_are_read_in_the_hubs_form_and_as_jsonl(tmp_path, row, subset, split, name, category, turns):
    hub = in_hub_form(tmp_path / "bench", row, subset, split)
    (parquet,) = load_questions(EvaluateConfig(questions=hub, questions_subset=subset, questions_split=split))
    (jsonl,) = load_questions(EvaluateConfig(questions=written(tmp_path / "bench.jsonl", row)))
    assert parquet == jsonl == Question(f"bench/{name}", category, turns)


def test_a_question_longer_than_its_rotation_allows_is_named_and_left_out(tmp_path, verifier_config, capsys):
    folder = shutil.copytree(verifier_config.path, tmp_path / "verifier")
    values = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({**values, "rope_parameters": rope}))
    config = Config("run", verifier=VerifierConfig(path=str(folder)))
    questions = [Question(name, "all", (text,)) for name, text in (("short", "Who?"), ("long", "Who is it? " * 40))]
    QuestionReader(config).check(questions)
    said = capsys.readouterr().err
    assert "left out, 1 of them: long: its prompt of" in said
    assert "context of 64" in said


def test_a_file_of_plain_prompts_is_asked_as_it_stands(tmp_path):
    path = written(
        tmp_path / "mine.jsonl",
        {"prompt": "a?"},
        {"turns": "b?", "category": "x", "system": ""},
        {"prompt": ["c?"], "id": 7},
    )
    asked = load_questions(EvaluateConfig(questions=path))
    assert [(q.id, q.category, q.turns) for q in asked] == [
        ("mine/1", "all", ("a?",)), ("mine/2", "x", ("b?",)), ("mine/7", "all", ("c?",))
    ]  # fmt: skip


def test_text_parts_are_asked_as_they_stand(tmp_path):
    first, second = ([{"type": "text", "text": text} for text in texts] for texts in (("a", "b?"), ("c?",)))
    rows = [
        {"turns": [first, "d?"], "images": ["https://example.org/1.png"]},
        {"turns": [first, second]},
        {"prompt": first},
    ]
    pictured, asked, alone = load_questions(EvaluateConfig(questions=written(tmp_path / "q.jsonl", *rows)))
    assert (asked.turns, alone.turns) == ((first, second), (first,))
    assert [message["content"] for message in asked.history(["x"])] == [first, "x", second]
    assert [part["type"] for part in pictured.history([])[0]["content"]] == ["image_url", "text", "text"]


def test_a_limit_takes_the_first_of_each_category(tmp_path):
    rows = [{"question_id": i, "category": "math" if i % 2 else "stem", "turns": ["a?", "b?"]} for i in range(6)]
    options = EvaluateConfig(questions=written(tmp_path / "question.jsonl", *rows), questions_per_category=2)
    assert [(q.id, q.category) for q in load_questions(options)] == [
        ("question/0", "stem"), ("question/1", "math"), ("question/2", "stem"), ("question/3", "math")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?"}, r"line 2 has the fields question: .*\(MT-Bench\).*\(GSM8K\).* is required"),
        ({}, r"line 2 has the fields \(none\): "),
        (["a?"], r"line 2 must be an object, got list"),
        ({"turns": ["a?", ""]}, r"line 2 has turns \"\['a\?', ''\]\": a text or a list of texts is required"),
        ({"turns": []}, r"line 2 has turns '\[\]': a text or a list"),
        ({"turns": [[{"type": "text", "text": " "}]]}, r"line 2 has turns .*: a text or a list"),
        ({"turns": [[{"type": "image_url", "image_url": {"url": "x"}}]]}, r"line 2 has turns .*: a text or a list"),
        ({"prompt": [{"role": "user", "content": "a?"}]}, r"line 2 has prompt .*: a text or a list"),
        ({"task_id": "x", "prompt": 3}, r"line 2 has prompt '3': a text or a list"),
        ({"article": " "}, r"line 2 has article ' ': a text or a list"),
        ({"turns": ["a?"], "category": 3}, r"line 2 has category 3: a text is required"),
        ({"turns": ["a?"], "category": "heldout"}, r"line 2 has category 'heldout': .* not heldout"),
        ({"turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"]},
         r"line 2 is a placeholder of SPEED-Bench, .*specdec_bench.*`python prepare_data\.py --config qualitative"),
        ({"turns": ["a?"], "images": "a.png"}, r"line 2 has images 'a\.png': a list of paths or URLs is required"),
        ({"turns": ["a?"], "images": ["a.png"]}, r"line 2 has images of which .*a\.png is not there"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named_with_its_field(tmp_path, row, message):
    path = written(tmp_path / "question.jsonl", MT_BENCH, row)
    with pytest.raises(ValueError, match=r"^evaluate\.questions: .*question\.jsonl " + message):
        load_questions(EvaluateConfig(questions=path))


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ('{"turns": ["a?"]}\n{"turns": \n', {}, r"^evaluate\.questions: .*q\.jsonl line 2 is malformed JSON"),
        ("", {}, r"^evaluate\.questions .*q\.jsonl holds no question"),
        ('{"prompt": "a?", "id": 1}\n' * 2, {}, r"two questions have the id 'q/1'"),
        (
            '{"prompt": "a?"}\n',
            {"questions_subset": "main"},
            r"^evaluate\.questions_subset must be null for a file, got",
        ),
    ],
)
def test_a_file_that_cannot_be_asked_is_named(tmp_path, content, changes, message):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_questions(EvaluateConfig(questions=str(tmp_path / "q.jsonl"), **changes))


def test_a_source_that_is_missing_is_asked_for_by_the_option(tmp_path):
    with pytest.raises(ValueError, match=r"^evaluate\.questions: .*gone\.jsonl does not exist"):
        load_questions(EvaluateConfig(questions=str(tmp_path / "gone.jsonl")))
    with pytest.raises(ValueError, match=r"^evaluate\.questions is required: a hub id such as"):
        load_questions(EvaluateConfig())
    folder = in_hub_form(tmp_path / "gsm8k", GSM8K, "main", "test")
    with pytest.raises(ValueError, match=r"^evaluate\.questions: .* has no split 'train'; it has test"):
        load_questions(EvaluateConfig(questions=folder, questions_subset="main"))


def test_images_stand_before_the_first_turn_of_every_history(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(b"one")
    row = {"turns": ["What is it?", "Why?"], "images": ["images/1.png", "https://example.org/2.png"]}
    (question,) = load_questions(EvaluateConfig(questions=written(tmp_path / "q.jsonl", row)))
    addresses = [str(tmp_path / "images" / "1.png"), "https://example.org/2.png"]
    for answers in ([], ["A cat."]):
        history = question.history(answers)
        assert conversation_images(history) == addresses
        assert [part["type"] for part in history[0]["content"]] == ["image_url", "image_url", "text"]
        assert history[0]["content"][-1]["text"] == "What is it?"
        assert [message["content"] for message in history[1:]] == (["A cat.", "Why?"] if answers else [])


def test_what_is_asked_changes_with_an_images_content_and_not_with_its_place(tmp_path):
    row = {"turns": ["What is it?"], "images": ["1.png"]}
    names = []
    for place, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.png").write_bytes(content)
        path = written(tmp_path / place / "q.jsonl", row)
        names.append(questions_identity(load_questions(EvaluateConfig(questions=path))))
    assert names[0] == names[1] != names[2]
