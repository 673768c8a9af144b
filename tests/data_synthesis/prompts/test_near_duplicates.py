"""Which prompts ask the same, and which texts are like an evaluation question."""

import random
from collections import Counter

import pytest
from fledge.data_synthesis.prompts.near_duplicates import RUN, Questions, canonical, fingerprint
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
