"""Turns, sequences, and the messages that they are of."""

import pytest
from fledge.data_synthesis.tokens.chat_template import (
    Sequence,
    Turn,
    answer_text,
    check_messages,
    has_images,
    join_turns,
    prompt_tokens,
    template_turns,
)
from fledge.data_synthesis.tokens.sequences import leading_answers, num_whole_answers, sequences_problem


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def written(tokenizer, sequence: Sequence) -> list[str]:
    return [tokenizer.decode(sequence.token_ids[start:end]) for start, end in sequence.answers]


def test_an_answer_is_its_text_and_its_end_of_turn_and_nothing_else(verifier):
    tokenizer = verifier.tokenizer
    (turn,) = template_turns(tokenizer, turns("Add 2 and 3.", "It is 5."), verifier.end_token_ids)
    assert tokenizer.decode(turn.answer) == "It is 5." + tokenizer.eos_token
    assert turn.prompt == prompt_tokens(tokenizer, turns("Add 2 and 3."))


def test_every_turn_of_a_conversation_is_as_it_was_written(verifier):
    tokenizer = verifier.tokenizer
    messages = [
        {"role": "system", "content": "Be short."},
        *turns("Hello.", "Hi!", "And now?", "Still hi.", "Bye.", "Bye!"),
    ]
    (sequence,) = join_turns(template_turns(tokenizer, messages, verifier.end_token_ids))
    assert written(tokenizer, sequence) == [text + tokenizer.eos_token for text in ("Hi!", "Still hi.", "Bye!")]


def with_template(tokenizer, template):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("special", "reasoning", "marker"),
    [
        (
            ["<|channel|>", "<|message|>", "<|start|>", "<|end|>"],
            "<|channel|>analysis<|message|>Easy: add.<|end|><|start|>assistant",
            "<|channel|>final<|message|>",
        ),
        (["<|channel>", "<channel|>"], "<|channel>thought\nEasy: add.", "<channel|>"),
    ],
)
def test_reasoning_that_special_tokens_mark_is_no_part_of_an_answers_text(verifier, special, reasoning, marker):
    tokenizer = with_template(verifier.tokenizer, verifier.tokenizer.chat_template)
    tokenizer.add_tokens(special, special_tokens=True)

    def text_of(said):
        return answer_text(tokenizer, tokenizer.encode(said, add_special_tokens=False))

    assert text_of(f"{reasoning}{marker}It is 5.{tokenizer.eos_token}") == "It is 5."
    assert text_of(f"{reasoning}{marker}No.{reasoning}{marker}It is 5.") == "It is 5."
    assert text_of(f"{reasoning}{marker}") == ""
    assert text_of("It is 5." + tokenizer.eos_token) == "It is 5."
    assert "Easy: add." in text_of(reasoning), "cut within it: there is nothing else"
    tokens = verifier.tokenizer.encode(f"a{marker}b", add_special_tokens=False)
    assert answer_text(verifier.tokenizer, tokens).startswith("a<"), "to this tokenizer it is text"


def test_what_a_template_writes_after_the_end_of_turn_is_not_the_verifiers(verifier):
    eos = verifier.tokenizer.eos_token
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}" + eos + "\n\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = with_template(verifier.tokenizer, template)
    (sequence,) = join_turns(template_turns(tokenizer, turns("a?", "b.", "c?", "d."), verifier.end_token_ids))
    assert written(tokenizer, sequence) == ["b." + eos, "d." + eos]


def test_a_cut_answer_has_no_end_of_turn(verifier):
    messages = turns("a?", "b.", "c?", "d and")
    whole, cut = template_turns(verifier.tokenizer, messages, verifier.end_token_ids, ["stop", "length"])
    assert verifier.tokenizer.decode(whole.answer) == "b." + verifier.tokenizer.eos_token
    assert verifier.tokenizer.decode(cut.answer) == "d and"


def test_an_answer_that_is_read_back_in_other_tokens_starts_a_sequence():
    """The verifier wrote `1 2`, and read them back as 3 before its next answer."""
    joined = join_turns([Turn([7], [1, 2, 9]), Turn([7, 3, 9, 8], [4, 9]), Turn([7, 3, 9, 8, 4, 9, 8], [5, 9])])
    assert joined == [Sequence([7, 1, 2, 9], [(1, 4)]), Sequence([7, 3, 9, 8, 4, 9, 8, 5, 9], [(4, 6), (7, 9)])]
    assert joined[1].as_json() == {"token_ids": [7, 3, 9, 8, 4, 9, 8, 5, 9], "answers": [[4, 6], [7, 9]]}


