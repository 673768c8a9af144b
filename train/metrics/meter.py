"""What training costs as it runs: tokens a second, utilisation, memory, the share of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from ...models.head.config import DraftHeadConfig
from ..loss.rows import PackedBatch
from ..ranks.group import Ranks
from .cost import machine_flops, plain_flops


class Meter:
    """Adds up what optimizer steps cost this rank, from one log to the next; only logging waits for the device.

    Args:
        dtype: of the matrix products, whose rate is measured here.
    """

    def __init__(self, head: DraftHeadConfig, train_lm_head: bool, ranks: Ranks, dtype: torch.dtype) -> None:
        self._head, self._train_lm_head, self._ranks, self._device = head, train_lm_head, ranks, ranks.device
        _, self._rate = machine_flops(self._device, dtype, 1024 if self._device.type == "cpu" else 8192)
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._lengths: list[int] = []
        self._waited_s = self._paused_s = 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside: held-out batches and checkpoints are no part of a step."""
        started = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - started

    def add(self, batches: list[PackedBatch]) -> None:
        """Count the micro-batches of a step."""
        self._lengths += [length for batch in batches for length in batch.lengths]

    def read(self, num_counted: list[float]) -> dict[str, float]:
        """Return the metrics of the steps since the last time, over all ranks, and begin anew.

        Args:
            num_counted: rows counted on this rank at each TTT step; once they are read, the device has done its work.
        """
        seconds = time.perf_counter() - self._since - self._paused_s
        flops = plain_flops(self._head, self._train_lm_head, self._lengths, num_counted)
        mine = [sum(self._lengths), flops, self._rate, seconds, self._waited_s / seconds, self._memory_gib()]
        every = list(zip(*self._ranks.gather(mine), strict=True))
        tokens, flops, rate = map(sum, every[:3])
        seconds, waited_share, memory_gib = map(max, every[3:])
        self.restart()
        return {
            "train/tokens_per_s": tokens / seconds,
            "train/utilisation": flops / rate / seconds,
            "train/memory_gib": memory_gib,
            "train/data_wait_share": waited_share,
        }

    def _memory_gib(self) -> float:
        """Return the most memory torch held on the GPU since the last time, or the resident size on the CPU."""
        on_gpu = self._device.type == "cuda"
        size = torch.cuda.max_memory_allocated(self._device) if on_gpu else psutil.Process().memory_info().rss
        return float(size) / 2**30
