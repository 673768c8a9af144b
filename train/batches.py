"""Packed batches from the store: which samples share a micro-batch, in what order, on which rank."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data_synthesis.store import HiddenStateStore
from .rows import PackedBatch


def pack(lengths: list[int], order: list[int], batch_tokens: int) -> list[list[int]]:
    """Put samples, in the order given, each into the fullest pack that still holds it (best fit).

    Args:
        lengths: tokens of every sample; those in `order` are at most `batch_tokens`.

    Returns:
        Packs of sample numbers, in the order in which they were opened.
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (tokens free, pack), ascending
    for sample in order:
        place = bisect.bisect_left(open_packs, (lengths[sample], -1))
        if place == len(open_packs):
            packs.append([])
            free, number = batch_tokens, len(packs) - 1
        else:
            free, number = open_packs.pop(place)
        packs[number].append(sample)
        bisect.insort(open_packs, (free - lengths[sample], number))
    return packs


class PackStream:
    """An endless, reproducible sequence of packs: every epoch holds each sample once, reshuffled and packed anew."""

    def __init__(self, lengths: list[int], samples: list[int], batch_tokens: int, seed: int) -> None:
        assert samples, "nothing to train on"
        self._lengths = lengths
        self._samples = samples
        self._batch_tokens = batch_tokens
        self._seed = seed

    def epoch(self, number: int) -> list[list[int]]:
        """Give the packs of one epoch."""
        order = self._samples.copy()
        random.Random(f"{self._seed}/{number}").shuffle(order)
        packs = pack(self._lengths, order, self._batch_tokens)
        random.Random(f"{self._seed}/{number}/packs").shuffle(packs)
        return packs

    def start_at(self, first: int) -> Iterator[list[int]]:
        """Yield packs for ever, from the `first` of the whole sequence on."""
        number = 0
        while True:
            packs = self.epoch(number)
            yield from packs[first:]
            first = max(0, first - len(packs))
            number += 1


def collate(store: HiddenStateStore, samples: list[int]) -> PackedBatch:
    """Lay samples of the store end to end."""
    parts = [store[sample] for sample in samples]
    lengths = torch.tensor([len(part.input_ids) for part in parts])
    return PackedBatch(
        input_ids=torch.cat([part.input_ids for part in parts]).long(),
        loss_mask=torch.cat([part.loss_mask for part in parts]).bool(),
        document=torch.repeat_interleave(torch.arange(len(parts)), lengths),
        position=torch.cat([torch.arange(int(length)) for length in lengths]),
        aux_hidden_states=_end_to_end([part.aux_hidden_states for part in parts]),
        last_hidden_state=_end_to_end([part.last_hidden_state for part in parts]),
        lengths=lengths.tolist(),
        sample_ids=[part.id for part in parts],
    )


def _end_to_end(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
