"""Write the tables of form by engine into the documentation: `python tests/tools/make_engine_forms.py`; a test
compares the two."""

import re
from collections.abc import Callable
from pathlib import Path

from fledge.models.formats.engine_forms import ENGINES, FORMS, Kind, Verdict
from fledge.models.head.config import DraftHeadConfig

_ROOT = Path(__file__).parents[2]
_MARKS = "<!-- written by tests/tools/make_engine_forms.py -->", "<!-- end -->"
_WINDOWED = DraftHeadConfig(1, 1, 1, 1, 1, 1, 1, 1, (), 1, sliding_window=2048, window_layers=(0,))


def _cell(verdict: Verdict) -> str:
    if verdict.kind is Kind.flag:
        return f"`{verdict.flag(_WINDOWED).split()[0]}`"
    return {Kind.served: "yes", Kind.ignored: "ignored: lost"}.get(verdict.kind, verdict.kind.value)


def by_form() -> str:
    """Return the table of docs/guide/export.md: a row a form."""
    head = ["head", *(f"{engine} {release}" for engine, release in ENGINES.items())]
    rows = [head, ["---"] * len(head), *([form.name, *map(_cell, form.verdicts)] for form in FORMS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_engine() -> str:
    """Return the table of README.md: a row an engine."""
    rows = [["engine", "read", "serves otherwise than trained, or not", "needs a flag"], ["---"] * 4]
    for column, (engine, release) in enumerate(ENGINES.items()):
        lost, flagged = (
            "; ".join(form.name for form in FORMS if form.verdicts[column].kind in kinds)
            for kinds in ((Kind.ignored, Kind.refused), (Kind.flag,))
        )
        rows.append([engine, release, lost, flagged])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES: dict[Path, Callable[[], str]] = {
    _ROOT / "docs" / "guide" / "export.md": by_form,
    _ROOT / "README.md": by_engine,
}


def text(page: Path) -> str:
    """Return a page with its table as the rows are now."""
    begin, end = _MARKS
    block = f"{begin}\n\n{TABLES[page]()}\n\n{end}"
    found, count = re.subn(f"{begin}.*?{end}", lambda _: block, page.read_text(), flags=re.DOTALL)
    assert count == 1, f"{page} needs one place for its table"
    return found


if __name__ == "__main__":
    for page in TABLES:
        page.write_text(text(page))
