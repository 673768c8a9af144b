"""Measure the hidden-state store: `python tests/benchmarks/store.py [folder=DISK option=value ...]`.

Rates: a store of large states is written as `fledge dump` writes it and read in packs as `fledge train` reads it,
beside a plain copy and a plain read of the same bytes, in turn. Many: a store of many small samples is opened and read
in packs of random ones, beside one safetensors file a sample. Prints one JSON line; of every figure the median.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_options import parse_options
from fledge.conf.runtime.artifact import Artifact
from fledge.data_synthesis.store.index import sidecar_checksums
from fledge.data_synthesis.store.shard import Sample, Shard, shard_entry
from fledge.data_synthesis.store.state_format import StateFormat
from fledge.data_synthesis.store.store import HiddenStateStore, write_index
from fledge.data_synthesis.store.writer import BackgroundWriter
from fledge.train.data.packing import pack
from fledge.train.data.training_data import Batches
from safetensors.torch import load_file, save_file

_BLOCK = 16 << 20  # bytes of a plain read


@dataclass
class Options:
    """What is measured."""

    folder: str = ""  # on the disk to measure; none: the system's temporary folder
    dtype: str = "bfloat16"  # or float8_e4m3fn
    hidden_size: int = 2048  # of the rates, with three aux layers and the last
    tokens: int = 120_000
    sample_tokens: int = 500  # on average
    shard_tokens: int = 20_000
    batch_tokens: int = 4096  # of a pack
    repeats: int = 5
    many: int = 100_000  # small samples; 0: rates alone
    many_hidden_size: int = 32
    many_sample_tokens: int = 64
    packs: int = 200  # random ones, whose latency is measured
    seed: int = 0


def timed(work: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Give the wall and CPU seconds that a call takes, those of threads included."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def make_samples(num_tokens: int, mean: int, seed: int) -> list[Sample]:
    """Give samples without states, the second half of each written by the verifier."""
    chance = random.Random(seed)
    samples: list[Sample] = []
    while num_tokens > 0:
        length = min(num_tokens, chance.randint(mean // 2, 3 * mean // 2))
        num_tokens -= length
        mask = (torch.arange(length) >= length // 2).to(torch.uint8)
        samples.append(Sample(f"s/{len(samples):07d}", torch.zeros(length, dtype=torch.int32), mask))
    return samples


def cut(samples: list[Sample], shard_tokens: int) -> list[list[Sample]]:
    """Cut samples into shards."""
    parts: list[list[Sample]] = [[]]
    size = 0
    for sample in samples:
        if size >= shard_tokens:
            parts.append([])
            size = 0
        parts[-1].append(sample)
        size += len(sample.input_ids)
    return parts


def write_shards(folder: Path, parts: list[list[Sample]], states: torch.Tensor, dtype: torch.dtype) -> None:
    """Fill and write shards as a dump does, each sample's states from the first rows of `states` [T, 4*H]."""
    width, form = states.shape[-1] // 4, StateFormat(dtype)
    with BackgroundWriter(folder, folder) as writer:
        for number, part in enumerate(parts):
            shard = Shard.of(part, writer.spare_buffers())
            for place, sample in enumerate(part):
                rows = states[: len(sample.input_ids)]
                shard.set_states(place, shard.encode(place, rows[:, : 3 * width], rows[:, 3 * width :], form), form)
            writer.put(number, shard)


def finish(folder: Path) -> HiddenStateStore:
    """Complete a store of shards that are written."""
    entries = [shard_entry(path) for path in sorted(folder.glob("shard-*"))]
    manifest = {"kind": "hidden_states", "settings": {"heldout_share": 0.0}}
    write_index(folder, entries)
    Artifact(folder, manifest).finish(shards=entries, files=sidecar_checksums(folder))
    return HiddenStateStore(folder)


def read_packs(store: HiddenStateStore, packs: list[list[int]]) -> Iterator[float]:
    """Read packs as a training process does, but for the search for useful rows; yield the seconds of each."""
    batches = Batches([store], store.lengths, 1)
    for samples in packs:
        yield timed(batches.__getitem__, samples)[0]


def plain_read(paths: list[Path]) -> None:
    """Read files block by block into memory that is used again."""
    block = bytearray(_BLOCK)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def plain_copy(paths: list[Path], to: Path) -> None:
    """Copy files durably; all stay, so that the copy takes as much memory of the system's as the store."""
    for path in paths:
        with open(path, "rb", buffering=0) as source, open(to / path.name, "wb", buffering=0) as target:
            shutil.copyfileobj(source, target, _BLOCK)
            os.fsync(target.fileno())


