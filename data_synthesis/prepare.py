"""Prompts are made ready once a run: read, filtered, deduplicated, mixed, and written in the order of answering."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..conf.artifact import MANIFEST, Artifact, artifact, commit, digest, file_digest
from ..conf.progress import Progress
from ..conf.schema import Config, DataConfig, MalformedRows, SourceConfig
from .likeness import Questions, fingerprint, hash64
from .prompts import Prompt, prompt_of, text_of
from .sources import EMBEDDED, is_local, local_files, read_rows, source_name, split_names

FILE = "prompts.jsonl"
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
    settings = prompt_settings(config.data)
    with artifact(config.prompts_folder, "prompts", settings, config.overwrite, wait=True) as target:
        path = target.folder / FILE
        if target.complete and path.is_file() and file_digest(path) == target.manifest["content"]:
            print(f"prompts: {target.folder} is complete")
        else:
            _make(config.data, target)
        counts = target.manifest["counts"]
        return PreparedPrompts(target.folder, counts["taken"], target.manifest["content"], counts)


def prompt_settings(data: DataConfig) -> dict[str, Any]:
    """Give all that determines the prompts; of what is on this machine the content, not the place."""
    names = [source_name(source) for source in data.sources]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise ValueError(
            f"data.sources: two are called {twice!r}, and their prompts' ids would clash: set the name of one"
        )
    options = asdict(data)
    for unrelated in ("sources", "exclude", "heldout_share"):
        del options[unrelated]
    return {
        **options,
        "malformed_rows": data.malformed_rows.value,
        "sources": {source_name(s): _source_settings(n, s, data.seed) for n, s in enumerate(data.sources)},
        "exclude": {path: _exclude_settings(path) for path in data.exclude},
    }


def _source_settings(number: int, source: SourceConfig, seed: int) -> dict[str, Any]:
    options = {"number": number, "streaming": source.streaming, "limit": source.limit, "weight": source.weight}
    if source.path == EMBEDDED:
        return {**options, "content": digest([row for _, row in read_rows(source, seed)])}
    if files := local_files(source):
        return {**options, "content": digest([file_digest(file) for file in files])}
    return {**options, "path": source.path, "subset": source.subset, "revision": source.revision}


def _exclude_settings(path: str) -> str:
    if not is_local(path):
        return "hub"
    files = [file for source in _splits(path) for file in local_files(source)]
    return digest([file_digest(file) for file in files])


def _splits(path: str) -> list[SourceConfig]:
    return [SourceConfig(path=path, split=split) for split in split_names(path)]


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
        counts = [
            _read_source(source, share, data, questions, candidates, progress)
            for source, share in zip(data.sources, shares, strict=True)
        ]
        progress.close()
        taken = candidates.select(shares, counts, data)
        names = [source_name(source) for source in data.sources]
        summary = _summary(dict(zip(names, counts, strict=True)))
        if not len(taken):
            raise ValueError(f"data.sources yield no prompt: {_refused(summary)}")
        content = candidates.write(taken, target.folder / FILE)
    for name, share, count in zip(names, shares, counts, strict=True):
        if share is not None and count["taken"] < share:
            print(f"prompts: {name} gives {count['taken']} of the {share} asked of it")
    target.finish(counts=summary, content=content)
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
    """Load evaluation questions of any form that prompts may have, from all splits."""
    texts: list[str] = []
    for path in exclude:
        before = len(texts)
        for source in _splits(path):
            for number, (place, row) in enumerate(read_rows(source)):
                try:
                    texts += map(text_of, prompt_of(row, "", number).turns)
                except ValueError as error:
                    raise ValueError(f"data.exclude: {place} {error}") from None
        if len(texts) == before:
            raise ValueError(f"data.exclude: {path} holds no question")
    return Questions(texts)


def _read_source(
    source: SourceConfig,
    share: int | None,
    data: DataConfig,
    questions: Questions,
    candidates: _Candidates,
    progress: Progress,
) -> Counter[str]:
    """Read a source into the candidates, and count its rows and what they are refused for.

    A stream is read until it has given its share; so what it says twice is refused here already.
    """
    counts = Counter[str]()
    said = set(candidates.texts) if source.streaming and share is not None else None
    start = candidates.begin_source()
    for place, row in read_rows(source, data.seed):
        if said is not None and len(candidates) - start == share:
            break
        number = None if source.streaming else counts["rows"]
        counts["rows"] += 1
        progress.update()
        try:
            prompt = prompt_of(row, source_name(source), number)
            line = _line(prompt)
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
    return counts


def _line(prompt: Prompt) -> bytes:
    try:
        return json.dumps(vars(prompt), ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise ValueError(f"is not valid UTF-8: {error}") from None


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
    """Prompts that are good by themselves: their lines in a file without a name, 26 bytes of each in memory.

    Attributes:
        texts: hashes of what they ask.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115
        self._seed = seed
        self._sources, self._num_sources = array("H"), 0
        self._keys = array("Q")  # hashes of the ids and the seed: the order of answering
        self._ends = array("Q")  # of the lines, in bytes
        self.texts = array("Q")

    def __enter__(self) -> _Candidates:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.texts)

    def begin_source(self) -> int:
        """Begin the next source; give the candidates before it."""
        self._num_sources += 1
        return len(self)

    def add(self, prompt_id: str, text: int, line: bytes) -> None:
        """Add a prompt of the present source."""
        self._file.write(line)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(line))
        self._sources.append(self._num_sources - 1)
        self._keys.append(hash64(f"{self._seed}/{prompt_id}"))
        self.texts.append(text)

    def select(self, shares: list[int | None], counts: list[Counter[str]], data: DataConfig) -> NDArray[np.int64]:
        """Give the numbers of those to take, in their order, and complete the counts.

        Raises:
            ValueError: two rows have one id and ask different things (unless data.malformed_rows=skip).
        """
        sources = np.frombuffer(self._sources, np.uint16)
        keys, texts = np.frombuffer(self._keys, np.uint64), np.frombuffer(self.texts, np.uint64)
        same_id = _first_equal(keys)
        clash = texts != texts[same_id]
        if clash.any() and data.malformed_rows is MalformedRows.stop:
            raise ValueError(
                f"data.sources: two rows with different prompts have the id {self._id(int(clash.argmax()))!r}: give "
                "them ids of their own, or leave the later ones out with data.malformed_rows=skip"
            )
        rows = np.flatnonzero(~clash)
        first = rows[_first_equal(texts[rows])] if data.deduplicate else same_id[rows]
        repeated = rows[rows != first]
        rows = rows[rows == first]
        rows = rows[np.argsort(keys[rows], kind="stable")]
        for number, (share, count) in enumerate(zip(shares, counts, strict=True)):
            own = rows[sources[rows] == number]
            count["malformed"] += int((sources[clash] == number).sum())
            count["duplicate"] += int((sources[repeated] == number).sum())
            count["taken"] = len(own[:share])
            count["over_limit"] = len(own) - count["taken"]
            if count["over_limit"]:
                rows = rows[~np.isin(rows, own[share:])]
        return rows

    def _id(self, number: int) -> str:
        return str(json.loads(next(self._lines([number])))["id"])

    def _lines(self, numbers: Iterable[int]) -> Iterator[bytes]:
        self._file.flush()
        for number in numbers:
            start = self._ends[number - 1] if number else 0
            yield os.pread(self._file.fileno(), self._ends[number] - start, start)

    def write(self, numbers: NDArray[np.int64], path: Path) -> str:
        """Write the lines of some candidates to a file; give its SHA-256."""
        temporary = path.with_name(f".{path.name}.tmp")
        state = hashlib.sha256()
        with open(temporary, "wb") as file:
            for line in self._lines(numbers):
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