def test_a_prompt_that_ends_within_the_tokens_before_starts_a_sequence():
    assert [len(s.answers) for s in join_turns([Turn([7], [1, 9]), Turn([7, 1], [2, 9])])] == [1, 1]


def test_a_conversation_is_cut_behind_its_n_th_answer():
    sequences = [Sequence([7, 1, 9, 8, 2, 9], [(1, 3), (4, 6)]), Sequence([7, 8, 3, 9], [(2, 4)])]
    assert leading_answers(sequences, 3) == sequences
    assert leading_answers(sequences, 2) == sequences[:1]
    assert leading_answers(sequences, 1) == [Sequence([7, 1, 9], [(1, 3)])]
    assert leading_answers(sequences, 0) == []
    assert [num_whole_answers(r) for r in (["stop"] * 2, ["stop", "length"], ["length"], [])] == [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("sequences", "problem"),
    [
        ([{"token_ids": [1, 2, 3, 4], "answers": [[1, 2], [2, 4]]}], None),
        ([{"token_ids": [1, 2], "answers": [[1, 2]]}, {"token_ids": [1, 2], "answers": [[0, 1]]}], None),
        ([{"token_ids": [1, 2], "answers": [[1, 2]]}], "sequences hold 1 answers and messages 2"),
        ([], "sequences hold 0 answers"),
        ({"token_ids": []}, "must be a list"),
        ([{"token_ids": [1]}], "must be a list"),
        ([{"token_ids": [1, 50], "answers": [[0, 1], [1, 2]]}], "ids of the verifier's vocabulary, 0 to 49"),
        ([{"token_ids": [1, -1], "answers": [[0, 1], [1, 2]]}], "ids of the verifier's vocabulary"),
        ([{"token_ids": [1, 1.0], "answers": [[0, 1], [1, 2]]}], "ids of the verifier's vocabulary"),
        ([{"token_ids": [], "answers": []}], "ids of the verifier's vocabulary"),
        ([{"token_ids": [1, 2], "answers": []}], "list of spans"),
        ([{"token_ids": [1, 2], "answers": [[0], [1, 2]]}], "list of spans"),
        ([{"token_ids": [1, 2], "answers": [[-1, 1], [1, 2]]}], "list of spans"),
        ([{"token_ids": [1, 2], "answers": [[1, 2], [0, 1]]}], "ascending"),
        ([{"token_ids": [1, 2], "answers": [[0, 1], [1, 3]]}], "within 2 tokens"),
        ([{"token_ids": [1, 2], "answers": [[0, 1], [1, 1]]}], "none empty"),
    ],
)
def test_malformed_sequences_are_named(sequences, problem):
    found = sequences_problem(sequences, num_answers=2, vocab_size=50)
    assert (found is None) if problem is None else (found is not None and problem in found)


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "list"),
        ([{"role": "user"}], "content"),
        (turns("a?", "b.", "c?"), "roles must be user and assistant in turn"),
        ([{"role": "assistant", "content": "x"}], "got assistant"),
        ([{"role": "system", "content": "x"}], "roles"),
        (turns("", "b."), "message 1 (user) is empty"),
        (turns("a?", ""), "message 2 (assistant) is empty"),
        ([*turns("a?"), {"role": "assistant", "content": None}], "message 2 (assistant) must be text, got NoneType"),
        ([*turns("a?"), {"role": "assistant", "content": [IMAGE]}], "message 2 (assistant) must be text, got list"),
        ([*turns("a?"), {"role": "assistant", "content": "b", "reasoning_content": 1}], "reasoning_content"),
        ([{"role": "user", "content": "a", "reasoning_content": "b"}, *turns("a?", "b.")[1:]], "reasoning_content"),
        ([{"role": "user", "content": []}, *turns("a?", "b.")[1:]], "content parts"),
        ([{"role": "user", "content": [{"type": "text"}]}, *turns("a?", "b.")[1:]], "content parts"),
        ([{"role": "user", "content": ["text"]}, *turns("a?", "b.")[1:]], "content parts"),
        (turns("a?", "b."), None),
        ([{"role": "system", "content": ""}, *turns("a?", "b.")], None),
        ([{"role": "user", "content": [IMAGE]}, *turns("a?", "b.")[1:]], None),
        ([*turns("a?"), {"role": "assistant", "content": "b", "reasoning_content": "c"}], None),
        ([*turns("a?"), {"role": "assistant", "content": "", "reasoning_content": "cut"}], None),
    ],
)
def test_malformed_messages_are_named(messages, problem):
    found = check_messages(messages)
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_images_are_seen_among_content_parts():
    text = {"type": "text", "text": "a?"}
    assert has_images([{"role": "user", "content": [text, IMAGE]}])
    assert not has_images([{"role": "user", "content": [text]}, *turns("a?", "b.")])
