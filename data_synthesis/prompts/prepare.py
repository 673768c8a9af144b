"""Prompts are made ready once a run: read, filtered, deduplicated, mixed, and written in the order of answering."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...conf.runtime.artifact import MANIFEST, Artifact, artifact, commit, digest, file_digest, read_manifest
from ...conf.runtime.journal import json_line
from ...conf.runtime.progress import Progress
from ...conf.schema import Config, DataConfig, MalformedRows, SourceConfig
from .near_duplicates import Questions, fingerprint, hash64
from .rows import FIELDS, Prompt, prompt_of, read_prompt, text_of
from .sources import EMBEDDED, READ, is_gone, is_local, local_files, read_rows, source_name, split_names

FILE = "prompts.jsonl"
_EXAM_FIELDS = ("question", "article")  # of evaluation questions alone: GSM8K, CNN/DailyMail
_SHOWN = 12  # columns
REFUSALS = (  # why a row is not taken
    "malformed",
    "too_few_turns",
    "too_many_turns",
    "too_short",
    "too_long",
    "evaluation",  # like a question of data.exclude
    "duplicate",
    "over_limit",  # good, but data.limit or the source's own takes others
)


@dataclass(frozen=True)
class PreparedPrompts:
    """The prompts of a run, on disk.

    Attributes:
        digest: of what they say and their order, whatever settings made them.
        counts: rows read, rows taken and rows refused by reason, in all and of each source.
    """

    folder: Path
    count: int
    digest: str
    counts: dict[str, Any]

    def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[Prompt]:
        """Read prompts shard, shard + num_shards, ..., one at a time."""
        with open(self.folder / FILE, "rb") as file:
            for line in islice(file, shard, None, num_shards):
                row = json.loads(line)
                yield Prompt(row["id"], row["source"], tuple(row["turns"]), row["system"])


def prepare_prompts(config: Config) -> PreparedPrompts:
    """Make runs/<name>/prompts/ from `data`, or find it complete; of processes started together one makes it.

    Raises:
        ValueError: a source cannot be read, a row is malformed (unless data.malformed_rows=skip), no prompt is left.
    """
    if not config.data.sources:
        raise ValueError("data.sources is required: choose data=ultrachat_magpie, data=embedded or give sources")
    with artifact(config.prompts_folder, "prompts", _settings(config), config.overwrite, wait=True) as target:
        path = target.folder / FILE
        if target.complete and path.is_file() and file_digest(path) == target.manifest["content"]:
            print(f"prompts: {target.folder} is complete")
        else:
            _make(config.data, target)
        counts = target.manifest["counts"]
        return PreparedPrompts(target.folder, counts["taken"], target.manifest["content"], counts)


def _settings(config: Config) -> dict[str, Any]:
    """Give the settings of the prompts; those that are complete may outlive the files that they were made of."""
    folder = config.prompts_folder
    manifest = read_manifest(folder, "prompts", unfinished=True) if (folder / MANIFEST).is_file() else {}
    if manifest.get("complete"):
        settings = prompt_settings(config.data, manifest["settings"])
        if settings == manifest["settings"]:
            return settings
    return prompt_settings(config.data)


def prompt_settings(data: DataConfig, made: dict[str, Any] | None = None) -> dict[str, Any]:
    """Give all that determines the prompts; of what is on this machine the content, not the place.

    Args:
        made: settings of prompts that are complete: a file that is gone counts as what it was then.
    """
    names = [source_name(source) for source in data.sources]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise ValueError(
            f"data.sources: two are called {twice!r}, and their prompts' ids would clash: set the name of one"
        )
    before = made or {}
    options = asdict(data)
    for unrelated in ("sources", "exclude", "heldout_share", *([] if data.local_images else ["local_images"])):
        del options[unrelated]
    return {
        **options,
        "malformed_rows": data.malformed_rows.value,
        "sources": {
            name: _source_settings(number, source, data.seed, before.get("sources", {}).get(name))
            for number, (name, source) in enumerate(zip(names, data.sources, strict=True))
        },
        "exclude": {path: _exclude_settings(path, before.get("exclude", {}).get(path)) for path in data.exclude},
    }


def _source_settings(
    number: int, source: SourceConfig, seed: int, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    options = {"number": number, "streaming": source.streaming, "limit": source.limit, "weight": source.weight}
    if source.path == EMBEDDED:
        return {**options, "content": digest([row for _, row in read_rows(source, seed)])}
    if before and "content" in before and is_gone(source.path):
        return {**options, "content": before["content"]}
    if files := local_files(source):
        return {**options, "content": digest([file_digest(file) for file in files])}
    return {**options, "path": source.path, "subset": source.subset, "revision": source.revision}


def _exclude_settings(path: str, before: str | None = None) -> str:
    if before and is_gone(path):
        return before
    if not is_local(path):
        return "hub"
    files = [file for source in _splits(path) for file in local_files(source)]
    return digest([file_digest(file) for file in files])


def _splits(entry: str) -> list[SourceConfig]:
    """Give all splits of an entry of data.exclude: a path, a hub id, or a hub id and its configuration, `id:subset`."""
    path, _, subset = entry.rpartition(":")
    if not path or is_gone(entry) or is_local(entry):
        path, subset = entry, ""
    return [SourceConfig(path=path, subset=subset or None, split=s) for s in split_names(path, subset or None)]


def _make(data: DataConfig, target: Artifact) -> None:
    """Prepare the prompts; where the data are refused leave nothing, so that they may be corrected."""
    target.save(complete=False)
    try:
        _prepare(data, target)
    except ValueError:
        for name in (FILE, MANIFEST):
            (target.folder / name).unlink(missing_ok=True)
        raise


def _prepare(data: DataConfig, target: Artifact) -> None:
    questions = _load_questions(data.exclude)
    shares = _shares(data)
    with _Candidates(target.folder, data.seed) as candidates:
        progress = Progress("prompts", None, "row")
        found = [
            _read_source(source, share, data, questions, candidates, progress)
            for source, share in zip(data.sources, shares, strict=True)
        ]
        counts, unread = [count for count, _ in found], [columns for _, columns in found]
        progress.close()
        names = [source_name(source) for source in data.sources]
        summary = _summary(dict(zip(names, counts, strict=True)))
        if not summary["taken"]:
            raise ValueError(f"data.sources yield no prompt: {_refused(summary)}")
        content = candidates.write(target.folder / FILE)
    for name, share, count, columns in zip(names, shares, counts, unread, strict=True):
        if columns:
            more = f" and {len(columns) - _SHOWN} more" * (len(columns) > _SHOWN)
            print(f"prompts: {name} has columns that are not read: {', '.join(columns[:_SHOWN])}{more}")
        if share is not None and count["taken"] < share:
            print(f"prompts: {name} gives {count['taken']} of the {share} asked of it")
    target.finish(counts=summary, content=content, not_read=dict(zip(names, unread, strict=True)))
    given = ", ".join(f"{name} {count['taken']}" for name, count in summary["sources"].items())
    print(f"prompts: {summary['taken']} in {target.folder} ({given}); {_refused(summary)}")


def _summary(counts: dict[str, Counter[str]]) -> dict[str, Any]:
    keys = ("rows", "taken", *REFUSALS)
    total = {key: sum(count[key] for count in counts.values()) for key in keys}
    return {**total, "sources": {name: {key: count[key] for key in keys} for name, count in counts.items()}}


def _refused(summary: dict[str, Any]) -> str:
    reasons = ", ".join(f"{summary[reason]} {reason}" for reason in REFUSALS if summary[reason])
    return f"of {summary['rows']} rows {reasons or 'none'} left out"


def _shares(data: DataConfig) -> list[int | None]:
    """Give the prompts to take of each source at most: data.limit by weight (largest remainder), and its own limit."""
    if data.limit is None:
        return [source.limit for source in data.sources]
    total = sum(source.weight for source in data.sources)
    exact = [data.limit * source.weight / total for source in data.sources]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    for number in by_remainder[: data.limit - sum(shares)]:
        shares[number] += 1
    return [share if s.limit is None else min(share, s.limit) for share, s in zip(shares, data.sources, strict=True)]


def _load_questions(exclude: list[str]) -> Questions:
    """Load evaluation questions of any form that prompts may have, or with a question or article, from all splits."""
    texts: list[str] = []
    for path in exclude:
        before = len(texts)
        for source in _splits(path):
            for number, (place, row) in enumerate(read_rows(source, whole=True)):
                try:
                    texts += map(text_of, prompt_of(_asking(row), "", number).turns)
                except ValueError as error:
                    raise ValueError(f"data.exclude: {place} {error}") from None
        if len(texts) == before:
            raise ValueError(f"data.exclude: {path} holds no question")
    return Questions(texts)


def _asking(row: Any) -> Any:
    """Give an evaluation question that no prompt looks like as a prompt; other rows as they are."""
    if isinstance(row, dict) and all(row.get(name) is None for name in FIELDS):
        return next(({"prompt": row[name]} for name in _EXAM_FIELDS if row.get(name) is not None), row)
    return row


def _read_source(
    source: SourceConfig,
    share: int | None,
    data: DataConfig,
    questions: Questions,
    candidates: _Candidates,
    progress: Progress,
) -> tuple[Counter[str], list[str]]:
    """Read a source into the candidates and take its share.

    Give the counts of its rows and of what they are refused for, and the columns that are not read.

    A stream is read until it has given its share; so what it says twice is refused here already.
    """
    counts = Counter[str]()
    taken = candidates.begin_source()
    said = taken if source.streaming and share is not None else None
    name, fields = source_name(source), set[str]()
    local = data.local_images or source.path == EMBEDDED or is_local(source.path)
    for place, row in read_rows(source, data.seed):
        if said is not None and candidates.num_of_source == share:
            break
        number = None if source.streaming else counts["rows"]
        counts["rows"] += 1
        progress.update()
        fields.update(row if isinstance(row, dict) else ())
        try:
            prompt, line = read_prompt(row, name, number, local, data.local_images)
        except ValueError as error:
            if data.malformed_rows is MalformedRows.stop:
                cure = "correct it, or leave such rows out with data.malformed_rows=skip"
                raise ValueError(f"{place} {error}; {cure}") from None
            counts["malformed"] += 1
            continue
        text = fingerprint(prompt)
        reason = _refusal(prompt, data, questions)
        if not reason and data.deduplicate and said is not None and text in said:
            reason = "duplicate"
        if reason:
            counts[reason] += 1
            continue
        if said is not None:
            said.add(text)
        candidates.add(prompt.id, text, line)
    if not counts["rows"] and share != 0:
        raise ValueError(f"data.sources: {source.path} holds no row")
    return counts + candidates.take(share, data.deduplicate), sorted(fields - READ if source.path != EMBEDDED else ())


def _refusal(prompt: Prompt, data: DataConfig, questions: Questions) -> str | None:
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


class _Candidates:
    """Prompts that are good by themselves: their lines in a file without a name, some 30 bytes of each in memory.

    Of rows with one id that ask different things the later ones get `-` and the hash of what they ask behind it.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115
        self._seed = seed
        self._start = 0  # of the present source
        self._taken = np.empty(0, np.int64)
        self._keys = array("Q")  # hashes of the ids and the seed: the order of answering
        self._ends = array("Q")  # of the lines, in bytes
        self._texts = array("Q")  # hashes of what they ask
        self._renamed = array("B")  # how often the hash was put behind the id

    def __enter__(self) -> _Candidates:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._texts)

    def begin_source(self) -> set[int]:
        """Begin the next source; give the hashes of what those taken before it ask."""
        self._start = len(self)
        return set(np.frombuffer(self._texts, np.uint64)[self._taken].tolist())

    @property
    def num_of_source(self) -> int:
        """Candidates of the present source."""
        return len(self) - self._start

    def add(self, prompt_id: str, text: int, line: bytes) -> None:
        """Add a prompt of the present source."""
        self._file.write(line)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(line))
        self._keys.append(self._key(prompt_id))
        self._texts.append(text)
        self._renamed.append(0)

    def take(self, share: int | None, deduplicate: bool) -> Counter[str]:
        """Take a share of the present source, of what was not taken before; count what becomes of its candidates."""
        self._file.flush()
        rows = np.concatenate([self._taken, np.arange(self._start, len(self))])
        self._rename_later(rows)
        keys = np.frombuffer(self._keys, np.uint64)
        said = np.frombuffer(self._texts, np.uint64) if deduplicate else keys
        own = rows[(_first_equal(said[rows]) == np.arange(len(rows))) & (rows >= self._start)]
        own = own[np.argsort(keys[own], kind="stable")]
        taken = own[:share]
        self._taken = np.concatenate([self._taken, taken])
        duplicates = self.num_of_source - len(own)
        return Counter(taken=len(taken), over_limit=len(own) - len(taken), duplicate=duplicates)

    def taken(self) -> NDArray[np.int64]:
        """Give the numbers of all that were taken, in the order of answering."""
        keys = np.frombuffer(self._keys, np.uint64)
        return self._taken[np.argsort(keys[self._taken], kind="stable")]

    def _rename_later(self, rows: NDArray[np.int64]) -> None:
        """Lengthen the ids of rows that ask something else than the first of their id, until none does."""
        texts, keys = np.frombuffer(self._texts, np.uint64)[rows], np.frombuffer(self._keys, np.uint64)
        while len(later := rows[texts != texts[_first_equal(keys[rows])]]):
            for number in later.tolist():
                self._renamed[number] += 1
                keys[number] = self._key(json.loads(self._line(number))["id"])

    def _key(self, prompt_id: str) -> int:
        return hash64(f"{self._seed}/{prompt_id}")

    def _line(self, number: int) -> bytes:
        start = self._ends[number - 1] if number else 0
        line = os.pread(self._file.fileno(), self._ends[number] - start, start)
        if not self._renamed[number]:
            return line
        row = json.loads(line)
        row["id"] += f"-{self._texts[number]:016x}" * self._renamed[number]
        return json_line(row)

    def write(self, path: Path) -> str:
        """Write the lines of those taken to a file; give its SHA-256."""
        temporary = path.with_name(f".{path.name}.tmp")
        state = hashlib.sha256()
        with open(temporary, "wb") as file:
            for number in self.taken().tolist():
                line = self._line(number)
                state.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        commit(temporary, path)
        return state.hexdigest()


def _first_equal(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Give for each value the index of the first that equals it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    found: NDArray[np.int64] = first[inverse]
    return found
