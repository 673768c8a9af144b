"""Questions in the verifier's tokens, and which of them cannot be asked."""

import sys
from collections.abc import Iterable
from typing import Any

from ..conf.schema import Config
from ..data_synthesis.tokens.chat_template import NoExactSpanError, has_images, prompt_tokens
from ..data_synthesis.tokens.image_tokens import ImageReader, Images, ImageTokenizer
from ..data_synthesis.tokens.images import UnreadableImagesError, conversation_images, template_messages
from ..data_synthesis.tokens.sequences import check_known
from ..models.verifier.config import load_config, load_tokenizer
from .figures.records import HELDOUT
from .questions import Question

_SHOWN = 20  # questions that cannot be asked


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
        self._positions, self._vocab_size = int(verifier.max_position_embeddings), int(verifier.vocab_size)

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
