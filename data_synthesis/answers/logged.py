"""Answers that were logged with their tokens: they become conversations as they are, and nobody answers again."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ...conf.schema import Config, VerifierConfig
from ...models.verifier.config import load_config, load_end_token_ids, load_tokenizer
from ..heldout import is_heldout
from ..prompts.near_duplicates import canonical
from ..prompts.rows import Prompt
from ..tokens.chat_template import Turn
from ..tokens.reasoning import split_answer
from ..tokens.sequences import UnknownTokenError, check_known
from .answer_log import AnswerLog
from .conversation import Answer, Conversation, Failure


def take_logged(config: Config, prompts: Iterable[Prompt], log: AnswerLog) -> Iterator[Prompt]:
    """Write the logged answers of prompts, and yield those that the verifier is to answer.

    These are the prompts without a logged answer, and those held out, whose answers must be greedy. A logged answer is
    the last turn's: the turns before it stand in its prompt. Tokens that the verifier does not have are a failure, and
    so is a prompt in tokens without the question: it is another one, another tokenizer's, or its text was changed.
    """
    reader, number = None, 0
    for prompt in prompts:
        if prompt.logged is None or is_heldout(prompt.id, config.data.heldout_share):
            yield replace(prompt, logged=None)
            continue
        if not log.wants(prompt.id):
            continue
        reader = reader or _Reader(config.verifier)
        read = reader.read(prompt, Turn(*prompt.logged))
        if isinstance(read, Failure):
            log.fail(prompt.id, replace(read, final=True))
        else:
            log.add([read], None)
            number += 1
    if number:
        print(f"synthesize: the logged answers of {number} prompts are taken as they are (data.logged_answers)")


class _Reader:
    """Makes conversations of logged answers, in the tokens of one verifier."""

    def __init__(self, config: VerifierConfig) -> None:
        self._tokenizer = load_tokenizer(config)
        self._ends = load_end_token_ids(config, self._tokenizer)
        self._vocab_size = load_config(config).vocab_size

    def read(self, prompt: Prompt, turn: Turn) -> Conversation | Failure:
        """Return the conversation of a prompt's last turn, or why there is none."""
        try:
            check_known(self._tokenizer, turn.prompt + turn.answer, self._vocab_size)
        except UnknownTokenError as error:
            return Failure("the verifier has no embedding of a token", str(error))
        asked = canonical(str(self._tokenizer.decode(turn.prompt, skip_special_tokens=True)))
        if any(canonical(text) not in asked for text in _texts(prompt)):
            return Failure("the logged tokens do not hold the question", asked[-200:])
        text, reasoning = split_answer(self._tokenizer, turn.answer, end_token_ids=self._ends)
        text = text or str(self._tokenizer.decode(turn.answer, skip_special_tokens=True))  # was asked by other settings
        reason = "stop" if turn.answer[-1] in self._ends else "length"
        conversation = Conversation(replace(prompt, turns=prompt.turns[-1:]))
        conversation.add(Answer(text, reason, len(turn.prompt), len(turn.answer), reasoning, turn))
        return conversation.ended_by or conversation


def _texts(prompt: Prompt) -> list[str]:
    """Return what a logged prompt must hold: the last question and the system message."""
    turn = prompt.turns[-1]
    return [prompt.system or "", *([turn] if isinstance(turn, str) else (part.get("text", "") for part in turn))]
