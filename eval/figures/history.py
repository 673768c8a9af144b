"""Acceptance over time: evaluations add a line each to a file, and are compared with the first of their kind."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...conf.runtime.journal import Journal, read_journal

_KIND = (
    *("num_draft_tokens_per_round", "drafting", "tree_depth", "tree_top_k"),
    *("temperature", "top_p", "top_k", "draft_sampling", "max_tokens", "questions_digest", "verifier"),
)
_FIGURES = ("acceptance_length", "acceptance_length_interval", "num_drafts", "num_accepted_tokens", "tokens_per_s")


def add_to_history(path: Path, run: str, results: dict[str, Any]) -> str:
    """Append the figures of an evaluation once, and return a sentence on how they lie to the first of its kind.

    Of one kind are evaluations of the same questions, drafting, temperature and limit of answers. ValueError: the
    file is no history.
    """
    entry = {name: results.get(name) for name in (*_KIND, *_FIGURES, "engine")}
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_last_line(path)
    journal = Journal(path)
    known, this = list(read_journal(path)), {"id": run, **entry}
    first = next((one for one in known if all(one.get(name) == entry[name] for name in _KIND)), None)
    if not any(_is_same(one, this) for one in known):
        journal.append([{"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **this}])
    journal.close()
    length = entry["acceptance_length"]
    if first is None or _is_same(first, this):
        return f"{path}: the first of its kind, {length:.2f}"
    interval = first["acceptance_length_interval"]
    if not interval:
        return f"{path}: {length:.2f}, {first['id']} had {first['acceptance_length']:.2f}"
    low, high = interval
    since = f"the interval [{low:.2f}, {high:.2f}] of {first['id']}"
    if low <= length <= high:
        return f"{path}: {length:.2f} lies within {since}"
    side, what = ("below", "; look for the cause, or adapt the head") if length < low else ("above", "")
    return f"{path}: {length:.2f} lies {side} {since}{what}"


def _is_same(one: dict[str, Any], this: dict[str, Any]) -> bool:
    return all(one.get(name) == value for name, value in this.items())


def _end_last_line(path: Path) -> None:
    """End a last line that an editor has left open; what a kill tore is no record, and goes."""
    last = path.read_bytes().rpartition(b"\n")[2] if path.is_file() else b""
    if last and not last.startswith(b"{"):
        raise ValueError(f"{path} is no history of evaluations: its last line is {last[:40]!r}")
    with suppress(ValueError):
        json.loads(last)
        with open(path, "ab") as file:
            file.write(b"\n")
