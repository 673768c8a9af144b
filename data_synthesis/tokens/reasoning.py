"""Reasoning told from the answer, by what the verifier's tokenizer and chat template know of it.

The tokenizer's `response_template` decides if it has one. Else reasoning stands between marks: those that the chat
template writes around an answer's `reasoning_content`, pairs of tokens or words of the template whose names say so
(`[THINK]` and `[/THINK]`, `<|begin_of_thought|>` and `<|end_of_thought|>`), and those of a few known families.
Marks in plain text that the chat template takes out of earlier answers by itself are left to it.
"""

import re
import sys
from collections import abc
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rendering import NoExactSpanError, render_text

_KNOWN = (  # gpt-oss, Gemma 4, most others
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("", "<|channel|>final<|message|>"),
    ("<|channel>thought", "<channel|>"),
    ("<think>", "</think>"),
)
_FIELDS = ("reasoning_content", "reasoning", "thinking")  # of a response template
_NAMES = {"think", "thinking", "thought", "thoughts", "reason", "reasoning", "rationale", "reflection", "scratchpad"}
_OPENING, _CLOSING = {"begin", "start", "of", "token"}, {"end", "close", "stop"}
_MARK = re.compile(r"[<\[◁][^\s<>\[\]◁▷'\"(){}]+[>\]▷]")
_USER = {"role": "user", "content": "Name a colour."}
_ANSWER, _REASONING = "AnswerAnswer", "ReasonReason"
_warned: set[str] = set()  # special tokens that the user has been warned of
_HIDDEN = (
    "fledge: the verifier marks its reasoning by special tokens ({}), and the server gives neither its tokens nor its "
    "reasoning: if it reasons, later turns read that as part of the answer; start the server with a reasoning parser"
)
_DROPPED = (
    "fledge: the verifier writes the special tokens {} within answers, and neither its tokenizer nor its chat template "
    "says whether they mark reasoning: the answers' text has what stands between them, and later turns read it; if it "
    "is reasoning, put a response_template with these marks into the verifier's tokenizer_config.json"
)


@dataclass(frozen=True)
class _Marks:
    """What opens and closes reasoning; an opening is empty if only the answer's begin is known."""

    special: list[tuple[str, list[int], list[int]]]  # opening; its tokens up to the last special one; the closing's
    plain: list[tuple[str, str]]  # in the text of an answer
    prompt: str  # a generation prompt, which may open the reasoning
    special_ids: frozenset[int]
    response_template: Any


def split_answer(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int] | None,
    text: str | None = None,
    end_token_ids: abc.Collection[int] = (),
) -> tuple[str | None, str | None]:
    """Return an answer's text and its reasoning; no text if it was cut within its reasoning.

    Of tokens and text (without special tokens) one may be unknown. The token that ends the answer is no part of it,
    though it be no special one, such as a line break.
    """
    if tokens and tokens[-1] in end_token_ids:
        tokens = tokens[:-1]
    marks = _marks(tokenizer, str(tokenizer.get_chat_template()))
    if tokens is None:
        _warn_once(_HIDDEN, {str(tokenizer.decode(head)) for _, head, _ in marks.special if head})
        return _split_plain(text or "", marks)
    if marks.response_template is not None:
        return _parsed(tokenizer, tokens, marks)
    start, end, opening = _last_closing(tokens, marks)
    opened = [o for o, head, _ in marks.special if head and _end_of_last(tokens[end:], head)]
    if not end:
        opened += [o for o, head, _ in marks.special if head and marks.prompt.rstrip().endswith(o)]
    if opened:
        return None, _reasoning(tokenizer, tokens, opened[0])
    if end:
        answer = str(tokenizer.decode(tokens[end:], skip_special_tokens=True))
        return answer.lstrip("\n"), _reasoning(tokenizer, tokens[:start], opening)
    within = marks.special_ids.intersection(tokens[: _num_without_ending(tokens, marks)])
    _warn_once(_DROPPED, {*map(str, tokenizer.convert_ids_to_tokens(sorted(within)))})
    return _split_plain(str(tokenizer.decode(tokens, skip_special_tokens=True)) if text is None else text, marks)


def _warn_once(warning: str, names: set[str]) -> None:
    if names := names - _warned:
        _warned.update(names)
        print(warning.format(", ".join(sorted(names))), file=sys.stderr)


def _num_without_ending(tokens: list[int], marks: _Marks) -> int:
    """Return the number of an answer's tokens without the special ones at its end."""
    return next((n for n in range(len(tokens), 0, -1) if tokens[n - 1] not in marks.special_ids), 0)


def _split_plain(text: str, marks: _Marks) -> tuple[str | None, str | None]:
    begun = text.lstrip()
    for opening, closing in marks.plain:
        if begun.startswith(opening) or marks.prompt.rstrip().endswith(opening):
            reasoning, closed, answer = begun.removeprefix(opening).partition(closing)
            return answer.lstrip("\n") if closed else None, reasoning.strip() or None
    return text, None


