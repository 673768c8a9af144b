"""Prompts are made ready once a run: read, filtered, deduplicated, mixed, and written in the order of answering."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ...conf.runtime.artifact import MANIFEST, Artifact, artifact, commit, digest, file_digest, read_manifest, sync
from ...conf.runtime.journal import json_line
from ...conf.runtime.progress import Progress
from ...conf.schema import Config, DataConfig, MalformedRows, SourceConfig
from .near_duplicates import NearDuplicates, Questions, fingerprint, hash64
from .rows import FIELDS, Prompt, prompt_of, read_prompt, text_of
from .sources import (
    EMBEDDED,
    READ,
    is_gone,
    is_local,
    local_files,
    read_rows,
    resolved_sources,
    source_name,
    split_names,
)

FILE = "prompts.jsonl"
_EXAM_FIELDS = ("question", "article")  # of evaluation questions alone: GSM8K, CNN/DailyMail
_SHOWN = 12  # columns
# Of a prompt: the hash of its id and the seed, the hash of what it asks, and where its line begins.
_CANDIDATE = np.dtype([(name, np.uint64) for name in ("key", "text", "line")])
# Why a row is not taken: "evaluation" is like a question of data.exclude, instead of "over_limit" others were taken.
REFUSALS = (
    *("malformed", "too_few_turns", "too_many_turns", "too_short", "too_long"),
    *("evaluation", "duplicate", "over_limit"),
)


@dataclass(frozen=True)
class PreparedPrompts:
    """The prompts of a run, on disk."""

    folder: Path
    count: int
    digest: str  # of what they say and their order, whatever settings made them
    counts: dict[str, Any]  # rows read, rows taken and rows refused by reason, in all and of each source

    def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[Prompt]:
        """Read prompts shard, shard + num_shards, ..., one at a time."""
        with open(self.folder / FILE, "rb") as file:
            for line in islice(file, shard, None, num_shards):
                yield _prompt(json.loads(line))


def prepare_prompts(config: Config) -> PreparedPrompts:
    """Make runs/<name>/prompts/ from `data`, or find it complete; of processes started together one makes it.

    Prompts that are complete may outlive the files that they were made of. Raises ValueError if a source cannot be
    read, a row is malformed (unless data.malformed_rows=skip), or no prompt is left.
    """
    data, folder = replace(config.data, sources=resolved_sources(config)), config.prompts_folder
    if not data.sources:
        raise ValueError("data.sources is required: choose data=ultrachat_magpie, data=embedded or give sources")
    made = None
    with suppress(ValueError):  # there are none, or not whole ones: `artifact` says what to do about others' files
        made = read_manifest(folder, "prompts")["settings"]
    settings = prompt_settings(data, made)
    if made and settings != made:
        settings = prompt_settings(data)
    with artifact(folder, "prompts", settings, config.overwrite, wait=True) as target:
        path = target.folder / FILE
        if target.complete and path.is_file() and file_digest(path) == target.manifest["content"]:
            print(f"prompts: {target.folder} is complete")
        else:
            target.save(complete=False)
            try:
                _prepare(data, target)
            except ValueError:  # nothing stays of data that are refused, so that they may be corrected
                for file in (path, target.folder / MANIFEST):
                    file.unlink(missing_ok=True)
                raise
        counts = target.manifest["counts"]
        return PreparedPrompts(target.folder, counts["taken"], target.manifest["content"], counts)


def prompt_settings(data: DataConfig, made: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return all that determines the prompts; of what is on this machine the content, not the place.

    Of prompts that are complete, `made` are the settings: a file that is gone counts as what it was then.
    """
    names = [source_name(source) for source in data.sources]
    if len(set(names)) < len(names):
        twice = f"data.sources: two are called {max(names, key=names.count)!r}"
        raise ValueError(f"{twice}, and their prompts' ids would clash: set the name of one")
    made = {"sources": {}, "exclude": {}, **(made or {})}
    unset = [name for name in ("local_images", "near_duplicates") if not getattr(data, name)]
    unrelated = ("sources", "exclude", "heldout_share", *unset, *(["logged_answers"] if data.logged_answers else []))
    options = {name: value for name, value in asdict(data).items() if name not in unrelated}
    sources = {}
    for number, (name, source) in enumerate(zip(names, data.sources, strict=True)):
        content = _content(source.path, [source], made["sources"].get(name, {}).get("content"))
        hub = {"path": source.path, "subset": source.subset, "revision": source.revision}
        draw = {"number": number, "streaming": source.streaming, "limit": source.limit, "weight": source.weight}
        changed = {"row_function": source.row_function} if source.row_function else {}
        sources[name] = {**draw, **changed, **({"content": content} if content else hub)}
    exclude = {path: _content(path, _splits(path), made["exclude"].get(path)) or "hub" for path in data.exclude}
    return {**options, "malformed_rows": data.malformed_rows.value, "sources": sources, "exclude": exclude}


