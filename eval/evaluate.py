"""The evaluate stage: acceptance length by decoding, per category, beside an untrained head and prompt lookup."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..conf.artifact import artifact, digest, file_digest, read_manifest, write_json
from ..conf.journal import Journal, read_journal
from ..conf.progress import Progress
from ..conf.schema import Config, EvaluateConfig
from ..data_synthesis.chat import prompt_tokens
from ..data_synthesis.split import conversation_id
from ..models.draft_head import DraftHead, initialise
from ..models.formats import HELDOUT_WALKS, WEIGHTS, head_folder, load_head
from ..models.verifier import Verifier, VerifierWeights, check_identity
from ..models.vocabulary import VocabularyMap
from .acceptance import GREEDY, AcceptanceRule, Sampled
from .draft_decoder import DraftDecoder
from .metrics import count, macro_acceptance_length
from .prompt_lookup import NoDraft, PromptLookup
from .questions import HELDOUT, Question, load_heldout, load_questions
from .report import ACCEPTANCE, print_table, write_report
from .speculative import Decoded, Drafter, speculate

RECORDS = "questions.jsonl"
TRAINED, UNTRAINED, LOOKUP = "trained head", "untrained head", "prompt lookup"


def evaluate(config: Config) -> None:
    """Decode the questions speculatively and write runs/<name>/evaluation/."""
    options = config.evaluate
    source = head_folder(options.checkpoint, config.training_folder)
    head, record = load_head(source)
    check_identity(record["verifier"], config.verifier, str(source), "set the verifier it was trained for")
    questions = load_questions(options) + _heldout(config)
    settings = {
        "verifier": record["verifier"],
        "verifier_dtype": config.verifier.dtype.value,
        "head": file_digest(source / WEIGHTS),
        "questions": digest([[q.id, q.category, q.turns, q.answers] for q in questions]),
        "num_draft_tokens": options.num_draft_tokens,
        "max_tokens": options.max_tokens,
        "baselines": options.baselines,
        "temperature": options.temperature,
        "seed": options.seed if options.temperature else None,
    }
    with artifact(config.run_folder / "evaluation", "evaluation", settings, config.overwrite) as target:
        if not (target.complete and (target.folder / ACCEPTANCE).is_file()):
            _decode_all(config, head, questions, target.folder)
            results = _summarise(config, source, record, questions, target.folder)
            write_json(target.folder / ACCEPTANCE, results)
            target.finish()
        results = write_report(target.folder, config.training_folder)
        print_table(results)
        print(f"evaluation: {target.folder / ACCEPTANCE}, {target.folder / 'report.md'}")


def _heldout(config: Config) -> list[Question]:
    """Give held-out conversations of the run; none where the run has no conversations of its own (a foreign head)."""
    folder = config.conversations_folder
    if not config.evaluate.heldout_prompts or not (folder / "manifest.json").exists():
        return []
    return load_heldout(folder, read_manifest(folder, "conversations")["settings"], config.evaluate.heldout_prompts)


def _told_in_training(source: Path, ids: list[str], options: EvaluateConfig) -> dict[str, float | None]:
    """Give the acceptance length that training told of these conversations; None where it did not measure them.

    Greedy decoding is compared with the walk, which makes the same rounds, sampling with the estimate.
    """
    path = source / HELDOUT_WALKS
    walks = json.loads(path.read_text()).get(str(options.num_draft_tokens), {}) if path.is_file() else {}
    name, gained, of = (
        ("estimated_acceptance_length_t1", "expected", "rows")
        if options.temperature
        else ("walked_acceptance_length", "accepted", "rounds")
    )
    known = [walked for sample_id, walked in walks.items() if conversation_id(sample_id) in ids]
    number = sum(walked.get(of, 0) for walked in known)
    return {name: 1 + sum(walked[gained] for walked in known) / number if number else None}


def _decode_all(config: Config, head: DraftHead, questions: list[Question], folder: Path) -> None:
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


def _summarise(
    config: Config, source: Path, record: dict[str, Any], questions: list[Question], folder: Path
) -> dict[str, Any]:
    """Make acceptance.json of the records."""
    records = list(read_journal(folder / RECORDS))
    asked = [r for r in records if r["category"] != HELDOUT]
    heldout = [r for r in records if r["category"] == HELDOUT]
    options = config.evaluate
    num = options.num_draft_tokens
    names = list(asked[0]["answers"][0]["drafters"])
    categories = list(dict.fromkeys(question.category for question in questions if question.category != HELDOUT))
    alone = [answer for r in asked for answer in r["answers"]]
    drafted = [decoded for r in records for answer in r["answers"] for decoded in answer["drafters"].values()]
    lossless = {"decoded_answers": len(drafted), "equal_to_verifier": sum(d.get("equals_verifier", 0) for d in drafted)}
    return {
        **count(asked, TRAINED, num).as_dict(),
        "macro_acceptance_length": macro_acceptance_length(asked, TRAINED, num),
        "num_draft_tokens_per_round": num,
        "temperature": options.temperature,
        "drafting": "chain",
        "dtype": config.verifier.dtype.value,
        "questions": options.questions,
        "num_questions": len(asked),
        "max_tokens": options.max_tokens,
        "definition": "acceptance_length = 1 + num_accepted_tokens / num_drafts, bonus token included, over all rounds",
        "verifier": record["verifier"],
        "head": os.path.relpath(source, config.run_folder),
        **({"seed": options.seed} if options.temperature else {"lossless": lossless}),
        "verifier_alone_tokens_per_s": sum(a["output_tokens"] for a in alone) / sum(a["seconds_alone"] for a in alone),
        "by_category": {
            category: {
                name: count([r for r in asked if r["category"] == category], name, num).as_dict() for name in names
            }
            for category in categories
        },
        "baselines": {name: count(asked, name, num).as_dict() for name in names if name != TRAINED},
        "heldout": {
            "num_conversations": len(heldout),
            "decoded": count(heldout, TRAINED, num).as_dict() if heldout else None,
            **_told_in_training(source, [r["id"] for r in heldout], options),
        },
    }