def _parsed(tokenizer: PreTrainedTokenizerBase, tokens: list[int], marks: _Marks) -> tuple[str | None, str | None]:
    answer = str(tokenizer.decode(tokens[: _num_without_ending(tokens, marks)]))
    message = tokenizer.parse_response(answer, marks.response_template, prefix=marks.prompt)
    text, reasoning = message.get("content"), next((message[name] for name in _FIELDS if message.get(name)), None)
    return (None if text is None else text.lstrip("\n")), reasoning


def _last_closing(tokens: list[int], marks: _Marks) -> tuple[int, int, str]:
    """Return where the last closing mark starts and ends, and its opening; of those that end there the longest."""
    found = ((_end_of_last(tokens, closing), len(closing), opening) for opening, _, closing in marks.special)
    end, size, opening = max(found, default=(0, 0, ""))
    return end - size if end else 0, end, opening


def _end_of_last(tokens: list[int], sought: list[int]) -> int:
    ends = range(len(tokens), len(sought) - 1, -1) if sought[0] in tokens else ()
    return next((end for end in ends if tokens[end - len(sought) : end] == sought), 0)


def _reasoning(tokenizer: PreTrainedTokenizerBase, tokens: list[int], opening: str) -> str | None:
    begin = str(tokenizer.decode(tokenizer.encode(opening, add_special_tokens=False), skip_special_tokens=True))
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return text.removeprefix(begin.strip()).strip() or None


@lru_cache(maxsize=4)
def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> _Marks:
    added = tokenizer.added_tokens_decoder
    special = {str(token): number for number, token in added.items() if token.special}
    one = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)"
    run = re.compile(rf"(?:{one})(?:.*(?:{one}))?", re.DOTALL)
    prompt = _rendered(tokenizer, [_USER], prompt=True)
    words = {*map(str, added.values()), *_MARK.findall(template)}
    marks = _Marks([], [], prompt, frozenset(special.values()), _response_template(tokenizer))
    for opening, closing in dict.fromkeys([*_KNOWN, *_written(tokenizer, run, prompt.rstrip()), *_named(words)]):
        if run.fullmatch(closing):
            head = run.search(opening)
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in (head[0] if head else "", closing)]
            marks.special.append((opening, *ids))
        elif opening and not _drops(tokenizer, opening, closing):
            marks.plain.append((opening, closing))
    return marks


def _written(tokenizer: PreTrainedTokenizerBase, run: re.Pattern[str], prompt: str) -> list[tuple[str, str]]:
    """Return the marks that the template writes around reasoning, and its special tokens before an answer without."""
    answer = {"role": "assistant", "content": _ANSWER}
    text = _rendered(tokenizer, [_USER, answer])
    before, found, _ = text.removeprefix(prompt).partition(_ANSWER)
    lead = run.search(before) if found and text.startswith(prompt) else None
    pairs = [("", lead[0])] if lead else []
    text = _rendered(tokenizer, [_USER, answer | {"reasoning_content": _REASONING}])
    opening, _, rest = text.removeprefix(prompt).partition(_REASONING)
    between, found, _ = rest.partition(_ANSWER)
    if found and between.strip():
        closing = run.search(between)
        pairs.append((opening.strip() if text.startswith(prompt) else "", closing[0] if closing else between.strip()))
    return pairs


def _named(words: abc.Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs among words whose names are those of reasoning: `<seed:think>` and `</seed:think>`."""
    openings, closings = dict[tuple[str, ...], str](), dict[tuple[str, ...], str]()
    for word in sorted(words):
        parts = re.findall(r"[^\W_]+", word.lower())
        if _NAMES.isdisjoint(parts) or word[0].isalnum() or word[-1].isalnum():
            continue
        closes = "/" in word or not _CLOSING.isdisjoint(parts)
        (closings if closes else openings)[tuple(part for part in parts if part not in _OPENING | _CLOSING)] = word
    return [(openings[name], closings[name]) for name in openings if name in closings]


def _drops(tokenizer: PreTrainedTokenizerBase, opening: str, closing: str) -> bool:
    """Return whether the template takes reasoning in such marks out of earlier answers by itself."""
    earlier = {"role": "assistant", "content": f"{opening}\n{_REASONING}\n{closing}\n\n{_ANSWER}"}
    text = _rendered(tokenizer, [_USER, earlier, _USER])
    return _ANSWER in text and _REASONING not in text


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False) -> str:
    """Render messages, with a generation `prompt` or without; nothing if the template refuses them."""
    try:
        return render_text(tokenizer, messages, prompt)
    except NoExactSpanError:
        return ""


def _response_template(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return what the tokenizer's response template says of reasoning and text: the rest of an answer stays text."""
    template = getattr(tokenizer, "response_template", None)
    if template is None:
        return None
    try:
        fields = {name: {**field, "optional": True} for name, field in template["fields"].items()}
        tokenizer.parse_response("", {**template, "fields": fields}, prefix="")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"verifier.path has a tokenizer whose response_template cannot be used ({error!r}): mend or remove it in "
            "tokenizer_config.json"
        ) from None
    used = {name: fields[name] for name in (*_FIELDS, "content") if name in fields}
    return {**template, "fields": used} if used.keys() - {"content"} else None
