"""The hidden-state store: a folder of a few large shards (shard.py) and their index (index.py), read by sample.

A store for online training has shards without states, and `"states": false` in the settings of its manifest.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...conf.runtime.artifact import commit, sync
from .index import INDEX_FILE, StoreIndex, check_sidecar
from .mapped_shard import AUX_STATES, LAST_STATES, STATES, TOKENS, MappedShard, offsets_of, rows_of
from .shard import Sample
from .state_format import FLOAT8, target_positions


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


def load_sidecar(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Read a file next to the shards; raise ValueError if it is missing or was altered."""
    return load_file(check_sidecar(folder, manifest, name))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a small safetensors file so that a reader sees the old one or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    sync(temporary)
    commit(temporary, path)


class HiddenStateStore(StoreIndex):
    """A complete store, read by sample; samples are views of its shards.

    Without `with_states`, samples have no states, whether the shards hold them or not.
    """

    _aux_places: list[int] | None = None

    def read_layers(self, aux_layers: list[int]) -> None:
        """Read of the stored aux layers these alone, in this order; ValueError if one is not stored."""
        stored: list[int] = self.manifest["settings"]["aux_layers"]
        if not set(aux_layers) <= set(stored):
            raise ValueError(
                f"draft.aux_layers is {aux_layers}, {self.folder} holds layers {stored}: set some of these or dump anew"
            )
        self._aux_places = None if aux_layers == stored else [stored.index(layer) for layer in aux_layers]

    def not_finite(self, number: int) -> list[str]:
        """Return the ids of the samples of a shard with states that are not finite: a float8 state's scale tells it."""
        tensors, found = self.map_shard(number).tensors, set[int]()
        for name, scale in (AUX_STATES, LAST_STATES):
            values, borders = tensors.get(scale, tensors[name]), tensors[offsets_of(tensors, name)]
            found |= {n for n, (a, b) in enumerate(pairwise(borders.tolist())) if not _is_finite(values[a:b])}
        return [self.ids[self.shard_samples(number)[sample]] for sample in sorted(found)]

    def loss_mask(self, index: int) -> Tensor:
        """Return the loss mask of a sample (uint8 [T])."""
        shard, _, place = self.place(index)
        return shard.tensors["loss_mask"][place]

    def __getitem__(self, index: int) -> Sample:
        shard, number, place = self.place(index)
        tensors = shard.tensors
        ids, mask = (tensors[name][place] for name in TOKENS)
        sample = Sample(self.ids[index], ids, mask, image_record=shard.image_records.get(number))
        if not self.with_states:
            return sample
        states = _states(tensors, number, mask)
        if self._aux_places is not None:
            layers = len(self.manifest["settings"]["aux_layers"])
            for name in states.keys() & AUX_STATES:
                stored = states[name]
                bits = stored.view(torch.uint8) if stored.dtype == FLOAT8 else stored  # which torch cannot select from
                states[name] = bits.unflatten(-1, (layers, -1))[:, self._aux_places].flatten(-2).view(stored.dtype)
        return replace(sample, **states)


def _states(tensors: dict[str, Tensor], number: int, loss_mask: Tensor) -> dict[str, Any]:
    """Return the states of a shard's sample; last states that are not kept are zeros."""
    names = [name for name in STATES if name in tensors]
    found = {name: tensors[name][slice(*rows_of(tensors, name, number))] for name in names}
    if "last_offsets" in tensors:
        is_target = target_positions(loss_mask)
        for name in found.keys() & LAST_STATES:
            rows = found[name]
            found[name] = rows.new_zeros(len(is_target), rows.shape[1])
            found[name][is_target] = rows
    return found


def _is_finite(tensor: Tensor) -> bool:
    # By the bounds, NaN or infinite if a value is: isfinite() of all would take thirty times as long on the CPU.
    return not tensor.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))
