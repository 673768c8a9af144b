"""The verifier reads a store of tokens, and one writer of several records what it sees inside, shard by shard."""

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...conf.runtime.artifact import digest, held
from ...conf.runtime.journal import read_line
from ...conf.runtime.progress import Progress
from ...conf.runtime.rank_info import RankInfo, own_gpus, read_rank_info
from ...conf.runtime.signals import deferred
from ...conf.schema import Config, DumpEngine, LastStates
from ...models.verifier.model import Verifier
from ..heldout import conversation_id
from ..store.host_copies import Tensors, on_host
from ..store.mapped_shard import part_name, shard_name
from ..store.shard import Sample, Shard, open_part
from ..store.state_format import TOKEN_BYTES, StateFormat
from ..store.store import HiddenStateStore
from ..store.writer import BackgroundWriter
from ..tokens.image_tokens import ImageReader
from ..tokens.images import conversation_images
from .transformers_engine import TransformersEngine, check_first, refuse_unlike
from .vllm_engine import VllmEngine, check_readable

Engine = TransformersEngine | VllmEngine
_ESTIMATES = 2  # the first warms up
_NAMED = 8  # samples with states that are not finite; the rest are counted


def write_states(config: Config, settings: dict[str, Any], plan: HiddenStateStore, missing: list[int]) -> None:
    """Record those of this writer's shards that are missing into the store of `config`.

    Writers are tasks of a job array (`dump.writer`), and in each of them the ranks of its launcher, unless these hold
    one verifier together: then the first writes. The plan is the store of tokens, which has the same shards.
    """
    options, folder, place = config.dump, config.hidden_states_folder, read_rank_info(os.environ)
    together = config.verifier.tensor_parallel
    rank, ranks = (0, 1) if together else (place.rank, place.world)
    writer, num_writers = options.writer * ranks + rank, options.num_writers * ranks
    if missing:
        _announce_size(settings, plan, missing, folder)
    mine = [number for number in missing if number % num_writers == writer]
    if not mine:  # ranks together all find so, and nobody else writes these
        return
    stop, writes = _Stop(together), not (together and place.rank)
    scratch = _scratch(folder, writer) if writes else nullcontext(folder)
    with scratch as unfinished, closing(_open_engine(config, settings, place, plan)) as engine, stop.heard():
        recorder = _Recorder(config, settings, plan, mine, engine, stop)
        if writes:
            recorder.record(unfinished)
        else:
            recorder.read_along()


