"""Which prompts ask the same, and which texts are like an evaluation question."""

import json
import random
import sys
from collections import Counter

import pytest
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.schema import Config, DataConfig, SourceConfig, validate
from fledge.data_synthesis.prompts.near_duplicates import RUN, NearDuplicates, Questions, canonical, fingerprint
from fledge.data_synthesis.prompts.prepare import prepare_prompts
from fledge.data_synthesis.prompts.rows import Prompt


def test_what_two_prompts_ask_is_told_apart_by_signs_systems_turns_and_images():
    image = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "1.png"}}]
    other = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "2.png"}}]
    different = [
        ("C",),
        ("C++",),
        ("2 + 3",),
        ("2 - 3",),
        ("a b",),
        ("a", "b"),
        ("What?",),
        (image,),
        (other,),
        ("?",),
        ("!",),
    ]
    prints = [fingerprint(Prompt("", "", turns)) for turns in different]
    prints.append(fingerprint(Prompt("", "", ("C",), "Be short.")))
    assert len(set(prints)) == len(different) + 1
    assert canonical("  “Straße”,\n no. 1…") == canonical("STRASSE no １")


def test_a_text_is_like_a_question_exactly_if_they_share_a_run_of_13_words():
    drawn = random.Random(3)
    found = Counter()
    for _ in range(400):
        question = [drawn.choice("ab") for _ in range(drawn.randrange(10, 40))]
        text = [drawn.choice("ab") for _ in range(drawn.randrange(10, 60))]
        if drawn.random() < 0.5:
            at, start = drawn.randrange(len(text)), drawn.randrange(len(question))
            text[at:at] = question[start : start + drawn.choice((12, 13, 14))]
        runs = [{tuple(side[i : i + RUN]) for i in range(len(side) - RUN + 1)} for side in (question, text)]
        expected = bool(runs[0] & runs[1]) or question == text
        assert Questions([" ".join(question)]).like(" ".join(text)) == expected
        found[expected] += 1
    assert min(found[True], found[False]) > 50


@pytest.mark.parametrize(
    "question",
    [
        "请写一篇关于人工智能在医疗领域应用的文章",
        "日本で一番高い山の名前を教えてください",
        "ประเทศไทยมีกี่จังหวัดและมีประชากรเท่าไร",
    ],
)
def test_scripts_without_spaces_count_characters(question):
    questions = Questions([f"GPT-4: {question}"])
    assert questions.like(f"好的 ok {question} 谢谢")
    assert questions.like(f"go on {question[2 : RUN + 2]} please")
    assert not questions.like(f"go on {question[2 : RUN + 1]} please")


def test_short_questions_are_found_as_whole_turns_alone():
    questions = Questions(["Name a prime."])
    assert questions.like("name a prime!")
    assert not questions.like("Please name a prime.")


def jaccard(one: str, other: str) -> float:
    first, second = ({text[at : at + 5] for at in range(max(1, len(text) - 4))} for text in (one, other))
    return len(first & second) / len(first | second)


def test_near_duplicates_are_told_by_the_turns_under_one_system_message():
    pytest.importorskip("datasketch")
    system = "You are a helpful assistant of a shop for shoes. " * 40
    asked = "How long does a parcel to Norway take, and what does it cost if it is heavy?"
    prompts = [
        Prompt("", "", (asked,), system),
        Prompt("", "", ("Do you have these boots in red and in a larger size than fifty?",), system),
        Prompt("", "", (asked + " Thanks!",), "Answer in rhymes."),
        Prompt("", "", (asked + " Thanks.",), system),
    ]
    near = NearDuplicates(0.8, prompts.__getitem__)
    assert [near.add(number, prompt) for number, prompt in enumerate(prompts)] == [True, True, True, False]


def test_near_duplicates_are_those_of_a_plain_comparison():
    pytest.importorskip("datasketch")
    drawn, words = random.Random(0), [f"{name}{n}" for n in range(40) for name in ("red", "owl", "mill")]
    texts = [" ".join(drawn.choices(words, k=12)) for _ in range(60)]
    for _ in range(240):  # near copies of earlier ones, and of those in turn
        changed = drawn.choice(texts).split()
        for place in drawn.sample(range(12), drawn.randrange(4)):
            changed[place] = drawn.choice(words)
        texts.append(" ".join(changed))
    prompts = [Prompt("", "", (text,)) for text in texts]
    near, expected = NearDuplicates(0.8, prompts.__getitem__), list[str]()
    for number, text in enumerate(texts):
        alone = all(jaccard(text, other) < 0.8 for other in expected)
        assert near.add(number, prompts[number]) == alone, text
        expected += [text] * alone
    assert 60 < len(expected) < 240


def test_datasketch_is_needed_where_prompts_are_prepared_and_nowhere_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    validate(Config(name="x", data=DataConfig(near_duplicates=0.8)))
    with pytest.raises(ValueError, match=r"^data.near_duplicates needs the package datasketch, .* or set it to null$"):
        NearDuplicates(0.8, [].__getitem__)


def test_near_duplicates_of_all_sources_are_left_out_and_counted(tmp_path):
    pytest.importorskip("datasketch")
    verse = "Write a poem about the sea and all of its waves, for a friend who has never seen it"
    rows = {"a": [verse, "Name a colour"], "b": [f"{verse}!", verse.replace("poem", "song"), "Name a town"]}
    sources = []
    for name, texts in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(texts)))
        sources.append(SourceConfig(path=str(path)))
    config = Config(name="run", runs_dir=str(tmp_path), data=DataConfig(sources=sources, near_duplicates=0.8))
    prepared = prepare_prompts(config)
    assert sorted(prompt.id for prompt in prepared.read()) == ["a/train/0", "a/train/1", "b/train/2"]
    assert [prepared.counts["sources"]["b/train"][name] for name in ("duplicate", "near_duplicate", "taken")] == [
        1,
        1,
        1,
    ]
    config.data.near_duplicates = None
    config.name = "all"
    assert prepare_prompts(config).count == 4
    assert "near_duplicates" not in read_manifest(config.prompts_folder, "prompts")["settings"]
