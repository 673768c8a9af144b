"""Training data: stores mixed by weight, split, packed, shared out to ranks, and read by processes of their own.

Pack n of the whole sequence (packing.py) goes to rank n mod ranks.
"""

from __future__ import annotations

import bisect
import itertools
import math
import weakref
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ...conf.runtime.signals import end_with_parent
from ...conf.schema import Config, HiddenStates, StoreConfig, TooLong
from ...data_synthesis.heldout import conversation_id, heldout_order, is_heldout
from ...data_synthesis.store.draft_vocabulary import choose_vocabulary
from ...data_synthesis.store.shard import STATES
from ...data_synthesis.store.store import HiddenStateStore
from ...models.head.config import DraftHeadConfig
from ...models.head.vocabulary import VocabularyMap
from ...models.verifier.config import special_token_ids
from ...models.verifier.weights import check_identity
from ..loss.rows import PackedBatch, find_useful_rows
from .packing import PackStream, Passes, pack


def answers_end(loss_mask: Tensor, budget: int) -> int:
    """Return how many tokens there are up to the end of the last answer that ends within a budget, 0 without one.

    Args:
        loss_mask: [T], longer than the budget. With the mask 0 1 1 0 1 1 1, budget 3 and 6 give 3, budget 2 gives 0.
    """
    ends = (loss_mask[:budget].bool() & ~loss_mask[1 : budget + 1].bool()).nonzero()
    return int(ends[-1]) + 1 if len(ends) else 0


@dataclass
class Split:
    """The samples of all stores by use.

    Held out is what a store's own share says (answered greedily there), each id once. Not trained on is what *any*
    store's share says: an id that two stores have, held out in one, is trained on in neither.
    """

    train: list[list[int]]  # by store
    heldout: list[int]
    lengths: list[int]  # tokens of each sample, after cutting
    num_cut: int = 0  # training samples longer than a pack, cut after an answer
    num_dropped: int = 0  # and those left out
    num_heldout_elsewhere: int = 0  # left out for another store's share
    num_with_images: int = 0  # left out of online training, whose verifier is given tokens alone

    @classmethod
    def of(cls, stores: list[HiddenStateStore], batch_tokens: int, too_long: TooLong) -> Split:
        """Split stores by the ids that were held out when they were made; read the masks of long samples only."""
        shares = [store.manifest["settings"]["heldout_share"] for store in stores]
        split = cls([], [], [])
        walked: set[str] = set()
        for store, own_share in zip(stores, shares, strict=True):
            first, dropped = len(split.lengths), split.num_dropped
            split.lengths += store.lengths
            train: list[int] = []
            for index, sample_id in enumerate(store.ids):
                if store.num_images[index] and not store.with_states:
                    split.num_with_images += 1
                elif is_heldout(sample_id, own_share):
                    if sample_id not in walked:
                        walked.add(sample_id)
                        split.heldout.append(first + index)
                elif is_heldout(sample_id, max(shares)):
                    split.num_heldout_elsewhere += 1
                elif store.lengths[index] <= batch_tokens:
                    train.append(first + index)
                elif too_long is TooLong.cut and (cut_length := answers_end(store.loss_mask(index), batch_tokens)):
                    split.lengths[first + index] = cut_length
                    split.num_cut += 1
                    train.append(first + index)
                else:
                    split.num_dropped += 1
            if not train:
                raise _nothing_to_train(store, split.num_dropped - dropped, batch_tokens, max(shares))
            split.train.append(train)
        return split

    def __str__(self) -> str:
        """Say what is used, and what is not."""
        long = f"{self.num_cut} longer than a pack cut after an answer, {self.num_dropped} dropped"
        others = ""
        if self.num_heldout_elsewhere:
            others += f", {self.num_heldout_elsewhere} left out as another store's share holds them out"
        if self.num_with_images:
            others += f", {self.num_with_images} left out as they have images, which online training does not read"
        return f"{sum(map(len, self.train))} training samples ({long}{others}) and {len(self.heldout)} held-out"


def _nothing_to_train(store: HiddenStateStore, num_dropped: int, batch_tokens: int, share: float) -> ValueError:
    if num_dropped:
        return ValueError(
            f"train.batch_tokens={batch_tokens} holds no training sample of {store.folder}, whose longest has "
            f"{max(store.lengths)} tokens: raise it"
        )
    if not store.with_states and (num_images := sum(map(bool, store.num_images))):
        return ValueError(
            f"{store.folder} holds no training sample without images, {num_images} of its {len(store)} have some: "
            "train with train.hidden_states=offline"
        )
    return ValueError(
        f"{store.folder} holds no training sample, its {len(store)} are held out (data.heldout_share={share}, the "
        "largest of all stores): make it of more conversations or with a smaller share"
    )


