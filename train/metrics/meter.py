"""What the optimizer steps since the last log amount to: their loss, and what they cost."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from ..loss.fused import SUMS
from ..loss.rows import PackedBatch
from ..ranks.group import Ranks, sum_over_ranks
from .cost import matmul_rate


class Meter:
    """Adds up this rank's optimizer steps, from one log to the next; only logging waits for the device.

    `flops` gives the operations of documents of these lengths, with so many rows counted by each TTT step. `dtype` is
    that of the matrix products, whose rate is measured here.
    """

    def __init__(
        self, flops: Callable[[list[int], list[float]], float], ranks: Ranks, dtype: torch.dtype, ttt_steps: int
    ) -> None:
        self._flops, self._ranks, self._device = flops, ranks, ranks.device
        self._sums = torch.zeros(ttt_steps, len(SUMS), device=ranks.device)
        self._rate = matmul_rate(self._device, dtype, 1024 if self._device.type == "cpu" else 8192)
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._sums.zero_()
        self._lengths: list[int] = []
        self._seconds = {"waiting": 0.0, "paused": 0.0}
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the time inside as `waiting` for data, or `paused`: held-out batches and checkpoints are of no step."""
        started = time.perf_counter()
        yield
        self._seconds[what] += time.perf_counter() - started

    def add(self, batches: list[PackedBatch], sums: Tensor) -> None:
        """Count the micro-batches of a step, and the sums of its loss (columns as `SUMS`)."""
        self._lengths += [length for batch in batches for length in batch.lengths]
        self._sums += sums

    def read(self) -> tuple[dict[str, float], int, float]:
        """Return the metrics of the steps since the last time, over all ranks, their tokens and seconds; begin anew."""
        num_counted = self._sums[:, SUMS.index("counted")].tolist()  # once they are read, the device has done its work
        seconds = time.perf_counter() - self._since - self._seconds["paused"]
        flops = self._flops(self._lengths, num_counted)
        on_gpu = self._device.type == "cuda"
        size = torch.cuda.max_memory_allocated(self._device) if on_gpu else psutil.Process().memory_info().rss
        mine = [sum(self._lengths), flops, self._rate, seconds, self._seconds["waiting"] / seconds, size / 2**30]
        every = list(zip(*self._ranks.gather(mine), strict=True))
        tokens, flops, rate = map(sum, every[:3])
        seconds, waited_share, memory_gib = map(max, every[3:])
        cost = {"tokens_per_s": tokens / seconds, "utilisation": flops / rate / seconds, "memory_gib": memory_gib}
        metrics = {**loss_metrics(sum_over_ranks(self._sums)), **cost, "data_wait_share": waited_share}
        self.restart()
        return {f"train/{name}": value for name, value in metrics.items()}, tokens, seconds


def loss_metrics(sums: Tensor) -> dict[str, float]:
    """Return means over counted rows (by TTT step, if it counted any), and the loss, from the sums of all ranks."""
    sum_of = dict(zip(SUMS, sums.T.tolist(), strict=True))
    counted = sum_of["counted"]
    metrics = {
        f"{name}_step_{k}": value / number
        for name in ("kl", "agreement", "prefix_agreement", "overlap", "entropy")
        for k, (value, number) in enumerate(zip(sum_of[name], counted, strict=True))
        if number
    }
    if any(counted):  # not if every step was skipped
        losses = zip(sum_of["loss"], counted, strict=True)
        metrics["loss"] = sum(value / max(1.0, number) for value, number in losses)
        outside = sum(sum_of["outside_draft_vocab"])
        metrics["outside_draft_vocab"] = outside / (outside + sum(counted))
    return metrics
