"""Content in parts: read as parts where a template takes them, else as one text."""

from __future__ import annotations

import pytest
from fledge.data_synthesis.tokens.chat_template import NoExactSpanError, fit_content, prompt_tokens, template_turns
from template_shapes import IM, SHAPES, Shape, headers
from transformers import PreTrainedTokenizerBase


def test_content_parts_are_read_where_the_template_reads_them():
    parts = [{"type": "text", "text": "Blue?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes, no."}]
    tokenizer = SHAPES["llama 4"].tokenizer()
    (turn,) = template_turns(tokenizer, messages, [tokenizer.eos_token_id])
    assert tokenizer.decode(turn.prompt).count("<|image|>") == 1
    assert tokenizer.decode(turn.answer) == "Yes, no.<|eot|>"
    with pytest.raises(NoExactSpanError, match="refuses"):
        template_turns(SHAPES["chatml"].tokenizer(), messages, [0])


PLUS = headers("<|im_start|>", "\\n", "<|im_end|>\\n")
PARTS_ALONE = """{% for m in messages %}<|im_start|>{{ m.role + '\\n' }}{% for part in m.content %}
{%- if part.type == 'image' %}<|image|>{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
FIRST_PART = PLUS.replace("+ m.content +", "+ (m.content if m.content is string else m.content[0].text) +")
JSON = PLUS.replace("+ m.content +", "+ (m.content if m.content is string else m.content | tojson) +")
SPLITS = PLUS.replace("+ m.content +", "+ m.content.split('</think>')[-1] +")


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", ["llama 3", "gemma", "mistral", "deepseek r1, marked", "qwen 3, thinking", "chatml"])
def test_text_parts_are_read_as_one_text_where_a_template_takes_a_text(name):
    """Joined as vLLM joins them (SGLang takes spaces, so a server is sent the text)."""
    shape = SHAPES[name]
    check_joined(shape.tokenizer())


@pytest.mark.parametrize("template", [FIRST_PART, JSON, SPLITS], ids=["first part", "as JSON", "split"])
def test_text_parts_are_joined_where_a_template_would_lose_or_garble_some(template):
    check_joined(Shape(template, "<|im_end|>", IM).tokenizer())


def check_joined(tokenizer: PreTrainedTokenizerBase) -> None:
    for parts, text in ((in_parts("Blue?"), "Blue?"), (in_parts("Blue", "12?"), "Blue\n12?")):
        asked, said = ([{"role": "user", "content": content}] for content in (parts, text))
        assert prompt_tokens(tokenizer, asked) == prompt_tokens(tokenizer, said)
        assert fit_content(tokenizer, asked) == said
        answer = {"role": "assistant", "content": "Yes, no."}
        ends = [tokenizer.eos_token_id]
        assert template_turns(tokenizer, [*asked, answer], ends) == template_turns(tokenizer, [*said, answer], ends)


def test_parts_stay_where_a_template_takes_them_or_one_is_an_image():
    for name, parts in (("llama 4", in_parts("Blue", "12?")), ("chatml", [*in_parts("Blue"), {"type": "image"}])):
        asked = [{"role": "user", "content": parts}]
        assert fit_content(SHAPES[name].tokenizer(), asked) == asked
    tokenizer = SHAPES["llama 4"].tokenizer()
    read = tokenizer.decode(prompt_tokens(tokenizer, [{"role": "user", "content": in_parts("Blue", "12?")}]))
    assert "\n\nBlue12?<|eot|>" in read


def test_a_text_is_a_part_where_a_template_takes_parts_alone():
    tokenizer = Shape(PARTS_ALONE, "<|im_end|>", (*IM, "<|image|>")).tokenizer()
    messages = [{"role": "system", "content": "no."}, {"role": "user", "content": "Blue?"}]
    assert "no.<|im_end|>\n<|im_start|>user\nBlue?<|im_end|>" in tokenizer.decode(prompt_tokens(tokenizer, messages))
    answered = [*messages, {"role": "assistant", "content": "Yes, no."}]
    (turn,) = template_turns(tokenizer, answered, [tokenizer.eos_token_id])
    assert tokenizer.decode(turn.answer) == "Yes, no.<|im_end|>"
