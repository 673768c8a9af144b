"""The shapes that chat templates have, each with a tokenizer: what the tests of tokens render."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

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