class Batches(Dataset[PackedBatch | ValueError]):
    """Packed batches by the numbers of their samples; goes to the processes that read.

    Args:
        lengths: tokens that are used of each sample, over all stores.
        ttt_steps: K, for which the useful rows are found.
    """

    def __init__(self, stores: list[HiddenStateStore], lengths: list[int], ttt_steps: int) -> None:
        self._stores = stores
        self._firsts = list(itertools.accumulate((len(store) for store in stores), initial=0))
        self._lengths = lengths
        self._ttt_steps = ttt_steps

    def __getitem__(self, pack: list[int]) -> PackedBatch | ValueError:
        """Lay samples end to end; what is wrong with a store is given back, since raised it would lose its type."""
        try:
            batch = self._collate(pack)
            return batch if get_worker_info() is None else batch.mapped(_shared)
        except ValueError as error:
            return error

    def _collate(self, pack: list[int]) -> PackedBatch:
        places = [bisect.bisect_right(self._firsts, number) - 1 for number in pack]
        parts = [self._stores[place][number - self._firsts[place]] for place, number in zip(places, pack, strict=True)]
        if len({part.aux_scale is None for part in parts}) > 1:  # of stores of several formats
            parts = [part.decoded() for part in parts]
        lengths = [self._lengths[number] for number in pack]

        def join(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            if any(tensor is None for tensor in tensors):
                return None
            return _joined([tensor[:length] for tensor, length in zip(tensors, lengths, strict=True)])

        ids, mask = join("input_ids"), join("loss_mask")
        assert ids is not None
        assert mask is not None
        return PackedBatch(
            input_ids=ids.long(),
            loss_mask=mask.bool(),
            document=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(lengths)),
            position=torch.cat([torch.arange(length) for length in lengths]),
            **{name: join(name) for name in STATES},
            lengths=lengths,
            sample_ids=[part.id for part in parts],
            useful=find_useful_rows(mask.bool(), lengths, self._ttt_steps),
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Return torch.cat(parts); in a reading process laid where the training process sees it, without another copy.

    (Left to the queue between the two, a lack of shared memory would lose the batch and training would wait for ever.)
    """
    if get_worker_info() is None:
        return torch.cat(parts)
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    shape = torch.Size([sum(len(part) for part in parts), *parts[0].shape[1:]])
    try:
        storage = torch.UntypedStorage._new_shared(shape.numel() * dtype.itemsize)
    except RuntimeError as error:
        raise ValueError(
            f"train.data_workers needs more shared memory than there is ({error}): "
            "give the machine or container more (docker run --shm-size), or set train.data_workers=0"
        ) from None
    joined = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
    return torch.cat(parts, out=joined)


def _shared(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_shared() else _joined([tensor])


class TrainingData:
    """What a run trains on: the samples of `train.stores`, or of its own store, and the draft vocabulary.

    A context: at its end the processes that read are gone, also when training fails. Reading leaves torch's random
    numbers as they are.

    Args:
        rank, ranks: whose share of the packs is read, and of the shards whose checksums are compared.
        pin: read into pinned memory, for a GPU.

    Raises:
        ValueError: a store is incomplete, of another verifier, or of other aux layers; there is nothing to train on.
    """

    def __init__(self, config: Config, head: DraftHeadConfig, rank: int = 0, ranks: int = 1, pin: bool = False) -> None:
        options = config.train
        sources = options.stores or [StoreConfig(str(config.hidden_states_folder))]
        weights = [source.weight for source in sources]
        offline = options.hidden_states is HiddenStates.offline
        self.stores = [HiddenStateStore(Path(source.folder), with_states=offline) for source in sources]
        for store in self.stores:
            _check_store(store, config, head)
        self.settings = [
            {"digest": store.manifest["digest"], "weight": weight}
            for store, weight in zip(self.stores, weights, strict=True)
        ]
        self._weights, self._head, self._verifier = weights, head, config.verifier
        self.split = Split.of(self.stores, options.batch_tokens, options.too_long)
        ids = list(itertools.chain.from_iterable(store.ids for store in self.stores))
        ordered = sorted(self.split.heldout, key=lambda sample: heldout_order(ids[sample]))
        conversations = itertools.groupby(ordered, key=lambda sample: conversation_id(ids[sample]))
        chosen = itertools.islice(conversations, options.heldout_samples)
        self.heldout = [sample for _, sequences in chosen for sample in sequences]
        parts = [Passes(samples, weight) for samples, weight in zip(self.split.train, weights, strict=True)]
        for store, part in zip(self.stores, parts, strict=True):
            if part.weight * len(part.samples) < 1:
                raise ValueError(
                    f"train.stores: weight {part.weight} takes none of the {len(part.samples)} training samples of "
                    f"{store.folder} in an epoch: raise it to {1 / len(part.samples):.2g} or more"
                )
        self._packs = PackStream(self.split.lengths, parts, options.batch_tokens, options.seed)
        self.packs_per_epoch = len(self._packs.epoch(0))
        self._options = options
        self._rank, self._ranks, self._pin = rank, ranks, pin
        self._reading: weakref.WeakSet[Generator[PackedBatch, None, None]] = weakref.WeakSet()

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        for reading in list(self._reading):
            reading.close()
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # raised wherever training was
            raise ValueError(
                f"a process of train.data_workers={self._options.data_workers} ended ({error}): see whether memory "
                "ran out, and start the same command again; it goes on from the newest checkpoint"
            ) from error

    def inputs(self) -> dict[str, str]:
        """Return the digest of every store and of the conversations it was made of, by folder."""
        manifests = {str(store.folder): store.manifest for store in self.stores}
        conversations = {f"{name}: conversations": m["settings"]["conversations"] for name, m in manifests.items()}
        return {name: manifest["digest"] for name, manifest in manifests.items()} | conversations

    def verify(self) -> None:
        """Compare the checksums of this rank's share of the shards; refuse what was altered."""
        if self._rank == 0:
            size = sum(entry["bytes"] for store in self.stores for entry in store.manifest["shards"])
            print(f"train: reads {size / 2**30:.2f} GiB once to compare checksums", flush=True)
        for store in self.stores:
            store.verify(self._rank, self._ranks)

    @cached_property
    def vocabulary(self) -> VocabularyMap:
        """Return the draft vocabulary that the stores ask for."""
        always = special_token_ids(self._verifier)
        return choose_vocabulary(self.stores, self._weights, self._head.draft_vocab_size, self._head.vocab_size, always)

    def batches(self, first_pack: int) -> Iterator[PackedBatch]:
        """Yield the batches of this rank for ever, from pack `first_pack` of the whole sequence on."""
        packs = itertools.islice(self._packs.start_at(first_pack), self._rank, None, self._ranks)
        return self._read(packs, self._options.ttt_steps)

    def heldout_batches(self, ttt_steps: int) -> Iterator[PackedBatch]:
        """Yield this rank's share of the held-out samples, whole, in batches with the useful rows of K steps.

        Every rank gets as many batches, as ZeRO-3 asks for: at the end some may get one that another has.
        """
        longest = max((self.split.lengths[sample] for sample in self.heldout), default=0)
        packs = pack(self.split.lengths, self.heldout, max(self._options.batch_tokens, longest))
        turns = range(self._rank, math.ceil(len(packs) / self._ranks) * self._ranks, self._ranks)
        return self._read([packs[turn % len(packs)] for turn in turns], ttt_steps)

    def _read(self, packs: Iterable[list[int]], ttt_steps: int) -> Generator[PackedBatch, None, None]:
        batches = Batches(self.stores, self.split.lengths, ttt_steps)
        reading = read(batches, packs, self._options.data_workers, self._pin)
        self._reading.add(reading)
        return reading


def read(
    batches: Batches, packs: Iterable[list[int]], num_workers: int, pin: bool
) -> Generator[PackedBatch, None, None]:
    """Yield the batches of packs, in order, read by processes that end with the generator."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=packs,
        num_workers=num_workers,
        pin_memory=pin,
        worker_init_fn=end_with_parent,
        generator=torch.Generator(),  # or it would draw from the training's own
    )
    reading: Any = iter(loader)
    try:
        for batch in reading:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:
        if num_workers:
            reading._shutdown_workers()  # else left to the last reference, which a traceback may hold


def _check_store(store: HiddenStateStore, config: Config, head: DraftHeadConfig) -> None:
    recorded = store.manifest["settings"]
    check_identity(recorded["verifier"], config.verifier, str(store.folder), "set the same verifier or dump anew")
    if store.with_states and list(head.aux_layers) != recorded["aux_layers"]:
        raise ValueError(
            f"draft.aux_layers is {list(head.aux_layers)}, {store.folder} holds layers {recorded['aux_layers']}: "
            "set the same layers or dump anew"
        )
