"""Online training: the frozen verifier reads every packed batch next to the trainer, and nothing touches the disk."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...conf.schema import VerifierConfig
from ...data_synthesis.states.transformers_engine import read_documents
from ...models.verifier.model import Verifier
from ..loss.rows import PackedBatch


def load_verifier(config: VerifierConfig, aux_layers: Sequence[int], gpus: range | None) -> Verifier:
    """Load the verifier of an online run onto this rank's own GPUs, or into this process if there are none."""
    if config.tensor_parallel:
        raise ValueError(
            "verifier.tensor_parallel must be false with train.hidden_states=online: every rank reads other "
            "documents, and needs a verifier of its own, which is spread over the rank's GPUs"
        )
    return Verifier.load(config, list(aux_layers), gpus)


class OnlineStates:
    """Fills batches with the hidden states of the verifier of an online run, `batch_tokens` a forward with padding.

    The states that training sees are rounded to the verifier's dtype, as in a store, then to `dtype`.
    """

    def __init__(self, verifier: Verifier, batch_tokens: int, dtype: torch.dtype) -> None:
        self.verifier, self.batch_tokens, self.dtype = verifier, batch_tokens, dtype
        self._checked = False

    @torch.no_grad()
    def fill(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with its states, on its device, document by document in its order."""
        width, num_aux = self.verifier.model.config.get_text_config().hidden_size, len(self.verifier.aux_layers)
        num_tokens, device = len(batch.input_ids), batch.input_ids.device
        aux = torch.empty(num_tokens, num_aux * width, dtype=self.dtype, device=device)
        last = torch.empty(num_tokens, width, dtype=self.dtype, device=device)
        parts = list(zip(aux.split(batch.lengths), last.split(batch.lengths), strict=True))
        documents = batch.input_ids.split(batch.lengths)
        for number, *states in read_documents(self.verifier, documents, self.batch_tokens, check=not self._checked):
            for part, state in zip(parts[number], states, strict=True):
                part.copy_(state)
            self._checked = True
        return replace(batch, aux_hidden_states=aux, last_hidden_state=last)
