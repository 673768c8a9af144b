"""What `chat_template_kwargs` gives a template, and which template is taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fledge.conf.schema import VerifierConfig
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.models.verifier.config import load_tokenizer, tokenizer_identity
from template_shapes import QWEN3, SHAPES
from transformers import PreTrainedTokenizerBase

READS_SETTINGS = """  {% macro say(text) %}{{ prefix }}{{ text }}{% endmacro %}
{% if flag is defined and not flag %}off {% endif %}
  {%- for m in messages %}
{{ say(m.content) }}{% if m.role == 'assistant' %}{% generation %}{{ nested.a[1].b }}{{ eos_token }}{% endgeneration %}
{% endif %}
    {% for n in numbers %}{{ n }} {{ nothing is none }}{% endfor %}
{% endfor %}"""
GIVEN = {
    "flag": False,
    "prefix": "'\"\\ %} {{ }} {% raw %}\n\r\n\t é 日本 👍 \u2028\x00",
    "nested": {"a": [1, {"b": "x"}], "c": {}},
    "numbers": [0, -1, 2.5, 1e-05, 10**20, -1e22],
    "nothing": None,
}


def saved(tokenizer: PreTrainedTokenizerBase, folder: Path, template: object) -> VerifierConfig:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return VerifierConfig(path=str(folder))


@pytest.mark.parametrize("begin", ["", "\n", "  ", "\n\n  ", "text\n", "{#- note -#}\n", "{%- if true %}\n{% endif %}"])
def test_settings_of_the_template_change_what_its_arguments_would_and_nothing_else(tmp_path, begin):
    plain = SHAPES["chatml"].tokenizer()
    config = saved(plain, tmp_path, begin + READS_SETTINGS)
    config.chat_template_kwargs = GIVEN
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    expected = plain.apply_chat_template(messages, tokenize=False, **GIVEN)
    assert load_tokenizer(config).apply_chat_template(messages, tokenize=False) == expected
    assert "off" in expected
    arguments = {"return_dict": True, "return_assistant_tokens_mask": True}
    ours = load_tokenizer(config).apply_chat_template(messages, **arguments)
    assert ours["assistant_masks"] == plain.apply_chat_template(messages, **arguments, **GIVEN)["assistant_masks"]
    assert any(ours["assistant_masks"])


def test_settings_of_the_template_belong_to_the_verifiers_identity(tmp_path):
    config = saved(SHAPES["qwen 3, thinking"].tokenizer(), tmp_path, QWEN3)
    plain = tokenizer_identity(load_tokenizer(config))
    config.chat_template_kwargs = {"enable_thinking": False}
    tokenizer = load_tokenizer(config)
    changed = [name for name, value in tokenizer_identity(tokenizer).items() if value != plain[name]]
    assert changed == ["chat_template"]
    prompt = tokenizer.decode(prompt_tokens(tokenizer, [{"role": "user", "content": "Blue?"}]))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"no name": 1}, "must name variables of the chat template, got 'no name'"),
        ({"for": 1}, "must name variables"),
        ({"messages": []}, "must name variables"),
        ({"x %}{{ 1 }}{% set y": 1}, "must name variables"),
        ({"x": float("nan")}, "chat_template_kwargs.x must be what JSON can say, got nan"),
        ({"x": {1, 2}}, "chat_template_kwargs.x must be what JSON can say"),
    ],
)
def test_settings_that_no_template_can_have_are_refused(tmp_path, given, words):
    config = saved(SHAPES["chatml"].tokenizer(), tmp_path, "{{ messages }}")
    config.chat_template_kwargs = given
    with pytest.raises(ValueError, match=re.escape(words)):
        load_tokenizer(config)


def test_of_several_templates_the_default_one_is_taken(tmp_path):
    tokenizer = SHAPES["chatml"].tokenizer()
    config = saved(tokenizer, tmp_path / "a", {"default": "one", "tool_use": "two"})
    assert load_tokenizer(config).chat_template == "one"
    config = saved(tokenizer, tmp_path / "b", {"rag": "one", "tool_use": "two"})
    with pytest.raises(ValueError, match="the chat templates rag, tool_use and none named default"):
        load_tokenizer(config)
