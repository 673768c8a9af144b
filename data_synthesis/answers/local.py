"""The verifier answers in this process, through transformers: conversations of similar length together."""

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from ...conf.runtime.artifact import seed_of
from ...conf.runtime.signals import StopSignals, deferred
from ...conf.schema import Config, SynthesizeConfig
from ...models.verifier.model import Verifier
from ..heldout import is_heldout
from ..prompts.rows import Prompt, images_of
from ..tokens.chat_template import NoExactSpanError, Turn, prompt_tokens
from ..tokens.reasoning import split_answer
from ..tokens.sequences import UnknownTokenError, check_known
from ..tokens.user_turn import UserTurn, find_user_turn
from .answer_log import AnswerLog
from .conversation import CONTEXT_FULL, Answer, Conversation, Failure
from .user_turns import FurtherTurns, read_turn


def answer_here(config: Config, prompts: Iterable[Prompt], log: AnswerLog) -> None:
    """Answer the prompts that have no conversation yet.

    Batches are the same at every start, and one that a kill left half-written is answered anew as a whole, so that a
    resumed run says what an uninterrupted one would say. A signal stops before the next batch, and the one at
    work when `synthesize.grace_s` is over.
    """
    options = config.synthesize
    everything = list(prompts)
    if not any(log.wants(prompt.id) for prompt in everything):
        return
    if pictured := next((prompt.id for prompt in everything if any(map(images_of, prompt.turns))), None):
        raise ValueError(
            f"prompt {pictured} has images, which the verifier in this process cannot read: "
            "give synthesize.endpoints of a server that does"
        )
    verifier = load_here(config, options.max_tokens, "synthesize.max_tokens")
    further = FurtherTurns(config.data)
    with deferred(f"the conversations being answered have {options.grace_s:.0f} s (synthesize.grace_s)") as signals:
        deadline = Deadline(signals, options.grace_s)
        for temperature, batch in _batches(everything, options, config.data.heldout_share):
            if signals.received:
                return
            if not any(log.wants(prompt.id) for prompt in batch):
                continue
            conversations = [further.begin(prompt) for prompt in batch]
            converse(verifier, conversations, temperature, options, deadline)
            while not deadline.over and write_turns(verifier, conversations, further, options, deadline):
                converse(verifier, conversations, temperature, options, deadline)
            if deadline.over:
                return  # what is there may be half an answer
            new = [conversation for conversation in conversations if log.wants(conversation.prompt.id)]
            log.add([conversation for conversation in new if conversation.answers], temperature)
            for conversation in new:
                if not conversation.answers:
                    assert conversation.ended_by is not None
                    log.fail(conversation.prompt.id, replace(conversation.ended_by, final=True))


def load_here(config: Config, max_tokens: int, option: str) -> Verifier:
    """Load the verifier into this process; ValueError if it cannot be, or `max_tokens` leave no room for a prompt."""
    if config.verifier.tensor_parallel:
        raise ValueError(
            "verifier.tensor_parallel must be false with `fledge synthesize`, or its prompts be answered by servers "
            "(synthesize.endpoints): the verifier in this process is not divided over ranks"
        )
    verifier = Verifier.load(config.verifier, config.draft.aux_layers)
    if max_tokens >= (positions := _positions(verifier)):
        raise ValueError(
            f"{option} must leave room for a prompt in the verifier's {positions} tokens, got {max_tokens}"
        )
    return verifier


def _batches(prompts: list[Prompt], options: SynthesizeConfig, share: float) -> Iterator[tuple[float, list[Prompt]]]:
    """Return conversations of similar length together, with their temperature: the held-out share is greedy."""
    for heldout, temperature in ((True, 0.0), (False, options.temperature)):
        split = [prompt for prompt in prompts if is_heldout(prompt.id, share) == heldout]
        split.sort(key=lambda prompt: (len(prompt.turns), sum(map(len, prompt.turns)), prompt.id))
        for start in range(0, len(split), options.batch_size):
            yield temperature, split[start : start + options.batch_size]


class Deadline:
    """Ends a generation once the grace after a signal is over: a stopping criterion of transformers."""

    def __init__(self, signals: StopSignals, grace_s: float) -> None:
        self._signals, self._grace_s = signals, grace_s
        self._signalled: float | None = None

    @property
    def over(self) -> bool:
        if self._signalled is None and self._signals.received:
            self._signalled = time.monotonic()
        return self._signalled is not None and time.monotonic() - self._signalled >= self._grace_s

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.over, device=input_ids.device)