class _Stop:
    """Whether to stop before a batch: ranks that hold one verifier together all hear a signal at the same one.

    If a rank is alone, a signal ends the dump where it stands, once the shards it has are written.
    """

    def __init__(self, together: bool) -> None:
        self._together, self.stopped = together, False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen to signals, and end the command where the ranks have stopped."""
        if not self._together:
            yield
            return
        with deferred("it ends after the batch that its ranks are reading", then_stop=False) as self._signals:
            yield
        if self.stopped:
            self._signals.stop()

    def __call__(self) -> bool:
        if self._together and not self.stopped:
            self.stopped = self._signals.received is not None
            if dist.is_initialized():
                device = "cuda" if dist.get_backend() == "nccl" else "cpu"
                word = torch.tensor(int(self.stopped), device=device)
                dist.all_reduce(word, dist.ReduceOp.MAX)
                self.stopped = bool(word)
        return self.stopped


@dataclass
class _Recorder:
    """Lets the verifier read the samples of this writer's shards, and records what it sees inside."""

    config: Config
    settings: dict[str, Any]
    plan: HiddenStateStore
    shards: list[int]  # this writer's, of those that are missing
    engine: Engine
    stop: _Stop
    not_finite: list[str] = field(default_factory=list)  # samples

    def __post_init__(self) -> None:
        self.folder, self.made_with = self.config.hidden_states_folder, digest(self.settings)
        self.form, self.batch_tokens = state_format(self.settings), self.config.dump.batch_tokens

    def read_along(self) -> None:
        """Take a rank's part in what the first rank records."""
        batch = self._first_batch()
        for _ in range(_ESTIMATES):
            deque(self.engine.read(batch), maxlen=0)
        for number in self.shards:
            samples = self._samples(number)
            part = open_part(self.folder, number, self.made_with)
            done = set(part.ids) if part else set()
            deque(self.engine.read([sample for sample in samples if sample.id not in done], self.stop), maxlen=0)
            if self.stop.stopped:
                break

    def record(self, scratch: Path) -> None:
        """Record the shards; `scratch` takes unfinished files."""
        num_tokens = sum(self.plan.entries[number]["tokens"] for number in self.shards)
        _estimate_time(self.engine, self._first_batch(), num_tokens)
        with Progress("dump", num_tokens, "token") as progress, BackgroundWriter(self.folder, scratch) as out:
            for number in self.shards:
                samples = self._samples(number)
                shard = Shard.of(samples, out.spare_buffers())
                shard.made_with = self.made_with
                with _saved(number, shard, out) as recorded:
                    if part := open_part(self.folder, number, self.made_with):
                        recorded += shard.take(part)
                        progress.update(len(part.tensors["input_ids"]))
                        done = f"{len(recorded)} of {len(samples)} samples are already recorded"
                        print(f"dump: resuming shard-{number:05d}: {done}", flush=True)
                    self._record_shard(samples, shard, recorded, progress)
                if self.stop.stopped:
                    break
        if self.not_finite:
            count = f"{len(self.not_finite)} samples have states that are not finite"
            print(f"dump: {count}; training skips the steps that meet them")

    def _first_batch(self) -> list[Sample]:
        batch: list[Sample] = []
        for sample in self._samples(self.shards[0]):
            if batch and sum(len(other.input_ids) for other in [*batch, sample]) > self.batch_tokens:
                break
            batch.append(sample)
        return batch

    def _samples(self, shard: int) -> list[Sample]:
        """Return the samples of a shard, with the addresses of their images, which stand in their conversations."""
        self.plan.map_shard(shard).verify()
        samples = [self.plan[index] for index in self.plan.shard_samples(shard)]
        for sample in samples:
            if images := sample.image_record:
                path = self.config.conversations_folder / images.file
                record = read_line(path, images.offset)
                if record.get("id") != conversation_id(sample.id):
                    raise ValueError(
                        f"{path} was changed since it was tokenised, {sample.id} is not where it was: run "
                        "`fledge synthesize` again, and dump with overwrite=true"
                    )
                sample.images = tuple(conversation_images(record["messages"])[: len(images.digests)])
        return samples

    def _record_shard(self, samples: list[Sample], shard: Shard, recorded: list[int], progress: Progress) -> None:
        """Record the samples of a shard that are left, and add their numbers to `recorded` by whole batches.

        What is left is then read in the batches in which it would have been, and has the same states to the bit.
        """
        begun, there = len(recorded), set(recorded)
        left = [number for number in range(len(samples)) if number not in there]
        computed, ends = list[int](), [0]  # in the order of reading; how many there were at the end of each batch
        num_placed = 0  # of them; states of a GPU arrive later than they are computed

        def note_whole_batches() -> None:
            recorded[begun:] = computed[: max(end for end in ends if end <= num_placed)]

        def next_batch() -> bool:
            ends.append(len(computed))
            note_whole_batches()
            return self.stop()

        def encoded() -> Iterator[tuple[int, Tensors]]:
            for place, aux, last in self.engine.read([samples[number] for number in left], next_batch):
                computed.append(left[place])
                states = shard.encode(left[place], aux, last, self.form)
                yield left[place], states | {"unlike": self.engine.unlike[-1][None]}

        for number, states in on_host(encoded(), self.batch_tokens):
            refuse_unlike([states["unlike"]])
            if not shard.set_states(number, states, self.form):
                self.not_finite.append(samples[number].id)
                if len(self.not_finite) <= _NAMED:
                    print(f"dump: {samples[number].id} has states that are not finite as {self.form.dtype}", flush=True)
            num_placed += 1
            note_whole_batches()
            progress.update(len(samples[number].input_ids))
        recorded[begun:] = computed


