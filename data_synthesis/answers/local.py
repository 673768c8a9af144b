"""The verifier answers in this process, through transformers."""

import time
from collections.abc import Generator, Iterable
from dataclasses import replace

from ...conf.runtime.artifact import seed_of
from ...conf.runtime.signals import StopSignals, deferred
from ...conf.schema import Config, SourceConfig, SynthesizeConfig
from ...models.verifier.model import Verifier
from ..heldout import is_heldout
from ..prompts.rows import Prompt, images_of
from ..tokens.chat_template import NoExactSpanError, Turn, prompt_tokens
from ..tokens.reasoning import split_answer
from ..tokens.sequences import UnknownTokenError, check_known
from ..tokens.user_turn import UserTurn, find_user_turn
from .answer_log import AnswerLog
from .conversation import CONTEXT_FULL, Answer, Conversation, Failure
from .generation import Generated, Generation, GenerationRequest, Task
from .user_turns import Drawn, FurtherTurns, read_turn

Draw = Generator[GenerationRequest, Generated, Drawn]


def answer_here(config: Config, prompts: Iterable[Prompt], log: AnswerLog) -> None:
    """Answer the prompts that have no conversation yet.

    An answer depends on its prompt and the seed alone, but for rounding, and is written as soon as it is whole. After a
    signal no other conversation begins, and those at work are dropped when `synthesize.grace_s` is over.
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

    def answer(prompt: Prompt, temperature: float) -> Task:
        conversation = further.begin(prompt)
        yield from converse(verifier, conversation, temperature, options, further)
        if conversation.answers:
            log.add([conversation], temperature)
        else:
            assert conversation.ended_by is not None
            log.fail(prompt.id, replace(conversation.ended_by, final=True))

    heldout = {prompt.id for prompt in everything if is_heldout(prompt.id, config.data.heldout_share)}
    # Those of similar length together: steps read as much of the cache as the longest of them needs.
    everything.sort(key=lambda p: (len(p.turns) + further.turns_to_write(p), sum(map(len, p.turns)), p.id))
    wanted = (prompt for prompt in everything if log.wants(prompt.id))
    tasks = (answer(prompt, 0.0 if prompt.id in heldout else options.temperature) for prompt in wanted)
    generation = Generation(verifier, min(options.batch_size, len(everything)))
    with deferred(f"the conversations being answered have {options.grace_s:.0f} s (synthesize.grace_s)") as signals:
        generation.run(tasks, lambda: not signals.received, Grace(signals, options.grace_s).lasts)


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


class Grace:
    """The time that what is being generated has after a signal."""

    def __init__(self, signals: StopSignals, grace_s: float) -> None:
        self._signals, self._grace_s = signals, grace_s
        self._signalled: float | None = None

    def lasts(self) -> bool:
        """Return whether no signal has come, or not so long ago."""
        if self._signalled is None and self._signals.received:
            self._signalled = time.monotonic()
        return self._signalled is None or time.monotonic() - self._signalled < self._grace_s


def converse(
    verifier: Verifier,
    conversation: Conversation,
    temperature: float,
    options: SynthesizeConfig,
    further: FurtherTurns | None = None,
) -> Task:
    """Answer a conversation turn by turn; it ends at the last turn that fits the context."""
    while conversation.question is not None or (further is not None and conversation.wants_turn):
        if (question := conversation.question) is None:
            assert further is not None
            yield from _write_turn(verifier, conversation, further, options)
            continue
        try:
            context = prompt_tokens(verifier.tokenizer, question)
            check_known(verifier.tokenizer, context, verifier.model.config.get_text_config().vocab_size)
        except UnknownTokenError as error:
            conversation.ended_by = Failure("the verifier has no embedding of a token", str(error))
        except NoExactSpanError as error:
            conversation.ended_by = Failure("the chat template refuses it", str(error))
        else:
            if len(context) + options.max_tokens > _positions(verifier):
                conversation.ended_by = CONTEXT_FULL
                continue
            seed = seed_of(options.seed, len(conversation.answers), conversation.prompt.id)
            tokens, ended = yield GenerationRequest(
                context, options.max_tokens, verifier.end_token_ids, temperature, options.top_p, seed
            )
            text, reasoning = split_answer(verifier.tokenizer, tokens, end_token_ids=verifier.end_token_ids)
            reason = "stop" if ended else "length"
            conversation.add(Answer(text or "", reason, len(context), len(tokens), reasoning, Turn(context, tokens)))


def _write_turn(
    verifier: Verifier, conversation: Conversation, further: FurtherTurns, options: SynthesizeConfig
) -> Task:
    """Write a conversation's next user turn; it ends if there can be none."""
    source, drawn = further.sources[conversation.prompt.source], None
    try:
        turn = find_user_turn(verifier.tokenizer, conversation.history, verifier.end_token_ids)
        fits = len(turn.header) + source.max_tokens <= _positions(verifier)
    except ValueError:  # this history has none
        fits = False
    if fits:
        seed = seed_of(options.seed, "user turn", [conversation.prompt.id, len(conversation.answers)])
        drawn = yield from draw_turn(verifier, turn, source, seed)
    further.add(conversation, drawn)


def draw_turn(verifier: Verifier, turn: UserTurn, source: SourceConfig, seed: int) -> Draw:
    """Draw a user turn."""
    ends = {*verifier.end_token_ids, turn.end}
    answer = yield GenerationRequest(turn.header, source.max_tokens, ends, source.temperature, source.top_p, seed)
    return read_turn(turn, verifier.tokenizer, *answer)


def _positions(verifier: Verifier) -> int:
    return int(verifier.model.config.get_text_config().max_position_embeddings)
