"""Questions to measure on: benchmarks in the forms they are published in, and held-out conversations.

A turn is a text or a list of text parts. A row may have `images`, shown before its first turn.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ...conf.runtime.artifact import digest, file_digest
from ...conf.runtime.journal import json_line
from ...conf.schema import EvaluateConfig, SourceConfig
from ...data_synthesis.conversations import read_conversations
from ...data_synthesis.heldout import heldout_order, is_heldout
from ...data_synthesis.prompts.addresses import check_foreign, scheme_of
from ...data_synthesis.prompts.rows import SYSTEM_FIELDS, Content, are_text_parts, check_beside, content_of, text_of
from ...data_synthesis.prompts.sources import EMBEDDED, read_rows
from ...data_synthesis.tokens.chat_template import Message, has_images
from ...data_synthesis.tokens.sequences import num_whole_answers
from ...models.embedded.verifier import questions as embedded_questions
from ..figures.records import HELDOUT


class _Form(NamedTuple):
    fields: tuple[str, ...]  # that a row of the form has, the question in the last
    category: str  # of a row that names none
    before: str = ""  # put before the question


_FORMS = (  # the first whose fields a row has
    _Form(("turns",), "all"),  # FastChat's question.jsonl, philschmid/mt-bench; a file of one's own
    _Form(("task_id", "prompt"), "humaneval", "Complete the code I provided.\n"),  # as in EAGLE's question files
    _Form(("prompt",), "all"),  # a list in HuggingFaceH4/mt_bench_prompts
    _Form(("answer", "question"), "gsm8k"),  # as EAGLE and SpecForge ask it
    _Form(("article",), "cnn_dailymail", "Summarize: "),  # as in Spec-Bench
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

    A held-out conversation brings its own answers, so that it is decoded on exactly the history of training.
    """

    id: str
    category: str
    turns: tuple[Content, ...]
    system: str | None = None
    answers: tuple[str, ...] | None = None
    max_tokens: int | None = None  # of an answer; None: evaluate.max_tokens
    images: tuple[str, ...] = ()  # paths or URLs, shown before the first turn
    problem: str = ""  # why it cannot be asked, if its row says so

    def history(self, own_answers: list[str]) -> list[Message]:
        """Return the messages before the next answer, after the answers so far; content parts if there are images."""
        answers = own_answers if self.answers is None else list(self.answers[: len(own_answers)])
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn, answer in zip(self.turns, answers, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        messages.append({"role": "user", "content": self.turns[len(own_answers)]})
        if self.images:
            first = next(message for message in messages if message["role"] == "user")
            shown = [{"type": "image_url", "image_url": {"url": address}} for address in self.images]
            parts = first["content"]
            first["content"] = [*shown, *([{"type": "text", "text": parts}] if isinstance(parts, str) else parts)]
        return messages

    def record(self, answers: list[dict[str, Any]], left_out: str = "") -> dict[str, Any]:
        """Return the line of questions.jsonl (eval/figures/records.py); `left_out`: why there is no further answer."""
        question = {"id": self.id, "category": self.category, "turns": list(self.turns)}
        images = {"images": self.image_digests} if self.images else {}
        return {**question, **images, "answers": answers, **({"left_out": left_out} if left_out else {})}

    @cached_property
    def image_digests(self) -> list[str]:
        """Return what tells the images apart: the content of those on this machine, the addresses of others."""
        here = {address for address in self.images if not scheme_of(address) and Path(address).is_file()}
        return [file_digest(Path(address)) if address in here else address for address in self.images]


def questions_identity(questions: list[Question]) -> str:
    """Return a digest of the questions and of the content of their images that are on this machine."""
    return digest([[q.id, q.category, q.turns, q.answers, *([q.image_digests] if q.images else [])] for q in questions])


def load_questions(options: EvaluateConfig, local_images: bool = False) -> list[Question]:
    """Read questions in any of the forms above; one that is not valid UTF-8 comes with that as its problem.

    With `local_images` questions of the hub may name files here as their images. ValueError: the source cannot be read,
    or a row has another form: which row, which field.
    """
    if options.questions is None:
        raise ValueError(
            "evaluate.questions is required: a hub id such as HuggingFaceH4/mt_bench_prompts, a JSONL file in one of "
            "the forms of eval/questions/question.py, or embedded"
        )
    questions: list[Question] = []
    per_category: Counter[str] = Counter()
    for number, (place, row) in enumerate(_rows(options), 1):
        try:
            question = _encodable(_question(row, options.questions, number, local_images), place)
        except ValueError as error:
            raise ValueError(f"evaluate.questions: {place} {error}") from None
        per_category[question.category] += 1
        if options.questions_per_category is None or per_category[question.category] <= options.questions_per_category:
            questions.append(question)
    for name, number in Counter(question.id for question in questions).most_common(1):
        if number > 1:
            raise ValueError(f"evaluate.questions {options.questions}: two questions have the id {name!r}")
    if not questions:
        raise ValueError(f"evaluate.questions {options.questions} holds no question")
    return questions


def _encodable(question: Question, place: str) -> Question:
    """Return a question whose texts can be written; JSON can spell half a character, which nobody can be asked."""
    try:
        json_line(replace(question, images=()).record([]))  # whose files are not read for that
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
    """Read a row, or raise what is wrong with it as a ValueError, to be put after its place."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {type(row).__name__}: {_REQUIRED}")
    row = {name: value for name, value in row.items() if value is not None}  # Parquet fills what is not there
    form = next((form for form in _FORMS if all(name in row for name in form.fields)), None)
    if form is None:
        raise ValueError(f"has the fields {', '.join(row) or '(none)'}: {_REQUIRED}")
    field = form.fields[-1]
    value = row[field]
    turns = [form.before + value] if isinstance(value, str) and value.strip() else value
    turns = [value] if are_text_parts(value) else turns
    if not isinstance(turns, list) or not turns or not all(map(_asks, turns)):
        raise ValueError(f"has {field} {str(value)[:40]!r}: a text or a list of texts is required, none of them empty")
    turns = [content_of(turn, f"turn {n}") for n, turn in enumerate(turns, 1)]
    category = row.get("category", form.category)
    if not isinstance(category, str) or category == HELDOUT:
        raise ValueError(f"has category {category!r}: a text is required, and not {HELDOUT}")
    check_beside(row, [text_of(turn) for turn in turns], read=("images",))
    if system := next((name for name in SYSTEM_FIELDS if str(row.get(name, "")).strip()), None):
        raise ValueError(f"has a system message (in {system!r}), which is not asked: write it into the first turn")
    name = next((row[name] for name in _IDS if name in row), number)
    images = _images(row.get("images", []), path, local_images)
    return Question(f"{Path(path).stem}/{name}", category, tuple(turns), images=images)


def _asks(turn: Any) -> bool:
    return (isinstance(turn, str) or are_text_parts(turn)) and bool(text_of(turn).strip())


def _images(value: Any, path: str, local: bool) -> tuple[str, ...]:
    """Return the addresses of a row's images: URLs, or paths relative to the file or folder of the questions."""
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
    """Read held-out conversations, up to the last answer that the verifier ended by itself, as questions with answers.

    Those with images are left out, as they are in training. Which ones are in the `limit` depends on their ids alone.
    `settings` are the conversations' own.
    """
    questions = []
    for record in read_conversations(folder):
        number = num_whole_answers(record["finish_reasons"])
        if number and is_heldout(record["id"], settings["heldout_share"]) and not has_images(record["messages"]):
            contents: dict[str, list[str]] = defaultdict(list)
            for message in record["messages"]:
                contents[message["role"]].append(message["content"])
            turns, answers = (tuple(contents[role][:number]) for role in ("user", "assistant"))
            system, max_tokens = next(iter(contents["system"]), None), settings["synthesize"]["max_tokens"]
            questions.append(Question(record["id"], HELDOUT, turns, system, answers, max_tokens))
    return sorted(questions, key=lambda question: heldout_order(question.id))[:limit]
