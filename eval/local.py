"""Questions answered in this process: by the verifier alone, and speculatively with every drafter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..conf.runtime.artifact import Artifact
from ..conf.runtime.journal import Journal
from ..conf.runtime.progress import Progress
from ..conf.schema import Config
from ..data_synthesis.tokens.chat_template import answer_text
from ..models.head.architectures import build_head
from ..models.head.draft_head import DraftHead, initialise
from ..models.head.vocabulary import VocabularyMap
from ..models.verifier.model import Verifier
from ..models.verifier.weights import VerifierWeights
from .asking import QuestionReader, UnaskableError
from .decoding.acceptance import AcceptanceRule
from .decoding.head_drafter import DraftDecoder
from .decoding.kernel_checks import check_decoding
from .decoding.prompt_lookup import NoDraft, PromptLookup
from .decoding.proposal import Drafter
from .decoding.speculator import Decoded, Request, Speculator
from .figures.records import HELDOUT, LOOKUP, RECORDS, TRAINED, UNTRAINED
from .questions import Question


def answer_questions(
    config: Config, head: DraftHead, questions: list[Question], target: Artifact, reader: QuestionReader | None
) -> None:
    """Answer those questions that the evaluation's journal does not hold yet, and append their records.

    A signal ends it at once: the group being answered is answered again by the next start.
    """
    journal = Journal(target.folder / RECORDS)
    left = [question for question in questions if question.id not in journal.done]
    if left:
        answerer = Answerer(config, Verifier.load(config.verifier, list(head.config.aux_layers)), head, reader)
        target.save(kernels=answerer.kernels.record)
        progress = Progress("evaluate", len(questions), "question", done=len(questions) - len(left))
        for group in _groups(left, config.evaluate.batch_size):
            journal.append(answerer.answer(group))
            progress.update(len(group))
        progress.close()
    journal.close()


def _groups(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Give groups of at most `size` questions; held-out conversations are in groups of their own."""
    for kind in (False, True):
        alike = [question for question in questions if (question.category == HELDOUT) is kind]
        yield from (alike[first : first + size] for first in range(0, len(alike), size))


class Answerer:
    """Answers questions with the verifier alone and with each drafter."""

    def __init__(
        self, config: Config, verifier: Verifier, head: DraftHead, reader: QuestionReader | None = None
    ) -> None:
        options = config.evaluate
        self._options = options
        self._verifier = verifier
        self.kernels = check_decoding(config, head.config, verifier.device)
        self._rule = replace(AcceptanceRule.of(options), kernels=self.kernels.used)
        self._drafters = self._make_drafters(config, head)
        self._alone = NoDraft()
        drafters = [self._alone, *self._drafters.values()]
        self._speculator = Speculator(verifier, drafters, self._rule, options.batch_size, options.cuda_graphs)
        self._reader = reader or QuestionReader(config)
        self._checked: set[bool] = set()  # with images, and without

    def _make_drafters(self, config: Config, head: DraftHead) -> dict[str, Drafter]:
        options, device = config.evaluate, self._verifier.device
        weights = VerifierWeights(config.verifier)
        dtype = getattr(torch, config.verifier.dtype.value)
        matrix = weights.embedding()
        embedding = matrix.to(device, dtype)

        def decoder(head: DraftHead) -> DraftDecoder:
            shape = options.num_draft_tokens, options.tree_depth, options.tree_top_k
            return DraftDecoder(head.to(device, dtype), embedding, *shape, self._rule, options.batch_size)

        drafters: dict[str, Drafter] = {TRAINED: decoder(head)}
        if options.baselines:
            untrained = build_head(head.config, VocabularyMap(head.d2t, head.t2d))
            initialise(untrained, matrix, weights.lm_head(), config.train.seed)
            drafters[UNTRAINED] = decoder(untrained)
            drafters[LOOKUP] = PromptLookup(options.draft_depth, options.batch_size)
        return drafters

    def answer(self, questions: list[Question]) -> list[dict[str, Any]]:
        """Answer a group of questions, turn by turn; give their records."""
        answers: list[list[dict[str, Any]]] = [[] for _ in questions]
        left_out = [""] * len(questions)
        for turn in range(max(len(question.turns) for question in questions)):
            requests: dict[int, Request] = {}
            for number, question in enumerate(questions):
                if turn < len(question.turns) and not left_out[number]:
                    try:
                        requests[number] = self._request(question, [answer["text"] for answer in answers[number]])
                    except UnaskableError as error:
                        left_out[number] = f"turn {turn + 1}: {error}"
            told = self._answer_turn(list(requests.values()), questions[0].category) if requests else []
            for number, answer in zip(requests, told, strict=True):
                answers[number].append(answer)
        whole = zip(questions, answers, left_out, strict=True)
        return [question.record(given, reason) for question, given, reason in whole]

    def _request(self, question: Question, texts: list[str]) -> Request:
        """Ask for the next answer; a sampled one depends on nothing but the seed, the question and the turn."""
        seed = f"{self._options.seed}/{len(texts)}/{question.id}"
        prompt, max_tokens, images = self._reader.read(question, texts)
        inputs = self._reader.images.model_inputs(torch.tensor(prompt), images) if images else {}
        return Request(prompt, max_tokens, seed, f"the prompt of question {question.id}", self._verifier.place(inputs))

    def _answer_turn(self, requests: list[Request], category: str) -> list[dict[str, Any]]:
        for request in requests:
            if bool(request.inputs) not in self._checked and len(request.prompt) > 2:
                self._speculator.cached.check(request.prompt, request.inputs)
                self._checked.add(bool(request.inputs))
        self._speculator.prefill(requests)
        alone = self._speculator.decode(self._alone)
        answers: list[dict[str, Any]] = [
            {
                "text": answer_text(self._verifier.tokenizer, decoded.tokens),
                "prompt_tokens": len(request.prompt),
                "output_tokens": len(decoded.tokens),
                "seconds_alone": decoded.seconds,
                "drafters": {},
            }
            for request, decoded in zip(requests, alone, strict=True)
        ]
        for name, drafter in self._drafters.items():
            if category == HELDOUT and name != TRAINED:
                continue
            drawn = self._rule.draws_drafts and name != LOOKUP  # which changes the answer
            for answer, own, decoded in zip(answers, alone, self._speculator.decode(drafter), strict=True):
                answer["drafters"][name] = _told(decoded, None if drawn else own)
        return answers


def _told(decoded: Decoded, alone: Decoded | None) -> dict[str, Any]:
    """Give what a drafter's answer adds to the record; `alone` is what it has to be equal to."""
    return {
        "drafted": decoded.drafted,
        "accepted": decoded.accepted,
        "output_tokens": len(decoded.tokens),
        "seconds": decoded.seconds,
        **({} if alone is None else {"equals_verifier": decoded.tokens == alone.tokens}),
    }
