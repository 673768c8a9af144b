"""Which samples an epoch takes, which of them share a pack, and in what order packs come.

The samples of all stores are numbered through, store by store. A store's *weight* is how often each of its training
samples is seen in an epoch: the store is passed over again and again, each pass in an order of its own, and an epoch
takes the next `weight * samples` of that endless sequence. With weight 1/2 it takes one half, the next one the other.
All of it depends on the seed, the stores and `train.batch_tokens` alone.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


def pack(lengths: list[int], order: list[int], batch_tokens: int) -> list[list[int]]:
    """Put samples, in the order given, each into the fullest pack that still holds it (best fit).

    Return packs of sample numbers, in the order in which they were opened. `lengths` has the tokens of every sample,
    at most `batch_tokens` of those in `order`.
    """
    packs: list[list[int]] = []
    open_packs: list[list[int]] = [[] for _ in range(batch_tokens + 1)]  # by tokens free, each a heap of pack numbers
    some = 0  # bit n: a pack with n tokens free is there
    for sample in order:
        length = lengths[sample]
        if fitting := some >> length:
            free = length + (fitting & -fitting).bit_length() - 1
            number = heapq.heappop(open_packs[free])
            if not open_packs[free]:
                some ^= 1 << free
        else:
            packs.append([])
            free, number = batch_tokens, len(packs) - 1
        packs[number].append(sample)
        heapq.heappush(open_packs[free - length], number)
        some |= 1 << (free - length)
    return packs


@dataclass
class Passes:
    """The training samples of one store, passed over for ever."""

    samples: list[int]
    weight: float = 1.0  # passes in an epoch; 0: none

    def epoch(self, number: int, seed: str) -> list[int]:
        """Return the samples that an epoch takes; one that it takes twice is there twice."""
        if not self.weight:
            return []
        num, share = len(self.samples), self.weight * len(self.samples)
        first, end = math.floor(number * share), math.floor((number + 1) * share)
        taken = []
        for passed in range(first // num, -(-end // num)):
            order = self.samples.copy()
            part = slice(max(0, first - passed * num), min(num, end - passed * num))
            if part != slice(0, num):
                random.Random(f"{seed}/{passed}").shuffle(order)
            taken += order[part]
        return taken


@dataclass
class PackStream:
    """An endless, reproducible sequence of packs: every epoch is reshuffled and packed anew."""

    lengths: list[int]  # tokens of every sample
    parts: list[Passes]  # by store
    batch_tokens: int
    seed: int

    def epoch(self, number: int) -> list[list[int]]:
        """Return the packs of one epoch."""
        taken = [part.epoch(number, f"{self.seed}/store {place}") for place, part in enumerate(self.parts)]
        order = sorted(itertools.chain.from_iterable(taken))
        random.Random(f"{self.seed}/{number}").shuffle(order)
        packs = pack(self.lengths, order, self.batch_tokens)
        random.Random(f"{self.seed}/{number}/packs").shuffle(packs)
        return packs

    def start_at(self, first: int) -> Iterator[list[int]]:
        """Yield packs for ever, from the `first` of the whole sequence on."""
        for number in itertools.count():
            packs = self.epoch(number)
            yield from packs[first:]
            first = max(0, first - len(packs))
