"""Questions in the verifier's tokens, and which of them cannot be asked."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...conf.schema import Config, EvaluateConfig, SourceConfig
from ...data_synthesis.conversations import read_conversations
from ...data_synthesis.prompts.rows import Content, text_of
from ...data_synthesis.prompts.sources import read_rows
from ...data_synthesis.tokens.chat_template import NoExactSpanError, has_images, prompt_tokens
from ...data_synthesis.tokens.image_tokens import ImageReader, Images, ImageTokenizer
from ...data_synthesis.tokens.images import UnreadableImagesError, conversation_images, template_messages
from ...data_synthesis.tokens.sequences import check_known
from ...models.verifier.config import load_config, load_tokenizer, longest_text
from ..figures.records import HELDOUT
from .question import Question

_SHOWN = 20  # questions that cannot be asked
_RESERVE = 16  # positions for draft tokens at a context length, whatever their number: all evaluations ask the same


class UnaskableError(ValueError):
    """A question, or what follows in it, cannot be asked: it fails alone."""


class QuestionReader:
    """Reads questions into the verifier's tokens.

    `max_context` are the tokens of prompt and answer that a server at `url` takes; None: the verifier here answers.
    """

    def __init__(self, config: Config, max_context: int | None = None, url: str = "") -> None:
        self._options, self._max_context, self._url = config.evaluate, max_context, url
        self._problems: dict[str, str] | None = None  # by id, after `check`
        self.tokenizer = load_tokenizer(config.verifier)
        self.images = ImageReader(config.verifier, config.dump.max_images, config.data.local_images)
        verifier = load_config(config.verifier)
        self._positions = int(verifier.max_position_embeddings) if max_context else longest_text(verifier)
        self._vocab_size = int(verifier.vocab_size)

    def read(self, question: Question, texts: list[str]) -> tuple[list[int], int, Images | None]:
        """Return the prompt of the next answer, the most tokens of that answer, and the images in the prompt.

        UnaskableError: why there is none. ValueError: an image that `check` could read cannot be read now.
        """
        if question.problem:
            raise UnaskableError(question.problem)
        messages, tokenizer = question.history(texts), self.tokenizer
        images = None
        try:
            if has_images(messages):
                images = self.images.read(conversation_images(messages))
                image_tokenizer: Any = ImageTokenizer(tokenizer, images)
                prompt = prompt_tokens(image_tokenizer, template_messages(messages))
            else:
                prompt = prompt_tokens(tokenizer, messages)
            check_known(tokenizer, prompt, self._vocab_size)
        except NoExactSpanError as error:
            is_new = self._problems is not None and question.id not in self._problems
            if isinstance(error, UnreadableImagesError) and is_new:
                raise ValueError(f"question {question.id}: {error}; the same command asks it again") from None
            raise UnaskableError(str(error)) from None
        return prompt, self._limit(question, len(prompt)), images

    def _limit(self, question: Question, length: int) -> int:
        needed = length + self._options.draft_depth + 1
        limit = min(question.max_tokens or self._options.max_tokens, self._positions - needed)
        if self._max_context is not None and (limit < 1 or needed + limit > self._max_context):
            raise UnaskableError(
                f"a prompt of {length} tokens and an answer do not fit into the {self._max_context} tokens of "
                f"{self._url}: shorten the question, lower evaluate.max_tokens, or start the server with a longer "
                "context"
            )
        if limit < 1:
            raise UnaskableError(f"its prompt of {length} tokens fills the verifier's context of {self._positions}")
        return limit

    def check(self, questions: Iterable[Question]) -> None:
        """Print the questions that cannot be asked, as far as is known before any answer; ValueError: none can be."""
        self._problems, problems = None, dict[str, str]()
        num_askable = 0
        for question in questions:
            try:
                for turn in range(1 if question.answers is None else len(question.turns)):
                    self.read(question, [""] * turn)
                num_askable += question.category != HELDOUT
            except UnaskableError as error:
                problems[question.id] = str(error)
        shown = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:_SHOWN])
        shown += f"; and {len(problems) - _SHOWN} more" * (len(problems) > _SHOWN)
        if not num_askable:
            raise ValueError(f"evaluate.questions: none of them can be asked: {shown}")
        if problems:
            message = f"questions that cannot be asked are left out, {len(problems)} of them: {shown}"
            print(f"fledge: {message}", file=sys.stderr)
        self._problems = problems


# -- the same questions at several context lengths ---------------------------------------------------------------------


def at_context_lengths(config: Config, questions: list[Question]) -> list[Question]:
    """Return the first turn of each question behind documents, once for each of evaluate.context_lengths.

    Prompt and answer, of evaluate.max_tokens, reach the length together. All prompts of a length begin alike, and the
    length is the category: the figures by category are those by length. Without lengths, the questions themselves.
    """
    options = config.evaluate
    if not options.context_lengths:
        return questions
    tokenizer = load_tokenizer(config.verifier)
    text = "\n\n".join(_documents(config, 8 * max(options.context_lengths)))
    documents = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    behind = []
    for length in options.context_lengths:
        for question in questions:
            name, category = f"{question.id}@{length}", f"context {length}"
            same = replace(question, id=name, category=category, turns=question.turns[:1], answers=None)
            try:
                asked, num_documents = _filled(tokenizer, documents, same, length, options)
            except (UnaskableError, NoExactSpanError) as error:
                behind.append(replace(same, problem=question.problem or str(error)))
                continue
            if len(documents) < num_documents:
                raise ValueError(
                    f"evaluate.context_documents: {len(documents)} tokens of text do not fill a context of {length}"
                )
            behind.append(asked)
    return behind


def _filled(
    tokenizer: Any, documents: list[int], question: Question, length: int, options: EvaluateConfig
) -> tuple[Question, int]:
    """Return a question behind as many tokens of documents as fill a context of `length`, and their number.

    UnaskableError: there is no room for any, or it has images.
    """
    if question.images:
        raise UnaskableError("it has images, whose tokens no document makes room for")
    number = room = length - options.max_tokens - max(_RESERVE, options.draft_depth + 1)
    while number > 0:
        asked = replace(question, turns=(_behind(str(tokenizer.decode(documents[:number])), question.turns[0]),))
        beyond = len(prompt_tokens(tokenizer, asked.history([]))) - room
        if beyond <= 0:
            return asked, number
        number -= beyond
    raise UnaskableError(f"it and an answer of {options.max_tokens} tokens do not fit into a context of {length}")


def _behind(text: str, turn: Content) -> Content:
    """Return a turn with a text before it."""
    text = f"{text.strip()}\n\n"
    return text + turn if isinstance(turn, str) else [{"type": "text", "text": text}, *turn]


def _documents(config: Config, num_characters: int) -> Iterator[str]:
    """Yield texts of evaluate.context_documents, or else of the run's conversations, so many characters or more."""
    path, folder = config.evaluate.context_documents, config.conversations_folder
    if path is None and not (folder / "manifest.json").exists():
        raise ValueError(
            f"evaluate.context_documents is required, there are no conversations in {folder}: a text file, or rows "
            "with a field `text`, in a file, a folder or on the hub"
        )
    texts: Iterator[str]
    if path is None:
        texts = (text_of(message["content"]) for record in read_conversations(folder) for message in record["messages"])
    elif Path(path).suffix in (".txt", ".md"):
        texts = iter([Path(path).read_text(encoding="utf-8")])
    else:
        texts = (_text(place, row) for place, row in read_rows(SourceConfig(path=path), whole=True))
    for text in texts:
        yield text
        num_characters -= len(text)
        if num_characters <= 0:
            return


def _text(place: str, row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"evaluate.context_documents: {place} has no field `text` with a text in it")
    return row["text"]