def _content(path: str, sources: Iterable[SourceConfig], made: str | None) -> str | None:
    """Return the digest of what stands at a path: that of before if it is gone, None for what is on the hub."""
    if made and is_gone(path):
        return made
    if path == EMBEDDED:
        return digest([row for source in sources for _, row in read_rows(source)])
    files = [file for source in sources for file in local_files(source)] if is_local(path) else []
    return digest([file_digest(file) for file in files]) if files else None


def _splits(entry: str) -> Iterator[SourceConfig]:
    """Yield all splits of an entry of data.exclude: a path, a hub id, or `id:subset` with a configuration."""
    path, _, subset = entry.rpartition(":")
    if not path or is_gone(entry) or is_local(entry):
        path, subset = entry, ""
    for split in split_names(path, subset or None):
        yield SourceConfig(path=path, subset=subset or None, split=split)


def _prepare(data: DataConfig, target: Artifact) -> None:
    shares = dict(zip(map(source_name, data.sources), shares_of(data), strict=True))
    counts, unread = dict[str, Counter[str]](), dict[str, list[str]]()
    with TemporaryFile(dir=target.folder) as file:
        selection = _Selection(data, file)
        for source, (name, share) in zip(data.sources, shares.items(), strict=True):
            counts[name], unread[name] = selection.read(source, share)
        selection.progress.close()
        by_function = any(source.row_function for source in data.sources)
        further = {"near_duplicate": data.near_duplicates, "row_function": by_function}
        refusals = (*REFUSALS, *(reason for reason, asked in further.items() if asked))
        keys = ("rows", "taken", *refusals)
        of_sources = {name: {key: count[key] for key in keys} for name, count in counts.items()}
        summary = {**{key: sum(count[key] for count in counts.values()) for key in keys}, "sources": of_sources}
        reasons = ", ".join(f"{summary[reason]} {reason}" for reason in refusals if summary[reason])
        refused = f"of {summary['rows']} rows {reasons or 'none'} left out"
        if not summary["taken"]:
            raise ValueError(f"data.sources yield no prompt: {refused}")
        content = selection.write(target.folder / FILE)
    for name, share in shares.items():
        if columns := unread[name]:
            more = f" and {len(columns) - _SHOWN} more" * (len(columns) > _SHOWN)
            print(f"prompts: {name} has columns that are not read: {', '.join(columns[:_SHOWN])}{more}")
        if share is not None and counts[name]["taken"] < share:
            print(f"prompts: {name} gives {counts[name]['taken']} of the {share} asked of it")
    target.finish(counts=summary, content=content, not_read=unread)
    taken = ", ".join(f"{name} {count['taken']}" for name, count in counts.items())
    print(f"prompts: {summary['taken']} in {target.folder} ({taken}); {refused}")


