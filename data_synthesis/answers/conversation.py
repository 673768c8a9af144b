"""A conversation being made: the verifier answers a prompt turn by turn, each on its own earlier answers."""

from dataclasses import dataclass, replace
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from ..prompts.rows import Prompt
from ..tokens.chat_template import Message, Turn, join_turns
from ..tokens.reasoning import split_answer


@dataclass(frozen=True)
class Answer:
    """The verifier's answer to one user turn."""

    text: str
    finish_reason: str  # "stop"; "length" if it was cut
    prompt_tokens: int
    completion_tokens: int
    reasoning: str | None = None
    turn: Turn | None = None  # the tokens, if whoever ran the verifier gives them

    def split_reasoning(self, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Return it with its reasoning out of its text, if whoever answered left it in."""
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
    """A prompt being answered, each turn on the verifier's own earlier answers.

    The verifier may write further user turns itself, `turns_to_write` of them.
    """

    def __init__(self, prompt: Prompt, turns_to_write: int = 0) -> None:
        self.prompt, self._turns_to_write = prompt, turns_to_write
        self.answers: list[Answer] = []
        self.ended_by: Failure | None = None  # if set, the turns that follow stay unanswered

    @property
    def question(self) -> list[Message] | None:
        """Return the messages the verifier answers next (earlier reasoning left out, as chats do); None: no further."""
        if self._ended or len(self.answers) == len(self.prompt.turns):
            return None
        return [*self.history, {"role": "user", "content": self.prompt.turns[len(self.answers)]}]

    @property
    def history(self) -> list[Message]:
        """Return the conversation so far as a later turn reads it, without reasoning."""
        return [{key: message[key] for key in ("role", "content")} for message in self.messages]

    @property
    def _ended(self) -> bool:
        truncated = bool(self.answers) and self.answers[-1].finish_reason == "length"  # no question follows on that
        return self.ended_by is not None or truncated

    @property
    def wants_turn(self) -> bool:
        """Return whether the verifier is to write a user turn next."""
        return self._turns_to_write > 0 and not self._ended and len(self.answers) == len(self.prompt.turns)

    def add_turn(self, text: str | None) -> None:
        """Take a user turn that the verifier has written; None ends the conversation with what it has."""
        if text is None:
            self._turns_to_write = 0
            return
        self._turns_to_write -= 1
        self.prompt = replace(self.prompt, turns=(*self.prompt.turns, text))

    def add(self, answer: Answer) -> None:
        """Take the answer to `question`; an empty one ends the conversation before that turn."""
        if answer.text or (answer.reasoning and answer.finish_reason == "length"):
            self.answers.append(answer)
        else:
            self.ended_by = EMPTY_ANSWER

    @property
    def messages(self) -> list[Message]:
        """Return the conversation so far."""
        prompt = self.prompt
        messages: list[Message] = [{"role": "system", "content": prompt.system}] if prompt.system else []
        for turn, answer in zip(prompt.turns, self.answers, strict=False):
            reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", **reasoning, "content": answer.text})
        return messages

    def record(self, temperature: float | None) -> dict[str, Any]:
        """Return its line of the file."""
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
            **({} if temperature is None else {"temperature": temperature}),
            **({"sequences": [sequence.as_json() for sequence in join_turns(turns)]} if tokens_known else {}),
        }
