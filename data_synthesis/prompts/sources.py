"""Rows of prompt sources: JSON, JSONL and Parquet files, folders of them, datasets of the hub, the embedded ones."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...conf.schema import SELF, Config, SourceConfig
from ...models.embedded.verifier import prompts as embedded_prompts
from .rows import BESIDE, FIELDS, ID_FIELDS, LOGGED_FIELDS, SYSTEM_FIELDS

EMBEDDED = "embedded"
SUFFIXES = (".json", ".jsonl", ".parquet")  # of files that are read
_ARROW = (".arrow", ".feather")  # of those that are not
READ = {*FIELDS, *ID_FIELDS, *SYSTEM_FIELDS, *LOGGED_FIELDS, *BESIDE}  # columns that a prompt is read from

_BATCH_ROWS = 1000
_SHUFFLED_ROWS = 10_000  # that a stream draws from; they are in memory
_CHUNK = 1 << 20  # characters
_GAP = re.compile(r"[\s,]*")

SELF_FILE = "prompts.jsonl"  # in the folder of a source `self`

Row = tuple[str, Any]  # where it stands ("chats.jsonl line 7"), and what: a value, or a ValueError where it has none


def source_name(source: SourceConfig) -> str:
    """Return the first part of the ids of a source: name/split."""
    path = Path(source.path)
    return f"{source.name or (path.stem if path.suffix in SUFFIXES else path.name)}/{source.split}"


def self_folder(config: Config, source: SourceConfig) -> Path:
    """Return the folder of the prompts that the verifier writes for a source `self`."""
    return config.self_prompts_folder / (source.name or SELF)


def resolved_sources(config: Config) -> list[SourceConfig]:
    """Return the sources of a run, what the verifier has written itself as the file that it is in."""
    return [
        replace(source, path=str(self_folder(config, source) / SELF_FILE), name=source.name or SELF)
        if source.path == SELF
        else source
        for source in config.data.sources
    ]


def read_rows(source: SourceConfig, seed: int = 0, whole: bool = False) -> Iterator[Row]:
    """Read the rows of a source one after the other; memory holds few of them.

    A row that cannot be decoded comes as the ValueError that says why, so that a caller may leave it out. With
    `streaming` rows come in the order of datasets' own shuffle by `seed`. Of a table come the columns that a prompt is
    read from, or the `whole`. Raises ValueError if the source cannot be reached, or has no such split.
    """
    if source.path == EMBEDDED:
        yield from _placed(EMBEDDED, embedded_prompts()[: source.limit])
        return
    files = local_files(source)
    if not files or (source.streaming and Path(source.path).is_dir() and files[0].suffix == ".parquet"):
        yield from dataset_rows(source, seed, whole)
        return
    if source.streaming:
        raise ValueError(
            f"data.sources {source.path}: streaming must be false for files here: they are read row by row anyway"
        )
    for file in files:
        try:
            yield from _READERS[file.suffix](file, whole)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not valid UTF-8: {error}") from None


def split_names(path: str, subset: str | None = None) -> list[str]:
    """Return the splits of a folder or a dataset of the hub; a file is all "train"."""
    if is_local(path) and Path(path).is_file():
        return ["train"]
    from datasets import get_dataset_split_names

    with _reading(path):
        return list(get_dataset_split_names(path, subset))


def is_local(path: str) -> bool:
    """Return whether a path is on this machine; what looks like a file and is not there, and Arrow, are refused."""
    if is_gone(path):
        raise ValueError(f"{path} does not exist")
    place = Path(path)
    if place.suffix in _ARROW or any(next(place.rglob(f"*{suffix}"), None) for suffix in _ARROW):
        raise ValueError(
            f"{path} holds Arrow files, as save_to_disk of datasets writes them, which are not read: load it with "
            "datasets.load_from_disk and write it with to_parquet or to_json"
        )
    return place.exists()


def is_gone(path: str) -> bool:
    """Return whether a path looks like one on this machine and is not there."""
    file = Path(path)
    looks = file.is_absolute() or path.startswith(".") or file.suffix in (*SUFFIXES, *_ARROW)
    return looks and not file.exists()


def local_files(source: SourceConfig) -> list[Path]:
    """Return the files of a source on this machine, in the order in which they are read; none of one on the hub."""
    if not is_local(source.path):
        return []
    path = Path(source.path)
    if source.revision or (source.subset and path.is_file()):
        option = "revision" if source.revision else "subset"
        raise ValueError(f"data.sources {path}: {option} must be null for what is on this machine, which has none")
    files = [path] if path.is_file() else _split_files(source)
    kinds = sorted({file.suffix for file in files})
    if len(kinds) > 1 or not set(kinds) <= set(SUFFIXES):
        raise ValueError(f"{path} must be of {', '.join(SUFFIXES)}, one kind in a folder, got {', '.join(kinds)}")
    return files


def _split_files(source: SourceConfig) -> list[Path]:
    """Return the files of a folder that are of a split, by its README.md or their names, as `datasets` reads these."""
    from datasets import load_dataset_builder

    with _reading(source.path):
        data_files = load_dataset_builder(source.path, source.subset).config.data_files or {}
    splits = {str(name): [Path(file) for file in files] for name, files in data_files.items()}
    if source.split not in splits:
        raise ValueError(f"{source.path} has no split {source.split!r}; it has {', '.join(splits) or 'none'}")
    folder = Path(source.path).resolve()
    if not (folder / "README.md").is_file():
        all_files = {file for file in folder.rglob("*") if file.suffix in SUFFIXES}
        if left := sorted(all_files - {file.resolve() for files in splits.values() for file in files}):
            raise ValueError(
                f"{left[0]} is of none of the splits that the names of the files tell ({', '.join(splits)}): "
                "put it into another folder, or give the files as sources of their own"
            )
    return splits[source.split]


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what `datasets` raises into one sentence."""
    try:
        yield
    except Exception as error:  # it raises many types for one cause: the data cannot be had
        reason = " ".join(str(error).split())[:200]
        what = "cannot be read" if Path(path).exists() else "is not here and not a dataset of the hub that can be had"
        raise ValueError(f"{path} {what}: {reason}") from None


