"""Questions to measure on: MT-Bench's form (category and turns), and held-out conversations of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conf.schema import EvaluateConfig
from ..data_synthesis.chat import Message, has_images
from ..data_synthesis.conversations import read_conversations
from ..data_synthesis.sequences import num_whole_answers
from ..data_synthesis.sources import load_rows
from ..data_synthesis.split import heldout_order, is_heldout
from ..models.embedded.corpus import questions as embedded_questions

HELDOUT = "heldout"


@dataclass(frozen=True)
class Question:
    """User turns to be answered in order, each on the answers before it.

    A held-out conversation brings its own answers, so that it is decoded on exactly the history that was walked.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    system: str | None = None
    answers: tuple[str, ...] | None = None
    max_tokens: int | None = None  # of an answer; None: evaluate.max_tokens

    def history(self, own_answers: list[str]) -> list[Message]:
        """Give the messages before the next answer, given the answers so far."""
        answers = own_answers if self.answers is None else list(self.answers[: len(own_answers)])
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": self.turns[len(own_answers)]}]


def load_questions(options: EvaluateConfig) -> list[Question]:
    """Load questions in MT-Bench's form: `category` and `turns` (`prompt`, a list, on some hubs), with an id.

    Raises:
        ValueError: the source cannot be read or a row has another form.
    """
    if options.questions is None:
        raise ValueError("evaluate.questions is required: a hub id, a JSONL file in MT-Bench's form, or embedded")
    if options.questions == "embedded":
        rows = embedded_questions()
    else:
        rows = list(load_rows(options.questions, options.questions_split))
    questions: list[Question] = []
    taken: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        turns = row.get("turns", row.get("prompt")) if isinstance(row, dict) else None
        turns = [turns] if isinstance(turns, str) else turns
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise ValueError(
                f"evaluate.questions {options.questions} row {number} has no turns: MT-Bench's form is required, "
                '{"question_id": ..., "category": ..., "turns": [first, second]}'
            )
        category = str(row.get("category", "all"))
        taken[category] = taken.get(category, 0) + 1
        if options.questions_per_category is None or taken[category] <= options.questions_per_category:
            name = row.get("question_id", row.get("prompt_id", number))
            questions.append(Question(f"{Path(options.questions).stem}/{name}", category, tuple(turns)))
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"evaluate.questions {options.questions}: two questions have the id {max(ids, key=ids.count)!r}"
        )
    if not questions:
        raise ValueError(f"evaluate.questions {options.questions} holds no question")
    return questions


def load_heldout(folder: Path, settings: dict[str, Any], limit: int) -> list[Question]:
    """Load held-out conversations, up to the last answer that the verifier ended by itself, as questions with answers.

    Those with images are left out, as they are in training.

    Args:
        folder: of the conversations.
        settings: the conversations' own.
        limit: how many; which ones depends on their ids alone.
    """
    records = [
        record
        for record in read_conversations(folder)
        if is_heldout(record["id"], settings["heldout_share"])
        and num_whole_answers(record["finish_reasons"])
        and not has_images(record["messages"])
    ]
    records.sort(key=lambda record: heldout_order(record["id"]))
    return [_with_answers(record, settings["synthesize"]["max_tokens"]) for record in records[:limit]]


def _with_answers(record: dict[str, Any], max_tokens: int) -> Question:
    said = {
        role: tuple(message["content"] for message in record["messages"] if message["role"] == role)
        for role in ("user", "assistant", "system")
    }
    whole = num_whole_answers(record["finish_reasons"])
    system = said["system"][0] if said["system"] else None
    return Question(record["id"], HELDOUT, said["user"][:whole], system, said["assistant"][:whole], max_tokens)
