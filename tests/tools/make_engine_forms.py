"""Write the tables of form by engine into the documentation: `python tests/tools/make_engine_forms.py`; a test
compares the two."""

import re
from collections.abc import Callable
from pathlib import Path

from fledge.models.formats.engine_forms import ENGINES, FORMS, Kind, Verdict
from fledge.models.head.config import DraftHeadConfig

_ROOT = Path(__file__).parents[2]
_WINDOWED = DraftHeadConfig(1, 1, 1, 1, 1, 1, 1, 1, (), 1, sliding_window=2048, window_layers=(0,))

_PUBLISHED = {  # by column of README.md, the rows it joins
    "EAGLE-3.1": ("`fc_norm` (EAGLE-3.1)", "`norm_output` (EAGLE-3.1)"),
    "`norm_before_residual`": ("`norm_before_residual`",),
    "`norm_before_fc`": ("`norm_before_fc`",),
    "several layers": ("several layers",),
    "window": ("`sliding_window` in every layer",),
    "q/k norms": ("`qk_norm`",),
}


def _cell(verdict: Verdict) -> str:
    if verdict.kind is Kind.flag:
        flag, *value = verdict.flag(_WINDOWED).split()
        return f"`{' '.join([flag, *(word for word in value if not word.isdigit())])}`"
    return {Kind.served: "yes", Kind.ignored: "ignored: lost"}.get(verdict.kind, verdict.kind.value)


def by_form() -> str:
    """Return the table of docs/guide/export.md: a row a form."""
    head = ["form of head", *(f"{engine} {release}" for engine, release in ENGINES.items())]
    rows = [head, ["---"] * len(head), *([form.name, *map(_cell, form.verdicts)] for form in FORMS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def by_engine() -> str:
    """Return the table of README.md: a row an engine, of the forms that published heads have."""
    rows = [["engine", "EAGLE-3", *_PUBLISHED], ["---"] * (2 + len(_PUBLISHED))]
    for column, (engine, release) in enumerate(list(ENGINES.items())[:-1]):  # llama.cpp needs its own converter
        cells = []
        for names in _PUBLISHED.values():
            kinds = {form.verdicts[column].kind for form in FORMS if form.name in names}
            cells.append("yes" if kinds == {Kind.served} else "by a flag" if kinds == {Kind.flag} else "no")
        rows.append([f"{engine} {release}", "yes", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TABLES: dict[Path, Callable[[], str]] = {
    _ROOT / "docs" / "guide" / "export.md": by_form,
    _ROOT / "README.md": by_engine,
}


def text(page: Path) -> str:
    """Return a page with its table, which is known by its first cell, as the rows are now."""
    table = TABLES[page]()
    begin = re.escape(f"|{table.split('|')[1]}|")
    found, count = re.subn(rf"^{begin}.*?(?=\n\n)", lambda _: table, page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert count == 1, f"{page} needs one place for its table"
    return found


if __name__ == "__main__":
    for page in TABLES:
        page.write_text(text(page))
