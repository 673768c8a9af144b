"""Conversations become tokens and loss masks: a store without states, which is all that online training needs.

The conversations are taken in the order of their ids, whatever the order of their lines, and go into a new shard when
the last has `dump.shard_tokens`; so the shards are the same at every start, and a store with states has the same ones.
"""

import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...conf.runtime.artifact import Artifact, read_manifest
from ...conf.runtime.progress import Progress
from ...conf.runtime.signals import deferred, end_with_parent
from ...conf.schema import Config
from ..conversations import FILE, ConversationIndex, ConversationRef
from ..heldout import conversation_id, is_heldout, limited, sequence_id
from ..store.index import COUNTS_FILE, is_intact, left_out, sidecar_checksums, totals
from ..store.mapped_shard import TOKENS, ImageRecord, MappedShard
from ..store.shard import Sample, Shard, write_shard
from ..store.store import save_tensors, write_index
from .chat_template import NoExactSpanError, Sequence
from .images import UnreadableImagesError
from .sequences import SequenceReader, UnknownTokenError, answers_within, leading_answers, num_whole_answers

_REASONS: dict[type[Exception], str] = {  # why a conversation is left out, the first that an error is of
    UnreadableImagesError: "images",
    UnknownTokenError: "unknown_tokens",
    NoExactSpanError: "template",
}
_COUNTS = ("conversations", "truncated_answers", "truncated", "too_long", "cut_answers", *reversed(_REASONS.values()))
_NOTE_EVERY_S = 5.0  # the manifest lists all shards, so noting each would write it ever longer
_WORTH_PROCESSES = 5000  # conversations without tokens; fewer are tokenised here
_CHUNK = 32  # conversations that a process is given at a time


@dataclass
class Tokenised:
    """The training sequences of a conversation by their numbers, and what was left out of it and why."""

    sequences: dict[int, Sequence] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)  # of _COUNTS
    problem: str = ""


class Tokeniser:
    """Reads and tokenises conversations."""

    def __init__(self, config: Config) -> None:
        self._folder, self._options = config.conversations_folder, config.dump
        self._reader = SequenceReader(config.verifier, config.dump.max_images, config.data.local_images)

    def __call__(self, place: ConversationRef) -> Tokenised:
        record = place.read(self._folder)
        try:
            sequences = self._reader.read(record)
        except NoExactSpanError as error:
            reason = next(reason for kind, reason in _REASONS.items() if isinstance(error, kind))
            return Tokenised(counts=Counter({reason: 1}), problem=str(error))
        reasons = record["finish_reasons"]
        whole = len(reasons) if self._options.keep_truncated else num_whole_answers(reasons)
        found = dict(enumerate(leading_answers(sequences, whole)))
        fitting = {n: cut for n, s in found.items() for cut in answers_within(s, self._options.max_length)}
        counts = Counter(
            truncated_answers=len(reasons) - whole,
            truncated=int(not found),
            too_long=len(found) - len(fitting),
            cut_answers=sum(len(found[n].answers) - len(cut.answers) for n, cut in fitting.items()),
            conversations=int(bool(fitting)),
        )
        return Tokenised(fitting, counts)


