"""From a conversation to tokens, and to those of them that the verifier wrote, by its own chat template."""

import re
from collections import abc
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .reasoning import split_answer
from .rendering import Message, NoExactSpanError, apply_template, fit_content, refusals, render_text

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Turn:
    """One answer in tokens."""

    prompt: list[int]  # what the verifier read before it
    answer: list[int]  # what it produced, end-of-turn included


@dataclass(frozen=True)
class PlacedImage:
    """An image among the tokens of a sequence."""

    address: str  # path, URL or data URL
    span: tuple[int, int]  # [start, end) of its placeholder tokens
    digest: str = ""  # of its pixels


@dataclass(frozen=True)
class Sequence:
    """Tokens as the verifier read and wrote them, with the spans [start, end) that it wrote."""

    token_ids: list[int]
    answers: list[tuple[int, int]]
    images: tuple[PlacedImage, ...] = ()  # in their order: the first of the conversation

    def as_json(self) -> dict[str, Any]:
        """Return the form that records of conversations have."""
        return {"token_ids": self.token_ids, "answers": [list(span) for span in self.answers]}


def join_turns(turns: abc.Iterable[Turn]) -> list[Sequence]:
    """Return the turns of a conversation in as few sequences as are exact.

    A sequence grows while the verifier read, before an answer, precisely the tokens so far and more. If it read
    something else (a template that rewrites earlier turns, an answer that is tokenised otherwise when it is read back),
    a new one starts. With the turns `u | A <eot>` and `u A <eot> v | B <eot>`:

        token      u  A  <eot>  v  B  <eot>
        answers       [1,  3)      [4,  6)
    """
    sequences: list[Sequence] = []
    for turn in turns:
        grows = bool(sequences) and turn.prompt[: len(sequences[-1].token_ids)] == sequences[-1].token_ids
        span = (len(turn.prompt), len(turn.prompt) + len(turn.answer))
        spans = [*sequences.pop().answers, span] if grows else [span]
        sequences.append(Sequence(turn.prompt + turn.answer, spans))
    return sequences


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: abc.Sequence[Message]) -> list[int]:
    """Return the tokens the verifier reads before it answers `messages`; its earlier reasoning it does not read."""
    return list(apply_template(tokenizer, _without_reasoning(messages), add_generation_prompt=True, tokenize=True))


def answer_text(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int] | None,
    text: str | None = None,
    end_token_ids: abc.Collection[int] = (),
) -> str:
    """Return an answer, by its text if its tokens are not known, without special tokens, its end and reasoning.

    If it was cut within its reasoning, that is returned.
    """
    content, reasoning = split_answer(tokenizer, tokens, text if tokens is None else None, end_token_ids)
    return (reasoning or "") if content is None else content


def template_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: abc.Sequence[Message],
    end_token_ids: abc.Collection[int],
    finish_reasons: abc.Sequence[str] = (),
) -> list[Turn]:
    """Return the turns of a conversation whose tokens were not recorded.

    An answer is what the rendering that ends with it adds to what the verifier read before it, up to its end-of-turn
    token; what a template writes after that is not the verifier's. If the rendering does not begin with what the
    verifier read (the generation prompt opens the reasoning, the rendering leaves it out), or no end of turn follows
    (the next message writes it), the template's `{% generation %}` marks decide: the prompt is what precedes the mark.

    An answer that was cut (the finish reason "length") has no end-of-turn token. If what the verifier wrote cannot be
    told, NoExactSpanError names the answer and where the tokens part.
    """
    turns: list[Turn] = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            cut = "length" in finish_reasons[len(turns) : len(turns) + 1]
            try:
                turns.append(_turn(tokenizer, messages[:place], message, end_token_ids, cut))
            except NoExactSpanError as error:
                raise NoExactSpanError(
                    f"answer {len(turns) + 1} ({message['content'][:40]!r}) has no exact loss mask: {error}"
                ) from None
    return turns


def _turn(
    tokenizer: PreTrainedTokenizerBase,
    history: abc.Sequence[Message],
    message: Message,
    end_token_ids: abc.Collection[int],
    cut: bool,
) -> Turn:
    written = (message.get("reasoning_content") or "") + message["content"]
    if not set(end_token_ids).isdisjoint(tokenizer.encode(written, add_special_tokens=False)):
        raise NoExactSpanError("it holds the end-of-turn marker as text, which becomes a token")
    if cut and not message["content"]:
        raise NoExactSpanError("it was cut within its reasoning, which the template closes")
    prompt, answered = prompt_tokens(tokenizer, history), [*_without_reasoning(history), message]
    tokens = list(apply_template(tokenizer, answered, tokenize=True))
    if tokens[: len(prompt)] == prompt:
        # Compared as text, which no tokenizer has normalised.
        text, before = render_text(tokenizer, answered), render_text(tokenizer, answered[:-1], True)
        text = text[_num_common(before, text) :]
        for marker in tokenizer.convert_ids_to_tokens(list(end_token_ids)):
            text = text.partition(marker)[0]
        if lost := _left_out(message, text):
            raise NoExactSpanError(f"the chat template leaves out or changes {lost[:40]!r}")
        answer = tokens[len(prompt) :]
        end = _first_end(answer, end_token_ids)
        if end < len(answer):
            return Turn(prompt, answer[: end if cut else end + 1])
        problem = f"the template writes none of the end-of-turn tokens {sorted(end_token_ids)} after it"
    else:
        problem = _parting(tokenizer, prompt, tokens)
    if _MARKS.search(tokenizer.get_chat_template()):
        return _marked_turn(tokenizer, answered, end_token_ids, cut)
    raise NoExactSpanError(problem)