def dataset_rows(source: SourceConfig, seed: int = 0, whole: bool = False) -> Iterator[Row]:
    """Read a dataset of the hub, or a folder of the same form, through `datasets`."""
    from datasets import load_dataset

    with _reading(source.path):
        dataset = load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
        names = list(dataset.column_names or [])
        if columns := [] if whole else _needed(names):
            dataset = dataset.select_columns(columns)
        if source.streaming:
            rows = iter(dataset.shuffle(seed=seed, buffer_size=_SHUFFLED_ROWS))
        else:
            rows = _rows_of(dataset.with_format("arrow").iter(_BATCH_ROWS))
        yield from _placed(source.path, rows, names)


def _parquet_rows(path: Path, whole: bool) -> Iterator[Row]:
    """Read the columns that matter, or all; without read-ahead, which would hold those of the whole file."""
    from pyarrow.parquet import ParquetFile

    with _reading(str(path)), ParquetFile(path, pre_buffer=False) as file:
        names = file.schema_arrow.names
        tables = file.iter_batches(_BATCH_ROWS, columns=None if whole else _needed(names) or None)
        yield from _placed(str(path), _rows_of(tables), names)


def _needed(columns: list[str]) -> list[str]:
    """Return the columns that a prompt is read from; none if there is nothing to read: an error then names all."""
    known = [name for name in columns if name in READ]
    return known if set(known) & set(FIELDS) else []


def _rows_of(tables: Iterable[Any]) -> Iterator[Any]:
    for table in tables:
        try:
            yield from table.to_pylist()
        except UnicodeDecodeError as error:
            if len(table) == 1:
                yield ValueError(f"is not valid UTF-8: {error}")
            else:
                yield from _rows_of(table.slice(number, 1) for number in range(len(table)))


def _placed(path: str, rows: Iterable[Any], columns: Iterable[str] = ()) -> Iterator[Row]:
    """Yield rows with where they stand; those of a table with all its columns, None in those that are not read."""
    empty = dict.fromkeys(columns)
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", {**empty, **row} if empty and isinstance(row, dict) else row


def _json_lines(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        kind = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else "malformed JSON"
        return ValueError(f"is {kind}: {error}")
    except RecursionError:
        return ValueError("is nested too deeply")


def _json_values(path: Path) -> Iterator[Any]:
    """Read the items of a JSON list, or the one object or several that a file holds, a chunk at a time."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        text = ""
        while not text and (chunk := file.read(_CHUNK)):
            text = chunk.lstrip()
        in_list = text.startswith("[")
        at, number = int(in_list), 0
        while True:
            gap = _GAP.match(text, at)
            at = gap.end() if gap else at
            if in_list and text.startswith("]", at):
                return
            try:
                value, at = decode(text, at)
            except json.JSONDecodeError as error:
                more = file.read(max(_CHUNK, len(text) - at))
                if not more and at == len(text) and not in_list:
                    return
                if not more:
                    raise ValueError(f"{path} is malformed JSON after item {number}: {error.msg}") from None
                text, at = text[at:] + more, 0
                continue
            except RecursionError:
                raise ValueError(f"{path} is nested too deeply in item {number + 1}") from None
            number += 1
            yield value


_READERS = {
    ".json": lambda path, _: _placed(str(path), _json_values(path)),
    ".jsonl": lambda path, _: _json_lines(path),
    ".parquet": _parquet_rows,
}
