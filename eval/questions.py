"""Questions to measure on: benchmarks in the forms they are published in, and held-out conversations.

| a row has            | is                                        | category        | said before it                |
|----------------------|-------------------------------------------|-----------------|-------------------------------|
| `turns`              | MT-Bench: FastChat's question.jsonl and   | `category`, or  |                               |
|                      | philschmid/mt-bench; a file of one's own  | all             |                               |
| `task_id`, `prompt`  | openai/openai_humaneval                   | humaneval       | Complete the code I provided. |
| `prompt`             | HuggingFaceH4/mt_bench_prompts (a list)   | `category`, all |                               |
| `question`, `answer` | openai/gsm8k                              | gsm8k           |                               |
| `article`            | abisee/cnn_dailymail                      | cnn_dailymail   | Summarize:                    |

What is said before HumanEval is what EAGLE's question files say, before an article what Spec-Bench says; EAGLE and
SpecForge ask GSM8K as it stands. A turn is a text or a list of text parts. A row may have `images`, shown before its
first turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..conf.runtime.artifact import digest, file_digest
from ..conf.runtime.journal import json_line
from ..conf.schema import EvaluateConfig, SourceConfig
from ..data_synthesis.conversations import read_conversations
from ..data_synthesis.heldout import heldout_order, is_heldout
from ..data_synthesis.prompts.addresses import check_foreign, scheme_of
from ..data_synthesis.prompts.rows import SYSTEM_FIELDS, Content, are_text_parts, check_beside, content_of, text_of
from ..data_synthesis.prompts.sources import EMBEDDED, read_rows
from ..data_synthesis.tokens.chat_template import Message, has_images
from ..data_synthesis.tokens.sequences import num_whole_answers
from ..models.embedded.verifier import questions as embedded_questions
from .figures.records import HELDOUT


class _Form(NamedTuple):
    fields: tuple[str, ...]  # that a row of the form has, the question in the last
    category: str  # of a row that names none
    before: str = ""  # said before the question


_FORMS = (  # the first whose fields a row has
    _Form(("turns",), "all"),
    _Form(("task_id", "prompt"), "humaneval", "Complete the code I provided.\n"),
    _Form(("prompt",), "all"),
    _Form(("answer", "question"), "gsm8k"),
    _Form(("article",), "cnn_dailymail", "Summarize: "),
)
_IDS = ("question_id", "prompt_id", "task_id", "id")
_REQUIRED = (
    '{"question_id": ..., "category": ..., "turns": [first, second]} (MT-Bench), {"prompt": ...}, '
    '{"task_id": ..., "prompt": ...} (HumanEval), {"question": ..., "answer": ...} (GSM8K) or {"article": ...} '
    "(CNN/DailyMail) is required"
)


@dataclass(frozen=True)
class Question:
    """User turns to be answered in order, each on the answers before it.

    A held-out conversation brings its own answers, so that it is decoded on exactly the history that was walked.
    """

    id: str
    category: str
    turns: tuple[Content, ...]
    system: str | None = None
    answers: tuple[str, ...] | None = None
    max_tokens: int | None = None  # of an answer; None: evaluate.max_tokens
    images: tuple[str, ...] = ()  # paths or URLs, shown before the first turn
    problem: str = ""  # why it cannot be asked, where that is known from its row

    def history(self, own_answers: list[str]) -> list[Message]:
        """Give the messages before the next answer, given the answers so far; content parts where there are images."""
        answers = own_answers if self.answers is None else list(self.answers[: len(own_answers)])
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": self.turns[len(own_answers)]})
        if self.images:
            first = next(message for message in messages if message["role"] == "user")
            shown = [{"type": "image_url", "image_url": {"url": address}} for address in self.images]
            said = first["content"]
            first["content"] = [*shown, *([{"type": "text", "text": said}] if isinstance(said, str) else said)]
        return messages

    def record(self, answers: list[dict[str, Any]], left_out: str = "") -> dict[str, Any]:
        """Give the line of questions.jsonl, whose form eval/figures/results.py tells.

        Args:
            left_out: why there is no further answer.
        """
        images = {"images": len(self.images)} if self.images else {}
        told = {"turns": list(self.turns), **images, "answers": answers, **({"left_out": left_out} if left_out else {})}
        return {"id": self.id, "category": self.category, **told}


def questions_identity(questions: list[Question]) -> str:
    """Name what is asked: the questions as they are and the content of the images that are on this machine."""
    return digest(
        [
            [q.id, q.category, q.turns, q.answers]
            + ([[a if scheme_of(a) else file_digest(Path(a)) for a in q.images]] if q.images else [])
            for q in questions
        ]
    )


def load_questions(options: EvaluateConfig, local_images: bool = False) -> list[Question]:
    """Load questions in any of the forms above; one that is not valid UTF-8 comes with that as its problem.

    Args:
        local_images: questions of the hub may name files here as their images.

    Raises:
        ValueError: the source cannot be read, or a row has another form: which row, which field.
    """
    if options.questions is None:
        raise ValueError(
            "evaluate.questions is required: a hub id such as HuggingFaceH4/mt_bench_prompts, a JSONL file in one of "
            "the forms of eval/questions.py, or embedded"
        )
    questions: list[Question] = []
    taken: dict[str, int] = {}
    for number, (place, row) in enumerate(_rows(options), 1):
        try:
            question = _question(row, options.questions, number, local_images)
        except ValueError as error:
            raise ValueError(f"evaluate.questions: {place} {error}") from None
        question = _encodable(question, place)
        taken[question.category] = taken.get(question.category, 0) + 1
        if options.questions_per_category is None or taken[question.category] <= options.questions_per_category:
            questions.append(question)
    ids = [question.id for question in questions]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"evaluate.questions {options.questions}: two questions have the id {max(ids, key=ids.count)!r}"
        )
    if not questions:
        raise ValueError(f"evaluate.questions {options.questions} holds no question")
    return questions


def _encodable(question: Question, place: str) -> Question:
    """Give a question whose texts can be written; JSON can spell half a character, which nobody can be asked."""
    try:
        json_line(question.record([]))
    except UnicodeEncodeError as error:
        texts = (question.id, question.category, *map(text_of, question.turns))
        name, category, *turns = (text.encode(errors="backslashreplace").decode() for text in texts)
        problem = f"{place} is not valid UTF-8: {error}"
        return replace(question, id=name, category=category, turns=tuple(turns), problem=problem)
    return question


def _rows(options: EvaluateConfig) -> Iterator[tuple[str, Any]]:
    path = str(options.questions)
    if path == EMBEDDED:
        yield from ((f"{EMBEDDED} row {number}", row) for number, row in enumerate(embedded_questions(), 1))
        return
    if options.questions_subset and Path(path).is_file():
        raise ValueError(f"evaluate.questions_subset must be null for a file, got {options.questions_subset}")
    source = SourceConfig(path=path, subset=options.questions_subset, split=options.questions_split)
    try:
        yield from read_rows(source, whole=True)
    except ValueError as error:
        raise ValueError(f"evaluate.questions: {error}") from None


def _question(row: Any, path: str, number: int, local_images: bool) -> Question:
    """Read a row.

    Raises:
        ValueError: what is wrong with it, to be put after its place.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {type(row).__name__}: {_REQUIRED}")
    given = {name: value for name, value in row.items() if value is not None}  # Parquet fills what is not there
    form = next((form for form in _FORMS if all(name in given for name in form.fields)), None)
    if form is None:
        raise ValueError(f"has the fields {', '.join(given) or '(none)'}: {_REQUIRED}")
    field = form.fields[-1]
    value = given[field]
    turns = [form.before + value] if isinstance(value, str) and value.strip() else value
    turns = [value] if are_text_parts(value) else turns
    if not isinstance(turns, list) or not turns or not all(map(_asks, turns)):
        raise ValueError(f"has {field} {str(value)[:40]!r}: a text or a list of texts is required, none of them empty")
    turns = [content_of(turn, f"turn {n}") for n, turn in enumerate(turns, 1)]
    category = given.get("category", form.category)
    if not isinstance(category, str) or category == HELDOUT:
        raise ValueError(f"has category {category!r}: a text is required, and not {HELDOUT}")
    check_beside(given, [text_of(turn) for turn in turns], read=("images",))
    if system := next((name for name in SYSTEM_FIELDS if str(given.get(name, "")).strip()), None):
        raise ValueError(f"has a system message (in {system!r}), which is not asked: write it into the first turn")
    name = next((given[name] for name in _IDS if name in given), number)
    images = _images(given.get("images", []), path, local_images)
    return Question(f"{Path(path).stem}/{name}", category, tuple(turns), images=images)


def _asks(turn: Any) -> bool:
    return (isinstance(turn, str) or are_text_parts(turn)) and bool(text_of(turn).strip())


def _images(value: Any, path: str, local: bool) -> tuple[str, ...]:
    """Give the addresses of a row's images: URLs, or paths relative to the file or folder of the questions."""
    if not isinstance(value, list) or not all(isinstance(address, str) and address for address in value):
        raise ValueError(f"has images {str(value)[:40]!r}: a list of paths or URLs is required")
    for address in [] if local or Path(path).exists() else value:
        check_foreign(address)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    addresses = [address if scheme_of(address) else str(folder / address) for address in value]
    gone = [address for address in addresses if not scheme_of(address) and not Path(address).is_file()]
    if gone:
        raise ValueError(f"has images of which {gone[0]} is not there: paths are relative to the file of the questions")
    return tuple(addresses)


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
