"""Conversations in a file, `{id, source, messages, finish_reasons, …}` a line."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..conf.runtime.journal import read_journal, read_journal_lines, read_line
from .tokens.chat_template import check_messages

FILE = "conversations.jsonl"


def check_record(record: dict[str, Any]) -> str | None:
    """Return what is wrong with a conversation, or None."""
    if not isinstance(record.get("finish_reasons"), list) or not isinstance(record.get("usage"), dict):
        return "finish_reasons must be a list and usage an object"
    return check_messages(record.get("messages"))


def part_folder(folder: Path, shard: int, num_shards: int) -> Path:
    """Return the folder in which one task of a job array writes."""
    return folder / f"part-{shard:05d}-of-{num_shards:05d}"


def _files(folder: Path) -> list[Path]:
    return [part / FILE for part in sorted(folder.glob("part-*-of-*")) or [folder]]


def _existing_files(folder: Path, unfinished: bool = False) -> Iterator[Path]:
    for file in _files(folder):
        if file.is_file():
            yield file
        elif not unfinished:
            raise ValueError(f"{file} is missing: run `fledge synthesize` again")


def content_digest(folder: Path) -> str:
    """Hash what a folder's conversations say, whatever the order of lines (that of completion); "" without any."""
    files = _files(folder)
    if not all(file.is_file() for file in files):
        return ""
    return add_digests(hashlib.sha256(line).hexdigest() for path in files for line in open(path, "rb"))


def add_digests(digests: Iterable[str]) -> str:
    """Return one digest of many, whatever their order and grouping: their sum takes no memory."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**256:064x}"


def read_conversations(folder: Path, unfinished: bool = False) -> Iterator[dict[str, Any]]:
    """Read the conversations of all parts; of a folder that is `unfinished`, those that are there.

    Raises ValueError if a line (named by file and number) is malformed, or a file is missing.
    """
    for file in _existing_files(folder, unfinished):
        yield from read_journal(file, check_record, unfinished)


class ConversationRef(NamedTuple):
    """Where the line of a conversation stands."""

    id: str
    file: str  # in the folder of conversations
    offset: int  # of its line, in bytes

    def read(self, folder: Path) -> dict[str, Any]:
        """Read the conversation."""
        return read_line(folder / self.file, self.offset)


class ConversationIndex:
    """All conversations of a folder, by the places of their lines, which take little memory."""

    def __init__(self, folder: Path, progress: Callable[[], object]) -> None:
        """Read and check every line once; raises as `read_conversations` does."""
        self.places: list[ConversationRef] = []
        self.num_recorded = 0  # that have their tokens
        digests: list[bytes] = []
        for file in _existing_files(folder):
            name = str(file.relative_to(folder))
            for offset, line, record in read_journal_lines(file, check_record):
                self.places.append(ConversationRef(record["id"], name, offset))
                self.num_recorded += record.get("sequences") is not None
                digests.append(hashlib.sha256(line).digest())
                progress()
        self.places.sort()  # by id: the order of lines is that of completion
        self.content = add_digests(digest.hex() for digest in digests)  # the `content_digest`
