"""The training sequences of a conversation: those its record brings, or those its chat template gives."""

from collections import abc
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...conf.schema import VerifierConfig
from ...models.verifier.config import load_config, load_end_token_ids, load_tokenizer
from .chat_template import NoExactSpanError, Sequence, check_template, has_images, join_turns, template_turns
from .image_tokens import ImageReader, ImageTokenizer
from .images import conversation_images, images_before_answers, template_messages
from .rendering import Message, render_text


class UnknownTokenError(NoExactSpanError):
    """A text holds a token that the verifier has no embedding of."""


def check_known(tokenizer: PreTrainedTokenizerBase, token_ids: abc.Sequence[int], vocab_size: int) -> None:
    """Raise UnknownTokenError for tokens that a verifier cannot read: a tokenizer may add some beyond its embedding."""
    beyond = next((token for token in token_ids if token >= vocab_size), None)
    if beyond is not None:
        token = tokenizer.convert_ids_to_tokens(beyond)
        raise UnknownTokenError(
            f"it holds the token {token!r} with id {beyond}, and the verifier has embeddings of ids below {vocab_size}"
        )


class SequenceReader:
    """Gives conversations in the tokens of one verifier; images as ImageReader reads them."""

    def __init__(self, config: VerifierConfig, max_images: int = 5, local_images: bool = False) -> None:
        self.tokenizer = load_tokenizer(config)
        self._images = ImageReader(config, max_images, local_images)
        self._end_token_ids = load_end_token_ids(config, self.tokenizer)
        self._vocab_size = load_config(config).vocab_size
        self._template_checked = False

    def read(self, record: dict[str, Any]) -> list[Sequence]:
        """Return a conversation's sequences, every answer in exactly one of them, in order.

        If it has images, what the processor writes for each stands among the tokens.

        Raises:
            UnreadableImagesError: its images cannot be read.
            UnknownTokenError: the verifier has no embedding of one of its tokens.
            NoExactSpanError: neither recorded tokens nor the template tell what the verifier wrote and where images are
            ValueError: its recorded tokens are malformed, no conversation has exact spans, or the processor is missing.
        """
        recorded = self._recorded(record) if has_recorded_tokens(record) else None
        messages, images = record["messages"], None
        tokenizer: Any = self.tokenizer
        if has_images(messages):
            addresses, messages = conversation_images(messages), template_messages(messages)
            images = self._images.read(addresses, None if recorded else render_text(self.tokenizer, messages))
            tokenizer = ImageTokenizer(self.tokenizer, images)
        sequences = self._templated(record, messages, tokenizer) if recorded is None else recorded
        for sequence in sequences:
            check_known(self.tokenizer, sequence.token_ids, self._vocab_size)
        if images is None:
            return sequences
        shown = iter(images_before_answers(record["messages"]))
        return [images.place(sequence, [next(shown) for _ in sequence.answers][-1]) for sequence in sequences]

    def _recorded(self, record: dict[str, Any]) -> list[Sequence]:
        num_answers = sum(message["role"] == "assistant" for message in record["messages"])
        if problem := sequences_problem(record["sequences"], num_answers, max(self._vocab_size, len(self.tokenizer))):
            raise ValueError(f"conversation {record['id']}: {problem}; delete its line and run the stage again")
        return [Sequence(s["token_ids"], [(start, end) for start, end in s["answers"]]) for s in record["sequences"]]

    def _templated(self, record: dict[str, Any], messages: list[Message], tokenizer: Any) -> list[Sequence]:
        if not self._template_checked:
            check_template(self.tokenizer, self._end_token_ids)
            self._template_checked = True
        return join_turns(template_turns(tokenizer, messages, self._end_token_ids, record["finish_reasons"]))


def has_recorded_tokens(record: dict[str, Any]) -> bool:
    """Return whether a conversation's tokens came from the backend that answered it."""
    return record.get("sequences") is not None


def sequences_problem(sequences: Any, num_answers: int, vocab_size: int) -> str | None:
    """Return what is wrong with the recorded sequences of a conversation, or None."""
    found = 0
    for sequence in sequences if isinstance(sequences, list) else [None]:
        if not isinstance(sequence, dict) or not {"token_ids", "answers"} <= sequence.keys():
            return 'sequences must be a list of {"token_ids": [...], "answers": [[start, end], ...]}'
        ids, spans = sequence["token_ids"], sequence["answers"]
        if not isinstance(ids, list) or {*map(type, ids)} != {int} or not 0 <= min(ids) <= max(ids) < vocab_size:
            return f"token_ids must be ids of the verifier's vocabulary, 0 to {vocab_size - 1}"
        if not isinstance(spans, list) or not spans or not all(map(_is_span, spans)):
            return "answers must be a list of spans [start, end]"
        borders = [border for span in spans for border in span]
        if borders != sorted(borders) or any(start == end for start, end in spans) or borders[-1] > len(ids):
            return f"answers must be spans in ascending order, none empty, within {len(ids)} tokens, got {spans}"
        found += len(spans)
    return None if found == num_answers else f"sequences hold {found} answers and messages {num_answers}"


def _is_span(span: Any) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(type(border) is int and border >= 0 for border in span)


def num_whole_answers(finish_reasons: abc.Sequence[str]) -> int:
    """Return how many answers there are before the first that was cut at its limit."""
    return next((n for n, reason in enumerate(finish_reasons) if reason == "length"), len(finish_reasons))


def leading_answers(sequences: abc.Iterable[Sequence], number: int) -> list[Sequence]:
    """Return the sequences up to the end of the n-th answer of their conversation; one without answers is dropped."""
    leading: list[Sequence] = []
    for sequence in sequences:
        spans = sequence.answers[:number]
        number -= len(spans)
        if spans:
            end = spans[-1][1]
            images = tuple(image for image in sequence.images if image.span[1] <= end)
            leading.append(Sequence(sequence.token_ids[:end], spans, images))
    return leading


def answers_within(sequence: Sequence, max_length: int) -> list[Sequence]:
    """Return a sequence up to the end of its last answer that ends within so many tokens; none without one."""
    return leading_answers([sequence], sum(end <= max_length for _, end in sequence.answers))
