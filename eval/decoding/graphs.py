"""Rounds captured as CUDA graphs."""

import sys
from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_WARM_UPS = 2  # before a capture: what is compiled or allocated once, then is


class Graphs:
    """Runs functions twice as they are and from then on, captured, from their graphs.

    A function reads and writes memory that stays in place, and returns one tensor, which the next run writes over.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._possible = True
        self.clear()

    def clear(self) -> None:
        """Forget every graph, for the memory that they use has moved."""
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._runs: Counter[Hashable] = Counter()
        self._pool = torch.cuda.graph_pool_handle()  # a pool ends with the last graph in it

    def run(self, key: Hashable, function: Callable[[], Tensor]) -> Tensor:
        """Run a function, of which this is the same key and the same memory as before, or its graph."""
        if key in self._captured:
            graph, result = self._captured[key]
            graph.replay()
            return result
        self._runs[key] += 1
        if not self._possible or self._runs[key] <= _WARM_UPS:
            return function()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
                result = function()  # which does not run it
        except RuntimeError as error:  # the verifier looks at values on the host: experts chosen there, for example
            self._possible = False
            torch.cuda.set_stream(stream)  # a capture that fails leaves its own behind
            reason = " ".join(str(error.__context__ or error).split())[:200]
            print(f"evaluate: no CUDA graphs, for a round cannot be captured: {reason}", file=sys.stderr)
            return function()
        self._captured[key] = graph, result
        graph.replay()
        return result
