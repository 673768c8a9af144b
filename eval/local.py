"""Questions answered in this process: by the verifier alone, and speculatively with every drafter."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ..conf.runtime.artifact import Artifact
from ..conf.runtime.journal import Journal
from ..conf.runtime.progress import Progress
from ..conf.schema import Config
from ..data_synthesis.show import token_texts
from ..data_synthesis.tokens.chat_template import answer_text
from ..models.head.draft_head import DraftHead
from ..models.verifier.model import Verifier
from ..models.verifier.weights import VerifierWeights
from .decoding.acceptance import AcceptanceRule
from .decoding.drafters import DRAFTERS, DrafterInputs
from .decoding.kernel_checks import check_decoding
from .decoding.prompt_lookup import NoDraft
from .decoding.speculator import Answer, Request, Speculator
from .figures.records import HELDOUT, RECORDS, TRAINED
from .questions.question import Question
from .questions.reader import QuestionReader, UnaskableError

_CONTEXT = 4  # tokens before a refused draft, in which its text is written


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
        names = ", ".join(answerer.drafters)  # a slow verifier takes minutes for its first question
        print(f"evaluate: {len(left)} questions, by the verifier alone and by {names}", flush=True)
        progress = Progress("evaluate", len(questions), "question", done=len(questions) - len(left))
        for group in _groups(left, config.evaluate.batch_size):
            journal.append(answerer.answer(group))
            progress.update(len(group))
        progress.close()
    journal.close()


def _groups(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Yield groups of at most `size` questions; held-out conversations are in groups of their own."""
    for kind in (False, True):
        alike = [question for question in questions if (question.category == HELDOUT) is kind]
        yield from (alike[first : first + size] for first in range(0, len(alike), size))


class Answerer:
    """Answers questions with the verifier alone and with each drafter."""

    def __init__(
        self, config: Config, verifier: Verifier, head: DraftHead, reader: QuestionReader | None = None
    ) -> None:
        options, dtype = config.evaluate, getattr(torch, config.verifier.dtype.value)
        self._verifier, self._seed = verifier, options.seed
        self.kernels = check_decoding(options, head.config, dtype, verifier.device)
        rule = replace(AcceptanceRule.of(options), kernels=self.kernels.used)
        weights = VerifierWeights(config.verifier)
        embedding = weights.embedding().to(verifier.device, dtype)
        inputs = DrafterInputs(head, weights, embedding, options, rule, config.train.seed)
        names = DRAFTERS if options.baselines else (TRAINED,)
        self.drafters = {name: DRAFTERS[name](inputs) for name in names}
        self._alone = NoDraft()
        drafters = [self._alone, *self.drafters.values()]
        self._speculator = Speculator(verifier, drafters, rule, options.batch_size, options.cuda_graphs)
        self._reader = reader or QuestionReader(config)
        self._checked: set[bool] = set()  # with images, and without

    def answer(self, questions: list[Question]) -> list[dict[str, Any]]:
        """Answer a group of questions, turn by turn; return their records."""
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
            if requests:
                new = self._answer_turn(list(requests.values()), questions[0].category)
                for number, answer in zip(requests, new, strict=True):
                    answers[number].append(answer)
        rows = zip(questions, answers, left_out, strict=True)
        return [question.record(turns, reason) for question, turns, reason in rows]

    def _request(self, question: Question, texts: list[str]) -> Request:
        """Make the request for the next answer; a sampled one depends on the seed, the question and the turn alone."""
        seed = f"{self._seed}/{len(texts)}/{question.id}"
        prompt, max_tokens, images = self._reader.read(question, texts)
        inputs = self._reader.images.model_inputs(torch.tensor(prompt), images) if images else {}
        return Request(prompt, max_tokens, seed, self._verifier.place(inputs))

    def _answer_turn(self, requests: list[Request], category: str) -> list[dict[str, Any]]:
        for request in requests:
            if bool(request.inputs) not in self._checked and len(request.prompt) > 2:
                self._speculator.cached.check(request.prompt, request.inputs)
                self._checked.add(bool(request.inputs))
        self._speculator.prefill(requests)
        alone = self._speculator.decode(self._alone)
        answers: list[dict[str, Any]] = [
            {
                "text": answer_text(self._verifier.tokenizer, own.tokens, None, self._verifier.end_token_ids),
                "prompt_tokens": len(request.prompt),
                "output_tokens": len(own.tokens),
                "seconds_alone": own.seconds,
                "drafters": {},
            }
            for request, own in zip(requests, alone, strict=True)
        ]
        for name, drafter in self.drafters.items():
            if category == HELDOUT and name != TRAINED:
                continue
            for answer, own, speculative in zip(answers, alone, self._speculator.decode(drafter), strict=True):
                answer["drafters"][name] = {
                    "drafted": speculative.drafted,
                    "accepted": speculative.accepted,
                    "output_tokens": len(speculative.tokens),
                    "seconds": speculative.seconds,
                    **({} if drafter.draws_tokens else {"equals_verifier": speculative.tokens == own.tokens}),
                }
                if name == TRAINED:
                    answer["drafters"][name] |= self._texts(speculative)
        return answers

    def _texts(self, answer: Answer) -> dict[str, list[Any]]:
        """Return what each token of an answer adds to its text, and what the refused draft of each round would have."""
        tokenizer, ends = self._verifier.tokenizer, itertools.accumulate(n + 1 for n in answer.accepted)
        refused = [
            token_texts(tokenizer, [*answer.tokens[max(0, end - _CONTEXT) : end], token])[-1] if token >= 0 else None
            for end, token in zip(ends, answer.refused, strict=True)
        ]
        return {"token_texts": token_texts(tokenizer, answer.tokens), "refused_texts": refused}
