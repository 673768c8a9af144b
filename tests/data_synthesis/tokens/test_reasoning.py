"""Reasoning and answer are told apart by what a verifier's tokenizer and chat template know."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from builders import converse_all
from fledge.conf.schema import Device, Dtype, VerifierConfig
from fledge.data_synthesis.answers.conversation import Answer, Conversation
from fledge.data_synthesis.prompts.rows import Prompt
from fledge.data_synthesis.tokens import reasoning as module
from fledge.data_synthesis.tokens.chat_template import Turn, answer_text, prompt_tokens
from fledge.data_synthesis.tokens.reasoning import split_answer
from fledge.models.verifier.model import Verifier
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANSWER = "{% elif m.role == 'assistant' %}"
PLAIN = (  # writes an earlier answer as it is, and knows nothing of reasoning
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}" + ANSWER
    + "{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)  # fmt: skip
WRITES = PLAIN.replace(  # its marks have names that say nothing
    "{{ m.content", "{% if m.reasoning_content %}<|aa|>{{ m.reasoning_content }}<|bb|>\n{% endif %}{{ m.content"
)
CHANNELS = PLAIN.replace(
    "{{ m.content",
    "<|go|>{% if m.thinking %}inner<|as|>{{ m.thinking }}<|end|><|go|>{% endif %}outer<|as|>{{ m.content",
)
DROPS = PLAIN.replace("{{ m.content", "{{ m.content.split('</think>')[-1].lstrip('\\n')")
PARTS = PLAIN.replace("m.content", "m.content | map(attribute='text') | join")  # a text vanishes
ONE_TURN = PLAIN + "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
OPENS = PLAIN.replace("'[/INST]' }}", "'[/INST]' }}{% if loop.last %}<r:reason>\n{% endif %}")
FIELDS = {
    "reasoning_content": {"open_pattern": r"<\|aa\|>", "close": "<|bb|>"},
    "tool_calls": {"open": "<|cc|>", "close": "<|dd|>", "content": "json", "optional": False},
    "content": {},
}
SPEC = {"start_anchor": "[/INST]\n", "fields": FIELDS, "defaults": {"role": "assistant"}}


@cache
def byte_tokens() -> dict[str, int]:
    return {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def tokenizer(template: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = (), **known: Any) -> Any:
    base = Tokenizer(models.BPE(dict(byte_tokens()), []))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    base.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]", *special])
    base.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token="</s>", chat_template=template, clean_up_tokenization_spaces=False, **known
    )


def split(told: Any, said: str) -> tuple[str | None, str | None]:
    return split_answer(told, told.encode(said, add_special_tokens=False))


FAMILIES = [  # the first is the reported one
    (PLAIN, ("[THINK]", "[/THINK]"), "[THINK]Easy.[/THINK]"),
    (PLAIN, ("<seed:think>", "</seed:think>"), "<seed:think>Easy.</seed:think>"),
    (PLAIN, ("<|START_THINKING|>", "<|END_THINKING|>"), "<|START_THINKING|>Easy.<|END_THINKING|>\n"),
    (PLAIN, ("<|begin_of_thought|>", "<|end_of_thought|>"), "<|begin_of_thought|>\nEasy.\n<|end_of_thought|>\n\n"),
    (PLAIN, ("◁think▷", "◁/think▷"), "◁think▷Easy.◁/think▷"),
    (PLAIN, ("<|channel>", "<channel|>"), "<|channel>thought\nEasy.<channel|>"),
    (WRITES, ("<|aa|>", "<|bb|>"), "<|aa|>Easy.<|bb|>\n"),
    (CHANNELS, ("<|go|>", "<|as|>", "<|end|>"), "<|go|>inner<|as|>Easy.<|end|><|go|>outer<|as|>"),
]


@pytest.mark.parametrize(("template", "special", "before"), FAMILIES, ids=[family[1][0] for family in FAMILIES])
def test_reasoning_between_special_tokens_is_told_from_the_answer(capsys, template, special, before):
    told = tokenizer(template, special)
    assert split(told, f"{before}Blue</s>") == ("Blue", "Easy.")
    assert split(told, f"{before}Blue") == ("Blue", "Easy."), "cut in the answer"
    assert split(told, "Blue</s>") == ("Blue", None)
    assert split(told, before) == ("", "Easy.")
    text, reasoning = split(told, before[: before.index("Easy.") + 3])
    assert (text, reasoning) == (None, "Eas"), "cut in the reasoning"
    assert answer_text(told, told.encode(f"{before}Blue</s>")) == "Blue"
    assert not capsys.readouterr().err


def test_an_answer_that_begins_as_the_template_begins_it_is_without_its_marks():
    told = tokenizer(CHANNELS, ("<|go|>", "<|as|>", "<|end|>"))
    assert split(told, "<|go|>outer<|as|>Blue</s>") == ("Blue", None)


def test_reasoning_that_the_generation_prompt_opens_ends_at_its_mark():
    told = tokenizer(OPENS, ("<r:reason>", "</r:reason>"))
    assert split(told, "Easy.\n</r:reason>\n\nBlue</s>") == ("Blue", "Easy.")
    assert split(told, "Easy and") == (None, "Easy and")


def test_a_response_template_decides():
    template = PLAIN.replace("'[/INST]'", "'[/INST]\\n'")
    told = tokenizer(template, ("<|aa|>", "<|bb|>", "<|cc|>", "<|dd|>"), response_template=SPEC)
    assert split(told, "<|aa|>Easy.<|bb|>\nBlue</s>") == ("Blue", "Easy.")
    assert split(told, "Blue</s>") == ("Blue", None)
    assert split(told, "<|aa|>Easy and") == (None, "Easy and")
    broken = tokenizer(PLAIN, response_template={**SPEC, "version": 7})
    with pytest.raises(ValueError, match=r"^verifier\.path has a tokenizer whose response_template cannot be used .*7"):
        split(broken, "Blue")


@pytest.mark.parametrize("plain", [(), ("<think>", "</think>")], ids=["text", "added tokens"])
def test_reasoning_in_plain_text_is_left_to_a_template_that_drops_it(plain):
    said = "<think>\nEasy.\n</think>\n\nBlue"
    told = tokenizer(DROPS, plain=plain)
    assert split(told, said + "</s>") == (said, None)
    assert "Easy" not in told.apply_chat_template(conversation(said), tokenize=False)


@pytest.mark.parametrize(
    ("opening", "closing", "plain", "template"),
    [
        ("<think>", "</think>", False, PLAIN),
        ("<think>", "</think>", False, PARTS),
        ("<think>", "</think>", False, ONE_TURN),
        ("<reasoning>", "</reasoning>", True, PLAIN),
        ("<thought>", "</thought>", False, "{% set _ = '<thought></thought>' %}" + PLAIN),
        ("{{a}}", "{{b}}", False, WRITES.replace("<|aa|>", "{{ '{{a}}' }}").replace("<|bb|>", "{{ '{{b}}' }}")),
    ],
)
def test_reasoning_in_plain_text_is_told_where_the_template_would_write_it_again(opening, closing, plain, template):
    told = tokenizer(template, plain=(opening, closing) if plain else ())
    said = f"{opening}\nEasy.\n{closing}\n\nBlue"
    assert split(told, said + "</s>") == ("Blue", "Easy.") == split_answer(told, None, said)
    assert split(told, f"{opening}\nEasy and") == (None, "Easy and")
    assert split(told, f"So: {said}") == (f"So: {said}", None), "only where an answer begins with it"


def conversation(said: str) -> list[dict[str, str]]:
    texts = ("Name a colour.", said, "And a fruit?")
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_special_tokens_of_which_nothing_is_known_are_named_once(capsys, monkeypatch):
    monkeypatch.setattr(module, "_warned", set())
    told = tokenizer(PLAIN, ("<|hm|>", "<|so|>", "<|new|>"))
    assert split(told, "<|hm|>Easy.<|so|>Blue</s>") == ("Easy.Blue", None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "special tokens <|hm|>, <|so|> within answers" in line
    assert "put a response_template with these marks into the verifier's tokenizer_config.json" in line
    split(told, "<|hm|>Easy.<|so|>Blue</s>")
    split(told, "Blue</s>")
    assert not capsys.readouterr().err
    split(told, "<|new|>Easy.<|so|>Blue</s>")
    assert "special tokens <|new|> within" in capsys.readouterr().err


def test_a_server_that_hides_marks_and_tokens_is_named_once(capsys, monkeypatch):
    monkeypatch.setattr(module, "_warned", set())
    told = tokenizer(PLAIN, ("[THINK]", "[/THINK]"))
    for _ in range(2):
        assert split_answer(told, None, "ThinkingBlue") == ("ThinkingBlue", None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "marks its reasoning by special tokens ([THINK])" in line
    assert "start the server with a reasoning parser" in line
    assert split_answer(tokenizer(PLAIN), None, "Blue") == ("Blue", None)
    assert not capsys.readouterr().err


def test_a_servers_answer_is_split_reasoning_by_its_tokens_and_left_where_the_server_did():
    told = tokenizer(PLAIN, ("[THINK]", "[/THINK]"))
    turn = Turn([1], told.encode("[THINK]Easy.[/THINK]Blue</s>"))
    mixed = Answer("Easy.Blue", "stop", 1, 9, turn=turn).split_reasoning(told)
    assert (mixed.text, mixed.reasoning, mixed.turn) == ("Blue", "Easy.", turn)
    parsed = Answer("Blue", "stop", 1, 9, "Hm.", turn)
    assert parsed.split_reasoning(told) == parsed
    cut = Answer("Easy.", "length", 1, 9, turn=Turn([1], told.encode("[THINK]Easy."))).split_reasoning(told)
    assert (cut.text, cut.reasoning) == ("", "Easy.")


def parrot(folder: Any, told: Any, said: str) -> Verifier:
    """A verifier that writes these tokens, in which none stands twice, after any other: no layer does anything."""
    ids, size = told.encode(said, add_special_tokens=False), len(told)
    hidden = size + (-size) % 64
    shape = {"num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, hidden_size=hidden, tie_word_embeddings=False, **shape))
    for parameter in model.parameters():
        parameter.data.zero_()
    model.model.norm.weight.data.fill_(1.0)
    model.model.embed_tokens.weight.data[range(size), range(size)] = 1.0
    model.lm_head.weight.data[ids[0], :size] = 0.5
    for token, following in pairwise(ids):
        model.lm_head.weight.data[:, token] = 0.0
        model.lm_head.weight.data[following, token] = 1.0
    model.save_pretrained(folder)
    told.save_pretrained(folder)
    return Verifier.load(VerifierConfig(path=str(folder), device=Device.cpu, dtype=Dtype.float32), [1, 2, 3])


@pytest.mark.parametrize(
    ("template", "special", "said"),
    [
        (PLAIN, ("[THINK]", "[/THINK]"), "[THINK]hm,[/THINK]Blue</s>"),
        (PLAIN, ("<seed:think>", "</seed:think>"), "<seed:think>hm,</seed:think>Blue</s>"),
        (WRITES, ("<|aa|>", "<|bb|>"), "<|aa|>hm,<|bb|>Blue</s>"),
    ],
)
def test_the_verifier_in_this_process_does_not_read_its_earlier_reasoning(tmp_path, template, special, said):
    verifier = parrot(tmp_path, tokenizer(template, special), said)
    conversation = Conversation(Prompt("s/1", "s", ("Name it?", "And?")))
    converse_all(verifier, [conversation], 0.0, 16)
    answer = {"role": "assistant", "reasoning_content": "hm,", "content": "Blue"}
    assert conversation.messages == [
        {"role": "user", "content": "Name it?"}, answer, {"role": "user", "content": "And?"}, answer
    ]  # fmt: skip
    first, second = (answer.turn for answer in conversation.answers)
    assert verifier.tokenizer.decode(first.answer) == said, "the recorded tokens keep it"
    assert second.prompt == prompt_tokens(verifier.tokenizer, conversation.messages[:-1])
    assert "hm," not in verifier.tokenizer.decode(second.prompt)
