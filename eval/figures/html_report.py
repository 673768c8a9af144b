"""report.html: an evaluation as one page, every token coloured by how it came about; it loads nothing.

A round is an element `b`: an `i` for each draft token that was accepted, then what the verifier chose itself, a `u`
where it refused the next draft (`data-r`), an `s` (the bonus token) where it accepted all. The first token, `em`,
precedes all rounds. Elements of one letter and no classes keep a page of 150,000 tokens below 2.5 MB.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, Template

from ...data_synthesis.prompts.rows import text_of
from ...data_synthesis.show import printable
from .metrics import count
from .plots import Plot
from .records import TRAINED, Part, Record

_WORST = 12  # stretches of rounds in each category
_BEFORE = 90  # characters of an answer before such a stretch
_SHOWN_CHARS = 2000  # of each end of a long question
_NO_TEXT = "\u25ab"  # shown for a token that adds no text of its own


class Round(NamedTuple):
    """The tokens that a round added to an answer; those after the answer's end are not in it."""

    drafts: list[str]
    own: str | None  # the verifier's own token; None if the answer had ended before it
    is_bonus: bool
    accepted: int
    refused: str | None  # the draft in place of the verifier's own token; None if it is not known

    @property
    def text(self) -> str:
        """Return the text of the round."""
        return "".join(self.drafts) + (self.own or "")


class Stretch(NamedTuple):
    """Rounds in a row that accepted equally many drafts."""

    question: int  # the place of its question in the page
    category: str
    before: str
    rounds: list[Round]


def write_html(
    path: Path, results: dict[str, Any], records: list[Record], parts: list[Part], plots: list[Plot]
) -> None:
    """Write the page of an evaluation; answers that a server counted, or without the texts of their tokens, are plain.

    Args:
        parts: of the report: its title, its conditions, tables and lines.
    """
    title, conditions, *tables = parts
    depth = len(results["acceptance_rate_per_pos"])
    questions = [_question(number, record, results, depth) for number, record in enumerate(records)]
    stretches = [stretch for question in questions for stretch in _stretches(question)]
    stretches.sort(key=lambda stretch: (stretch.rounds[0].accepted, -len(stretch.rounds)))
    rank, worst = Counter[str](), []
    for stretch in stretches:
        rank[stretch.category] += 1
        worst += [stretch] if rank[stretch.category] <= _WORST else []
    page = _template().render(
        title=title,
        conditions=conditions,
        tables=tables,
        plots=plots,
        depth=depth,
        came=_how_tokens_came(questions, depth),
        questions=sorted(questions, key=lambda question: question["length"]),
        categories=list(results["by_category"]),
        worst=worst,
        refused=any(one.refused is not None for stretch in worst for one in stretch.rounds),
        served=results["engine"] if "model" in results else None,
        plain=[answer["rounds"] is None for question in questions for answer in question["answers"]],
    )
    path.write_text(page, encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = lambda text: printable(text).replace("\n", "\u21b5\n") or _NO_TEXT
    environment.filters["printable"] = printable
    return environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def _question(number: int, record: Record, results: dict[str, Any], depth: int) -> dict[str, Any]:
    answers = [
        {
            "turn": _shortened(text_of(turn)),
            "text": answer["text"],
            "rounds": _rounds(answer["drafters"][TRAINED], results),
        }
        | {"first": next(iter(answer["drafters"][TRAINED].get("token_texts", [])), "")}
        | {"length": count([{**record, "answers": [answer]}], TRAINED, depth).acceptance_length}
        for turn, answer in zip(record["turns"], record["answers"], strict=False)
    ]
    counts = count([record], TRAINED, depth)
    about = {name: record.get(name, "") for name in ("id", "category", "left_out")}
    about["images"] = len(record.get("images", []))
    return {"number": number, **about, "answers": answers, "length": counts.acceptance_length}


def _shortened(text: str) -> str:
    """Return a text without its middle, if it is long: documents before a question."""
    beyond = len(text) - 2 * _SHOWN_CHARS
    return text if beyond <= 0 else f"{text[:_SHOWN_CHARS]}\n[{beyond} characters]\n{text[-_SHOWN_CHARS:]}"


def _rounds(drafter: dict[str, Any], results: dict[str, Any]) -> list[Round] | None:
    """Return the rounds of an answer; None if its tokens are not known."""
    if "token_texts" not in drafter:
        return None
    texts, place, rounds = drafter["token_texts"], 1, []
    all_refused = drafter.get("refused_texts") or [None] * len(drafter["accepted"])
    for drafted, accepted, refused in zip(drafter["drafted"], drafter["accepted"], all_refused, strict=True):
        new = texts[place : place + accepted + 1]
        own = new[accepted] if len(new) > accepted else None
        rounds.append(Round(new[:accepted], own, accepted == results.get("tree_depth", drafted), accepted, refused))
        place += len(new)
    return rounds


def _stretches(question: dict[str, Any]) -> Iterator[Stretch]:
    """Yield the rounds of a question's answers, those that follow each other with as many drafts accepted together."""
    for answer in question["answers"]:
        text = answer["first"]
        for _, alike in groupby(answer["rounds"] or [], lambda one: one.accepted):
            rounds = list(alike)
            yield Stretch(question["number"], question["category"], text[-_BEFORE:], rounds)
            text += "".join(one.text for one in rounds)


def _how_tokens_came(questions: list[dict[str, Any]], depth: int) -> dict[str, int]:
    """Return how many tokens came in each of the ways that the page has a colour for."""
    came = Counter[str]()
    for answer in (answer for question in questions for answer in question["answers"] if answer["rounds"] is not None):
        came["first"] += 1
        for one in answer["rounds"]:
            came.update(f"d{position}" for position in range(1, len(one.drafts) + 1))
            came["bonus" if one.is_bonus else "refused"] += one.own is not None
    return {name: came[name] for name in ("first", *(f"d{n + 1}" for n in range(depth)), "refused", "bonus")}
