"""What the verifier wrote, told exactly, over the shapes that chat templates have."""

from __future__ import annotations

import random
import re

import pytest
from fledge.data_synthesis.tokens.chat_template import (
    NoExactSpanError,
    check_template,
    join_turns,
    prompt_tokens,
    template_turns,
)
from template_shapes import IM, SHAPES, THINK, Shape, byte_level, deepseek, headers, metaspace
from transformers import PreTrainedTokenizerBase

WORDS = [
    "Blue",
    "skies",
    "Yes,",
    "no.",
    "12",
    "Answer:",
    "größer",
    "日本",
    "x = 1;",
    "(a)",
    "👍🏽",
    "e\u0301",
    "[INST]",
    "<b>",
]
ODD = [
    " lead",
    "trail  ",
    "\nline",
    "line\n\n",
    "\n\n",
    "  ",
    "<think>",
    "<|im_end|>",
    "</s>",
    "<|eot_id|>",
    "a\r\nb",
    "\t",
]


def conversation(rng: random.Random, shape: Shape, odd: bool) -> list[dict[str, str]]:
    def text() -> str:
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        return rng.choice([rng.choice(ODD) + words, words + rng.choice(ODD), rng.choice(ODD)]) if odd else words

    messages = [{"role": "system", "content": rng.choice(["", text()])}] if shape.system and rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 5)):
        reasoning = {"reasoning_content": text()} if shape.reasoning and rng.random() < 0.7 else {}
        messages += [{"role": "user", "content": "USER " + text()}]
        messages += [{"role": "assistant", "content": text()} | reasoning]
    return messages


def written(tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int]) -> str:
    """Decode an answer where it stands, so that a space at its begin is not lost."""
    return tokenizer.decode(prompt + answer)[len(tokenizer.decode(prompt)) :]


