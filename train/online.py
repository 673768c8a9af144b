"""Online training: the frozen verifier reads every packed batch next to the trainer, and nothing touches the disk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..conf.schema import VerifierConfig
from ..data_synthesis.states.transformers_engine import read_documents
from ..models.verifier.model import Verifier
from .loss.rows import PackedBatch


class OnlineStates:
    """The verifier of an online run, which fills batches with its hidden states.

    Args:
        batch_tokens: of one forward, padding included.
        dtype: of the states that training sees; they are rounded to the verifier's first, as in a store.
    """

    def __init__(self, verifier: Verifier, batch_tokens: int, dtype: torch.dtype) -> None:
        self.verifier, self.batch_tokens, self.dtype = verifier, batch_tokens, dtype
        self._checked = False

    @classmethod
    def load(
        cls,
        config: VerifierConfig,
        aux_layers: Sequence[int],
        gpus: range | None,
        batch_tokens: int,
        dtype: torch.dtype,
    ) -> OnlineStates:
        """Load the verifier onto this rank's own GPUs, or into this process if there are none."""
        if config.tensor_parallel:
            raise ValueError(
                "verifier.tensor_parallel must be false with train.hidden_states=online: every rank reads other "
                "documents, and needs a verifier of its own, which is spread over the rank's GPUs"
            )
        return cls(Verifier.load(config, list(aux_layers), gpus), batch_tokens, dtype)

    @torch.no_grad()
    def fill(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with its states, on its device, document by document in its order."""
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
