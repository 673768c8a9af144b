"""What the verifier wrote, told exactly, over the shapes that chat templates have."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from fledge.conf.schema import VerifierConfig
from fledge.data_synthesis.tokens.chat_template import (
    NoExactSpanError,
    check_template,
    fit_content,
    join_turns,
    prompt_tokens,
    template_turns,
)
from fledge.models.verifier.config import load_tokenizer, tokenizer_identity
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MERGING = "Blue skies.\n\nAnswer:Blue and\n\nAnswer:Blue.\n\n\nTwo words: Yes, no. 12 34\n\n"  # is what BPE learns


@cache
def byte_level(specials: tuple[str, ...]) -> Tokenizer:
    """BPE over bytes, that splits texts as Llama 3 and Qwen do: line breaks go together."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*\n+|\s+(?!\S)|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([MERGING] * 4, trainer)
    return tokenizer


@cache
def metaspace(specials: tuple[str, ...]) -> Tokenizer:
    """BPE over words that carry the space before them, as SentencePiece has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *specials, *every_byte], show_progress=False)
    tokenizer.train_from_iterator([MERGING] * 4, trainer)
    return tokenizer


Text = Callable[[dict[str, str]], str]


def as_it_is(message: dict[str, str]) -> str:
    return message["content"]


def stripped(message: dict[str, str]) -> str:
    return message["content"].strip()


@dataclass
class Shape:
    """A family of chat templates."""

    template: str
    end: str  # the end-of-turn marker
    specials: tuple[str, ...]
    text: Text = as_it_is  # of an answer, as the template renders it
    make: Callable[[tuple[str, ...]], Tokenizer] = byte_level
    system: bool = True
    reasoning: bool = False
    rewrites: bool = False  # earlier turns
    opens_reasoning: bool = False  # in the generation prompt, and drops it from the rendering
    joins: bool = False  # a line break at an answer's begin with that of the header
    bos: str | None = None
    settings: dict[str, object] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        given = "".join(f"{{% set {name} = {value!r} %}}\n" for name, value in self.settings.items())
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self.make((*self.specials, self.end)),
            eos_token=self.end,
            bos_token=self.bos,
            chat_template=given + self.template,
            clean_up_tokenization_spaces=False,
        )
        assert tokenizer.convert_tokens_to_ids(self.end) is not None
        return tokenizer


def headers(start: str, middle: str, end: str, content: str = "m.content") -> str:
    """The shape of Llama 3, Llama 4, ChatML and Gemma: every message under a header with its role."""
    return (
        f"{{% for m in messages %}}{{{{ '{start}' + m.role + '{middle}' + {content} + '{end}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{start}assistant{middle}' }}}}{{% endif %}}"
    )


PARTS = """
{%- for m in messages %}
  {{- '<|header_start|>' + m.role + '<|header_end|>\\n\\n' }}
  {%- if m.content is string %}{{ m.content | trim }}{% else %}
    {%- for part in m.content %}
      {%- if part.type == 'text' %}{{ part.text | trim }}{% else %}{{ '<|image|>' }}{% endif %}
    {%- endfor %}
  {%- endif %}{{- '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}
{%- for m in messages %}
  {%- if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
  {{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim }}
  {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set seen = namespace(users=0) %}
{%- for m in messages %}
  {%- if m.role == 'user' %}
    {%- set seen.users = seen.users + 1 %}
    {{- '[INST] ' }}
    {%- if system and seen.users == users | length %}{{ system + '\\n\\n' }}{% endif %}
    {{- m.content + ' [/INST]' }}
  {%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

QWEN3 = """
{%- set at = namespace(question=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set at.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\\n' }}
  {%- if m.role == 'assistant' and loop.index0 > at.question %}
    {{- '<think>\\n' + (m.reasoning_content or '').strip('\\n') + '\\n</think>\\n\\n' + m.content.lstrip('\\n') }}
  {%- else %}{{ m.content }}{% endif %}
  {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

DATED = """{{ '<|im_start|>system\\nToday is ' + strftime_now('%d %B %Y') + '. ' }}
{{- (messages[0].content if messages[0].role == 'system' else 'Help.') + '<|im_end|>\\n' }}
{%- for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def deepseek(mark: str = "", unmark: str = "") -> str:
    """The generation prompt opens the reasoning, and the rendering of an answer leaves it out."""
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|Assistant|>' }}"
        + mark
        + "{{ m.content }}"
        + unmark
        + "{{ '<|end|>' }}{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
    )


MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def thought(message: dict[str, str]) -> str:
    reasoning = message.get("reasoning_content", "").strip("\n")
    return f"<think>\n{reasoning}\n</think>\n\n{message['content'].lstrip(chr(10))}"


IM, THINK = ("<|im_start|>",), ("<|im_start|>", "<think>", "</think>")
SHAPES = {
    "llama 3": Shape(
        "{{ bos_token }}" + headers("<|start_header_id|>", "<|end_header_id|>\\n\\n", "<|eot_id|>", "m.content | trim"),
        "<|eot_id|>",
        ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>"),
        stripped,
        bos="<|begin|>",
    ),
    "llama 4": Shape(PARTS, "<|eot|>", ("<|header_start|>", "<|header_end|>", "<|image|>"), stripped),
    "chatml": Shape(headers("<|im_start|>", "\\n", "<|im_end|>\\n"), "<|im_end|>", IM, joins=True),
    "chatml, stripped": Shape(
        headers("<|im_start|>", "\\n", "<|im_end|>\\n", "m.content.strip()"), "<|im_end|>", IM, stripped
    ),
    "chatml, marked": Shape(MARKED, "<|im_end|>", IM, joins=True),
    "chatml, dated": Shape(DATED, "<|im_end|>", IM, joins=True),
    "qwen 3, thinking": Shape(QWEN3, "<|im_end|>", THINK, thought, reasoning=True, rewrites=True),
    "qwen 3, not thinking": Shape(
        QWEN3,
        "<|im_end|>",
        THINK,
        lambda m: m["content"].lstrip("\n"),
        rewrites=True,
        settings={"enable_thinking": False},
    ),
    "mistral": Shape(MISTRAL, "</s>", ("<s>",), lambda m: " " + m["content"], bos="<s>"),
    "mistral, spaces in words": Shape(
        MISTRAL, "</s>", ("<s>",), lambda m: " " + m["content"], metaspace, bos="<s>"
    ),
    "gemma": Shape(GEMMA, "<end_of_turn>", ("<bos>", "<start_of_turn>"), stripped, system=False, bos="<bos>"),
    "deepseek r1, marked": Shape(
        deepseek("{% generation %}", "{% endgeneration %}"),
        "<|end|>",
        ("<|begin|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"),
        bos="<|begin|>",
        opens_reasoning=True,
    ),
}  # fmt: skip

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


def test_content_parts_are_read_where_the_template_reads_them():
    parts = [{"type": "text", "text": "Blue?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes, no."}]
    tokenizer = SHAPES["llama 4"].tokenizer()
    (turn,) = template_turns(tokenizer, messages, [tokenizer.eos_token_id])
    assert tokenizer.decode(turn.prompt).count("<|image|>") == 1
    assert tokenizer.decode(turn.answer) == "Yes, no.<|eot|>"
    with pytest.raises(NoExactSpanError, match="refuses"):
        template_turns(SHAPES["chatml"].tokenizer(), messages, [0])


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


# settings of a template ----------------------------------------------------------------------------------------------

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
