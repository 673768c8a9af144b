"""User turns that the verifier writes itself, as a server goes on from a raw prompt, and which of them can be used."""

import asyncio
from dataclasses import replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ...conf.schema import SELF, DataConfig, SourceConfig, SynthesizeConfig, VerifierConfig
from ...models.verifier.config import load_end_token_ids
from ..prompts.near_duplicates import Questions
from ..prompts.prepare import load_questions
from ..prompts.rows import Prompt, read_prompt
from ..prompts.sources import source_name
from ..tokens.user_turn import UserTurn, find_user_turn
from .conversation import Answer, Conversation
from .endpoint import Endpoint, RequestError
from .verify_endpoint import refusal

Drawn = tuple[str, str | None]  # the text of a user turn, and why it cannot be one, if so


def read_turn(turn: UserTurn, tokenizer: PreTrainedTokenizerBase, tokens: list[int], ended: bool) -> Drawn:
    """Return the text of a user turn from its tokens."""
    body = tokens[:-1] if ended else tokens
    why = "not_ended" if not ended else "special_tokens" if turn.marks & set(body) else None
    return str(tokenizer.decode(body)).strip(), why


def read_text(text: str, name: str, source: SourceConfig) -> Prompt | str:
    """Return the prompt that a user turn is, with an id that ends with `name`, or why it is none."""
    if not text:
        return "too_short"
    if sum(map(str.isascii, text)) < source.min_ascii * len(text):
        return "not_ascii"
    try:
        prompt, _ = read_prompt({"turns": [text], "id": name}, source_name(source), None, local=False)
    except ValueError:
        return "malformed"
    return "malformed" if "\ufffd" in text else prompt


class FurtherTurns:
    """The user turns after the first, of sources `self` that ask for some, and which texts can be one."""

    def __init__(self, data: DataConfig) -> None:
        self.sources = {source_name(source): source for source in data.sources if source.path == SELF}
        further = any(source.turns > 1 for source in self.sources.values())
        self._questions = load_questions(data.exclude) if further else Questions([])

    def begin(self, prompt: Prompt) -> Conversation:
        """Return a prompt's conversation."""
        return Conversation(prompt, self.turns_to_write(prompt))

    def turns_to_write(self, prompt: Prompt) -> int:
        """Return how many user turns the verifier is to write after a prompt's own."""
        source = self.sources.get(prompt.source)
        return source.turns - 1 if source else 0

    def add(self, conversation: Conversation, drawn: Drawn | None) -> None:
        """Give a conversation the user turn that was drawn; it ends if that cannot be one."""
        text, why = drawn or ("", "refused")
        prompt = why or read_text(text, "", self.sources[conversation.prompt.source])
        usable = isinstance(prompt, Prompt) and text not in conversation.prompt.turns and not self._questions.like(text)
        conversation.add_turn(text if usable else None)


class RawPrompts:
    """Asks servers to go on from a user header, in tokens, or in text if a server takes none."""

    def __init__(self, verifier: VerifierConfig, options: SynthesizeConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.end_token_ids = tokenizer, load_end_token_ids(verifier, tokenizer)
        self._options = options
        self._reads_text = dict[Endpoint, bool]()  # as the first header was read there

    @cached_property
    def first(self) -> UserTurn:
        """Return the first user's turn; ValueError if the template has none."""
        return find_user_turn(self.tokenizer, [], self.end_token_ids)

    async def draw_further(self, turn: UserTurn, source: SourceConfig, seed: int, endpoint: Endpoint) -> Drawn | None:
        """Return a user turn that follows a history, None if this history gives none; raise as `draw`."""
        if endpoint not in self._reads_text:
            await self.draw(self.first, replace(source, max_tokens=1), seed, endpoint)
        try:
            return await self.draw(turn, source, seed, endpoint)
        except ValueError:
            return None

    async def draw(self, turn: UserTurn, source: SourceConfig, seed: int, endpoint: Endpoint) -> Drawn:
        """Return a user turn; RequestError if there is none now, ValueError if this server can give none."""
        body = {
            **endpoint.extras,
            **({"skip_special_tokens": False} if endpoint.extras else {}),  # `_read` looks for them
            **self._options.request,
            "max_tokens": source.max_tokens,
            "temperature": source.temperature,
            "top_p": source.top_p,
            "seed": seed % 2**31,
            **({} if turn.end in self.end_token_ids else {"stop_token_ids": [turn.end]}),
        }
        as_text = self._reads_text.get(endpoint, False)
        prompt = await asyncio.to_thread(self._text, turn.header) if as_text else turn.header
        try:
            answer = await endpoint.ask({**body, "prompt": prompt}, "/completions")
        except RequestError as trouble:
            elsewhere = trouble.refuses_us and turn is not self.first  # it answered before
            if trouble.context_full or elsewhere or not (trouble.lasting or trouble.lacking):
                raise
            if trouble.final and not as_text and turn is self.first:
                if self._reads_text.setdefault(endpoint, True):
                    return await self.draw(turn, source, seed, endpoint)
                raise  # it has read the same tokens before
            raise ValueError(f"data.sources self: {refusal(endpoint, trouble)}") from None
        if answer.prompt_tokens != len(turn.header):
            raise ValueError(
                f"data.sources self: {endpoint.url} reads a raw prompt of {len(turn.header)} tokens as "
                f"{answer.prompt_tokens}: its completions must add none, as vLLM and SGLang do to a list of tokens"
            )
        self._reads_text.setdefault(endpoint, as_text)
        return self._read(turn, answer)

    def _text(self, header: list[int]) -> str:
        """Return a header as a text that the tokenizer reads as its tokens; it may add the first by itself."""
        for tokens in (header[1:], header):
            text = str(self.tokenizer.decode(tokens))
            if self.tokenizer.encode(text) == header:
                return text
        raise ValueError("data.sources self: no text gives the tokens of the user header: use a server that takes them")

    def _read(self, turn: UserTurn, answer: Answer) -> Drawn:
        ended = answer.finish_reason == "stop"
        if answer.turn is not None:
            tokens = answer.turn.answer
            return read_turn(turn, self.tokenizer, tokens, ended and tokens[-1] in turn.marks)
        if turn.end not in self.end_token_ids:
            raise ValueError(
                "data.sources self: a user's turn ends with a token that ends no answer, so servers must give their "
                "tokens, as vLLM does"
            )
        text = answer.text.strip().removesuffix(str(self.tokenizer.decode([turn.end]))).strip()
        marked = not turn.marks.isdisjoint(self.tokenizer.encode(text, add_special_tokens=False))
        return text, "not_ended" if not ended else "special_tokens" if marked else None
