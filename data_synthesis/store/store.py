"""The hidden-state store: a folder of a few large shards (shard.py), read by sample.

A store for online training has shards without states, and `"states": false` in the settings of its manifest.

What is needed to find a sample is in one file (`index.safetensors`): a store of thousands of shards opens at once. A
shard's header is compared with the manifest when it is first used, the rest of it by `HiddenStateStore.verify`.
"""

from __future__ import annotations

import bisect
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...conf.runtime.artifact import commit, read_manifest, sync
from .shard import CURE, TOKENS, MappedShard, Sample, check_size

VOCABULARY_FILE, COUNTS_FILE, INDEX_FILE = "vocab_map.safetensors", "token_counts.safetensors", "index.safetensors"
TOKENS_FOLDER = "tokens"  # in a store with states: the store without, from which it is made


def write_index(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Write what finds a sample in the shards of a store."""
    ids, lengths, num_images = list[str](), list[Tensor](), list[int]()
    for entry in entries:
        shard = MappedShard(folder / entry["file"], entry)
        ids += shard.ids
        lengths.append(shard.tensors["sample_offsets"].diff().to(torch.int32))
        found = shard.image_records
        num_images += [len(found[number].digests) if number in found else 0 for number in range(entry["samples"])]
    names = torch.frombuffer(bytearray(json.dumps(ids).encode()), dtype=torch.uint8)
    images = torch.tensor(num_images, dtype=torch.int32)
    save_tensors({"lengths": torch.cat(lengths), "num_images": images, "sample_ids": names}, folder / INDEX_FILE)


def sidecar_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums that the manifest has of the files next to the shards."""
    return {name: _file_checksum(folder / name) for name in (INDEX_FILE, COUNTS_FILE) if (folder / name).is_file()}


def load_sidecar(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Read a file next to the shards; raise ValueError if it is missing or was altered."""
    path = folder / name
    try:
        found = _file_checksum(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}): {CURE}") from None
    if found != manifest["files"].get(name):
        raise ValueError(f"{path} does not have the checksum of the manifest, it was altered: {CURE}")
    return load_file(path)


def is_intact(folder: Path, shards: list[dict[str, Any]]) -> bool:
    """Return whether a complete store has lost none of its files."""
    return all((folder / name).is_file() for name in (INDEX_FILE, COUNTS_FILE, *(entry["file"] for entry in shards)))


def totals(shards: list[dict[str, Any]]) -> dict[str, int]:
    """Return the sums of what the entries of shards say."""
    return {name: sum(entry[name] for entry in shards) for name in ("samples", "tokens", "counted_tokens", "bytes")}


def left_out(counts: dict[str, int], max_length: int) -> str:
    """Say what of the conversations is not in the store, and why."""
    unknown, images = counts.get("unknown_tokens"), counts["images"]
    others = f", {unknown} conversations with tokens that the verifier has no embedding of" if unknown else ""
    others += f", {images} conversations whose images cannot be read" if images else ""
    return (
        f"{counts['truncated_answers']} truncated answers, {counts['truncated']} conversations without any other, "
        f"{counts['too_long']} sequences of which no answer ends within dump.max_length={max_length}, "
        f"{counts.get('cut_answers', 0)} answers beyond it of others, "
        f"{counts['template']} conversations without an exact loss mask{others}"
    )


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a small safetensors file so that a reader sees the old one or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    sync(temporary)
    commit(temporary, path)


def _file_checksum(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


class HiddenStateStore:
    """A complete store, read by sample; shards are mapped when they are first used, and samples are views of them.

    A forked process reads the same mappings, a pickled store maps for itself. Without `with_states`, samples have no
    states, whether the shards hold them or not. Raises ValueError if it is missing, incomplete or lacks states, or if
    a file (named) is missing, truncated or altered.
    """

    def __init__(self, folder: Path, with_states: bool = True) -> None:
        self.folder = folder
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
        index = load_sidecar(folder, self.manifest, INDEX_FILE)
        lengths = index["lengths"].numpy()
        self.ids: list[str] = json.loads(index["sample_ids"].numpy().tobytes())
        self.lengths: list[int] = lengths.tolist()
        self.num_images: list[int] = index["num_images"].tolist()
        counts = [entry["samples"] for entry in self.entries]
        self._first_samples = list(itertools.accumulate(counts, initial=0))  # of each shard, and the end
        ends = np.cumsum(lengths, dtype=np.int64)
        firsts = np.concatenate([[0], ends])[self._first_samples[:-1]]
        self._starts = ends - lengths - np.repeat(firsts, counts)  # first token of each sample, in its shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": [None] * len(self._shards)}

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Read every shard (or this share of them, among several readers) and compare all checksums."""
        load_sidecar(self.folder, self.manifest, COUNTS_FILE)
        for number in range(share, len(self._shards), shares):
            self.map_shard(number).verify()

    def not_finite(self, number: int) -> list[str]:
        """Return the ids of the samples of a shard of which some states are not finite."""
        return [self.ids[self._first_samples[number] + sample] for sample in self.map_shard(number).not_finite()]

    def map_shard(self, number: int) -> MappedShard:
        """Return a shard, mapped."""
        if (shard := self._shards[number]) is None:
            entry = self.entries[number]
            shard = self._shards[number] = MappedShard(self.folder / entry["file"], entry)
        return shard

    def __len__(self) -> int:
        return len(self.ids)

    def _place(self, index: int) -> tuple[MappedShard, int, slice]:
        """Return the shard of a sample, its number there and the place of its tokens."""
        number = bisect.bisect_right(self._first_samples, index) - 1
        start = int(self._starts[index])
        return self.map_shard(number), index - self._first_samples[number], slice(start, start + self.lengths[index])

    def loss_mask(self, index: int) -> Tensor:
        """Return the loss mask of a sample (uint8 [T])."""
        shard, _, place = self._place(index)
        return shard.tensors["loss_mask"][place]

    def __getitem__(self, index: int) -> Sample:
        shard, number, place = self._place(index)
        ids, mask = (shard.tensors[name][place] for name in TOKENS)
        sample = Sample(self.ids[index], ids, mask, image_record=shard.image_records.get(number))
        return replace(sample, **shard.states(number, place)) if self.with_states else sample

    def shard_samples(self, number: int) -> range:
        """Return the samples of a shard."""
        return range(self._first_samples[number], self._first_samples[number + 1])
