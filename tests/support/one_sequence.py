"""The draft decoder on a single text, fed step by step: what training's claims are held against."""

from __future__ import annotations

import torch
from fledge.eval.decoding.acceptance import NUM_DRAWS
from fledge.eval.decoding.head_drafter import DraftDecoder
from fledge.eval.decoding.proposal import NewRows, Proposal
from fledge.models.head.draft_head import DraftHead
from fledge.models.verifier.cache import round_up


class OneSequence:
    """A DraftDecoder of one sequence that counts its own rows."""

    def __init__(self, head: DraftHead, embedding: torch.Tensor, num_draft_tokens: int = 4, **options: int) -> None:
        self._decoder = DraftDecoder(head, embedding, num_draft_tokens, **options)
        self._decoder.reserve(256)
        self.num_rows = 0

    def extend(self, fed: list[int], aux_hidden_states: torch.Tensor) -> None:
        count, rows = torch.tensor([len(fed)]), torch.tensor([self.num_rows])
        num_read = round_up(self.num_rows + len(fed))
        self._decoder.extend(NewRows(torch.tensor([fed]), rows, count, num_read), aux_hidden_states[None])
        self.num_rows += len(fed)
        self._state, self._normed = self._decoder._state, self._decoder._normed

    def feed(self, token: int, step: int) -> None:
        read = round_up(self.num_rows + step)
        self._state, self._normed = self._decoder.feed(torch.tensor([token]), self._state, step, read)

    def logits(self) -> torch.Tensor:
        return self._decoder.head.lm_head(self._normed)[0]

    def propose(self) -> Proposal:
        draws = torch.zeros(1, self._decoder.depth, NUM_DRAWS, dtype=torch.float64)
        return self._decoder.propose(draws, round_up(self.num_rows + self._decoder.num_draft_rows))
