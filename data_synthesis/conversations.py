"""Conversations: being made, turn by turn, and in a file, `{id, source, messages, finish_reasons, …}` a line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..conf.runtime.journal import Journal, read_journal, read_journal_lines, read_line
from .prompts.rows import Prompt
from .tokens.chat_template import Message, Turn, check_messages, join_turns
from .tokens.reasoning import split_answer

FILE = "conversations.jsonl"
SYNC_EVERY_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What the verifier gave to one user turn."""

    text: str
    finish_reason: str  # "stop"; "length" where it was cut
    prompt_tokens: int
    completion_tokens: int
    reasoning: str | None = None
    turn: Turn | None = None  # the tokens, where whoever ran the verifier tells them

    def told_apart(self, tokenizer: PreTrainedTokenizerBase) -> Answer:
        """Give it with its reasoning beside its text, where whoever answered left it in."""
        if self.reasoning:
            return self
        text, reasoning = split_answer(tokenizer, self.turn.answer if self.turn else None, self.text)
        return replace(self, text=text or "", reasoning=reasoning)


@dataclass(frozen=True)
class Failure:
    """Why a turn has no answer."""

    reason: str  # few words, the same for all of a kind
    detail: str = ""
    attempts: int = 1
    final: bool = False  # trying again would give the same


CONTEXT_FULL = Failure("the prompt fills the verifier's context", final=True)
EMPTY_ANSWER = Failure("the verifier answered nothing")


class Conversation:
    """A prompt being answered, each turn on the verifier's own earlier answers."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.answers: list[Answer] = []
        self.ended_by: Failure | None = None  # before its last turn

    @property
    def question(self) -> list[Message] | None:
        """Give the messages the verifier answers next (earlier reasoning left out, as chats do); None: no further."""
        if self.ended_by or self._truncated or len(self.answers) == len(self.prompt.turns):
            return None
        return [
            *({key: message[key] for key in ("role", "content")} for message in self.messages),
            {"role": "user", "content": self.prompt.turns[len(self.answers)]},
        ]

    @property
    def _truncated(self) -> bool:
        """Whether the last answer was cut: the verifier would not have been asked on from it."""
        return bool(self.answers) and self.answers[-1].finish_reason == "length"

    def add(self, answer: Answer) -> None:
        """Take the answer to `question`; an empty one ends the conversation before that turn."""
        if answer.text or (answer.reasoning and answer.finish_reason == "length"):
            self.answers.append(answer)
        else:
            self.end(EMPTY_ANSWER)

    def end(self, failure: Failure) -> None:
        """Leave the turns that follow unanswered."""
        self.ended_by = failure

    @property
    def messages(self) -> list[Message]:
        """Give the conversation so far."""
        prompt = self.prompt
        messages: list[Message] = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for turn, answer in zip(prompt.turns, self.answers, strict=False):
            reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
            messages += [
                {"role": "user", "content": turn},
                {"role": "assistant", **reasoning, "content": answer.text},
            ]
        return messages

    def record(self, temperature: float) -> dict[str, Any]:
        """Give its line of the file."""
        turns = [answer.turn for answer in self.answers if answer.turn is not None]
        tokens_known = len(turns) == len(self.answers)
        return {
            "id": self.prompt.id,
            "source": self.prompt.source,
            "messages": self.messages,
            "finish_reasons": [answer.finish_reason for answer in self.answers],
            "unanswered_turns": len(self.prompt.turns) - len(self.answers),
            "usage": {
                "prompt_tokens": sum(answer.prompt_tokens for answer in self.answers),
                "completion_tokens": sum(answer.completion_tokens for answer in self.answers),
            },
            "temperature": temperature,
            **({"sequences": [sequence.as_json() for sequence in join_turns(turns)]} if tokens_known else {}),
        }


def open_conversations(folder: Path) -> Journal:
    """Open the conversations of a folder for appending."""
    return Journal(folder / FILE, _check, SYNC_EVERY_S)


def _check(record: dict[str, Any]) -> str | None:
    if not isinstance(record.get("finish_reasons"), list) or not isinstance(record.get("usage"), dict):
        return "finish_reasons must be a list and usage an object"
    return check_messages(record.get("messages"))


def content_digest(folder: Path) -> str:
    """Hash what a folder's conversations say, whatever the order of lines (that of completion); "" where none are."""
    files = [part / FILE for part in _parts(folder)]
    if not all(file.is_file() for file in files):
        return ""
    return add_digests(hashlib.sha256(line).hexdigest() for path in files for line in open(path, "rb"))


def add_digests(digests: Iterable[str]) -> str:
    """Give one digest of many, whatever their order and grouping: their sum takes no memory."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**256:064x}"


def read_conversations(folder: Path, unfinished: bool = False) -> Iterator[dict[str, Any]]:
    """Read finished conversations, of all parts where a job array made them.

    Args:
        unfinished: more may still be written.

    Raises:
        ValueError: a line is malformed, named by file and number, or a file is missing.
    """
    for path in (part / FILE for part in _parts(folder)):
        if path.is_file():
            yield from read_journal(path, _check, unfinished)
        elif not unfinished:
            raise ValueError(f"{path} is missing: run `fledge synthesize` again")


class Place(NamedTuple):
    """Where a conversation stands."""

    id: str
    file: str  # in the folder of conversations
    offset: int  # of its line, in bytes

    def read(self, folder: Path) -> dict[str, Any]:
        """Read it."""
        return read_line(folder / self.file, self.offset)


@dataclass
class Catalogue:
    """All conversations of a folder: their places take little memory where they themselves would not."""

    places: list[Place]  # ordered by id: the order of lines is that of completion
    content: str  # the `content_digest`
    num_recorded: int  # that have their tokens

    @classmethod
    def of(cls, folder: Path, progress: Callable[[], object]) -> Catalogue:
        """Read and check every line once.

        Raises:
            ValueError: a line is malformed, named by file and number, or a file is missing.
        """
        places: list[Place] = []
        digests: list[bytes] = []
        num_recorded = 0
        for path in (part / FILE for part in _parts(folder)):
            if not path.is_file():
                raise ValueError(f"{path} is missing: run `fledge synthesize` again")
            name = str(path.relative_to(folder))
            for offset, line, record in read_journal_lines(path, _check):
                places.append(Place(record["id"], name, offset))
                digests.append(hashlib.sha256(line).digest())
                num_recorded += record.get("sequences") is not None
                progress()
        return cls(sorted(places), add_digests(digest.hex() for digest in digests), num_recorded)


def part_folder(folder: Path, shard: int, num_shards: int) -> Path:
    """Give the folder in which one task of a job array writes."""
    return folder / f"part-{shard:05d}-of-{num_shards:05d}"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*-of-*")) or [folder]