@contextmanager
def _saved(number: int, shard: Shard, out: BackgroundWriter) -> Iterator[list[int]]:
    """Write a shard, or of one that is interrupted the samples whose numbers the body has put into what is yielded."""
    recorded: list[int] = []
    try:
        yield recorded
    finally:
        with deferred("it ends as soon as the shards it has are written"):
            if len(recorded) == len(shard.ids):
                out.put(number, shard)
            elif recorded:
                done = f"{len(recorded)} of {len(shard.ids)} samples of {shard_name(number)}"
                print(f"dump: {done} are recorded, and kept in {part_name(number)}", flush=True)
                out.put(number, shard.part(recorded))


def state_format(settings: dict[str, Any]) -> StateFormat:
    """Return the format that the settings of a store name."""
    return StateFormat(getattr(torch, settings["state_dtype"]), settings["last_states"] == LastStates.counted.value)


def _announce_size(settings: dict[str, Any], plan: HiddenStateStore, missing: list[int], folder: Path) -> None:
    """Print what the missing shards need, and refuse what the disk cannot hold."""
    tokens, counted = (sum(plan.entries[number][name] for number in missing) for name in ("tokens", "counted_tokens"))
    layers, width = len(settings["aux_layers"]), settings["verifier"]["hidden_size"]
    per_token = state_format(settings).bytes_per_token(layers, width, counted / tokens) + TOKEN_BYTES
    needed, free = tokens * per_token, shutil.disk_usage(folder).free
    print(
        f"dump: {tokens} tokens to record, {per_token / 1000:.3g} kB each: {needed / 2**30:.2f} GiB to write, "
        f"{free / 2**30:.0f} GiB are free"
    )
    if needed > free:
        raise ValueError(
            f"the store needs {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} GiB free: set dump.folder "
            "to a larger disk, dump.dtype to float8, or train.hidden_states to online"
        )


def _open_engine(config: Config, settings: dict[str, Any], place: RankInfo, plan: HiddenStateStore) -> Engine:
    """Start what runs the verifier: on the GPUs that are this rank's own, or, of ranks together, on all."""
    if config.dump.engine is DumpEngine.vllm:
        check_readable(config, plan.ids, plan.lengths, plan.num_images)
        return VllmEngine(config, settings["aux_layers"])
    alone = place.world == 1 or config.verifier.tensor_parallel
    gpus = None if alone or not torch.cuda.is_available() else own_gpus(place, torch.cuda.device_count())
    if gpus:
        torch.cuda.set_device(gpus[0])
    verifier = Verifier.load(config.verifier, settings["aux_layers"], gpus)
    used, number = set(getattr(verifier.model, "hf_device_map", {}).values()), torch.cuda.device_count()
    if place.world == len(used) == 1 < number and verifier.device.type == "cuda":
        print(
            f"dump: one of {number} GPUs reads; `torchrun --nproc-per-node {number} -m fledge dump ...` uses them all"
        )
    check_first(config.verifier, verifier, plan[0].input_ids, state_format(settings))
    images = ImageReader(config.verifier, config.dump.max_images, config.data.local_images)
    return TransformersEngine(verifier, config.dump.batch_tokens, images)


def _estimate_time(engine: Engine, batch: list[Sample], num_tokens: int) -> None:
    """Print how long this writer will take, by the last reading of a batch: the first warms up."""
    for _ in range(_ESTIMATES):
        start = time.perf_counter()
        states = ((number, {"aux": aux, "last": last}) for number, aux, last in engine.read(batch))
        for _ in on_host(states, num_tokens):  # waits for the device at its end
            pass
    rate = sum(len(sample.input_ids) for sample in batch) / (time.perf_counter() - start)
    hours = num_tokens / rate / 3600
    about = f"{hours:.1f} h" if hours > 1 else f"{60 * hours:.0f} min" if hours > 1 / 60 else "less than a minute"
    print(f"dump: {rate:.0f} tokens/s, {about} for this writer's {num_tokens} tokens", flush=True)


@contextmanager
def _scratch(folder: Path, writer: int) -> Iterator[Path]:
    """Yield this writer's folder of unfinished files, alone; what a kill has left in it is deleted."""
    scratch = folder / f"writer-{writer:05d}"
    scratch.mkdir(exist_ok=True)
    cure = "wait for it, or give this one another number (dump.writer, of dump.num_writers)"
    with held(scratch / ".lock", f"writer {writer} of {folder} is at work in", cure):
        try:
            for left in scratch.glob(".*.tmp"):
                left.unlink()
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
