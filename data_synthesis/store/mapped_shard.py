"""A shard of the hidden-state store as it is read; shard.py writes it. torch is imported with the first tensor."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = ("input_ids", "loss_mask")
AUX_STATES, LAST_STATES = ("aux_hidden_states", "aux_scale"), ("last_hidden_state", "last_scale")
STATES = (*AUX_STATES, *LAST_STATES)
ABOUT = "fledge"  # the one key of the file's metadata
CURE = "delete the file and run `fledge dump` again"
_DTYPES: dict[str, Any] = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F16": np.float16, "F32": np.float32}
_DTYPES |= {"BF16": np.int16, "F8_E4M3": np.uint8}  # which numpy does not have


@dataclass(frozen=True)
class ImageRecord:
    """Where the images of a sample are: the first of a conversation, by its place in the file."""

    file: str  # in the folder of conversations
    offset: int  # of its line, in bytes
    digests: list[str]  # of the pixels of each


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def part_name(number: int) -> str:
    """Return the file name of what an interrupted writer had of a shard."""
    return f"part-{number:05d}.safetensors"


def offsets_of(tensors: Mapping[str, Any], name: str) -> str:
    """Return the name of the offsets of samples in a tensor."""
    return "last_offsets" if name in LAST_STATES and "last_offsets" in tensors else "sample_offsets"


def rows_of(tensors: Mapping[str, Any], name: str, number: int) -> list[int]:
    """Return the first row of a sample in a tensor, and the first after it."""
    rows: list[int] = tensors[offsets_of(tensors, name)][number : number + 2].tolist()
    return rows


def checksum(content: Any) -> str:
    """Return the XXH3-128 of bytes or of an array."""
    return xxhash.xxh3_128_hexdigest(content)


def shard_entry(path: Path) -> dict[str, Any]:
    """Read the entry of a shard for the manifest from its header; raise ValueError if it is no whole shard."""
    header = _header(path)
    try:
        tensors = json.loads(header[8:])
        about = json.loads(tensors.pop("__metadata__")[ABOUT])
        end = max(tensor["data_offsets"][1] for tensor in tensors.values())
        entry = {
            "file": path.name,
            "samples": tensors["sample_offsets"]["shape"][0] - 1,
            "tokens": tensors["input_ids"]["shape"][0],
            "counted_tokens": about["counted_tokens"],
            "made_with": about["made_with"],
            "bytes": len(header) + end,
            "checksum": checksum(header),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a shard of hidden states ({error}): {CURE}") from None
    check_size(path, entry)
    return entry


def _header(path: Path) -> bytes:
    """Read a safetensors header: its length, 8 bytes, and its JSON."""
    with open(path, "rb") as file:
        size = file.read(8)
        length = int.from_bytes(size, "little")
        header = size + file.read(min(length, 1 << 28))
    if len(header) != 8 + length:
        raise ValueError(f"{path} is cut off or not a safetensors file: {CURE}")
    return header


def check_size(path: Path, entry: dict[str, Any]) -> None:
    """Refuse a shard that is missing or has not the size of its entry."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `fledge dump` again")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise ValueError(f"{path} has {size} bytes and should have {entry['bytes']}: {CURE}")


class MappedShard:
    """One file of a store, mapped; its header is compared with the manifest."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self._path = path
        check_size(path, entry)
        header = _header(path)
        if checksum(header) != entry["checksum"]:
            raise self._altered("the header")
        self._described = json.loads(header[8:])
        about = json.loads(self._described.pop("__metadata__")[ABOUT])
        self._checksums = about["checksums"]
        self.image_records = {int(number): ImageRecord(**record) for number, record in about["image_records"].items()}

    @cached_property
    def tensors(self) -> "dict[str, Tensor]":
        """Views of the file, read as they are used; float8 as bytes, which every operation takes.

        They keep no file open, of which a process may have a thousand: a store has more shards.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in self._described}
        except SafetensorError as error:
            raise ValueError(f"{self._path} cannot be read as safetensors ({error}): {CURE}") from None
        return {name: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for name, t in tensors.items()}

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """The same by numpy, without torch and with the file open; bfloat16 as int16, float8 as uint8."""
        return self._map()

    def _map(self) -> dict[str, Any]:
        content = np.asarray(np.memmap(self._path, np.uint8, "r"))
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        return {
            name: content[start + of["data_offsets"][0] : start + of["data_offsets"][1]]
            .view(_DTYPES[of["dtype"]])
            .reshape(of["shape"])
            for name, of in self._described.items()
        }

    @property
    def ids(self) -> list[str]:
        """Read the ids of its samples, of which a store has its own list."""
        return list(json.loads(json.loads(_header(self._path)[8:])["__metadata__"][ABOUT])["sample_ids"])

    def verify(self) -> None:
        """Compare the checksum of every tensor."""
        for name, array in self._map().items():
            if checksum(array) != self._checksums[name]:
                raise self._altered(name)

    def _altered(self, what: str) -> ValueError:
        return ValueError(f"{self._path}: {what} does not have its checksum, the file was altered: {CURE}")
