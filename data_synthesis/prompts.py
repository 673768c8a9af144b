"""Prompts for the verifier: user turns with stable ids, from chat datasets of the usual forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conf.schema import DataConfig, SourceConfig
from ..models.embedded.corpus import prompts as embedded_prompts


@dataclass(frozen=True)
class Prompt:
    """The user's side of a conversation."""

    id: str  # source/split/original id
    source: str
    turns: tuple[str, ...]
    system: str | None = None


def load_prompts(config: DataConfig) -> list[Prompt]:
    """Load the prompts of every source, in order.

    Raises:
        ValueError: a source cannot be read, has an unknown form, or two prompts share an id.
    """
    if not config.sources:
        raise ValueError("data.sources is required: choose data=ultrachat_magpie, data=embedded or give sources")
    prompts = [prompt for source in config.sources for prompt in _load_source(source, config.seed)]
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(
                f"data.sources: two prompts have the id {prompt.id!r}: give sources different names, rows different ids"
            )
        seen.add(prompt.id)
    if not prompts:
        raise ValueError("data.sources yield no prompt")
    return prompts


def _load_source(source: SourceConfig, seed: int) -> Iterator[Prompt]:
    name = source.name or Path(source.path).stem
    rows: Iterable[dict[str, Any]]
    if source.path == "embedded":
        rows = embedded_prompts(source.limit or 1000, seed)
    else:
        rows = load_rows(source.path, source.split, source.revision)
    for number, row in enumerate(rows):
        if source.limit is not None and number >= source.limit:
            break
        yield _prompt_of(row, number, f"{name}/{source.split}", source.path)


def load_rows(path: str, split: str = "train", revision: str | None = None) -> Iterator[dict[str, Any]]:
    """Read rows of a local JSON, JSONL or Parquet file or folder, or of a dataset on the hub.

    Raises:
        ValueError: there is no such file or dataset, or a line is malformed (named by its number).
    """
    local = Path(path)
    if local.suffix in (".jsonl", ".json") and local.is_file():
        yield from _json_lines(local)
        return
    if local.suffix and "/" not in path.strip("./") and not local.exists():
        raise ValueError(f"{path} does not exist")
    from datasets import load_dataset

    try:
        if local.suffix == ".parquet":
            dataset = load_dataset("parquet", data_files=str(local), split="train")
        else:
            dataset = load_dataset(path, split=split, revision=revision)
    except Exception as error:  # datasets raises many types for one cause: it cannot be had
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path!r} is neither a dataset file or folder here nor a reachable hub id: {reason}"
        ) from None
    yield from dataset


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".json":
        rows = _parse_json(path.read_bytes(), str(path))
        yield from rows if isinstance(rows, list) else [rows]
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parse_json(line, f"{path} line {number}")


def _parse_json(content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{place} is malformed: {error}") from None


def _prompt_of(row: Any, number: int, prefix: str, path: str) -> Prompt:
    """Read one row: OpenAI `messages`, ShareGPT `conversations`, `turns` (MT-Bench) or a plain `prompt`."""
    place = f"{path} row {number + 1}"
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be an object, got {type(row).__name__}")
    original = next(
        (row[key] for key in ("prompt_id", "uuid", "id", "question_id") if row.get(key) is not None), number
    )
    system: str | None = None
    if isinstance(row.get("messages"), list):
        turns, system = _user_side(row["messages"], "role", "content", place)
    elif isinstance(row.get("conversations"), list):
        turns, system = _user_side(row["conversations"], "from", "value", place)
    elif isinstance(row.get("turns"), list):
        turns = list(row["turns"])
    elif isinstance(row.get("prompt"), str):
        turns = [row["prompt"]]
    else:
        raise ValueError(
            f"{place} has the fields {', '.join(map(str, row))}; "
            "one of messages, conversations, turns or prompt is required"
        )
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{place} has no user turn or an empty one")
    return Prompt(id=f"{prefix}/{original}", source=prefix, turns=tuple(turns), system=system)


def _user_side(messages: list[Any], role: str, content: str, place: str) -> tuple[list[Any], str | None]:
    """Give the user turns and the system message of a conversation."""
    if not all(isinstance(message, dict) and role in message and content in message for message in messages):
        raise ValueError(f"{place}: every message needs {role!r} and {content!r}")
    turns = [message[content] for message in messages if message[role] in ("user", "human")]
    return turns, next((message[content] for message in messages if message[role] == "system"), None)
