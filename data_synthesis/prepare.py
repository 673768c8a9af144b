"""Prompts of a run, ready to be answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..conf.artifact import digest
from ..conf.schema import Config
from .prompts import Prompt, load_prompts


@dataclass(frozen=True)
class PreparedPrompts:
    folder: Path
    count: int
    digest: str
    counts: dict[str, Any]

    def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[Prompt]:
        with open(self.folder / "prompts.jsonl", "rb") as f:
            for n, line in enumerate(f):
                if n % num_shards == shard:
                    r = json.loads(line)
                    yield Prompt(r["id"], r["source"], tuple(r["turns"]), r["system"])


def prepare_prompts(config: Config) -> PreparedPrompts:
    prompts = load_prompts(config.data)
    config.prompts_folder.mkdir(parents=True, exist_ok=True)
    (config.prompts_folder / "prompts.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in prompts))
    return PreparedPrompts(config.prompts_folder, len(prompts), digest([asdict(p) for p in prompts]), {})
