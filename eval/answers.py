"""Questions answered in this process: by the verifier alone, and speculatively with every drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..conf.journal import Journal
from ..conf.progress import Progress
from ..conf.schema import Config, EvaluateConfig
from ..data_synthesis.chat import prompt_tokens
from ..models.draft_head import DraftHead, initialise
from ..models.verifier import Verifier, VerifierWeights
from ..models.vocabulary import VocabularyMap
from .acceptance import GREEDY, AcceptanceRule, Sampled
from .draft_decoder import DraftDecoder
from .prompt_lookup import NoDraft, PromptLookup
from .questions import HELDOUT, Question
from .results import LOOKUP, RECORDS, TRAINED, UNTRAINED
from .speculative import Decoded, Drafter, speculate


def answer_questions(config: Config, head: DraftHead, questions: list[Question], folder: Path) -> None:
    """Answer those questions that the journal in `folder` does not hold yet, and append their records."""
    journal = Journal(folder / RECORDS)
    left = [question for question in questions if question.id not in journal.done]
    if left:
        verifier = Verifier.load(config.verifier, list(head.config.aux_layers))
        drafters = _drafters(config, head, verifier)
        progress = Progress("evaluate", len(questions), "question", done=len(questions) - len(left))
        for question in left:
            used = drafters if question.category != HELDOUT else {TRAINED: drafters[TRAINED]}
            journal.append([decode_question(verifier, used, question, config)])
            progress.update()
        progress.close()
    journal.close()


def _drafters(config: Config, head: DraftHead, verifier: Verifier) -> dict[str, Drafter]:
    weights = VerifierWeights(config.verifier)
    dtype = getattr(torch, config.verifier.dtype.value)
    matrix = weights.embedding()
    embedding = matrix.to(verifier.device, dtype)
    drafters: dict[str, Drafter] = {TRAINED: DraftDecoder(head.to(verifier.device, dtype), embedding)}
    if config.evaluate.baselines:
        untrained = DraftHead(head.config, VocabularyMap(head.d2t, head.t2d))
        initialise(untrained, matrix, weights.lm_head(), config.train.seed)
        drafters[UNTRAINED] = DraftDecoder(untrained.to(verifier.device, dtype), embedding)
        drafters[LOOKUP] = PromptLookup()
    return drafters


def decode_question(
    verifier: Verifier, drafters: dict[str, Drafter], question: Question, config: Config
) -> dict[str, Any]:
    """Answer a question's turns with the verifier alone and with each drafter; give its record."""
    options = config.evaluate
    max_tokens = question.max_tokens or options.max_tokens
    answers: list[dict[str, Any]] = []
    texts: list[str] = []
    for turn in range(len(question.turns)):
        prompt = prompt_tokens(verifier.tokenizer, question.history(texts))

        def answer(drafter: Drafter, prompt: list[int] = prompt, turn: int = turn) -> Decoded:
            rule = _rule(options, verifier.device, question, turn)
            return speculate(verifier, drafter, prompt, options.num_draft_tokens, max_tokens, rule)

        alone = answer(NoDraft())
        texts.append(str(verifier.tokenizer.decode(alone.tokens, skip_special_tokens=True)))
        by_drafter = {}
        for name, drafter in drafters.items():
            decoded = answer(drafter)
            by_drafter[name] = {
                "drafted": decoded.drafted,
                "accepted": decoded.accepted,
                "output_tokens": len(decoded.tokens),
                "seconds": decoded.seconds,
                **({} if options.temperature else {"equals_verifier": decoded.tokens == alone.tokens}),
            }
        answers.append(
            {
                "text": texts[-1],
                "prompt_tokens": len(prompt),
                "output_tokens": len(alone.tokens),
                "seconds_alone": alone.seconds,
                "drafters": by_drafter,
            }
        )
    return {"id": question.id, "category": question.category, "turns": list(question.turns), "answers": answers}


def _rule(options: EvaluateConfig, device: torch.device, question: Question, turn: int) -> AcceptanceRule:
    """Give the rule of an answer; its draws depend on nothing but the seed, the question and the turn."""
    if not options.temperature:
        return GREEDY
    return Sampled(options.temperature, device, f"{options.seed}/{turn}/{question.id}")