def _marked_turn(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], end_token_ids: abc.Collection[int], cut: bool
) -> Turn:
    """Return the turn that the last mark of a conversation's rendering holds, with the end-of-turn token behind it.

    If the next message writes that token (GLM), the conversation is rendered with one.
    """
    text, marks = _marked_text(tokenizer, messages)
    first, last = (marks or [(0, 0)])[-1]
    if lost := _left_out(messages[-1], text[first:last]):
        raise NoExactSpanError(f"the chat template's generation marks do not hold {lost[:40]!r}")
    if last == len(text):
        with suppress(NoExactSpanError):  # nothing may follow here
            longer, marks = _marked_text(tokenizer, [*messages, {"role": "user", "content": "Go on."}])
            if longer.startswith(text):
                text, last = longer, marks[-1][1]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    before, through = (tokenizer.encode(text[:border], add_special_tokens=False) for border in (first, last))
    for part in (before, through):
        if tokens[: len(part)] != part:
            raise NoExactSpanError(_parting(tokenizer, part, tokens))
    answer = tokens[len(before) :]
    end = min(_first_end(answer, end_token_ids), len(through) - len(before))
    closing = [] if cut else [token for token in answer[end : end + 1] if token in end_token_ids]
    return Turn(before, answer[:end] + closing)


def _marked_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return its text, and where in it the template marks what the verifier wrote."""
    render: Any = render_jinja_template  # it is annotated as giving a text
    options = {"chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
    with refusals():
        (text,), (marks,) = render([fit_content(tokenizer, messages)], return_assistant_tokens_mask=True, **options)
    return text, marks


def _left_out(message: Message, text: str) -> str | None:
    """Return what the verifier wrote and a text does not hold, reasoning first; space around either does not matter."""
    place = 0
    for written in (message.get("reasoning_content"), message["content"]):
        part = (written or "").strip()
        place = text.find(part, place)
        if place < 0:
            return part
        place += len(part)
    return None


def _first_end(tokens: list[int], end_token_ids: abc.Collection[int]) -> int:
    return next((place for place, token in enumerate(tokens) if token in end_token_ids), len(tokens))


def _num_common(one: abc.Sequence[Any], other: abc.Sequence[Any]) -> int:
    """Return how many items two texts or lists begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _parting(tokenizer: PreTrainedTokenizerBase, read: list[int], rendered: list[int]) -> str:
    common = _num_common(read, rendered)
    near = slice(max(0, common - 2), common + 4)
    was, became = (str(tokenizer.decode(tokens[near])) for tokens in (read, rendered))
    return f"the verifier read {was!r} where the chat template, once it has answered, writes {became!r}"


def check_template(tokenizer: PreTrainedTokenizerBase, end_token_ids: abc.Collection[int]) -> None:
    """Refuse a template that gives no exact loss mask, for conversations without reasoning nor for those with it."""
    words = ("Name a colour.", "Blue.", "And a fruit?", "An apple.")
    plain = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(words)]
    thinking = [m | {"reasoning_content": "Easy."} if m["role"] == "assistant" else m for m in plain]
    try:
        template_turns(tokenizer, plain, end_token_ids)
    except NoExactSpanError as error:
        try:
            template_turns(tokenizer, thinking, end_token_ids)
        except NoExactSpanError:
            raise ValueError(
                f"verifier.path has a chat template that does not tell what the verifier wrote: {error}; record the "
                "tokens that a server gives, or mark the answers in the template with {% generation %}"
            ) from None


def _without_reasoning(messages: abc.Sequence[Message]) -> list[Message]:
    return [{name: value for name, value in m.items() if name != "reasoning_content"} for m in messages]


def check_messages(messages: Any) -> str | None:
    """Return what is wrong with a finished conversation's messages, or None.

    Required: an optional system message, then user and assistant in turn, ending with an answer; no empty one. A user's
    content may be content parts; an answer may have `reasoning_content` too, or alone if it was cut in it.
    """
    if not isinstance(messages, list) or not messages:
        return "messages must be a list that is not empty"
    if not all(isinstance(message, dict) and "role" in message and "content" in message for message in messages):
        return 'every message must be {"role": ..., "content": ...}'
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        shown = ", ".join(map(str, roles[:6])) + (", ..." if len(roles) > 6 else "")
        return f"roles must be user and assistant in turn, ending with the assistant's, got {shown}"
    problems = ((number, message["role"], _content_problem(message)) for number, message in enumerate(messages, 1))
    return next((f"message {number} ({role}) {problem}" for number, role, problem in problems if problem), None)


def _content_problem(message: Message) -> str | None:
    content, reasoning = message["content"], message.get("reasoning_content")
    if message["role"] == "user" and isinstance(content, list):
        return None if content and all(map(_is_part, content)) else "must be text or a list of content parts"
    if not isinstance(content, str):
        return f"must be text, got {type(content).__name__}"
    if reasoning is not None and (message["role"] != "assistant" or not isinstance(reasoning, str)):
        return "has reasoning_content, which must be an answer's and text"
    return "is empty" if not content and not reasoning and message["role"] != "system" else None


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)


def has_images(messages: abc.Iterable[Message]) -> bool:
    """Return whether a message has content parts other than text."""
    contents = (message["content"] for message in messages if isinstance(message["content"], list))
    return any(part["type"] != "text" for content in contents for part in content)