def write_tokens(config: Config, target: Artifact) -> None:
    """Make or complete a store of tokens; a killed start goes on after the last shard that was noted.

    Shards that were not noted yet are written again, with the same bytes. A signal keeps what the open shard has.
    Raises ValueError if a conversation is malformed, none can be used, or they were changed since they were finished.
    """
    manifest = target.manifest
    if target.complete and is_intact(target.folder, manifest["shards"]):
        return
    begun = [manifest["part"]["entry"]] if "part" in manifest else []
    files = [target.folder / entry["file"] for entry in [*manifest.get("shards", []), *begun]]
    if target.complete or not all(file.is_file() for file in files):
        manifest.pop("part", None)
        target.save(complete=False, shards=[], taken=0, counts={})  # a file was lost: from the start
    source = config.conversations_folder
    total = read_manifest(source, "conversations")["counts"]["conversations"]
    with Progress("conversations", total, "conversation") as progress:
        index = ConversationIndex(source, progress.update)
    if read_manifest(source, "conversations")["content"] != index.content:
        raise ValueError(f"{source / FILE} was changed after it was finished: run `fledge synthesize` again")
    if limit := config.dump.limit:
        share = manifest["settings"]["heldout_share"]
        by_use = [[place for place in index.places if is_heldout(place.id, share) is held] for held in (False, True)]
        index.places = sorted(place for places in by_use for place in limited(places, limit, lambda place: place.id))
    target.save(**config.verifier.origin)
    _write_shards(config, target, index)
    counts, shards = manifest["counts"], manifest["shards"]
    if not shards:
        raise ValueError(f"no conversation in {source} can be used: {left_out(counts, config.dump.max_length)}")
    for part in target.folder.glob("part-*"):
        part.unlink()
    write_index(target.folder, shards)
    _write_token_counts(target)
    target.finish(counts={**counts, **totals(shards)}, files=sidecar_checksums(target.folder))
    if cut := counts["truncated_answers"]:
        print(
            f"dump: leaves out {cut} answers that synthesize.max_tokens cut; dump.keep_truncated=true records them, "
            "which are the verifier's words too",
            flush=True,
        )


def _write_shards(config: Config, target: Artifact, index: ConversationIndex) -> None:
    manifest, folder = target.manifest, target.folder
    entries: list[dict[str, Any]] = list(manifest.get("shards", []))
    taken, counts = manifest.get("taken", 0), Counter(dict.fromkeys(_COUNTS, 0) | manifest.get("counts", {}))
    samples, closed, noted_at = list[Sample](), {"taken": taken, "counts": counts.copy()}, time.monotonic()
    if part := manifest.pop("part", None):
        samples, taken, counts = _open_samples(folder, part), part["taken"], Counter(part["counts"])
    size = sum(len(sample.input_ids) for sample in samples)
    progress = Progress("tokens", len(index.places), "conversation", done=taken)

    def close_shard() -> None:
        nonlocal noted_at, closed
        length, share = config.dump.join_length, manifest["settings"]["heldout_share"]
        joined = _joined(samples, length, share) if length else samples
        entries.append(write_shard(folder, len(entries), Shard.of(joined)))
        samples.clear()
        closed = {"taken": taken, "counts": counts.copy()}
        if time.monotonic() - noted_at >= _NOTE_EVERY_S:
            target.save(shards=entries, **closed)
            noted_at = time.monotonic()

    waits = "it ends after the conversation being tokenised"
    with deferred(waits) as signals, _tokenised(config, index, taken) as results:
        for place, result in zip(index.places[taken:], results, strict=True):
            if result.problem and not any(counts[reason] for reason in result.counts):  # the first of its kind
                print(f"dump: {place.id} is left out: {result.problem}")
            counts.update(result.counts)
            taken += 1
            progress.update()
            samples += [_sample(place, number, sequence) for number, sequence in result.sequences.items()]
            size += sum(len(sequence.token_ids) for sequence in result.sequences.values())
            if size >= config.dump.shard_tokens:
                close_shard()
                size = 0
            if signals.received:
                if samples:  # the next start goes on with them
                    entry = write_shard(folder, len(entries), replace(Shard.of(samples), is_part=True))
                    closed["part"] = {"entry": entry, "taken": taken, "counts": counts}
                target.save(shards=entries, **closed)
                signals.stop()
    progress.close()
    if samples:
        close_shard()
    target.save(shards=entries, taken=taken, counts=counts)


def _open_samples(folder: Path, part: dict[str, Any]) -> list[Sample]:
    """Return what an interrupted start has kept of a shard."""
    shard = MappedShard(folder / part["entry"]["file"], part["entry"])
    shard.verify()
    lengths = shard.tensors["sample_offsets"].diff().tolist()
    tokens = zip(*(shard.tensors[name].split(lengths) for name in TOKENS), strict=True)
    of_each = zip(shard.ids, tokens, map(shard.image_records.get, range(len(lengths))), strict=True)
    return [Sample(name, ids, loss_mask, image_record=record) for name, (ids, loss_mask), record in of_each]


