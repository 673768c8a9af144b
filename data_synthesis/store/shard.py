"""A shard of the hidden-state store: one safetensors file, the tokens of many samples laid end to end.

| tensor              | shape    | dtype                                                                       |
|---------------------|----------|-----------------------------------------------------------------------------|
| `input_ids`         | [N]      | int32                                                                       |
| `loss_mask`         | [N]      | uint8, 1 where the verifier produced the token (end-of-turn too)            |
| `sample_offsets`    | [S+1]    | int64                                                                       |
| `aux_hidden_states` | [N, A*H] | the verifier's, layers ascending                                            |
| `last_hidden_state` | [N, H]   | what the verifier's lm_head multiplies (final norm applied)                 |
| `aux_scale`         | [N, A]   | float32, if states are float8 (state_format.py)                             |
| `last_scale`        | [N, 1]   | float32, likewise                                                           |
| `last_offsets`      | [S+1]    | int64, if the last states of target positions alone are kept: N is theirs    |

A shard for online training has the first three only. `part-00003.safetensors` has the same form, and holds what a
writer had of shard 3 when it was interrupted.

The file's metadata hold, as one JSON object (of several, the order would be left to chance), the ids of its samples
(`sample_ids`), where the conversations of those with images stand (`image_records`), and a checksum of every tensor
(`checksums`, XXH3-128). The store's manifest has a checksum of each shard's header, which so covers the whole file.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...conf.runtime.artifact import commit, sync
from .host_copies import to_device
from .mapped_shard import (
    ABOUT,
    LAST_STATES,
    STATES,
    ImageRecord,
    MappedShard,
    checksum,
    offsets_of,
    part_name,
    rows_of,
    shard_entry,
    shard_name,
)
from .state_format import FLOAT8, StateFormat, decode, target_positions


@dataclass
class Sample:
    """One conversation of T tokens, with what the verifier saw or before it has read them."""

    id: str
    input_ids: Tensor  # int32 [T]
    loss_mask: Tensor  # uint8 [T]
    aux_hidden_states: Tensor | None = None  # [T, A*H]
    last_hidden_state: Tensor | None = None  # [T, H]
    aux_scale: Tensor | None = None  # float32 [T, A], of float8
    last_scale: Tensor | None = None  # float32 [T, 1]
    image_record: ImageRecord | None = None
    images: tuple[str, ...] = ()  # paths, URLs or data URLs of those the verifier reads in it; a dump fills them in

    def decoded(self) -> Self:
        """Return the sample with float8 states as bfloat16, which holds each of their values; others as they are."""
        if self.aux_scale is None or self.aux_hidden_states is None or self.last_hidden_state is None:
            return self
        aux = decode(self.aux_hidden_states, self.aux_scale, torch.bfloat16)
        last = decode(self.last_hidden_state, self.last_scale, torch.bfloat16)
        return replace(self, aux_hidden_states=aux, last_hidden_state=last, aux_scale=None, last_scale=None)


@dataclass
class Shard:
    """What one file holds, in memory."""

    ids: list[str]
    tensors: dict[str, Tensor]
    image_records: dict[int, ImageRecord] = field(default_factory=dict)  # by sample
    buffers: dict[str, Tensor] = field(default_factory=dict)  # flat, behind states; for another shard once written
    made_with: str = ""  # digest of the settings of its store
    is_part: bool = False  # what an interrupted writer had of one

    @classmethod
    def of(cls, samples: list[Sample], buffers: dict[str, Tensor] | None = None) -> Self:
        """Lay samples end to end, all with states or all without, in buffers of a shard that is written, if any.

        Fresh memory costs as much as writing it does.
        """
        tensors = {
            "input_ids": torch.cat([sample.input_ids for sample in samples]).to(torch.int32),
            "loss_mask": torch.cat([sample.loss_mask for sample in samples]).to(torch.uint8),
            "sample_offsets": _offsets(torch.tensor([len(sample.input_ids) for sample in samples])),
        }
        for name in STATES:
            if getattr(samples[0], name) is not None:
                tensors[name] = torch.cat([getattr(sample, name) for sample in samples])
        records = {number: sample.image_record for number, sample in enumerate(samples) if sample.image_record}
        return cls([sample.id for sample in samples], tensors, records, buffers or {})

    def encode(self, number: int, aux: Tensor, last: Tensor, form: StateFormat) -> dict[str, Tensor]:
        """Return aux [T, A*H] and last states [T, H] as they are stored, by name, and the `bounds` of their values."""
        if form.only_counted:
            start, end = self.tensors["sample_offsets"][number : number + 2].tolist()
            rows = target_positions(self.tensors["loss_mask"][start:end]).nonzero().squeeze(1)
            last = last.index_select(0, to_device(rows, last.device))
        encoded = form.encode(aux, aux.shape[-1] // last.shape[-1]), form.encode(last, 1)
        bounding = [states if scale is None else scale for states, scale in encoded]
        bounds = torch.stack([bound for values in bounding if values.numel() for bound in torch.aminmax(values)])
        named = zip((*STATES, "bounds"), (*encoded[0], *encoded[1], bounds), strict=True)
        return {name: value for name, value in named if value is not None}

    def part(self, numbers: list[int]) -> "Shard":
        """Copy samples that have their states, to go on with after an interruption."""
        tensors = {}
        for name, tensor in self.tensors.items():
            if name.endswith("_offsets"):
                tensors[name] = _offsets(tensor.diff()[numbers])
            else:
                rows = torch.cat([torch.arange(*rows_of(self.tensors, name, number)) for number in numbers])
                tensors[name] = tensor.view(torch.uint8)[rows].view(FLOAT8) if tensor.dtype == FLOAT8 else tensor[rows]
        records = {new: self.image_records[old] for new, old in enumerate(numbers) if old in self.image_records}
        return Shard([self.ids[number] for number in numbers], tensors, records, {}, self.made_with, True)

    def take(self, part: MappedShard) -> list[int]:
        """Put the states of a part in their places, and return the numbers of its samples."""
        numbers = {name: number for number, name in enumerate(self.ids)}
        taken = [numbers[name] for name in part.ids]
        for name in (name for name in STATES if name in part.tensors):
            states = part.tensors[name]
            states = states.view(FLOAT8) if states.dtype == torch.uint8 else states
            for place, number in enumerate(taken):
                theirs = states[slice(*rows_of(part.tensors, name, place))]
                self._room(name, number, theirs, "last_offsets" in part.tensors)[:] = theirs
        return taken

    def set_states(self, number: int, encoded: dict[str, Tensor], form: StateFormat) -> bool:
        """Put what `encode` returned, on the host, in its place, and return whether it is finite."""
        for name in (name for name in STATES if name in encoded):
            self._room(name, number, encoded[name], form.only_counted)[:] = encoded[name]
        return bool(encoded["bounds"].isfinite().all())

    def _room(self, name: str, number: int, like: Tensor, only_counted: bool) -> Tensor:
        """Return the place of a sample's states; the first call makes those of all samples."""
        if only_counted and name in LAST_STATES and "last_offsets" not in self.tensors:
            masks = self.tensors["loss_mask"].split(self.tensors["sample_offsets"].diff().tolist())
            self.tensors["last_offsets"] = _offsets(torch.stack([target_positions(mask).sum() for mask in masks]))
        if name not in self.tensors:
            rows, width = int(self.tensors[offsets_of(self.tensors, name)][-1]), like.shape[-1]
            buffer = self.buffers.get(name)
            if buffer is None or len(buffer) < rows * width or buffer.dtype != like.dtype:
                size = rows * width + rows * width // 16  # the next shard may be larger
                buffer = self.buffers[name] = torch.empty(size, dtype=like.dtype)
            self.tensors[name] = buffer[: rows * width].view(rows, width)
        return self.tensors[name][slice(*rows_of(self.tensors, name, number))]


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def open_part(folder: Path, number: int, made_with: str) -> MappedShard | None:
    """Read what an interrupted writer has left of a shard with these settings, if it has."""
    path = folder / part_name(number)
    if not path.is_file() or (entry := shard_entry(path))["made_with"] != made_with:
        return None
    part = MappedShard(path, entry)
    part.verify()
    return part


def write_shard(folder: Path, number: int, shard: Shard, scratch: Path | None = None) -> dict[str, Any]:
    """Write a shard durably and return its entry for the manifest.

    `scratch`, of the same file system, takes the unfinished file.
    """
    path = folder / (part_name(number) if shard.is_part else shard_name(number))
    temporary = (scratch or folder) / f".{path.name}.tmp"
    about = {
        "sample_ids": shard.ids,
        "image_records": {number: vars(record) for number, record in shard.image_records.items()},
        "counted_tokens": int(shard.tensors["loss_mask"].sum()),
        "made_with": shard.made_with,
        "checksums": {name: checksum(_bytes(tensor)) for name, tensor in shard.tensors.items()},
    }
    save_file(shard.tensors, temporary, {ABOUT: json.dumps(about)})
    sync(temporary)
    commit(temporary, path)
    return shard_entry(path)


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
