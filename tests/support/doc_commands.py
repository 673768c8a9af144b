"""The commands in README and docs: a test runs each, or a comment at it says what it needs.

A block of code without a language is commands; what they print stands in blocks of `text`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_NEEDS = re.compile(r"\bneeds (GPUs|a cluster|the hub|W&B)\b")


@dataclass(frozen=True)
class DocCommand:
    """A command as a reader types it."""

    page: str
    text: str  # in one line, without its comment
    needs: str  # "": nothing that a test has not


def code_lines(page: Path, language: str = r"\w*") -> list[list[str]]:
    """Return the lines of a page's blocks of code; a line that is continued is one."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    found = [body for name, body in blocks if re.fullmatch(language, name)]
    return [body.replace("\\\n", " ").splitlines() for body in found]


def doc_commands() -> list[DocCommand]:
    """Return all commands. A comment on a line of its own is about the lines that follow it in the block."""
    found = []
    for page in PAGES:
        for lines in code_lines(page, ""):
            needs = ""
            for line in lines:
                text, _, comment = line.partition("#")
                said = _NEEDS.search(comment)
                if text.strip():
                    name = str(page.relative_to(ROOT))
                    found.append(DocCommand(name, " ".join(text.split()), said[1] if said else needs))
                elif comment:
                    needs = said[1] if said else ""
    return found
