"""The hidden-state store: a few large safetensors shards, the tokens of many samples laid end to end in each.

| tensor              | shape    | dtype                                                               |
|---------------------|----------|---------------------------------------------------------------------|
| `input_ids`         | [N]      | int32                                                               |
| `loss_mask`         | [N]      | uint8, 1 where the verifier produced the token (end-of-turn too)    |
| `sample_offsets`    | [S+1]    | int64                                                               |
| `aux_hidden_states` | [N, A*H] | the verifier's, layers ascending                                    |
| `last_hidden_state` | [N, H]   | what the verifier's lm_head multiplies (final norm applied)         |

A store for online training has the first three only, and `"states": false` in the settings of its manifest.
The ids of a shard's samples are in its safetensors metadata (`sample_ids`, JSON).
"""

from __future__ import annotations

import bisect
import itertools
import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..conf.artifact import commit, file_digest, read_manifest, sync

VOCABULARY_FILE, COUNTS_FILE = "vocab_map.safetensors", "token_counts.safetensors"
_STATES = ("aux_hidden_states", "last_hidden_state")
_CURE = "delete the file and run `fledge dump` again"


@dataclass
class Sample:
    """One conversation of T tokens, with what the verifier saw or before it has read them."""

    id: str
    input_ids: Tensor  # int32 [T]
    loss_mask: Tensor  # uint8 [T]
    aux_hidden_states: Tensor | None = None  # [T, A*H]
    last_hidden_state: Tensor | None = None  # [T, H]
    images: tuple[str, ...] = ()  # paths, URLs or data URLs of those the verifier reads in it, in their order


def shard_name(number: int) -> str:
    """Give the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, samples: list[Sample]) -> dict[str, Any]:
    """Write samples, all with states or all without, as one shard, durably, and give its entry for the manifest."""
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    tensors = {
        "input_ids": torch.cat([sample.input_ids for sample in samples]).to(torch.int32),
        "loss_mask": torch.cat([sample.loss_mask for sample in samples]).to(torch.uint8),
        "sample_offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        **_states(samples),
    }
    path = folder / shard_name(number)
    temporary = folder / f".{path.name}.tmp"
    save_file(tensors, temporary, metadata={"sample_ids": json.dumps([sample.id for sample in samples])})
    sync(temporary)
    checksum = file_digest(temporary)
    commit(temporary, path)
    return {
        "file": path.name,
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "counted_tokens": int(tensors["loss_mask"].sum()),
        "bytes": path.stat().st_size,
        "sha256": checksum,
    }


def _states(samples: list[Sample]) -> dict[str, Tensor]:
    tensors = {}
    for name in _STATES:
        states = [state for sample in samples if (state := getattr(sample, name)) is not None]
        assert len(states) in (0, len(samples))
        if states:
            tensors[name] = torch.cat(states)
    return tensors


class HiddenStateStore:
    """A complete store, read by sample; shards are mapped, and only what is asked for is copied.

    Another process can be given one: a fork reads the same mappings, a pickled one maps each shard at its first use.

    Args:
        with_states: false gives samples without states, whether the shards hold them or not.

    Raises:
        ValueError: the store is missing or incomplete, has no states and is asked for them, or a shard is missing,
            truncated or altered (named).
    """

    def __init__(self, folder: Path, with_states: bool = True) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder, "hidden_states")
        self._shards: list[Any] = [None] * len(self.manifest["shards"])
        self.with_states = with_states
        if with_states and not self.manifest["settings"].get("states", True):
            raise ValueError(
                f"{folder} holds tokens without hidden states: train with train.hidden_states=online, or run "
                "`fledge dump` with train.hidden_states=offline into another folder (dump.folder)"
            )
        self.ids: list[str] = []
        self.lengths: list[int] = []
        self._starts = array("q")  # first token of each sample, in its shard
        self._first_samples: list[int] = []  # of each shard
        for number in range(len(self._shards)):
            offsets, ids = self._read_index(number)
            self._first_samples.append(len(self.ids))
            self._starts.extend(offsets[:-1])
            self.ids.extend(ids)
            self.lengths.extend(end - start for start, end in itertools.pairwise(offsets))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": [None] * len(self._shards)}

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Read every shard (or this share of them, among several readers) and compare its checksum."""
        for entry in self.manifest["shards"][share::shares]:
            path = self.folder / entry["file"]
            if file_digest(path) != entry["sha256"]:
                raise ValueError(f"{path} does not have the checksum of the manifest, it was altered: {_CURE}")

    def _shard(self, number: int) -> Any:
        """Give a shard, mapped."""
        if self._shards[number] is None:
            entry = self.manifest["shards"][number]
            path = self.folder / entry["file"]
            if not path.is_file():
                raise ValueError(f"{path} is missing: run `fledge dump` again")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: {_CURE}")
            try:
                shard = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} cannot be read as safetensors ({error}): {_CURE}") from None
            self._shards[number] = shard.__enter__()
        return self._shards[number]

    def _read_index(self, number: int) -> tuple[list[int], list[str]]:
        """Give a shard's sample offsets and sample ids."""
        shard = self._shard(number)
        try:
            return shard.get_tensor("sample_offsets").tolist(), json.loads(shard.metadata()["sample_ids"])
        except (SafetensorError, KeyError, TypeError) as error:
            path = self.folder / self.manifest["shards"][number]["file"]
            raise ValueError(f"{path} is not a shard of hidden states ({error}): {_CURE}") from None

    def __len__(self) -> int:
        return len(self.ids)

    def _place(self, index: int) -> tuple[Any, slice]:
        """Give the shard of a sample and where it lies there."""
        start = self._starts[index]
        shard = self._shard(bisect.bisect_right(self._first_samples, index) - 1)
        return shard, slice(start, start + self.lengths[index])

    def loss_mask(self, index: int) -> Tensor:
        """Read the loss mask of a sample (uint8 [T]) and nothing else of it."""
        shard, place = self._place(index)
        return shard.get_slice("loss_mask")[place]

    def __getitem__(self, index: int) -> Sample:
        shard, place = self._place(index)
        names = ("input_ids", "loss_mask", *(_STATES if self.with_states else ()))
        return Sample(self.ids[index], *(shard.get_slice(name)[place] for name in names))
