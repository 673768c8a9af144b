"""From a conversation to tokens and a loss mask, by the verifier's own chat template."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """One answer in tokens."""

    prompt: list[int]  # what the verifier read before it
    answer: list[int]  # what it produced, end-of-turn included


@dataclass(frozen=True)
class Sequence:
    """Tokens as the verifier read and wrote them, with the spans [start, end) that it wrote."""

    token_ids: list[int]
    answers: list[tuple[int, int]]

    def as_json(self) -> dict[str, Any]:
        """Give the form that records of conversations have."""
        return {"token_ids": self.token_ids, "answers": [list(span) for span in self.answers]}


def join_turns(turns: Iterable[Turn]) -> list[Sequence]:
    """Lay the turns of a conversation into as few sequences as are exact.

    A sequence grows while the verifier read, before an answer, precisely the tokens so far and more. Where it read
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
    """Give the tokens the verifier reads before it answers `messages`."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: abc.Sequence[Message], end_token_ids: abc.Sequence[int]
) -> tuple[list[int], list[int]]:
    """Give the tokens of a conversation and their loss mask: 1 where the verifier produced the token.

    The end-of-turn token is the verifier's; what a template writes after it is not. A worked line, with the
    prompt `u v` and the answer `A B`:

        token      u  v  A  B  <eot>
        loss_mask  0  0  1  1  1

    Raises:
        ValueError: the template writes earlier turns differently once later ones follow, so that what the
            verifier produced cannot be told exactly.
    """
    tokens = _render(tokenizer, messages)
    mask = [0] * len(tokens)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:turn], add_generation_prompt=True)
        answered = _render(tokenizer, messages[: turn + 1])
        if tokens[: len(prompt)] != prompt or tokens[: len(answered)] != answered:
            raise ValueError(
                f"the chat template does not repeat turn {turn + 1} ({message['content'][:40]!r}) as it was when the "
                "verifier answered it: no exact loss mask exists"
            )
        end = len(answered)
        ends = [i for i in range(len(prompt), end) if tokens[i] in end_token_ids]
        if ends:
            end = ends[-1] + 1
        mask[len(prompt) : end] = [1] * (end - len(prompt))
    return tokens, mask


def check_template(tokenizer: PreTrainedTokenizerBase, end_token_ids: abc.Sequence[int]) -> None:
    """Refuse a template that cannot give exact loss masks, before anything is generated with it."""
    words = ("Name a colour.", "Blue.", "And a fruit?", "An apple.")
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(words)]
    conversation_tokens(tokenizer, messages, end_token_ids)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: abc.Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    rendered: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    return list(rendered)


def check_messages(messages: Any) -> str | None:
    """Say what is wrong with a finished conversation's messages, or None.

    Required: an optional system message, then user and assistant in turn, ending with an answer; no empty text.
    """
    if not isinstance(messages, list) or not messages:
        return "messages must be a list that is not empty"
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            return 'every message must be {"role": ..., "content": text}'
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return f"roles must be user and assistant in turn, got {', '.join(map(str, roles))}"
    if any(not message["content"] for message in messages if message["role"] == "user"):
        return "a user message is empty"
    return None