def check_exact(shape: Shape, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> None:
    end = tokenizer.eos_token_id
    turns = template_turns(tokenizer, messages, [end])
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for place, turn in zip(places, turns, strict=True):
        assert written(tokenizer, turn.prompt, turn.answer) == shape.text(messages[place]) + shape.end
        assert turn.answer.count(end) == 1
        if not shape.opens_reasoning:
            assert turn.prompt == prompt_tokens(tokenizer, messages[:place])
    sequences = join_turns(turns)
    spans = [(s, span) for s in sequences for span in s.answers]
    for turn, (sequence, (start, stop)) in zip(turns, spans, strict=True):
        assert (sequence.token_ids[:start], sequence.token_ids[start:stop]) == (turn.prompt, turn.answer)
        assert "USER" not in tokenizer.decode(sequence.token_ids[start:stop])


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_counted_is_each_answer_and_its_end_marker(name):
    shape, rng = SHAPES[name], random.Random(name)
    tokenizer = shape.tokenizer()
    check_template(tokenizer, [tokenizer.eos_token_id])
    for _ in range(40):
        check_exact(shape, tokenizer, conversation(rng, shape, odd=False))


@pytest.mark.parametrize("name", SHAPES)
def test_odd_texts_are_told_exactly_but_for_what_cannot_be_told(name):
    """An end marker as text, and a line break that joins that of the header, are refused; nothing else is."""
    shape, rng = SHAPES[name], random.Random(name)
    tokenizer = shape.tokenizer()
    refused = 0
    for _ in range(120):
        messages = conversation(rng, shape, odd=True)
        answers = [message for message in messages if message["role"] == "assistant"]
        markers = [shape.end in m["content"] + m.get("reasoning_content", "") for m in answers]
        joins = [shape.joins and m["content"].startswith("\n") for m in answers]
        if any(markers + joins):
            first = next(n for n, wrong in enumerate(zip(markers, joins, strict=True), 1) if any(wrong))
            with pytest.raises(NoExactSpanError, match=f"answer {first} .* (the verifier read|marker as text)"):
                template_turns(tokenizer, messages, [tokenizer.eos_token_id])
            refused += 1
        else:
            check_exact(shape, tokenizer, messages)
    assert refused < 80


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_one_sequence_where_the_template_appends_only(name):
    shape = SHAPES[name]
    tokenizer = shape.tokenizer()
    texts = ["USER Blue?", "Yes, no.", "USER 12?", "Blue skies", "USER (a)", "no."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    joined = join_turns(template_turns(tokenizer, messages, [tokenizer.eos_token_id]))
    assert [len(sequence.answers) for sequence in joined] == ([1, 1, 1] if shape.rewrites else [3])
    if "mistral" in name:
        messages = [{"role": "system", "content": "Be short."}, *messages]
        joined = join_turns(template_turns(tokenizer, messages, [tokenizer.eos_token_id]))
        assert len(joined) == 3, "the system prompt moves to the last question"


def test_generation_marks_and_the_prompt_agree_where_both_apply():
    shape, rng = SHAPES["chatml, marked"], random.Random(5)
    tokenizer = shape.tokenizer()
    end = tokenizer.eos_token_id
    for _ in range(40):
        # Transformers' mask misses the later bytes of a character that ends an answer, so none does.
        messages = [m | {"content": m["content"] + "."} for m in conversation(rng, shape, odd=False)]
        (sequence,) = join_turns(template_turns(tokenizer, messages, [end]))
        rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        marked = rendered["assistant_masks"]
        ends = {i for i, token in enumerate(rendered["input_ids"]) if token == end and marked[i - 1]}
        counted = {i for start, stop in sequence.answers for i in range(start, stop)}
        assert counted == {i for i, inside in enumerate(marked) if inside} | ends
        assert sequence.token_ids == rendered["input_ids"][: len(sequence.token_ids)]


def test_a_generation_prompt_that_the_rendering_drops_is_refused_without_marks():
    shape = SHAPES["deepseek r1, marked"]
    tokenizer = shape.tokenizer()
    tokenizer.chat_template = deepseek()
    messages = [{"role": "user", "content": "Blue?"}, {"role": "assistant", "content": "Yes, no."}]
    with pytest.raises(NoExactSpanError) as refused:
        template_turns(tokenizer, messages, [tokenizer.eos_token_id])
    assert "answer 1 ('Yes, no.') has no exact loss mask" in str(refused.value)
    assert "'?<|Assistant|><think>\\n'" in str(refused.value)
    assert "'?<|Assistant|>Yes, no" in str(refused.value)
    with pytest.raises(ValueError, match=r"verifier\.path has a chat template that does not tell"):
        check_template(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("mark", [("", ""), ("{% generation %}", "{% endgeneration %}")])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_border_inside_a_token_is_refused(make, mark):
    """A prompt that ends in a line break, or in the middle of a word, merges with what follows."""
    prompt, answer = ("\\n", "\nBlue") if make is byte_level else ("Answer:", "Blue")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ '"
        + prompt
        + "' }}"
        + mark[0]
        + "{{ m.content }}"
        + mark[1]
        + "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '"
        + prompt
        + "' }}{% endif %}"
    )
    tokenizer = Shape(template, "</s>", (), make=make).tokenizer()
    messages = [{"role": "user", "content": "no. "}, {"role": "assistant", "content": answer}]
    with pytest.raises(NoExactSpanError, match="the verifier read"):
        template_turns(tokenizer, messages, [tokenizer.eos_token_id])
    messages[1]["content"] = "12"
    assert len(template_turns(tokenizer, messages, [tokenizer.eos_token_id])) == 1


DROPS_THINKING = headers("<|im_start|>", "\\n", "<|im_end|>\\n", "m.content.split('</think>')[-1]")
MISPLACED = (
    "{% for m in messages %}{{ m.role }}{% generation %}: {% endgeneration %}{{ m.content + eos_token }}{% endfor %}"
)
OPENS = "{% if add_generation_prompt %}assistant: <think>{% endif %}"


@pytest.mark.parametrize(
    ("template", "answer", "lost"),
    [
        (SHAPES["chatml"].template, {"content": "Yes, no.", "reasoning_content": "Answer: 12"}, "'Answer: 12'"),
        (SHAPES["chatml"].template, {"content": "Yes.", "reasoning_content": "Yes."}, "'Yes.'"),
        (SHAPES["chatml"].template, {"content": "no", "reasoning_content": "im_end"}, "'im_end'"),
        (DROPS_THINKING, {"content": "<think>Answer: 12</think>Yes, no."}, "'<think>Answer: 12</think>Yes, no.'"),
        (deepseek("{% generation %}", "{% endgeneration %}"), {"content": "no", "reasoning_content": "Blue"}, "'Blue'"),
        (MISPLACED + OPENS, {"content": "Yes, no."}, "'Yes, no.'"),
    ],
)
def test_an_answer_that_the_template_does_not_write_out_is_refused_with_what_is_missing(template, answer, lost):
    tokenizer = Shape(template, "<|im_end|>", THINK).tokenizer()
    messages = [{"role": "user", "content": "Blue 12?"}, {"role": "assistant", **answer}]
    with pytest.raises(NoExactSpanError, match=rf"(leaves out or changes|marks do not hold) {re.escape(lost)}$"):
        template_turns(tokenizer, messages, [tokenizer.eos_token_id])


@pytest.mark.parametrize("template", [SHAPES["chatml"].template, DROPS_THINKING])
def test_a_template_that_drops_reasoning_is_good_for_answers_without_any(template):
    tokenizer = Shape(template, "<|im_end|>", THINK).tokenizer()
    check_template(tokenizer, [tokenizer.eos_token_id])
    messages = [{"role": "user", "content": "Blue?"}, {"role": "assistant", "content": " Yes, no. "}]
    (turn,) = template_turns(tokenizer, messages, [tokenizer.eos_token_id])
    assert tokenizer.decode(turn.answer) == " Yes, no. <|im_end|>"


def test_an_answer_cut_in_its_reasoning_is_refused_where_the_template_would_close_it():
    tokenizer = SHAPES["qwen 3, thinking"].tokenizer()
    messages = [
        {"role": "user", "content": "Blue?"},
        {"role": "assistant", "content": "", "reasoning_content": "Answer: 12"},
    ]
    with pytest.raises(NoExactSpanError, match=r"answer 1 .* was cut within its reasoning"):
        template_turns(tokenizer, messages, [tokenizer.eos_token_id], ["length"])
    messages[1]["content"] = "Yes, no"
    (turn,) = template_turns(tokenizer, messages, [tokenizer.eos_token_id], ["length"])
    assert tokenizer.decode(turn.answer) == "<think>\nAnswer: 12\n</think>\n\nYes, no"


def test_what_a_template_writes_when_all_is_said_is_not_the_verifiers():
    """Some write the end of the text behind the last end of turn, and both end an answer."""
    shape = Shape(
        headers("<|im_start|>", "\\n", "<|im_end|>\\n") + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
        "<|im_end|>",
        (*IM, "<|endoftext|>"),
    )
    tokenizer = shape.tokenizer()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    messages = [{"role": "user", "content": "Blue?"}, {"role": "assistant", "content": "Yes, no."}]
    (turn,) = template_turns(tokenizer, messages, ends)
    assert tokenizer.decode(turn.answer) == "Yes, no.<|im_end|>"


def test_a_template_that_writes_no_end_of_turn_is_refused():
    template = "{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}"
    tokenizer = Shape(template, "</s>", ()).tokenizer()
    with pytest.raises(ValueError, match="none of the end-of-turn tokens"):
        check_template(tokenizer, [tokenizer.eos_token_id])


def test_earlier_reasoning_is_not_read_even_where_the_template_would_write_it():
    template = headers("<|im_start|>", "\\n", "<|im_end|>\\n", "(m.reasoning_content or '') + m.content")
    tokenizer = Shape(template, "<|im_end|>", IM).tokenizer()
    messages = [
        {"role": "user", "content": "Blue?"},
        {"role": "assistant", "content": "Yes, no.", "reasoning_content": "Answer: "},
        {"role": "user", "content": "12?"},
        {"role": "assistant", "content": "34", "reasoning_content": "skies: "},
    ]
    first, second = join_turns(template_turns(tokenizer, messages, [tokenizer.eos_token_id]))
    assert "Answer: Yes, no.<|im_end|>" in tokenizer.decode(first.token_ids)
    assert "Answer" not in tokenizer.decode(second.token_ids)
    assert tokenizer.decode(second.token_ids).endswith("skies: 34<|im_end|>")


def test_a_role_that_the_template_refuses_is_named():
    tokenizer = SHAPES["gemma"].tokenizer()
    with pytest.raises(ValueError, match="the chat template refuses the conversation \\(no system role here\\)"):
        prompt_tokens(tokenizer, [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])


def glm(start: str, end: str) -> str:
    """The next message's marker ends an answer (GLM-4); `start` and `end` mark answers, the last one's or earlier."""
    return (
        "[gMASK]{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\\n' }}"
        + f"{start}{{{{ m.content }}}}{end}"
        + "{% elif loop.first or messages[loop.index0 - 1].role != 'assistant' or not through %}"
        "{{ '<|' + m.role + '|>\\n' + m.content }}{% else %}{{ '\\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )


CONTENT = "{% generation %}", "{% endgeneration %}"
THROUGH = "{% generation %}", "{% if not loop.last %}<|user|>{% endif %}{% endgeneration %}"  # TRL's way
NEXT = (  # another family: every message begins with the token that ends an answer
    "{% for m in messages %}<|turn|>{{ m.role + ':\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:\n{% endif %}"
)
ENDED_BY_THE_NEXT = {
    "glm, content marked": (glm(*CONTENT), "<|user|>"),
    "glm, marked through the next marker": ("{% set through = true %}" + glm(*THROUGH), "<|user|>"),
    "every message begins with the end": (NEXT, "<|turn|>"),
}


@pytest.mark.parametrize("name", ENDED_BY_THE_NEXT)
def test_marks_tell_an_answer_that_the_next_message_ends(name):
    template, end = ENDED_BY_THE_NEXT[name]
    specials = ("[gMASK]", "<|system|>", "<|assistant|>", "<|endoftext|>")
    tokenizer = Shape(template, end, specials).tokenizer()
    ends = tokenizer.convert_tokens_to_ids([end, "<|endoftext|>"])
    check_template(tokenizer, ends)
    texts = ["Blue?", "Yes, no.", "12?", "Blue skies"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    first, second = template_turns(tokenizer, messages, ends)
    for turn, asked, text in ((first, messages[:1], texts[1]), (second, messages[:3], texts[3])):
        recorded = [*tokenizer.encode(text, add_special_tokens=False), ends[0]]  # what an engine gives
        assert (turn.prompt, turn.answer) == (prompt_tokens(tokenizer, asked), recorded)
    (joined,) = join_turns([first, second])
    assert len(joined.answers) == 2
    cut = template_turns(tokenizer, messages, ends, ["stop", "length"])[1]
    assert tokenizer.decode(cut.answer) == "Blue skies"


def test_an_answer_that_the_next_message_ends_is_refused_without_marks_with_the_cure():
    tokenizer = Shape(glm("", ""), "<|user|>", ("[gMASK]", "<|assistant|>")).tokenizer()
    with pytest.raises(
        ValueError, match=r"none of the end-of-turn tokens.*mark the answers in the template with \{% gen"
    ):
        check_template(tokenizer, [tokenizer.eos_token_id])
