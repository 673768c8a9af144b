"""Training data: stores mixed by weight, split, packed, shared out to ranks, and read by processes of their own."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, get_worker_info

from ...conf.runtime.signals import end_with_parent
from ...conf.schema import HiddenStates, LastStates, Positions, StoreConfig, TooLong, TrainConfig, VerifierConfig
from ...data_synthesis.heldout import conversation_id, heldout_order, limited
from ...data_synthesis.store.draft_vocabulary import choose_vocabulary
from ...data_synthesis.store.shard import STATES, Sample
from ...data_synthesis.store.store import HiddenStateStore
from ...models.head.config import DraftHeadConfig
from ...models.head.vocabulary import VocabularyMap
from ...models.verifier.config import special_token_ids
from ...models.verifier.weights import check_identity
from ..loss.rows import PackedBatch, find_useful_rows
from .packing import PackStream, Passes, pack


def answers_end(loss_mask: Tensor, budget: int) -> int:
    """Return how many tokens there are up to the end of the last answer that ends within a budget, 0 without one.

    `loss_mask` [T] is longer than the budget. With the mask 0 1 1 0 1 1 1, budget 3 and 6 give 3, budget 2 gives 0.
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
    def of(
        cls,
        stores: list[HiddenStateStore],
        batch_tokens: int,
        too_long: TooLong,
        limits: Iterable[int | None] = itertools.repeat(None),
    ) -> Split:
        """Split stores by the ids that were held out when they were made; read the masks of long samples only.

        `limits` are of the training samples of each store, None for all.
        """
        shares = [store.manifest["settings"]["heldout_share"] for store in stores]
        elsewhere = {conversation_id(name) for store in stores for name in store.heldout_ids}
        split = cls([], [], [])
        heldout_ids: set[str] = set()
        for store, limit in zip(stores, limits, strict=False):
            first, dropped_before = len(split.lengths), split.num_dropped
            train: list[int] = []
            for index, (sample_id, length) in enumerate(zip(store.ids, store.lengths, strict=True)):
                number = len(split.lengths)
                split.lengths.append(length)
                if store.num_images[index] and not store.with_states:
                    split.num_with_images += 1
                elif sample_id in store.heldout_ids:
                    if sample_id not in heldout_ids:
                        heldout_ids.add(sample_id)
                        split.heldout.append(number)
                elif conversation_id(sample_id) in elsewhere:
                    split.num_heldout_elsewhere += 1
                elif length <= batch_tokens:
                    train.append(number)
                elif too_long is TooLong.cut and (cut_length := answers_end(store.loss_mask(index), batch_tokens)):
                    split.lengths[number] = cut_length
                    split.num_cut += 1
                    train.append(number)
                else:
                    split.num_dropped += 1
            if not train:
                raise _nothing_to_train(store, split.num_dropped - dropped_before, batch_tokens, max(shares))
            names = dict(enumerate(store.ids, start=first))
            split.train.append(limited(train, limit, names.__getitem__))
        return split

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample that is trained on."""
        return max(self.lengths[sample] for sample in itertools.chain.from_iterable(self.train))

    def __str__(self) -> str:
        others = ""
        if self.num_heldout_elsewhere:
            others += f", {self.num_heldout_elsewhere} left out as another store holds them out"
        if self.num_with_images:
            others += f", {self.num_with_images} left out as they have images, which online training does not read"
        return (
            f"{sum(map(len, self.train))} training samples ({self.num_cut} longer than a pack cut after an answer, "
            f"{self.num_dropped} dropped{others}) and {len(self.heldout)} held-out"
        )


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


def check_store(store: HiddenStateStore, options: TrainConfig, verifier: VerifierConfig, head: DraftHeadConfig) -> None:
    """Let a store read what a head reads; refuse one of another verifier, or without states that training needs."""
    recorded = store.manifest["settings"]
    check_identity(recorded["verifier"], verifier, str(store.folder), "set the same verifier or dump anew")
    if store.with_states:
        store.read_layers(list(head.aux_layers))
        if options.positions is Positions.all and recorded["last_states"] != LastStates.all.value:
            raise ValueError(
                f"train.positions=all needs the verifier's states of prompts too, {store.folder} was made with "
                f"dump.last_states={recorded['last_states']}: dump anew with dump.last_states=all"
            )


class Batches(Dataset[PackedBatch | ValueError]):
    """Packed batches by the numbers of their samples, of which `lengths` tokens are used; goes to reading processes.

    With `all_positions` every token counts as produced, in whatever part of a conversation it stands.
    """

    def __init__(
        self, stores: list[HiddenStateStore], lengths: list[int], ttt_steps: int, all_positions: bool = False
    ) -> None:
        self._samples: ConcatDataset[Sample] = ConcatDataset(stores)  # type: ignore[arg-type]
        self._lengths, self._ttt_steps, self._all_positions = lengths, ttt_steps, all_positions

    def __getitem__(self, pack: list[int]) -> PackedBatch | ValueError:
        """Lay samples end to end; what is wrong with a store is given back, since raised it would lose its type."""
        try:
            batch = self._collate(pack)
            if get_worker_info() is None:
                return batch
            return batch.mapped(lambda tensor: tensor if tensor.is_shared() else _joined([tensor]))
        except ValueError as error:
            return error

    def _collate(self, pack: list[int]) -> PackedBatch:
        parts, lengths = [self._samples[number] for number in pack], [self._lengths[number] for number in pack]
        if len({part.aux_scale is None for part in parts}) > 1:  # of stores of several formats
            parts = [part.decoded() for part in parts]

        def join(name: str) -> Tensor:
            return _joined([getattr(part, name)[:length] for part, length in zip(parts, lengths, strict=True)])

        mask = join("loss_mask").bool()
        mask = torch.ones_like(mask) if self._all_positions else mask
        return PackedBatch(
            input_ids=join("input_ids").long(),
            loss_mask=mask,
            document=torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(lengths)),
            position=torch.cat([torch.arange(length) for length in lengths]),
            **{name: None if getattr(parts[0], name) is None else join(name) for name in STATES},
            lengths=lengths,
            sample_ids=[part.id for part in parts],
            useful=find_useful_rows(mask, lengths, self._ttt_steps),
        )


def _joined(parts: list[Tensor]) -> Tensor:
    """Return torch.cat(parts); in a reading process laid where the training process sees it, without another copy.

    (Left to the queue between the two, a lack of shared memory would lose the batch and training would wait for ever.)
    """
    if get_worker_info() is None:
        return torch.cat(parts)
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    shape = torch.Size([sum(map(len, parts)), *parts[0].shape[1:]])
    try:
        storage = torch.UntypedStorage._new_shared(shape.numel() * dtype.itemsize)
    except RuntimeError as error:
        raise ValueError(
            f"train.data_workers needs more shared memory than there is ({error}): "
            "give the machine or container more (docker run --shm-size), or set train.data_workers=0"
        ) from None
    joined = torch.empty(0, dtype=dtype).set_(storage, 0, shape)  # type: ignore[call-overload]
    return torch.cat(parts, out=joined)


class TrainingData:
    """What a run trains on: the samples of `train.stores`, or of its own store, and the draft vocabulary.

    A context: at its end the processes that read are gone, also when training fails. Reading leaves torch's random
    numbers as they are. ValueError if a store is incomplete, of another verifier or aux layers, or nothing is left.
    """

    def __init__(
        self,
        options: TrainConfig,
        verifier: VerifierConfig,
        own_store: Path,
        head: DraftHeadConfig,
        rank: int = 0,  # whose share of the packs is read, and of the shards whose checksums are compared
        ranks: int = 1,
        pin: bool = False,  # read into pinned memory, for a GPU
    ) -> None:
        self._options, self._verifier, self._head = options, verifier, head
        self._rank, self._ranks, self._pin = rank, ranks, pin
        self._readers: weakref.WeakSet[Any] = weakref.WeakSet()
        sources = options.stores or [StoreConfig(str(own_store))]
        offline = options.hidden_states is HiddenStates.offline
        self.stores = [HiddenStateStore(Path(source.folder), with_states=offline) for source in sources]
        for store in self.stores:
            check_store(store, options, self._verifier, self._head)
        largest = max(self.stores, key=lambda store: store.manifest["settings"]["heldout_share"])
        most = largest.manifest["settings"]["heldout_share"]
        for store in self.stores:
            settings = store.manifest["settings"]
            if settings.get("join_length") and settings["heldout_share"] < most:
                raise ValueError(
                    f"{store.folder} has joined samples (dump.join_length), so what {largest.folder} holds out "
                    f"(data.heldout_share={most}) cannot be kept from training in it: dump it with that share"
                )
        self._weights = [source.weight for source in sources]
        self.settings: list[dict[str, Any]] = []  # what determines the samples that are trained on
        for store, source in zip(self.stores, sources, strict=True):
            limit = {} if source.limit is None else {"limit": source.limit}
            self.settings.append({"digest": store.manifest["digest"], "weight": source.weight, **limit})
        limits = [source.limit if source.weight else 0 for source in sources]
        self.split = Split.of(self.stores, options.batch_tokens, options.too_long, limits)
        self.heldout = self._chosen(options.heldout_samples)
        own, *others = self.heldout_ids
        if options.max_forgetting is not None and not (own and any(others)):
            raise ValueError(
                "train.max_forgetting needs held-out conversations in the first of train.stores, and others in those "
                "after it: make them with data.heldout_share above 0, from prompts whose ids differ"
            )
        parts = [Passes(*part) for part in zip(self.split.train, self._weights, strict=True)]
        for store, part in zip(self.stores, parts, strict=True):
            if 0 < part.weight * (num_samples := len(part.samples)) < 1:
                raise ValueError(
                    f"train.stores: weight {part.weight} takes none of the {num_samples} training samples of "
                    f"{store.folder} in an epoch: raise it to {1 / num_samples:.2g} or more"
                )
        self._packs = PackStream(self.split.lengths, parts, options.batch_tokens, options.seed)
        self.packs_per_epoch = len(self._packs.epoch(0))

    def _chosen(self, most: int) -> list[int]:
        """Return the held-out samples that are measured, `most` conversations of each store."""
        ids = [sample_id for store in self.stores for sample_id in store.ids]
        ordered = sorted(self.split.heldout, key=lambda sample: heldout_order(ids[sample]))
        chosen = list[int]()
        for numbers in self._numbers:
            of_store = [sample for sample in ordered if sample in numbers]
            conversations = itertools.groupby(of_store, key=lambda sample: conversation_id(ids[sample]))
            chosen += [sample for _, sequences in itertools.islice(conversations, most) for sample in sequences]
        return chosen

    def __enter__(self) -> TrainingData:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        for reader in list(self._readers):
            reader._shutdown_workers()  # else left to the last reference, which a traceback may hold
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # raised wherever training was
            raise ValueError(
                f"a process of train.data_workers={self._options.data_workers} ended ({error}): see whether memory "
                "ran out, and start the same command again; it goes on from the newest checkpoint"
            ) from error

    @cached_property
    def _numbers(self) -> list[range]:
        """Return the numbers of the samples of each store."""
        return list(
            itertools.starmap(range, itertools.pairwise(itertools.accumulate(map(len, self.stores), initial=0)))
        )

    @cached_property
    def heldout_ids(self) -> list[set[str]]:
        """Return the ids of the held-out samples that are measured, by store."""
        return [
            {store.ids[sample - numbers.start] for sample in self.heldout if sample in numbers}
            for numbers, store in zip(self._numbers, self.stores, strict=True)
        ]

    def inputs(self) -> dict[str, str]:
        """Return the digest of every store and of the conversations it was made of, by folder."""
        inputs = {}
        for store in self.stores:
            inputs[str(store.folder)] = store.manifest["digest"]
            inputs[f"{store.folder}: conversations"] = store.manifest["settings"]["conversations"]
        return inputs

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
        """Yield this rank's batches for ever, from pack `first_pack` of all ranks on."""
        packs = itertools.islice(self._packs.start_at(first_pack), self._rank, None, self._ranks)
        return self._read(packs, self._options.ttt_steps, self._options.positions is Positions.all)

    def heldout_batches(self, ttt_steps: int) -> Iterator[PackedBatch]:
        """Yield this rank's share of the held-out samples, whole, in batches with the useful rows of K steps.

        Every rank gets as many batches, as ZeRO-3 asks for: at the end some may get one that another has.
        """
        longest = max([self._options.batch_tokens, *(self.split.lengths[sample] for sample in self.heldout)])
        packs = pack(self.split.lengths, self.heldout, longest)
        turns = range(self._rank, math.ceil(len(packs) / self._ranks) * self._ranks, self._ranks)
        return self._read([packs[turn % len(packs)] for turn in turns], ttt_steps)

    def _read(self, packs: Iterable[list[int]], ttt_steps: int, all_positions: bool = False) -> Iterator[PackedBatch]:
        """Yield the batches of packs, in order, read by processes that end with it, or with this context."""
        loader = DataLoader(
            Batches(self.stores, self.split.lengths, ttt_steps, all_positions),
            batch_size=None,
            sampler=packs,
            num_workers=self._options.data_workers,
            pin_memory=self._pin,
            worker_init_fn=end_with_parent,
            generator=torch.Generator(),  # or it would draw from the training's own
        )
        reader = iter(loader)
        if self._options.data_workers:
            self._readers.add(reader)
        for batch in reader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