def measure_rates(options: Options, folder: Path) -> dict[str, Any]:
    """Write, read, copy and read plainly in turn; give seconds, and rates as shares of the plain copy's."""
    samples = make_samples(options.tokens, options.sample_tokens, options.seed)
    parts = cut(samples, options.shard_tokens)
    longest = max(len(sample.input_ids) for sample in samples)
    states = torch.randn(longest, 4 * options.hidden_size).bfloat16()
    packs = pack([len(s.input_ids) for s in samples], list(range(len(samples))), max(options.batch_tokens, longest))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("write", "copy", "read", "plain_read")}
    store = None
    for _ in range(options.repeats):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        times["write"].append(timed(write_shards, folder, parts, states, getattr(torch, options.dtype)))
        store = finish(folder)
        paths = sorted(folder.glob("shard-*"))
        (folder / "copy").mkdir()
        times["copy"].append(timed(plain_copy, paths, folder / "copy"))
        times["read"].append(timed(list, read_packs(store, packs)))
        times["plain_read"].append(timed(plain_read, paths))
    assert store is not None
    size = sum(entry["bytes"] for entry in store.entries) / 2**30
    result: dict[str, Any] = {"gib": size}
    for name, pairs in times.items():
        result |= {f"{name}_wall_s": statistics.median(w for w, _ in pairs)}
        result |= {f"{name}_cpu_s": statistics.median(c for _, c in pairs)}
    for name in ("write", "read"):
        for clock, place in (("wall", 0), ("cpu", 1)):
            shares = [copy[place] / ours[place] for ours, copy in zip(times[name], times["copy"], strict=True)]
            result[f"{name}_share_of_copy_{clock}"] = statistics.median(shares)
    return result


def measure_many(options: Options, folder: Path) -> dict[str, Any]:
    """Open a store of many small samples and read random packs, beside one file a sample."""
    samples = make_samples(options.many * options.many_sample_tokens, options.many_sample_tokens, options.seed)
    parts = cut(samples, options.shard_tokens)
    states = torch.randn(2 * options.many_sample_tokens, 4 * options.many_hidden_size).bfloat16()
    folder.mkdir()
    write_wall, write_cpu = timed(write_shards, folder, parts, states, getattr(torch, options.dtype))
    store = finish(folder)
    opening = statistics.median(timed(HiddenStateStore, folder)[0] for _ in range(options.repeats))
    chance = random.Random(options.seed)
    size = max(1, options.batch_tokens // options.many_sample_tokens)
    packs = [chance.sample(range(len(store)), size) for _ in range(options.packs)]
    latencies = sorted(read_packs(store, packs))
    single = folder.with_name("single")
    single.mkdir()
    single_write = timed(write_singles, store, single)
    listing = timed(list, single.iterdir())[0]
    paths = sorted(single.iterdir())
    single_latencies = sorted(timed(read_singles, [paths[i] for i in samples])[0] for samples in packs)
    return {
        "samples": len(store),
        "shards": len(store.entries),
        "open_s": opening,
        "pack_samples": size,
        "pack_median_ms": 1e3 * statistics.median(latencies),
        "pack_p95_ms": 1e3 * latencies[int(0.95 * (len(latencies) - 1))],
        "write_wall_s": write_wall,
        "write_cpu_s": write_cpu,
        "disk_gib": disk_gib(folder),
        "single_list_s": listing,
        "single_pack_median_ms": 1e3 * statistics.median(single_latencies),
        "single_pack_p95_ms": 1e3 * single_latencies[int(0.95 * (len(single_latencies) - 1))],
        "single_write_wall_s": single_write[0],
        "single_write_cpu_s": single_write[1],
        "single_disk_gib": disk_gib(single),
    }


def write_singles(store: HiddenStateStore, folder: Path) -> None:
    """Write every sample into a file of its own, without making any of them durable."""
    for index in range(len(store)):
        sample = store[index]
        tensors = {name: value.contiguous() for name, value in vars(sample).items() if isinstance(value, torch.Tensor)}
        save_file(tensors, folder / f"{index:07d}.safetensors")


def read_singles(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Read samples from their own files and lay them end to end."""
    parts = [load_file(path) for path in paths]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def disk_gib(folder: Path) -> float:
    """Give the room that the files of a folder take on the disk, blocks included."""
    return sum(path.stat().st_blocks for path in folder.iterdir()) * 512 / 2**30


def measure(options: Options) -> dict[str, Any]:
    """Give all figures."""
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory(dir=options.folder or None) as temporary:
        result: dict[str, Any] = {**dataclasses.asdict(options), "rates": measure_rates(options, Path(temporary) / "r")}
        shutil.rmtree(Path(temporary) / "r")
        if options.many:
            result["many"] = measure_many(options, Path(temporary) / "many")
    return rounded(result)


def rounded(value: Any) -> Any:
    """Round the figures of a nested result."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    print(json.dumps(measure(parse_options(sys.argv[1:], Options()))))
