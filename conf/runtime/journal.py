"""An append-only file of records: one JSON object a line, keyed by id, that survives being killed at any moment."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .signals import deferred

Check = Callable[[dict[str, Any]], str | None]  # says what is wrong with a record, or None


def read_journal(path: Path, check: Check | None = None, unfinished: bool = False) -> Iterator[dict[str, Any]]:
    """Read the records of a journal; of an `unfinished` one, up to a last line that is still being written."""
    return (record for _, _, record in read_journal_lines(path, check, unfinished))


def read_journal_lines(
    path: Path, check: Check | None = None, unfinished: bool = False
) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Read the records of a journal, with the lines and where these begin, in bytes: `read_line` finds one again."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if unfinished and not line.endswith(b"\n"):
                return
            yield offset, line, _parse(path, number, line, check)
            offset += len(line)


def read_line(path: Path, offset: int) -> dict[str, Any]:
    """Read the record whose line begins at an offset."""
    with open(path, "rb") as file:
        file.seek(offset)
        try:
            record = json.loads(file.readline())
        except ValueError:  # not JSON, or not UTF-8
            record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path} has no record at byte {offset}, it was changed: run the stage that wrote it again")
    return record


def _parse(path: Path, number: int, line: bytes, check: Check | None) -> dict[str, Any]:
    cure = "delete the line and run the stage again"
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} line {number} is malformed ({error}): {cure}") from None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise ValueError(f"{path} line {number} has no id: {cure}")
    if check and (problem := check(record)):
        raise ValueError(f"{path} line {number} ({record['id']}): {problem}; {cure}")
    return record


def json_line(record: dict[str, Any]) -> bytes:
    """Write a record as one line for every reader: some (str.splitlines) end lines at U+0085, U+2028 and U+2029 too."""
    line = json.dumps(record, ensure_ascii=False)
    for separator in ("\x85", "\u2028", "\u2029"):
        line = line.replace(separator, f"\\u{ord(separator):04x}")
    return line.encode() + b"\n"  # UnicodeEncodeError if a text is not valid UTF-8


class Journal:
    """Appends records; a kill leaves at worst one torn last line, which opening drops."""

    def __init__(self, path: Path, check: Check | None = None, sync_every_s: float = 0.0) -> None:
        self.done: set[str] = set()  # ids of the records that were there when it was opened
        whole = 0
        self._file = open(path, "ab")  # noqa: SIM115
        for offset, line, record in read_journal_lines(path, check, unfinished=True):
            self.done.add(record["id"])
            whole = offset + len(line)
        self._file.truncate(whole)
        self._sync_every_s, self._synced = sync_every_s, time.monotonic()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records, one line each: safe from a kill at once, from a power cut by an append some time later."""
        with deferred("it ends as soon as the records it has are written"):
            for record in records:
                self._file.write(json_line(record))
            self._file.flush()
        if time.monotonic() - self._synced >= self._sync_every_s:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Make everything durable and close the file."""
        self._sync()
        self._file.close()
