"""The file of regenerated conversations: `{id, source, messages, finish_reasons, usage}` a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..conf.artifact import digest
from ..conf.journal import Journal, read_journal
from .chat import check_messages

FILE = "conversations.jsonl"


def _check(record: dict[str, Any]) -> str | None:
    if not isinstance(record.get("finish_reasons"), list) or not isinstance(record.get("usage"), dict):
        return "finish_reasons must be a list and usage an object"
    return check_messages(record.get("messages"))


def open_conversations(folder: Path) -> Journal:
    """Open the conversations of a folder for appending."""
    return Journal(folder / FILE, _check)


def content_digest(folder: Path) -> str:
    """Hash what a folder's conversations say, whatever the order of lines (that of completion); "" where none are."""
    if not (folder / FILE).is_file():
        return ""
    with open(folder / FILE, "rb") as file:
        return digest(sorted(hashlib.sha256(line).hexdigest() for line in file))


def read_conversations(folder: Path) -> Iterator[dict[str, Any]]:
    """Read finished conversations.

    Raises:
        ValueError: a line is malformed, named by file and number.
    """
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder / FILE} is missing: run `fledge synthesize` again")
    return read_journal(folder / FILE, _check)
