"""Write the tables of form by engine into the documentation: `python tests/tools/make_engine_forms.py`; a test
compares the two."""

import re
from collections.abc import Callable
from pathlib import Path

from fledge.models.formats.engine_forms import ENGINES, FORMS, VLLM, Kind, Verdict
from fledge.models.head.config import DraftHeadConfig

_ROOT = Path(__file__).parents[2]
_LINK = "[serving engine](docs/guide/export.md#which-head-which-engine-serves)"
_WINDOWED = DraftHeadConfig(1, 1, 1, 1, 1, 1, 1, 1, (), 1, sliding_window=2048, window_layers=(0,))


def _cell(verdict: Verdict) -> str:
    if verdict.kind is Kind.flag:
        return f"`{verdict.flag(_WINDOWED).split()[0]}`"
    return {Kind.served: "yes", Kind.ignored: "ignored: lost"}.get(verdict.kind, verdict.kind.value)


def by_form() -> str:
    """Return the table of docs/guide/export.md: a row a form."""
    head = ["form of head", *(f"{engine} {release}" for engine, release in ENGINES.items())]
    rows = [head, ["---"] * len(head), *([form.name, *map(_cell, form.verdicts)] for form in FORMS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_engine() -> str:
    """Return the table of README.md: a row an engine."""
    rows = [[_LINK, "release", "serves otherwise than trained, or not", "needs a flag"], ["---"] * 4]
    for column, (engine, release) in enumerate(list(ENGINES.items())[:3]):  # those that fledge exports for
        lost, flagged = (
            "; ".join(form.name for form in FORMS if form.verdicts[column].kind in kinds)
            for kinds in ((Kind.ignored, Kind.refused), (Kind.flag,))
        )
        rows.append([engine, f"{release}, {'run' if engine == VLLM else 'read'}", lost, flagged])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES: dict[Path, Callable[[], str]] = {
    _ROOT / "docs" / "guide" / "export.md": by_form,
    _ROOT / "README.md": by_engine,
}


def text(page: Path) -> str:
    """Return a page with its table, known by the first words of its head, as the rows are now."""
    table = TABLES[page]()
    begin = re.escape(table[: table.index("|", 2)])
    found, count = re.subn(rf"^{begin}.*?(?=\n\n)", lambda _: table, page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert count == 1, f"{page} needs one table that begins with {table[: table.index('|', 2)]}"
    return found


if __name__ == "__main__":
    for page in TABLES:
        page.write_text(text(page))
