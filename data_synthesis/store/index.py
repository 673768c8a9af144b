"""What a hidden-state store is and where its samples are; it does without torch.

What is needed to find a sample is in one file (`index.safetensors`): a store of thousands of shards opens at once. A
shard's header is compared with the manifest when it is first used, the rest of it by `StoreIndex.verify`.
"""

import bisect
import itertools
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ...conf.runtime.artifact import read_manifest
from ..heldout import is_heldout
from .mapped_shard import CURE, MappedShard, check_size, checksum

VOCABULARY_FILE, COUNTS_FILE, INDEX_FILE = "vocab_map.safetensors", "token_counts.safetensors", "index.safetensors"
TOKENS_FOLDER = "tokens"  # in a store with states: the store without, from which it is made


def spread(count: int, most: int) -> list[int]:
    """Return `most` numbers below `count`, evenly from all over; all of them if they are no more."""
    return sorted({number * count // most for number in range(most)}) if count else []


def sidecar_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums that the manifest has of the files next to the shards."""
    return {
        name: checksum((folder / name).read_bytes()) for name in (INDEX_FILE, COUNTS_FILE) if (folder / name).is_file()
    }


def check_sidecar(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """Return the path of a file next to the shards; raise ValueError if it is missing or was altered."""
    path = folder / name
    try:
        found = checksum(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): {CURE}") from None
    if found != manifest["files"].get(name):
        raise ValueError(f"{path} does not have the checksum of the manifest, it was altered: {CURE}")
    return path


def is_intact(folder: Path, shards: list[dict[str, Any]]) -> bool:
    """Return whether a complete store has lost none of its files."""
    return all((folder / name).is_file() for name in (INDEX_FILE, COUNTS_FILE, *(entry["file"] for entry in shards)))


def totals(shards: list[dict[str, Any]]) -> dict[str, int]:
    """Return the sums of what the entries of shards say."""
    return {name: sum(entry[name] for entry in shards) for name in ("samples", "tokens", "counted_tokens", "bytes")}


def left_out(counts: dict[str, int], max_length: int) -> str:
    """Return what of the conversations is not in the store, and why."""
    unknown, images = counts.get("unknown_tokens"), counts["images"]
    others = f", {unknown} conversations with tokens that the verifier has no embedding of" if unknown else ""
    others += f", {images} conversations whose images cannot be read" if images else ""
    return (
        f"{counts['truncated_answers']} truncated answers, {counts['truncated']} conversations without any other, "
        f"{counts['too_long']} sequences of which no answer ends within dump.max_length={max_length}, "
        f"{counts.get('cut_answers', 0)} answers beyond it of others, "
        f"{counts['template']} conversations without an exact loss mask{others}"
    )


class StoreIndex:
    """A complete store, and where its samples are; shards are mapped when they are first used.

    A forked process reads the same mappings, a pickled store maps for itself. Raises ValueError if it is missing,
    incomplete or lacks states (`with_states`), or if a file (named) is missing, truncated or altered.
    """

    def __init__(self, folder: str | Path, with_states: bool = True) -> None:
        self.folder = folder = Path(folder)
        self.manifest = read_manifest(folder, "hidden_states")
        self.with_states = with_states
        if with_states and not self.manifest["settings"].get("states", True):
            raise ValueError(
                f"{folder} holds tokens without hidden states: train with train.hidden_states=online, or run "
                "`fledge dump` with train.hidden_states=offline into another folder (dump.folder)"
            )
        self.entries: list[dict[str, Any]] = self.manifest["shards"]
        self._shards: list[MappedShard | None] = [None] * len(self.entries)
        for entry in self.entries:
            check_size(folder / entry["file"], entry)
        index = load_file(check_sidecar(folder, self.manifest, INDEX_FILE))
        lengths = index["lengths"]
        self.ids: list[str] = json.loads(index["sample_ids"].tobytes())
        self.lengths: list[int] = lengths.tolist()
        self.num_images: list[int] = index["num_images"].tolist()
        counts = [entry["samples"] for entry in self.entries]
        self._first_samples = list(itertools.accumulate(counts, initial=0))  # of each shard, and the end
        ends = np.cumsum(lengths, dtype=np.int64)
        firsts = np.concatenate([[0], ends])[self._first_samples[:-1]]
        self._starts = ends - lengths - np.repeat(firsts, counts)  # first token of each sample, in its shard

    @cached_property
    def heldout_ids(self) -> set[str]:
        """Return the ids of the samples that it holds out, by the share that it was made with."""
        share = self.manifest["settings"]["heldout_share"]
        return {name for name in self.ids if is_heldout(name, share)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": [None] * len(self._shards)}

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Read every shard (or this share of them, among several readers) and compare all checksums."""
        check_sidecar(self.folder, self.manifest, COUNTS_FILE)
        for number in range(share, len(self._shards), shares):
            self.map_shard(number).verify()

    def map_shard(self, number: int) -> MappedShard:
        """Return a shard, mapped."""
        if (shard := self._shards[number]) is None:
            entry = self.entries[number]
            shard = self._shards[number] = MappedShard(self.folder / entry["file"], entry)
        return shard

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, index: int) -> tuple[MappedShard, int, slice]:
        """Return the shard of a sample, its number there and the place of its tokens."""
        number = bisect.bisect_right(self._first_samples, index) - 1
        start = int(self._starts[index])
        return self.map_shard(number), index - self._first_samples[number], slice(start, start + self.lengths[index])

    def shard_samples(self, number: int) -> range:
        """Return the samples of a shard."""
        return range(self._first_samples[number], self._first_samples[number + 1])
