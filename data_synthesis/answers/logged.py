"""Answers that were logged with their tokens: they become conversations as they are, and nobody answers again."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ...conf.schema import Config
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
    tokenizer, number = load_tokenizer(config.verifier), 0
    ends, vocab_size = load_end_token_ids(config.verifier, tokenizer), load_config(config.verifier).vocab_size
    for prompt in prompts:
        heldout = is_heldout(prompt.id, config.data.heldout_share)
        if prompt.logged is None or heldout:
            yield replace(prompt, logged=None)
            continue
        if not log.wants(prompt.id):
            continue
        turn = Turn(*prompt.logged)
        conversation = Conversation(replace(prompt, turns=prompt.turns[-1:]))
        try:
            check_known(tokenizer, turn.prompt + turn.answer, vocab_size)
        except UnknownTokenError as error:
            log.fail(prompt.id, Failure("the verifier has no embedding of a token", str(error), final=True))
            continue
        read = canonical(str(tokenizer.decode(turn.prompt, skip_special_tokens=True)))
        if any(canonical(text) not in read for text in _texts(prompt)):
            log.fail(prompt.id, Failure("the logged tokens do not hold the question", read[-200:], final=True))
            continue
        text, reasoning = split_answer(tokenizer, turn.answer, end_token_ids=ends)
        reason = "stop" if turn.answer[-1] in ends else "length"
        text = text or str(tokenizer.decode(turn.answer, skip_special_tokens=True))  # was asked by other settings
        conversation.add(Answer(text, reason, len(turn.prompt), len(turn.answer), reasoning, turn))
        if conversation.ended_by:
            log.fail(prompt.id, replace(conversation.ended_by, final=True))
        else:
            log.add([conversation], None)
            number += 1
    if number:
        print(f"synthesize: the logged answers of {number} prompts are taken as they are (data.logged_answers)")


def _texts(prompt: Prompt) -> list[str]:
    """Return what a logged prompt must hold: the last question and the system message."""
    turn = prompt.turns[-1]
    return [prompt.system or "", *([turn] if isinstance(turn, str) else (part.get("text", "") for part in turn))]
