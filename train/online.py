"""Online training: the frozen verifier reads every packed batch beside the trainer, and nothing touches the disk."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..conf.schema import Config
from ..data_synthesis.record import read_documents
from ..models.verifier import Verifier
from .rows import PackedBatch


class OnlineStates:
    """The verifier of an online run, which fills batches with its hidden states."""

    def __init__(self, verifier: Verifier, batch_tokens: int, dtype: torch.dtype) -> None:
        self.verifier = verifier
        self.batch_tokens = batch_tokens  # of one forward, padding included
        self.dtype = dtype  # of the states that training sees; they are rounded to the verifier's first, as in a store
        self._checked = False

    @classmethod
    def load(cls, config: Config, aux_layers: Sequence[int]) -> OnlineStates:
        """Load the verifier onto this rank's own GPUs, or into this process where there are none."""
        gpus = own_gpus() if torch.cuda.is_available() else None
        verifier = Verifier.load(config.verifier, list(aux_layers), gpus)
        return cls(verifier, config.dump.batch_tokens, getattr(torch, config.train.dtype.value))

    @torch.no_grad()
    def fill(self, batch: PackedBatch) -> PackedBatch:
        """Give the batch with its states, on its device, document by document in its order."""
        num_tokens, device = len(batch.input_ids), batch.input_ids.device
        width = self.verifier.model.config.get_text_config().hidden_size
        aux = torch.empty(num_tokens, len(self.verifier.aux_layers) * width, dtype=self.dtype, device=device)
        last = torch.empty(num_tokens, width, dtype=self.dtype, device=device)
        starts = [0, *itertools.accumulate(batch.lengths)]
        documents = batch.input_ids.split(batch.lengths)
        for number, *states in read_documents(self.verifier, documents, self.batch_tokens, check=not self._checked):
            here = slice(starts[number], starts[number + 1])
            aux[here], last[here] = states
            self._checked = True
        return replace(batch, aux_hidden_states=aux, last_hidden_state=last)


def share_of_gpus(local_rank: int, local_ranks: int, num_gpus: int) -> range:
    """Give the GPUs that a rank has to itself: a node's are dealt out to its ranks in equal, consecutive parts.

    Four ranks on eight GPUs own 0-1, 2-3, 4-5, 6-7. Each trains on its first and spreads an online verifier over all.
    """
    if num_gpus < local_ranks:
        raise ValueError(
            f"{local_ranks} ranks were started on a machine with {num_gpus} GPUs: start at most one rank a GPU"
        )
    return range(local_rank * num_gpus // local_ranks, (local_rank + 1) * num_gpus // local_ranks)


def own_gpus() -> range:
    """Give this rank's GPUs, by the environment that `start_processes` completes."""
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return share_of_gpus(local_rank, local_ranks, torch.cuda.device_count())
