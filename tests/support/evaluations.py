"""Evaluations as they lie on disk, of questions that were never decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fledge.conf.runtime.artifact import artifact, write_json
from fledge.conf.runtime.journal import Journal
from fledge.conf.schema import Config, Dtype, EvaluateConfig, VerifierConfig
from fledge.eval.figures.records import ACCEPTANCE, RECORDS, TRAINED
from fledge.eval.figures.results import summarise
from fledge.eval.questions.question import Question

VERIFIER = {"fingerprint": "f1", "chat_template": "t1"}


def question_record(
    *rounds: list[int],
    name: str = "q/1",
    category: str = "math",
    drafted: int = 3,
    images: int = 0,
    server: bool = False,
) -> dict[str, Any]:
    """A line of questions.jsonl: a question whose answers accepted so many tokens, round by round.

    Args:
        server: as it is counted there: sums, and no answer of the verifier alone.
    """
    answers = []
    for accepted in rounds:
        tokens = sum(accepted) + len(accepted) + 1
        by_position = [sum(taken > position for taken in accepted) for position in range(drafted)]
        counted: dict[str, Any] = {"drafted": [drafted] * len(accepted), "accepted": accepted, "equals_verifier": True}
        if server:
            counted = {
                "num_drafts": len(accepted),
                "num_draft_tokens": drafted * len(accepted),
                "num_accepted_tokens": sum(accepted),
                "num_accepted_tokens_per_pos": by_position,
            }
        answers.append(
            {
                "text": "...",
                "prompt_tokens": 5,
                "output_tokens": tokens,
                "seconds_alone": None if server else tokens / 10,
                "drafters": {TRAINED: {**counted, "output_tokens": tokens, "seconds": (len(accepted) + 1) / 8}},
            }
        )
    turns = [f"{name} {turn}?" for turn in range(len(rounds))]
    about = {"images": [f"{n}.png" for n in range(images)]} if images else {}
    return {"id": name, "category": category, "turns": turns, **about, "answers": answers}


def evaluation(
    run: Path, records: list[dict[str, Any]], finished: bool = True, dtype: Dtype = Dtype.bfloat16, **options: Any
) -> dict[str, Any]:
    """Write the evaluation of a run with these records; give its acceptance.json."""
    config = Config(
        name=run.name,
        runs_dir=str(run.parent),
        verifier=VerifierConfig(path="v", dtype=dtype),
        evaluate=EvaluateConfig(**{"questions": "q.jsonl", **options}),
    )
    questions = [Question(record["id"], record["category"], tuple(record["turns"])) for record in records]
    with artifact(run / "evaluation", "evaluation", {"run": run.name}) as target:
        journal = Journal(target.folder / RECORDS)
        journal.append(records)
        journal.close()
        head = run / "training" / "checkpoints" / "step-1"
        results = summarise(config, head, VERIFIER, questions, target.folder)
        write_json(target.folder / ACCEPTANCE, results)
        if finished:
            target.finish()
    return json.loads(json.dumps(results))