def converse(
    verifier: Verifier,
    conversations: list[Conversation],
    temperature: float,
    options: SynthesizeConfig,
    deadline: Deadline | None = None,
) -> None:
    """Answer conversations turn by turn, all of them at once; each ends at the last turn that fits the context."""
    while True:
        open_conversations, contexts = list[Conversation](), list[list[int]]()
        for conversation in conversations:
            if (question := conversation.question) is None:
                continue
            try:
                context = prompt_tokens(verifier.tokenizer, question)
                check_known(verifier.tokenizer, context, verifier.model.config.get_text_config().vocab_size)
            except UnknownTokenError as error:
                conversation.ended_by = Failure("the verifier has no embedding of a token", str(error))
            except NoExactSpanError as error:
                conversation.ended_by = Failure("the chat template refuses it", str(error))
            else:
                if len(context) + options.max_tokens <= _positions(verifier):
                    open_conversations.append(conversation)
                    contexts.append(context)
                else:
                    conversation.ended_by = CONTEXT_FULL
        if not open_conversations:
            return
        turns = max(len(conversation.answers) for conversation in open_conversations)
        ids = [conversation.prompt.id for conversation in open_conversations]
        seed = seed_of(options.seed, turns, ids)
        answers = generate(verifier, contexts, options, temperature, seed, deadline)
        for conversation, context, (tokens, ended) in zip(open_conversations, contexts, answers, strict=True):
            text, reasoning = split_answer(verifier.tokenizer, tokens)
            reason = "stop" if ended else "length"
            conversation.add(Answer(text or "", reason, len(context), len(tokens), reasoning, Turn(context, tokens)))


def write_turns(
    verifier: Verifier,
    conversations: list[Conversation],
    further: FurtherTurns,
    options: SynthesizeConfig,
    deadline: Deadline | None = None,
) -> bool:
    """Write the next user turn of conversations that want one, a source at a time; return whether any has one now."""
    wanting = [conversation for conversation in conversations if conversation.wants_turn]
    for name, source in further.sources.items():
        asking = list[tuple[Conversation, UserTurn]]()
        for conversation in (conversation for conversation in wanting if conversation.prompt.source == name):
            try:
                turn = find_user_turn(verifier.tokenizer, conversation.history, verifier.end_token_ids)
            except ValueError:  # this history has none
                further.add(conversation, None)
                continue
            if len(turn.header) + source.max_tokens <= _positions(verifier):
                asking.append((conversation, turn))
            else:
                further.add(conversation, None)
        if not asking:
            continue
        writer = copy.copy(verifier)
        writer.end_token_ids = sorted({*verifier.end_token_ids, *(turn.end for _, turn in asking)})
        own = replace(options, max_tokens=source.max_tokens, top_p=source.top_p)
        ids = [[conversation.prompt.id, len(conversation.answers)] for conversation, _ in asking]
        seed = seed_of(options.seed, "user turn", ids)
        headers = [turn.header for _, turn in asking]
        drawn = generate(writer, headers, own, source.temperature, seed, deadline)
        for (conversation, turn), (tokens, ended) in zip(asking, drawn, strict=True):
            further.add(conversation, read_turn(turn, verifier.tokenizer, tokens, ended))
    return any(conversation.question is not None for conversation in wanting)


def _positions(verifier: Verifier) -> int:
    return int(verifier.model.config.get_text_config().max_position_embeddings)


def generate(
    verifier: Verifier,
    contexts: list[list[int]],
    options: SynthesizeConfig,
    temperature: float,
    seed: int,
    deadline: Deadline | None = None,
) -> list[tuple[list[int], bool]]:
    """Return an answer to each token context: its tokens, and whether it ended by itself."""
    width = max(map(len, contexts))
    end = verifier.end_token_ids
    padding = verifier.tokenizer.pad_token_id if verifier.tokenizer.pad_token_id is not None else end[0]
    input_ids = torch.tensor([[padding] * (width - len(c)) + c for c in contexts], device=verifier.device)
    attention_mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], device=verifier.device)
    torch.manual_seed(seed)
    # A configuration of our own: the verifier's may carry penalties, and greedy must be greedy.
    generation = GenerationConfig(
        max_new_tokens=options.max_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_p": options.top_p, "top_k": 0} if temperature > 0 else {}),
        eos_token_id=end,
        pad_token_id=padding,
    )
    verifier.model.generation_config = generation
    output = verifier.model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=generation,
        stopping_criteria=StoppingCriteriaList([deadline] if deadline else []),
    )
    answers = []
    for row in output[:, width:].tolist():
        stop = next((i for i, token in enumerate(row) if token in end), None)
        answers.append((row if stop is None else row[: stop + 1], stop is not None))
    return answers
