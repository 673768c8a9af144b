"""What an evaluation found: acceptance.json, made of the records of its questions.

A record is a line of questions.jsonl: {id, category, turns, answers}; of an answer {text, prompt_tokens, output_tokens,
seconds_alone, drafters}; of a drafter {drafted, accepted, output_tokens, seconds, equals_verifier}, the first two
lists over rounds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..conf.journal import read_journal
from ..conf.schema import Config, EvaluateConfig
from ..data_synthesis.split import conversation_id
from ..models.formats import HELDOUT_WALKS
from .metrics import count, macro_acceptance_length
from .questions import HELDOUT, Question

RECORDS = "questions.jsonl"
TRAINED, UNTRAINED, LOOKUP = "trained head", "untrained head", "prompt lookup"


def summarise(
    config: Config, source: Path, record: dict[str, Any], questions: list[Question], folder: Path
) -> dict[str, Any]:
    """Make acceptance.json of the records in `folder`."""
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
            **told_in_training(source, [r["id"] for r in heldout], options),
        },
    }


def told_in_training(source: Path, ids: list[str], options: EvaluateConfig) -> dict[str, float | None]:
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