def shares_of(data: DataConfig) -> list[int | None]:
    """Return the most prompts to take of each source: data.limit by weight (largest remainder), and its own limit."""
    if data.limit is None:
        return [source.limit for source in data.sources]
    total = sum(source.weight for source in data.sources)
    exact = [data.limit * source.weight / total for source in data.sources]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: data.limit - sum(shares)]:
        shares[number] += 1
    return [share if s.limit is None else min(share, s.limit) for share, s in zip(shares, data.sources, strict=True)]


def load_questions(exclude: list[str]) -> Questions:
    """Load evaluation questions of any form that prompts may have, or with a question or article, from all splits."""
    texts: list[str] = []
    for path in exclude:
        before = len(texts)
        for source in _splits(path):
            for number, (place, row) in enumerate(read_rows(source, whole=True)):
                if isinstance(row, dict) and all(row.get(name) is None for name in FIELDS):  # in no prompt's form
                    row = next(({"prompt": row[name]} for name in _EXAM_FIELDS if row.get(name) is not None), row)
                try:
                    texts += map(text_of, prompt_of(row, "", number).turns)
                except ValueError as error:
                    raise ValueError(f"data.exclude: {place} {error}") from None
        if len(texts) == before:
            raise ValueError(f"data.exclude: {path} holds no question")
    return Questions(texts)


def refusal(prompt: Prompt, data: DataConfig, questions: Questions) -> str | None:
    """Return why a prompt is not good by itself, one of REFUSALS, or None."""
    texts = [text_of(turn) for turn in prompt.turns]
    chars = sum(map(len, texts))
    if len(texts) < data.min_turns:
        return "too_few_turns"
    if data.max_turns is not None and len(texts) > data.max_turns:
        return "too_many_turns"
    if chars < data.min_chars:
        return "too_short"
    if data.max_chars is not None and chars > data.max_chars:
        return "too_long"
    return "evaluation" if any(map(questions.like, texts)) else None