@contextmanager
def _tokenised(config: Config, index: ConversationIndex, first: int) -> Iterator[Iterator[Tokenised]]:
    """Return the conversations from the `first` on in tokens, in order, made by processes if that is worth it."""
    tokeniser, places, workers = Tokeniser(config), index.places[first:], config.dump.token_workers
    if workers is None:
        to_tokenise = len(index.places) - index.num_recorded
        workers = len(os.sched_getaffinity(0)) if to_tokenise > _WORTH_PROCESSES else 0
    if not workers:
        yield map(tokeniser, places)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, fork, _start_worker, (tokeniser,)) as pool:
        try:
            yield _in_order(pool, places, workers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, places: list[ConversationRef], workers: int) -> Iterator[Tokenised]:
    """Pass conversations to processes, a few parts ahead of what is taken."""
    running: deque[Future[list[Tokenised]]] = deque()
    try:
        for start in range(0, len(places), _CHUNK):
            running.append(pool.submit(_tokenise_in_worker, places[start : start + _CHUNK]))
            if len(running) > 4 * workers:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            f"a process of dump.token_workers={workers} was killed: see whether memory ran out, set fewer, and start "
            "the same command again; it goes on after the shards noted"
        ) from None


def _start_worker(tokeniser: Tokeniser) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    global _tokeniser
    _tokeniser = tokeniser


def _tokenise_in_worker(places: list[ConversationRef]) -> list[Tokenised]:
    return [_tokeniser(place) for place in places]


_tokeniser: Tokeniser  # of a worker


def _sample(place: ConversationRef, number: int, sequence: Sequence) -> Sample:
    loss_mask = torch.zeros(len(sequence.token_ids), dtype=torch.uint8)
    for start, end in sequence.answers:
        loss_mask[start:end] = 1
    tokens = torch.tensor(sequence.token_ids, dtype=torch.int32)
    digests = [image.digest for image in sequence.images]
    images = ImageRecord(place.file, place.offset, digests) if digests else None
    return Sample(sequence_id(place.id, number), tokens, loss_mask, image_record=images)


def _joined(samples: list[Sample], join_length: int, heldout_share: float) -> list[Sample]:
    """Lay samples end to end, in their order, as long as they have so many tokens at most together.

    The joined sample has the id of the first. Alone stay held-out samples, those with images, and further sequences of
    a conversation, which would follow their own text.
    """
    joined: list[Sample] = []
    last, room = 0, 0  # the one that is being filled
    for sample in samples:
        further = sample.id != conversation_id(sample.id)
        if sample.image_record or further or is_heldout(sample.id, heldout_share):
            joined.append(sample)
            continue
        if len(sample.input_ids) <= room:
            parts = joined[last], sample
            ids, mask = (torch.cat([getattr(part, name) for part in parts]) for name in TOKENS)
            joined[last] = replace(joined[last], input_ids=ids, loss_mask=mask)
        else:
            last = len(joined)
            joined.append(sample)
        room = join_length - len(joined[last].input_ids)
    return joined


def _write_token_counts(target: Artifact) -> None:
    """Count the tokens the verifier produced in the training split: what the draft vocabulary is chosen by."""
    settings = target.manifest["settings"]
    counts = torch.zeros(settings["verifier"]["vocab_size"], dtype=torch.int64)
    for entry in target.manifest["shards"]:
        shard = MappedShard(target.folder / entry["file"], entry)
        trained = torch.tensor([not is_heldout(name, settings["heldout_share"]) for name in shard.ids])
        trained = trained.repeat_interleave(shard.tensors["sample_offsets"].diff()) & shard.tensors["loss_mask"].bool()
        counts += torch.bincount(shard.tensors["input_ids"][trained], minlength=len(counts))
    save_tensors({"token_counts": counts}, target.folder / COUNTS_FILE)