class _Selection:
    """Prompts that are good by themselves, of one source after the other, and those of them that are taken.

    Their lines are in a file, 24 bytes of each in memory. Of rows with one id that ask different things the later ones
    get `-` and the hash of what they ask behind it.
    """

    def __init__(self, data: DataConfig, file: IO[bytes]) -> None:
        self._data, self._file, self._questions = data, file, load_questions(data.exclude)
        self._near = None if data.near_duplicates is None else NearDuplicates(data.near_duplicates, self._read)
        self._new = array("Q")  # candidates of the present source, the fields of a _CANDIDATE each
        self._taken = np.empty(0, _CANDIDATE)  # of the sources before
        self.progress = Progress("prompts", None, "row")

    def read(self, source: SourceConfig, share: int | None) -> tuple[Counter[str], list[str]]:
        """Read a source and take its share; return counts of its rows, and the columns that are not read.

        A stream is read until it has given its share; so what it says twice is refused here already.
        """
        data, counts = self._data, Counter[str]()
        early = source.streaming and share is not None
        seen = set(self._taken["text"].tolist()) if early else set()
        name, fields, change = source_name(source), set[str](), _row_function(source.row_function)
        local = data.local_images or source.path == EMBEDDED or is_local(source.path)
        for place, row in read_rows(source, data.seed, whole=change is not None):
            if early and len(self._new) * self._new.itemsize // _CANDIDATE.itemsize == share:
                break
            number = None if source.streaming else counts["rows"]
            counts["rows"] += 1
            self.progress.update()
            if change and isinstance(row, dict) and (row := _changed(row, change)) is None:
                counts["row_function"] += 1
                continue
            fields.update(row if isinstance(row, dict) else ())
            try:
                prompt, line = read_prompt(row, name, number, local, data.local_images, data.logged_answers)
            except ValueError as error:
                if data.malformed_rows is MalformedRows.stop:
                    cure = "correct it, or leave such rows out with data.malformed_rows=skip"
                    raise ValueError(f"{place} {error}; {cure}") from None
                counts["malformed"] += 1
                continue
            text = fingerprint(prompt)
            again = "duplicate" if data.deduplicate and text in seen else None
            reason = refusal(prompt, data, self._questions) or again
            if reason:
                counts[reason] += 1
                continue
            if early:
                seen.add(text)
            self._new.extend((self._key(prompt.id), text, self._append(line)))
        if not counts["rows"] and share != 0:
            raise ValueError(f"data.sources: {source.path} holds no row")
        return counts + self._take(share), sorted(fields - READ if source.path != EMBEDDED else ())

    def _take(self, share: int | None) -> Counter[str]:
        """Take a share of the present source, of what was not taken before; count what becomes of its candidates."""
        before = len(self._taken)
        rows = np.concatenate([self._taken, np.frombuffer(self._new, _CANDIDATE)])
        self._new = array("Q")
        while len(later := np.flatnonzero(rows["text"] != rows["text"][_first_equal(rows["key"])])):
            for row in (rows[number] for number in later):  # views: what is assigned stays
                prompt = json.loads(self._line(row))
                prompt["id"] += f"-{int(row['text']):016x}"
                row["key"], row["line"] = self._key(prompt["id"]), self._append(json_line(prompt))
        is_first = _first_equal(rows["text" if self._data.deduplicate else "key"]) == np.arange(len(rows))
        own = rows[before:][is_first[before:]]
        own, near = self._without_near(own[np.argsort(own["key"])], share)
        taken = own[:share]
        self._taken = np.concatenate([self._taken, taken])
        duplicate = len(rows) - before - len(own) - near
        return Counter(taken=len(taken), over_limit=len(own) - len(taken), duplicate=duplicate, near_duplicate=near)

    def _without_near(self, rows: NDArray[np.void], share: int | None) -> tuple[NDArray[np.void], int]:
        """Return the rows that are not nearly one taken before, until a share is taken, and how many are left out."""
        if self._near is None:
            return rows, 0
        is_near, num_taken = np.zeros(len(rows), bool), 0
        for number, row in enumerate(rows):
            if num_taken == share:
                break
            line = int(row["line"])
            is_near[number] = not self._near.add(line, self._read(line))
            num_taken += not is_near[number]
        return rows[~is_near], int(is_near.sum())

    def _key(self, prompt_id: str) -> int:
        return hash64(f"{self._data.seed}/{prompt_id}")

    def _append(self, line: bytes) -> int:
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        return start

    def _line(self, candidate: np.void) -> bytes:
        self._file.seek(int(candidate["line"]))
        return self._file.readline()

    def _read(self, line: int) -> Prompt:
        self._file.seek(line)
        return _prompt(json.loads(self._file.readline()))

    def write(self, path: Path) -> str:
        """Write the lines of those taken to a file, in the order of answering; return its SHA-256."""
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            file.writelines(map(self._line, self._taken[np.argsort(self._taken["key"])]))
        sync(temporary)
        commit(temporary, path)
        return file_digest(path)


def _prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(row["id"], row["source"], tuple(row["turns"]), row["system"], row.get("logged"))


def _row_function(name: str | None) -> Callable[[Any], Any] | None:
    module, _, function = (name or "").rpartition(".")
    try:
        return getattr(import_module(module), function) if name else None
    except Exception as error:  # of whatever the module does
        raise ValueError(
            f"data.sources: row_function {name} cannot be loaded ({type(error).__name__}: {error}): MODULE.FUNCTION is "
            "required, of a module that Python finds (PYTHONPATH)"
        ) from error


def _changed(row: dict[str, Any], change: Callable[[Any], Any]) -> Any:
    """Return what a function makes of a row, or the error that says why it is no usable one."""
    try:
        return change(row)
    except Exception as error:
        return ValueError(f"makes row_function fail with {type(error).__name__}: {error}")


def _first_equal(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each value the index of the first that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], np.int64)
